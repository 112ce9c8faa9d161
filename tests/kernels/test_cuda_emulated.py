"""The CUDA operators in emulation: what the tests that are parametrised with the backend cuda-emulated do not see.

How often each byte of the big tensors travels, and that neither the order in which threads and blocks run nor the batch that a
sample is in changes a bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import emulated
import pytest
import schema
import torch
from grid import FUSIONS, GLOBAL_CONTEXT_INPUTS, LAYOUTS, POOLINGS, Case, Random
from torch import Tensor

SIZES = ((2, 16, 6, 8), (3, 20, 7, 7), (1, 300, 4, 6))
ONCE, TWICE, NEVER = (1, 1), (2, 2), (0, 0)
SCHEDULES = [(schedule, seed) for schedule in ("depth-first", "round-robin") for seed in (0, 1, 2)]


pytestmark = pytest.mark.usefixtures("module")


def memory(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes of a dense tensor."""
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()


def traffic(module, call: Callable[[], Tensor | tuple[Tensor, ...]], **inputs: Tensor) -> dict[str, tuple[int, int]]:
    """Loads of the inputs and stores of the first output: the least and the most of any of their bytes."""
    module.count_accesses(True)
    try:
        result = call()
        out = result if isinstance(result, Tensor) else result[0]
        found = {name: module.traffic(*memory(tensor)) for name, tensor in inputs.items()}
        written = module.traffic(*memory(out))
    finally:
        module.count_accesses(False)
    assert all(access["stores"] == NEVER for access in found.values())
    assert written["loads"] == NEVER
    return {**{name: access["loads"] for name, access in found.items()}, "out": written["stores"]}


