"""timm's EcaModule: which of them are replaced, and what is computed when one is changed later. The rest is in
test_replace.py."""

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
X = torch.randn(2, 16, 5, 6, generator=torch.Generator().manual_seed(0))


def eca(**options) -> nn.Module:
    return eager.randomise(imitations.library("timm.layers").EcaModule(16, **options))


@pytest.mark.parametrize(
    ("options", "why"),
    [({"use_mlp": True}, "it has two convolutions (use_mlp)"), ({"gate_layer": "hard_sigmoid"}, "its gate is ")],
    ids=str,
)
def test_what_is_left(options, why):
    model = nn.Sequential(eca(**options))
    want = model(X)
    report = replace_blocks(model)
    assert not report.replaced
    assert report.left["0"].startswith(why)
    assert torch.equal(model(X), want)


def test_a_class_derived_from_it_is_left():
    class Scaled(imitations.library("timm.layers").EcaModule):
        def forward(self, x):
            return 2 * super().forward(x)

    report = replace_blocks(nn.Sequential(Scaled(16)))
    assert report.left == {"0": "it is not exactly timm's EcaModule"}


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_any_kernel_size(kernel_size):
    block = eager.randomise(imitations.library("timm.layers").EcaModule(kernel_size=kernel_size))
    want = block(X)
    assert replace_blocks(nn.Sequential(block)).replaced
    assert torch.allclose(block(X), want, atol=1e-6)


def changed_gate(block):
    block.gate = nn.Tanh()


def changed_convolution(block):
    block.conv = nn.Conv1d(1, 1, 7, padding=3)


def hooked_gate(block):
    block.gate.register_forward_hook(lambda _module, _given, found: found / 2)


def hooked_convolution(block):
    block.conv.register_forward_hook(lambda _module, _given, found: found + 1)


@pytest.mark.parametrize("change", [changed_gate, changed_convolution, hooked_gate, hooked_convolution])
def test_a_later_change_counts(change):
    block = eca()
    replaced = copy.deepcopy(block)
    replace_blocks(nn.Sequential(replaced))
    for each in (block, replaced):
        torch.manual_seed(1)
        change(each)
    assert torch.allclose(replaced(X), block(X), atol=1e-6)


def test_copies_and_pickles():
    block = eca()
    want = block(X)
    replace_blocks(nn.Sequential(block))
    for each in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert isinstance(each, Peer)
        assert torch.allclose(each(X), want, atol=1e-6)
