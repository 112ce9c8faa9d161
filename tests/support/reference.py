"""The operators in plain PyTorch, by the names of their public functions: the truth of the tests."""

from __future__ import annotations

from gcnet_ext.ops import _transform
from gcnet_ext.ops import attention_pool as pool
from gcnet_ext.ops import channel_fuse as fuse
from gcnet_ext.ops import global_context as block
from gcnet_ext.ops._precision import accumulation_dtype

attention_pool, attention_map = pool.reference, pool.reference_map
channel_fuse = fuse.reference
global_context = block.reference
branch = _transform.branch

__all__ = ["accumulation_dtype", "attention_map", "attention_pool", "branch", "channel_fuse", "global_context"]
