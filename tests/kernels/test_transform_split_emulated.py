"""The transform in stages that many blocks share (csrc/cuda/transform_split.cuh), emulated: right, with the same bits however
its work is dealt to blocks, and with no more loads of a weight than it has tiles of samples.

tests/native/cuda has its kernels by themselves, under sanitizers and without their barriers and waits.
"""

from __future__ import annotations

import itertools

import grid
import pytest
import reference
import schema
import torch
from grid import FLOATING, FUSIONS, GLOBAL_CONTEXT_INPUTS, LAYOUTS, POOLINGS, Case, Random
from torch import Tensor

import gcnet_ext
from gcnet_ext._tuning import CudaTuning, cuda_tuning
from gcnet_ext.ops._options import ACTIVATIONS

SPLIT = CudaTuning(engine="v2")
SCHEDULES = [(schedule, seed) for schedule in ("depth-first", "round-robin") for seed in (0, 2)]


pytestmark = pytest.mark.usefixtures("module")


def check(case: Case, **options) -> None:
    ours, truth = grid.flat(gcnet_ext.global_context, **options), grid.flat(reference.global_context, **options)
    grad = Random(1).feature_map(case.shape, case.dtype, case.layout)
    vanishing = (*case.vanishing, *(("mask_weight",) if "valid" in options else ()))
    with cuda_tuning(SPLIT):
        grid.check(ours, truth, case.inputs(), grad, GLOBAL_CONTEXT_INPUTS, vanishing=vanishing, sums=case.sums)


# ---- against float64 ---------------------------------------------------------------------------------------------------------


@pytest.mark.representative
@pytest.mark.parametrize("case", grid.combinations(), ids=str)
def test_block(case):
    check(case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 63, 65, 130, 520, 1030])
def test_channels(channels, layout):
    """Slices, and vectors of weights, that are not full; 9 samples are more than a block has."""
    for dtype, fusion in zip(FLOATING, ("both", *FUSIONS), strict=True):
        check(Case((9, channels, 3, 4), dtype, layout, fusion=fusion, hidden=5))


@pytest.mark.parametrize("hidden", [1, 31, 33, 130, 260])
@pytest.mark.parametrize("parameter_dtype", [None, torch.float32], ids=str)
def test_hidden_units(hidden, parameter_dtype):
    """260 of each branch are more than the stages have room for."""
    for dtype, pooling in zip(grid.HALF, POOLINGS, strict=True):
        check(Case((3, 70, 5, 5), dtype, pooling=pooling, hidden=hidden, parameter_dtype=parameter_dtype))


@pytest.mark.representative
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    for norm, gate in itertools.product((True, False), ("sigmoid", "hard_sigmoid")):
        missing = () if norm else tuple(f"{b}_norm_{p}" for b in ("scale", "shift") for p in ("weight", "bias"))
        case = Case((3, 70, 3, 3), hidden=9, missing=missing)
        check(case, activation=activation, slope=0.2, norm=norm, gate=gate)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_valid_and_residual(layout, pooling, fusion):
    shape = (3, 70, 6, 7)
    valid = grid.scattered(shape)
    residual = Random(4).feature_map(shape, torch.float32, layout)
    case = Case(shape, layout=layout, pooling=pooling, fusion=fusion)
    options = {"valid": valid, "residual": residual, "final_activation": "relu"}
    ours = grid.flat(gcnet_ext.global_context, **options)
    truth = grid.flat(reference.global_context, **{**options, "residual": residual.double()})
    vanishing = (*case.vanishing, "mask_weight")
    with cuda_tuning(SPLIT):
        grad = Random(1).feature_map(shape, case.dtype, layout)
        grid.check(ours, truth, case.inputs(), grad, GLOBAL_CONTEXT_INPUTS, vanishing=vanishing)


