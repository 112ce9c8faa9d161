"""The fusion of the GC block: per-channel values go back into every position."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _torch, _tuning
from . import _checks, _dispatch, _relu_bits, _shapes
from ._autograd import before_relu, in_plain_pytorch, needed, through_plain_pytorch
from ._options import FINAL_ACTIVATIONS, check_final, final_number
from ._precision import accumulation_dtype, beside


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
        final_activation: ``"relu"`` for ``act(v) = max(v, 0)``, or ``"none"``. For ReLU, backward needs a bit per element.
        inplace: overwrite x with the result and return it. For inference: nothing may require a gradient.

    Returns:
        Like x. Differentiable in x, scale, shift and residual. If nothing is to be done, a copy of x.

    Raises:
        RuntimeError: an argument has a wrong value, shape, dtype or device; or with ``inplace`` it requires a gradient,
            elements of x share memory, or the residual shares a part of x's. The message names it.
        TypeError: x is no tensor.
    """
    final = final_number("channel_fuse", final_activation)
    if _torch.any_autocast():
        scale, shift = beside(x, scale, shift)
    way = _dispatch.way_of(x, scale, shift, residual)
    if inplace:
        if _dispatch.may_overwrite(way):
            _dispatch.overwrite(way, "channel_fuse_", x, scale, shift, residual, final)
            return x
        _checks.no_gradient("channel_fuse_", (x, scale, shift, residual))
    if way:
        out = _dispatch.call(way, "channel_fuse", _differentiable, x, scale, shift, residual, final)[0]
    else:
        out = _output(x, scale, shift, residual, final)
    return x.copy_(out) if inplace else out


# ---- plain PyTorch -----------------------------------------------------------------------------------------------------------


def reference(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    final_activation: str = "none",
) -> Tensor:
    """`channel_fuse` in plain PyTorch."""
    return _output(x, scale, shift, residual, final_number("channel_fuse", final_activation))


def _output(x: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, final_activation: int) -> Tensor:
    _check("channel_fuse", Arguments(x, scale, shift, residual, final_activation))
    if scale is None and shift is None and residual is None and not final_activation:
        return x.clone()
    return fuse(x, scale, shift, residual, final_activation)


def fuse(x: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, final_activation: int) -> Tensor:
    """act(x_cp scale_c + shift_c + residual_cp) of a scale and a shift [N, C], like x."""
    acc = accumulation_dtype(x)
    per_channel = x.shape[:2] + (1,) * (x.dim() - 2)
    out = x.to(acc)
    if scale is not None:
        out = out * scale.to(acc).reshape(per_channel)
    if shift is not None:
        out = out + shift.to(acc).reshape(per_channel)
    if residual is not None:
        out = out + residual.to(acc)
    return (out.relu() if final_activation == FINAL_ACTIVATIONS["relu"] else out).to(x.dtype)


def results(call: Arguments) -> tuple[Tensor, Tensor]:
    """The results of the operator in plain PyTorch: the output and the bits of its ReLU."""
    out = _output(*call)
    return out, _relu_bits.pack(out, call.x, call.final_activation)


# ---- arguments ---------------------------------------------------------------------------------------------------------------


class Arguments(NamedTuple):
    x: Any
    scale: Any
    shift: Any
    residual: Any
    final_activation: Any


class BackwardArguments(NamedTuple):
    grad: Any
    x: Any
    scale: Any
    shift: Any
    final_activation: Any
    positive: Any
    needs: Any  # of x, the scale, the shift and the residual


def _check_map(op: str, call: Arguments | BackwardArguments) -> None:
    _checks.feature_map(op, call.x, pooled=False)
    _checks.parameter(op, "scale", call.scale, call.x, call.x.shape[:2])
    _checks.parameter(op, "shift", call.shift, call.x, call.x.shape[:2])


def _check(op: str, call: Arguments) -> None:
    _check_map(op, call)
    _checks.residual(op, call.residual, call.x)
    check_final(op, call.final_activation)


def _check_in_place(op: str, call: Arguments) -> None:
    _check(op, call)
    _checks.in_place(op, call.x)


def _check_backward(op: str, call: BackwardArguments) -> None:
    _check_map(op, call)
    check_final(op, call.final_activation)
    _checks.gradient(op, call.grad, call.x)
    _checks.positive(op, call.positive, call.x, call.final_activation)
    _checks.count(op, "needs", call.needs, 4)


# ---- shapes ------------------------------------------------------------------------------------------------------------------


def _result_shapes(call: Arguments) -> tuple[Tensor, Tensor]:
    return _shapes.like_map(call.x), _shapes.bits(call.x, call.final_activation)


def _gradient_shapes(call: BackwardArguments) -> tuple[Tensor, ...]:
    x, (need_x, need_scale, need_shift, need_residual) = call.x, call.needs
    return (
        _shapes.map_gradient(need_x, x),
        _shapes.gradient(need_scale, call.scale, x),
        _shapes.gradient(need_shift, call.shift, x),
        _shapes.map_gradient(need_residual and call.final_activation, x),
    )


# ---- gradients ---------------------------------------------------------------------------------------------------------------


class _ChannelFuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, shift, residual, final_activation):
        out, positive = _dispatch.below_autograd("channel_fuse", (x, scale, shift, residual, final_activation))
        ctx.mark_non_differentiable(positive)
        ctx.set_materialize_grads(False)
        ctx.final_activation, ctx.tuning = final_activation, _tuning.decided()
        ctx.save_for_backward(x, scale, shift, positive)
        return out, positive

    @staticmethod
    def backward(ctx, grad, _grad_positive):
        needs = ctx.needs_input_grad[:4]
        if grad is None:
            return (None,) * 5
        x, scale, shift, positive = ctx.saved_tensors
        final = ctx.final_activation
        if in_plain_pytorch(grad):
            grad = before_relu(grad, positive, x, final)
            gradients = through_plain_pytorch(reference, (x, scale, shift), needs[:3], grad)
            return *gradients, needed(needs[3], grad), None
        args = grad, x, scale, shift, final, positive, list(needs)
        *gradients, grad_residual = _dispatch.backward(ctx.tuning, "channel_fuse_backward", args)
        return *map(needed, needs, (*gradients, grad_residual if final else grad)), None


_differentiable = partial(_dispatch.differentiable, _ChannelFuse, "channel_fuse")
_dispatch.register(
    "channel_fuse", Arguments, check=_check, shapes=_result_shapes, differentiable=_differentiable, plain=results
)
_dispatch.register("channel_fuse_", Arguments, check=_check_in_place, shapes=lambda _: None)
_dispatch.register("channel_fuse_backward", BackwardArguments, check=_check_backward, shapes=_gradient_shapes)
