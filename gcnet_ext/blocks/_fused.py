"""The fused operator for a block, as long as its submodules are the plain layers.

To check in every call that each of some ten submodules is plain costs as much as a small kernel. So this is checked once;
after that, one call of `_C.unchanged` tells whether anything has changed since the check. In a frozen block it only reads the
parameters.
"""

from __future__ import annotations

import weakref
from functools import partial
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from torch import Tensor, nn
from torch.compiler import is_compiling

from .._load import compiled
from .._torch import GLOBAL_HOOKS, HOOKS, has_own_ways
from ..ops import global_context
from ..ops._dispatch import DIRECT, way_of
from ..ops._options import ACTIVATIONS, FINAL_ACTIVATIONS, Options
from ..ops._transform import Branch
from ._batch_norm import affine_map
from ._layers import (
    Gate,
    activation_of,
    check_channels,
    is_plain,
    is_pointwise,
    not_scriptable,
    of_no_tensor,
    settings_of,
)

if TYPE_CHECKING:
    from typing_extensions import Self

NOT_COPIED = ("_seen", "_frozen")
"""What a copy of a block, in memory or in a file, does without."""
unchanged: Any = getattr(compiled, "unchanged", None)
class_version: Any = getattr(compiled, "class_version", None)
Source = tuple[nn.Module | None, str]
NOTHING: Source = (None, "weight")
NO_WEIGHTS = (NOTHING,) * len(Branch._fields)


class Tail(NamedTuple):
    """What stands behind a block in a residual block and is computed in the same sweep: ``relu(block(x) + residual)``."""

    residual: Tensor
    inplace: bool
    """Whether the output may take the place of x, because nobody reads x again."""
    norm: nn.Module | None = None
    """A BatchNorm in evaluation that x, which is on the CPU, has not been through yet. With one, nothing needs a gradient."""

    def normed(self, x: Tensor) -> Tensor:
        """x behind the norm, which is called."""
        return x if self.norm is None else self.norm(x)

    def behind_norm(self) -> Tail:
        """The tail of an x that has been through the norm."""
        return self._replace(norm=None)


class NormAndActivation(NamedTuple):
    """What stands between the two layers of a branch; the same in both branches."""

    norm_eps: float | None = None
    activation: str = "relu"
    slope: float = Options().slope


class PlainBranch(NamedTuple):
    """The layers of a branch, all of them plain, and what the operator takes from them."""

    modules: tuple[nn.Module, ...]
    weights: tuple[Source, ...]  # in the order of `Branch`
    between: NormAndActivation = NormAndActivation()


class Layers(NamedTuple):
    """The layers of a block, all of them plain, and what the operator takes from them."""

    modules: tuple[nn.Module, ...]
    weights: tuple[tuple[Source, ...], ...]  # of the mask, of the scale and of the shift
    options: Options

    def choices(self) -> tuple[Options, Options]:
        """The options without a tail, and those with one."""
        return self.options, self.options._replace(final_activation=FINAL_ACTIVATIONS["relu"])

    def computed(self) -> bool:
        """Whether one of the weights is not just a parameter: computed in every call anew, or set in place of it."""
        return any(
            name not in module._parameters or name in module.__dict__ or hasattr(type(module), name)
            for sources in self.weights
            for module, name in sources
            if module is not None
        )


def _weight_and_bias(layer: nn.Module | None) -> tuple[Source, Source]:
    return (layer, "weight"), (layer, "bias")


def norm_over_units(norm: nn.Module, dims: int = 2) -> bool:
    """Whether the module is a LayerNorm over hidden units [H, 1, ...]. The operator checks H, by the size of its weights."""
    return is_plain(norm, nn.LayerNorm) and norm.normalized_shape[1:] == (1,) * dims


def two_layers(first: nn.Module, norm: nn.Module | None, activation: nn.Module, last: nn.Module) -> PlainBranch | None:
    """The branch ``last(activation(norm(first(context))))``; None if one of the layers is not the plain one."""
    kind = activation_of(activation)
    if kind is None or not is_pointwise(first) or not is_pointwise(last):
        return None
    normalised = None if norm is None or is_plain(norm, nn.Identity) else norm
    if normalised is not None and not norm_over_units(normalised):
        return None
    found = bottleneck(first, normalised, kind, last)
    return found._replace(modules=tuple(module for module in (first, norm, activation, last) if module is not None))


def bottleneck(first: Any, norm: Any, activation: tuple[str, float], last: Any) -> PlainBranch:
    """The branch of two layers, a LayerNorm or None, and an activation, whose caller knows that they are plain."""
    return PlainBranch(
        (),
        (*_weight_and_bias(first), *_weight_and_bias(norm), *_weight_and_bias(last)),
        NormAndActivation(None if norm is None else norm.eps, *activation),
    )


