"""What the blocks of other libraries consist of, by their classes and by the names of their submodules.

A class is known if its library is loaded. No library is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from .._torch import children
from ..blocks._layers import CONVOLUTIONS
from . import look_alikes
from .skeleton import Bottleneck, Left, Skeleton, is_batch_norm, is_original


def _dims_of(layer: nn.Module) -> int:
    """The spatial dimensions of a convolution. isinstance is used because parametrization makes a subclass of torch's class."""
    for dims, kind in CONVOLUTIONS.items():
        if isinstance(layer, kind):
            return dims
    raise Left(f"its {type(layer).__name__} is not a convolution of torch")


def _sequential(branch: nn.Module | None) -> Bottleneck | None:
    """The branch of the reference implementation: conv, LayerNorm, activation, conv."""
    if branch is None:
        return None
    if not isinstance(branch, nn.Sequential) or len(branch) != 4 or not isinstance(branch[1], nn.LayerNorm):
        raise Left("its channel_add_conv or channel_mul_conv is not conv, LayerNorm, activation, conv")
    return Bottleneck((branch,), *branch)


def _global_context(
    mask: nn.Module | None,
    scale: Bottleneck | None,
    shift: Bottleneck | None,
    gate: nn.Module | None = None,
    idle: tuple[nn.Module, ...] = (),
) -> Skeleton:
    branch = scale or shift
    if branch is None:
        raise Left("it has neither of the fusions")
    return Skeleton(_dims_of(branch.first), mask, scale, shift, gate, idle)


def _of_sequentials(block: Any, idle: tuple[nn.Module, ...]) -> Skeleton:
    scale, shift = _sequential(block.channel_mul_conv), _sequential(block.channel_add_conv)
    return _global_context(getattr(block, "conv_mask", None), scale, shift, idle=idle)


def context_block(block: Any) -> Skeleton:
    """mmcv's ContextBlock."""
    if getattr(children(block).get("softmax"), "dim", 2) not in (2, -1):
        raise Left("its softmax is not one over positions")
    if (block.pooling_type == "att") != ("conv_mask" in children(block)):
        raise Left(f"its pooling_type is {block.pooling_type!r}, and its layers are for another")
    idle = (children(block).get(name) for name in ("softmax", "avg_pool"))
    return _of_sequentials(block, tuple(part for part in idle if part is not None))


PARTS = ("conv_mask", "channel_add_conv", "channel_mul_conv")


def snippet(block: Any) -> Skeleton:
    """The block of the paper as many repositories hold it."""
    idle = (part for name, part in children(block).items() if part is not None and name not in PARTS)
    return _of_sequentials(block, tuple(idle))


def timm_global_context(block: Any) -> Skeleton:
    """timm's GlobalContext."""

    def branch(mlp: Any) -> Bottleneck | None:
        if mlp is None:
            return None
        if mlp.drop.p != 0 or not isinstance(mlp.norm, nn.LayerNorm):
            raise Left("its ConvMlp has a dropout or a norm that is not a LayerNorm")
        return Bottleneck((mlp,), mlp.fc1, mlp.norm, mlp.act, mlp.fc2, (mlp.drop,))

    return _global_context(block.conv_attn, branch(block.mlp_scale), branch(block.mlp_add), block.gate)


def _squeeze_excitation(
    first: nn.Module, activation: nn.Module, last: nn.Module, gate: nn.Module, *idle: nn.Module
) -> Skeleton:
    branch = Bottleneck((first, activation, last), first, None, activation, last)
    return Skeleton(_dims_of(first), None, branch, None, gate, idle)


MAX_POOLED = "it adds a max-pooling to the average"


def timm_squeeze_excitation(block: Any) -> Skeleton:
    """timm's SEModule."""
    if block.add_maxpool:
        raise Left(MAX_POOLED)
    if type(block.bn) is nn.Identity:
        return _squeeze_excitation(block.fc1, block.act, block.fc2, block.gate, block.bn)
    if not is_batch_norm(block.bn):
        raise Left(f"it has a {type(block.bn).__name__} between its layers")
    branch = Bottleneck((block.fc1, block.bn, block.act, block.fc2), block.fc1, block.bn, block.act, block.fc2)
    return Skeleton(_dims_of(block.fc1), None, branch, None, block.gate)


def timm_squeeze_excite(block: Any) -> Skeleton:
    """The SqueezeExcite of timm's EfficientNets and MobileNets."""
    return _squeeze_excitation(block.conv_reduce, block.act1, block.conv_expand, block.gate)


