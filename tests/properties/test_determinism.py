"""The same bits at any number of threads, run after run, in any batch and from any Python thread; and torch.set_num_threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grid
import pytest
import torch
from grid import Case
from registry import OPS

pytestmark = pytest.mark.usefixtures("kernels")

# Few samples with many positions, many channels with few, sizes that no tile divides, and more than one group of samples
SHAPES = ((1, 64, 50, 67), (2, 100, 32, 33), (3, 2048, 7, 7), (5, 7, 13, 11), (1, 256, 3), (2, 33, 12001), (7, 512, 28, 27))


def cases() -> list[Case]:
    """Every shape in both layouts and in float32, and in another dtype in turn."""
    half = (torch.bfloat16, torch.float64, torch.float16)
    return [
        Case(shape, dtype, layout, fusion=grid.FUSIONS[index % 3])
        for index, shape in enumerate(SHAPES)
        for layout in grid.LAYOUTS
        for dtype in (torch.float32, half[index % 3])
    ]


def ops(case: Case):
    """Each op's differentiable function with its inputs and a gradient: of the case, and with all that the op can take."""
    for op in OPS.values():
        for each in grid.distinct((case, case._replace(fusion="both")), **op.fixed):
            yield op.ours, op.inputs_of(each), op.gradient_of(each)


def assert_same_bits(got: grid.Result, want: grid.Result) -> None:
    assert torch.equal(got.out, want.out)
    for index, (ours, theirs) in enumerate(zip(got.grads, want.grads, strict=True)):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs), f"gradient of input {index}"


@pytest.mark.parametrize("case", cases(), ids=str)
def test_number_of_threads_and_runs(case, threads):
    for function, inputs, grad in ops(case):
        threads(1)
        want = grid.run(function, inputs, grad)
        for number in (1, 2, 3, 5):
            threads(number)
            assert_same_bits(grid.run(function, inputs, grad), want)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_alone_or_in_a_batch(case):
    """Output and grad_x of a sample are those it has alone, whether it lies in the batch or in memory of its own."""
    case = case._replace(shape=(5, *case.shape[1:]))
    for function, inputs, grad in ops(case):
        batch = grid.run(function, inputs, grad)
        for sample in (0, 3, 4):
            one = slice(sample, sample + 1)
            for copied in (False, True):
                # What is [N, ...] besides x is the scale and the shift of channel_fuse.
                alone = [t[one] if t is not None and t.dim() > 1 and t.shape[0] == 5 else t for t in inputs]
                alone[0] = alone[0].clone() if copied else alone[0]
                got = grid.run(function, alone, grad[one])
                assert torch.equal(got.out, batch.out[one])
                assert torch.equal(got.grads[0], batch.grads[0][one])


def test_layout_views_are_the_same_numbers():
    """A strided view is made contiguous, or is channels_last and read as such: the bits are those of a dense copy."""
    for view in grid.VIEWS:
        for function, inputs, grad in ops(Case((2, 20, 5, 9), layout=view)):
            x = inputs[0]
            dense = torch.empty_like(x, memory_format=torch.contiguous_format)
            if "channels_last" in view and "every_other_channel" not in view:
                dense = dense.to(memory_format=torch.channels_last)
            dense.copy_(x)
            got, want = grid.run(function, inputs, grad), grid.run(function, (dense, *inputs[1:]), grad)
            assert_same_bits(got, want)


def test_from_many_python_threads():
    """Calls do not share scratch memory."""
    calls = [call for case in cases()[:8] for call in ops(case)]
    want = [grid.run(*call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            got = list(pool.map(lambda call: grid.run(*call), calls))
            for ours, theirs in zip(got, want, strict=True):
                assert_same_bits(ours, theirs)


THREADS = """
import os, torch, gcnet_ext
from gcnet_ext import _load
from schema import Flat, backward
def count(): return len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
x = torch.randn(4, 64, 64, 64)
inputs = (x, torch.randn(64), torch.randn(1), torch.randn(4, 64), None, None, None, torch.randn(64, 4), None, *[None] * 6)
before = count()
torch.set_num_threads({number})
out, *saved = Flat("global_context")(*inputs)
Flat("global_context_backward")(**backward(x, inputs, saved, (True,) * 4))
context, attention = Flat("attention_pool")(*inputs[:3])
Flat("attention_pool_backward")(context, x, *inputs[1:3], None, context, attention, True, True, True)
Flat("channel_fuse")(x, context, None)
Flat("channel_fuse_backward")(x, x, context, None, need_x=True, need_scale=True, need_shift=False)
print(count() - before)
"""


@pytest.mark.parametrize("number", [1, 2, 4])
def test_set_num_threads_is_obeyed(python, number):
    """OpenMP's threads stay once they are started, so their number tells how many the kernels asked for at most."""
    assert int(python(THREADS.format(number=number)).stdout) == number - 1
