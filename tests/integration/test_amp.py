"""Automatic mixed precision: the parameters stay float32, activations are half, sums are not."""

from __future__ import annotations

import copy

import eager
import grid
import pytest
import torch
from torch import nn

from gcnet_ext import (
    GlobalContextBlock,
    NonLocalBlock,
    SimplifiedNonLocalBlock,
    SqueezeExcitation,
    attention_map,
    attention_pool,
    channel_fuse,
)

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


# ---- 16-bit weights and a float32 x, and the other way round -----------------------------------------------------------------

BOTH = ("channel_add", "channel_mul")
PAIRS = {
    "global context": (
        lambda: GlobalContextBlock(16, 1 / 4, fusion_types=BOTH),
        lambda: eager.ContextBlock(16, 1 / 4, "att", BOTH),
    ),
    "average": (lambda: GlobalContextBlock(16, 1 / 4, "avg", BOTH), lambda: eager.ContextBlock(16, 1 / 4, "avg", BOTH)),
    "squeeze-excitation": (lambda: SqueezeExcitation(16, planes=4), lambda: eager.SqueezeExcitation(16, 4)),
    "simplified non-local": (lambda: SimplifiedNonLocalBlock(16), lambda: eager.SimplifiedNonLocal(16)),
}
MIXTURES = [(half, torch.float32, half) for half in HALF] + [(torch.float32, half, half) for half in HALF]


def mixed(name: str, weights: torch.dtype) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Ours, the one in eager, and that in float64, with the same weights, which are rounded to this dtype."""
    ours, theirs = PAIRS[name][0](), eager.randomise(PAIRS[name][1]()).to(weights)
    ours.to(weights).load_state_dict(theirs.state_dict())
    return ours, theirs, copy.deepcopy(theirs).double()


@pytest.mark.parametrize("hooked", [False, True], ids=["fused", "called"])
@pytest.mark.parametrize(("weights", "of_x", "autocast"), MIXTURES, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_weights_and_x_of_different_dtypes(name, weights, of_x, autocast, hooked):
    """Output and gradients have eager's dtypes, and are at least as close to float64; called layers round as eager's."""
    x = torch.randn(4, 16, 9, 10, generator=torch.Generator().manual_seed(1)).to(of_x)
    ours, theirs, truth = mixed(name, weights)
    if hooked:
        for module in list(ours.modules())[1:]:
            module.register_forward_hook(lambda *_: None)
    exact = x.double().requires_grad_()
    want = truth(exact)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    want.backward(grad)
    results = []
    for block in (ours, theirs):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=autocast):
            out = block(given)
        out.backward(grad.to(out.dtype))
        assert all(p.grad.dtype == weights for p in block.parameters())
        results.append((out, given.grad))
    for (got, of_eager), exactly in zip(zip(*results, strict=True), (want, exact.grad), strict=True):
        assert got.dtype == of_eager.dtype == of_x
        assert error(got, exactly) <= error(of_eager, exactly) * (1.1 if hooked else 1)


@pytest.mark.parametrize("mode", ["embedded_gaussian", "gaussian", "dot_product", "concatenation"])
@pytest.mark.parametrize(("weights", "of_x", "autocast"), MIXTURES, ids=str)
def test_weights_and_x_of_different_dtypes_in_a_non_local_block(mode, weights, of_x, autocast):
    x = torch.randn(2, 16, 5, 6, generator=torch.Generator().manual_seed(1)).to(of_x)
    block = eager.randomise(NonLocalBlock(16, mode=mode).to(weights))
    want = copy.deepcopy(block).double()(x.double())
    with torch.autocast("cpu", dtype=autocast):
        out = block(x)
    assert out.dtype == of_x
    assert error(out, want) < (0.02 if autocast == torch.bfloat16 else 0.002)


def test_a_device_without_autocast():
    """Shapes alone have none, and torch raises when it is asked whether it is on."""
    x, weight = torch.empty(2, 8, 5, 6, device="meta"), torch.empty(8, device="meta")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention_pool(x, weight).shape == (2, 8)
        assert channel_fuse(x, torch.empty(2, 8, device="meta")).shape == x.shape


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_functions_with_weights_of_another_dtype(dtype, kernels):
    """A float32 x with 16-bit weights: as with the same weights in float32, and outside of autocast still an error."""
    x, weight = torch.randn(2, 8, 5, 6), torch.randn(8).to(dtype).requires_grad_()
    scale, shift = torch.randn(2, 8).to(dtype), torch.randn(2, 8).to(dtype)
    calls = (
        lambda cast: attention_pool(x, cast(weight)),
        lambda cast: attention_map(x, cast(weight)),
        lambda cast: channel_fuse(x, cast(scale), cast(shift)),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="must be float32 or x's dtype"):
            call(lambda tensor: tensor)
        with torch.autocast("cpu", dtype=dtype):
            out = call(lambda tensor: tensor)
        assert out.dtype == torch.float32
        assert torch.equal(out, call(torch.Tensor.float))
