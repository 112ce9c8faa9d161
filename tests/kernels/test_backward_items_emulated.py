"""The sums over positions and the backward pass of attention pooling by items (csrc/cuda/items.cuh), emulated: right, with the
same bits however the items are dealt to blocks, and with one reading of every map.

tests/native/cuda has the kernels by themselves, under sanitizers and without their barriers and waits.
"""

from __future__ import annotations

import itertools

import grid
import pytest
import reference
import schema
import torch
from entry import no_bits
from grid import FLOATING, FUSIONS, GLOBAL_CONTEXT_INPUTS, HALF, LAYOUTS, POOLINGS, Case, Random
from torch import Tensor

import gcnet_ext
from gcnet_ext._tuning import CudaTuning, cuda_tuning

ITEMS = CudaTuning(engine="v2")
SCHEDULES = [(schedule, seed) for schedule in ("depth-first", "round-robin") for seed in (0, 2)]
ONCE = (1, 1)


pytestmark = pytest.mark.usefixtures("module")


def check(case: Case, *, valid: bool = False, residual: bool = False, relu: bool = False) -> None:
    options = {"final_activation": "relu"} if relu else {}
    exact = dict(options)
    if valid:
        options["valid"] = exact["valid"] = grid.scattered(case.shape)
    if residual:
        options["residual"] = Random(4).feature_map(case.shape, case.dtype, case.layout)
        exact["residual"] = options["residual"].double()
    ours, truth = grid.flat(gcnet_ext.global_context, **options), grid.flat(reference.global_context, **exact)
    grad = Random(1).feature_map(case.shape, case.dtype, case.layout)
    vanishing = (*case.vanishing, *(("mask_weight",) if valid else ()))
    with cuda_tuning(ITEMS):
        grid.check(ours, truth, case.inputs(), grad, GLOBAL_CONTEXT_INPUTS, vanishing=vanishing, sums=case.sums)


# ---- against float64 ---------------------------------------------------------------------------------------------------------


@pytest.mark.representative
@pytest.mark.parametrize("case", [case._replace(shape=(2, 16, 18, 16)) for case in grid.combinations()], ids=str)
def test_block(case):
    check(case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(3, 72, 17, 16), (2, 264, 16, 17), (1, 520, 16, 16), (1, 1024, 16, 16), (1, 1104, 2, 12)], ids=str
)
def test_shapes(shape, layout):
    """Each tile of the backward pass, full and not, and the first size that has none in NCHW."""
    for dtype, fusion in zip(FLOATING[1:], FUSIONS, strict=True):
        check(Case(shape, dtype, layout, fusion=fusion))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_splits_of_the_sums(layout, pooling, fusion):
    """A few channels of many positions: several blocks share the rows."""
    check(Case((2, 8, 100, 96), layout=layout, pooling=pooling, fusion=fusion))


@pytest.mark.representative
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATING[1:], ids=str)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_valid_residual_and_relu(dtype, layout, pooling):
    """The halves' ReLU is in test_the_bits_mask_the_gradient: a rounded output may have another sign than the exact one."""
    case = Case((3, 72, 16, 18), dtype, layout, pooling=pooling)
    check(case, valid=True)
    check(case, residual=True)
    if dtype == torch.float32:
        for valid, residual in itertools.product((False, True), repeat=2):
            check(case, valid=valid, residual=residual, relu=True)


