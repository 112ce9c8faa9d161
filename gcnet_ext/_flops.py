"""FLOPs of the operators for torch.utils.flop_counter, counted as PyTorch counts: two for each multiply-add of a product.

The products are those of the block in eager PyTorch, forward and backward; elementwise work, such as the fusion, counts nothing
there either. Shapes stand for tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ._arguments import Arguments, BackwardArguments, Needs, per_weight

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


def _branch(x: Shape, weights: Sequence[Shape | None]) -> int:
    branch = per_weight(weights)
    return 2 * x[0] * sum(prod(weight) for weight in (branch.w1, branch.w2) if weight is not None)


def _branch_backward(x: Shape, weights: Sequence[Shape | None], need_context: bool, need_weights: bool) -> int:
    branch = per_weight(weights)
    if branch.w1 is None:
        return 0
    gradients = 2 * x[0] * prod(branch.w1) * (need_context + need_weights)
    if branch.w2 is not None:
        gradients += 2 * x[0] * prod(branch.w2) * ((need_context or need_weights) + need_weights)
    return gradients


def register() -> None:
    """Registers the formulas; needs the operators."""
    ops = torch.ops.gcnet_ext

    @register_flop_formula(ops.attention_pool)
    def attention_pool(x: Shape, weight: Shape | None, *_: Any, **__: Any) -> int:
        return _pool(x, weight)

    @register_flop_formula(ops.attention_pool_backward)
    def attention_pool_backward(_grad: Shape, x: Shape, weight: Shape | None, *rest: Any, **_: Any) -> int:
        need_x, need_weight, _need_bias = rest[-1]
        return _pool_backward(x, weight, need_x, need_weight)

    @register_flop_formula([ops.channel_fuse, ops.channel_fuse_, ops.channel_fuse_backward])
    def channel_fuse(*_: Any, **__: Any) -> int:
        return 0

    @register_flop_formula([ops.global_context, ops.global_context_inference, ops.global_context_])
    def global_context(*args: Any, **_: Any) -> int:
        call = Arguments(*args)
        return _pool(call.x, call.mask[0]) + _branch(call.x, call.scale) + _branch(call.x, call.shift)

    @register_flop_formula(ops.global_context_backward)
    def global_context_backward(*args: Any, **_: Any) -> int:
        call = BackwardArguments(*args)
        weight, needs = call.mask[0], Needs(*call.needs)
        need_context = needs.x or (needs.mask_weight and weight is not None)
        return (
            _pool_backward(call.x, weight, needs.x, needs.mask_weight)
            + _branch_backward(call.x, call.scale, need_context, needs.scale)
            + _branch_backward(call.x, call.shift, need_context, needs.shift)
        )
