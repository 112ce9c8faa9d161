"""The context modelling of the GC block: one context vector per sample, and the attention map that it is gathered with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _torch, _tuning
from . import _checks, _dispatch, _shapes
from ._autograd import constant, in_plain_pytorch, needed, through_plain_pytorch
from ._precision import accumulation_dtype, beside, product


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
    context = unrounded(x, weight, bias, valid)
    return context if context.dtype == x.dtype else context.to(x.dtype)  # a call of `to` takes longer than the comparison


def unrounded(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """The result of `attention_pool` in the accumulation dtype."""
    if _torch.any_autocast():
        weight, bias = beside(x, weight, bias)
    if way := _dispatch.way_of(x, weight, bias, valid):
        context: Tensor = _dispatch.call(way, "attention_pool", _differentiable, x, weight, bias, valid)[0]
        return context
    _check("attention_pool", Arguments(x, weight, bias, valid))
    return pool(x.flatten(2).to(accumulation_dtype(x)), weight, bias, flat_valid(valid))


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
    given: tuple[Any, ...] = beside(x, weight, bias) if _torch.any_autocast() else (weight, bias)
    if way := _dispatch.way_of(x, *given, valid):
        attention = _dispatch.call(way, "attention_pool", _differentiable, x, *given, valid)[1]
        return attention.detach().reshape(x.shape[:1] + x.shape[2:])
    return reference_map(x, *given, valid=valid).detach()


# ---- plain PyTorch -----------------------------------------------------------------------------------------------------------


def reference(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
    """`attention_pool` in plain PyTorch."""
    _check("attention_pool", Arguments(x, weight, bias, valid))
    return pool(x.flatten(2).to(accumulation_dtype(x)), weight, bias, flat_valid(valid)).to(x.dtype)


def reference_map(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
    """`attention_map` in plain PyTorch."""
    _check("attention_pool", Arguments(x, weight, bias, valid))
    counting = flat_valid(valid)
    positions = only(x.flatten(2).to(accumulation_dtype(x)), counting)
    return softmax(logits(positions, weight, bias), counting).reshape(x.shape[:1] + x.shape[2:])


def pool(positions: Tensor, weight: Tensor | None, bias: Tensor | None, valid: Tensor | None) -> Tensor:
    """The context [N, C] of positions [N, C, P], of those that count, [N or 1, P]."""
    return attend(positions, weight, bias, valid)[0]


def attend(positions: Tensor, weight: Tensor | None, bias: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The context [N, C] of positions [N, C, P], and the attention [N, P] that it is gathered with; the average has none."""
    positions = only(positions, valid)
    if weight is not None:
        attention = softmax(logits(positions, weight, bias), valid)
        return weighted_sum(positions, attention), attention
    return positions.mean(2) if valid is None else positions.sum(2) / valid.sum(1, keepdim=True).to(positions.dtype).clamp(
        min=1
    ), None


def results(call: Arguments) -> tuple[Tensor, Tensor]:
    """The results of the operator in plain PyTorch: context and attention."""
    x = call.x
    _check("attention_pool", call)
    context, attention = attend(x.flatten(2).to(accumulation_dtype(x)), call.weight, call.bias, flat_valid(call.valid))
    return context, context[:, :0] if attention is None else attention