def backward_of(case: Case, wanted: tuple[bool, ...], grad: Tensor, **options) -> list[Tensor]:
    inputs = case.inputs()
    outputs = schema.Flat("global_context")(*inputs, **options)
    arguments = {**schema.backward(grad, inputs, outputs[1:], wanted[:4]), **options}
    relu = "final_activation" in options
    return list(schema.Flat("global_context_backward")(**{**arguments, "need_residual": relu and wanted[4]}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATING[1:], ids=str)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_bits_mask_the_gradient(dtype, layout, pooling):
    """As if a gradient that is 0 where the ReLU has cut came from outside; a NaN there is not passed on."""
    case = Case((2, 72, 16, 18), dtype, layout, pooling=pooling)
    grad = Random(1).feature_map(case.shape, dtype, layout)
    with cuda_tuning(ITEMS):
        out, *saved = schema.Flat("global_context")(*case.inputs(), final_activation=1)
        masked = torch.where(out > 0, grad, torch.zeros_like(grad))
        grad[out <= 0] = torch.nan
        wanted = (True, pooling == "att", True, True, True)
        ours = backward_of(case, wanted, grad, final_activation=1)
        arguments = schema.backward(masked, case.inputs(), [*saved[:-1], no_bits(grad)], wanted[:4])
        for got, want in zip(ours[:-1], schema.Flat("global_context_backward")(**arguments)[:-1], strict=True):
            assert torch.equal(got, want)
        assert torch.equal(ours[-1], masked)


@pytest.mark.parametrize("shape", [(2, 72, 16, 18), (2, 72, 6, 8)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("relu", [False, True])
def test_each_gradient_alone(shape, layout, relu):
    """It has the same bits as when all are computed; what is not needed is not there."""
    case = Case(shape, torch.float16, layout)
    grad = Random(1).feature_map(case.shape, case.dtype, layout)
    options = {"final_activation": 1} if relu else {}
    with cuda_tuning(ITEMS):
        every = backward_of(case, (True,) * 5, grad, **options)
        for need in range(4 + relu):
            wanted = tuple(i == need for i in range(5))
            found = backward_of(case, wanted, grad, **options)
            assert any(tensor.numel() for tensor in found)
            for one, of_all in zip(found, every, strict=True):
                assert one.numel() == 0 or torch.equal(one, of_all)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_pool_alone(dtype, layout, pooling):
    """Without a gradient of the fusion and without a scale; x is NaN where it does not count."""
    shape = (3, 72, 16, 18)
    x = Random(0).feature_map(shape, dtype, layout)
    valid = grid.scattered(shape)
    weight = Random(1).mask(shape[1], dtype) if pooling == "att" else (None, None)
    clean = x.clone()
    x.movedim(1, -1)[~valid] = torch.nan
    clean.movedim(1, -1)[~valid] = 0
    grad = Random(2).normal(*shape[:2], dtype=dtype)

    def gradients(function, x, *weight, **options):
        leaves = [tensor.detach().requires_grad_() for tensor in (x, *weight) if tensor is not None]
        context = function(*leaves, **options)
        context = context[0] if isinstance(context, tuple) else context
        return context.detach(), torch.autograd.grad(context, leaves, grad.to(context.dtype), allow_unused=True)

    with cuda_tuning(ITEMS):
        context, found = gradients(gcnet_ext.attention_pool, x, *weight, valid=valid)
    doubles = [tensor.double() for tensor in (clean, *weight) if tensor is not None]
    truth, expected = gradients(reference.attention_pool, *doubles, valid=valid)
    grid.assert_close(context, truth.flatten(1), torch.float32, "context")
    grid.assert_close(found[0], expected[0], torch.float32, "gradient of x", sums=150)


# ---- bits --------------------------------------------------------------------------------------------------------------------


def forward_and_backward(case: Case, **options) -> list[Tensor]:
    inputs = case.inputs()
    outputs = schema.Flat("global_context")(*inputs, **options)
    grad = Random(3).feature_map(case.shape, case.dtype, case.layout)
    return [*outputs, *backward_of(case, (True, case.pooling == "att", True, True, True), grad, **options)]


CASES = [
    Case((5, 72, 16, 17), dtype=torch.float16),
    Case((3, 264, 16, 16)),
    Case((5, 72, 5, 16), dtype=torch.bfloat16, layout="channels_last"),
    Case((3, 264, 8, 9), layout="channels_last", fusion="both"),
    Case((2, 8, 100, 96), pooling="avg"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_neither_the_gpu_nor_the_schedule_changes_a_bit(monkeypatch, case):
    with cuda_tuning(ITEMS):
        expected = forward_and_backward(case, final_activation=1)
        for multiprocessors, (schedule, seed) in zip((1, 2, 7, 132), SCHEDULES, strict=True):
            monkeypatch.setenv("GCNET_EMULATION_MULTIPROCESSORS", str(multiprocessors))
            monkeypatch.setenv("GCNET_EMULATION_SCHEDULE", schedule)
            monkeypatch.setenv("GCNET_EMULATION_SEED", str(seed))
            found = forward_and_backward(case, final_activation=1)
            for index, (one, other) in enumerate(zip(expected, found, strict=True)):
                assert torch.equal(one, other), f"output {index} on {multiprocessors}, {schedule}, seed {seed}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gradient_of_a_sample_alone_equals_that_in_a_batch(monkeypatch, case):
    monkeypatch.setenv("GCNET_EMULATION_MULTIPROCESSORS", "2")
    inputs = case.inputs()
    grad = Random(3).feature_map(case.shape, case.dtype, case.layout)
    needs = (True, False, False, False)
    with cuda_tuning(ITEMS):
        saved = schema.Flat("global_context")(*inputs)[1:]
        together = schema.Flat("global_context_backward")(**schema.backward(grad, inputs, saved, needs))[0]
        for sample in (0, case.shape[0] - 1):
            one = slice(sample, sample + 1)
            of_one = (inputs[0][one], *inputs[1:])
            saved = schema.Flat("global_context")(*of_one)[1:]
            alone = schema.Flat("global_context_backward")(**schema.backward(grad[one], of_one, saved, needs))[0]
            assert torch.equal(alone, together[one])


# ---- bytes -------------------------------------------------------------------------------------------------------------------


def counted(module, call, **maps: Tensor) -> dict[str, tuple[int, int]]:
    """How often every byte of a map is loaded, and of the results that are maps, stored."""
    module.count_accesses(True)
    try:
        results = call()
        traffic = {name: module.traffic(map.data_ptr(), map.numel() * map.element_size()) for name, map in maps.items()}
        stored = [module.traffic(map.data_ptr(), map.numel() * map.element_size()) for map in results]
    finally:
        module.count_accesses(False)
    shape = next(iter(maps.values())).shape
    of_maps = [access["stores"] for access, map in zip(stored, results, strict=True) if map.shape == shape]
    return {**{name: access["loads"] for name, access in traffic.items()}, "stores": of_maps}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_every_map_is_read_once_by_each_stage(monkeypatch, module, layout, dtype, multiprocessors):
    """The sums read g and x, dx reads both and is written once; the bits of a ReLU need no launch that reads and writes g."""
    monkeypatch.setenv("GCNET_EMULATION_MULTIPROCESSORS", str(multiprocessors))
    case = Case((3, 136, 18, 16), dtype, layout)
    inputs = case.inputs()
    grad = Random(3).feature_map(case.shape, dtype, layout)
    backward = schema.Flat("global_context_backward")
    needs = (True, True, True, True)
    with cuda_tuning(ITEMS):
        saved = schema.Flat("global_context")(*inputs)[1:]
        arguments = schema.backward(grad, inputs, saved, needs)
        found = counted(module, lambda: backward(**arguments), grad=grad, x=inputs[0])
        assert found == {"grad": (2, 2), "x": (2, 2), "stores": [ONCE]}
        saved = schema.Flat("global_context")(*inputs, final_activation=1)[1:]
        arguments = {**schema.backward(grad, inputs, saved, needs), "final_activation": 1}
        found = counted(module, lambda: backward(**arguments), grad=grad, x=inputs[0])
        assert found == {"grad": (2, 2), "x": (2, 2), "stores": [ONCE]}
        arguments["need_residual"] = True  # dx reads what the sums have masked and written
        found = counted(module, lambda: backward(**arguments), grad=grad, x=inputs[0])
        assert found == {"grad": ONCE, "x": (2, 2), "stores": [ONCE, ONCE]}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_average_reads_x_once(module, layout):
    """Where not all positions count, too: the others are masked."""
    shape = (2, 136, 18, 16)
    x = Random(0).feature_map(shape, torch.float32, layout)
    with cuda_tuning(ITEMS):
        for valid in (None, grid.scattered(shape)):
            found = counted(module, lambda valid=valid: schema.Flat("attention_pool")(x, None, None, valid), x=x)
            assert found["x"] == ONCE
