"""A small block of each kind that takes a residual and a mask."""

from __future__ import annotations

import torch
from torch import nn

from gcnet_ext import (
    EffectiveSqueezeExcitation,
    EfficientChannelAttention,
    GlobalContextBlock,
    SimplifiedNonLocalBlock,
    SqueezeExcitation,
)

BLOCKS = {
    "gc": lambda **options: GlobalContextBlock(16, 1 / 4, fusion_types=("channel_mul", "channel_add"), **options),
    "se": lambda **options: SqueezeExcitation(16, 1 / 4, **options),
    "ese": lambda **options: EffectiveSqueezeExcitation(16, **options),
    "eca": lambda **options: EfficientChannelAttention(16, **options),
    "snl": lambda **options: SimplifiedNonLocalBlock(16, **options),
}


def randomised(block: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return block
