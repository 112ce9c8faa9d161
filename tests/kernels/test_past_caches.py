"""Outputs of large maps are written past the caches (docs/memory.md): the same results, with every capability."""

from __future__ import annotations

import grid
import pytest
import torch
from grid import Case, Random

import gcnet_ext
from gcnet_ext import _load

pytestmark = pytest.mark.usefixtures("kernels")

# Rows whose starts and ends lie anywhere in a line of memory, and rows of whole lines.
SCRIPT = """
import itertools
import torch
import gcnet_ext
from gcnet_ext import GlobalContextBlock, _load
from grid import Random

SHAPES = {torch.float32: [(5, 33, 173, 193), (5, 32, 192, 192)], torch.bfloat16: [(9, 67, 173, 101), (9, 64, 160, 128)],
          torch.float16: [(9, 67, 173, 101)], torch.float64: [(3, 33, 173, 193)]}

def one_by_one(call, x, *others):
    parts = [call(*(tensor[n : n + 1] for tensor in (x, *others))) for n in range(len(x))]
    return [torch.cat(outputs) for outputs in zip(*parts)]

def block(x, grad):
    x = x.detach().requires_grad_()
    out = module(x)
    out.backward(grad)
    return out.detach(), x.grad

def fuse(x, grad, scale, shift):
    x = x.detach().requires_grad_()
    out = gcnet_ext.channel_fuse(x, scale, shift)
    out.backward(grad)
    return out.detach(), x.grad

def copy(x, grad):
    return fuse(x, grad, None, None)

def pool(x, grad_context):
    x = x.detach().requires_grad_()
    context = gcnet_ext.attention_pool(x, mask)
    context.backward(grad_context)
    return context.detach(), x.grad

for dtype, layout in itertools.product(SHAPES, (torch.contiguous_format, torch.channels_last)):
    for shape in SHAPES[dtype]:
        random = Random(0)
        x, grad = (random.normal(*shape, dtype=dtype).contiguous(memory_format=layout) for _ in range(2))
        samples, channels = shape[:2]
        past = _load.compiled.past_caches
        assert past(2 * x.nbytes) and not past(3 * x[0].nbytes), shape
        torch.manual_seed(0)
        module = GlobalContextBlock(channels, 1 / 8, fusion_types=("channel_mul", "channel_add")).to(dtype)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        scale, shift, grad_context = (random.normal(samples, channels, dtype=dtype) for _ in range(3))
        mask = random.normal(channels, dtype=dtype)
        for call, inputs in ((block, (x, grad)), (fuse, (x, grad, scale, shift)), (copy, (x, grad)), (pool, (x, grad_context))):
            whole, parts = call(*inputs), one_by_one(call, *inputs)
            for got, want, name in zip(whole, parts, ("out", "grad_x")):
                assert got.stride() == want.stride() or got.dim() == 2, (call.__name__, shape, layout)
                assert torch.equal(got, want), (call.__name__, name, dtype, shape, layout)
print("as one by one")
"""


def test_as_one_sample_at_a_time(python, capability):
    """Bit by bit what comes of the samples one by one, which are too small for it."""
    assert python(SCRIPT, GCNET_EXT_CPU_CAPABILITY=capability).stdout == "as one by one\n"


@pytest.mark.parametrize("layout", grid.LAYOUTS)
def test_to_rounding(layout):
    """In rows whose starts and ends lie anywhere in a line; whatever the compiler makes of a*b + c*d where a row ends."""
    case = Case((5, 33, 173, 193), layout=layout)
    inputs, grad = case.inputs(), Random(1).feature_map(case.shape, case.dtype, layout)
    assert _load.compiled.past_caches(2 * grad.nbytes)
    whole = grid.run(grid.flat(gcnet_ext.global_context), inputs, grad)
    for n in range(5):
        alone = grid.run(grid.flat(gcnet_ext.global_context), (inputs[0][n : n + 1], *inputs[1:]), grad[n : n + 1])
        for got, want in ((whole.out, alone.out), (whole.grads[0], alone.grads[0])):
            assert torch.allclose(got[n : n + 1], want, rtol=1e-6, atol=1e-6)


def test_only_where_the_caches_would_not_hold_it():
    past_caches = _load.compiled.past_caches
    assert not past_caches(2 * 8 * 512 * 28 * 28 * 4)
    assert past_caches(3 * 8 * 512 * 28 * 28 * 4)
    assert past_caches(2 * 8 * 256 * 56 * 56 * 4)
