"""What the blocks of other libraries consist of, read from their submodules.

A block is recognised by its class if that library is loaded, or by the names of its submodules. No library is imported.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn

from .._torch import children, parameters
from ..blocks._fused import norm_over_units
from ..blocks._layers import AVERAGE_POOLS, CONVOLUTIONS, Gate, is_plain, is_untouched, settings_of


class Left(Exception):  # noqa: N818
    """Why a block stays as it is."""


class Bottleneck(NamedTuple):
    """One branch of a block."""

    called: tuple[nn.Module, ...]
    """What its block calls on the context, one after another."""
    first: nn.Module
    norm: nn.Module | None
    activation: nn.Module
    last: nn.Module
    idle: tuple[nn.Module, ...] = ()
    """Further modules between the layers, which must do nothing, such as a Dropout with p = 0."""


class Skeleton(NamedTuple):
    """The parts of a block, whatever they are called."""

    dims: int
    """Spatial dimensions of the inputs that the block takes."""
    mask: nn.Module | None
    scale: Bottleneck | None
    shift: Bottleneck | None
    gate: nn.Module | None = None
    """The module that the scale goes through; None if the block calls the function sigmoid instead of a module."""
    idle: tuple[nn.Module, ...] = ()
    """The modules that are not called: the operator does their work (a pooling, a softmax), or they do nothing."""

    def branches(self) -> list[Bottleneck]:
        return [branch for branch in (self.scale, self.shift) if branch is not None]

    def modules(self) -> list[nn.Module]:
        """The modules of all parts. A layer is listed even if a module that contains it is listed, too."""
        parts = [self.mask, self.gate, *self.idle]
        for branch in self.branches():
            parts += [*branch.called, branch.first, branch.norm, branch.activation, branch.last, *branch.idle]
        return [part for part in parts if part is not None]


# ---- single layers -----------------------------------------------------------------------------------------------------------


def is_of(module: nn.Module, library: str, *names: str) -> bool:
    """Whether the module is of one of these classes of a library that is loaded; not of a subclass, which may do otherwise."""
    found = sys.modules.get(library)
    return found is not None and any(type(module) is getattr(found, name, None) for name in names)


def is_as_made(module: nn.Module) -> bool:
    """Whether calling the module runs the code of its library, and nothing else."""
    return is_untouched(module) and is_original(type(module))


def is_original(kind: type) -> bool:
    """Whether each method of the class is where the others are, under its own name: nobody has exchanged or wrapped one."""
    for base in kind.__mro__:
        if issubclass(base, nn.Module) and base is not nn.Module and not base.__module__.startswith("torch.nn."):
            methods = {name: value for name, value in vars(base).items() if isinstance(value, FunctionType)}
            homes = {id(method.__globals__) for method in methods.values()}
            if len(homes) > 1 or any(method.__code__.co_name != name for name, method in methods.items()):
                return False
    return True


def does_nothing_else(module: nn.Module) -> bool:
    """Whether a module that is not called would do what the formula has in its place, or nothing."""
    return bool(
        is_plain(module, nn.Identity)
        or is_plain(module, nn.Sigmoid)
        or (is_plain(module, nn.Dropout) and module.p == 0)
        or is_plain(module, nn.Softmax)
        or any(is_plain(module, pool) and _ones(module.output_size) for pool in AVERAGE_POOLS.values())
    )


def settings(modules: tuple[nn.Module, ...]) -> tuple[Any, ...]:
    """The values of the attributes that decide what these modules compute."""
    return tuple(getattr(module, name) for module in modules for name in settings_of(module))


def _ones(sizes: Any) -> bool:
    return set(sizes if isinstance(sizes, tuple) else (sizes,)) == {1}


def calls_its_layers(container: nn.Module) -> bool:
    """Whether calling the module calls the layers of a branch one after another, and does nothing else."""
    return is_plain(container, nn.Sequential) or (is_of(container, "timm.layers", "ConvMlp") and is_as_made(container))


def is_layer_norm(norm: nn.Module, dims: int) -> bool:
    """Whether the module is a LayerNorm over the hidden units, by shape (torch) or by place (timm)."""
    return norm_over_units(norm, dims) or (is_of(norm, "timm.layers", "LayerNorm2d") and is_as_made(norm))


def kind_of_gate(module: nn.Module | None) -> Gate | None:
    """The gate that a module of this class computes; None if the class is another."""
    kind = type(module)
    if module is None or kind is nn.Sigmoid:
        return Gate()
    if kind is nn.Hardsigmoid:
        return Gate("hard_sigmoid", 1 / 6, 0.5)
    if kind.__module__.startswith("timm.layers."):
        if kind.__name__ == "Sigmoid":
            return Gate()
        if kind.__name__ in ("HardSigmoid", "HardSigmoidJit", "HardSigmoidMe"):
            return Gate("hard_sigmoid", 1 / 6, 0.5)
    return None


def gate_of(module: nn.Module | None) -> Gate | None:
    """The gate that calling the module computes; None if that is another function, or more than one."""
    torchs = type(module) in (nn.Sigmoid, nn.Hardsigmoid)
    if module is None or (is_plain(module, type(module)) if torchs else is_as_made(module)):
        return kind_of_gate(module)
    return None


# ---- blocks ------------------------------------------------------------------------------------------------------------------


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


def timm_squeeze_excitation(block: Any) -> Skeleton:
    """timm's SEModule."""
    if block.add_maxpool:
        raise Left("it adds a max-pooling to the average")
    if type(block.bn) is not nn.Identity:
        raise Left(f"it has a {type(block.bn).__name__} between its layers")
    return _squeeze_excitation(block.fc1, block.act, block.fc2, block.gate, block.bn)


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
    "timm SENet SEModule": Reader(senet_squeeze_excitation, (), "timm"),
    "torchvision SqueezeExcitation": Reader(torchvision_squeeze_excitation, (), "torchvision"),
    "snippet": Reader(snippet, (), "mmcv"),
}
CLASSES: dict[tuple[str, str], str] = {
    ("mmcv.cnn", "ContextBlock"): "mmcv ContextBlock",
    ("timm.layers", "GlobalContext"): "timm GlobalContext",
    ("timm.layers", "SEModule"): "timm SEModule",
    ("timm.models.senet", "SEModule"): "timm SENet SEModule",
    ("torchvision.ops", "SqueezeExcitation"): "torchvision SqueezeExcitation",
}
NON_LOCAL = ("NonLocal1d", "NonLocal2d", "NonLocal3d")