def _effective(layer: nn.Module, gate: nn.Module) -> Skeleton:
    return Skeleton(_dims_of(layer), None, Bottleneck((layer,), layer), None, gate)


def timm_effective(block: Any) -> Skeleton:
    """timm's EffectiveSEModule."""
    if block.add_maxpool:
        raise Left(MAX_POOLED)
    return _effective(block.fc, block.gate)


def hgnet_effective(block: Any) -> Skeleton:
    """The EseModule of timm's HGNets."""
    return _effective(block.conv, block.sigmoid)


def senet_squeeze_excitation(block: Any) -> Skeleton:
    """The SEModule of timm's SENets."""
    return _squeeze_excitation(block.fc1, block.relu, block.fc2, block.sigmoid)


def torchvision_squeeze_excitation(block: Any) -> Skeleton:
    """torchvision's SqueezeExcitation."""
    return _squeeze_excitation(block.fc1, block.activation, block.fc2, block.scale_activation, block.avgpool)


class Reader(NamedTuple):
    """How a kind of block is read."""

    read: Callable[[Any], Skeleton]
    decisive: tuple[str, ...] = ()
    """Attributes of the block that decide what it computes."""
    keys: str = "mmcv"
    """The library whose names the state dict has."""


READERS: dict[str, Reader] = {
    "mmcv ContextBlock": Reader(context_block, ("pooling_type",), "mmcv"),
    "timm GlobalContext": Reader(timm_global_context, (), "timm"),
    "timm SEModule": Reader(timm_squeeze_excitation, ("add_maxpool",), "timm"),
    "timm SqueezeExcite": Reader(timm_squeeze_excite, (), "timm"),
    "timm EffectiveSEModule": Reader(timm_effective, ("add_maxpool",), "timm"),
    "timm HGNet EseModule": Reader(hgnet_effective, (), "timm"),
    "timm SENet SEModule": Reader(senet_squeeze_excitation, (), "timm"),
    "torchvision SqueezeExcitation": Reader(torchvision_squeeze_excitation, (), "torchvision"),
    "snippet": Reader(snippet, (), "mmcv"),
    "global context": Reader(look_alikes.global_context, (), "timm"),
    "squeeze-excitation": Reader(look_alikes.squeeze_excitation, (), "torchvision"),
}
CLASSES: dict[tuple[str, str], str] = {
    ("mmcv.cnn", "ContextBlock"): "mmcv ContextBlock",
    ("timm.layers", "GlobalContext"): "timm GlobalContext",
    ("timm.layers", "SEModule"): "timm SEModule",
    ("timm.layers", "EffectiveSEModule"): "timm EffectiveSEModule",
    ("timm.models._efficientnet_blocks", "SqueezeExcite"): "timm SqueezeExcite",
    ("timm.models.hgnet", "EseModule"): "timm HGNet EseModule",
    ("timm.models.senet", "SEModule"): "timm SENet SEModule",
    ("torchvision.ops", "SqueezeExcitation"): "torchvision SqueezeExcitation",
}
NON_LOCAL = ("NonLocal1d", "NonLocal2d", "NonLocal3d")


def _class_of(module: nn.Module, library: str, name: str) -> type[nn.Module] | None:
    """The class of that name in a library that is loaded, if the module is an instance of it or of a class derived from it."""
    kind = getattr(sys.modules.get(library), name, None)
    return kind if isinstance(kind, type) and issubclass(type(module), kind) else None


def known_reader_of(module: nn.Module) -> tuple[str, bool] | None:
    """The name of its reader, and whether the class itself vouches for what it computes; None for a class and names that are
    not known."""
    for (library, name), reader in CLASSES.items():
        if (kind := _class_of(module, library, name)) is not None:
            return reader, type(module) is kind and is_original(kind)
    # Not by hasattr: a module that wraps another one gives its attributes, too.
    if all(name in children(module) or name in vars(module) for name in ("channel_add_conv", "channel_mul_conv")):
        return "snippet", False
    return None


def non_local_of(module: nn.Module) -> type[nn.Module] | None:
    """mmcv's class of non-local blocks that the module is an instance of."""
    return next((kind for name in NON_LOCAL if (kind := _class_of(module, "mmcv.cnn", name)) is not None), None)


def eca_of(module: nn.Module) -> type[nn.Module] | None:
    """timm's EcaModule, if the module is an instance of it or of a class derived from it."""
    return _class_of(module, "timm.layers", "EcaModule")


def grn_of(module: nn.Module) -> type[nn.Module] | None:
    """timm's GlobalResponseNorm, if the module is an instance of it or of a class derived from it."""
    return _class_of(module, "timm.layers.grn", "GlobalResponseNorm")
