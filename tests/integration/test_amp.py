"""Automatic mixed precision: the parameters stay float32, activations are half, sums are not."""

from __future__ import annotations

import copy

import eager
import grid
import pytest
import torch
from torch import nn

from gcnet_ext import GlobalContextBlock, attention_pool

HALF = (torch.bfloat16, torch.float16)
LARGEST = torch.finfo(torch.float16).max  # bfloat16 reaches as far as the float32 of the sums, and so has no head room


class Net(nn.Module):
    """A convolution, which autocast runs in half precision, and the block behind it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.conv, self.block = nn.Conv2d(3, 32, 3, padding=1), block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.conv(x))


def nets() -> tuple[Net, Net, Net]:
    """Ours, the eager one and the eager one in float64, with the same random parameters."""
    truth = eager.randomise(Net(eager.ContextBlock(32, 1 / 4, "att", ("channel_add", "channel_mul"))))
    ours = Net(GlobalContextBlock(32, 1 / 4, fusion_types=("channel_add", "channel_mul")))
    ours.load_state_dict(truth.state_dict(), strict=True)
    return ours, truth, copy.deepcopy(truth).double()


def image(size: int = 24) -> torch.Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_closer_to_float64_than_eager(dtype):
    """The block alone on a half-precision feature map, under autocast: logits and softmax of ours are not rounded to half."""
    ours, theirs, truth = (net.block for net in nets())
    x = torch.randn(4, 32, 40, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = truth(x.double())
    with torch.autocast("cpu", dtype=dtype):
        out, eager_out = ours(x), theirs(x)
    assert out.dtype == dtype
    assert error(out, want) < error(eager_out, want)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_training_with_a_scaler(dtype):
    """Parameters and their gradients stay float32; the loss falls; a GradScaler has nothing to complain of."""
    net = nets()[0]
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            out = net(image())
            assert out.dtype == dtype
            loss = (out.float() - 1).square().mean()
        scaler.scale(loss).backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in net.parameters())
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() == 128.0, "a step was skipped: a gradient overflowed"
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("positions", [1, 49, 4096, 100_000])
@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("pooling", grid.POOLINGS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_no_overflow_near_the_largest_number(backend, dtype, pooling, layout, positions):
    """Every element is 0.9 of the largest number of float16, and so is their mean, whatever their sum."""
    value = 0.9 * LARGEST
    x = grid.LAYOUTS[layout](lambda *sizes: backend.to(torch.full(sizes, value, dtype=dtype)), 1, 3, positions)
    weight = backend.to(torch.tensor([1.0, -1.0, 0.0], dtype=torch.float32)) if pooling == "att" else None
    context = attention_pool(x, weight)
    assert torch.allclose(
        context.double(), torch.full((1, 3), float(x[0, 0, 0]), dtype=torch.float64).to(context.device), rtol=1e-2
    )


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_block_near_the_largest_number(dtype):
    """A gate below one keeps the output finite."""
    block = GlobalContextBlock(8, 1 / 2)
    x = torch.full((2, 8, 16, 16), 0.9 * LARGEST, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out = block(x)
    assert out.isfinite().all()
    out.sum(dtype=torch.float32).backward()
    assert x.grad.isfinite().all()
