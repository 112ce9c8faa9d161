"""Attention and average pooling, against the float64 reference."""

from __future__ import annotations

import itertools
import math

import eager
import grid
import pytest
import reference
import torch
from grid import Case, Random

from gcnet_ext import _load

NAMES = ("x", "weight", "bias")


def inputs_of(case: Case, backend) -> tuple:
    return case.inputs(backend.to)[:3]


def gradient_of(case: Case, backend):
    return Random(1, backend.to).normal(*case.shape[:2], dtype=case.dtype)


def check(backend, case: Case, grad=None) -> grid.Result:
    grad = gradient_of(case, backend) if grad is None else grad
    vanishing = ["bias"]
    if "mask_weight" in case.vanishing:
        vanishing.append("weight")
    return grid.check(
        backend.attention_pool, reference.attention_pool, inputs_of(case, backend), grad, NAMES, vanishing=vanishing
    )


@pytest.mark.parametrize("case", grid.distinct(grid.views(), fusion="both", pooling="avg"), ids=str)
def test_views_of_the_average(backend, case):
    check(backend, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("float32", NAMES[1:])
def test_weight_and_bias_of_two_dtypes(backend, dtype, float32):
    x, weight, bias = inputs_of(Case((3, 20, 5, 7), dtype), backend)
    inputs = (x, weight.float(), bias) if float32 == "weight" else (x, weight, bias.float())
    grid.check(
        backend.attention_pool, reference.attention_pool, inputs, torch.ones_like(x[:, :, 0, 0]), NAMES, vanishing=["bias"]
    )


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("dtype", grid.FLOATING)
def test_no_bias(backend, dtype, layout):
    check(backend, Case((3, 20, 5, 7), dtype, layout, missing=("mask_bias",)))


def test_gradient_with_strides(backend):
    """Transposed, a slice of a larger one, expanded."""
    case = Case((3, 20, 5, 7))
    random = Random(2, backend.to)
    for grad in (random.normal(20, 3).t(), random.normal(3, 41)[:, 1::2], random.normal(3, 1).expand(3, 20)):
        check(backend, case, grad)
    grid.check(backend.attention_pool, reference.attention_pool, inputs_of(case, backend), None, NAMES, vanishing=["bias"])


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("dtype", grid.HALF)
@pytest.mark.parametrize("shape", [(2, 64, 7, 7), (2, 100, 32, 33)], ids=str)
def test_no_worse_than_eager_in_half(backend, dtype, layout, shape):
    case = Case(shape, dtype, layout)
    inputs, grad = inputs_of(case, backend), gradient_of(case, backend)
    truth = grid.exact(reference.attention_pool, inputs, grad)
    ours, theirs = grid.run(backend.attention_pool, inputs, grad), grid.run(eager.attention_pool, inputs, grad)
    assert grid.error(ours.out, truth.out) <= 1.05 * grid.error(theirs.out, truth.out)
    for index in (0, 1):
        assert grid.error(ours.grads[index], truth.grads[index]) <= 1.05 * grid.error(theirs.grads[index], truth.grads[index])


def test_gradient_of_the_bias_is_zero_not_none(backend):
    got = grid.run(backend.attention_pool, inputs_of(Case((2, 8, 4, 5)), backend))
    assert got.grads[2].shape == (1,)
    # Plain PyTorch goes through the softmax and leaves its rounding errors.
    assert abs(got.grads[2].item()) <= (0 if backend.has_kernels else 1e-5)


@pytest.mark.parametrize("sizes", [(8,), (8, 1), (8, 1, 1), (1, 8), (1, 8, 1), (1, 8, 1, 1), (1, 8, 1, 1, 1)], ids=str)
def test_shapes_of_the_weight(backend, sizes):
    """[C] and the weight of a convolution to one channel are the same; the gradient has the shape of the weight."""
    x, weight, bias = inputs_of(Case((2, 8, 4, 5)), backend)
    plain = grid.run(backend.attention_pool, (x, weight, bias))
    got = grid.run(backend.attention_pool, (x, weight.reshape(sizes), bias.reshape([1] * len(sizes))))
    assert torch.equal(got.out, plain.out)
    assert got.grads[1].shape == sizes
    assert torch.equal(got.grads[1].flatten(), plain.grads[1])


@pytest.mark.parametrize("sizes", [(1,), (1, 1), (1, 1, 1, 1)], ids=str)
def test_shapes_of_the_weight_of_one_channel(backend, sizes):
    x, weight, bias = inputs_of(Case((2, 1, 4, 5)), backend)
    grid.check(
        backend.attention_pool, reference.attention_pool, (x, weight.reshape(sizes), bias), None, NAMES, vanishing=["bias"]
    )


# ---- the attention itself ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", grid.FLOATING)
@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("spatial", [(50,), (7, 7), (2, 3, 5)], ids=str)
def test_attention_map(backend, spatial, layout, dtype):
    x, weight, bias = inputs_of(Case((2, 12, *spatial), dtype, layout), backend)
    got = backend.attention_map(x.requires_grad_(), weight, bias)
    want = reference.attention_map(x.detach().cpu().double(), weight.cpu().double(), bias.cpu().double())
    assert got.dtype == grid.accumulation(x)
    assert not got.requires_grad
    grid.assert_close(got, want, grid.accumulation(x))
    total = got.flatten(1).sum(1)
    assert torch.allclose(total, torch.ones_like(total), rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", grid.LAYOUTS)
def test_attention_picks_one_position(backend, layout):
    """Logits far apart: the context is x at the largest of them, exactly."""
    x = Random(0, backend.to).feature_map((2, 6, 5, 7), torch.float32, layout).clone()
    x[0, 0, 2, 3] = x[1, 0, 4, 6] = 1000
    weight = torch.zeros(6, device=x.device)
    weight[0] = 1000
    want = torch.stack([x[0, :, 2, 3], x[1, :, 4, 6]])
    assert torch.equal(backend.attention_pool(x, weight), want)


@pytest.mark.representative
@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 64, 5, 7), (1, 70, 61, 67)], ids=str)
def test_nothing_passes_a_saturated_softmax(backend, shape, layout):
    """The gradient of the context goes to the one position that has all of the attention, and none to the weight."""
    x = Random(0, backend.to).feature_map(shape, torch.float32, layout).clone()
    x[:, 0, 2, 3] = 1000
    weight = torch.zeros(shape[1], device=x.device)
    weight[0] = 1000
    grad = Random(1, backend.to).normal(*shape[:2])
    got = grid.run(backend.attention_pool, (x, weight, None), grad)
    want = torch.zeros_like(x)
    want[:, :, 2, 3] = grad
    if backend.name == "cpu" or not backend.has_kernels:
        assert torch.equal(got.grads[0], want)
        assert not got.grads[1].any()
    else:  # u_p is summed in another order than dctx . context: dl is off by a rounding, and with it dl w; but x is the context
        eps, u = torch.finfo(torch.float32).eps, float(x[0, :, 2, 3].norm() * grad.norm())
        grid.assert_close(got.grads[0], want.double().cpu(), torch.float32, largest=u * 1000)
        assert float(got.grads[1].abs().max()) <= 64 * eps * eps * u * 1000


