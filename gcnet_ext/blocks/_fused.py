"""The fused operator for a block, as long as its submodules are the plain layers.

Ten submodules lie all over memory: to look at every field of them in every call costs as much as a small kernel. So they are
looked at once, and what a user may have changed since then is compared in a few loops that run in C.
"""

from __future__ import annotations

from itertools import repeat
from operator import contains, getitem
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import functional
from ._layers import HOOKS, Gate, is_plain, is_pointwise

Source = tuple[nn.Module | None, str]
NOTHING: Source = (None, "weight")


class Branch(NamedTuple):
    """The layers of a branch, all of them plain, and what the operator takes from them."""

    modules: tuple[nn.Module, ...]
    parameters: tuple[Source, ...]  # w1, b1, norm_weight, norm_bias, w2, b2
    norm: bool = False
    eps: float = 1e-5
    activation: str = "relu"


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
    kind = "relu" if is_plain(activation, nn.ReLU) else "silu" if is_plain(activation, nn.SiLU) else None
    if kind is None or not is_pointwise(first) or not is_pointwise(last):
        return None
    normalised: nn.LayerNorm | None = None
    if norm is not None and not is_plain(norm, nn.Identity):
        if not is_plain(norm, nn.LayerNorm) or norm.normalized_shape != (first.out_channels, 1, 1):
            return None
        normalised = norm
    return Branch(
        tuple(module for module in (first, norm, activation, last) if module is not None),
        (*_weight_and_bias(first), *_weight_and_bias(normalised), *_weight_and_bias(last)),
        normalised is not None,
        1e-5 if normalised is None else normalised.eps,
        kind,
    )


def one_layer(layer: nn.Module) -> Branch | None:
    """The branch ``layer(context)``."""
    return Branch((layer,), (*_weight_and_bias(layer), *[NOTHING] * 4)) if is_pointwise(layer) else None


def layers(mask: nn.Module | None, scale: Branch | None, shift: Branch | None, gate: Gate) -> Layers | None:
    """Those of a block with this mask, which must be plain, and with at least one branch; None if the branches do not match."""
    given = [branch for branch in (scale, shift) if branch is not None]
    if any(branch[2:] != given[0][2:] for branch in given):
        return None
    modules = tuple(module for branch in given for module in branch.modules)
    parameters = (source for branch in (scale, shift) for source in (branch.parameters if branch else [NOTHING] * 6))
    return Layers(
        modules if mask is None else (mask, *modules),
        (*_weight_and_bias(mask), *parameters),
        (given[0].norm, given[0].eps, given[0].activation == "silu", gate.kind == "hard_sigmoid", gate.alpha, gate.beta),
    )


def parameter(module: nn.Module | None, name: str) -> Any:
    """A tensor or None. Past nn.Module's look-up, which takes long, where it need not compute the weight."""
    if module is None:
        return None
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found  # a parametrized weight is a property


class _Seen:
    """What was seen of a block's layers, and where to look again."""

    def __init__(self, block: FusedBlock, found: Layers) -> None:
        self.options = found.options
        self.gate = block.gate
        self.children = block._modules
        modules = [*block._modules.values(), *found.modules]
        watched = list({id(module): module for module in modules if module is not None}.values())
        self.watched = watched
        self.kinds = list(map(type, watched))
        self.fields = [module.__dict__ for module in watched]
        self.hooks = [fields[name] for fields in self.fields for name in HOOKS]
        self.containers = [self.children, *(module._modules for module in watched if module._modules)]
        self.contents = list(map(list, map(dict.values, self.containers)))
        self.norms = [module.__dict__ for module in watched if isinstance(module, nn.LayerNorm)]
        self.eps = [fields["eps"] for fields in self.norms]
        nothing: dict[str, Any] = {"weight": None, "bias": None}
        self.tables = [nothing if module is None else module._parameters for module, _ in found.parameters]
        self.names = [name for _, name in found.parameters]

    def parameters(self, block: FusedBlock) -> list[Tensor | None] | None:
        """Of the layers, if they are what they were."""
        if (
            self.children is not block._modules  # block is a replica of the one that was looked at
            or self.gate is not block.gate
            or list(map(list, map(dict.values, self.containers))) != self.contents
            or list(map(type, self.watched)) != self.kinds
            or any(self.hooks)
            or any(map(contains, self.fields, repeat("forward")))
            or list(map(getitem, self.norms, repeat("eps"))) != self.eps
        ):
            return None
        try:
            return list(map(getitem, self.tables, self.names))
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
        seen = self._seen
        if seen is not None and not is_compiling():
            parameters = seen.parameters(self)
            if parameters is not None:
                return functional.fused(x, parameters, seen.options, inplace=self.inplace)
        found = self._plain_layers()
        if not is_compiling():  # a graph that is being captured looks at everything, once
            self._seen = None if found is None or found.computed() else _Seen(self, found)
        if found is None:
            return None
        return functional.fused(x, [parameter(*source) for source in found.parameters], found.options, inplace=self.inplace)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_seen"}
