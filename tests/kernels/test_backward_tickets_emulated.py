"""The backward pass in one ticketed launch (csrc/cuda/global_context_backward_tickets.cuh), emulated: right, with the bits of
the launches of the second engine, and with the maps read once by each of two stages.

tests/native/cuda/backward_tickets.cpp has more grids and shapes, under sanitizers and without its barriers and waits.
"""

from __future__ import annotations

import grid
import pytest
import reference
import schema
import torch
from grid import FLOATING, FUSIONS, GLOBAL_CONTEXT_INPUTS, HALF, Case, Random
from ticket_runs import ITEMS, RUNS, TICKETS, assert_same_bits
from torch import Tensor

import gcnet_ext
from gcnet_ext._tuning import CudaTuning, cuda_tuning

ONCE, TWICE = (1, 1), (2, 2)
pytestmark = pytest.mark.usefixtures("module")


class Call:
    """A backward pass from what a forward pass of the second engine has saved."""

    def __init__(self, case: Case, *, needs: tuple[bool, ...] = (True, True, True, True), need_residual=False, **options):
        inputs = case.inputs()
        self.x = inputs[0]
        self.grad = Random(1).feature_map(case.shape, case.dtype, case.layout)
        with cuda_tuning(ITEMS):
            saved = schema.Flat("global_context")(*inputs, **options)[1:]
        self.arguments = {**schema.backward(self.grad, inputs, saved, needs), **options, "need_residual": need_residual}

    def __call__(self) -> list[Tensor]:
        return list(schema.Flat("global_context_backward")(**self.arguments))

    def launches(self, module, tuning: CudaTuning) -> int:
        before = module.launches()
        with cuda_tuning(tuning):
            self()
        return module.launches() - before


# ---- against float64 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATING[1:], ids=str)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradients(dtype, fusion):
    case = Case((2, 72, 16, 18), dtype, fusion=fusion)
    ours, truth = grid.flat(gcnet_ext.global_context), grid.flat(reference.global_context)
    grad = Random(1).feature_map(case.shape, case.dtype, case.layout)
    with cuda_tuning(TICKETS):
        grid.check(ours, truth, case.inputs(), grad, GLOBAL_CONTEXT_INPUTS, vanishing=case.vanishing, sums=case.sums)


# ---- bits --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATING[1:], ids=str)
@pytest.mark.parametrize("shape", [(5, 40, 16, 17), (2, 264, 16, 16), (2, 392, 18, 16)], ids=str)
def test_every_tile(monkeypatch, module, dtype, shape):
    call = Call(Case(shape, dtype))
    assert call.launches(module, TICKETS) == 1
    assert_same_bits(monkeypatch, call)


@pytest.mark.parametrize(
    ("dtype", "shape"), zip(FLOATING[1:], [(2, 520, 16, 16), (1, 1024, 16, 17), (2, 776, 16, 18)], strict=True)
)
def test_clusters(monkeypatch, module, dtype, shape):
    call = Call(Case(shape, dtype))
    assert call.launches(module, TICKETS) == 1
    assert call.launches(module, CudaTuning(engine="tickets", cluster=1)) == call.launches(module, ITEMS) > 2
    assert_same_bits(monkeypatch, call, RUNS[:2])


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize("need_residual", [False, True])
def test_options(monkeypatch, module, fusion, valid, need_residual):
    case = Case((3, 72, 16, 18), HALF[0], fusion=fusion)
    options = {"valid": grid.scattered(case.shape)} if valid else {}
    call = Call(case, need_residual=need_residual, final_activation=1, **options)
    assert call.launches(module, TICKETS) == 1
    assert_same_bits(monkeypatch, call, RUNS[1:3])


def test_each_gradient_alone(monkeypatch, module):
    case = Case((3, 72, 16, 18))
    for need in range(2):
        call = Call(case, needs=tuple(i == need for i in range(4)))
        assert call.launches(module, TICKETS) == 1
        assert_same_bits(monkeypatch, call, RUNS[1:2])


# ---- what takes no tickets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        Case((2, 72, 16, 18), torch.float64),
        Case((2, 72, 16, 18), layout="channels_last"),
        Case((2, 72, 7, 7)),
        Case((2, 72, 16, 18), pooling="avg"),
        Case((1, 1104, 16, 16)),
        Case((1, 8, 100, 96)),
    ],
    ids=str,
)
def test_other_maps_take_the_launches_of_the_second_engine(monkeypatch, module, case):
    call = Call(case, needs=(True, case.pooling == "att", True, True))
    assert call.launches(module, TICKETS) == call.launches(module, ITEMS) > 2
    assert_same_bits(monkeypatch, call, RUNS[1:2])


# ---- bytes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dtype"), [((3, 136, 16, 18), torch.float32), ((2, 520, 16, 16), torch.bfloat16)], ids=str)
@pytest.mark.parametrize("hints", [0, 1])
@pytest.mark.parametrize("need_residual", [False, True])
def test_each_map_is_read_twice_and_dx_is_written_once(monkeypatch, module, shape, dtype, hints, need_residual):
    monkeypatch.setenv("GCNET_EMULATION_MULTIPROCESSORS", "2")
    call = Call(Case(shape, dtype), final_activation=1, need_residual=need_residual)

    def traffic(map: Tensor) -> dict[str, tuple[int, int]]:
        return module.traffic(map.data_ptr(), map.numel() * map.element_size())

    module.count_accesses(True)
    try:
        with cuda_tuning(CudaTuning(engine="tickets", hints=hints)):
            results = call()
        assert traffic(call.x)["loads"] == traffic(call.grad)["loads"] == TWICE
        stored = [traffic(map) for map in results if map.shape == call.x.shape]
    finally:
        module.count_accesses(False)
    assert stored == [{"loads": (0, 0), "stores": ONCE}] * (1 + need_residual)
