"""Gives the blocks of existing models a forward of ours."""

from __future__ import annotations

from functools import partial

from torch import nn

from ..blocks import GlobalContextBlock, NonLocalBlock, SimplifiedNonLocalBlock, SqueezeExcitation
from . import same
from .peer import FusedPeer, NonLocalPeer, Peer, Record, become, way_to, why_called, why_left
from .report import Report
from .skeleton import NON_LOCAL, READERS, Left, is_of, looks_like_attention, reader_of, settings

OURS = (GlobalContextBlock, NonLocalBlock, SimplifiedNonLocalBlock, SqueezeExcitation, Peer)


def replace_blocks(model: nn.Module) -> Report:
    """Give every block of the GC family in the model a forward of this package, in place.

    It takes mmcv's ``ContextBlock`` and ``NonLocal1d``, ``2d`` and ``3d``, timm's ``GlobalContext`` and ``SEModule``,
    torchvision's ``SqueezeExcitation``, and any class with the submodules of the GC block (``conv_mask``,
    ``channel_add_conv``, ``channel_mul_conv``) or derived from one of those, if a copy of it computes on random numbers what
    ours computes.

    A block stays the object it is, and becomes an instance of a subclass of its class. So nothing is lost: parameters (the same
    objects, shapes, names and order), attributes, buffers, hooks, parametrizations, device, dtype, train or eval mode. An
    optimizer, a copy for averaging or a DistributedDataParallel made before stays valid, and every checkpoint loads. Where the
    layers of a block are not the plain ones any more (a hook, another activation), they are called as modules, and what our
    forward cannot take (an unbatched input, say) the former one computes.

    Args:
        model: any module.

    Returns:
        A `Report`, which prints itself as a list.

    Raises:
        TypeError: the model is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    replaced: dict[str, str] = {}
    called: dict[str, str] = {}
    left: dict[str, str] = {}
    kinds: dict[str, str] = {}
    done: list[str] = []
    for name, module in list(model.named_modules()):
        if any(name.startswith(f"{path}." if path else "") for path in done):
            continue
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        if isinstance(module, OURS):
            done.append(name)
            continue
        try:
            why = _replaced(module)
        except Left as reason:
            left[name], kinds[name] = str(reason), kind
        except Exception as error:  # whatever a block is made of, the others are replaced
            left[name], kinds[name] = f"it could not be read: {type(error).__name__}: {error}", kind
        else:
            if why is None:
                continue
            replaced[name] = kind
            if why:
                called[name] = why
        done.append(name)
    return Report(model, replaced, left, called, kinds)


def _replaced(block: nn.Module) -> str | None:
    """Gives the block our forward; returns why its layers are called, or nothing where they are not. None: it is no block.

    Raises:
        Left: it looks like one, and stays as it is.
    """
    if is_of(block, "mmcv.cnn", *NON_LOCAL):
        become(block, NonLocalPeer, Record("mmcv NonLocal", int(type(block).__name__[-2]), (), {}, ()))
        return ""
    found = reader_of(block)
    if found is None:
        if looks_like_attention(block):
            raise Left("its class is none of those that are known")
        return None
    name, vouched = found
    read, decisive, _ = READERS[name]
    skeleton = read(block)
    if why := why_left(skeleton):
        raise Left(why)
    attributes = {key: getattr(block, key) for key in decisive} if vouched else same.attributes(block)
    way = way_to(block, skeleton.branches()[0].first)
    convert = partial(become, kind=FusedPeer, record=Record(name, skeleton.dims, way, attributes, settings(skeleton.idle)))
    if not vouched:
        same.check(block, read, convert)
    why = why_called(skeleton)
    convert(block)
    return why
