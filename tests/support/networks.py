"""Networks with residual blocks, of the libraries (or imitations of them) and somebody's own."""

from __future__ import annotations

import imitations
import torch
from torch import nn

from gcnet_ext import GlobalContextBlock, NonLocalBlock, SimplifiedNonLocalBlock, SqueezeExcitation

KINDS = {"gc": GlobalContextBlock, "se": SqueezeExcitation, "snl": SimplifiedNonLocalBlock, "nl": NonLocalBlock}
X = torch.randn(2, 16, 6, 7, generator=torch.Generator().manual_seed(0))


def library_of(name: str):
    """The module of residual blocks; torchvision's may be an imitation."""
    path = f"{name}.models.resnet"
    return imitations.library(path) if name == "torchvision" else imitations.real(path)


def residual(library: str = "torchvision", kind: str = "BasicBlock", channels: int = 16, **options) -> nn.Module:
    found = getattr(library_of(library), kind)
    return found(channels, channels // found.expansion, **options)


class ResNet(nn.Module):
    """Four stages of two residual blocks."""

    def __init__(self, library: str = "torchvision", kind: str = "BasicBlock", **options) -> None:
        super().__init__()
        for stage in (1, 2, 3, 4):
            self.add_module(f"layer{stage}", nn.Sequential(*(residual(library, kind, **options) for _ in range(2))))

    def forward(self, x):
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class Own(nn.Module):
    """A residual block of somebody's own, with the usual names."""

    def __init__(self, channels: int = 16, norm=nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), norm(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), norm(channels)

    def forward(self, x):
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


class OwnNet(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.layer2 = nn.Sequential(Own(**options), Own(**options))

    def forward(self, x):
        return self.layer2(x)


def randomise(model: nn.Module, only: str = "") -> nn.Module:
    """Weights and statistics of order one; those whose name has this in it."""
    torch.manual_seed(0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if only in name and tensor.is_floating_point():
            with torch.no_grad():
                tensor.normal_(0, tensor[0].numel() ** -0.5) if tensor.dim() > 1 else tensor.uniform_(0.5, 1.5)
    return model
