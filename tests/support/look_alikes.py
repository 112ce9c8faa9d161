"""A block as somebody has pasted it into a project, and the input of its tests."""

from __future__ import annotations

import eager
import imitations
import torch

X = torch.randn(2, 16, 5, 4, generator=torch.Generator().manual_seed(0))


class Pasted(eager.ContextBlock):
    def __init__(self) -> None:
        super().__init__(16, 1 / 4, "att", ("channel_add", "channel_mul"))


class Scaled(Pasted):
    """A number and a switch that may be set later."""

    def __init__(self) -> None:
        super().__init__()
        self.strength, self.enabled, self.mode = 1.0, True, "full"

    def forward(self, x):
        out = super().forward(x) if self.enabled else x
        return x + self.strength * (out - x) if self.mode == "full" else out.relu()


def timm_se(**options):
    return imitations.library("timm.layers").SEModule(16, rd_ratio=1 / 4, rd_divisor=1, **options)
