"""Gives the blocks of existing models a forward of ours."""

from __future__ import annotations

from torch import nn

from ..blocks._layers import ignoring_global_hooks
from ..blocks.plain import TWINS
from . import look_alikes, same, watch
from .efficient_channel_attention import replace_eca
from .fusible import why_called, why_left
from .global_response_norm import replace_grn
from .peer import FusedPeer, NonLocalPeer, Peer, Record, become, way_to
from .readers import NON_LOCAL, READERS, eca_of, grn_of, known_reader_of, non_local_of
from .report import Report
from .residual import fuse_tails
from .skeleton import Left, is_original, settings
from .suspects import looks_like_attention

UNKNOWN = "its class is none of those that are known"
OURS = (*TWINS, Peer)


def replace_blocks(model: nn.Module, *, fuse_tail: bool = True) -> Report:
    """Give every block of the GC family in the model a forward of this package, in place.

    It takes mmcv's ``ContextBlock`` and ``NonLocal1d``, ``2d`` and ``3d``, timm's ``GlobalContext``, ``SEModule``,
    ``SqueezeExcite``, ``EffectiveSEModule``, ``EseModule``, ``EcaModule`` and ``GlobalResponseNorm``, torchvision's
    ``SqueezeExcitation``, and any class derived from one of those, or with the layers of the GC block or of squeeze-excitation
    under names of its own, if a copy of it computes on random numbers what ours computes.

    A block stays the object it is, and becomes an instance of a subclass of its class. So nothing is lost: parameters (the same
    objects, shapes, names and order), attributes, buffers, hooks, parametrizations, device, dtype, train or eval mode. An
    optimizer, a copy for averaging or a DistributedDataParallel made before stays valid, and every checkpoint loads. Where the
    layers of a block are not the plain ones any more (a hook, another activation), they are called as modules, and what our
    forward cannot take (an unbatched input, say) the former one computes.

    Where a block of ours stands before the addition in a residual block of torchvision's or timm's ResNets or of timm's SENets,
    it takes the addition and the ReLU along: the residual block becomes an instance of a subclass, too. If a hook, another
    activation or an active DropPath comes between, its former forward computes it.

    Args:
        model: any module.
        fuse_tail: whether residual blocks are changed, too.

    Returns:
        A `Report`, which prints itself as a list.

    Raises:
        TypeError: the model is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    found = Report(model)
    hidden: list[str] = []  # what is below them is ours, or part of what has been replaced
    for name, module in list(model.named_modules()):
        if any(_is_below(name, outer) for outer in hidden):
            continue
        if isinstance(module, OURS):
            hidden.append(name)
            continue
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        try:
            with ignoring_global_hooks():
                called = _replaced(module, listed=not any(_is_below(name, outer) for outer in found.left))
        except Left as reason:
            found.left[name], found.kinds[name] = str(reason), kind
        except Exception as error:  # whatever a block is made of, the others are replaced
            found.left[name], found.kinds[name] = f"it could not be read: {type(error).__name__}: {error}", kind
        else:
            if called is None:
                continue
            hidden.append(name)
            found.replaced[name] = kind
            if called:
                found.called[name] = called
    for outer in [name for name, why in found.left.items() if why == UNKNOWN]:
        if any(_is_below(name, outer) for name in found.replaced):  # it looks like one because it holds one
            del found.left[outer], found.kinds[outer]
    if fuse_tail:
        found.tails.update(fuse_tails(model))
    return found


def _is_below(name: str, outer: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


def _replaced(block: nn.Module, *, listed: bool) -> str | None:
    """Gives the block our forward. Returns what of it is still called as a module, "" if one operator computes all of it, or
    None if the module is no block that we know.

    Raises:
        Left: it is a block, or looks like one and is to be listed, and stays as it is.
    """
    known = known_reader_of(block)
    if known is not None or any(of_class(block) is not None for of_class in (non_local_of, eca_of, grn_of)):
        return _converted(block, known)
    suspected = listed and looks_like_attention(block)
    guess = look_alikes.kind_of(block)
    try:
        if guess is not None:
            return _converted(block, (guess, False))
    except Left:
        if listed:
            raise
    if suspected:
        raise Left(UNKNOWN)
    return None


def _converted(block: nn.Module, found: tuple[str, bool] | None) -> str:
    """Gives a block with that reader, or of a class that needs none, our forward; returns what of it is called.

    Raises:
        Left: it stays as it is.
    """
    non_local, eca = non_local_of(block), eca_of(block)
    if method := "forward" if "forward" in vars(block) else watch.shadowed(block):
        raise Left(f"it has a {method} of its own")
    if getattr(type(block).forward, "__wrapped__", None) is not None:
        raise Left("its forward is decorated")
    if eca is not None:
        replace_eca(block)
        return ""
    if grn_of(block) is not None:
        replace_grn(block)
        return ""
    code = watch.fingerprint(type(block))
    if non_local is not None:
        if type(block) is not non_local or not is_original(non_local):
            raise Left(f"it is not exactly mmcv's {non_local.__name__}")
        dims = NON_LOCAL.index(non_local.__name__) + 1
        become(block, NonLocalPeer, Record("", dims, (), {}, all_fields=False, idle=(), code=code))
        return ""
    assert found is not None
    name, vouched = found
    read, decisive, _ = READERS[name]
    skeleton = read(block)
    if why := why_left(skeleton):
        raise Left(why)
    fields = {key: vars(block)[key] for key in decisive} if vouched else watch.own_fields(block)
    way = way_to(block, skeleton.branches()[0].first)

    def convert(block: nn.Module, dims: int) -> None:
        record = Record(name, dims, way, fields, all_fields=not vouched, idle=settings(skeleton.idle), code=code)
        become(block, FusedPeer, record)

    dims = skeleton.dims if vouched else same.dims_of(block, read, convert)
    called = why_called(skeleton._replace(dims=dims))
    convert(block, dims)
    return called
