"""x * scale + shift, against the float64 reference."""

from __future__ import annotations

import itertools
import math

import eager
import grid
import pytest
import reference
import torch
from grid import Case, Random
from registry import OPERATORS

NAMES = ("x", "scale", "shift")


def inputs_of(case: Case, backend) -> tuple:
    random = Random(0, backend.to)
    x = random.feature_map(case.shape, case.dtype, case.layout)
    scale, shift = (random.normal(*case.shape[:2], dtype=case.parameter_dtype or case.dtype) for _ in range(2))
    return x, None if case.fusion == "add" else scale, None if case.fusion == "mul" else shift


def check(backend, case: Case, grad_layout: str | None = None) -> grid.Result:
    grad = Random(1, backend.to).feature_map(case.shape, case.dtype, grad_layout or case.layout)
    return grid.check(backend.channel_fuse, reference.channel_fuse, inputs_of(case, backend), grad, NAMES)


@pytest.mark.parametrize("fusion", grid.FUSIONS)
@pytest.mark.parametrize("layouts", list(itertools.permutations(grid.LAYOUTS)), ids="-grad-".join)
@pytest.mark.parametrize("dtype", grid.FLOATING)
def test_gradient_in_another_layout(backend, layouts, dtype, fusion):
    check(backend, Case((2, 33, 6, 7), dtype, layouts[0], fusion=fusion), grad_layout=layouts[1])


@pytest.mark.parametrize("float32", NAMES[1:])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scale_and_shift_of_two_dtypes(backend, dtype, float32):
    x, scale, shift = inputs_of(Case((3, 20, 5, 7), dtype), backend)
    inputs = (x, scale.float(), shift) if float32 == "scale" else (x, scale, shift.float())
    grid.check(backend.channel_fuse, reference.channel_fuse, inputs, x, NAMES)


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("fusion", grid.FUSIONS)
def test_expanded_gradient(backend, layout, fusion):
    inputs = inputs_of(Case((2, 12, 5, 5), layout=layout, fusion=fusion), backend)
    grid.check(backend.channel_fuse, reference.channel_fuse, inputs, None, NAMES)


@pytest.mark.parametrize("layout", grid.EVERY_LAYOUT)
def test_nothing_to_fuse(backend, layout):
    """Without scale and shift the result is a copy of x, not x, and its gradient is the gradient."""
    x = Random(0, backend.to).feature_map((2, 6, 4, 5), torch.float32, layout)
    got = grid.run(backend.channel_fuse, (x, None, None), x)
    assert torch.equal(got.out, x)
    assert torch.equal(got.grads[0], x)
    assert got.out.data_ptr() != x.data_ptr()


BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


def any_bits(shape, dtype, layout: str, to, seed: int = 0) -> torch.Tensor:
    """Every number there is, with the bits of a NaN, denormals and -0, as far as they fit in."""
    bits, generator = BITS[dtype], torch.Generator().manual_seed(seed)
    special = torch.tensor([-0.0, 0.0, math.inf, -math.inf, math.nan, -1e-40, 1e-42, 1e-310], dtype=torch.float64).to(dtype)

    def make(*sizes: int) -> torch.Tensor:
        least, most = torch.iinfo(bits).min, torch.iinfo(bits).max
        drawn = torch.randint(least, most, (math.prod(sizes),), generator=generator, dtype=bits)
        drawn[: len(special)] = special.view(bits)[: len(drawn)]
        return to(drawn.reshape(sizes)).view(dtype)

    return grid.EVERY_LAYOUT[layout](make, *shape)


@pytest.mark.representative
@pytest.mark.parametrize("layout", grid.EVERY_LAYOUT)
@pytest.mark.parametrize("dtype", grid.FLOATING)
@pytest.mark.parametrize("shape", [(2, 33, 4, 5), (1, 3, 70, 71)], ids=str)
def test_a_copy_bit_for_bit(backend, shape, dtype, layout):
    """Without scale and shift; and the gradient of x where nothing scales it, whatever else is asked for."""
    x = any_bits(shape, dtype, layout, backend.to)
    assert same_bits(backend.channel_fuse(x), x)
    got = grid.run(backend.channel_fuse, (x, None, None), any_bits(shape, dtype, layout, backend.to, 1))
    assert same_bits(got.out, x)
    assert same_bits(got.grads[0], any_bits(shape, dtype, layout, backend.to, 1))
    shift = Random(0, backend.to).normal(*shape[:2], dtype=dtype)
    for grad_layout in (layout, "contiguous"):
        grad = any_bits(shape, dtype, grad_layout, backend.to, 1)
        for other, need in ((None, False), (shift, True)):
            named = {"scale": None, "shift": other, "need_x": True, "need_scale": False, "need_shift": need}
            assert same_bits(backend.ops.channel_fuse_backward(grad, x, **named)[0], grad)
    if not layout.startswith("expanded"):
        kept = x.clone()
        backend.ops.channel_fuse_(x, None, None)
        assert same_bits(x, kept)


