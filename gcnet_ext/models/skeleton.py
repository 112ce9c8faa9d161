"""The parts of a block of another library, whatever they are called there, and what single layers compute."""

from __future__ import annotations

import sys
from types import FunctionType
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ..blocks._batch_norm import scale_of
from ..blocks._fused import norm_over_units
from ..blocks._layers import (
    AVERAGE_POOLS,
    BATCH_NORMS,
    Gate,
    activation_of,
    is_plain,
    is_untouched,
    settings_of,
)
from ..ops._options import Options


class Left(Exception):  # noqa: N818
    """Why a block stays as it is."""


class Bottleneck(NamedTuple):
    """One branch of a block: two layers and what stands between them, or one layer alone."""

    called: tuple[nn.Module, ...]
    """What its block calls on the context, one after another."""
    first: nn.Module
    norm: nn.Module | None = None
    activation: nn.Module | None = None
    last: nn.Module | None = None
    idle: tuple[nn.Module, ...] = ()
    """Further modules between the layers, which must do nothing, such as a Dropout with p = 0."""


class Skeleton(NamedTuple):
    """The parts of a block, whatever they are called."""

    dims: int
    """Spatial dimensions of the inputs that the block takes; 0 where its layers do not tell."""
    mask: nn.Module | None
    scale: Bottleneck | None
    shift: Bottleneck | None
    gate: nn.Module | None = None
    """The module that the scale goes through; None if the block calls the function sigmoid instead of a module."""
    idle: tuple[nn.Module, ...] = ()
    """The modules that are not called: the operator does their work (a pooling, a softmax), or they do nothing."""
    linear: bool = False
    """Whether the layers of the branches are linear layers, which take the context without spatial dimensions."""

    def branches(self) -> list[Bottleneck]:
        return [branch for branch in (self.scale, self.shift) if branch is not None]

    def layers(self) -> list[nn.Module]:
        """The layers of the branches."""
        return [layer for branch in self.branches() for layer in (branch.first, branch.last) if layer is not None]

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
        or is_plain(module, nn.Flatten)
        or is_plain(module, nn.Unflatten)
        or is_plain(module, nn.Sequential)  # the modules in it are parts of the block themselves
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


def kind_of_activation(module: nn.Module | None) -> tuple[str, float] | None:
    """The activation that calling the module computes, and its slope; None if the operator has none like it."""
    if module is None:
        return None
    if type(module).__module__.startswith("timm.layers.activations"):
        name = TIMMS_ACTIVATIONS.get(type(module).__name__)
        return (name, Options().slope) if name is not None and is_as_made(module) else None
    return activation_of(module)


TIMMS_ACTIVATIONS = {
    "Swish": "silu",
    "SwishMe": "silu",
    "HardSwish": "hardswish",
    "HardSwishMe": "hardswish",
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
}


def is_batch_norm(norm: nn.Module | None) -> bool:
    return isinstance(norm, BATCH_NORMS)


def is_folded(norm: Any) -> bool:
    """Whether the module is a plain BatchNorm that takes its statistics from its buffers."""
    return (
        any(is_plain(norm, kind) for kind in BATCH_NORMS)
        and not norm.training
        and norm.running_mean is not None
        and norm.running_var is not None
    )


class Folded:
    """A layer and the BatchNorm behind it in evaluation, as one layer. Its weight and bias are computed when they are read."""

    _parameters: ClassVar[dict[str, Any]] = {}  # neither of the two is a parameter

    def __init__(self, layer: Any, norm: Any) -> None:
        self.layer, self.norm = layer, norm

    @property
    def weight(self) -> Tensor:
        weight = self.layer.weight
        folded: Tensor = weight * scale_of(self.norm).reshape(-1, *(1 for _ in weight.shape[1:]))
        return folded

    @property
    def bias(self) -> Tensor:
        mean, bias = self.norm.running_mean, self.layer.bias
        folded: Tensor = scale_of(self.norm) * (-mean if bias is None else bias - mean)
        return folded if self.norm.bias is None else folded + self.norm.bias
