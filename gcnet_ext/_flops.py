"""FLOPs of the operators for torch.utils.flop_counter, counted as PyTorch counts: two for each multiply-add of a product.

The products are those of the block in eager PyTorch, forward and backward; elementwise work, such as the fusion, counts nothing
there either. Shapes stand for tensors.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = tuple[int, ...]


def _positions(x: Shape) -> int:
    """N C P: the multiply-adds of one product with every element of x."""
    return prod(x)


def _pool(x: Shape, weight: Shape | None) -> int:
    return 0 if weight is None else 2 * 2 * _positions(x)  # logits, weighted sum


def _pool_backward(x: Shape, weight: Shape | None, need_x: bool, need_weight: bool) -> int:
    if weight is None:
        return 0
    # dx through the weighted sum and through the logits; dm for both; dw
    return 2 * _positions(x) * (2 * need_x + (need_x or need_weight) + need_weight)


def _branch(x: Shape, w1: Shape | None, w2: Shape | None) -> int:
    return 2 * x[0] * sum(prod(weight) for weight in (w1, w2) if weight is not None)


def _branch_backward(x: Shape, w1: Shape | None, w2: Shape | None, need_context: bool, need_weights: bool) -> int:
    if w1 is None:
        return 0
    gradients = 2 * x[0] * prod(w1) * (need_context + need_weights)
    if w2 is not None:
        gradients += 2 * x[0] * prod(w2) * ((need_context or need_weights) + need_weights)
    return gradients


def register() -> None:
    """Registers the formulas; needs the operators."""
    ops = torch.ops.gcnet_ext

    @register_flop_formula(ops.attention_pool)
    def attention_pool(x: Shape, weight: Shape | None, *_: Any, **__: Any) -> int:
        return _pool(x, weight)

    @register_flop_formula(ops.attention_pool_backward)
    def attention_pool_backward(_grad: Shape, x: Shape, weight: Shape | None, *rest: Any, **_: Any) -> int:
        return _pool_backward(x, weight, *rest[-2:])

    @register_flop_formula([ops.channel_fuse, ops.channel_fuse_, ops.channel_fuse_backward])
    def channel_fuse(*_: Any, **__: Any) -> int:
        return 0

    @register_flop_formula([ops.global_context, ops.global_context_inference, ops.global_context_])
    def global_context(x: Shape, mask_weight: Shape | None, _mask_bias: Shape | None, *rest: Any, **_: Any) -> int:
        return _pool(x, mask_weight) + _branch(x, rest[0], rest[4]) + _branch(x, rest[6], rest[10])

    @register_flop_formula(ops.global_context_backward)
    def global_context_backward(_grad: Shape, x: Shape, mask_weight: Shape | None, *rest: Any, **_: Any) -> int:
        need_x, need_mask, need_scale, need_shift = rest[-4:]
        need_context = need_x or (need_mask and mask_weight is not None)
        return (
            _pool_backward(x, mask_weight, need_x, need_mask)
            + _branch_backward(x, rest[0], rest[4], need_context, need_scale)
            + _branch_backward(x, rest[6], rest[10], need_context, need_shift)
        )
