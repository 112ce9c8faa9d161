"""The fused operator for a block, as long as its submodules are the plain layers.

Ten submodules lie all over memory: to ask each of them in every call whether it is plain costs as much as a small kernel. So
they are asked once, and what made them plain is compared in a few loops that run in C. (Not compared is what a class defines: a
class that is patched after a block was used is not noticed.)
"""

from __future__ import annotations

from itertools import repeat
from operator import contains, getitem, itemgetter
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import functional
from ._layers import HOOKS, Gate, is_plain, is_pointwise

Source = tuple[nn.Module | None, str]
NOTHING: Source = (None, "weight")


class Between(NamedTuple):
    """What stands between the two layers of a branch; the same in both branches."""

    norm: bool = False
    eps: float = 1e-5
    silu: bool = False


class Branch(NamedTuple):
    """The layers of a branch, all of them plain, and what the operator takes from them."""

    modules: tuple[nn.Module, ...]
    parameters: tuple[Source, ...]  # w1, b1, norm_weight, norm_bias, w2, b2
    between: Between = Between()


class Layers(NamedTuple):
    """The same of a block."""

    modules: tuple[nn.Module, ...]
    parameters: tuple[Source, ...]  # weight and bias of the mask, then those of the scale and of the shift
    options: tuple[bool, float, bool, bool, float, float]  # norm, eps, silu, hard_sigmoid, gate_alpha, gate_beta

    def computed(self) -> bool:
        """Whether something computes one of the weights, in every call anew."""
        return any(module is not None and name not in module._parameters for module, name in self.parameters)


def _weight_and_bias(layer: nn.Module | None) -> tuple[Source, Source]:
    return (layer, "weight"), (layer, "bias")


def two_layers(first: nn.Module, norm: nn.Module | None, activation: nn.Module, last: nn.Module) -> Branch | None:
    """The branch ``last(activation(norm(first(context))))``; None if one of the layers is not the plain one."""
    silu = is_plain(activation, nn.SiLU)
    if not (silu or is_plain(activation, nn.ReLU)) or not is_pointwise(first) or not is_pointwise(last):
        return None
    normalised: nn.LayerNorm | None = None
    if norm is not None and not is_plain(norm, nn.Identity):
        if not is_plain(norm, nn.LayerNorm) or norm.normalized_shape != (first.out_channels, 1, 1):
            return None
        normalised = norm
    return Branch(
        tuple(module for module in (first, norm, activation, last) if module is not None),
        (*_weight_and_bias(first), *_weight_and_bias(normalised), *_weight_and_bias(last)),
        Between(silu=silu) if normalised is None else Between(True, normalised.eps, silu),
    )


def one_layer(layer: nn.Module) -> Branch | None:
    """The branch ``layer(context)``."""
    return Branch((layer,), (*_weight_and_bias(layer), *[NOTHING] * 4)) if is_pointwise(layer) else None


def layers(mask: nn.Module | None, scale: Branch | None, shift: Branch | None, gate: Gate) -> Layers | None:
    """Those of a block with this mask, which must be plain, and these branches; None if the two do not match."""
    given = [branch for branch in (scale, shift) if branch is not None]
    between = given[0].between if given else Between()
    if any(branch.between != between for branch in given):
        return None
    modules = tuple(module for branch in given for module in branch.modules)
    parameters = (source for branch in (scale, shift) for source in (branch.parameters if branch else [NOTHING] * 6))
    return Layers(
        modules if mask is None else (mask, *modules),
        (*_weight_and_bias(mask), *parameters),
        (*between, gate.kind == "hard_sigmoid", gate.alpha, gate.beta),
    )


def parameter(module: nn.Module | None, name: str) -> Any:
    """A tensor or None. Past nn.Module's look-up, which takes long, where it need not compute the weight."""
    if module is None:
        return None
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found  # a parametrized weight is a property


# What makes a convolution or a LayerNorm the layer that it is.
SETTINGS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("kernel_size", "stride", "padding", "groups"),
    nn.LayerNorm: ("eps", "normalized_shape"),
}


_modules_of, _parameters_of = itemgetter("_modules"), itemgetter("_parameters")


class _Seen:
    """What was seen of a block's layers, and where to look again: in the fields of the modules, by name.

    A field is looked up anew each time, because it may hold another dictionary than before.
    """

    def __init__(self, block: FusedBlock, found: Layers) -> None:
        self.options = found.options
        self.gate = block.gate
        self.block = block.__dict__
        modules = [*block._modules.values(), *found.modules]
        self.modules = list({id(module): module for module in modules if module is not None}.values())
        self.kinds = list(map(type, self.modules))
        self.fields = [module.__dict__ for module in self.modules]
        self.hooked = [fields for fields in self.fields for _ in HOOKS]
        self.hooks = list(HOOKS) * len(self.modules)
        self.parents = [self.block, *(module.__dict__ for module in self.modules if module._modules)]
        self.children = self._children()
        settings = [
            (module.__dict__, name)
            for module in self.modules
            for kind, names in SETTINGS.items()
            if isinstance(module, kind)
            for name in names
        ]
        self.set = [fields for fields, _ in settings]
        self.names = [name for _, name in settings]
        self.settings = self._settings()
        nothing = {"_parameters": {"weight": None, "bias": None}}
        self.owners = [nothing if module is None else module.__dict__ for module, _ in found.parameters]
        self.parameter_names = [name for _, name in found.parameters]

    def _children(self) -> list[Any]:
        return list(map(list, map(dict.items, map(_modules_of, self.parents))))

    def _settings(self) -> list[Any]:
        return list(map(getitem, self.set, self.names))

    def parameters(self, block: FusedBlock) -> list[Tensor | None] | None:
        """Of the layers, if they are what they were."""
        if (
            self.block is not block.__dict__  # block is a replica of the one that was looked at
            or self.gate is not block.gate
            or self._children() != self.children
            or list(map(type, self.modules)) != self.kinds
            or any(map(getitem, self.hooked, self.hooks))
            or any(map(contains, self.fields, repeat("forward")))
            or self._settings() != self.settings
        ):
            return None
        try:
            return list(map(getitem, map(_parameters_of, self.owners), self.parameter_names))
        except KeyError:  # a weight that something computes now
            return None


class FusedBlock(nn.Module):
    """A block that one operator computes."""

    gate = Gate()
    inplace: bool
    _seen: _Seen | None = None

    def _plain_layers(self) -> Layers | None:
        """The layers, if all of them are the plain ones."""
        raise NotImplementedError

    def _fused(self, x: Tensor) -> Tensor | None:
        """The output, or None if a submodule is not the plain layer."""
        if is_compiling():  # a graph that is being captured looks at everything, once, and at nothing that it would guard
            found = self._plain_layers()
        else:
            seen = self._seen
            parameters = None if seen is None else seen.parameters(self)
            if seen is not None and parameters is not None:
                return functional.fused(x, parameters, seen.options, inplace=self.inplace)
            found = self._plain_layers()
            new = None if found is None or found.computed() else _Seen(self, found)
            if new is not seen:
                self._seen = new
        if found is None:
            return None
        return functional.fused(x, [parameter(*source) for source in found.parameters], found.options, inplace=self.inplace)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_seen"}
