"""Feature maps that are cut out of larger ones along any dimension, and torch's memory formats: numbers and output format."""

from __future__ import annotations

import itertools

import grid
import pytest
import reference
import schema
import torch
from grid import GLOBAL_CONTEXT_INPUTS, Case, Random

SHAPES = ((3, 6, 11), (3, 6, 5, 7), (2, 6, 3, 5, 4))
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
CROPS = [
    (shape, layout, dim) for shape, layout in itertools.product(SHAPES, grid.LAYOUTS) for dim in range(len(shape))
]  # fmt: skip


def cropped(random: Random, shape: tuple[int, ...], layout: str, dim: int) -> torch.Tensor:
    """The middle of a map that is by two longer along one dimension, with NaN on both sides of it."""
    larger = random.feature_map(tuple(size + 2 * (i == dim) for i, size in enumerate(shape)), torch.float32, layout)
    for outside in (0, -1):
        larger.select(dim, outside).fill_(torch.nan)
    return larger.narrow(dim, 1, shape[dim])


def check_block(backend, x: torch.Tensor, grad: torch.Tensor, pooling: str = "att") -> grid.Result:
    """Returns the output and the gradients, after a comparison with the float64 reference."""
    case = Case(tuple(x.shape), pooling=pooling)
    inputs = (x, *case.inputs(backend.to)[1:])
    functions = grid.flat(backend.global_context), grid.flat(reference.global_context)
    return grid.check(*functions, inputs, grad, GLOBAL_CONTEXT_INPUTS)


def check_fuse(backend, x: torch.Tensor, grad: torch.Tensor) -> grid.Result:
    scale, shift = (Random(seed, backend.to).normal(*x.shape[:2]) for seed in (4, 5))
    return grid.check(backend.channel_fuse, reference.channel_fuse, (x, scale, shift), grad, ("x", "scale", "shift"))


@pytest.mark.parametrize(("shape", "layout", "dim"), CROPS, ids=str)
def test_cropped_along_every_dimension(backend, shape, layout, dim):
    """x and, in another turn, its gradient; both poolings, and the fusion alone."""
    x, whole = cropped(Random(1, backend.to), shape, layout, dim), Random(2, backend.to).feature_map(shape, torch.float32)
    got = [check_block(backend, x, whole), check_block(backend, x, whole, "avg"), check_fuse(backend, x, whole)]
    for result in got:
        assert grid.memory_format_kept(result.out, x)
        assert not backend.has_kernels or grid.memory_format_kept(result.grads[0], x)
    check_block(backend, whole, x)
    check_fuse(backend, whole, x)


@pytest.mark.parametrize(("shape", "layout", "dim"), CROPS, ids=str)
def test_overwritten_where_it_was_cut_out(backend, shape, layout, dim):
    """In place: the same bits as out of place, and what lies around x is as it was."""
    x = cropped(Random(1, backend.to), shape, layout, dim)
    inputs = Case(shape).inputs(backend.to)[1:]
    outside = x._base.isnan()
    want = grid.flat(backend.global_context)(x, *inputs)
    grid.flat(backend.global_context, inplace=True)(x, *inputs)
    assert torch.equal(x, want)
    assert torch.equal(x._base.isnan(), outside)


@pytest.mark.parametrize("shape", [(2, 1, 3, 4), (2, 5, 1, 1), (1, 1, 1, 1), (2, 1, 5)], ids=str)
def test_formats_of_one_channel_or_one_position(backend, kernels, shape):
    """Whether such a map is channels_last nobody can tell; the operators and their shape functions say the same."""
    dense = Random(1, backend.to).feature_map(shape, torch.float32)
    one_behind_the_other = dense.movedim(1, -1).contiguous().movedim(-1, 1)
    apart = Random(2, backend.to).normal(60).as_strided(shape, (30, 1, *(7, 1)[: len(shape) - 2]))
    for x in (dense, one_behind_the_other, apart):
        meta = torch.empty_strided(shape, x.stride(), device="meta")
        ours = backend.channel_fuse(x, torch.ones(shape[:2], device=x.device))
        theirs = schema.Flat("channel_fuse")(meta, torch.ones(shape[:2], device="meta"), None)[0]
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("dims", FORMATS)
@pytest.mark.parametrize("op", ["global_context", "channel_fuse"])
def test_memory_formats_of_torch(backend, op, dims):
    """channels_last, of images and of video: read as it is, and the output and the gradient of x are like it."""
    shape, memory_format = SHAPES[dims - 3], FORMATS[dims]
    check = check_block if op == "global_context" else check_fuse
    x, grad = (Random(seed, backend.to).feature_map(shape, torch.float32) for seed in (1, 2))
    plain = check(backend, x, grad)
    got = check(backend, x.contiguous(memory_format=memory_format), grad.contiguous(memory_format=memory_format))
    for of, is_so in ((plain, False), (got, True)):
        for tensor in (of.out, of.grads[0]) if backend.has_kernels else (of.out,):
            assert tensor.is_contiguous(memory_format=memory_format) == is_so
            assert tensor.is_contiguous() != is_so
