"""What holds for any sizes, dtypes, strides and weights: properties that hypothesis tries to break."""

from __future__ import annotations

import grid
import pytest
import reference
import torch
from grid import Case, Random
from hypothesis import given, settings
from hypothesis import strategies as st
from registry import OPERATORS

import gcnet_ext

SPATIAL = st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple)
SEEDS = st.integers(0, 2**16)
BLOCK = grid.flat(gcnet_ext.global_context)


@st.composite
def cases(draw, dtypes=grid.FLOATING, layouts=tuple(grid.EVERY_LAYOUT)):
    dtype = draw(st.sampled_from(dtypes))
    return Case(
        (draw(st.integers(1, 4)), draw(st.integers(1, 70)), *draw(SPATIAL)),
        dtype,
        draw(st.sampled_from(layouts)),
        draw(st.sampled_from(grid.POOLINGS)),
        draw(st.sampled_from(grid.FUSIONS)),
        hidden=draw(st.integers(2, 20)),
        parameter_dtype=draw(st.sampled_from((None, torch.float32))),
    )


@given(case=cases(), seed=SEEDS)
def test_forward_equals_the_reference(backend, case, seed):
    inputs = case.inputs(backend.to, seed)
    want = grid.exact(grid.flat(reference.global_context), inputs).out
    # Few hidden units may lie close together, and the LayerNorm then magnifies rounding errors.
    grid.assert_close(grid.flat(backend.global_context)(*inputs), want, grid.accumulation(inputs[0]), sums=2000)


@given(case=cases(dtypes=(torch.float64,)), seed=SEEDS)
def test_gradients_equal_those_of_the_reference(backend, case, seed):
    case = case._replace(parameter_dtype=None)
    inputs = case.inputs(backend.to, seed)
    grad = Random(seed + 1, backend.to).feature_map(case.shape, case.dtype)
    got = grid.run(grid.flat(backend.global_context), inputs, grad)
    want = grid.exact(grid.flat(reference.global_context), inputs, grad)
    for ours, theirs in zip(got.grads, want.grads, strict=True):
        assert ours is None or torch.allclose(ours.cpu(), theirs, rtol=1e-7, atol=1e-7)


@given(case=cases(), seed=SEEDS)
def test_attention_is_a_distribution(backend, case, seed):
    """Not negative, of sum one; the context lies between the smallest and the largest value of each channel."""
    x, weight, bias = case._replace(pooling="att").inputs(backend.to, seed)[:3]
    attention = backend.attention_map(x, weight, bias).flatten(1)
    assert (attention >= 0).all()
    assert torch.allclose(attention.sum(1), torch.ones_like(attention[:, 0]), rtol=1e-5, atol=0)
    context = backend.attention_pool(x, weight, bias).double()
    positions = x.flatten(2).double()
    slack = 1e-5 + torch.finfo(x.dtype).eps * positions.abs().amax(2)
    assert (context <= positions.amax(2) + slack).all()
    assert (context >= positions.amin(2) - slack).all()


@given(case=cases(), seed=SEEDS)
def test_no_weight_is_a_weight_of_zero(backend, case, seed):
    """Attention that does not care is the average."""
    x = case.inputs(backend.to, seed)[0]
    average = backend.attention_pool(x).double()
    flat = backend.attention_pool(x, torch.zeros(x.shape[1], dtype=x.dtype, device=x.device)).double()
    assert torch.allclose(average, flat, rtol=2 * torch.finfo(x.dtype).eps, atol=1e-5)


@given(case=cases(), seed=SEEDS, shift=st.floats(-30, 30))
def test_bias_of_the_mask_changes_nothing(backend, case, seed, shift):
    x, weight, bias = case._replace(pooling="att").inputs(backend.to, seed)[:3]
    moved = backend.attention_map(x, weight, (bias.double() + shift).to(bias.dtype))
    assert torch.allclose(moved, backend.attention_map(x, weight), rtol=1e-4, atol=1e-6)


@given(case=cases(dtypes=(torch.float64,)), seed=SEEDS)
def test_order_of_positions_does_not_matter(backend, case, seed):
    """The block commutes with any permutation of the positions."""
    inputs = case.inputs(backend.to, seed)
    x = inputs[0].flatten(2)
    order = torch.randperm(x.shape[2], generator=torch.Generator().manual_seed(seed)).to(x.device)
    function = grid.flat(backend.global_context)
    permuted = function(x[:, :, order], *inputs[1:])
    assert torch.allclose(permuted, function(x, *inputs[1:])[:, :, order], rtol=1e-7, atol=1e-7)


