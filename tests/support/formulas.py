"""Steps that the formulas of several ops share, in plain PyTorch; the formulas are in tests/ops.

A formula takes the arguments of an operator of csrc/ops.cpp by name, all in one dtype and dense, and returns its outputs in
order, None for one that was not asked for. Masks are numbers, too; `positive` is a mask of the shape of x here, and what an
operator returns under that name is looked at by fuzzing.assert_bits. The steps are small, down to those of the softmax and the
norm, so that fuzzing.Noise can make each of them inexact. The references in gcnet_ext/ops have the forward formulas, and
autograd has their gradients, but neither has a backward pass that can be compared with the kernels' step by step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from entry import Arguments, Outputs
from torch import Tensor

Pool = Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]


def positions_of(x: Tensor) -> Tensor:
    return x.flatten(2)


def per_channel(tensor: Tensor, x: Tensor) -> Tensor:
    return tensor.reshape(*x.shape[:2], *(1 for _ in x.shape[2:]))


def _logits(positions: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """w . x_p + b, added in one order for all positions: those that are alike have one logit, however large its rounding is."""
    first, *others = (positions * weight.reshape(1, -1, 1)).unbind(1)
    return sum(others, start=first) + (0 if bias is None else bias.reshape(()))


def _counting(x: Tensor, valid: Tensor | None) -> Tensor | None:
    """Which positions count, [N, P]."""
    return None if valid is None else valid.flatten(1).expand(x.shape[0], -1) != 0


def _only(positions: Tensor, counting: Tensor | None) -> Tensor:
    return positions if counting is None else positions.where(counting.unsqueeze(1), 0)


def pool_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    counting = _counting(x, valid)
    positions = _only(positions_of(x), counting)
    if weight is None:
        nothing = x.new_empty(x.shape[0], 0)
        return positions.mean(2) if counting is None else positions.sum(2) / counting.sum(1, keepdim=True).clamp(min=1), nothing
    logits = _logits(positions, weight, bias)
    if counting is not None:
        logits = logits.masked_fill(~counting & counting.any(1, keepdim=True), -torch.inf)
    powers = (logits - logits.detach().amax(1, keepdim=True)).exp()
    attention = powers / powers.sum(1, keepdim=True)
    if counting is not None:
        attention = attention.where(counting, 0)
    return (positions * attention.unsqueeze(1)).sum(2), attention


def pool_backward(
    grad_context: Tensor,
    x: Tensor,
    weight: Tensor | None,
    valid: Tensor | None,
    context: Tensor,
    attention: Tensor,
    *,
    in_parts: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Its gradients of x and weight, by the formulas of csrc/cpu/kernels/attention_pool.h.

    In parts: one of them may have no positions, as a thread beyond the last one; it takes context times zero off, which is NaN
    where the context is infinite.
    """
    counting = _counting(x, valid)
    positions = _only(positions_of(x), counting)
    if weight is None:
        count = positions.shape[2] if counting is None else counting.sum(1, keepdim=True).clamp(min=1)
        return _only((grad_context / count).unsqueeze(2).expand_as(positions), counting).reshape(x.shape), None
    u = (positions * grad_context.unsqueeze(2)).sum(1)
    dl = attention * (u - (grad_context * context).sum(1, keepdim=True))
    if counting is not None:
        dl = dl.where(counting, 0)
    dx = grad_context.unsqueeze(2) * attention.unsqueeze(1) + weight.reshape(1, -1, 1) * dl.unsqueeze(1)
    dx = _only(dx, counting)
    dw = (positions * dl.unsqueeze(1)).sum(2) - context * dl.sum(1, keepdim=True)
    if in_parts:
        dw = dw - context * 0
    return dx.reshape(x.shape), dw.sum(0).reshape(weight.shape)


class KernelPool(torch.autograd.Function):
    """The pool with the kernels' backward pass, which loses more than autograd's where a saturated softmax lets nothing pass:
    u_p is not what dctx . ctx is made of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        context, attention = pool_forward(x, weight, bias, valid)
        ctx.save_for_backward(x, weight, bias, valid, context, attention)
        ctx.mark_non_differentiable(attention)
        return context, attention

    @staticmethod
    def backward(ctx: Any, grad_context: Tensor, _grad_attention: Tensor) -> Outputs:
        x, weight, bias, valid, context, attention = ctx.saved_tensors
        grads = pool_backward(grad_context, x, weight, valid, context, attention, in_parts=True)
        return *grads, None if bias is None else torch.zeros_like(bias), None


def zero_bias(needed: bool, bias: Tensor | None) -> Tensor | None:
    """The gradient of a bias that cancels in the softmax."""
    return torch.zeros_like(bias) if needed and bias is not None else None


def finish(a: Arguments, out: Tensor) -> Tensor:
    out = out if a["residual"] is None else out + a["residual"]
    return out.relu() if a["final_activation"] else out


def before_relu(a: Arguments) -> Tensor:
    return a["grad"].where(a["positive"] != 0, 0) if a["final_activation"] else a["grad"]
