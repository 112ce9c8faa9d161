"""The layers of a block: which of them a fused operator can take the weights of, and how to call those that it cannot.

A submodule may be replaced, parametrized or hooked by its user. What is no longer the plain layer is called as a module.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from .. import _checks, reference
from ..reference import accumulation_dtype

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}
GATES = ("sigmoid", "hard_sigmoid")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # fields of a module

Module = TypeVar("Module", bound=nn.Module)


class Gate(NamedTuple):
    """What the scale goes through: the sigmoid, or clip(alpha t + beta, 0, 1)."""

    kind: str = "sigmoid"
    alpha: float = 1 / 6
    beta: float = 0.5

    def __call__(self, t: Tensor) -> Tensor:
        return reference.apply_gate(t, *self)


def check_choice(name: str, value: object, valid: Iterable[object]) -> None:
    """
    Raises:
        ValueError: the value is none of the valid ones, which the message lists.
    """
    if not isinstance(value, str | None) or value not in tuple(valid):  # an array compares element by element
        raise ValueError(f"{name} must be one of {tuple(valid)}, got {value!r}")


def check_count(name: str, value: object) -> None:
    """
    Raises:
        ValueError: the value is no whole number, less than one, or more than any memory holds.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if int(value) >= 2**31:
        raise ValueError(f"{name} must be less than 2**31, got more")


def hidden_units(inplanes: int, ratio: float, planes: int | None) -> int:
    """The units of a bottleneck: ``planes``, or ``int(inplanes * ratio)``.

    Raises:
        ValueError: there would be none.
    """
    check_count("inplanes", inplanes)
    if planes is not None:
        check_count("planes", planes)
        return planes
    if not isinstance(ratio, numbers.Real) or not -(2**31) < ratio < 2**31:
        raise ValueError(f"ratio must be a number, and not a huge one, got {ratio!r}")
    planes = int(inplanes * ratio)
    if planes < 1:
        raise ValueError(
            f"inplanes * ratio must be at least 1 (one hidden unit), got {inplanes} * {ratio} = {inplanes * ratio}"
        )
    return planes


def check_channels(x: Tensor, inplanes: int) -> None:
    """
    Raises:
        RuntimeError: x has another number of channels than the block was made for.
        TypeError: x is no tensor.
    """
    _checks.is_tensor(x)
    if x.dim() > 1 and x.size(1) != inplanes:  # x.shape would be made anew
        raise RuntimeError(f"x must have {inplanes} channels (inplanes), got shape {list(x.shape)}")


def is_plain(module: nn.Module, kind: type[Module]) -> TypeGuard[Module]:
    """Whether calling the module does what its class says and nothing else: no override, no hook."""
    own = module.__dict__
    return (
        (type(module) is kind or (isinstance(module, kind) and type(module).forward is kind.forward))
        and "forward" not in own
        and not any(own[name] for name in HOOKS)
    )


def is_pointwise(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether the module is a 1x1 convolution, whatever its weights are computed from."""
    return (
        is_plain(module, nn.Conv2d)
        and type(module)._conv_forward is nn.Conv2d._conv_forward
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.padding == (0, 0)
        and module.groups == 1
    )


def in_dtype_of(module: nn.Module, tensor: Tensor) -> Tensor:
    """The tensor in the dtype of the module's parameters: a mixed block takes what the fused operator takes."""
    return tensor.to(next(module.parameters(), tensor).dtype)


def call_on_context(module: nn.Module, context: Tensor) -> Tensor:
    """What the module, called as the module it is, makes of context [N, C]."""
    return module(in_dtype_of(module, context)[:, :, None, None]).flatten(1).to(accumulation_dtype(context))


def called_attention(mask: nn.Module, x: Tensor) -> Tensor:
    """The softmax over positions [N, P] of what the mask, called as the module it is, makes of x."""
    as_image = x if x.dim() == 4 or not isinstance(mask, nn.Conv2d) else x.flatten(2).unsqueeze(3)
    return mask(in_dtype_of(mask, as_image)).flatten(1).to(accumulation_dtype(x)).softmax(1)


def weighted_sum(x: Tensor, attention: Tensor) -> Tensor:
    """The context [N, C] of an attention [N, P], in the accumulation dtype."""
    return torch.einsum("ncp,np->nc", x.flatten(2).to(accumulation_dtype(x)), attention)
