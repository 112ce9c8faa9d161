"""SimplifiedNonLocalBlock against the block in eager PyTorch, in float64 and with random parameters."""

from __future__ import annotations

import eager
import grid
import pytest
import torch
from grid import Case, Random
from test_global_context_block import check, gradcheck_module
from torch import nn

from gcnet_ext import SimplifiedNonLocalBlock


def pair(backend, channels: int):
    truth = eager.randomise(eager.SimplifiedNonLocal(channels))
    block = SimplifiedNonLocalBlock(channels, device=backend.device)
    block.load_state_dict(truth.state_dict(), strict=True)
    return block, truth.double()


@pytest.mark.parametrize("layout", grid.EVERY_LAYOUT)
@pytest.mark.parametrize("dtype", grid.FLOATING, ids=str)
def test_dtypes_and_layouts(backend, dtype, layout):
    check(*pair(backend, 16), Random(1, backend.to).feature_map((2, 16, 5, 7), dtype, layout))


@pytest.mark.parametrize(
    "case",
    [case for case in grid.distinct(grid.sizes(), pooling="att", fusion="add", hidden=4) if case.shape[1] <= 100],
    ids=str,
)
def test_sizes(backend, case: Case):
    check(*pair(backend, case.shape[1]), Random(1, backend.to).feature_map(case.shape, case.dtype, case.layout), 600)


@pytest.mark.parametrize("layout", grid.LAYOUTS)
def test_gradcheck(backend, layout):
    block = pair(backend, 4)[0].double()
    x = Random(1, backend.to).feature_map((2, 4, 3, 2), torch.float64, layout).requires_grad_()
    assert gradcheck_module(block, x)


@pytest.mark.parametrize("change", ["hook", "mask", "transform"])
def test_a_submodule_that_is_not_the_plain_layer(backend, change):
    block, truth = pair(backend, 16)
    for module in (block, truth):
        if change == "hook":
            module.conv_out.register_forward_hook(lambda _module, _args, out: 2 * out)
        elif change == "mask":
            module.conv_mask = nn.Sequential(module.conv_mask, nn.Tanh())
        else:
            module.conv_out = nn.Sequential(module.conv_out, nn.Tanh())
    check(block, truth, Random(1, backend.to).feature_map((2, 16, 5, 5), torch.float32))


@pytest.mark.parametrize("spatial", [(20,), (4, 5), (2, 2, 5)], ids=str)
def test_any_number_of_spatial_dimensions(backend, spatial):
    check(*pair(backend, 16), Random(1, backend.to).feature_map((2, 16, *spatial), torch.float32))


def test_attention_map(backend):
    block, truth = pair(backend, 16)
    x = Random(1, backend.to).feature_map((2, 16, 5, 6), torch.float32)
    want = truth.conv_mask(x.cpu().double()).flatten(1).softmax(1).reshape(2, 5, 6)
    grid.assert_close(block.attention_map(x), want.detach(), torch.float32)
    block.conv_mask = nn.Sequential(block.conv_mask)  # called as a module
    grid.assert_close(block.attention_map(x), want.detach(), torch.float32)


def test_starts_as_the_identity(backend):
    x = Random(1, backend.to).feature_map((2, 16, 5, 5), torch.float32)
    assert torch.equal(SimplifiedNonLocalBlock(16, device=backend.device)(x), x)


def test_names_and_shapes():
    shapes = {name: tuple(tensor.shape) for name, tensor in SimplifiedNonLocalBlock(8).state_dict().items()}
    assert shapes == {
        "conv_mask.weight": (1, 8, 1, 1),
        "conv_mask.bias": (1,),
        "conv_out.weight": (8, 8, 1, 1),
        "conv_out.bias": (8,),
    }


def test_wrong_input():
    with pytest.raises(RuntimeError, match=r"x must have 16 channels \(inplanes\), got shape \[2, 8, 4, 4\]"):
        SimplifiedNonLocalBlock(16)(torch.ones(2, 8, 4, 4))