@given(case=cases(), seed=SEEDS, other=st.integers(1, 3))
def test_batches_can_be_joined(backend, case, seed, other):
    """Every sample on its own: the bits of a joint batch are those of its parts, where all start at a multiple of 16 bytes."""
    inputs = case.inputs(backend.to, seed)
    more = Random(seed + 1, backend.to).feature_map((other, *case.shape[1:]), case.dtype)
    first = inputs[0].clone(memory_format=torch.contiguous_format)
    function = grid.flat(backend.global_context)
    joint = function(torch.cat([first, more]), *inputs[1:])
    apart = torch.cat([function(first, *inputs[1:]), function(more, *inputs[1:])])
    if backend.has_kernels:
        assert torch.equal(joint, apart)
    else:
        assert torch.allclose(joint.double(), apart.double(), rtol=1e-2, atol=1e-2)


@given(case=cases(), seed=SEEDS)
def test_channel_fuse_is_one_multiplication_and_one_addition(backend, case, seed):
    """Exact where nothing is rounded: by one, by zero, by a power of two."""
    x = case.inputs(backend.to, seed)[0]
    one = torch.ones(x.shape[:2], dtype=x.dtype, device=x.device)
    assert torch.equal(backend.channel_fuse(x, one), x)
    assert torch.equal(backend.channel_fuse(x, one, 0 * one), x)
    assert torch.equal(backend.channel_fuse(x, 0 * one, 3 * one), torch.full_like(x, 3))
    assert torch.equal(backend.channel_fuse(x, 2 * one), 2 * x)
    assert torch.equal(backend.channel_fuse(x, -one), -x)
    assert torch.equal(backend.channel_fuse(x, None, one), (x.to(grid.accumulation(x)) + 1).to(x.dtype))


@given(case=cases(), seed=SEEDS)
def test_memory_format_is_kept(backend, case, seed):
    inputs = case.inputs(backend.to, seed)
    x = inputs[0]
    out = grid.flat(backend.global_context)(*inputs)
    assert out.shape == x.shape
    if case.layout in grid.LAYOUTS:
        assert grid.memory_format_kept(out, x)
    assert sum((size - 1) * stride for size, stride in zip(out.shape, out.stride(), strict=True)) == out.numel() - 1, (
        "not dense"
    )


def tensors(shapes):
    """Small tensors of almost any shape, of the wrong dtype now and then."""
    dtypes = st.sampled_from([torch.float32] * 6 + [torch.float64, torch.bfloat16, torch.int64])
    return st.builds(lambda shape, dtype: torch.ones(shape, dtype=dtype), shapes, dtypes)


SIZES = st.sampled_from(
    [(2, 3), (3,), (1,), (2,), (1, 3), (2, 3, 1), (2, 3, 4), (0, 3, 4), (2, 3, 0), (3, 3), (2, 4), (2, 0), ()]
)


@pytest.mark.parametrize("op", [name for name, op in OPERATORS.items() if "scale_w1" not in op.arguments and not op.in_place])
def test_any_arguments_at_all(kernels, op):
    """Kernel and shape function agree: both refuse in the same words, or both give the same shapes. Nothing else happens."""
    schema = getattr(torch.ops.gcnet_ext, op).default._schema
    optional = {True: st.none() | tensors(SIZES), False: tensors(SIZES)}
    needs = st.lists(st.booleans(), min_size=1, max_size=5)
    of_types = {
        "Tensor": optional[False],
        "Optional[Tensor]": optional[True],
        "List[bool]": needs,
        "int": st.integers(-1, 3),
        "float": st.floats(0.1, 1),
    }
    arguments = st.tuples(*(of_types[str(argument.type)] for argument in schema.arguments))

    def outcome(arguments):
        try:
            results = getattr(torch.ops.gcnet_ext, op)(*arguments)
        except RuntimeError as error:
            return str(error)
        results = results if isinstance(results, tuple) else (results,)
        return [(tuple(result.shape), result.dtype) for result in results]

    @settings(max_examples=300)
    @given(arguments)
    def agree(arguments):
        on_meta = [argument.to("meta") if isinstance(argument, torch.Tensor) else argument for argument in arguments]
        found = outcome(arguments)
        assert found == outcome(on_meta)
        assert isinstance(found, list) or found.startswith(f"gcnet_ext::{op}: ")

    agree()
