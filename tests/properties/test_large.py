"""More elements than 32-bit indices can count, within one sample: forward, checked on samples of channels and positions."""

from __future__ import annotations

import grid
import pytest
import reference
import torch
from grid import Random

import gcnet_ext

CHANNELS, HEIGHT, WIDTH = 129, 4097, 4099
POSITIONS = HEIGHT * WIDTH

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("kernels")]


@pytest.fixture(params=list(grid.LAYOUTS))
def x(request):
    """[1, C, H, W] of bfloat16, filled with a random block over and over, whose length divides no size of x."""
    needed = 2.6 * CHANNELS * POSITIONS * 2
    if grid.available_memory() < needed:
        pytest.skip(f"{needed / 2**30:.0f} GiB of memory are needed, {grid.available_memory() / 2**30:.0f} GiB are free")
    block = Random(0).normal(1_000_003, dtype=torch.bfloat16, mean=0.25)
    flat = torch.empty(CHANNELS * POSITIONS, dtype=torch.bfloat16)
    assert flat.numel() > 2**31
    for start in range(0, flat.numel(), len(block)):
        piece = flat[start : start + len(block)]
        piece.copy_(block[: len(piece)])
    # The far end is not like the rest: an index that wraps around would miss it, or read it where it is not.
    flat[-POSITIONS // 2 :] += 1
    if request.param == "channels_last":
        return flat.view(1, HEIGHT, WIDTH, CHANNELS).movedim(-1, 1)
    return flat.view(1, CHANNELS, HEIGHT, WIDTH)


def context_of(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The context and the attention in float64, a strip of rows at a time."""
    strips = range(0, HEIGHT, 128)
    logits = torch.cat([torch.einsum("chw,c->hw", x[0, :, row : row + 128].float(), weight) for row in strips]).double()
    attention = (logits + bias.double()).flatten().softmax(0).view(HEIGHT, WIDTH)
    context = torch.zeros(CHANNELS, dtype=torch.float64)
    for row in strips:
        context += torch.einsum("chw,hw->c", x[0, :, row : row + 128].float(), attention[row : row + 128].float()).double()
    return context, attention


def test_more_than_32_bits(x):
    random = Random(1)
    weight, bias = random.mask(CHANNELS, torch.float32)
    scale, shift = (gcnet_ext.Branch(*random.branch(CHANNELS, 8, torch.float32)) for _ in range(2))
    context, attention = context_of(x, weight, bias)
    got = gcnet_ext.attention_map(x, weight, bias)[0]
    assert torch.allclose(got.double(), attention, rtol=1e-3, atol=0)
    assert abs(float(got.double().sum()) - 1) < 1e-4
    del got, attention
    pooled = torch.ops.gcnet_ext.attention_pool(x, weight, bias, None)[0][0]
    assert torch.allclose(pooled.double(), context, rtol=1e-4, atol=1e-5)

    out = gcnet_ext.global_context(x, weight, bias, scale, shift)
    assert out.stride() == x.stride()
    double = [gcnet_ext.Branch(*(tensor.double() for tensor in branch)) for branch in (scale, shift)]
    gate, added = (reference.branch(context[None], branch)[0, :, None] for branch in double)
    gate = gate.sigmoid()
    last = POSITIONS - 1
    positions = torch.tensor([0, 1, 63, WIDTH, 2**24 - 1, POSITIONS // 2, last - 1, last])
    rows, columns = positions // WIDTH, positions % WIDTH
    # Every channel at a few positions, and every position of a few channels
    grid.assert_close(out[0, :, rows, columns], x[0, :, rows, columns].double() * gate + added, torch.float32)
    for channel in (0, 1, 64, CHANNELS - 2, CHANNELS - 1):
        want = x[0, channel].double() * gate[channel] + added[channel]
        grid.assert_close(out[0, channel], want, torch.float32, f"channel {channel}")
