"""The forward pass by items (csrc/cuda/items.cuh), emulated: the attention pool and the fusion of the second engine.

They are right, give the same bits however the items are dealt to blocks, and load and store every byte once.

tests/native/cuda has the kernels by themselves, under sanitizers and without their barriers and waits.
"""

from __future__ import annotations

import itertools
import math

import grid
import pytest
import reference
import schema
import torch
from grid import FLOATING, LAYOUTS, Case, Random
from torch import Tensor

import gcnet_ext
from gcnet_ext._tuning import CudaTuning, cuda_tuning
from gcnet_ext.ops import _relu_bits

ITEMS = CudaTuning(engine="v2")
FINAL = ("none", "relu")
SCHEDULES = [(schedule, seed) for schedule in ("depth-first", "round-robin") for seed in (0, 2)]
# Rows and positions of whole accesses of 16 bytes, and of fewer; several tiles and items; more channels than a block has lanes
SHAPES = [(3, 24, 8, 9), (2, 16, 7, 7), (1, 40, 14, 14), (2, 5, 13, 17), (1, 1032, 4, 5), (2, 264, 5, 8), (2, 8, 1, 1)]


pytestmark = pytest.mark.usefixtures("module")


def exact(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


# ---- against float64 ---------------------------------------------------------------------------------------------------------


@pytest.mark.representative
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pool(shape, dtype, layout):
    """With valid positions too, and a NaN at those that do not count."""
    x = Random(0).feature_map(shape, dtype, layout)
    weight, bias = Random(1).mask(shape[1], dtype)
    for valid in (None, grid.scattered(shape)):
        forgotten = x if valid is None else x.masked_fill(~valid.unsqueeze(1), math.nan)
        with cuda_tuning(ITEMS):
            found = gcnet_ext.attention_pool(forgotten, weight, bias, valid=valid)
        expected = reference.attention_pool(*exact([x, weight, bias]), valid=valid)
        grid.assert_close(found, expected, grid.accumulation(x), f"context, valid {valid is not None}")


@pytest.mark.representative
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fusion(shape, dtype, layout):
    """Rounded once, and in place the same; the bits of the ReLU are those of the result. A NaN is passed on."""
    x, residual = (Random(seed).feature_map(shape, dtype, layout) for seed in (0, 1))
    x[(0,) * x.dim()] = math.nan
    accumulation = grid.accumulation(x)
    for choice in itertools.product((False, True), repeat=3):
        scale, shift, added = (
            tensor if has else None
            for tensor, has in zip((*(Random(2).normal(2, *shape[:2], dtype=accumulation)), residual), choice, strict=True)
        )
        for final in FINAL:
            truth = reference.channel_fuse(*exact([x, scale, shift]), residual=exact([added])[0], final_activation=final)
            with cuda_tuning(ITEMS):
                out, positive = schema.Flat("channel_fuse")(x, scale, shift, added, int(final == "relu"))
                overwritten = x.clone(memory_format=torch.preserve_format)
                gcnet_ext.channel_fuse(overwritten, scale, shift, residual=added, final_activation=final, inplace=True)
            assert torch.equal(out.isnan(), truth.isnan())
            grid.assert_close(out.nan_to_num(), truth.nan_to_num(), accumulation, "out")
            assert torch.equal(out.nan_to_num(7), overwritten.nan_to_num(7))
            if final == "relu":
                assert torch.equal(_relu_bits.unpack(positive, x), ~(out <= 0))


@pytest.mark.representative
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_block(shape, dtype, layout):
    """Residual, final ReLU and valid positions, each with the others, for training, inference and in place."""
    case = Case(shape, dtype, layout, hidden=6)
    inputs = case.inputs()
    for has_residual, final, has_valid in itertools.product((False, True), FINAL, (False, True)):
        residual = Random(1).feature_map(shape, dtype, layout) if has_residual else None
        options = {"valid": grid.scattered(shape) if has_valid else None, "final_activation": final}
        ours = grid.flat(gcnet_ext.global_context, residual=residual, **options)
        truth = grid.flat(reference.global_context, residual=exact([residual])[0], **options)(*exact([*inputs]))
        overwritten = inputs[0].clone(memory_format=torch.preserve_format)
        with cuda_tuning(ITEMS):
            out = ours(inputs[0].clone(memory_format=torch.preserve_format).requires_grad_(), *inputs[1:]).detach()
            with torch.no_grad():
                inference = ours(*inputs)
                grid.flat(gcnet_ext.global_context, residual=residual, inplace=True, **options)(overwritten, *inputs[1:])
        grid.assert_close(out, truth, grid.accumulation(out), f"out {options}", sums=150)
        assert torch.equal(inference, out)
        assert torch.equal(overwritten, out)


@pytest.mark.parametrize("view", grid.VIEWS)
def test_views(view):
    """Maps that do not fit accesses of 16 bytes, or not as one piece of memory."""
    shape = (3, 16, 6, 8)
    x, residual = (Random(seed).feature_map(shape, torch.float32, view) for seed in (0, 1))
    scale, shift = Random(2).normal(2, *shape[:2])
    weight, bias = Random(1).mask(shape[1], x.dtype)
    with cuda_tuning(ITEMS):
        out = gcnet_ext.channel_fuse(x, scale, shift, residual=residual, final_activation="relu")
        context = gcnet_ext.attention_pool(x, weight, bias)
    truth = reference.channel_fuse(*exact([x, scale, shift]), residual=residual.double(), final_activation="relu")
    grid.assert_close(out, truth, torch.float32, "out")
    grid.assert_close(context, reference.attention_pool(*exact([x, weight, bias])), torch.float32, "context")


# ---- bits --------------------------------------------------------------------------------------------------------------------


def forward(x: Tensor, *parameters: Tensor | None) -> list[Tensor]:
    residual = Random(4).normal(1, *x.shape[1:], dtype=x.dtype).expand_as(x)
    valid = torch.ones(1, *x.shape[2:], dtype=torch.bool)
    valid.flatten()[3::7] = False
    more = {"residual": residual, "final_activation": 1}
    return [
        *schema.Flat("global_context")(x, *parameters, **more),
        *schema.Flat("global_context")(x, *parameters, **more, valid=valid),
    ]


CASES = [
    Case((3, 24, 7, 7), torch.float16),
    Case((2, 72, 8, 40)),
    Case((5, 136, 4, 20), torch.bfloat16, "channels_last"),
    Case((3, 40, 9, 30), layout="channels_last"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_neither_the_gpu_nor_the_schedule_changes_a_bit(monkeypatch, case):
    """On other numbers of multiprocessors, blocks have other items."""
    with cuda_tuning(ITEMS):
        expected = forward(*case.inputs())
        for multiprocessors, (schedule, seed) in zip((1, 2, 7, 132), SCHEDULES, strict=True):
            monkeypatch.setenv("GCNET_EMULATION_MULTIPROCESSORS", str(multiprocessors))
            monkeypatch.setenv("GCNET_EMULATION_SCHEDULE", schedule)
            monkeypatch.setenv("GCNET_EMULATION_SEED", str(seed))
            for index, (one, other) in enumerate(zip(expected, forward(*case.inputs()), strict=True)):
                assert torch.equal(one, other), f"output {index} on {multiprocessors}, {schedule}, seed {seed}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_sample_alone_equals_itself_in_a_batch(case):
    x, *parameters = case.inputs()
    with cuda_tuning(ITEMS):
        together = forward(x, *parameters)
        for sample in (0, case.shape[0] - 1):
            one = slice(sample, sample + 1)
            for found, expected in zip(forward(x[one], *parameters), together, strict=True):
                assert torch.equal(found, expected[one])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_fusion_has_the_bits_of_the_first_engine(dtype, layout):
    shape = (3, 24, 8, 17)
    x, residual = (Random(seed).feature_map(shape, dtype, layout) for seed in (0, 1))
    factors = Random(2).normal(2, *shape[:2], dtype=dtype)
    for added, final in itertools.product((None, residual), (0, 1)):
        results = []
        for engine in ("v1", "v2"):
            with cuda_tuning(CudaTuning(engine=engine)):
                results.append(schema.Flat("channel_fuse")(x, *factors, added, final))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


# ---- bytes -------------------------------------------------------------------------------------------------------------------


def traffic(module, tensor: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """The least and the most of the loads of any byte, and of its stores."""
    found = module.traffic(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    return found["loads"], found["stores"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_every_byte_travels_once(monkeypatch, module, layout, dtype, multiprocessors):
    """x once in the pool and once in the fusion, the residual once; the result and its bits are never read."""
    monkeypatch.setenv("GCNET_EMULATION_MULTIPROCESSORS", str(multiprocessors))
    case = Case((3, 72, 16, 18), dtype, layout)
    x, *parameters = case.inputs()
    residual = Random(1).feature_map(case.shape, dtype, layout)
    with cuda_tuning(ITEMS):
        module.count_accesses(True)
        try:
            gcnet_ext.attention_pool(x, *parameters[:2])
            assert traffic(module, x) == ((1, 1), (0, 0))
            module.count_accesses(True)
            out, *_, bits = schema.Flat("global_context")(x, *parameters, residual=residual, final_activation=1)
            assert traffic(module, x) == ((2, 2), (0, 0))
            assert traffic(module, residual) == ((1, 1), (0, 0))
            assert traffic(module, out) == traffic(module, bits) == ((0, 0), (1, 1))
        finally:
            module.count_accesses(False)
