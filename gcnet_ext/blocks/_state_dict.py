"""The names and shapes that other libraries give to the parameters of a block: accepted by load_state_dict, and given back.

A name is the start of a key, below the prefix of the block: "conv_attn" stands for "conv_attn.weight" and "conv_attn.bias".
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import nn

# Theirs -> ours.
GLOBAL_CONTEXT = {  # timm's GlobalContext; mmcv's names are ours
    "conv_attn": "conv_mask",
    **{
        f"mlp_{theirs}.{layer}": f"channel_{ours}_conv.{index}"
        for theirs, ours in (("add", "add"), ("scale", "mul"))
        for layer, index in (("fc1", 0), ("norm", 1), ("fc2", 3))
    },
}
SQUEEZE_EXCITATION = {  # two Linear layers in a Sequential, as in SENet; timm's EfficientNet; torchvision's names are ours
    "fc.0": "fc1",
    "fc.2": "fc2",
    "conv_reduce": "fc1",
    "conv_expand": "fc2",
}
EFFECTIVE_SQUEEZE_EXCITATION = {"conv": "fc"}  # timm's HGNets; timm's EffectiveSEModule and RTMDet have our names
GLOBAL_RESPONSE_NORM = {"gamma": "weight", "beta": "bias"}  # the original's; timm's names are ours
NON_LOCAL = {"g.0.conv": "g.conv", "phi.0.conv": "phi.conv"}  # mmcv's with sub_sample


def renamed(key: str, names: Mapping[str, str]) -> str:
    """The key with the other name, if it has one of these."""
    for theirs, ours in names.items():
        if key == theirs or key.startswith(theirs + "."):
            return ours + key[len(theirs) :]
    return key


def _without_ones(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in sizes if size != 1)


def accept(names: Mapping[str, str], module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    """A load_state_dict pre-hook: renames keys of other libraries and reshapes tensors to ours.

    The shapes differ only in sizes of 1: LayerNorm weights (P,) or (P, 1, 1), Conv1d, Conv2d, Conv3d and Linear weights.
    """
    own = module.state_dict(keep_vars=True)
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = renamed(key.removeprefix(prefix), names)
        value = state_dict.pop(key)
        target = own.get(name)
        if target is not None and value.shape != target.shape and _without_ones(value.shape) == _without_ones(target.shape):
            value = value.reshape(target.shape)
        state_dict[prefix + name] = value
