"""Which positions count in the pool: padding is skipped, forward and backward, by attention and by average pooling."""

from __future__ import annotations

import itertools

import grid
import pytest
import reference
import torch
from grid import Case, Random
from small_blocks import BLOCKS, randomised
from torch import Tensor

import gcnet_ext

SHAPES = ((3, 20, 7, 7), (2, 64, 49), (2, 300, 5, 6), (2, 5, 1, 1), (2, 3, 2, 3, 5), (1, 9, 33, 70))
KINDS = ("padded", "scattered", "one for all", "none in a sample", "all", "strided")


def valid_of(kind: str, shape: tuple[int, ...], random: Random) -> Tensor:
    """bool, [N or 1, *spatial]."""
    samples, spatial = shape[0], shape[2:]
    scattered = random.normal(samples, *spatial) > 0.3
    scattered.flatten(1)[:, 0] = True
    if kind == "padded":
        valid = torch.zeros_like(scattered)
        for sample in range(samples):
            box = tuple(slice(max(1, size - sample - size // 4)) for size in spatial)
            valid[sample][box] = True
        return valid
    if kind == "one for all":
        return scattered[:1]
    if kind == "none in a sample":
        scattered[-1] = False
    if kind == "all":
        return torch.ones_like(scattered)
    if kind == "strided":
        return torch.stack([scattered, ~scattered], -1)[..., 0]
    return scattered


def flat(valid: Tensor | None):
    return lambda module: grid.flat(module.global_context, valid=valid)


@pytest.mark.representative
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block(backend, shape, layout, kind):
    """Against float64, in every dtype, pooling and fusion in turn."""
    turns = itertools.cycle(itertools.product(grid.POOLINGS, grid.FUSIONS))
    for dtype in grid.FLOATING:
        for _ in range(2):
            pooling, fusion = next(turns)
            case = Case(shape, dtype, layout, pooling, fusion)
            inputs = case.inputs(backend.to)
            valid = valid_of(kind, shape, Random(1, backend.to))
            grad = Random(2, backend.to).feature_map(shape, dtype, layout)
            truth = flat(valid.cpu())(reference)
            vanishing = (*case.vanishing, "mask_weight")
            grid.check(
                flat(valid)(backend), truth, inputs, grad, grid.GLOBAL_CONTEXT_INPUTS, vanishing=vanishing, sums=case.sums
            )


@pytest.mark.representative
@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("pooling", grid.POOLINGS)
@pytest.mark.parametrize("shape", [(3, 20, 7, 7), (2, 300, 5, 6), (2, 520, 40, 33), (1, 9, 33, 70)], ids=str)
def test_nothing_comes_from_a_position_that_does_not_count(backend, shape, pooling, layout):
    """Not even a NaN or an infinity: neither to the context, nor to the map, nor to the weight, nor to other positions."""
    random = Random(0, backend.to)
    x = random.feature_map(shape, torch.float32, layout)
    weight, bias = random.mask(shape[1], torch.float32) if pooling == "att" else (None, None)
    for kind in ("padded", "scattered", "none in a sample"):
        valid = valid_of(kind, shape, random)
        others = ~valid.unsqueeze(1).expand(shape)
        results = []
        for value in (0.0, torch.nan, torch.inf):
            filled = x.clone(memory_format=torch.preserve_format).masked_fill_(others, value).requires_grad_()
            leaf = None if weight is None else weight.clone().requires_grad_()
            context = backend.attention_pool(filled, leaf, bias, valid=valid)
            given = [tensor for tensor in (filled, leaf) if tensor is not None]
            grads = torch.autograd.grad(context, given, torch.ones_like(context))
            assert not bool(grads[0][others].any())
            found = [context.detach(), *grads]
            if weight is not None:
                attention = backend.attention_map(filled.detach(), weight, bias, valid=valid)
                assert not bool(attention[~valid].any())
                sums = attention.flatten(1).sum(1)
                assert torch.allclose(sums, valid.flatten(1).any(1).to(sums.dtype), atol=1e-5)
                found.append(attention)
            results.append(found)
        for again in results[1:]:
            assert all(map(torch.equal, again, results[0]))
        if kind == "none in a sample":
            assert not bool(results[0][0][-1].any())


@pytest.mark.parametrize("pooling", grid.POOLINGS)
def test_the_fusion_applies_to_every_position(backend, pooling):
    """A NaN where a position does not count stays where it is."""
    case = Case((2, 10, 7, 7), pooling=pooling)
    x, *weights = case.inputs(backend.to)
    valid = valid_of("padded", case.shape, Random(1, backend.to))
    others = ~valid.unsqueeze(1).expand(case.shape)
    want = flat(valid)(backend)(x, *weights)
    found = flat(valid)(backend)(x.masked_fill(others, torch.nan), *weights)
    assert torch.equal(found.isnan(), others)
    assert torch.equal(found[~others], want[~others])


def test_padding_does_not_matter(backend):
    """A sample gets what it gets without padding, however much of it there is: up to roundings, as work is cut by P."""
    for pooling, layout in itertools.product(grid.POOLINGS, grid.LAYOUTS):
        case = Case((1, 12, 9, 10), layout=layout, pooling=pooling)
        alone, *weights = case.inputs(backend.to)
        want = grid.flat(backend.global_context)(alone, *weights)
        for rows, columns in ((9, 11), (9, 40), (30, 10), (17, 23)):
            padded = backend.to(torch.full((1, 12, rows, columns), 3.0))
            padded[:, :, :9, :10] = alone
            valid = backend.to(torch.zeros(1, rows, columns, dtype=torch.bool))
            valid[:, :9, :10] = True
            found = flat(valid)(backend)(padded, *weights)[:, :, :9, :10]
            grid.assert_close(found, want.double().cpu(), torch.float32)


def test_all_valid_is_the_same_in_bits(cpu, kernels):
    for pooling, layout in itertools.product(grid.POOLINGS, grid.LAYOUTS):
        case = Case((2, 40, 31, 17), layout=layout, pooling=pooling)
        inputs, grad = case.inputs(), Random(1).feature_map(case.shape, torch.float32, layout)
        want = grid.run(grid.flat(gcnet_ext.global_context), inputs, grad)
        found = grid.run(flat(torch.ones(1, 31, 17, dtype=torch.bool))(gcnet_ext), inputs, grad)
        assert torch.equal(found.out, want.out)
        assert all(ours is None or torch.equal(ours, theirs) for ours, theirs in zip(found.grads, want.grads, strict=True))


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 96, 31, 33), (5, 8, 300, 100)], ids=str)
def test_bits_do_not_depend_on_threads_or_batch(cpu, kernels, threads, shape, layout):
    for pooling in grid.POOLINGS:
        case = Case(shape, torch.float32, layout, pooling)
        x, *weights = case.inputs()
        grad = Random(1).feature_map(case.shape, torch.float32, layout)
        valid = valid_of("scattered", shape, Random(2))

        def run(n: slice, x=x, weights=weights, grad=grad, valid=valid):
            return grid.run(lambda x: flat(valid[n])(gcnet_ext)(x, *weights), [x[n]], grad[n])

        threads(1)
        want = run(slice(None))
        for count in (2, 3, 7):
            threads(count)
            found = run(slice(None))
            assert torch.equal(found.out, want.out)
            assert torch.equal(found.grads[0], want.grads[0])
        found = run(slice(2, 3))
        assert torch.equal(found.out, want.out[2:3])
        assert torch.equal(found.grads[0], want.grads[0][2:3])


