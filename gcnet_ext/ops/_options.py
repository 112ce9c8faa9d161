"""What a call chooses beside its tensors: as callers say it, and as the operators take it."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Collection, Sequence
from typing import NamedTuple

from . import _checks

ACTIVATIONS = {"none": 0, "relu": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4, "hardswish": 5, "leaky_relu": 6}
"""The activations between the layers of a branch, by the numbers of csrc/ops.cpp."""
FINAL_ACTIVATIONS = {"none": 0, "relu": 1}
"""The activations of the result, by the numbers of csrc/ops.cpp."""
GATES = ("sigmoid", "hard_sigmoid")


class Options(NamedTuple):
    """What a call of global_context chooses, as the operator takes it; csrc/ops.cpp explains each."""

    norm_eps: float | None = 1e-5
    activation: int = ACTIVATIONS["relu"]
    slope: float = 0.01
    hard_gate: Sequence[float] | None = None
    final_activation: int = FINAL_ACTIVATIONS["none"]

    def check(self, op: str) -> None:
        if self.activation not in ACTIVATIONS.values():
            _checks.fail(op, f"activation must be one of {ACTIVATIONS}, got {self.activation}")
        if self.hard_gate is not None:
            _checks.count(op, "hard_gate", self.hard_gate, 2)
        check_final(op, self.final_activation)


class Choices(NamedTuple):
    """What a caller of global_context chooses, by the names and defaults of the public function."""

    norm: bool = True
    eps: float = 1e-5
    activation: str = "relu"
    slope: float = 0.01
    gate: str = "sigmoid"
    gate_alpha: float = 1 / 6
    gate_beta: float = 0.5
    final_activation: str = "none"

    def options(self, op: str) -> Options:
        """Converts the choices to what the operator takes. An eps of None is refused: to the operator it means no norm."""
        if not isinstance(self.norm, bool):
            _checks.fail(op, f"norm must be True or False, got {type(self.norm).__name__}")
        _one_of(op, "activation", self.activation, ACTIVATIONS)
        _one_of(op, "gate", self.gate, GATES)
        final = final_number(op, self.final_activation)
        for name in ("eps", "slope", "gate_alpha", "gate_beta"):
            number(op, name, getattr(self, name))
        hard_gate = (self.gate_alpha, self.gate_beta) if self.gate == "hard_sigmoid" else None
        return Options(self.eps if self.norm else None, ACTIVATIONS[self.activation], self.slope, hard_gate, final)


def final_number(op: str, final_activation: str) -> int:
    """The final activation, as the operators take it."""
    _one_of(op, "final_activation", final_activation, FINAL_ACTIVATIONS)
    return FINAL_ACTIVATIONS[final_activation]


def check_final(op: str, number: int) -> None:
    if number not in FINAL_ACTIVATIONS.values():
        _checks.fail(op, f"final_activation must be one of {FINAL_ACTIVATIONS}, got {number}")


def number(op: str, name: str, value: object) -> None:
    """Refuses what is no number, or a number that no float holds."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        _checks.fail(op, f"{name} must be a number, got {type(value).__name__}")
    try:
        float(value)  # type: ignore[arg-type]
    except OverflowError:
        _checks.fail(op, f"{name} must be a number that a float can hold, got one beyond {sys.float_info.max:.3g}")


def _one_of(op: str, name: str, value: object, names: Collection[str]) -> None:
    if not isinstance(value, str) or value not in names:
        _checks.fail(op, f"{name} must be one of {', '.join(names)}, got {value}")
