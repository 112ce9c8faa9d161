"""What every operator returns, in shape, dtype and memory format, after the checks of its kernels: its fake kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, reference


def _acc(x: Tensor) -> torch.dtype:
    return reference.accumulation_dtype(x)


def _is_channels_last(x: Tensor) -> bool:
    """Channels next to each other and positions apart: the rule of csrc/layout.h, word for word."""
    channels = x.shape[1]
    spatial = list(zip(x.shape[2:], x.stride()[2:], strict=True))
    if channels == 1 or x.stride(1) != 1 or all(size == 1 for size, _ in spatial):
        return False
    return all(stride >= channels for size, stride in spatial if size != 1)


def _empty_like_map(x: Tensor) -> Tensor:
    """An uninitialised tensor of the shape and memory format of x, dense."""
    if _is_channels_last(x):
        return x.new_empty((x.shape[0], *x.shape[2:], x.shape[1])).movedim(-1, 1)
    return x.new_empty(x.shape)


def _positions(x: Tensor) -> int:
    positions = 1
    for size in x.shape[2:]:
        positions = positions * size
    return positions


def _gradient(needed: bool, parameter: Tensor | None, x: Tensor) -> Tensor:
    if not needed or parameter is None:
        return x.new_empty((0,))
    if parameter.is_contiguous():  # but for the strides of sizes of one
        return parameter.new_empty_strided(parameter.shape, parameter.stride())
    return parameter.new_empty(parameter.shape)


def attention_pool(x, weight, bias):
    _checks.feature_map("attention_pool", x)
    _checks.mask("attention_pool", "", weight, bias, x)
    samples, channels = x.shape[:2]
    return (
        x.new_empty((samples, channels), dtype=_acc(x)),
        x.new_empty((samples, 0 if weight is None else _positions(x)), dtype=_acc(x)),
    )


def attention_pool_backward(grad_context, x, weight, context, attention, need_x, need_weight):
    op = "attention_pool_backward"
    _checks.feature_map(op, x)
    samples, channels = x.shape[:2]
    _checks.mask(op, "", weight, None, x)
    _checks.side(op, "grad_context", grad_context, x, (samples, channels))
    _checks.side(op, "context", context, x, (samples, channels))
    _checks.side(op, "attention", attention, x, (samples, 0 if weight is None else _positions(x)))
    return _empty_like_map(x) if need_x else x.new_empty((0,)), _gradient(need_weight, weight, x)


def channel_fuse(x, scale, shift):
    _checks.feature_map("channel_fuse", x, pooled=False)
    _checks.parameter("channel_fuse", "scale", scale, x, x.shape[:2])
    _checks.parameter("channel_fuse", "shift", shift, x, x.shape[:2])
    return _empty_like_map(x)


def channel_fuse_(x, scale, shift):
    _checks.feature_map("channel_fuse_", x, pooled=False)
    _checks.parameter("channel_fuse_", "scale", scale, x, x.shape[:2])
    _checks.parameter("channel_fuse_", "shift", shift, x, x.shape[:2])
    _checks.in_place("channel_fuse_", x)


def channel_fuse_backward(grad, x, scale, shift, need_x, need_scale, need_shift):
    op = "channel_fuse_backward"
    _checks.feature_map(op, x, pooled=False)
    _checks.parameter(op, "scale", scale, x, x.shape[:2])
    _checks.parameter(op, "shift", shift, x, x.shape[:2])
    _checks.gradient(op, grad, x)
    return (
        _empty_like_map(x) if need_x else x.new_empty((0,)),
        _gradient(need_scale, scale, x),
        _gradient(need_shift, shift, x),
    )


def _hidden_units(w1: Tensor | None) -> int:
    return 0 if w1 is None else w1.shape[0]


def global_context(x, mask_weight, mask_bias, *rest):
    op = "global_context"
    scale, shift = rest[:6], rest[6:12]
    _checks.feature_map(op, x)
    _checks.mask(op, "mask_", mask_weight, mask_bias, x)
    _checks.branches(op, scale, shift, x)
    samples, channels = x.shape[:2]
    return (
        _empty_like_map(x),
        x.new_empty((samples, channels), dtype=_acc(x)),
        x.new_empty((samples, 0 if mask_weight is None else _positions(x)), dtype=_acc(x)),
        x.new_empty((samples, _hidden_units(scale[0]) + _hidden_units(shift[0])), dtype=_acc(x)),
        x.new_empty((samples, 0 if scale[0] is None else channels), dtype=_acc(x)),
    )


def global_context_inference(*args):
    return global_context(*args)[0]


def global_context_(x, mask_weight, mask_bias, *rest):
    _checks.feature_map("global_context_", x)
    _checks.mask("global_context_", "mask_", mask_weight, mask_bias, x)
    _checks.branches("global_context_", rest[:6], rest[6:12], x)
    _checks.in_place("global_context_", x)


def global_context_backward(grad, x, mask_weight, *rest):
    op = "global_context_backward"
    scale, shift = rest[:6], rest[6:12]
    context, attention, hidden, gate_values = rest[18:22]
    need_x, need_mask, need_scale, need_shift = rest[22:]
    _checks.feature_map(op, x)
    _checks.mask(op, "mask_", mask_weight, None, x)
    _checks.branches(op, scale, shift, x)
    _checks.gradient(op, grad, x)
    samples, channels = x.shape[:2]
    _checks.side(op, "context", context, x, (samples, channels))
    _checks.side(op, "attention", attention, x, (samples, 0 if mask_weight is None else _positions(x)))
    units = _hidden_units(scale[0]) + _hidden_units(shift[0])
    _checks.side(op, "hidden", hidden, x, (samples, units))
    _checks.side(op, "gate_values", gate_values, x, (samples, 0 if scale[0] is None else channels))
    return (
        _empty_like_map(x) if need_x else x.new_empty((0,)),
        _gradient(need_mask, mask_weight, x),
        *(_gradient(need_scale, parameter, x) for parameter in scale),
        *(_gradient(need_shift, parameter, x) for parameter in shift),
    )


OPERATORS = (
    attention_pool,
    attention_pool_backward,
    channel_fuse,
    channel_fuse_,
    channel_fuse_backward,
    global_context,
    global_context_inference,
    global_context_,
    global_context_backward,
)
"""All of them, by the name of the operator."""
