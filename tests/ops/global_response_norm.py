"""global_response_norm: what the tests must know of it."""

from __future__ import annotations

from entry import Arguments, Op, Operator, Outputs, To
from formulas import per_channel, positions_of
from grid import Case, Random
from torch import Tensor

from gcnet_ext.ops.global_response_norm import reference

EPS = 1e-6


def response_of(norms: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
    """D, [N, 1], and N = G / D, [N, C]."""
    divisor = norms.mean(1, keepdim=True) + a["eps"]
    return divisor, norms / divisor


def global_response_norm(a: Arguments) -> Outputs:
    x = a["x"]
    norms = positions_of(x).square().sum(2).sqrt()
    _, response = response_of(norms, a)
    gamma = a["gamma"].flatten()
    return x + x * per_channel(gamma * response, x) + per_channel(a["beta"].flatten().expand_as(norms), x), norms


def global_response_norm_backward(a: Arguments) -> Outputs:
    grad, x = a["grad"], a["x"]
    norms, gamma = a["norms"].reshape(x.shape[:2]), a["gamma"].flatten()
    divisor, response = response_of(norms, a)
    products = positions_of(grad * x).sum(2)
    through_norms = (gamma * products - (gamma * products * response).mean(1, keepdim=True)) / divisor
    factor = (through_norms / norms.where(norms != 0, 1)).where(norms != 0, 0)
    return (
        grad * per_channel(1 + gamma * response, x) + x * per_channel(factor, x) if a["need_x"] else None,
        (products * response).sum(0).reshape(a["gamma"].shape) if a["need_gamma"] else None,
        positions_of(grad).sum((0, 2)).reshape(a["beta"].shape) if a["need_beta"] else None,
    )


def draw(case: Case, to: To, seed: int) -> tuple[Tensor | None, ...]:
    random = Random(seed, to)
    x = random.feature_map(case.shape, case.dtype, case.layout)
    gamma, beta = (random.normal(case.shape[1], dtype=case.parameter_dtype or case.dtype) for _ in range(2))
    return x, gamma, beta


OP = Op(
    operators=(
        Operator("global_response_norm", ("x", "gamma", "beta", "eps"), global_response_norm),
        Operator(
            "global_response_norm_backward",
            ("grad", "x", "gamma", "beta", "eps", "norms", "need_x", "need_gamma", "need_beta"),
            global_response_norm_backward,
            saved={"norms": lambda sizes: (sizes.n, sizes.c)},
        ),
    ),
    reference=reference,
    inputs=("x", "gamma", "beta"),
    draw=draw,
    fixed={"pooling": "avg", "fusion": "add", "hidden": 4},
)
