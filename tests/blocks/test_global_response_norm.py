"""GlobalResponseNorm against the formula of the paper in float64, with random parameters."""

from __future__ import annotations

import eager
import grid
import imitations
import pytest
import torch
from grid import Random
from registry import OPERATORS
from test_global_context_block import check, gradcheck_module
from torch import nn

from gcnet_ext import GlobalResponseNorm


def pair(backend, channels: int, **options):
    """Our block, and that of the paper in float64 with the same parameters."""
    truth = eager.randomise(eager.GlobalResponseNorm(channels))
    block = GlobalResponseNorm(channels, device=backend.device, **options)
    block.load_state_dict(truth.state_dict(), strict=True)
    return block, truth.double()


@pytest.mark.parametrize("layout", grid.EVERY_LAYOUT)
@pytest.mark.parametrize("dtype", grid.FLOATING, ids=str)
def test_dtypes_and_layouts(backend, dtype, layout):
    check(*pair(backend, 16), Random(1, backend.to).feature_map((2, 16, 5, 7), dtype, layout))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 5), (2, 3, 1, 1), (2, 7, 3, 4, 2), (1, 130, 6, 6), (2, 40, 33)], ids=str)
def test_sizes(backend, shape):
    check(*pair(backend, shape[1]), Random(1, backend.to).feature_map(shape, torch.float32, "contiguous"), 400)


def test_gradcheck(backend):
    block = pair(backend, 4)[0].double()
    x = Random(1, backend.to).feature_map((2, 4, 3, 2), torch.float64, "contiguous").requires_grad_()
    assert gradcheck_module(block, x)


@pytest.mark.parametrize("spatial", [(5,), (4, 6), (2, 3, 4)], ids=str)
def test_channels_in_the_last_place(backend, spatial):
    """The same numbers, read where they lie: the output lies like x."""
    block = pair(backend, 8)[0]
    last = GlobalResponseNorm(8, channels_last=True, device=backend.device)
    last.load_state_dict(block.state_dict())
    x = Random(1, backend.to).normal(2, *spatial, 8)
    out = last(x)
    assert out.is_contiguous()
    assert torch.equal(out, block(x.movedim(-1, 1)).movedim(1, -1))


def test_channels_without_any_signal(backend):
    """Their norm is 0, and so is its part in the gradient; where all are so, the block is the bias."""
    block = pair(backend, 4)[0]
    x = torch.zeros(2, 4, 3, 3, device=backend.device)
    x[1, :2] = 1
    x.requires_grad_()
    out = block(x)
    assert torch.equal(out[0], block.bias.reshape(-1, 1, 1).expand(4, 3, 3))
    out.sum().backward()
    assert torch.equal(x.grad[0], torch.ones_like(x.grad[0]))
    assert torch.equal(x.grad[1, 2:], torch.ones_like(x.grad[1, 2:]))


def test_squares_do_not_overflow(backend):
    """The largest numbers of float16 over many positions."""
    x = torch.full((1, 2, 64, 64), 60000.0, dtype=torch.float16, device=backend.device)
    x[:, 1] = 1000
    block = GlobalResponseNorm(2, device=backend.device)
    with torch.no_grad():
        block.weight.fill_(-0.25)
    out = block(x)
    mean = (60000 + 1000) / 2
    assert torch.allclose(out[0, 0].cpu().float(), torch.tensor(60000 * (1 - 0.25 * 60000 / mean)), rtol=1e-3)
    assert out.isfinite().all()


def test_products_with_large_norms_do_not_overflow(backend):
    """gamma A G is beyond float32 here, and gamma A N is not."""
    operator, random = OPERATORS["global_response_norm_backward"], Random(1, backend.to)
    large = {"gamma": random.normal(5, dtype=torch.float32, std=1e20), "norms": random.normal(2, 5, std=1e20).abs()}
    arguments = {**operator.good, **{name: random.normal(2, 5, 4) for name in ("grad", "x")}, **large}
    arguments["beta"] = random.normal(5, dtype=torch.float32)
    exact = {name: value.double() if torch.is_tensor(value) else value for name, value in arguments.items()}
    for got, want in zip(backend.ops.global_response_norm_backward(**arguments), operator.formula(exact), strict=True):
        assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


def test_starts_as_the_identity(backend):
    x = Random(1, backend.to).feature_map((2, 8, 5, 5), torch.float32, "channels_last")
    assert torch.equal(GlobalResponseNorm(8, device=backend.device)(x), x)


def test_keys_of_the_original():
    """ConvNeXt V2's parameters have the shape of what they are multiplied with."""
    gamma, beta = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    block = GlobalResponseNorm(8, channels_last=True)
    block.load_state_dict({"gamma": gamma, "beta": beta}, strict=True)
    assert torch.equal(block.weight, gamma.flatten())
    assert torch.equal(block.bias, beta.flatten())


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("channels_last", [False, True])
def test_equals_timm(channels_last):
    theirs = eager.randomise(imitations.library("timm.layers.grn").GlobalResponseNorm(8, channels_last=channels_last))
    block = GlobalResponseNorm(8, channels_last=channels_last)
    block.load_state_dict(theirs.state_dict(), strict=True)
    x = Random(1).normal(2, *((5, 6, 8) if channels_last else (8, 5, 6)))
    assert torch.allclose(block(x), theirs(x), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0,), "channels must be at least 1, got 0"),
        ((8.5,), "channels must be a whole number, got 8.5"),
        ((8, "small"), "eps must be a finite number, got 'small'"),
        ((8, float("nan")), "eps must be a finite number, got nan"),
        ((8, True), "eps must be a finite number, got True"),
    ],
    ids=str,
)
def test_what_is_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        GlobalResponseNorm(*arguments)


def test_wrong_inputs(backend):
    block = pair(backend, 8)[0]
    with pytest.raises(RuntimeError, match=r"x must have 8 channels \(inplanes\), got shape \[2, 4, 8\]; .*movedim"):
        block(Random(1, backend.to).normal(2, 4, 8))
    with pytest.raises(TypeError, match="x must be a Tensor"):
        block(None)
    with pytest.raises(RuntimeError, match="x must have at least one position"):
        block(Random(1, backend.to).normal(2, 8, 0))


def test_replaced_inside_a_module(backend):
    """It is called as any module is, and its parameters are trained."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1, device=backend.device), GlobalResponseNorm(8, device=backend.device))
    net(Random(1, backend.to).normal(2, 3, 4, 4)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
