"""Compiled kernels for squeeze-excitation, the Global Context block and their family: forward, backward, on CPU and GPU."""

from ._version import __version__
from .blocks import (
    EffectiveSqueezeExcitation,
    EfficientChannelAttention,
    GlobalContextBlock,
    GlobalResponseNorm,
    NonLocalBlock,
    SimplifiedNonLocalBlock,
    SqueezeExcitation,
)
from .models import Report, freeze, insert_blocks, replace_blocks, timm_layer, to_peer_state_dict, to_plain
from .ops._dispatch import decompositions
from .ops._switch import plain
from .ops._transform import Branch
from .ops.attention_pool import attention_map, attention_pool
from .ops.channel_fuse import channel_fuse
from .ops.global_context import global_context
from .ops.global_response_norm import global_response_norm

__all__ = [
    "Branch",
    "EffectiveSqueezeExcitation",
    "EfficientChannelAttention",
    "GlobalContextBlock",
    "GlobalResponseNorm",
    "NonLocalBlock",
    "Report",
    "SimplifiedNonLocalBlock",
    "SqueezeExcitation",
    "__version__",
    "attention_map",
    "attention_pool",
    "channel_fuse",
    "decompositions",
    "freeze",
    "global_context",
    "global_response_norm",
    "insert_blocks",
    "plain",
    "replace_blocks",
    "timm_layer",
    "to_peer_state_dict",
    "to_plain",
]
