"""The blocks as nn.Modules: one file each, and `_layers` for what they share."""

from .effective_squeeze_excitation import EffectiveSqueezeExcitation
from .efficient_channel_attention import EfficientChannelAttention
from .global_context import GlobalContextBlock
from .global_response_norm import GlobalResponseNorm
from .non_local import NonLocalBlock
from .simplified_non_local import SimplifiedNonLocalBlock
from .squeeze_excitation import SqueezeExcitation

__all__ = [
    "EffectiveSqueezeExcitation",
    "EfficientChannelAttention",
    "GlobalContextBlock",
    "GlobalResponseNorm",
    "NonLocalBlock",
    "SimplifiedNonLocalBlock",
    "SqueezeExcitation",
]
