"""attention_pool: what the tests must know of it."""

from __future__ import annotations

import math
from functools import partial

from entry import Arguments, Op, Operator, Outputs
from formulas import KernelPool, Pool, pool_backward, pool_forward, zero_bias

from gcnet_ext.ops.attention_pool import reference


def attention_pool(a: Arguments, pool: Pool = pool_forward) -> Outputs:
    return pool(a["x"], a["weight"], a["bias"], a["valid"])


def attention_pool_backward(a: Arguments, *, in_parts: bool = False) -> Outputs:
    context, attention = a["context"].flatten(1), a["attention"].flatten(1)
    dx, dw = pool_backward(a["grad_context"], a["x"], a["weight"], a["valid"], context, attention, in_parts=in_parts)
    return dx if a["need_x"] else None, dw if a["need_weight"] else None, zero_bias(a["need_bias"], a["bias"])


SAVED = {
    "context": lambda sizes: (sizes.n, sizes.c),
    "attention": lambda sizes: (sizes.n, sizes.positions if sizes.attended else 0),
}
NEEDS = ("need_x", "need_weight", "need_bias")
OP = Op(
    operators=(
        Operator("attention_pool", ("x", "weight", "bias", "valid"), attention_pool),
        Operator(
            "attention_pool_backward",
            ("grad_context", "x", "weight", "bias", "valid", "context", "attention", *NEEDS),
            attention_pool_backward,
            saved={"grad_context": SAVED["context"], **SAVED},
            in_parts=partial(attention_pool_backward, in_parts=True),
        ),
    ),
    reference=reference,
    inputs=("x", "weight", "bias"),
    draw=lambda case, to, seed: case.inputs(to, seed)[:3],
    differentiated=lambda a: attention_pool(a, KernelPool.apply)[0],
    is_map=False,
    fixed={"fusion": "both", "hidden": 4},
    vanishing=lambda case: [name.removeprefix("mask_") for name in case.vanishing],
    flops=lambda case: 4 * math.prod(case.shape),
)
