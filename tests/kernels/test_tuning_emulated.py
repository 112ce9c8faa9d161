"""Decisions in the place of the CUDA plan functions, in the emulated kernels: each computes the same, and is followed."""

from __future__ import annotations

import threading

import grid
import pytest
import reference
import torch
from grid import Case, Random

import gcnet_ext
from gcnet_ext import _tuning
from gcnet_ext._tuning import CudaTuning, cuda_tuning

DECISIONS = [
    CudaTuning(streamed=True),
    CudaTuning(larger_tile=1),
    CudaTuning(larger_tile=4),
    CudaTuning(splits=1),
    CudaTuning(splits=2, row_lanes=1),
    CudaTuning(row_lanes=256),
    CudaTuning(transform=1),
    CudaTuning(transform=2),
    CudaTuning(engine="v2"),
    CudaTuning(engine="v2", splits=3, row_lanes=64),
]


pytestmark = pytest.mark.usefixtures("module")


def memory(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("tuning", DECISIONS, ids=str)
@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("pooling", grid.POOLINGS)
def test_every_decision_computes_the_block(tuning, layout, pooling):
    case = Case((2, 24, 9, 16), layout=layout, pooling=pooling)
    ours, truth = grid.flat(gcnet_ext.global_context), grid.flat(reference.global_context)
    grad, names = Random(3).normal(*case.shape), grid.GLOBAL_CONTEXT_INPUTS
    with cuda_tuning(tuning):
        grid.check(ours, truth, case.inputs(), grad, names, vanishing=case.vanishing)


def loads_of_pool(module, x: torch.Tensor) -> tuple[int, int]:
    weight, bias = Random(1).mask(x.shape[1], torch.float32)
    module.count_accesses(True)
    try:
        gcnet_ext.attention_pool(x, weight, bias)
        return module.traffic(*memory(x))["loads"]
    finally:
        module.count_accesses(False)


def test_the_kernels_follow_the_thread_that_calls_them(module):
    """The streamed pool reads x twice."""
    x = Random(0).normal(1, 16, 8, 8)
    found = []
    with cuda_tuning(CudaTuning(streamed=True)):
        other = threading.Thread(target=lambda: found.append(loads_of_pool(module, x)))
        other.start()
        other.join()
        assert loads_of_pool(module, x) == (2, 2)
        with cuda_tuning(CudaTuning()):
            assert loads_of_pool(module, x) == (1, 1)
        assert loads_of_pool(module, x) == (2, 2)
    assert found == [(1, 1)]
    assert loads_of_pool(module, x) == (1, 1)
    with pytest.raises(KeyError), cuda_tuning(CudaTuning(streamed=True)):
        raise KeyError
    assert loads_of_pool(module, x) == (1, 1)


def backward_loads(module, out: torch.Tensor, x: torch.Tensor) -> tuple[int, int]:
    module.count_accesses(True)
    try:
        torch.autograd.grad(out, x, torch.ones_like(out))
        return module.traffic(*memory(x))["loads"]
    finally:
        module.count_accesses(False)


def calls(x: torch.Tensor) -> dict[str, torch.Tensor]:
    weight, bias = Random(1).mask(x.shape[1], torch.float32)
    branch = gcnet_ext.Branch(*Random(2).branch(x.shape[1], 4, torch.float32))
    return {
        "attention_pool": gcnet_ext.attention_pool(x, weight, bias),
        "global_context": gcnet_ext.global_context(x, weight, bias, shift=branch),
    }


def test_backward_follows_the_decisions_of_its_forward_pass(module):
    x = Random(0).normal(1, 16, 8, 8).requires_grad_()
    with cuda_tuning(CudaTuning(streamed=True)):
        streamed = calls(x)
    plain = calls(x)
    for name, out in streamed.items():
        assert backward_loads(module, out, x) == (2, 2), name
    with cuda_tuning(CudaTuning(streamed=True)):
        for name, out in plain.items():
            assert backward_loads(module, out, x) == (1, 1), name
    assert _tuning.decided() == CudaTuning()
