"""The activations between the layers of a branch: torch's, forward and backward, and the modules that are taken for them."""

from __future__ import annotations

import grid
import pytest
import reference
import torch
import torch.nn.functional as F
from grid import Case, Random
from torch import nn

import gcnet_ext
from gcnet_ext import GlobalContextBlock, SqueezeExcitation
from gcnet_ext.blocks import _layers
from gcnet_ext.ops._options import ACTIVATIONS

TORCHS = {
    "none": lambda z: z,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "hardswish": F.hardswish,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.2),
}


def test_all_of_them_are_here():
    assert set(TORCHS) == set(ACTIVATIONS)


@pytest.mark.representative
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", grid.LAYOUTS)
def test_block(backend, activation, layout):
    """Against float64, in every dtype; 65 hidden units are whole vectors and a rest. On a GPU by one block, and by several."""
    for shape, hidden in (((2, 10, 7, 7), 65), ((3, 160, 3, 3), 40)):
        for dtype in grid.FLOATING:
            case = Case(shape, dtype, layout, hidden=hidden)
            grad = Random(1, backend.to).feature_map(case.shape, dtype, layout)
            ours, truth = (
                grid.flat(module.global_context, activation=activation, slope=0.2) for module in (backend, reference)
            )
            grid.check(ours, truth, case.inputs(backend.to), grad, grid.GLOBAL_CONTEXT_INPUTS, vanishing=case.vanishing)


def identity_branch(z: torch.Tensor) -> tuple[torch.Tensor, gcnet_ext.Branch]:
    """x and the branch whose t is act(z): a context of ones, w1 with z in its rows, and w2 = 1."""
    units = z.numel()
    return z.new_ones(1, units, 1), gcnet_ext.Branch(torch.diag(z), w2=torch.eye(units, dtype=z.dtype, device=z.device))


@pytest.mark.representative
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_of_one_number(backend, activation, dtype):
    """Over the whole range, near 0, and far out, where a cube or an exponential overflows. Gradients by autograd."""
    z = torch.cat(
        [torch.linspace(-12, 12, 481), torch.tensor([1e-6, -1e-6, 20.0, -20.0, 200.0, -200.0, 1e5, -1e5, 1e15, -1e15])]
    )
    z = backend.to(z.to(dtype))
    z = z[(z.abs() - 3).abs() > 1e-3]  # the derivative of hardswish jumps there
    exact = z.cpu().double().requires_grad_()
    want = TORCHS[activation](exact)
    (slope,) = torch.autograd.grad(want.sum(), exact)
    x, branch = identity_branch(z)
    w1 = branch.w1.requires_grad_()
    out = backend.global_context(x, shift=branch._replace(w1=w1), norm=False, activation=activation, slope=0.2)
    (found,) = torch.autograd.grad(out.sum(), w1)
    eps = torch.finfo(dtype).eps
    limit = 8 * eps * (1 + z.abs().cpu().double())
    assert bool(((out.detach().flatten() - 1).cpu().double() - want.detach()).abs().le(limit + eps * want.abs()).all())
    roundings = 12 if dtype == torch.float32 else 100  # torch's own derivative by tanh, which cancels, is off in float64
    assert bool((found.diagonal().cpu().double() - slope).abs().le(roundings * eps * (1 + slope.abs())).all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_nan(backend, activation):
    x, branch = identity_branch(backend.to(torch.tensor([1.0, 2.0])))
    branch = branch._replace(
        b1=backend.to(torch.tensor([torch.nan, 0.0])), w2=backend.to(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    )
    assert bool(backend.global_context(x, shift=branch, norm=False, activation=activation)[0, 0].isnan().all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(backend, activation):
    inputs = Case((2, 3, 2, 3), torch.float64, hidden=3).inputs(backend.to, seed=3)
    call = grid.flat(backend.global_context, activation=activation, slope=0.2)
    assert grid.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, [tensor.detach().requires_grad_() for tensor in inputs])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", [GlobalContextBlock, SqueezeExcitation])
def test_blocks(kind, activation):
    """The module stands between the layers, and the operator computes what it does."""
    block = kind(16, 1 / 2, activation=activation, slope=0.2).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    found = block._plain_layers()
    assert (found.options.activation, found.options.slope if activation == "leaky_relu" else 0.2) == (
        ACTIVATIONS[activation],
        0.2,
    )
    x = Random(0).feature_map((2, 16, 5, 6), torch.float64)
    want = block(x)
    module = next(m for m in block.modules() if _layers.activation_of(m) == (activation, found.options.slope))
    z = torch.linspace(-5, 5, 101, dtype=torch.float64)
    assert torch.equal(module(z), TORCHS[activation](z))
    module.register_forward_hook(lambda *_: None)  # now it is called
    assert torch.allclose(block(x), want)


def test_settings_of_a_module_count():
    """Another approximation, and another slope, after the block has been called."""
    x = Random(0).feature_map((2, 16, 5, 6), torch.float64)
    for first, second, change in (
        ("gelu", "gelu_tanh", {"approximate": "tanh"}),
        ("leaky_relu", "relu", {"negative_slope": 0.0}),
    ):
        block, other = (SqueezeExcitation(16, 1 / 2, activation=name).double() for name in (first, second))
        other.load_state_dict(block.state_dict())
        assert not torch.equal(block(x), other(x))
        for name, value in change.items():
            setattr(block.activation, name, value)
        assert torch.allclose(block(x), other(x), rtol=1e-12, atol=1e-12)
