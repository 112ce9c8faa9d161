"""Sizes at the limits of the plans (csrc/plan_cpu.cpp): the most splits, tiles and parts, and one more; wide transforms.

The plan itself is asked, so that a case that no longer lies at its limit fails.
"""

from __future__ import annotations

import math

import grid
import pytest
import reference
import torch
from grid import GLOBAL_CONTEXT_INPUTS, Case, Random

import gcnet_ext
from gcnet_ext import _load
from gcnet_ext.ops import attention_pool

pytestmark = pytest.mark.usefixtures("kernels")
TILE, SPLITS, PARTS = 4096, 64, 16  # positions of the largest tile, and how many splits and parts there are at most


def plan(case: Case) -> dict:
    channels, positions = case.shape[1], math.prod(case.shape[2:])
    return _load.compiled.plan("cpu", channels, positions, case.dtype.itemsize, case.layout == "channels_last")


def check(case: Case, **options) -> grid.Result:
    grad = Random(1).feature_map(case.shape, case.dtype, case.layout)
    functions = [grid.flat(module.global_context, **options) for module in (gcnet_ext, reference)]
    return grid.check(*functions, case.inputs(), grad, GLOBAL_CONTEXT_INPUTS, vanishing=case.vanishing, sums=case.sums)


@pytest.fixture(autouse=True)
def softmax_of_the_truth(monkeypatch):
    """A softmax whose denominator is summed in pairs: torch's own is off by more than the kernels for a million logits."""

    def softmax(logits: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        assert valid is None
        exponentials = (logits - logits.detach().amax(1, keepdim=True)).exp()
        return exponentials / exponentials.sum(1, keepdim=True)

    monkeypatch.setattr(attention_pool, "softmax", softmax)


# C, P, dtype, layout -> what the plan has the most of: splits, blocks of a sweep by positions and by channels
LIMITS = {
    "the most splits": ((1, 3, SPLITS * TILE), torch.float32, "contiguous", {"splits": SPLITS, "split": TILE}),
    "the last split is one position": ((1, 3, 63 * TILE + 1), torch.float32, "channels_last", {"splits": SPLITS}),
    "two tiles in a split": ((1, 2, SPLITS * TILE + 1), torch.float32, "channels_last", {"splits": 33, "split": 2 * TILE}),
    "the smallest tile": ((1, 1500, 130), torch.float64, "channels_last", {"tile": 64, "splits": 3}),
    "the most blocks of a row": ((1, 1, SPLITS * 16384), torch.float64, "contiguous", {"sweep_position_blocks": SPLITS}),
    "longer blocks of a row": ((1, 1, SPLITS * 16384 + 1), torch.float64, "contiguous", {"sweep_positions": 16392}),
    "the most blocks of positions": ((1, 600, 1728), torch.float64, "channels_last", {"sweep_position_blocks": SPLITS}),
    "the longest row by channels": ((1, 16, 16384), torch.float32, "contiguous", {"splits": 1, "tile": 16384}),
    "a row too long for it": ((1, 15, 16385), torch.float32, "contiguous", {"splits": 5, "tile": 4096}),
    "the most parts": ((1, 1024, 512), torch.float32, "contiguous", {"sweep_channel_blocks": PARTS, "sweep_channels": 64}),
    "a part that is not whole": ((1, 1021, 515), torch.float32, "contiguous", {"sweep_channel_blocks": PARTS}),
    "just wide enough for parts": ((1, 513, 800), torch.float32, "contiguous", {"splits": 1, "sweep_channels": 40}),
    "not wide enough for parts": ((1, 512, 800), torch.float32, "contiguous", {"splits": 7, "tile": 128}),
}


@pytest.mark.parametrize(("shape", "dtype", "layout", "expected"), LIMITS.values(), ids=LIMITS)
def test_plans_at_their_limits(shape, dtype, layout, expected):
    case = Case(shape, dtype, layout, hidden=3)
    found = plan(case)
    assert {name: found[name] for name in expected} == expected
    check(case)


@pytest.mark.parametrize("threads_used", [1, 2])
@pytest.mark.parametrize(
    ("samples", "channels", "hidden"),
    [
        (2, 512, 64),  # 64k weights: the most that are one thread's work
        (2, 512, 65),
        (9, 700, 61),  # columns that are no multiple of 512, more samples than share a load of the weights
        (3, 1030, 35),
        (1, 60, 1111),  # the same in the second layer
        (5, 513, 513),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_wide_transforms(threads, dtype, samples, channels, hidden, threads_used):
    """More weights than one thread multiplies with, and rows and columns of them that no block divides."""
    threads(threads_used)
    check(Case((samples, channels, 3), dtype, hidden=hidden))


@pytest.mark.parametrize("channels", [300, 700])
def test_one_wide_layer(channels):
    missing = tuple(f"{branch}_{name}" for branch in ("scale", "shift") for name in ("norm_weight", "norm_bias", "w2", "b2"))
    check(Case((3, channels, 5), hidden=channels, missing=missing))


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize(("positions", "masked"), [(5 * TILE, TILE), (66 * TILE, TILE), (66 * TILE, 2 * TILE), (50, 49)])
@pytest.mark.parametrize("behind", [False, True], ids=["first", "last"])
def test_tiles_and_splits_without_a_finite_logit(positions, masked, layout, behind):
    """Whole tiles and whole splits of -inf, before or behind all the others, have no part in the attention."""
    x = Random(0).feature_map((2, 3, positions), torch.float32, layout).clone()
    weight, grad = Random(1).normal(3), Random(2).normal(2, 3)
    without = slice(-masked, None) if behind else slice(masked)
    x[:, 0] = 0
    x[:, 0, without] = 10
    weight[0] = -torch.finfo(torch.float32).max
    got = grid.run(gcnet_ext.attention_pool, (x, weight, None), grad)
    want = grid.exact(reference.attention_pool, (x, weight, None), grad)
    grid.assert_close(got.out, want.out, torch.float32, "context")
    # Channel 0 has the gradients of the huge weight, beside which the others would be nothing.
    grid.assert_close(got.grads[0][:, 1:], want.grads[0][:, 1:], torch.float32, "gradient of x", sums=150)
    grid.assert_close(got.grads[1][1:], want.grads[1][1:], torch.float32, "gradient of the weight", sums=150)
    assert (got.grads[0][:, :, without] == 0).all()
    assert (gcnet_ext.attention_map(x, weight)[:, without] == 0).all()