def one_layer(layer: nn.Module) -> PlainBranch:
    """The branch ``layer(context)`` of a layer whose caller knows that it is plain."""
    return PlainBranch((layer,), (*_weight_and_bias(layer), *NO_WEIGHTS[2:]))


def layers(
    mask: nn.Module | None, scale: PlainBranch | None, shift: PlainBranch | None, gate: Gate, final_activation: str = "none"
) -> Layers | None:
    """The `Layers` of a block with this plain mask and these branches; None if the branches differ in norm or activation."""
    given = [branch for branch in (scale, shift) if branch is not None]
    between = given[0].between if given else NormAndActivation()
    if any(branch.between != between for branch in given):
        return None
    modules = tuple(module for branch in given for module in branch.modules)
    of_branches = (NO_WEIGHTS if branch is None else branch.weights for branch in (scale, shift))
    return Layers(
        modules if mask is None else (mask, *modules),
        (_weight_and_bias(mask), *of_branches),
        Options(
            between.norm_eps,
            ACTIVATIONS[between.activation],
            between.slope,
            gate.hard(),
            FINAL_ACTIVATIONS[final_activation],
        ),
    )


def parameter(module: nn.Module | None, name: str) -> Any:
    """A tensor or None: what the layer itself would read."""
    return None if module is None else getattr(module, name)


def _forget(seen: weakref.ref[_Seen], _block: object) -> None:
    """Breaks the reference cycle between a block that is gone and what was seen of its layers."""
    if (found := seen()) is not None:
        found.arguments, found.block = (), {}


class _Seen:
    """What was seen of a block's layers, as arguments of `_C.unchanged`."""

    def __init__(self, block: FusedBlock, found: Layers) -> None:
        self.choices = found.choices()
        self.inplace = block._overwrites()
        self.version = class_version(type(block)) if block._watched and block._frozen is None else None
        self.block = block.__dict__
        wanted = tuple(
            tuple(part for owner, name in sources for part in ({name: None} if owner is None else owner._parameters, name))
            for sources in found.weights
        )
        weights = (parameter(*source) for sources in found.weights for source in sources)
        classes = tuple({Tensor, nn.Parameter, NoneType, *map(type, weights)})
        looks = ((),) * 4 if block._frozen is not None else self._looks(block, found)
        self.arguments: tuple[Any, ...] = *looks, wanted, classes
        # The fields of the block refer to this object, and it refers to them. Without the callback this cycle would keep the
        # parameters of a deleted block in memory until the garbage collector runs.
        self.last_word = weakref.ref(block, partial(_forget, weakref.ref(self)))

    def _looks(self, block: FusedBlock, found: Layers) -> tuple[tuple[Any, ...], ...]:
        """The kinds, fields, sizes and children of `_C.unchanged`."""
        kinds: list[Any] = []
        fields: list[Any] = []
        sizes: list[Any] = []
        children: list[Any] = []
        for name in block._decisive():
            fields += self.block, name, self.block.get(name)
        if block._watched:
            sizes += self.block, len(self.block)
        for name in GLOBAL_HOOKS:
            sizes += getattr(nn.modules.module, name), 0
        modules = dict.fromkeys(module for module in (*block._modules.values(), *found.modules) if module is not None)
        for module in modules:
            own = module.__dict__
            kinds += module, type(module), class_version(type(module))
            sizes += own, len(own)  # a method or a weight that is set on the module itself is one more field
            for name in ("_parameters", *HOOKS, *settings_of(module)):
                fields += own, name, own.get(name)
            for name in HOOKS:
                sizes += own[name], 0
        for parent in (block, *(module for module in modules if module._modules)):
            fields += parent.__dict__, "_modules", parent._modules
            children += parent._modules, tuple(part for item in parent._modules.items() for part in item)
        return tuple(kinds), tuple(fields), tuple(sizes), tuple(children)

    def weights(self, block: FusedBlock) -> list[list[Tensor | None]] | None:
        """The parameters of the layers; None if a layer has changed."""
        if self.block is not block.__dict__:  # block is a replica of the one that was looked at
            return None
        if self.version is not None and self.version != class_version(type(block)):
            return None
        return unchanged(*self.arguments)