@pytest.mark.representative
@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("dtype", grid.FLOATING)
@pytest.mark.parametrize("fusion", grid.FUSIONS)
def test_the_sign_of_zero(backend, fusion, dtype, layout):
    """As in plain PyTorch: -0 * 1 is -0, and -0 + -0 is, but not -0 + 0. Where nothing is added, nothing changes a sign."""
    shape = (2, 37, 5, 7)
    signs = Random(0).normal(*shape), Random(1).normal(*shape[:2]), Random(2).normal(*shape[:2])
    x = grid.LAYOUTS[layout](lambda *sizes: backend.to(torch.zeros(sizes, dtype=dtype)), *shape).copysign(backend.to(signs[0]))
    scale = backend.to(torch.ones(shape[:2], dtype=dtype).copysign(signs[1]))
    shift = backend.to(torch.zeros(shape[:2], dtype=dtype).copysign(signs[2]))
    inputs = (x, None if fusion == "add" else scale, None if fusion == "mul" else shift)
    want = reference.channel_fuse(*inputs)
    assert 0.1 < want.signbit().float().mean() < 0.9
    got = grid.run(backend.channel_fuse, inputs, x)
    assert same_bits(got.out, want)
    if fusion != "add":
        assert same_bits(got.grads[0], x * scale[..., None, None])


@pytest.mark.parametrize("trailing", [0, 1, 2, 3])
def test_shapes_of_scale_and_shift(backend, trailing):
    """[N, C, 1, 1] is [N, C]; the gradients have the shapes of scale and shift."""
    x, scale, shift = inputs_of(Case((2, 8, 4, 5)), backend)
    plain = grid.run(backend.channel_fuse, (x, scale, shift), x)
    sizes = (2, 8, *[1] * trailing)
    got = grid.run(backend.channel_fuse, (x, scale.reshape(sizes), shift.reshape(sizes)), x)
    assert torch.equal(got.out, plain.out)
    for ours, theirs in zip(got.grads[1:], plain.grads[1:], strict=True):
        assert ours.shape == sizes
        assert torch.equal(ours.flatten(), theirs.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", grid.LAYOUTS)
def test_strided_scale_and_shift(backend, dtype, layout):
    random = Random(0, backend.to)
    x = random.feature_map((3, 10, 4, 5), dtype, layout)
    transposed, sliced = random.normal(10, 3, dtype=dtype).t(), random.normal(3, 21, dtype=dtype)[:, 1::2]
    for inputs in ((x, transposed, sliced), (x, sliced, random.normal(3, 1, dtype=dtype).expand(3, 10))):
        grid.check(backend.channel_fuse, reference.channel_fuse, inputs, x, NAMES)


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("dtype", grid.HALF)
@pytest.mark.parametrize("shape", [(2, 64, 7, 7), (2, 100, 32, 33)], ids=str)
def test_no_worse_than_eager_in_half(backend, dtype, layout, shape):
    inputs = inputs_of(Case(shape, dtype, layout), backend)
    grad = Random(1, backend.to).feature_map(shape, dtype, layout)
    truth = grid.exact(reference.channel_fuse, inputs, grad)
    ours, theirs = grid.run(backend.channel_fuse, inputs, grad), grid.run(eager.channel_fuse, inputs, grad)
    assert grid.error(ours.out, truth.out) <= 1.05 * grid.error(theirs.out, truth.out)
    for got, want, other in zip(ours.grads, truth.grads, theirs.grads, strict=True):
        assert grid.error(got, want) <= 1.05 * grid.error(other, want)


@pytest.mark.parametrize("fusion", grid.FUSIONS)
@pytest.mark.parametrize("shape", [(0, 8, 4, 5), (2, 8, 0, 5), (2, 8, 0)], ids=str)
def test_nothing_in_it(backend, shape, fusion):
    """No samples, or no positions: an empty result, and zero gradients of scale and shift."""
    inputs = inputs_of(Case(shape, fusion=fusion), backend)
    got = grid.run(backend.channel_fuse, inputs, inputs[0])
    assert got.out.shape == got.grads[0].shape == shape
    for tensor, gradient in zip(inputs[1:], got.grads[1:], strict=True):
        assert tensor is None or torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("dtype", grid.FLOATING)
def test_infinities_and_nan(backend, dtype, layout):
    """0 * inf is NaN, inf - inf is NaN, and every other element is as it was."""
    x, scale, shift = inputs_of(Case((2, 6, 4, 5), dtype, layout), backend)
    x, scale, shift = x.clone(), scale.clone(), shift.clone()
    x[0, 0, 1, 1] = math.inf
    x[0, 1, 3, 4] = math.nan
    x[1, 2, 0, 0] = -math.inf
    scale[0, 0] = 0
    scale[1, 3] = math.inf
    shift[1, 2] = math.inf if scale[1, 2] > 0 else -math.inf
    got, want = backend.channel_fuse(x, scale, shift), reference.channel_fuse(x, scale, shift)
    assert want.isnan().sum() == 3
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[want.isinf()], want[want.isinf()])
    finite = want.isfinite()
    assert torch.allclose(got[finite].double(), want[finite].double(), rtol=torch.finfo(dtype).eps, atol=1e-6)


# ---- the raw operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", grid.distinct(grid.combinations(), pooling="att"), ids=str)
def test_raw_backward(backend, case):
    """The backward operator gives what autograd gives, and nothing unasked."""
    ops = backend.ops
    inputs = inputs_of(case, backend)
    grad = Random(1, backend.to).feature_map(case.shape, case.dtype, case.layout)
    want = grid.run(backend.channel_fuse, inputs, grad)
    assert torch.equal(ops.channel_fuse(*inputs)[0], want.out)
    for needs in itertools.product([False, True], repeat=3):
        named = dict(zip(OPERATORS["channel_fuse_backward"].needs, needs, strict=False))
        got = ops.channel_fuse_backward(grad, *inputs, **named)
        assert got[3].shape == (0,)
        for need, ours, theirs in zip(needs, got[:3], want.grads, strict=True):
            if need and theirs is not None:
                assert torch.equal(ours, theirs)
            else:
                assert ours.shape == (0,)
