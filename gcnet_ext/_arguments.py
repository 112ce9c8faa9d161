"""The arguments of the operators by name, as csrc/arguments.h has them for the kernels.

The operators take lists, in which autograd.Function finds no tensor. They are flattened for it here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

ACTIVATIONS = {"none": 0, "relu": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4, "hardswish": 5, "leaky_relu": 6}
"""Between the layers of a branch, by the numbers of csrc/ops.cpp."""
FINAL_ACTIVATIONS = {"none": 0, "relu": 1}
"""Of the result, by the numbers of csrc/ops.cpp."""

Tensors = Sequence[Tensor | None]


class Branch(NamedTuple):
    """The weights of one branch of the transform, ``t = w2 act(norm(w1 context + b1)) + b2``.

    Attributes:
        w1: ``[H, C]``, the first 1x1 convolution. All may have trailing dimensions of size 1: ``[H, C, 1, 1]``.
        b1: ``[H]`` or None.
        norm_weight, norm_bias: ``[H]`` or None, the affine part of the LayerNorm.
        w2: ``[C, H]``, the second 1x1 convolution. None: the branch is ``t = w1 context + b1`` with w1 ``[C, C]``.
        b2: ``[C]`` or None.
    """

    w1: Tensor
    b1: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    w2: Tensor | None = None
    b2: Tensor | None = None


def per_weight(values: Sequence[Any]) -> Any:
    """Something for each weight of a branch, by its name: shapes, sizes, gradients."""
    return Branch(*values)


NO_BRANCH: Tensors = (None,) * 6


class Options(NamedTuple):
    """What a call chooses, as the operators take it; csrc/ops.cpp explains each."""

    norm_eps: float | None = 1e-5
    activation: int = ACTIVATIONS["relu"]
    slope: float = 0.01
    hard_gate: Sequence[float] | None = None
    final_activation: int = FINAL_ACTIVATIONS["none"]


class Arguments(NamedTuple):
    """Those of global_context, of its inference, and in place. The lists have all their elements, None among them."""

    x: Any
    mask: Any  # weight, bias
    scale: Any  # w1, b1, norm_weight, norm_bias, w2, b2
    shift: Any
    residual: Any
    valid: Any
    norm_eps: Any
    activation: Any
    slope: Any
    hard_gate: Any
    final_activation: Any

    @classmethod
    def of_branches(
        cls, x: Any, mask: Any, scale: Branch | None, shift: Branch | None, options: Options, residual: Any, valid: Any
    ) -> Arguments:
        """From branches that may be missing, and options."""
        return cls(x, mask, list(scale or NO_BRANCH), list(shift or NO_BRANCH), residual, valid, *options)

    def options(self) -> Options:
        return Options(self.norm_eps, self.activation, self.slope, self.hard_gate, self.final_activation)

    def branches(self) -> tuple[Branch | None, Branch | None]:
        """The scale and the shift; None for one that has no weights at all."""
        scale, shift = (None if all(w is None for w in branch) else Branch(*branch) for branch in (self.scale, self.shift))
        return scale, shift


def flat(x: Any, mask: Iterable[Any], scale: Iterable[Any], shift: Iterable[Any], residual: Any, valid: Any, *options: Any):
    """The options of global_context as one value, and then its tensors, each by itself."""
    return options or None, x, *mask, *scale, *shift, residual, valid


def in_lists(tensors: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...], tuple[Any, ...], tuple[Any, ...], Any, Any]:
    """x, mask, scale, shift, residual and valid from the tensors of `flat`, or from a value for each of them."""
    return tensors[0], tensors[1:3], tensors[3:9], tensors[9:15], tensors[15], tensors[16]


class Saved(NamedTuple):
    """What forward keeps for backward."""

    context: Any
    attention: Any
    hidden: Any
    gate_values: Any
    positive: Any


class Needs(NamedTuple):
    """Whose gradients backward computes."""

    x: Any
    mask_weight: Any
    mask_bias: Any
    scale: Any
    shift: Any
    residual: Any


class BackwardArguments(NamedTuple):
    """Those of global_context_backward."""

    grad: Any
    x: Any
    mask: Any
    scale: Any
    shift: Any
    valid: Any
    norm_eps: Any
    activation: Any
    slope: Any
    hard_gate: Any
    final_activation: Any
    saved: Any
    needs: Any

    def forward(self) -> Arguments:
        options = self.norm_eps, self.activation, self.slope, self.hard_gate, self.final_activation
        return Arguments(self.x, self.mask, self.scale, self.shift, None, self.valid, *options)


class Gradients(NamedTuple):
    """The results of global_context_backward."""

    x: Any
    mask: Any
    scale: Any
    shift: Any
    residual: Any


IN_LISTS: dict[str, tuple[str, ...]] = {
    "mask": ("mask_weight", "mask_bias"),
    "scale": tuple(f"scale_{name}" for name in Branch._fields),
    "shift": tuple(f"shift_{name}" for name in Branch._fields),
    "saved": Saved._fields,
}
"""The names of the tensors in the lists of global_context and its backward."""


def options_of(
    norm: bool,
    eps: float,
    activation: str,
    slope: float,
    gate: str,
    gate_alpha: float,
    gate_beta: float,
    final_activation: str,
) -> Options:
    """Those of the public functions, as the operators take them."""
    hard_gate = (gate_alpha, gate_beta) if gate == "hard_sigmoid" else None
    return Options(eps if norm else None, ACTIVATIONS[activation], slope, hard_gate, FINAL_ACTIVATIONS[final_activation])
