"""EfficientChannelAttention against the formula of the paper in float64, with random parameters."""

from __future__ import annotations

import eager
import grid
import pytest
import torch
from grid import Random
from test_global_context_block import check, gradcheck_module
from torch import nn

from gcnet_ext import EfficientChannelAttention


def pair(backend, channels: int, kernel_size: int | None = None, **options):
    """Our block, and that of the paper in float64 with the same weight."""
    block = EfficientChannelAttention(channels, kernel_size, device=backend.device, **options)
    truth = eager.randomise(eager.EfficientChannelAttention(block.conv.kernel_size[0]))
    block.load_state_dict(truth.state_dict(), strict=True)
    return block, truth.double()


@pytest.mark.parametrize("layout", grid.EVERY_LAYOUT)
@pytest.mark.parametrize("dtype", grid.FLOATING, ids=str)
def test_dtypes_and_layouts(backend, dtype, layout):
    """The gradient of x is the sum of what the fusion and the pool send back, each of them rounded to the dtype of x."""
    block, truth = pair(backend, 16, 5)
    x = Random(1, backend.to).feature_map((2, 16, 5, 7), dtype, layout)
    ours, theirs = x.detach().clone().requires_grad_(), x.detach().cpu().double().requires_grad_()
    grad = Random(9).feature_map(tuple(x.shape), x.dtype)
    out, want = block(ours), truth(theirs)
    out.backward(grad.to(x.device))
    want.backward(grad.double())
    acc = grid.accumulation(x)
    grid.assert_close(out, want.detach(), acc, "out")
    grid.assert_close(block.conv.weight.grad, truth.conv.weight.grad, acc, "gradient of the weight", sums=150)
    through_fusion = grad.double() * (want / theirs).detach()
    terms = through_fusion.abs() + (theirs.grad - through_fusion).abs() + theirs.grad.abs()
    rounding = torch.finfo(dtype).eps / 2 if dtype != acc else 0.0
    summed = 150 * torch.finfo(acc).eps * float(theirs.grad.abs().max())
    assert bool(((ours.grad.cpu().double() - theirs.grad).abs() <= 1.01 * rounding * terms + summed).all())


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 5), (2, 3, 1, 1), (2, 7, 3, 4, 2), (1, 130, 6, 6)], ids=str)
@pytest.mark.parametrize("kernel_size", [1, 3, 9])
def test_sizes(backend, shape, kernel_size):
    """Fewer channels than neighbours, too."""
    check(*pair(backend, shape[1], kernel_size), Random(1, backend.to).feature_map(shape, torch.float32, "contiguous"), 400)


@pytest.mark.parametrize(
    ("channels", "size"),
    [(1, 3), (16, 3), (127, 3), (128, 5), (512, 5), (2047, 5), (2048, 7), (32767, 7), (32768, 9)],
)
def test_the_kernel_size_of_the_paper(channels, size):
    assert EfficientChannelAttention(channels).conv.weight.shape == (1, 1, size)


def test_gradcheck(backend):
    block = pair(backend, 4, 3)[0].double()
    x = Random(1, backend.to).feature_map((2, 4, 3, 2), torch.float64, "contiguous").requires_grad_()
    assert gradcheck_module(block, x)


@pytest.mark.parametrize("final_activation", ["none", "relu"])
def test_residual_and_valid(backend, final_activation):
    """As the formula says: the mean of the positions that count, and the residual behind the gate."""
    block, truth = pair(backend, 8, 3, final_activation=final_activation)
    x, residual = (Random(seed, backend.to).feature_map((2, 8, 4, 6), torch.float32, "contiguous") for seed in (1, 2))
    valid = torch.zeros(2, 4, 6, dtype=torch.bool, device=x.device)
    valid[0, :3, :5] = valid[1, 1:] = True
    found = block(x, residual, valid)
    for sample in range(2):
        counted = x[sample, :, valid[sample]].cpu().double()[None]
        scale = truth(counted) / counted
        want = x[sample].cpu().double() * scale[0, :, :1, None] + residual[sample].cpu().double()
        grid.assert_close(found[sample], want.relu() if final_activation == "relu" else want, torch.float32)


def test_in_place(backend):
    block = pair(backend, 8)[0]
    x = Random(1, backend.to).feature_map((2, 8, 4, 6), torch.float32, "channels_last")
    want = block(x.clone())
    block.inplace = True
    with torch.no_grad():
        assert block(x) is x
    assert torch.equal(x, want)


def test_a_changed_convolution_is_called(backend):
    """So whatever its user does with it happens."""
    block = pair(backend, 8)[0]
    seen = []
    block.conv.register_forward_hook(lambda _module, given, _found: seen.append(tuple(given[0].shape)))
    block(Random(1, backend.to).normal(3, 8, 2, 2))
    block.conv = nn.utils.parametrizations.weight_norm(block.conv)
    block(Random(1, backend.to).normal(3, 8, 2, 2))
    assert seen == [(3, 1, 8)] * 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0,), "channels must be at least 1, got 0"),
        ((8, 4), "kernel_size must be odd, got 4"),
        ((8, 0), "kernel_size must be at least 1, got 0"),
        ((8.5,), "channels must be a whole number, got 8.5"),
    ],
    ids=str,
)
def test_what_is_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        EfficientChannelAttention(*arguments)


def test_wrong_inputs(backend):
    block = pair(backend, 8)[0]
    with pytest.raises(RuntimeError, match=r"x must have 8 channels \(inplanes\), got shape \[2, 4, 8\]; .*movedim"):
        block(Random(1, backend.to).normal(2, 4, 8))
    with pytest.raises(TypeError, match="x must be a Tensor"):
        block(None)
    with pytest.raises(ValueError, match="final_activation must be one of"):
        EfficientChannelAttention(8, final_activation="tanh")
