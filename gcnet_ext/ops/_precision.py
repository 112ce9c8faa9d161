"""The dtype that sums are taken in, and matrix products that stay in it."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _torch


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which sums over x are taken: float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def beside(x: Tensor, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
    """The weights as the operators take them beside x. Under autocast those in 16 bits become float32 beside a float32 x;
    x is never cast."""
    device = x.device.type
    if x.dtype != torch.float32 or not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return weights
    return tuple(
        weight.float() if weight is not None and weight.dtype in (torch.float16, torch.bfloat16) else weight
        for weight in weights
    )


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else contextlib.nullcontext()


class _Product(torch.autograd.Function):
    """``a @ b`` without autocast. Its derivatives of any order are products, too, and are computed in the same way.

    To switch autocast off around a product is not enough: backward runs later, where it may be on again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with without_autocast(a):
            return a @ b

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad
        return _Product.apply(grad, b.mT) if need_a else None, _Product.apply(a.mT, grad) if need_b else None

    @staticmethod
    def jvp(ctx, tangent_a, tangent_b):
        a, b = ctx.saved_tensors
        return _Product.apply(tangent_a, b) + _Product.apply(a, tangent_b)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [..., n, k] times b [..., k, m], of the same leading dimensions, in their dtype even under autocast."""
    # A graph that is being captured has no place for a function of autograd.
    if is_compiling() or _torch.is_tracing() or _torch.forward_mode_is_nested():
        with without_autocast(a):
            return a @ b
    return _Product.apply(a, b)
