"""The forward pass in one ticketed launch (csrc/cuda/global_context_tickets.cuh), emulated: right, with the bits of the
launches of the second engine, and with the map read once by each of two stages.

tests/native/cuda/forward_tickets.cpp has more grids and shapes, under sanitizers and without its barriers and waits.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial

import grid
import pytest
import reference
import schema
import torch
from grid import FLOATING, FUSIONS, HALF, Case, Random
from ticket_runs import RUNS, TICKETS, assert_same_bits
from torch import Tensor

from gcnet_ext._tuning import CudaTuning, cuda_tuning
from gcnet_ext.ops import _relu_bits

pytestmark = pytest.mark.usefixtures("module")


def exact(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


def options_of(case: Case, *, residual: bool, relu: bool, valid: bool) -> dict:
    return {
        "residual": Random(4).feature_map(case.shape, case.dtype, case.layout) if residual else None,
        "final_activation": int(relu),
        "valid": grid.scattered(case.shape) if valid else None,
    }


Inputs = Sequence[Tensor | None]


def forward(inputs: Inputs, **options) -> list[Tensor]:
    """Of training, of inference and in place."""
    overwritten = inputs[0].clone(memory_format=torch.preserve_format)
    results = list(schema.Flat("global_context")(*inputs, **options))
    results.append(schema.Flat("global_context_inference")(*inputs, **options))
    schema.Flat("global_context_")(overwritten, *inputs[1:], **options)
    return [*results, overwritten]


def launches(module, inputs: Inputs, tuning: CudaTuning, **options) -> int:
    before = module.launches()
    with cuda_tuning(tuning):
        schema.Flat("global_context_inference")(*inputs, **options)
    return module.launches() - before


# ---- against float64 ---------------------------------------------------------------------------------------------------------


@pytest.mark.representative
@pytest.mark.parametrize("dtype", FLOATING[1:], ids=str)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_block(dtype, fusion):
    """Training, inference and in place, with the bits of the final ReLU."""
    case = Case((3, 72, 16, 18), dtype, fusion=fusion)
    options = options_of(case, residual=True, relu=True, valid=False)
    named = {"residual": options["residual"].double(), "final_activation": "relu"}
    truth = grid.flat(reference.global_context, **named)(*exact(case.inputs()))
    with cuda_tuning(TICKETS):
        out, *_, positive, inference, overwritten = forward(case.inputs(), **options)
    grid.assert_close(out, truth, grid.accumulation(out), "out", sums=150)
    assert torch.equal(inference, out)
    assert torch.equal(overwritten, out)
    assert torch.equal(_relu_bits.unpack(positive, out), ~(out <= 0))


# ---- bits --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATING[1:], ids=str)
@pytest.mark.parametrize("shape", [(5, 40, 16, 17), (3, 72, 4, 100), (2, 264, 16, 17)], ids=str)
def test_every_tile(monkeypatch, module, dtype, shape):
    """Samples of one piece and of several, splits of one tile and of several."""
    inputs = Case(shape, dtype).inputs()
    assert launches(module, inputs, TICKETS) == 1
    assert_same_bits(monkeypatch, partial(forward, inputs))


@pytest.mark.parametrize(
    ("dtype", "shape"), zip(FLOATING[1:], [(2, 520, 16, 16), (1, 1024, 16, 17), (2, 776, 16, 18)], strict=True), ids=str
)
def test_clusters(monkeypatch, module, dtype, shape):
    inputs = Case(shape, dtype, hidden=33).inputs()
    assert launches(module, inputs, TICKETS) == 1
    assert_same_bits(monkeypatch, partial(forward, inputs), RUNS[1:])


@pytest.mark.parametrize(
    ("residual", "relu", "valid"), [choice for choice in itertools.product((False, True), repeat=3) if any(choice)]
)
def test_residual_relu_and_valid(monkeypatch, module, residual, relu, valid):
    """With rows of whole bytes of bits, and not. What a position that counts is worth comes from a launch of its own."""
    for case in (Case((3, 40, 16, 18), HALF[0]), Case((2, 24, 4, 65))):
        options = options_of(case, residual=residual, relu=relu, valid=valid)
        assert launches(module, case.inputs(), TICKETS, **options) == 1 + valid
        assert_same_bits(monkeypatch, partial(forward, case.inputs(), **options), RUNS[1:3])


def test_several_tiles_of_a_split(monkeypatch):
    inputs = Case((2, 24, 40, 50)).inputs()
    with cuda_tuning(CudaTuning(engine="v2", splits=3)):
        expected = forward(inputs)
    for multiprocessors in (1, 3):
        monkeypatch.setenv("GCNET_EMULATION_MULTIPROCESSORS", str(multiprocessors))
        with cuda_tuning(CudaTuning(engine="tickets", splits=3)):
            assert all(map(torch.equal, forward(inputs), expected))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("hard", [False, True])
def test_the_second_layer_or_none(monkeypatch, module, fusion, hard):
    """A w1 [C, C] without a w2 leaves its hidden units as outputs. Activation 3 is GELU."""
    case = Case((3, 40, 16, 18), fusion=fusion)
    options = {"hard_gate": [0.2, 0.4] if hard else None}
    assert_same_bits(monkeypatch, partial(forward, case.inputs(), activation=3, **options), RUNS[1:3])
    x, *parameters = case.inputs()
    for first in (2, 8):
        if parameters[first] is not None:
            parameters[first : first + 6] = [Random(5).normal(40, 40), Random(6).normal(40), None, None, None, None]
    inputs = (x, *parameters)
    assert launches(module, inputs, TICKETS, **options) == 1
    assert_same_bits(monkeypatch, partial(forward, inputs, **options), RUNS[1:3])


# ---- bytes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 72, 16, 18), (1, 520, 16, 16)], ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_every_byte_travels_once_in_each_stage(monkeypatch, module, shape, multiprocessors):
    """x in the pool and in the fusion, the residual in the fusion; the result and its bits are never read."""
    monkeypatch.setenv("GCNET_EMULATION_MULTIPROCESSORS", str(multiprocessors))
    case = Case(shape)
    x, *parameters = case.inputs()
    residual = Random(1).feature_map(case.shape, case.dtype, case.layout)

    def traffic(tensor: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        found = module.traffic(tensor.data_ptr(), tensor.numel() * tensor.element_size())
        return found["loads"], found["stores"]

    with cuda_tuning(TICKETS):
        module.count_accesses(True)
        try:
            out, *_, bits = schema.Flat("global_context")(x, *parameters, residual=residual, final_activation=1)
            assert traffic(x) == ((2, 2), (0, 0))
            assert traffic(residual) == ((1, 1), (0, 0))
            assert traffic(out) == traffic(bits) == ((0, 0), (1, 1))
        finally:
            module.count_accesses(False)


# ---- what does not fit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "tuning"),
    [
        (Case((2, 40, 7, 7)), TICKETS),  # short rows
        (Case((2, 40, 16, 17), HALF[0]), CudaTuning(engine="tickets", streamed=True)),
        (Case((2, 40, 16, 17), torch.float64), TICKETS),
        (Case((2, 40, 16, 17), layout="channels_last"), TICKETS),
        (Case((2, 40, 16, 17), pooling="avg"), TICKETS),
        (Case((2, 40, 15, 19)), TICKETS),  # odd rows
        (Case((1, 2056, 2, 8)), TICKETS),  # too many channels
        (Case((2, 40, 16, 17), hidden=520), TICKETS),  # too many hidden units
        (Case((1, 520, 16, 16)), CudaTuning(engine="tickets", cluster=1)),
    ],
    ids=str,
)
def test_what_does_not_fit_takes_the_launches_of_the_second_engine(module, case, tuning):
    of_launches, inputs = dataclasses.replace(tuning, engine="v2", cluster=0), case.inputs()
    assert launches(module, inputs, tuning) == launches(module, inputs, of_launches) > 1
    with cuda_tuning(of_launches):
        expected = forward(inputs)
    with cuda_tuning(tuning):
        assert all(map(torch.equal, forward(inputs), expected))