def logits(positions: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """w . x_p + b of positions [N, C, P] -> [N, P]."""
    samples, channels = positions.shape[:2]
    of_samples = weight.to(positions.dtype).reshape(1, 1, channels).expand(samples, 1, channels)
    products = product(of_samples, positions).squeeze(1)
    return products if bias is None else products + bias.to(positions.dtype).reshape(())


def softmax(logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """The softmax of logits [N, P] over the positions that count, [N or 1, P]; 0 elsewhere, and where none does."""
    if valid is None:
        return logits.softmax(1)
    others = ~valid & valid.any(1, keepdim=True)  # where none counts, the logits stay, so that no NaN arises from them
    return logits.masked_fill(others, -torch.inf).softmax(1).where(valid, 0)


def only(positions: Tensor, valid: Tensor | None) -> Tensor:
    """positions [N, C, P] with zeros where a position does not count, [N or 1, P]: a product with 0 would let a NaN pass."""
    return positions if valid is None else positions.where(valid.unsqueeze(1), 0)


def weighted_sum(positions: Tensor, attention: Tensor) -> Tensor:
    """sum_p m_p x_p of positions [N, C, P] and an attention [N, P] -> [N, C]."""
    return product(positions, attention.unsqueeze(2)).squeeze(2)


def flat_valid(valid: Tensor | None) -> Tensor | None:
    """[N or 1, *spatial] -> [N or 1, P]."""
    return None if valid is None else valid.flatten(1)


# ---- arguments ---------------------------------------------------------------------------------------------------------------


class Arguments(NamedTuple):
    x: Any
    weight: Any
    bias: Any
    valid: Any


class BackwardArguments(NamedTuple):
    grad_context: Any
    x: Any
    weight: Any
    bias: Any
    valid: Any
    context: Any
    attention: Any
    needs: Any  # of x, the weight and the bias


def _check(op: str, call: Arguments | BackwardArguments) -> None:
    _checks.feature_map(op, call.x)
    _checks.mask(op, "", call.weight, call.bias, call.x)
    _checks.valid(op, call.valid, call.x)


def _check_backward(op: str, call: BackwardArguments) -> None:
    _check(op, call)
    x = call.x
    _checks.saved(op, "grad_context", call.grad_context, x, x.shape[:2])
    _checks.saved(op, "context", call.context, x, x.shape[:2])
    _checks.saved(op, "attention", call.attention, x, (x.shape[0], attended(x, call.weight)))
    _checks.count(op, "needs", call.needs, 3)


def attended(x: Tensor, weight: Tensor | None) -> int:
    """The size of a sample's attention map: the average has none."""
    return 0 if weight is None else _checks.positions(x)


# ---- shapes and FLOPs --------------------------------------------------------------------------------------------------------


def _result_shapes(call: Arguments) -> tuple[Tensor, Tensor]:
    x = call.x
    return _shapes.accumulated(x, *x.shape[:2]), _shapes.accumulated(x, x.shape[0], attended(x, call.weight))


def _gradient_shapes(call: BackwardArguments) -> tuple[Tensor, Tensor, Tensor]:
    x, (need_x, need_weight, need_bias) = call.x, call.needs
    return (
        _shapes.map_gradient(need_x, x),
        _shapes.gradient(need_weight, call.weight, x),
        _shapes.gradient(need_bias, call.bias, x),
    )


def flops(x: Sequence[int], weight: Sequence[int] | None) -> int:
    """Two products with every element of x: the logits and the weighted sum."""
    return 0 if weight is None else 2 * 2 * prod(x)


def backward_flops(x: Sequence[int], weight: Sequence[int] | None, need_x: bool, need_weight: bool) -> int:
    """dx goes through the weighted sum and through the logits; dm is a product for both; dw is one more."""
    return 0 if weight is None else 2 * prod(x) * (2 * need_x + (need_x or need_weight) + need_weight)


# ---- gradients ---------------------------------------------------------------------------------------------------------------


class _AttentionPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        context, attention = _dispatch.below_autograd("attention_pool", args)
        ctx.tuning = _tuning.decided()
        ctx.mark_non_differentiable(attention)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args, context, attention)
        return context, attention

    @staticmethod
    def backward(ctx, grad_context, _grad_attention):
        if grad_context is None:
            return None, None, None, None
        x, weight, bias, valid, context, attention = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if in_plain_pytorch(grad_context):
            function = partial(_reference_context, valid=valid)
            return *through_plain_pytorch(function, (x, weight, bias), needs, grad_context), None
        args = grad_context, x, weight, bias, valid, context, attention, needs
        return *map(needed, needs, _dispatch.backward(ctx.tuning, "attention_pool_backward", args)), None


def _reference_context(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, valid: Tensor | None) -> Tensor:
    """The context as the operator returns it, in the accumulation dtype, to be differentiated."""
    return pool(x.flatten(2).to(accumulation_dtype(x)), weight, constant(bias), flat_valid(valid))


_differentiable = partial(_dispatch.differentiable, _AttentionPool, "attention_pool")
_dispatch.register(
    "attention_pool",
    Arguments,
    check=_check,
    shapes=_result_shapes,
    flops=lambda call: flops(call.x, call.weight),
    differentiable=_differentiable,
    plain=results,
)
_dispatch.register(
    "attention_pool_backward",
    BackwardArguments,
    check=_check_backward,
    shapes=_gradient_shapes,
    flops=lambda call: backward_flops(call.x, call.weight, *call.needs[:2]),
)
