"""The arguments of global_context by name, as csrc/arguments.h has them for the kernels.

The operator takes lists, in which autograd.Function finds no tensor. They are flattened for it here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from ._options import Options
from ._transform import NO_BRANCH, Branch


class Arguments(NamedTuple):
    """The arguments of global_context, global_context_inference and global_context_. Every list has all its elements; an absent
    tensor is None."""

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
        """The arguments of branches that may be missing."""
        return cls(x, mask, list(scale or NO_BRANCH), list(shift or NO_BRANCH), residual, valid, *options)

    def options(self) -> Options:
        return Options(self.norm_eps, self.activation, self.slope, self.hard_gate, self.final_activation)

    def branches(self) -> tuple[Branch | None, Branch | None]:
        """The scale and the shift; None for one that has no weights at all."""
        scale, shift = (None if all(w is None for w in branch) else Branch(*branch) for branch in (self.scale, self.shift))
        return scale, shift


class NormedArguments(NamedTuple):
    """The arguments of normed_global_context_inference and normed_global_context_."""

    x: Any
    mask: Any
    scale: Any
    shift: Any
    residual: Any
    valid: Any
    norm_eps: Any
    activation: Any
    slope: Any
    hard_gate: Any
    final_activation: Any
    x_scale: Any
    x_shift: Any

    def block(self) -> Arguments:
        """Those of the block behind the norm, with the x in front of it."""
        return Arguments(*self[:-2])

    def norm(self) -> tuple[Any, Any]:
        return self.x_scale, self.x_shift


def flat(x: Any, mask: Iterable[Any], scale: Iterable[Any], shift: Iterable[Any], residual: Any, valid: Any, *options: Any):
    """The options of global_context as one value, and then its tensors, each by itself."""
    return options or None, x, *mask, *scale, *shift, residual, valid


def in_lists(tensors: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...], tuple[Any, ...], tuple[Any, ...], Any, Any]:
    """x, mask, scale, shift, residual and valid from the tensors of `flat`, or from a value for each of them."""
    return tensors[0], tensors[1:3], tensors[3:9], tensors[9:15], tensors[15], tensors[16]


class Saved(NamedTuple):
    """The results of global_context that its backward pass reads."""

    context: Any
    attention: Any
    hidden: Any
    gate_values: Any
    positive: Any


class Needs(NamedTuple):
    """Whether the gradient of each is needed."""

    x: Any
    mask_weight: Any
    mask_bias: Any
    scale: Any
    shift: Any
    residual: Any


class BackwardArguments(NamedTuple):
    """The arguments of global_context_backward."""

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
        """The arguments of the forward pass, without the residual: no gradient depends on it."""
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
