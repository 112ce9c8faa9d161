"""What a user would run instead of the compiled kernels: the block in plain PyTorch, twice."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Eager(nn.Module):
    """The block as every Python implementation writes it; state dict of `gcnet_ext.GlobalContextBlock`."""

    def __init__(self, channels: int, hidden: int, fusions: tuple[str, ...]) -> None:
        super().__init__()
        self.conv_mask = nn.Conv2d(channels, 1, 1)

        def branch(fusion: str) -> nn.Sequential | None:
            if fusion not in fusions:
                return None
            layers = nn.Conv2d(channels, hidden, 1), nn.LayerNorm([hidden, 1, 1]), nn.ReLU(inplace=True)
            return nn.Sequential(*layers, nn.Conv2d(hidden, channels, 1))

        self.channel_add_conv = branch("channel_add")
        self.channel_mul_conv = branch("channel_mul")

    def forward(self, x: Tensor) -> Tensor:
        samples, channels = x.shape[:2]
        attention = self.conv_mask(x).reshape(samples, 1, -1).softmax(2).unsqueeze(-1)
        context = torch.matmul(x.reshape(samples, 1, channels, -1), attention).view(samples, channels, 1, 1)
        out = x
        if self.channel_mul_conv is not None:
            out = out * torch.sigmoid(self.channel_mul_conv(context))
        if self.channel_add_conv is not None:
            out = out + self.channel_add_conv(context)
        return out


class Rewrite(nn.Module):
    """The same maths without a convolution or a matmul over x: what torch.compile handles best."""

    def __init__(self, channels: int, hidden: int, fusions: tuple[str, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels) / channels**0.5)
        self.bias = nn.Parameter(torch.zeros(1))

        def branch(fusion: str) -> nn.Sequential | None:
            if fusion not in fusions:
                return None
            return nn.Sequential(nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, channels))

        self.add = branch("channel_add")
        self.mul = branch("channel_mul")

    def forward(self, x: Tensor) -> Tensor:
        samples, channels, height, width = x.shape
        logits = (x * self.weight.view(1, -1, 1, 1)).sum(1, dtype=torch.float32) + self.bias
        attention = logits.flatten(1).softmax(1).view(samples, 1, height, width)
        context = (x * attention).sum((2, 3), dtype=torch.float32).to(x.dtype)
        out = x
        if self.mul is not None:
            out = out * torch.sigmoid(self.mul(context)).view(samples, channels, 1, 1)
        if self.add is not None:
            out = out + self.add(context).view(samples, channels, 1, 1)
        return out
