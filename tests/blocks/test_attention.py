"""Attention with values that are narrower than the keys, in blocks of weights (gcnet_ext/blocks/_attention.py)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gcnet_ext import NonLocalBlock
from gcnet_ext.blocks import _attention

# N, D, E, P, Q
SIZES = [(3, 10, 4, 37, 37), (2, 6, 3, 300, 75), (5, 8, 1, 7, 3), (1, 3, 2, 1, 1)]


@pytest.fixture(params=[_attention.LEAST_POSITIONS, 5])
def blocks(request, monkeypatch):
    """The least positions of a block: with 5 there are as many positions as channels, so that most of the sizes are cut."""
    monkeypatch.setattr(_attention, "LEAST_POSITIONS", request.param)


def drawn(size: tuple[int, ...]) -> list[Tensor]:
    n, d, e, p, q = size
    generator = torch.Generator().manual_seed(0)
    shapes = (n, d, p), (n, d, q), (n, e, q)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def formula(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    weights = torch.einsum("ndp,ndq->npq", theta, phi).softmax(2)
    return torch.einsum("npq,neq->nep", weights, g)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_is_the_formula_and_its_gradients(blocks, size):
    inputs = drawn(size)
    got, want = _attention.attention(*inputs), formula(*inputs)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(want)
    for ours, true in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True):
        assert torch.allclose(ours, true, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_the_gradients_that_are_asked_for(blocks, wanted):
    inputs = [tensor.detach().requires_grad_(i in wanted) for i, tensor in enumerate(drawn((3, 10, 4, 37, 37)))]
    leaves = [inputs[i] for i in wanted]
    found = [torch.autograd.grad(f(*inputs).sum(), leaves) for f in (_attention.attention, formula)]
    for ours, true in zip(*found, strict=True):
        assert torch.allclose(ours, true, rtol=1e-10, atol=1e-12)


def test_derivatives_of_derivatives():
    theta, phi, g = drawn((2, 3, 2, 5, 4))
    assert torch.autograd.gradcheck(_attention.attention, (theta, phi, g))
    assert torch.autograd.gradgradcheck(_attention.attention, (theta, phi, g))


@pytest.mark.parametrize(("channels", "positions"), [(8, 300), (64, 300), (64, 20)])
def test_runs_have_as_many_positions_as_channels(blocks, channels, positions):
    """So the weights of a run take no more memory than the keys; together the runs have every position once."""
    seen = torch.zeros(positions)
    for p in _attention._runs(torch.zeros(2, channels, positions)):
        assert 0 < len(seen[p]) <= max(channels, _attention.LEAST_POSITIONS)
        seen[p] += 1
    assert (seen == 1).all()


def calls_of(monkeypatch, block: NonLocalBlock, x: Tensor) -> int:
    called, attention = [], _attention.attention
    monkeypatch.setattr(_attention, "attention", lambda *inputs: called.append(1) or attention(*inputs))
    with torch.no_grad():
        block(x)
    return len(called)


@pytest.mark.parametrize(
    ("options", "dtype", "calls"),
    [
        ({"mode": "gaussian"}, torch.float32, 1),
        ({"mode": "gaussian", "sub_sample": True}, torch.float64, 1),
        ({"mode": "gaussian"}, torch.bfloat16, 0),  # its weights would be too coarse
        ({"mode": "gaussian", "reduction": 1}, torch.float32, 0),  # the values are as wide as the keys
        ({"mode": "embedded_gaussian"}, torch.float32, 0),
        ({"mode": "dot_product"}, torch.float32, 0),
    ],
    ids=str,
)
def test_where_it_is_used(monkeypatch, options, dtype, calls):
    assert calls_of(monkeypatch, NonLocalBlock(8, dtype=dtype, **options), torch.randn(2, 8, 4, 6, dtype=dtype)) == calls


def test_under_autocast_it_is_not_used(monkeypatch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert calls_of(monkeypatch, NonLocalBlock(8, mode="gaussian"), torch.randn(2, 8, 4, 6)) == 0


@pytest.mark.parametrize("channels", [8, 64])
def test_few_positions_are_paired_before_the_product_with_the_values(channels):
    """Either order gives the same values; 5x5 positions are fewer than 32 channels, and more than 4."""
    torch.manual_seed(0)
    block = NonLocalBlock(channels, mode="dot_product", dtype=torch.float64)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, channels, 5, 5, dtype=torch.float64)
    theta, phi, g = (layer(x).flatten(2) for layer in (block.theta, block.phi, block.g))
    y = torch.einsum("ndp,ndq,neq->nep", theta, phi, g) / 25
    want = x + block.conv_out(y.view(2, -1, 5, 5))
    with torch.profiler.profile(record_shapes=True) as profile:
        assert torch.allclose(block(x), want, rtol=1e-10, atol=1e-12)
    pairs = [2, 25, 25] in [list(shape) for event in profile.events() for shape in event.input_shapes if shape]
    assert pairs == (channels == 64)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_backward_pass_under_autocast_is_that_without(create_graph):
    theta, phi, g = (tensor.detach().float().requires_grad_() for tensor in drawn((2, 40, 3, 50, 50)))
    grad = torch.ones(2, 3, 50)
    want = torch.autograd.grad(_attention.attention(theta, phi, g), (theta, phi, g), grad, create_graph=create_graph)
    y = _attention.attention(theta, phi, g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(y, (theta, phi, g), grad, create_graph=create_graph)
    assert all(torch.equal(ours, true) for ours, true in zip(got, want, strict=True))
