"""What the tests must know of an op. tests/ops/<op>.py has the entry of each, as OP; registry.py finds them.

Whatever holds for every op is tested for each entry: tests/properties, torch.compile, the emulated CUDA kernels, bench/ops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from grid import Case, Random
from torch import Tensor

import gcnet_ext
from gcnet_ext.ops._options import FINAL_ACTIVATIONS

Arguments = dict[str, Any]
Outputs = Sequence[Tensor | None]
Formula = Callable[[Arguments], Outputs]
To = Callable[[Tensor], Tensor]
Function = Callable[..., Any]

PARAMETERS = ("w1", "b1", "norm_weight", "norm_bias", "w2", "b2")
"""Of a branch."""
OPTIONS = {"norm_eps": 1e-5, "activation": 1, "slope": 0.01, "hard_gate": None, "final_activation": 0}
"""The choices of the block, by default."""


def no_bits(x: Tensor | None) -> Tensor:
    """What stands for the bits of the final ReLU where there is none."""
    return torch.empty(
        (0 if x is None or x.dim() == 0 else x.shape[0], 0), dtype=torch.uint8, device=None if x is None else x.device
    )


# ---- good arguments, by their names ------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """What the sizes of a saved tensor can depend on."""

    n: int
    c: int
    positions: int
    attended: bool  # whether the pool has a weight
    hidden: int  # hidden units of both branches
    gated: bool  # whether there is a scale branch


N, C, H, SPATIAL = 2, 8, 4, (4, 5)


def ones(*sizes: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(sizes, dtype=dtype, device=device)


WEIGHTS = {
    f"{branch}_{name}": ones(*sizes)
    for branch in ("scale", "shift")
    for name, sizes in zip(PARAMETERS, ((H, C), (H,), (H,), (H,), (C, H), (C,)), strict=True)
}
GOOD: Mapping[str, Any] = {
    "x": ones(N, C, *SPATIAL),
    "grad": ones(N, C, *SPATIAL),
    "weight": ones(C),
    "bias": ones(1),
    "mask_weight": ones(C),
    "mask_bias": ones(1),
    "gamma": ones(C),
    "beta": ones(C),
    "eps": 1e-6,
    "scale": ones(N, C),
    "shift": ones(N, C),
    **WEIGHTS,
    "residual": None,
    "valid": None,
    "x_scale": ones(C),
    "x_shift": ones(C),
    **OPTIONS,
    "positive": ones(N, 0, dtype=torch.uint8),
    "need_residual": False,
}
"""Of every operator. Of what is not in here, a name that begins with need_ is True, and `Operator.saved` has the sizes."""


# ---- the entry ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Operator:
    """A raw operator of csrc/ops.cpp.

    Attributes:
        name: without its namespace.
        arguments: their names in the order of the schema, each element of a list by itself.
        formula: every output in plain PyTorch, in small steps; formulas.py says more.
        saved: the sizes of tensors in the accumulation dtype: the gradient of such a result, and what forward has saved. What
            is not the gradient, ``grad_...``, has the name of a result in the schema of the forward operator.
        in_parts: the formula with the roundings that the kernels have and the formula has not, if there are any.
    """

    name: str
    arguments: tuple[str, ...]
    formula: Formula
    saved: Mapping[str, Callable[[Sizes], tuple[int, ...]]] = field(default_factory=dict)
    in_parts: Formula | None = None

    @property
    def good(self) -> Arguments:
        """Arguments that fit together, all ones."""
        sizes = Sizes(N, C, SPATIAL[0] * SPATIAL[1], True, 2 * H, True)
        own = {name: ones(*of(sizes)) for name, of in self.saved.items()}
        return {name: own[name] if name in own else GOOD.get(name, True) for name in self.arguments}

    @property
    def needs(self) -> tuple[str, ...]:
        """The elements of the list that says which gradients are wanted."""
        return tuple(name for name in self.arguments if name.startswith("need_"))

    @property
    def public(self) -> str:
        """The name that errors have: who calls a block knows of one operator, or of one that overwrites x."""
        return self.name.removeprefix("normed_").removesuffix("_inference")

    @property
    def in_place(self) -> bool:
        return self.name.endswith("_")


def by_name(function: Function, a: Arguments, **options: Any) -> Any:
    """Calls a function whose arguments are named as those of its operator; choices are words there, and numbers here."""
    named = dict(a)
    if "final_activation" in named:
        named["final_activation"] = tuple(FINAL_ACTIVATIONS)[named["final_activation"]]
    return function(**{**named, **options})


@dataclass(frozen=True, eq=False)
class Op:
    """A public function of gcnet_ext with its operators.

    Attributes:
        operators: the first one has the name of the function, and is what computes it where there are gradients.
        reference: the function in plain PyTorch.
        inputs: the names of the tensors that the function takes in this order, x first.
        draw: these tensors for a case of grid.py, random.
        flat: makes of the function one that takes the tensors of `inputs`.
        call: calls the function with the arguments of the operator, and with more options.
        differentiated: what autograd makes the kernels' gradients of, if the first output of the formula will not do.
        is_map: whether the result has the shape of x; otherwise it is [N, C].
        needs_positions: whether a map without positions is refused.
        fixed: fields of a case that make no difference, and what they are then.
        options: of the function, beside the arguments of the operator.
        vanishing: inputs whose gradient is zero in exact arithmetic.
        gradient_std: of the gradient that is drawn for the result.
        flops: what torch.utils.flop_counter counts for the function.
    """

    operators: tuple[Operator, ...]
    reference: Function
    inputs: tuple[str, ...]
    draw: Callable[[Case, To, int], tuple[Tensor | None, ...]]
    flat: Callable[[Function], Function] = lambda function: function
    call: Callable[..., Any] = by_name
    differentiated: Callable[[Arguments], Tensor | None] | None = None
    is_map: bool = True
    needs_positions: bool = True
    fixed: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    vanishing: Callable[[Case], Collection[str]] = lambda _case: ()
    gradient_std: Callable[[Case], float] = lambda _case: 1.0
    flops: Callable[[Case], int] = lambda _case: 0

    @property
    def name(self) -> str:
        return self.operators[0].name

    @property
    def function(self) -> Function:
        return getattr(gcnet_ext, self.name)

    @property
    def ours(self) -> Function:
        """The function of the tensors of `inputs`."""
        return self.flat(self.function)

    @property
    def truth(self) -> Function:
        """The function in plain PyTorch, of the tensors of `inputs`."""
        return self.flat(self.reference)

    @property
    def model(self) -> Callable[[Arguments], Tensor | None]:
        """The result as autograd is to differentiate it, to get the kernels' gradients."""
        return self.differentiated or (lambda a: self.operators[0].formula(a)[0])

    @property
    def of_inference(self) -> str:
        """The operator that computes where there are no gradients."""
        names = [operator.name for operator in self.operators]
        return f"{self.name}_inference" if f"{self.name}_inference" in names else self.name

    def inputs_of(self, case: Case, to: To = lambda tensor: tensor, seed: int = 0) -> tuple[Tensor | None, ...]:
        return self.draw(case, to, seed)

    def gradient_of(self, case: Case, to: To = lambda tensor: tensor, seed: int = 1, layout: str | None = None) -> Tensor:
        """Of the result."""
        random = Random(seed, to)
        if self.is_map:
            return random.feature_map(case.shape, case.dtype, layout or case.layout)
        return random.normal(*case.shape[:2], dtype=case.dtype, std=self.gradient_std(case))
