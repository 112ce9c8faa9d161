"""A block of another library, or of a user, that stays the object it is and gets a forward of ours.

The class of the block becomes a subclass of what it was. So whatever somebody has put on the block stays: attributes, buffers,
hooks, parametrizations, the parameters themselves, their shapes, names and order. What the operator does not compute, the
forward of the former class computes, with everything that a user may have changed in it.
"""

from __future__ import annotations

import types
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from .._torch import children, parameters
from ..blocks import _layers, non_local
from ..blocks._fused import NOT_COPIED, FusedBlock, Layers, Tail
from ..ops._precision import accumulation_dtype
from ..ops.attention_pool import attention_map, attention_pool
from ..ops.channel_fuse import channel_fuse
from . import watch
from .fusible import plain_layers, why_called
from .readers import READERS
from .skeleton import Bottleneck, Left, Skeleton, does_nothing_else, gate_of, settings


class Record(NamedTuple):
    """What a replaced block knows of its replacement."""

    kind: str
    """The name of its reader."""
    dims: int
    """The spatial dimensions of the inputs that it takes."""
    first: tuple[str, ...]
    """The attribute names that lead from the block to its first layer, whose dtype the input must have."""
    fields: dict[str, Any]
    """The attributes of the block when it was replaced. If one of them changes, the former forward computes the block."""
    all_fields: bool
    """Whether an attribute that is not in `fields` counts as a change, too."""
    idle: tuple[Any, ...]
    """The settings of the modules that are not called. If one changes, the former forward computes the block."""
    code: str
    """The fingerprint of its class."""


MISSING = object()
PUBLIC = frozenset({"attention_map"})
"""The methods that a replaced block gets in addition to forward, unless its former class has a method of that name."""


