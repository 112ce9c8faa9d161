"""Blocks in the models that people have: replaced, inserted, and their state dicts."""

from .freeze import freeze
from .insert import insert_blocks
from .plain import to_plain
from .replace import replace_blocks
from .report import Report
from .state_dict import to_peer_state_dict
from .timm_layer import timm_layer

__all__ = ["Report", "freeze", "insert_blocks", "replace_blocks", "timm_layer", "to_peer_state_dict", "to_plain"]
