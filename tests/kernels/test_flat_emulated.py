"""The stages for short or odd rows (csrc/cuda/flat_rows.cuh), emulated: right, with the same bits however the pieces of
a map are dealt to blocks and wherever it begins, and with no more loads and stores than they must have.

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
from grid import FUSIONS, GLOBAL_CONTEXT_INPUTS, POOLINGS, Case, Random
from torch import Tensor

import gcnet_ext
from gcnet_ext import _load
from gcnet_ext._tuning import CudaTuning, cuda_tuning

ENGINE = CudaTuning(engine="v2")
NARROW = (torch.float32, torch.bfloat16, torch.float16)
SCHEDULES = [(schedule, seed) for schedule in ("depth-first", "round-robin") for seed in (0, 2)]
SHAPES = ((3, 1, 7, 7), (2, 3, 1, 7), (3, 300, 7, 7), (3, 301, 5, 10), (2, 640, 14, 14), (3, 70, 15, 17), (1, 40, 25, 42))


pytestmark = pytest.mark.usefixtures("module")


def is_flat(case: Case) -> bool:
    size = case.dtype.itemsize
    plan = _load.compiled.plan("cuda", case.shape[1], math.prod(case.shape[2:]), size, tuning=ENGINE.numbers())
    return plan["path"] == "flat"


# ---- against float64 ---------------------------------------------------------------------------------------------------------


@pytest.mark.representative
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block(shape, dtype):
    for pooling, fusion in zip(POOLINGS, ("both", FUSIONS[len(shape) % 2]), strict=True):
        case = Case(shape, dtype, pooling=pooling, fusion=fusion)
        assert is_flat(case)
        grad = Random(1).feature_map(shape, dtype)
        with cuda_tuning(ENGINE):
            ours, truth = grid.flat(gcnet_ext.global_context), grid.flat(reference.global_context)
            grid.check(ours, truth, case.inputs(), grad, GLOBAL_CONTEXT_INPUTS, vanishing=case.vanishing, sums=case.sums)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(
    "layout", ["contiguous", "unaligned", "every_other_sample", "channel_slice", "every_other_channel", "cropped"]
)
def test_attention_pool(layout, dtype):
    """Samples that begin anywhere and, of the last three layouts, some that the stages leave to others."""
    random = Random(0)
    for shape in ((3, 300, 7, 7), (3, 65, 5, 10)):
        x = random.feature_map(shape, dtype, layout)
        inputs = (x, *random.mask(shape[1], dtype))
        with cuda_tuning(ENGINE):
            grad = random.normal(*shape[:2], dtype=dtype)
            grid.check(
                gcnet_ext.attention_pool, reference.attention_pool, inputs, grad, ("x", "weight", "bias"), vanishing=["bias"]
            )


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_valid_and_residual(dtype, pooling, fusion):
    shape = (3, 300, 6, 7)
    valid, residual = grid.scattered(shape), Random(4).feature_map(shape, dtype)
    case = Case(shape, dtype, pooling=pooling, fusion=fusion)
    options = {"valid": valid, "residual": residual, "final_activation": "relu"}
    ours = grid.flat(gcnet_ext.global_context, **options)
    truth = grid.flat(reference.global_context, **{**options, "residual": residual.double()})
    grad = Random(1).feature_map(shape, dtype)
    if dtype != torch.float32:  # where the ReLU cuts, two roundings differ by a whole gradient
        ours, truth = (grid.flat(f, valid=valid) for f in (gcnet_ext.global_context, reference.global_context))
    with cuda_tuning(ENGINE):
        vanishing = (*case.vanishing, "mask_weight")
        grid.check(ours, truth, case.inputs(), grad, GLOBAL_CONTEXT_INPUTS, vanishing=vanishing)


def test_positions_that_do_not_count_are_left_out():
    """Not even a NaN or an infinity there reaches anything."""
    shape = (3, 300, 7, 7)
    random = Random(0)
    x, (weight, bias), valid = random.feature_map(shape, torch.float16), random.mask(300, torch.float16), grid.scattered(shape)
    forward, backward = schema.Flat("attention_pool"), schema.Flat("attention_pool_backward")
    grad = random.normal(3, 300)
    results = []
    for other in (0.0, math.nan, math.inf):
        x = torch.where(valid[:, None], x, torch.tensor(other, dtype=x.dtype))
        with cuda_tuning(ENGINE):
            context, attention = forward(x, weight, bias, valid=valid)
            gradients = backward(grad, x, weight, bias, valid, context, attention, True, True, True)
        results.append((context, attention, *gradients))
    for one, other in itertools.combinations(results, 2):
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(one, other, strict=True))


# ---- bits --------------------------------------------------------------------------------------------------------------------


def forward_and_backward(case: Case, x: Tensor | None = None, needs: tuple[bool, ...] = (True,) * 4) -> list[Tensor]:
    inputs = case.inputs()
    inputs = (inputs[0] if x is None else x, *inputs[1:])
    outputs = schema.Flat("global_context")(*inputs)
    grad = Random(3).feature_map(case.shape, case.dtype)
    wanted = (needs[0], needs[1] and case.pooling == "att", *needs[2:])
    backward = schema.backward(grad, inputs, outputs[1:], wanted)
    return [*outputs, *schema.Flat("global_context_backward")(**backward)]


CASES = [Case((5, 301, 7, 7), torch.float16), Case((4, 80, 14, 14), torch.bfloat16), Case((5, 700, 5, 5), pooling="avg")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_neither_the_gpu_nor_the_schedule_changes_a_bit(monkeypatch, case):
    with cuda_tuning(ENGINE):
        expected = forward_and_backward(case)
        for multiprocessors, (schedule, seed) in zip((1, 2, 7, 132), SCHEDULES, strict=True):
            monkeypatch.setenv("GCNET_EMULATION_MULTIPROCESSORS", str(multiprocessors))
            monkeypatch.setenv("GCNET_EMULATION_SCHEDULE", schedule)
            monkeypatch.setenv("GCNET_EMULATION_SEED", str(seed))
            for index, (one, other) in enumerate(zip(expected, forward_and_backward(case), strict=True)):
                assert torch.equal(one, other), f"output {index} on {multiprocessors}, {schedule}, seed {seed}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_neither_the_address_nor_the_batch_changes_a_bit(case):
    """Samples of odd sizes begin where 16-byte accesses cannot."""
    x, *parameters = case.inputs()
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x).copy_(x)
    with cuda_tuning(ENGINE):
        together = forward_and_backward(case)
        for one, other in zip(together, forward_and_backward(case, shifted), strict=True):
            assert torch.equal(one, other)
        for sample in range(case.shape[0]):
            one = slice(sample, sample + 1)
            alone = schema.Flat("global_context")(x[one].clone(), *parameters)
            assert all(torch.equal(a, b[one]) for a, b in zip(alone, together, strict=False))


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_needs(case):
    """A gradient is the same, bit for bit, whichever others are wanted."""
    with cuda_tuning(ENGINE):
        every = forward_and_backward(case)
        for needs in itertools.product((True, False), repeat=2):
            found = forward_and_backward(case, needs=(*needs, True, False))
            for one, other in zip(found, every, strict=True):
                assert torch.equal(one, other) or one.numel() == 0


# ---- bytes -------------------------------------------------------------------------------------------------------------------


class Traffic:
    """Counts, while it is entered, how often each byte of a tensor is loaded and stored."""

    def __init__(self, module) -> None:
        self.module = module

    def __enter__(self):
        self.module.count_accesses(True)
        return self

    def __exit__(self, *_):
        self.module.count_accesses(False)

    def of(self, tensor: Tensor, what: str) -> int:
        least, most = self.module.traffic(tensor.data_ptr(), tensor.numel() * tensor.element_size())[what]
        assert least == most, f"{what}: {least} to {most}"
        return least


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("shape", [(3, 300, 7, 7), (3, 301, 7, 7), (2, 640, 14, 14)], ids=str)
def test_bytes(monkeypatch, module, shape, multiprocessors, dtype):
    """Once for every stage that needs it, whether samples allow 16-byte accesses or not."""
    monkeypatch.setenv("GCNET_EMULATION_MULTIPROCESSORS", str(multiprocessors))
    x = Random(0).feature_map(shape, dtype)
    weight, bias = Random(1).mask(shape[1], dtype)
    grad_context = Random(2).normal(*shape[:2])
    backward = schema.Flat("attention_pool_backward")
    with cuda_tuning(ENGINE):
        with Traffic(module) as traffic:
            context, attention = schema.Flat("attention_pool")(x, weight, bias)
            assert traffic.of(x, "loads") == 2  # for the logits; for the context
        with Traffic(module) as traffic:
            schema.Flat("attention_pool")(x, None, None)
            assert traffic.of(x, "loads") == 1
        for need_x, need_weight in ((True, True), (True, False), (False, True)):
            with Traffic(module) as traffic:
                grad_x, *_ = backward(grad_context, x, weight, bias, None, context, attention, need_x, need_weight, False)
                assert traffic.of(x, "loads") == 1 + need_weight  # for u; for dw
                if need_x:
                    assert (traffic.of(grad_x, "loads"), traffic.of(grad_x, "stores")) == (0, 1)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_bytes_of_the_block(module, fusion):
    case = Case((3, 300, 7, 7), torch.float16, fusion=fusion)
    inputs = case.inputs()
    x, grad = inputs[0], Random(3).feature_map(case.shape, case.dtype)
    scales = fusion != "add"
    needs = (True, True, inputs[3] is not None, inputs[9] is not None)
    with cuda_tuning(ENGINE):
        with Traffic(module) as traffic:
            outputs = schema.Flat("global_context")(*inputs)
            assert (traffic.of(x, "loads"), traffic.of(outputs[0], "stores")) == (3, 1)  # and for the fusion
        with Traffic(module) as traffic:
            grad_x, *_ = schema.Flat("global_context_backward")(**schema.backward(grad, inputs, outputs[1:], needs))
            assert (traffic.of(x, "loads"), traffic.of(grad, "loads")) == (2 + scales, 2)  # sums of g, and of g x for a scale
            assert traffic.of(grad_x, "stores") == 1