def reader_of(module: nn.Module) -> tuple[str, bool] | None:
    """The name of its reader, and whether the class itself vouches for what it computes; None for no block of the family."""
    for (library, name), reader in CLASSES.items():
        kind = getattr(sys.modules.get(library), name, None)
        if isinstance(kind, type) and issubclass(type(module), kind):
            return reader, type(module) is kind and is_original(kind)
    # Not by hasattr: a module that wraps another one gives its attributes, too.
    if all(name in children(module) or name in vars(module) for name in ("channel_add_conv", "channel_mul_conv")):
        return "snippet", False
    return None


def non_local_of(module: nn.Module) -> type[nn.Module] | None:
    """mmcv's class of non-local blocks that the module is an instance of."""
    kinds = (getattr(sys.modules.get("mmcv.cnn"), name, None) for name in NON_LOCAL)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(type(module), kind)), None)


def eca_of(module: nn.Module) -> type[nn.Module] | None:
    """timm's EcaModule, if the module is an instance of it or of a class derived from it."""
    kind = getattr(sys.modules.get("timm.layers"), "EcaModule", None)
    return kind if isinstance(kind, type) and issubclass(type(module), kind) else None


# ---- what looks like one -----------------------------------------------------------------------------------------------------

WORDS = frozenset(
    (
        *("se", "ese", "squeeze", "excite", "excitation", "eca", "ceca", "cbam", "bam", "grn", "gct", "srm", "sk"),
        *("attention", "attn", "att", "nonlocal", "context"),
    )
)
PHRASES = (
    *("nonlocal", "globalcontext", "gcmodule", "gcblock", "globalresponsenorm", "selectivekernel", "splitattn", "mhsa"),
    *("focalmodulation", "gatherexcite", "channelgate", "spatialgate", "pammodule", "cammodule", "emau"),
)
CONTAINERS = frozenset(("block", "bottleneck", "net", "stage", "model", "backbone", "encoder", "decoder", "basic", "mlp"))
MOST_MODULES = 30
"""A module with more than so many below it is a network, not a block."""


def looks_like_attention(module: nn.Module) -> bool:
    """Whether the name of its class, or its layers, say that it weighs channels or positions.

    A residual block that holds such a module, or a block of the family, is none itself.
    """
    below = [part for part in module.modules() if part is not module]
    if len(below) > MOST_MODULES or (not below and not any(True for _ in module.parameters())):
        return False
    if any(reader_of(part) or non_local_of(part) or eca_of(part) for part in below):
        return False
    words = _words(module)
    if words & CONTAINERS and any(_is_named_so(part) for part in below):
        return False
    return _is_named_so(module) or _ends_in_a_gate(module)


def _words(module: nn.Module) -> set[str]:
    """The words in the name of the module's class, in lower case: SEModule has "se" and "module"."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", type(module).__name__)}


def _is_named_so(module: nn.Module) -> bool:
    name = type(module).__name__.lower().replace("_", "")
    return bool(_words(module) & WORDS) or any(phrase in name for phrase in PHRASES)


def _ends_in_a_gate(module: nn.Module) -> bool:
    """Whether it has a sigmoid, and one or two 1x1 layers that lead from some channels to as many."""
    leaves: list[Any] = [part for part in module.modules() if not children(part)]
    sigmoid = any("sigmoid" in type(part).__name__.lower() for part in leaves)
    weights = [parameters(part).get("weight") for part in leaves]
    sizes = [weight.shape for weight in weights if weight is not None and weight.dim() > 1 and weight.shape[2:].numel() == 1]
    return sigmoid and len(sizes) in (1, 2) and sizes[0][1] == sizes[-1][0]