@pytest.mark.parametrize("kind", ["padded", "scattered", "none in a sample"])
def test_gradcheck(backend, kind):
    """First and second derivatives, of a sample without a position that counts, too."""
    for pooling in grid.POOLINGS:
        case = Case((2, 3, 2, 3), torch.float64, pooling=pooling, hidden=2)
        valid = valid_of(kind, case.shape, Random(1, backend.to))
        leaves = [None if t is None else t.requires_grad_() for t in case.inputs(backend.to)]
        given = [leaf for leaf in leaves if leaf is not None]

        def call(*given, leaves=leaves, valid=valid):
            each = iter(given)
            return flat(valid)(backend)(*(None if leaf is None else next(each) for leaf in leaves))

        assert torch.autograd.gradcheck(call, given)
        assert torch.autograd.gradgradcheck(call, given)


@pytest.mark.parametrize("called", [False, True], ids=["fused", "called"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, called):
    """The unpadded sample's result, also where a layer is called because it has a hook."""
    block = randomised(BLOCKS[name]()).double()
    if called:
        for child in block.children():
            child.register_forward_hook(lambda *_: None)
    alone = Random(0).feature_map((1, 16, 10), torch.float64)
    padded = torch.cat([alone, torch.full((1, 16, 30), torch.nan, dtype=torch.float64)], 2)
    valid = torch.arange(40)[None] < 10
    for _ in range(3):
        assert torch.allclose(block(padded, valid=valid)[..., :10], block(alone))
    if hasattr(block, "attention_map"):
        attention = block.attention_map(padded, valid)
        assert torch.allclose(attention[:, :10], block.attention_map(alone))
        assert not bool(attention[:, 10:].any())


@pytest.mark.parametrize("called", [False, True], ids=["fused", "called"])
def test_bad_valid_of_a_block(called):
    block = BLOCKS["gc"]()
    if called:
        block.conv_mask.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"valid must have shape \[2, 4, 5\] or \[1, 4, 5\], got \[2, 20\]"):
        block(torch.randn(2, 16, 4, 5), valid=torch.ones(2, 20, dtype=torch.bool))
