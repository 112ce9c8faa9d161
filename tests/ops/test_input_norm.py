"""normed_global_context_inference and normed_global_context_: the norm in front of the block, which nobody computes."""

from __future__ import annotations

import pytest
import schema
import torch
from grid import LAYOUTS, Case
from registry import OPERATORS

SHAPES = [(2, 10, 4, 5), (3, 33, 7), (1, 64, 9, 16), (4, 256, 7, 7)]
FORMULA = OPERATORS["normed_global_context_"].formula
compute, overwrite = schema.Flat("normed_global_context_inference"), schema.Flat("normed_global_context_")


def norm_of(channels: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    scale, shift = torch.randn(2, channels, generator=generator)
    return scale.to(dtype), shift.to(dtype)


def named(case: Case, **norm) -> dict:
    """The arguments, of the operators without a norm where none is given."""
    return {**schema.Flat("global_context_inference").named(*case.inputs()), **norm}


def overwritten(arguments: dict) -> torch.Tensor:
    """The result in the place of a copy of x; the other operator's is the same."""
    x = arguments["x"].clone(memory_format=torch.preserve_format)
    overwrite(**{**arguments, "x": x})
    assert torch.equal(compute(**arguments), x)
    return x


@pytest.mark.parametrize("more", ["alone", "residual and ReLU", "valid", "hard gate"])
@pytest.mark.parametrize("fusion", ["mul", "add", "both"])
@pytest.mark.parametrize("pooling", ["att", "avg"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_block_of_a_normed_x(kernels, shape, layout, pooling, fusion, more):
    case = Case(shape, layout=layout, pooling=pooling, fusion=fusion)
    scale, shift = norm_of(shape[1])
    arguments = named(case, x_scale=scale, x_shift=shift)
    if more == "residual and ReLU":
        arguments |= {"residual": arguments["x"].roll(1, 0), "final_activation": 1}
    elif more == "hard gate":
        arguments["hard_gate"] = [1 / 6, 0.5]
    elif more == "valid":
        arguments["valid"] = torch.rand(shape[0], *shape[2:], generator=torch.Generator().manual_seed(0)) < 0.6
        arguments["valid"][0] = False  # no position counts: the context is 0, and not the shift
    exact = {
        name: value.double() if torch.is_tensor(value) and value.dtype != torch.bool else value
        for name, value in arguments.items()
    }
    want = FORMULA(exact)[0]
    got = overwritten(arguments)
    assert got.stride() == arguments["x"].stride()
    assert float((got - want).abs().max()) <= 2e-5 * float(want.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes(kernels, layout, dtype):
    case = Case((2, 33, 5, 6), dtype=dtype, layout=layout)
    for dtype_of_norm in {dtype, torch.float32} - ({torch.float32} if dtype == torch.float64 else set()):
        scale, shift = norm_of(33, dtype_of_norm)
        arguments = named(case, x_scale=scale, x_shift=shift)
        want = FORMULA({name: value.double() if torch.is_tensor(value) else value for name, value in arguments.items()})[0]
        bound = 4 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-12
        assert float((overwritten(arguments) - want).abs().max()) <= bound * float(want.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fusion", ["mul", "both"])
def test_the_identity_changes_no_bit(kernels, fusion, layout):
    arguments = named(Case((2, 64, 6, 7), layout=layout, fusion=fusion))
    want = schema.Flat("global_context_inference")(**arguments)
    assert torch.equal(overwritten({**arguments, "x_scale": torch.ones(64), "x_shift": torch.zeros(64)}), want)


def test_it_is_of_each_thread_count_alike(kernels):
    scale, shift = norm_of(256)
    arguments = named(Case((4, 256, 14, 14)), x_scale=scale, x_shift=shift)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(overwritten(arguments))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_weights_of_the_call_stay(kernels):
    """The norm goes into copies of them."""
    scale, shift = norm_of(10)
    arguments = named(Case((2, 10, 4, 5)), x_scale=scale, x_shift=shift)
    before = {name: value.clone() for name, value in arguments.items() if torch.is_tensor(value)}
    overwritten(arguments)
    assert all(torch.equal(arguments[name], value) for name, value in before.items())


WRONG = {
    "x_scale must have shape [10], trailing ones aside, got [11]": {"x_scale": torch.ones(11), "x_shift": torch.ones(10)},
    "x_shift must have shape [10], trailing ones aside, got [2, 10]": {"x_scale": torch.ones(10), "x_shift": torch.ones(2, 10)},
    "x_scale must be float32 or x's dtype (float32), got float64": {
        "x_scale": torch.ones(10).double(),
        "x_shift": torch.ones(10),
    },
}


@pytest.mark.parametrize("words", WRONG)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_ones_are_refused(kernels, device, words):
    arguments = named(Case((2, 10, 4, 5)), **WRONG[words])
    made = {name: value.to(device) if torch.is_tensor(value) else value for name, value in arguments.items()}
    with pytest.raises(RuntimeError) as error:
        overwritten(made)
    assert str(error.value).endswith(words)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("operator", [compute, overwrite], ids=lambda operator: operator.name)
def test_it_is_refused_on_cuda(operator):
    scale, shift = norm_of(10)
    arguments = named(Case((2, 10, 4, 5)), x_scale=scale, x_shift=shift)
    with pytest.raises(RuntimeError, match="x must be on the CPU where it has x_scale and x_shift, got cuda:0"):
        operator(**{name: value.cuda() if torch.is_tensor(value) else value for name, value in arguments.items()})


def test_a_norm_whose_scale_is_0_leaves_its_shift(kernels):
    """A scale of 0 leaves nothing of x: each channel is its shift, and so is the context."""
    arguments = named(Case((2, 10, 4, 5), fusion="mul"), x_scale=torch.zeros(10), x_shift=torch.full((10,), 2.0))
    constant = {**named(Case((2, 10, 4, 5), fusion="mul")), "x": torch.full((2, 10, 4, 5), 2.0)}
    assert torch.allclose(overwritten(arguments), schema.Flat("global_context_inference")(**constant), rtol=1e-6)


def test_gradients_pass_through_it(kernels):
    """Whoever calls the operator by its name gets those of x, of the norm and of the weights."""
    scale, shift = norm_of(10, torch.float64)
    arguments = named(Case((2, 10, 4, 5), dtype=torch.float64), x_scale=scale, x_shift=shift)
    leaves = {name: value.clone().requires_grad_() for name, value in arguments.items() if torch.is_tensor(value)}
    grad = arguments["x"].cos()
    found = [
        torch.autograd.grad(out, list(leaves.values()), grad, materialize_grads=True)
        for out in (compute(**{**arguments, **leaves}), FORMULA({**arguments, **leaves})[0])
    ]
    for name, got, want in zip(leaves, *found, strict=True):
        if name != "mask_bias":
            assert torch.allclose(got, want, rtol=1e-9, atol=1e-9 * float(want.abs().max())), name
