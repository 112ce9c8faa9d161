"""What torch.utils.flop_counter counts for the compiled block is what it counts for the block in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import eager
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gcnet_ext import GlobalContextBlock, SimplifiedNonLocalBlock, SqueezeExcitation
from gcnet_ext.blocks._fused import FusedBlock, parameter
from gcnet_ext.ops import global_context

pytestmark = pytest.mark.usefixtures("kernels")


def flops(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, backward: bool) -> int:
    with FlopCounterMode(display=False) as counter:
        out = function(x)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


def fused(block: FusedBlock) -> Callable[[torch.Tensor], torch.Tensor]:
    """The one operator of the block. The counter has hooks of all modules, with which a block itself calls its submodules."""
    layers = block._plain_layers()
    weights = [[parameter(*source) for source in sources] for sources in layers.weights]

    def call(x: torch.Tensor) -> torch.Tensor:
        return global_context.with_lists(x, weights, None, None, layers.options, inplace=False)

    return call


def x(requires_grad: bool = True) -> torch.Tensor:
    return torch.randn(2, 16, 6, 5, requires_grad=requires_grad)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("fusion", [("channel_mul",), ("channel_add",), ("channel_add", "channel_mul")], ids="-".join)
@pytest.mark.parametrize("pooling", ["att", "avg"])
def test_global_context(pooling, fusion, backward):
    ours, theirs = (kind(16, 1 / 4, pooling, fusion) for kind in (GlobalContextBlock, eager.ContextBlock))
    want = flops(theirs, x(), backward)
    assert flops(fused(ours), x(), backward) == flops(ours, x(), backward) == want > 0


@pytest.mark.parametrize("frozen", ["x", "mask", "mul", "all parameters"])
def test_what_needs_no_gradient_is_not_counted(frozen):
    ours, theirs = (kind(16, 1 / 4, "att", ("channel_mul",)) for kind in (GlobalContextBlock, eager.ContextBlock))
    for module in (ours, theirs):
        if frozen == "mask":
            module.conv_mask.requires_grad_(False)
        elif frozen == "mul":
            module.channel_mul_conv.requires_grad_(False)
        elif frozen != "x":
            module.requires_grad_(False)
    want = flops(theirs, x(frozen != "x"), True)
    assert flops(fused(ours), x(frozen != "x"), True) == flops(ours, x(frozen != "x"), True) == want


@pytest.mark.parametrize("backward", [False, True])
def test_the_family(backward):
    pairs = [
        (SqueezeExcitation(16, 1 / 4), eager.SqueezeExcitation(16, 4)),
        (SimplifiedNonLocalBlock(16), eager.SimplifiedNonLocal(16)),
    ]
    for ours, theirs in pairs:
        want = flops(theirs, x(), backward)
        assert flops(fused(ours), x(), backward) == flops(ours, x(), backward) == want > 0
