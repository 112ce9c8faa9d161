"""What of a block of another library an operator can compute, and what keeps it from computing the rest."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..blocks import _layers
from ..blocks._fused import Layers, PlainBranch, bottleneck, layers, one_layer
from .skeleton import (
    Bottleneck,
    Folded,
    Skeleton,
    calls_its_layers,
    does_nothing_else,
    gate_of,
    is_batch_norm,
    is_folded,
    is_layer_norm,
    kind_of_activation,
    kind_of_gate,
)


def plain_layers(skeleton: Skeleton) -> Layers | None:
    """The layers, all of them plain, for the operator."""
    gate = gate_of(skeleton.gate)
    scale, shift = (None if branch is None else _plain_branch(branch) for branch in (skeleton.scale, skeleton.shift))
    found = None if gate is None else layers(skeleton.mask, scale, shift, gate)
    return None if found is None else found._replace(modules=tuple(skeleton.modules()))


def _plain_branch(branch: Bottleneck) -> PlainBranch | None:
    if branch.last is None:
        return one_layer(branch.first)
    kind = kind_of_activation(branch.activation)
    if kind is None:
        return None
    if is_folded(branch.norm):
        return bottleneck(Folded(branch.first, branch.norm), None, kind, branch.last)
    return bottleneck(branch.first, branch.norm, kind, branch.last)


def why_left(skeleton: Skeleton) -> str:
    """Why nothing of the block can be computed by an operator; empty where something can."""
    for idle in skeleton.idle:
        if not does_nothing_else(idle):
            return f"its {_described(idle)} {'must be called' if _is_hooked(idle) else 'has no counterpart in ours'}"
    if skeleton.scale is not None and kind_of_gate(skeleton.gate) is None:
        return f"its gate is {_described(skeleton.gate)}, not a sigmoid or a hard sigmoid"
    if skeleton.mask is not None and not isinstance(skeleton.mask, _layers.CONVOLUTIONS.get(skeleton.dims, ())):
        return f"its layer {_described(skeleton.mask)} is not a convolution of torch"
    kind: Any = nn.Linear if skeleton.linear else _layers.CONVOLUTIONS[skeleton.dims]
    for layer in skeleton.layers():
        if not isinstance(layer, kind):
            return f"its layer {_described(layer)} is not a {'linear layer' if skeleton.linear else 'convolution'} of torch"
    return ""


def _is_plain_layer(layer: nn.Module, skeleton: Skeleton) -> bool:
    """Whether the module is what the layers of the branches are, and nothing else: linear, or a 1x1 convolution."""
    return _layers.is_plain(layer, nn.Linear) if skeleton.linear else _layers.is_pointwise(layer, skeleton.dims)


def why_called(skeleton: Skeleton) -> str:
    """What keeps the operator from computing the whole block, and must be called; empty where nothing does."""
    if skeleton.mask is not None and not _layers.is_pointwise(skeleton.mask, skeleton.dims):
        return f"its mask {_described(skeleton.mask)}"
    for branch in skeleton.branches():
        between = (branch.first, branch.norm, branch.activation, branch.last)
        for layer in (branch.first, branch.last):
            if layer is not None and not _is_plain_layer(layer, skeleton):
                return f"its layer {_described(layer)}"
        for container in branch.called:
            if all(container is not part for part in between) and not calls_its_layers(container):
                return f"its {_described(container)}"
        for idle in branch.idle:
            if not does_nothing_else(idle):
                return f"its {_described(idle)}"
        if branch.norm is not None and not is_folded(branch.norm) and not is_layer_norm(branch.norm, skeleton.dims):
            return f"its norm {_described(branch.norm)}{' in training' if is_batch_norm(branch.norm) else ''}"
        if branch.last is not None and kind_of_activation(branch.activation) is None:
            return f"its activation {_described(branch.activation)}"
    if skeleton.scale is not None and gate_of(skeleton.gate) is None:
        return f"its gate {_described(skeleton.gate)}"
    return "" if plain_layers(skeleton) is not None else "its branches have different norms or activations"


def _is_hooked(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in _layers.HOOKS)


def _described(module: nn.Module | None) -> str:
    return f"{type(module).__name__}{' with a hook' if module is not None and _is_hooked(module) else ''}"
