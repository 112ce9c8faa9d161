"""Gives the blocks of existing models a forward of ours."""

from __future__ import annotations

from functools import partial

from torch import nn

from ..blocks import (
    EfficientChannelAttention,
    GlobalContextBlock,
    NonLocalBlock,
    SimplifiedNonLocalBlock,
    SqueezeExcitation,
)
from ..blocks._layers import ignoring_global_hooks
from . import same, watch
from .efficient_channel_attention import replace_eca
from .peer import FusedPeer, NonLocalPeer, Peer, Record, become, way_to, why_called, why_left
from .report import Report
from .residual import fuse_tails
from .skeleton import NON_LOCAL, READERS, Left, eca_of, is_original, looks_like_attention, non_local_of, reader_of, settings

OURS = (EfficientChannelAttention, GlobalContextBlock, NonLocalBlock, SimplifiedNonLocalBlock, SqueezeExcitation, Peer)


def replace_blocks(model: nn.Module, *, fuse_tail: bool = True) -> Report:
    """Give every block of the GC family in the model a forward of this package, in place.

    It takes mmcv's ``ContextBlock`` and ``NonLocal1d``, ``2d`` and ``3d``, timm's ``GlobalContext``, ``SEModule`` and
    ``EcaModule``, torchvision's ``SqueezeExcitation``, and any class with the submodules of the GC block (``conv_mask``,
    ``channel_add_conv``, ``channel_mul_conv``) or derived from one of those, if a copy of it computes on random numbers what
    ours computes.

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
    if fuse_tail:
        found.tails.update(fuse_tails(model))
    return found


def _is_below(name: str, outer: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


def _replaced(block: nn.Module, *, listed: bool) -> str | None:
    """Gives the block our forward; returns what of it is called, or nothing where one operator computes it; None if it is none.

    Raises:
        Left: it is one, or looks like one and is to be listed, and stays as it is.
    """
    non_local, eca, found = non_local_of(block), eca_of(block), reader_of(block)
    if non_local is None and eca is None and found is None:
        if listed and looks_like_attention(block):
            raise Left("its class is none of those that are known")
        return None
    if method := "forward" if "forward" in vars(block) else watch.shadowed(block):
        raise Left(f"it has a {method} of its own")
    if getattr(type(block).forward, "__wrapped__", None) is not None:
        raise Left("its forward is decorated")
    if eca is not None:
        replace_eca(block)
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
    record = Record(name, skeleton.dims, way, fields, all_fields=not vouched, idle=settings(skeleton.idle), code=code)
    convert = partial(become, kind=FusedPeer, record=record)
    if not vouched:
        same.check(block, read, convert)
    called = why_called(skeleton)
    convert(block)
    return called
