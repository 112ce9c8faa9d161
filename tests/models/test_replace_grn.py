"""timm's GlobalResponseNorm: what is computed after it was replaced, and what is left."""

from __future__ import annotations

import copy
import pickle

import eager
import imitations
import pytest
import torch
from torch import nn

from gcnet_ext import replace_blocks
from gcnet_ext.models.peer import Peer

pytestmark = pytest.mark.usefixtures("libraries")


def grn(**options) -> nn.Module:
    return eager.randomise(imitations.library("timm.layers.grn").GlobalResponseNorm(16, **options)).double()


def feature_map(channels_last: bool) -> torch.Tensor:
    shape = (2, 5, 6, 16) if channels_last else (2, 16, 5, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def results(block: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    out = block(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [x, *block.parameters()])]


@pytest.mark.parametrize("channels_last", [False, True])
def test_outputs_and_gradients_stay(channels_last, monkeypatch):
    block = grn(channels_last=channels_last)
    x = feature_map(channels_last)
    want = results(copy.deepcopy(block), x)
    report = replace_blocks(nn.Sequential(block))
    assert list(report.replaced) == ["0"]
    assert not report.left
    monkeypatch.setattr(Peer, "_as_before", None)
    for got, expected in zip(results(block, x), want, strict=True):
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-10)


def another_eps(block):
    block.eps = 0.5


def another_place(block):
    block.spatial_dim = (2, 3)


@pytest.mark.parametrize("change", [another_eps, another_place])
def test_a_later_change_counts(change):
    block = grn()
    replaced = copy.deepcopy(block)
    replace_blocks(nn.Sequential(replaced))
    x = feature_map(True)
    before = replaced(x)
    for each in (block, replaced):
        change(each)
    assert torch.allclose(replaced(x), block(x))
    assert not torch.allclose(replaced(x), before)


def test_what_is_left():
    class Scaled(imitations.library("timm.layers.grn").GlobalResponseNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    odd = grn()
    odd.spatial_dim = (1, 3)
    report = replace_blocks(nn.Sequential(Scaled(16), odd))
    assert report.left == {
        "0": "it is not exactly timm's GlobalResponseNorm",
        "1": "its dimensions are not those that timm's constructor sets",
    }


@pytest.mark.parametrize("change", [lambda x: x[0], lambda x: x.bfloat16()], ids=["no batch", "another dtype"])
def test_other_inputs_go_to_the_former_forward(change):
    block = grn(channels_last=False)
    replaced = copy.deepcopy(block)
    replace_blocks(nn.Sequential(replaced))
    x = change(feature_map(False))
    try:
        want = block(x)
    except (RuntimeError, IndexError) as error:
        with pytest.raises(type(error)):
            replaced(x)
    else:
        assert torch.equal(replaced(x), want)


def test_copies_and_pickles():
    block = grn()
    x = feature_map(True)
    want = block(x)
    replace_blocks(nn.Sequential(block))
    for each in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert isinstance(each, Peer)
        assert torch.allclose(each(x), want)


def test_a_net_of_timm():
    timm = imitations.real("timm")
    net = timm.create_model("convnextv2_atto", num_classes=10).eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    eager.randomise(nn.ModuleList(part for part in net.modules() if type(part).__name__ == "GlobalResponseNorm"))
    with torch.no_grad():
        want = net(x)
        report = replace_blocks(net)
        assert len(report.replaced) == 12
        assert not report.left
        assert torch.allclose(net(x), want, rtol=1e-3, atol=1e-4)
