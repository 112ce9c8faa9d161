"""EffectiveSqueezeExcitation against the formula of the paper in float64, with random parameters."""

from __future__ import annotations

import eager
import grid
import pytest
import torch
from grid import Random
from test_global_context_block import check, gradcheck_module
from torch import nn

from gcnet_ext import EffectiveSqueezeExcitation

GATES = ("sigmoid", "hard_sigmoid")


def pair(backend, channels: int, gate: str = "hard_sigmoid", **options):
    """Our block, and that of the paper in float64 with the same weights."""
    truth = eager.randomise(eager.EffectiveSqueezeExcitation(channels, gate))
    block = EffectiveSqueezeExcitation(channels, gate, device=backend.device, **options)
    block.load_state_dict(truth.state_dict(), strict=True)
    return block, truth.double()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("layout", grid.EVERY_LAYOUT)
@pytest.mark.parametrize("dtype", grid.FLOATING, ids=str)
def test_dtypes_and_layouts(backend, dtype, layout, gate):
    check(*pair(backend, 16, gate), Random(1, backend.to).feature_map((2, 16, 5, 7), dtype, layout))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 5), (2, 3, 1, 1), (2, 7, 3, 4, 2), (1, 130, 6, 6)], ids=str)
def test_sizes(backend, shape):
    check(*pair(backend, shape[1]), Random(1, backend.to).feature_map(shape, torch.float32, "contiguous"), 400)


@pytest.mark.parametrize("gate", GATES)
def test_gradcheck(backend, gate):
    block = pair(backend, 4, gate)[0].double()
    x = Random(1, backend.to).feature_map((2, 4, 3, 2), torch.float64, "contiguous").requires_grad_()
    assert gradcheck_module(block, x)


def test_the_gate_of_onnx(backend):
    """A slope of 0.2 in place of 1/6."""
    block, truth = pair(backend, 8, gate_alpha=0.2)
    x = Random(1, backend.to).feature_map((2, 8, 4, 6), torch.float32, "contiguous")
    t = x.cpu().double().mean((2, 3)) @ truth.fc.weight.flatten(1).T + truth.fc.bias
    grid.assert_close(block(x), x.cpu().double() * (0.2 * t + 0.5).clamp(0, 1)[:, :, None, None].detach(), torch.float32)


def test_a_changed_layer_is_called(backend):
    block = pair(backend, 8)[0]
    seen = []
    block.fc.register_forward_hook(lambda _module, given, _found: seen.append(tuple(given[0].shape)))
    block(Random(1, backend.to).normal(3, 8, 2, 2))
    block.fc = nn.utils.parametrizations.weight_norm(block.fc)
    block(Random(1, backend.to).normal(3, 8, 2, 2))
    assert seen == [(3, 8, 1, 1)] * 2


def test_keys_of_hgnet():
    """Its layer has another name, and a linear layer another shape."""
    weight, bias = torch.randn(8, 8, 1, 1), torch.randn(8)
    block = EffectiveSqueezeExcitation(8, "sigmoid")
    block.load_state_dict({"conv.weight": weight, "conv.bias": bias}, strict=True)
    assert torch.equal(block.fc.weight, weight)
    block.load_state_dict({"fc.weight": 2 * weight.flatten(1), "fc.bias": bias}, strict=True)
    assert torch.equal(block.fc.weight, 2 * weight)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0,), "channels must be at least 1, got 0"),
        ((8.5,), "channels must be a whole number, got 8.5"),
        ((8, "tanh"), r"gate must be one of \('sigmoid', 'hard_sigmoid'\), got 'tanh'"),
    ],
    ids=str,
)
def test_what_is_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        EffectiveSqueezeExcitation(*arguments)


def test_wrong_inputs(backend):
    block = pair(backend, 8)[0]
    with pytest.raises(RuntimeError, match=r"x must have 8 channels \(inplanes\), got shape \[2, 4, 8\]; .*movedim"):
        block(Random(1, backend.to).normal(2, 4, 8))
    with pytest.raises(TypeError, match="x must be a Tensor"):
        block(None)
