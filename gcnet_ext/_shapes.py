"""What every operator returns, in shape, dtype and memory format, after the checks of its kernels: its fake kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _bits, _checks, reference
from ._arguments import Arguments, BackwardArguments, Gradients, Needs, per_weight
from ._checks import hidden_units, positions


def _acc(x: Tensor) -> torch.dtype:
    return reference.accumulation_dtype(x)


def _empty_like_map(x: Tensor) -> Tensor:
    """An uninitialised tensor of the shape and memory format of x, dense."""
    if _bits.is_channels_last(x):
        return x.new_empty((x.shape[0], *x.shape[2:], x.shape[1])).movedim(-1, 1)
    return x.new_empty(x.shape)


def _gradient(needed: bool, parameter: Tensor | None, x: Tensor) -> Tensor:
    if not needed or parameter is None:
        return x.new_empty((0,))
    if parameter.is_contiguous():  # but for the strides of sizes of one
        return parameter.new_empty_strided(parameter.shape, parameter.stride())
    return parameter.new_empty(parameter.shape)


def _positive(x: Tensor, final_activation: int) -> Tensor:
    """The bits of the final ReLU, none where there is no such ReLU."""
    return x.new_empty((x.shape[0], _bits.bytes_of(x) if final_activation else 0), dtype=torch.uint8)


def _of_residual(needed: bool, x: Tensor, final_activation: int) -> Tensor:
    """The gradient of the residual, which is computed behind a ReLU only."""
    return _empty_like_map(x) if needed and final_activation else _no_gradient(x)


def _no_gradient(x: Tensor) -> Tensor:
    return x.new_empty((0,))


def attention_pool(x, weight, bias, valid):
    _checks.operator("attention_pool", (x, weight, bias, valid))
    samples, channels = x.shape[:2]
    return (
        x.new_empty((samples, channels), dtype=_acc(x)),
        x.new_empty((samples, 0 if weight is None else positions(x)), dtype=_acc(x)),
    )


def attention_pool_backward(grad_context, x, weight, bias, valid, context, attention, needs):
    _checks.operator("attention_pool_backward", (grad_context, x, weight, bias, valid, context, attention, needs))
    need_x, need_weight, need_bias = needs
    grad_x = _empty_like_map(x) if need_x else _no_gradient(x)
    return grad_x, _gradient(need_weight, weight, x), _gradient(need_bias, bias, x)


def channel_fuse(x, scale, shift, residual, final_activation):
    _checks.operator("channel_fuse", (x, scale, shift, residual, final_activation))
    return _empty_like_map(x), _positive(x, final_activation)


def channel_fuse_(x, scale, shift, residual, final_activation):
    _checks.operator("channel_fuse_", (x, scale, shift, residual, final_activation))


def channel_fuse_backward(grad, x, scale, shift, final_activation, positive, needs):
    _checks.operator("channel_fuse_backward", (grad, x, scale, shift, final_activation, positive, needs))
    need_x, need_scale, need_shift, need_residual = needs
    return (
        _empty_like_map(x) if need_x else _no_gradient(x),
        _gradient(need_scale, scale, x),
        _gradient(need_shift, shift, x),
        _of_residual(need_residual, x, final_activation),
    )


def global_context(*args):
    _checks.operator("global_context", args)
    call = Arguments(*args)
    x, scale, shift = call.x, per_weight(call.scale), per_weight(call.shift)
    samples, channels = x.shape[:2]
    return (
        _empty_like_map(x),
        x.new_empty((samples, channels), dtype=_acc(x)),
        x.new_empty((samples, 0 if call.mask[0] is None else positions(x)), dtype=_acc(x)),
        x.new_empty((samples, hidden_units(scale.w1) + hidden_units(shift.w1)), dtype=_acc(x)),
        x.new_empty((samples, 0 if scale.w1 is None else channels), dtype=_acc(x)),
        _positive(x, call.final_activation),
    )


def global_context_inference(*args):
    return global_context(*args)[0]


def global_context_(*args):
    _checks.operator("global_context_", args)


def global_context_backward(*args):
    _checks.operator("global_context_backward", args)
    call = BackwardArguments(*args)
    x, needs = call.x, Needs(*call.needs)
    return tuple(
        Gradients(
            x=_empty_like_map(x) if needs.x else _no_gradient(x),
            mask=[_gradient(needs.mask_weight, call.mask[0], x), _gradient(needs.mask_bias, call.mask[1], x)],
            scale=[_gradient(needs.scale, weight, x) for weight in call.scale],
            shift=[_gradient(needs.shift, weight, x) for weight in call.shift],
            residual=_of_residual(needs.residual, x, call.final_activation),
        )
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