@pytest.mark.representative
@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 64, 32, 32), (2, 512, 7, 7), (1, 20, 120, 121)], ids=str)
def test_what_all_positions_have_in_common(backend, shape, layout):
    """It multiplies no rounding error in the gradient of the weight, which it has no part in.

    u_p = dctx . x_p is off by roundings of its terms, which are about as large as `offset` times dctx. That is all that may be
    left of the offset in either gradient: 16 of them, where chains of C terms add up to less.
    """
    offset, random = 1000.0, Random(0, backend.to)
    x = grid.LAYOUTS[layout](lambda *sizes: random.normal(*sizes, mean=offset), *shape)
    inputs, grad = (x, *random.mask(shape[1], torch.float32)), random.normal(*shape[:2])
    truth = grid.exact(reference.attention_pool, inputs, grad)
    ours, theirs = (grid.run(function, inputs, grad) for function in (backend.attention_pool, eager.attention_pool))
    roundings = 16 * offset * torch.finfo(torch.float32).eps
    assert grid.error(ours.grads[0], truth.grads[0]) <= roundings
    assert grid.error(ours.grads[1], truth.grads[1]) <= min(roundings, grid.error(theirs.grads[1], truth.grads[1]))


def test_the_shapes_above_go_both_ways(kernels):
    """The CPU's in NCHW: the last two are cut into splits of positions, and no other is."""
    splits = [_load.compiled.plan("cpu", c, p, 4, False)["splits"] for c, p in ((64, 1024), (512, 49), (70, 4087), (20, 14520))]
    assert splits[:2] == [1, 1]
    assert min(splits[2:]) > 1


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("largest", ["first", "last", "middle"])
@pytest.mark.parametrize("shape", [(2, 3, 20_000), (1, 1, 300_001)], ids=str)
def test_largest_logit(backend, shape, largest, layout):
    """Logits that rise, fall, or both, over all of the positions: the running maximum changes in every tile, or never."""
    x = Random(0, backend.to).feature_map(shape, torch.float32, layout).clone()
    ramp = torch.linspace(-40, 0, shape[2], device=x.device)
    x[:, 0] = {"last": ramp, "first": ramp.flip(0), "middle": -(2 * ramp + 40).abs()}[largest]
    weight = torch.zeros(shape[1], device=x.device)
    weight[0] = 1
    grad = torch.ones(shape[:2], device=x.device)
    grid.check(backend.attention_pool, reference.attention_pool, (x, weight, None), grad, NAMES)


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_far_apart_logits(backend, dtype, layout):
    """From e^0 down to what underflows: each weight of the attention is accurate on its own, and none is NaN or negative."""
    x = Random(0, backend.to).feature_map((2, 4, 999), dtype, layout).clone()
    x[:, 0] = torch.linspace(-150, 0, 999, device=x.device).to(dtype)[torch.randperm(999, generator=Random(1).generator)]
    weight = torch.zeros(4, device=x.device, dtype=dtype)
    weight[0] = 1
    got = backend.attention_map(x, weight).double()
    want = reference.attention_map(x.double(), weight.double())
    normal = want > torch.finfo(grid.accumulation(x)).tiny
    assert normal.any()
    assert torch.allclose(got[normal], want[normal], rtol=100 * torch.finfo(grid.accumulation(x)).eps, atol=0)
    assert (got[~normal] >= 0).all()
    assert (got[~normal] <= 2 * torch.finfo(torch.float32).tiny).all()


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 16, 999), (1, 2048, 49), (1, 16, 20_000)], ids=str)
def test_no_weight_is_subnormal(kernels, cpu, shape, layout):
    """Beside the largest weight such a number is nothing, and a processor takes many times as long for products with one."""
    x = Random(0, cpu.to).feature_map(shape, torch.float32, layout).clone()
    x[:, 0] = torch.linspace(-110, 0, shape[2])
    weight = torch.zeros(shape[1])
    weight[0] = 1
    attention = cpu.attention_map(x, weight)
    assert (attention == 0).any()
    assert attention[attention > 0].min() >= torch.finfo(torch.float32).tiny


