"""channel_fuse: what the tests must know of it."""

from __future__ import annotations

from entry import Arguments, Op, Operator, Outputs, To, no_bits
from formulas import before_relu, finish, per_channel, positions_of
from grid import Case, Random
from torch import Tensor

from gcnet_ext.ops.channel_fuse import reference


def channel_fuse(a: Arguments) -> Outputs:
    return finish(a, reference(a["x"], a["scale"], a["shift"])), no_bits(a["x"])


def channel_fuse_backward(a: Arguments) -> Outputs:
    grad, x, scale, shift = before_relu(a), a["x"], a["scale"], a["shift"]
    sums = [positions_of(product).sum(2) for product in (grad * x, grad)]
    return (
        (grad if scale is None else grad * per_channel(scale, x)) if a["need_x"] else None,
        sums[0].reshape(scale.shape) if a["need_scale"] and scale is not None else None,
        sums[1].reshape(shift.shape) if a["need_shift"] and shift is not None else None,
        grad if a["need_residual"] and a["final_activation"] else None,
    )


def draw(case: Case, to: To, seed: int) -> tuple[Tensor | None, ...]:
    random = Random(seed, to)
    x = random.feature_map(case.shape, case.dtype, case.layout)
    scale, shift = (random.normal(*case.shape[:2], dtype=case.parameter_dtype or case.dtype) for _ in range(2))
    return x, None if case.fusion == "add" else scale, None if case.fusion == "mul" else shift


ARGUMENTS = ("x", "scale", "shift", "residual", "final_activation")
NEEDS = ("need_x", "need_scale", "need_shift", "need_residual")
OP = Op(
    operators=(
        Operator("channel_fuse", ARGUMENTS, channel_fuse),
        Operator("channel_fuse_", ARGUMENTS, lambda a: channel_fuse(a)[:1]),
        Operator(
            "channel_fuse_backward",
            ("grad", "x", "scale", "shift", "final_activation", "positive", *NEEDS),
            channel_fuse_backward,
        ),
    ),
    reference=reference,
    inputs=("x", "scale", "shift"),
    draw=draw,
    needs_positions=False,
    fixed={"pooling": "att", "hidden": 4},
    options=("inplace",),
)
