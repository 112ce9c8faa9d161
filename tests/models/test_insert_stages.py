"""insert_blocks by stage in RegNets and ConvNeXts, of timm and torchvision themselves."""

from __future__ import annotations

import imitations
import pytest
import torch
from torch import nn

from gcnet_ext import GlobalContextBlock, insert_blocks

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
# The library, the net, its stages, the blocks that they have, and the channels of the last one.
NETS = {
    "timm regnetx_002": ("timm", "regnetx_002", (2, 3, 4), 12, 368),
    "timm convnext_atto": ("timm", "convnext_atto", (3,), 6, 160),
    "timm convnextv2_atto": ("timm", "convnextv2_atto", 4, 2, 320),
    "torchvision regnet_x_400mf": ("torchvision.models", "regnet_x_400mf", (1, 4), 13, 400),
    "torchvision convnext_tiny": ("torchvision.models", "convnext_tiny", (1, 2), 6, 192),
}


def made(name: str) -> nn.Module:
    library, net, *_ = NETS[name]
    module = imitations.real(library)
    return module.create_model(net, num_classes=5) if library == "timm" else module.get_model(net, num_classes=5)


@pytest.mark.parametrize("name", NETS)
def test_behind_each_residual_block(name):
    *_, stages, count, channels = NETS[name]
    net = made(name).eval()
    with torch.no_grad():
        want = net(X)
    names = insert_blocks(net, stages, position="after_add")
    assert len(names) == count
    found = [net.get_submodule(each) for each in names]
    assert all(isinstance(block, GlobalContextBlock) for block in found)
    assert found[-1].inplanes == channels
    with torch.no_grad():
        assert torch.allclose(net(X), want, rtol=1e-4, atol=1e-5), "a block that adds starts as the identity"
    net.train()(X).square().sum().backward()
    assert all(parameter.grad is not None for block in found for parameter in block.parameters())


@pytest.mark.parametrize("name", ["timm regnetx_002", "torchvision convnext_tiny"])
def test_inside_their_residual_blocks_is_refused(name):
    net = made(name)
    with pytest.raises(ValueError, match=r"position 'after_conv3' needs torchvision's or timm's BasicBlock .*after_add"):
        insert_blocks(net, (2,))
    assert not any(isinstance(part, GlobalContextBlock) for part in net.modules())


def test_a_net_without_stages_is_told_three_modules():
    models = imitations.real("torchvision.models")
    with pytest.raises(
        ValueError, match=r"stages must be numbers from 1 to 4 of stages of the model.*pass modules=\['\S+', '\S+', '\S+'\]"
    ):
        insert_blocks(models.mobilenet_v3_small(), (2,))