class Peer(nn.Module):
    """The first base of a replaced block's class; the second is its former class."""

    _former: type[nn.Module]
    _fields: watch.ClassFields  # of the former class, when this one was made
    _record: Record | None = None  # an instance that somebody makes of this class has none

    def __init_subclass__(cls, **_options: Any) -> None:
        """Does nothing, so that a former class that registers its subclasses in __init_subclass__ does not register ours."""

    def __prepare_scriptable__(self) -> NoReturn:
        _layers.not_scriptable(self)

    def _as_before(self, *args: Any, **kwargs: Any) -> Any:
        """What the block computed before it was replaced."""
        return self._former.forward(self, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._record is not None and len(args) == 1 and not kwargs:
            (x,) = args
            if not isinstance(x, Tensor):
                return _layers.of_no_tensor(self, x)
            if self._takes(x):
                return self._computed(x, None)
        return self._as_before(*args, **kwargs)

    def _takes_tail(self) -> bool:
        """Whether nothing of the block itself stands between its result and a tail."""
        return True

    def _with_tail(self, x: Tensor, tail: Tail) -> Tensor:
        """The output of the block and of the tail behind it."""
        return self._computed(x, tail) if self._takes(x) else self._former_with_tail(x, tail)

    def _takes(self, x: Tensor) -> bool:
        record = self._record
        return record is not None and x.dim() == 2 + record.dims and self._has_dtype_of(x, record.first)

    def _former_output(self, x: Tensor, residual: Tensor | None) -> Any:
        """What the block computed before it was replaced, and the residual added to it."""
        out = self._as_before(x)
        return out if residual is None else out + residual

    def _former_with_tail(self, x: Tensor, tail: Tail | None) -> Any:
        return self._as_before(x) if tail is None else self._former_output(tail.normed(x), tail.residual).relu()

    def _has_dtype_of(self, x: Tensor, first: tuple[str, ...]) -> bool:
        """Whether the layers take x as it is, or autocast casts what they take."""
        layer: Any = self
        for name in first:
            layer = children(layer).get(name, self)
        weight = parameters(layer).get("weight")
        if weight is None or weight.dtype == x.dtype:
            return True
        device = x.device.type
        return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)

    def _computed(self, x: Tensor, tail: Tail | None) -> Tensor:
        raise NotImplementedError

    def _is_what_it_was(self) -> bool:
        """Whether the class and the fields are those with which the block was replaced."""
        record = self._record
        if record is None or watch.shadowed(self) or not watch.are_same(watch.class_fields(self._former), self._fields):
            return False
        if record.all_fields and record.fields.keys() != vars(self).keys() - watch.STANDARD:
            return False
        try:
            return all(watch.frozen(name, vars(self).get(name, MISSING)) == value for name, value in record.fields.items())
        except Left:
            return False

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle and deepcopy: our class is made anew, because it is found under no name."""
        former, kind = self._former, type(self).__bases__[0]
        if type(self) is not _classes.get(_key(former, kind, self._fields)):  # somebody has derived from ours
            return super().__reduce_ex__(protocol)
        state = former.__getstate__(self) if hasattr(former, "__getstate__") else self.__dict__  # object has one from 3.11 on
        if isinstance(state, dict):
            state = {name: value for name, value in state.items() if name not in (*NOT_COPIED, "_record")}
        return _made_anew, (former, kind, self._record), state


_classes: dict[tuple[Any, ...], type[Any]] = {}


def _key(former: type[nn.Module], kind: type[Peer], fields: watch.ClassFields) -> tuple[Any, ...]:
    return former, kind, tuple((base, name, id(value)) for base, name, value in fields)  # a value may have no hash


def class_of(former: type[nn.Module], kind: type[Peer]) -> type[Any]:
    """The subclass of a block's class that takes its forward from kind, a subclass of Peer.

    Raises:
        Left: a name of ours has another meaning in that class.
    """
    if former.__reduce__ is not object.__reduce__ or former.__reduce_ex__ is not object.__reduce_ex__:
        raise Left("its class has a way of its own to be copied and pickled")
    if any("__slots__" in vars(base) for base in former.__mro__ if issubclass(base, nn.Module)):
        raise Left("its class has __slots__, which nobody can watch")
    fields = watch.class_fields(former)
    key = _key(former, kind, fields)
    if key not in _classes:
        if taken := sorted(name for name in names_of(kind) if hasattr(former, name)):
            raise Left(f"its class has a {taken[0]} of its own")
        body = {"_former": former, "_fields": fields, "__module__": __name__, "__doc__": former.__doc__}
        body |= {name: getattr(former, name) for name in PUBLIC if hasattr(former, name)}
        name = f"Fused{former.__name__}"
        _classes[key] = types.new_class(name, (kind, former), {}, lambda names: names.update(body))
    return _classes[key]


def names_of(kind: type[Peer]) -> set[str]:
    """The names of ours that a former class and its instances must not use in another way."""
    ours = {name for base in kind.__mro__ if issubclass(base, Peer | FusedBlock) for name in vars(base)}
    return ours - PUBLIC - vars(nn.Module).keys() - vars(object).keys() - {"__annotations__", "__init_subclass__"}


def way_to(block: nn.Module, layer: nn.Module) -> tuple[str, ...]:
    """The names on the way from a block to a layer in it."""
    return next((tuple(path.split(".")) for path, part in block.named_modules() if part is layer and path), ())


def become(block: nn.Module, kind: type[Peer], record: Record) -> None:
    """Gives the block a forward of ours.

    Raises:
        Left: a name of ours has another meaning in the block or in its class.
    """
    made: type[nn.Module] = class_of(type(block), kind)
    if taken := sorted(names_of(kind) & vars(block).keys()):
        raise Left(f"it has a {taken[0]} of its own")
    block.__class__ = made
    block.__dict__.update(_record=record, _seen=None)


def become_former(block: Peer) -> None:
    """Takes our forward from a block, which is what it was before `become`."""
    former: type[Any] = block._former
    block.__class__ = former
    for name in ("_record", *NOT_COPIED):
        block.__dict__.pop(name, None)


def _made_anew(former: type[nn.Module], kind: type[Peer], record: Record | None) -> nn.Module:
    made: type[nn.Module] = class_of(former, kind)
    block = made.__new__(made)
    if record is not None and record.code == watch.fingerprint(former):  # the code of the class is what it was
        block.__dict__.update(_record=record, _seen=None)
    return block


class FusedPeer(Peer, FusedBlock):
    """A block of the GC or squeeze-excitation family: one operator computes it, as long as its layers are the plain ones."""

    def _computed(self, x: Tensor, tail: Tail | None) -> Tensor:
        return FusedBlock.forward(self, x, tail)

    _watched = True

    def _decisive(self) -> tuple[str, ...]:
        return () if self._record is None else tuple(self._record.fields)

    def _may_be_seen(self) -> bool:
        return all(watch.is_constant(vars(self).get(name)) for name in self._decisive())

    def _overwrites(self) -> bool:
        return False

    def _skeleton(self) -> Skeleton | None:
        """The parts, or None if the block is not any more what it was when it was replaced."""
        record = self._record
        if record is None or not self._is_what_it_was():
            return None
        try:
            found = READERS[record.kind].read(self)
        except (Left, AttributeError):
            return None
        same = found.dims in (0, record.dims) and settings(found.idle) == record.idle
        found = found._replace(dims=record.dims)
        return found if same and all(does_nothing_else(part) for part in found.idle) else None

    def _plain_layers(self) -> Layers | None:
        skeleton = self._skeleton()
        return None if skeleton is None or why_called(skeleton) else plain_layers(skeleton)

    def _with_called_layers(self, x: Tensor, residual: Tensor | None, valid: Tensor | None) -> Tensor:
        """Pooling and fusion are compiled, and the layers between are called as the modules they are."""
        skeleton = self._skeleton()
        if skeleton is None:
            return self._former_output(x, residual)
        mask: Any = skeleton.mask
        if mask is not None and not _layers.is_pointwise(mask, skeleton.dims):
            context = _layers.called_context(mask, x)
        else:
            try:
                context = attention_pool(x) if mask is None else attention_pool(x, mask.weight, mask.bias)
            except RuntimeError:  # the former forward says in its own words what is wrong
                return self._former_output(x, residual)
        image = context.reshape(context.shape + (1,) * skeleton.dims)

        def term(branch: Bottleneck) -> Tensor:
            found = (context if skeleton.linear else image).clone()  # a layer may overwrite what it gets
            for module in branch.called:
                found = _layers.call(module, found, found.dtype)
            return found

        scale = shift = None
        if skeleton.scale is not None:
            scale, gate = term(skeleton.scale), gate_of(skeleton.gate)
            if gate is None and skeleton.gate is not None:
                scale = skeleton.gate(scale)
            scale = scale.flatten(1).to(accumulation_dtype(x))
            scale = scale.expand_as(context) if scale.shape == (len(context), 1) else scale  # one gate for all channels
            scale = scale if gate is None else gate(scale)
        if skeleton.shift is not None:
            shift = term(skeleton.shift).flatten(1).to(accumulation_dtype(x))
        return channel_fuse(x, scale, shift, residual=residual)

    def _refused(self, x: Tensor, tail: Tail | None, error: RuntimeError) -> Any:
        """Lets the former forward compute or refuse x, so that an error has the words of the former class."""
        return self._former_with_tail(x, tail)

    def _explain(self, x: Tensor, error: RuntimeError) -> Any:
        """Raises the error as it is, because the layer that was called has already said what is wrong."""
        raise error

    def attention_map(self, x: Tensor) -> Tensor:
        """Where the block looks: the softmax over positions, ``[N, *spatial]``, for pictures. Not differentiable.

        Raises:
            RuntimeError: the block does not look anywhere (it pools by the average), or its mask is not a plain convolution.
        """
        skeleton = self._skeleton()
        mask: Any = None if skeleton is None else skeleton.mask
        if skeleton is None or mask is None or not _layers.is_pointwise(mask, skeleton.dims):
            raise RuntimeError(f"the block must have a plain 1x1 convolution as its mask, got {mask!r}")
        return attention_map(x, mask.weight, mask.bias)


class NonLocalPeer(Peer):
    """mmcv's non-local block; its layers are called, and what stands between them forms no matrix of P x P weights."""

    def _takes_tail(self) -> bool:
        return False

    def _computed(self, x: Any, tail: Tail | None) -> Any:
        block: Any = self
        if not self._is_what_it_was():
            return self._as_before(x)
        weight = None
        if block.mode == "concatenation":
            project = block.concat_project
            if not all(_layers.is_untouched(part) for part in project.modules()):
                return self._as_before(x)
            weight = project.conv.weight
        g = block.g(x).flatten(2)
        if block.mode == "gaussian":
            theta, phi = x.flatten(2), (block.phi(x) if block.sub_sample else x).flatten(2)
        else:
            theta, phi = block.theta(x).flatten(2), block.phi(x).flatten(2)
        if g.shape[2] != phi.shape[2]:  # a layer has been changed so that the former forward refuses
            return self._as_before(x)
        scaled = block.mode == "embedded_gaussian" and block.use_scale
        y = non_local.weighted_values(block.mode, theta, phi, g, weight, scaled)
        return x + block.conv_out(y.reshape(y.shape[:2] + x.shape[2:]))