def maps(size: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    random = Random(0)
    return random.feature_map(size, dtype, layout), random.feature_map(size, dtype, layout)


def global_context(inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return schema.Flat("global_context")(*inputs)


def global_context_backward(grad: Tensor, inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    _x, mask_weight, _mask_bias, *branches = inputs
    needs = (True, mask_weight is not None, branches[0] is not None, branches[6] is not None)
    return schema.Flat("global_context_backward")(**schema.backward(grad, inputs, outputs[1:], needs))


# ---- bytes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pool_reads_x_once(module, size, layout, dtype):
    x, _ = maps(size, layout, dtype)
    weight, bias = Random(1).mask(size[1], dtype)
    for parameters in ((weight, bias), (None, None)):
        found = traffic(module, lambda parameters=parameters: schema.Flat("attention_pool")(x, *parameters), x=x)
        assert found["x"] == ONCE


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pool_backward_reads_x_once_and_writes_its_gradient_once(module, size, layout):
    x, _ = maps(size, layout)
    weight, bias = Random(1).mask(size[1], torch.float32)
    context, attention = schema.Flat("attention_pool")(x, weight, bias)
    grad = Random(2).normal(*context.shape)
    backward = schema.Flat("attention_pool_backward")
    assert traffic(module, lambda: backward(grad, x, weight, bias, None, context, attention, True, True, True), x=x) == {
        "x": ONCE,
        "out": ONCE,
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_fusion_reads_and_writes_once(module, size, layout):
    x, grad = maps(size, layout)
    scale, shift = Random(1).normal(*size[:2]), Random(2).normal(*size[:2])
    found = traffic(module, lambda: schema.Flat("channel_fuse")(x, scale, shift), x=x)
    assert found == {"x": ONCE, "out": ONCE}
    needs = {"need_x": True, "need_scale": True, "need_shift": True}
    backward = schema.Flat("channel_fuse_backward")
    found = traffic(module, lambda: backward(grad, x, scale, shift, **needs), grad=grad, x=x)
    assert found == {"grad": ONCE, "x": ONCE, "out": ONCE}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_response_norm_reads_twice_and_writes_once(module, size, layout):
    """The sums load a value as both factors of its square, the second time from where the first has put it."""
    x, grad = maps(size, layout)
    gamma, beta = Random(1).normal(size[1]), Random(2).normal(size[1])
    forward, backward = schema.Flat("global_response_norm"), schema.Flat("global_response_norm_backward")
    assert traffic(module, lambda: forward(x, gamma, beta), x=x) == {"x": (3, 3), "out": ONCE}
    norms, needs = forward(x, gamma, beta)[1], {"need_x": True, "need_gamma": True, "need_beta": True}
    found = traffic(module, lambda: backward(grad, x, gamma, beta, norms=norms, **needs), grad=grad, x=x)
    assert found == {"grad": TWICE, "x": TWICE, "out": ONCE}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_residual_and_a_relu_cost_one_reading(module, size, layout):
    """And nothing is read of x in the pool where it does not count."""
    x, residual = maps(size, layout)
    scale = Random(1).normal(*size[:2])

    def fused():
        return schema.Flat("channel_fuse")(x, scale, None, residual=residual)

    def whole():
        return schema.Flat("global_context_inference")(*inputs, residual=residual, final_activation=1)

    assert traffic(module, fused, x=x, residual=residual) == {"x": ONCE, "residual": ONCE, "out": ONCE}
    inputs = Case(size, layout=layout).inputs()
    assert traffic(module, whole, x=inputs[0], residual=residual) == {"x": TWICE, "residual": ONCE, "out": ONCE}
    valid = torch.zeros(1, *size[2:], dtype=torch.bool)
    for weight in (Random(1).mask(size[1], torch.float32)[0], None):
        assert (
            traffic(module, lambda weight=weight: schema.Flat("attention_pool")(x, weight, None, valid=valid), x=x)["x"]
            == NEVER
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_block_moves_no_more_than_it_must(module, size, layout, pooling, fusion):
    """Forward: x for the pool and for the fusion. Backward: g for the sums, and x with it for a scale; then g and x for dx."""
    case = Case(size, layout=layout, pooling=pooling, fusion=fusion)
    inputs = case.inputs()
    x = inputs[GLOBAL_CONTEXT_INPUTS.index("x")]
    _, grad = maps(size, layout)
    assert traffic(module, lambda: global_context(inputs), x=x) == {"x": TWICE, "out": ONCE}
    outputs = global_context(inputs)
    found = traffic(module, lambda: global_context_backward(grad, inputs, outputs), x=x, grad=grad)
    reads_of_x = (fusion != "add") + (pooling == "att")
    assert found == {"x": (reads_of_x, reads_of_x), "grad": TWICE, "out": ONCE}


# ---- bits --------------------------------------------------------------------------------------------------------------------


def forward_and_backward(case: Case) -> list[Tensor]:
    inputs = case.inputs()
    outputs = global_context(inputs)
    return [*outputs, *global_context_backward(Random(3).feature_map(case.shape, case.dtype, case.layout), inputs, outputs)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "hidden"),
    [((2, 20, 7, 20), 4), ((2, 270, 3, 5), 130)],
    ids=["transform in the tail", "transform in launches of its own"],
)
def test_the_schedule_changes_no_bit(monkeypatch, layout, shape, hidden):
    case = Case(shape, layout=layout, hidden=hidden)
    expected = forward_and_backward(case)
    for schedule, seed in SCHEDULES[1:]:
        monkeypatch.setenv("GCNET_EMULATION_SCHEDULE", schedule)
        monkeypatch.setenv("GCNET_EMULATION_SEED", str(seed))
        for name, (one, other) in enumerate(zip(expected, forward_and_backward(case), strict=True)):
            assert torch.equal(one, other), f"output {name} under {schedule}, seed {seed}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "hidden"), [(20, 4), (270, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_sample_alone_equals_itself_in_a_batch(layout, channels, hidden, dtype):
    """Forward and the gradient of x; samples enough for more than one tile of the batched transform."""
    samples = 10
    case = Case((samples, channels, 5, 7), layout=layout, hidden=hidden, dtype=dtype)
    x, *parameters = case.inputs()
    grad = Random(3).feature_map(case.shape, dtype, layout)
    together = global_context((x, *parameters))
    grad_together = global_context_backward(grad, (x, *parameters), together)[0]
    for sample in range(samples):
        one = slice(sample, sample + 1)
        alone = global_context((x[one], *parameters))
        for found, expected in zip(alone, together, strict=True):
            assert torch.equal(found, expected[one])
        assert torch.equal(global_context_backward(grad[one], (x[one], *parameters), alone)[0], grad_together[one])


def test_a_schedule_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("GCNET_EMULATION_SCHEDULE", "breadth-first")
    with pytest.raises(RuntimeError, match="GCNET_EMULATION_SCHEDULE must be depth-first or round-robin, got breadth-first"):
        torch.ops.gcnet_ext.attention_pool.default(torch.ones(1, 2, 3), torch.ones(2), None, None)


def test_unwritten_memory_would_be_seen(module):
    """The premise of the comparisons with the reference: a new tensor holds NaN until a kernel writes it."""
    empty = emulated.call_on_unwritten_memory(torch.empty, 5)
    assert all(math.isnan(value) for value in empty.tolist())
    assert not torch.are_deterministic_algorithms_enabled()
