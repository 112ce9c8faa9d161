"""The operators as functions: compiled kernels where there are some for the device of x, plain PyTorch elsewhere.

Source of the formulas: Y. Cao, J. Xu, S. Lin, F. Wei, H. Hu, "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and
Beyond", 2019, https://arxiv.org/abs/1904.11492 ("the paper" below).

Shapes: N samples, C channels, one or more spatial dimensions, P positions (their product), H hidden units.
Dtypes: x is float16, bfloat16, float32 or float64; every other tensor has the dtype of x or float32. Sums are taken in float32
(float64 for a float64 x). Under autocast nothing is cast. x may have any strides; NCHW and channels_last are read as they are,
anything else is made contiguous once, and the output has the memory format of x.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import _checks, _library, reference
from ._arguments import Arguments, Branch, Options, Tensors

__all__ = ["Branch", "attention_map", "attention_pool", "channel_fuse", "global_context"]


def attention_pool(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, valid: Tensor | None = None
) -> Tensor:
    """Gather one context vector per sample: the context modelling of the GC block.

    ``context_c = sum_p m_p x_cp`` with ``m = softmax_p(weight . x_p + bias)`` (the paper, equation 4 and figure 4d);
    without a weight ``m_p = 1 / P``, which is average pooling.

    Args:
        x: ``[N, C, *spatial]``, at least one position.
        weight: ``[C]`` or ``[1, C, 1, ...]`` (the weight of a 1x1 convolution to one channel), or None.
        bias: one element, or None. It cancels in the softmax, so its gradient is zero.
        valid: bool, ``[N, *spatial]`` or ``[1, *spatial]``: which positions count, for images and sequences that are padded to
            one size. The others are skipped: not even a NaN reaches the context from there, and they get no gradient. The
            context of a sample where none counts is 0.

    Returns:
        The context, ``[N, C]``, in the dtype of x. Differentiable in x and weight.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device. The message names it.
        TypeError: x is no tensor.
    """
    if _library.has_kernels(x):
        return _library.call("attention_pool", x, weight, bias, valid)[0].to(x.dtype)
    return reference.attention_pool(x, weight, bias, valid=valid)


def attention_map(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
    """Where the attention pool looks: ``m = softmax_p(weight . x_p + bias)``, for pictures and analysis.

    Args:
        x, weight, bias, valid: as for `attention_pool`.

    Returns:
        ``[N, *spatial]``, float32 (float64 for a float64 x); each sample sums to one, and is 0 where a position does not count.
        Not differentiable.

    Raises:
        RuntimeError, TypeError: as `attention_pool`.
    """
    _checks.attended("attention_pool", weight)
    if _library.has_kernels(x):
        attention = _library.call("attention_pool", x, weight, bias, valid)[1]
        return attention.detach().reshape(x.shape[:1] + x.shape[2:])
    return reference.attention_map(x, weight, bias, valid=valid).detach()


def channel_fuse(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    final_activation: str = "none",
    inplace: bool = False,
) -> Tensor:
    """Fold per-channel values back into every position: ``out_cp = act(x_cp * scale_c + shift_c + residual_cp)``.

    The fusion of the GC block (the paper, section 3.4) with both of its variants in one pass over x, and with what follows it
    in a residual block. The scale is used unchanged; apply a gate such as the sigmoid yourself. The result is rounded once.

    Args:
        x: ``[N, C, *spatial]``.
        scale: ``[N, C]``, or None for 1. Trailing dimensions of size 1 are allowed: ``[N, C, 1, 1]``.
        shift: ``[N, C]``, or None for 0.
        residual: what is added, of the shape and dtype of x, or None. It may be x itself. In another memory format than that of
            x it is copied first.
        final_activation: ``"relu"`` for ``act(v) = max(v, 0)``, or ``"none"``. Backward needs a bit for each element of it.
        inplace: overwrite x with the result and return it. For inference: nothing may require a gradient.

    Returns:
        Like x. Differentiable in x, scale, shift and residual. If nothing is to be done, a copy of x.

    Raises:
        RuntimeError: an argument has a wrong value, shape, dtype or device; or with ``inplace`` it requires a gradient,
            elements of x share memory, or the residual shares a part of x's. The message names it.
        TypeError: x is no tensor.
    """
    final = _checks.chosen_final("channel_fuse", final_activation)
    if _library.has_kernels(x):
        if not inplace:
            return _library.call("channel_fuse", x, scale, shift, residual, final)[0]
        _library.call_in_place("channel_fuse_", x, scale, shift, residual, final)
        return x
    if inplace:
        _checks.no_gradient("channel_fuse_", (x, scale, shift, residual))
    out = reference.channel_fuse(x, scale, shift, residual=residual, final_activation=final_activation)
    return x.copy_(out) if inplace else out


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
    inplace: bool = False,
) -> Tensor:
    """The whole Global Context block (the paper, equation 5) as one operator per direction.

    ``context = attention_pool(x)``, then per branch ``t = w2 act(norm(w1 context + b1)) + b2``, then
    ``out = final(x * gate(t_scale) + t_shift + residual)``: the multiplication first, both branches from the same context.
    Forward saves x and buffers of N*P, N*C and N*H values, and behind a final ReLU a bit for each element.

    Args:
        x: ``[N, C, *spatial]``, at least one position.
        mask_weight: ``[C]`` or ``[1, C, 1, ...]``; None for average pooling, as in squeeze-excitation.
        mask_bias: one element or None; its gradient is zero.
        scale: weights of the branch that multiplies, or None.
        shift: weights of the branch that adds, or None. At least one of the two is needed.
        residual: what is added to the result, of the shape and dtype of x, or None. It may be x itself. In another memory
            format than that of x it is copied first.
        valid: which positions count in the pool, as for `attention_pool`. The fusion applies to every position.
        norm: whether a LayerNorm over the H hidden units stands between the two layers.
        eps: epsilon of that LayerNorm.
        activation: between the two layers: ``"none"``, ``"relu"``, ``"silu"``, ``"gelu"``, ``"gelu_tanh"``, ``"hardswish"`` or
            ``"leaky_relu"``, as torch.nn.functional has them.
        slope: of ``"leaky_relu"`` below 0.
        gate: ``"sigmoid"``, or ``"hard_sigmoid"`` for ``clip(gate_alpha t + gate_beta, 0, 1)``.
        gate_alpha, gate_beta: slope and offset of the hard sigmoid; torch uses 1/6 and 1/2, ONNX 0.2 and 0.5.
        final_activation: of the result: ``"none"`` or ``"relu"``.
        inplace: overwrite x with the result and return it. For inference: nothing may require a gradient.

    Returns:
        Like x. Differentiable in x, the residual and every weight.

    Raises:
        RuntimeError: no branch is given; an argument has a wrong value, shape, dtype or device; or with ``inplace`` it requires
            a gradient, elements of x share memory, or the residual shares a part of x's. The message names it.
        TypeError: x is not a tensor, or a branch is not a `Branch`.
    """
    options = _checks.chosen("global_context", norm, eps, activation, slope, gate, gate_alpha, gate_beta, final_activation)
    _checks.branch_type("global_context", "scale", scale)
    _checks.branch_type("global_context", "shift", shift)
    call = Arguments.of_branches(x, [mask_weight, mask_bias], scale, shift, options, residual, valid)
    return fused(x, (call.mask, call.scale, call.shift), residual, valid, options, inplace=inplace)


def fused(
    x: Tensor, weights: Sequence[Tensors], residual: Tensor | None, valid: Tensor | None, options: Options, *, inplace: bool
) -> Tensor:
    """`global_context` with the lists of the operator, each complete: of the mask, of the scale and of the shift."""
    mask, scale, shift = weights
    if _library.has_kernels(x):
        if not inplace:
            return _library.global_context(x, mask, scale, shift, residual, valid, *options)
        _library.call_in_place("global_context_", x, mask, scale, shift, residual, valid, *options)
        return x
    call = Arguments(x, mask, scale, shift, residual, valid, *options)
    if inplace:
        _checks.no_gradient("global_context_", call)
    out = reference.block(call)
    return x.copy_(out) if inplace else out