@pytest.mark.parametrize("layers", [(1, 1), (1, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_branches_of_one_layer(layers, pooling):
    """A w1 [C, C] without a w2, in one branch or in both."""
    channels = 70
    inputs = list(Case((3, channels, 5, 5), pooling=pooling, hidden=5).inputs())
    for branch, count in zip(("scale", "shift"), layers, strict=True):
        first = GLOBAL_CONTEXT_INPUTS.index(f"{branch}_w1")
        if count == 1:
            w1 = Random(5).normal(channels, channels, std=0.2)
            inputs[first : first + 6] = [w1, Random(6).normal(channels), None, None, None, None]
    grad = Random(1).normal(3, channels, 5, 5)
    with cuda_tuning(SPLIT):
        ours, truth = grid.flat(gcnet_ext.global_context), grid.flat(reference.global_context)
        grid.check(ours, truth, inputs, grad, GLOBAL_CONTEXT_INPUTS)


# ---- bits --------------------------------------------------------------------------------------------------------------------


def forward_and_backward(case: Case) -> list[Tensor]:
    inputs = case.inputs()
    outputs = schema.Flat("global_context")(*inputs)
    grad = Random(3).feature_map(case.shape, case.dtype, case.layout)
    needs = (True, case.pooling == "att", inputs[3] is not None, inputs[9] is not None)
    backward = schema.backward(grad, inputs, outputs[1:], needs)
    return [*outputs, *schema.Flat("global_context_backward")(**backward)]


CASES = [
    Case((9, 270, 3, 5), hidden=70, dtype=torch.float16),
    Case((5, 130, 4, 20), hidden=34, layout="channels_last"),
    Case((9, 70, 3, 5), hidden=3, pooling="avg", fusion="mul"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_neither_the_gpu_nor_the_schedule_changes_a_bit(monkeypatch, case):
    """On other numbers of multiprocessors, blocks have other samples and other rows."""
    with cuda_tuning(SPLIT):
        expected = forward_and_backward(case)
        for multiprocessors, (schedule, seed) in zip((1, 2, 7, 132), SCHEDULES, strict=True):
            monkeypatch.setenv("GCNET_EMULATION_MULTIPROCESSORS", str(multiprocessors))
            monkeypatch.setenv("GCNET_EMULATION_SCHEDULE", schedule)
            monkeypatch.setenv("GCNET_EMULATION_SEED", str(seed))
            for index, (one, other) in enumerate(zip(expected, forward_and_backward(case), strict=True)):
                assert torch.equal(one, other), f"output {index} on {multiprocessors}, {schedule}, seed {seed}"


@pytest.mark.parametrize("multiprocessors", [1, 40])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_sample_alone_equals_itself_in_a_batch(monkeypatch, case, multiprocessors):
    monkeypatch.setenv("GCNET_EMULATION_MULTIPROCESSORS", str(multiprocessors))
    x, *parameters = case.inputs()
    with cuda_tuning(SPLIT):
        together = schema.Flat("global_context")(x, *parameters)
        for sample in (0, case.shape[0] - 1):
            one = slice(sample, sample + 1)
            for found, expected in zip(schema.Flat("global_context")(x[one], *parameters), together, strict=True):
                assert torch.equal(found, expected[one])


# ---- bytes -------------------------------------------------------------------------------------------------------------------


def loads(module, tensor: Tensor) -> tuple[int, int]:
    return module.traffic(tensor.data_ptr(), tensor.numel() * tensor.element_size())["loads"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("samples", "multiprocessors", "tiles"), [(8, 1, 1), (9, 1, 2), (3, 132, 3)])
def test_a_weight_is_loaded_once_for_a_tile_of_samples(monkeypatch, module, layout, dtype, samples, multiprocessors, tiles):
    """Forward and backward; x and its gradient travel as often as with the transform of csrc/cuda/transform_batched.cuh."""
    monkeypatch.setenv("GCNET_EMULATION_MULTIPROCESSORS", str(multiprocessors))
    case = Case((samples, 144, 16, 16), dtype, layout, hidden=36)  # rows that csrc/cuda/flat_rows.cuh does not take
    inputs = case.inputs()
    x = inputs[0]
    weights = {name: inputs[GLOBAL_CONTEXT_INPUTS.index(name)] for name in ("scale_w1", "scale_w2", "shift_w1", "shift_w2")}
    grad = Random(3).feature_map(case.shape, dtype, layout)
    with cuda_tuning(SPLIT):
        module.count_accesses(True)
        try:
            outputs = schema.Flat("global_context")(*inputs)
            assert {name: loads(module, weight) for name, weight in weights.items()} == dict.fromkeys(weights, (tiles, tiles))
            assert loads(module, x) == (2, 2)
            module.count_accesses(True)
            backward = schema.backward(grad, inputs, outputs[1:], (True, True, True, True))
            schema.Flat("global_context_backward")(**backward)
            assert {name: loads(module, weight) for name, weight in weights.items()} == dict.fromkeys(weights, (tiles, tiles))
            assert (loads(module, x), loads(module, grad)) == ((2, 2), (2, 2))
        finally:
            module.count_accesses(False)
