"""The operators in plain PyTorch: the ground truth of every test, and the fallback on devices without kernels.

The formulas are written as in the paper and run on any device and in any floating dtype. Like the kernels they accumulate
in float32 (float64 for a float64 x), whatever the storage dtype, and ignore autocast.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from . import _checks


class Transform(NamedTuple):
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


NO_TRANSFORM = (None,) * 6


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


def _attention(positions: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """m_p = softmax_p(w . x_p + b) of positions [N, C, P] -> [N, P]."""
    return logits(positions, weight, bias).softmax(1)


def weighted_sum(positions: Tensor, attention: Tensor) -> Tensor:
    """sum_p m_p x_p of positions [N, C, P] and an attention [N, P] -> [N, C]."""
    return product(positions, attention.unsqueeze(2)).squeeze(2)


def _pool(positions: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None:
        return positions.mean(2)
    return weighted_sum(positions, _attention(positions, weight, bias))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, K] -> x w^T + b [N, M], of w [M, K], in the dtype of x."""
    y = product(x, weight.mT)
    bias = _flat(bias, x)
    return y if bias is None else y + bias


def attention_map(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`gcnet_ext.attention_map` in plain PyTorch."""
    _checks.feature_map("attention_pool", x)
    _checks.mask("attention_pool", "", weight, bias, x)
    return _attention(x.flatten(2).to(accumulation_dtype(x)), weight, bias).reshape(x.shape[:1] + x.shape[2:])


def attention_pool(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """`gcnet_ext.attention_pool` in plain PyTorch."""
    _checks.feature_map("attention_pool", x)
    _checks.mask("attention_pool", "", weight, bias, x)
    return _pool(x.flatten(2).to(accumulation_dtype(x)), weight, bias).to(x.dtype)


def channel_fuse(x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """`gcnet_ext.channel_fuse` in plain PyTorch."""
    _checks.feature_map("channel_fuse", x, pooled=False)
    _checks.parameter("channel_fuse", "scale", scale, x, x.shape[:2])
    _checks.parameter("channel_fuse", "shift", shift, x, x.shape[:2])
    acc = accumulation_dtype(x)
    per_channel = x.shape[:2] + (1,) * (x.dim() - 2)
    out = x.to(acc)
    if scale is not None:
        out = out * scale.to(acc).reshape(per_channel)
    if shift is not None:
        out = out + shift.to(acc).reshape(per_channel)
    return x.clone() if scale is None and shift is None else out.to(x.dtype)


def transform(
    context: Tensor,
    weights: Transform,
    *,
    norm: bool = True,
    eps: float = 1e-5,
    activation: str = "relu",
) -> Tensor:
    """t = w2 act(norm(w1 context + b1)) + b2 of context [N, C] -> [N, C], in the dtype of the context."""
    w1, b1, norm_weight, norm_bias, w2, b2 = weights
    channels = context.shape[1]
    hidden = _linear(context, w1.to(context.dtype).reshape(-1, channels), b1)
    if w2 is None:
        return hidden
    units = hidden.shape[1]
    if norm:
        hidden = F.layer_norm(hidden, (units,), _flat(norm_weight, context), _flat(norm_bias, context), eps)
    hidden = F.relu(hidden) if activation == "relu" else F.silu(hidden)
    return _linear(hidden, w2.to(context.dtype).reshape(channels, units), b2)


def apply_gate(t: Tensor, gate: str = "sigmoid", gate_alpha: float = 1 / 6, gate_beta: float = 0.5) -> Tensor:
    """sigmoid(t), or the hard sigmoid clip(alpha t + beta, 0, 1), which passes the gradient at its corners."""
    if gate == "sigmoid":
        return t.sigmoid()
    line = gate_alpha * t + gate_beta
    # The gradient of torch.clamp at its corners depends on the version of torch: it passes up to 2.13 and stops in 2.14.
    return line.where((line >= 0) & (line <= 1), line.detach().clamp(0, 1))


def global_context(
    x: Tensor,
    mask_weight: Tensor | None = None,
    mask_bias: Tensor | None = None,
    scale: Transform | None = None,
    shift: Transform | None = None,
    *,
    norm: bool = True,
    eps: float = 1e-5,
    activation: str = "relu",
    gate: str = "sigmoid",
    gate_alpha: float = 1 / 6,
    gate_beta: float = 0.5,
) -> Tensor:
    """`gcnet_ext.global_context` in plain PyTorch."""
    _checks.feature_map("global_context", x)
    _checks.mask("global_context", "mask_", mask_weight, mask_bias, x)
    _checks.branches("global_context", scale or NO_TRANSFORM, shift or NO_TRANSFORM, x)
    _checks.choices("global_context", activation, gate)
    acc = accumulation_dtype(x)
    per_channel = x.shape[:2] + (1,) * (x.dim() - 2)
    out = x.to(acc)
    context = _pool(out.flatten(2), mask_weight, mask_bias)
    options: dict[str, Any] = {"norm": norm, "eps": eps, "activation": activation}
    if scale is not None:
        t = transform(context, scale, **options)
        out = out * apply_gate(t, gate, gate_alpha, gate_beta).reshape(per_channel)
    if shift is not None:
        out = out + transform(context, shift, **options).reshape(per_channel)
    return out.to(x.dtype)