class FusedBlock(nn.Module):
    """A block that one operator computes, as long as its submodules are the plain layers."""

    inplanes: int
    inplace: bool = False
    final_activation: str = "none"
    _seen: _Seen | None = None
    _frozen: Layers | None = None
    """The layers of a frozen block, which nobody looks at any more."""
    _watched = False
    """Whether a change of the block's class, or a new attribute of the block, counts as a change, too."""

    def _decisive(self) -> tuple[str, ...]:
        """The attributes of the block that decide what it computes."""
        return ("gate", "process_group", "inplace", "final_activation")

    def _may_be_seen(self) -> bool:
        """Whether `_C.unchanged` sees all that may change after the first call; otherwise every call reads the layers again."""
        return True

    def _lasts(self, found: Layers) -> bool:
        """Whether what was found of the layers holds until `_C.unchanged` says otherwise."""
        return unchanged is not None and not found.computed() and self._may_be_seen()

    def _freeze(self) -> bool:
        """Looks at the layers for the last time; returns whether they are such that this can be."""
        self._thaw()
        found = self._plain_layers()
        if found is None or not self._lasts(found):
            return False
        self._frozen, self._seen = found, None
        return True

    def _thaw(self) -> None:
        if self._frozen is not None:
            del self._frozen
            self._seen = None

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._thaw()
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> Self:
        replica = super()._replicate_for_data_parallel()
        replica._thaw()
        return replica

    def _overwrites(self) -> bool:
        """Whether the output takes the place of the input."""
        return self.inplace

    def _plain_layers(self) -> Layers | None:
        """The layers, if all of them are the plain ones."""
        raise NotImplementedError

    def _with_called_layers(self, x: Tensor, residual: Tensor | None, valid: Tensor | None) -> Tensor:
        """The output, by calling the submodules."""
        raise NotImplementedError

    def _refused(self, x: Tensor, tail: Tail | None, error: RuntimeError) -> Tensor:
        """What follows when the operator refuses x."""
        self._explain(x, error)

    def _explain(self, x: Tensor, error: RuntimeError) -> NoReturn:
        """Raises the error, or one that says more than an operator or a layer can."""
        found = self._plain_layers()
        sources = () if found is None else (source for group in found.weights for source in group)
        first = next((weight for source in sources if (weight := parameter(*source)) is not None), None)
        check_channels(x, self.inplanes if first is None else first.size(1))  # a block may have been pruned
        raise error

    def _takes_tail(self) -> bool:
        """Whether nothing of the block itself stands between its result and a tail."""
        return self.final_activation == "none"

    def _with_tail(self, x: Tensor, tail: Tail) -> Tensor:
        """The output of the block and of the tail behind it."""
        return FusedBlock.forward(self, x, tail)

    # The residual is a tensor or None, and from `_with_tail` a tail. torch.onnx.export would pass a value for one more
    # argument, and one more function takes time.
    def forward(self, x: Tensor, residual: Any = None, valid: Tensor | None = None) -> Tensor:
        if not isinstance(x, Tensor):
            return of_no_tensor(self, x, residual=residual, valid=valid)
        tail: Tail | None = None
        own_ways = False
        if type(x) is not Tensor or residual is not None or valid is not None:
            if type(residual) is Tail:
                tail, residual = residual, residual.residual
            own_ways = has_own_ways(x, residual, valid)
        way = way_of(x)
        remembers = not own_ways
        if way != DIRECT and is_compiling():  # while a graph is captured, the layers are read anew
            remembers = False
        seen = self._seen if remembers else None
        weights = None if seen is None else seen.weights(self)
        if seen is not None and weights is not None:
            choices, inplace = seen.choices, seen.inplace
        else:
            found = None if own_ways else self._frozen or self._plain_layers()
            if remembers:
                self._seen = None if found is None or not self._lasts(found) else _Seen(self, found)
            if found is None:
                x = x if tail is None else tail.normed(x)
                try:
                    out = self._with_called_layers(x, residual, valid)
                except RuntimeError as error:
                    self._explain(x, error)
                return out if tail is None else out.relu()
            weights = [[parameter(*source) for source in sources] for sources in found.weights]
            choices, inplace = found.choices(), self._overwrites()
        options, norm = choices[0], None
        if tail is not None:
            options, inplace = choices[1], inplace or tail.inplace
            norm = None if tail.norm is None else affine_map(tail.norm)
        try:
            return global_context.with_lists(x, weights, residual, valid, options, inplace=inplace, norm=norm, way=way)
        except RuntimeError as error:
            if tail is not None and norm is not None:  # again behind the norm, so that the error is the one without a tail
                return self._with_tail(tail.normed(x), tail.behind_norm())
            return self._refused(x, tail, error)

    def __prepare_scriptable__(self) -> NoReturn:
        not_scriptable(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in NOT_COPIED}
