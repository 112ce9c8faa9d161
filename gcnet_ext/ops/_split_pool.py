"""Attention pooling of a feature map whose positions are split over the processes of a group.

Each process pools its own positions: context c_r with softmax weights m_r, and the logarithm l_r of the softmax's denominator.
With l = log sum_r exp(l_r) the share of a process is s_r = exp(l_r - l), and over all of them

    context = sum_r s_r c_r,    m = s_r m_r,

so forward needs one collective of [N, C + 1] numbers, and backward one of [N, C], for the gradient of the context. A process
without a position that counts has l_r = -inf and so no share; if no process has one, the context is 0.
Gradients that will be differentiated again are computed in plain PyTorch instead, with sums over the processes that
autograd can differentiate any number of times.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _load, _torch
from . import _dispatch, _switch
from ._autograd import constant, in_plain_pytorch, needed, through_plain_pytorch
from ._precision import accumulation_dtype, beside
from .attention_pool import flat_valid, logits, only, weighted_sum


def _log_denominator(x: Tensor, weight: Tensor, bias: Tensor | None, attention: Tensor, valid: Tensor | None) -> Tensor:
    """l_r [N], from the position with the most attention, because m_rp = exp(logit_p - l_r)."""
    most, place = attention.max(1)
    channels = x.shape[1]
    at_place = x.flatten(2).gather(2, place[:, None, None].expand(-1, channels, 1)).squeeze(2).to(attention.dtype)
    logit = (at_place * weight.flatten().to(attention.dtype)).sum(1)  # a matrix product would heed autocast
    if bias is not None:
        logit = logit + bias.to(attention.dtype)
    found = logit - most.log()
    return found if valid is None else found.where(valid.flatten(1).any(1), -torch.inf)


def _log_count(x: Tensor, valid: Tensor | None) -> Tensor:
    """The logarithm of the number of positions that count, [N]: the denominator of the average."""
    positions = x.flatten(2).shape[2]
    count = (
        torch.full(x.shape[:1], positions, device=x.device) if valid is None else valid.flatten(1).sum(1).expand(x.shape[:1])
    )
    return count.to(accumulation_dtype(x)).log()


def _shares(log_denominators: Tensor) -> Tensor:
    """s_r of all processes, [processes, N, 1]; zeros where none has a position that counts."""
    anywhere = (log_denominators > -torch.inf).any(0, keepdim=True) | log_denominators.isnan().any(0, keepdim=True)
    return log_denominators.where(anywhere, 0).softmax(0).where(anywhere, 0)


class _Total(torch.autograd.Function):
    """The sum of a tensor over the processes of a group. All of them use it, so its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = own.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Total.apply(grad, ctx.group), None


def _in_plain_pytorch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, valid: Tensor | None, group: dist.ProcessGroup
) -> Tensor:
    """The context of `SplitAttentionPool`, differentiable any number of times in x and the weight."""
    counting = flat_valid(valid)
    positions = only(x.flatten(2).to(accumulation_dtype(x)), counting)
    if weight is None:
        powers = torch.ones_like(positions[:, 0])
    else:
        found = logits(positions, weight, constant(bias))
        compared = found.detach() if counting is None else found.detach().where(counting, -torch.inf)
        largest = compared.amax(1, keepdim=True)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        powers = (found - largest.nan_to_num(neginf=0)).exp()
    if counting is not None:
        powers = powers.where(counting, 0)
    of_process = torch.cat([weighted_sum(positions, powers), powers.sum(1, keepdim=True)], 1)
    total = _Total.apply(of_process, group)
    denominator = total[:, -1:]
    return total[:, :-1] / (denominator if valid is None else denominator.where(denominator != 0, 1))


class SplitAttentionPool(torch.autograd.Function):
    """(x, weight, bias, valid, group) -> the context [N, C] over the positions of all processes, in the accumulation dtype."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, valid: Tensor | None, group: dist.ProcessGroup
    ) -> Tensor:
        context, attention = _dispatch.below_autograd("attention_pool", (x, weight, bias, valid))
        log_denominator = _log_count(x, valid) if weight is None else _log_denominator(x, weight, bias, attention, valid)
        own = torch.cat([context, log_denominator.unsqueeze(1)], 1).contiguous()
        all_of_them = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(all_of_them, own, group=group)
        gathered = torch.stack(all_of_them)  # [processes, N, C + 1]
        shares = _shares(gathered[..., -1:])
        total = (shares * gathered[..., :-1]).sum(0)
        ctx.share = shares[dist.get_rank(group)]  # [N, 1]
        ctx.group = group
        ctx.save_for_backward(x, weight, bias, valid, total, attention)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, bias, valid, context, attention = ctx.saved_tensors
        if in_plain_pytorch(grad):
            function = partial(_in_plain_pytorch, valid=valid, group=ctx.group)
            return *through_plain_pytorch(function, (x, weight, bias), ctx.needs_input_grad[:3], grad), None, None
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)  # every process used the same context
        if weight is None:
            grad = grad * ctx.share
        needs = ctx.needs_input_grad[:3]
        args = grad, x, weight, bias, valid, context, attention * ctx.share, needs
        gradients = _dispatch.below_autograd("attention_pool_backward", args)
        return *map(needed, needs, gradients), None, None


def attention_pool(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, valid: Tensor | None, group: dist.ProcessGroup
) -> Tensor:
    """The context [N, C] over the positions that count of all processes, in the accumulation dtype.

    Raises:
        RuntimeError: there are no compiled kernels for the device of x, or its dtype or shape is wrong; or the call is made
            inside a transform of torch.func or in forward mode, which the collectives do not take part in.
    """
    if _torch.inside_transform():
        raise RuntimeError(f"process_group must be None inside a transform of torch.func (grad, vmap, jvp), got {group}")
    if _torch.has_tangent(x, weight, bias):
        raise RuntimeError(f"process_group must be None in forward-mode AD, got {group}")
    if _switch.choice.get():
        return _in_plain_pytorch(x, weight, bias, valid, group)
    if x.device.type not in _load.kernel_devices:
        why = _load.why_no_kernels(x.device.type)
        raise RuntimeError(f"process_group needs the compiled kernels for the device of x ({x.device.type}): {why}")
    if _torch.any_autocast():
        weight, bias = beside(x, weight, bias)
    return SplitAttentionPool.apply(x, weight, bias, valid, group)
