"""The operators in plain PyTorch: the ground truth of every test, and the fallback on devices without kernels.

The formulas are written as in the paper and run on any device and in any floating dtype. Like the kernels they accumulate
in float32 (float64 for a float64 x), whatever the storage dtype, and ignore autocast.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from . import _checks
from ._arguments import ACTIVATIONS, FINAL_ACTIVATIONS, Arguments, Branch, Options

DEFAULTS = Options()


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which sums over x are taken: float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else contextlib.nullcontext()


def _flat(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like.dtype).reshape(-1)


class _Product(torch.autograd.Function):
    """``a @ b`` without autocast, and so are its derivatives of any order: they are products, too.

    To switch autocast off around a product is not enough: backward runs later, where it may be on again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with _without_autocast(a):
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
    if is_compiling() or torch._C._is_tracing():  # a graph that is being captured has no place for a function of autograd
        with _without_autocast(a):
            return a @ b
    return _Product.apply(a, b)


def logits(positions: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """w . x_p + b of positions [N, C, P] -> [N, P]."""
    samples, channels = positions.shape[:2]
    of_samples = weight.to(positions.dtype).reshape(1, 1, channels).expand(samples, 1, channels)
    found = product(of_samples, positions).squeeze(1)
    return found if bias is None else found + bias.to(positions.dtype).reshape(())


def softmax(found: Tensor, valid: Tensor | None = None) -> Tensor:
    """The softmax of logits [N, P] over the positions that count, [N or 1, P]; 0 elsewhere, and where none does."""
    if valid is None:
        return found.softmax(1)
    others = ~valid & valid.any(1, keepdim=True)  # where none counts, the logits stay, so that no NaN arises from them
    return found.masked_fill(others, -torch.inf).softmax(1).where(valid, 0)


def only(positions: Tensor, valid: Tensor | None) -> Tensor:
    """positions [N, C, P] with zeros where a position does not count, [N or 1, P]: a product with 0 would let a NaN pass."""
    return positions if valid is None else positions.where(valid.unsqueeze(1), 0)


def _attention(positions: Tensor, weight: Tensor, bias: Tensor | None, valid: Tensor | None) -> Tensor:
    """m_p = softmax_p(w . x_p + b) of positions [N, C, P], zeros where they do not count -> [N, P]."""
    return softmax(logits(positions, weight, bias), valid)


def weighted_sum(positions: Tensor, attention: Tensor) -> Tensor:
    """sum_p m_p x_p of positions [N, C, P] and an attention [N, P] -> [N, C]."""
    return product(positions, attention.unsqueeze(2)).squeeze(2)


def flat_valid(valid: Tensor | None) -> Tensor | None:
    """[N or 1, *spatial] -> [N or 1, P]."""
    return None if valid is None else valid.flatten(1)


def _pool(positions: Tensor, weight: Tensor | None, bias: Tensor | None, valid: Tensor | None) -> Tensor:
    """The context [N, C] of positions [N, C, P], of those that count, [N or 1, P]."""
    positions = only(positions, valid)
    if weight is not None:
        return weighted_sum(positions, _attention(positions, weight, bias, valid))
    return positions.mean(2) if valid is None else positions.sum(2) / valid.sum(1, keepdim=True).clamp(min=1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, K] -> x w^T + b [N, M], of w [M, K], in the dtype of x."""
    y = product(x, weight.mT)
    bias = _flat(bias, x)
    return y if bias is None else y + bias


def attention_map(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
    """`gcnet_ext.attention_map` in plain PyTorch."""
    _checks.attention_pool("attention_pool", x, weight, bias, valid)
    counting = flat_valid(valid)
    positions = only(x.flatten(2).to(accumulation_dtype(x)), counting)
    return _attention(positions, weight, bias, counting).reshape(x.shape[:1] + x.shape[2:])


def attention_pool(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, valid: Tensor | None = None
) -> Tensor:
    """`gcnet_ext.attention_pool` in plain PyTorch."""
    _checks.attention_pool("attention_pool", x, weight, bias, valid)
    return _pool(x.flatten(2).to(accumulation_dtype(x)), weight, bias, flat_valid(valid)).to(x.dtype)


def _finish(out: Tensor, residual: Tensor | None, final_activation: int) -> Tensor:
    """act(out + residual), in the dtype of out."""
    if residual is not None:
        out = out + residual.to(out.dtype)
    return out.relu() if final_activation == FINAL_ACTIVATIONS["relu"] else out


def channel_fuse(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    final_activation: str = "none",
) -> Tensor:
    """`gcnet_ext.channel_fuse` in plain PyTorch."""
    final = _checks.chosen_final("channel_fuse", final_activation)
    _checks.channel_fuse("channel_fuse", x, scale, shift, residual, final)
    if scale is None and shift is None and residual is None and not final:
        return x.clone()
    acc = accumulation_dtype(x)
    per_channel = x.shape[:2] + (1,) * (x.dim() - 2)
    out = x.to(acc)
    if scale is not None:
        out = out * scale.to(acc).reshape(per_channel)
    if shift is not None:
        out = out + shift.to(acc).reshape(per_channel)
    return _finish(out, residual, final).to(x.dtype)


def _activated(z: Tensor, options: Options) -> Tensor:
    if options.activation == ACTIVATIONS["leaky_relu"]:
        return F.leaky_relu(z, options.slope)
    return _ACTIVATED[options.activation](z)


_ACTIVATED: dict[int, Callable[[Tensor], Tensor]] = {
    ACTIVATIONS["none"]: lambda z: z,
    ACTIVATIONS["relu"]: F.relu,
    ACTIVATIONS["silu"]: F.silu,
    ACTIVATIONS["gelu"]: F.gelu,
    ACTIVATIONS["gelu_tanh"]: partial(F.gelu, approximate="tanh"),
    ACTIVATIONS["hardswish"]: F.hardswish,
}


def branch(context: Tensor, weights: Branch, options: Options = DEFAULTS) -> Tensor:
    """t = w2 act(norm(w1 context + b1)) + b2 of context [N, C] -> [N, C], in the dtype of the context."""
    w1, b1, norm_weight, norm_bias, w2, b2 = weights
    channels = context.shape[1]
    hidden = _linear(context, w1.to(context.dtype).reshape(-1, channels), b1)
    if w2 is None:
        return hidden
    units = hidden.shape[1]
    if options.norm_eps is not None:
        hidden = F.layer_norm(hidden, (units,), _flat(norm_weight, context), _flat(norm_bias, context), options.norm_eps)
    hidden = _activated(hidden, options)
    return _linear(hidden, w2.to(context.dtype).reshape(channels, units), b2)


def apply_gate(t: Tensor, hard_gate: Sequence[float] | None = None) -> Tensor:
    """sigmoid(t), or with [alpha, beta] clip(alpha t + beta, 0, 1), which passes the gradient at its corners."""
    if hard_gate is None:
        return t.sigmoid()
    alpha, beta = hard_gate
    line = alpha * t + beta
    # The gradient of torch.clamp at its corners depends on the version of torch: it passes up to 2.13 and stops in 2.14.
    return line.where((line >= 0) & (line <= 1), line.detach().clamp(0, 1))


def block(arguments: Arguments) -> Tensor:
    """The operator global_context, its output alone."""
    _checks.global_context("global_context", arguments)
    x, options = arguments.x, arguments.options()
    scale, shift = arguments.branches()
    acc = accumulation_dtype(x)
    per_channel = x.shape[:2] + (1,) * (x.dim() - 2)
    out = x.to(acc)
    mask_weight, mask_bias = arguments.mask
    context = _pool(out.flatten(2), mask_weight, mask_bias, flat_valid(arguments.valid))
    if scale is not None:
        out = out * apply_gate(branch(context, scale, options), options.hard_gate).reshape(per_channel)
    if shift is not None:
        out = out + branch(context, shift, options).reshape(per_channel)
    return _finish(out, arguments.residual, options.final_activation).to(x.dtype)


def global_context(
    x: Tensor,
    mask_weight: Tensor | None = None,
    mask_bias: Tensor | None = None,
    scale: Branch | None = None,
    shift: Branch | None = None,
    *,
    residual: Tensor | None = None,
    valid: Tensor | None = None,
    norm: bool = True,
    eps: float = 1e-5,
    activation: str = "relu",
    slope: float = 0.01,
    gate: str = "sigmoid",
    gate_alpha: float = 1 / 6,
    gate_beta: float = 0.5,
    final_activation: str = "none",
) -> Tensor:
    """`gcnet_ext.global_context` in plain PyTorch."""
    options = _checks.chosen("global_context", norm, eps, activation, slope, gate, gate_alpha, gate_beta, final_activation)
    return block(Arguments.of_branches(x, [mask_weight, mask_bias], scale, shift, options, residual, valid))