# ---- infinities and NaN ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("positions", [1, 5, 50, 1056])
@pytest.mark.parametrize("bias", [math.inf, -math.inf, math.nan], ids=str)
def test_every_logit_not_finite(backend, bias, positions, layout):
    x, weight, _ = inputs_of(Case((2, 8, positions), layout=layout), backend)
    bias = torch.full((1,), bias, device=x.device)
    assert reference.attention_pool(x, weight, bias).isnan().all()
    assert backend.attention_pool(x, weight, bias).isnan().all()


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("position", [0, 4095, 4096, 9999, 19_999])
def test_one_bad_position_among_many_tiles(backend, position, value, layout):
    """Wherever it lies, in the first tile, a later one or the last one."""
    x, weight, bias = inputs_of(Case((2, 3, 20_000), layout=layout), backend)
    x = x.clone()
    x[0, 1, position] = value
    got, want = backend.attention_pool(x, weight, bias), reference.attention_pool(x, weight, bias)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[want.isinf()], want[want.isinf()])
    assert torch.allclose(got[want.isfinite()], want[want.isfinite()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("masked", [[0], [3], [0, 1, 2, 3, 4, 5, 6, 7], list(range(49))], ids=str)
def test_positions_with_a_logit_of_minus_infinity(backend, masked, layout):
    """A logit that overflows to -inf has no part in the attention: the context is that of the other positions."""
    x, weight, bias = inputs_of(Case((2, 8, 50), layout=layout), backend)
    x, weight = x.clone(), weight.clone()
    x[:, 0] = 0
    x[:, 0, masked] = 10
    weight[0] = -torch.finfo(torch.float32).max
    kept = [position for position in range(50) if position not in masked]
    got = backend.attention_pool(x, weight, bias)
    want = reference.attention_pool(x[:, :, kept].cpu().double(), weight.cpu().double(), bias.cpu().double())
    grid.assert_close(got, want, torch.float32)
    assert (backend.attention_map(x, weight, bias)[:, masked] == 0).all()


# ---- the raw operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", grid.distinct(grid.combinations(), fusion="both"), ids=str)
def test_raw(backend, case):
    """The outputs are in the accumulation dtype; the backward operator gives what autograd gives, and nothing unasked."""
    ops = backend.ops
    x, weight, bias = inputs_of(case, backend)
    context, attention = ops.attention_pool(x, weight, bias)
    acc = grid.accumulation(x)
    doubles = [None if tensor is None else tensor.cpu().double() for tensor in (x, weight, bias)]
    assert context.dtype == attention.dtype == acc
    grid.assert_close(context, reference.attention_pool(*doubles), acc, "context")
    if weight is None:
        assert attention.shape == (x.shape[0], 0)
    else:
        grid.assert_close(attention, reference.attention_map(*doubles).flatten(1), acc, "attention")
    grad = gradient_of(case, backend)
    want = grid.run(backend.attention_pool, (x, weight, bias), grad).grads
    for needs in itertools.product([False, True], repeat=3):
        got = ops.attention_pool_backward(grad.to(acc), x, weight, bias, None, context, attention, *needs)
        for need, ours, theirs in zip(needs, got, want, strict=True):
            if need and theirs is not None:
                assert torch.equal(ours, theirs)
            else:
                assert ours.shape == (0,)
