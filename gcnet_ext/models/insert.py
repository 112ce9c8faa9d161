"""Blocks put into models that have none."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from .._torch import HOOKS, children, modules_can_be_read
from ..blocks import (
    EffectiveSqueezeExcitation,
    EfficientChannelAttention,
    GlobalContextBlock,
    NonLocalBlock,
    SimplifiedNonLocalBlock,
    SqueezeExcitation,
)
from .residual import NAME, class_with_context_block
from .stages import LAST_LAYERS, is_residual_block_of_others, residual_blocks

KINDS: dict[str, Callable[..., nn.Module]] = {
    "gc": lambda channels, **options: GlobalContextBlock(channels, **{"fusion_types": ("channel_add",), **options}),
    "se": SqueezeExcitation,
    "ese": EffectiveSqueezeExcitation,
    "eca": EfficientChannelAttention,
    "snl": SimplifiedNonLocalBlock,
    "nl": NonLocalBlock,
}
WITH_A_BOTTLENECK = ("gc", "se")
"""The kinds whose constructors take a ratio."""
POSITIONS = ("after_conv3", "after_add")


def insert_blocks(
    model: nn.Module,
    stages: Sequence[int] = (2, 3, 4),
    ratio: float = 1 / 16,
    position: str = "after_conv3",
    kind: str = "gc",
    *,
    modules: str | Sequence[str] | Mapping[str, int] | None = None,
    fuse_tail: bool = True,
    **options: Any,
) -> list[str]:
    """Put a block into every residual block of a ResNet, behind those of a RegNet or ConvNeXt, or behind any modules, in place.

    In the paper (section 4.1) the GC block stands in every residual block of c3, c4 and c5 (stages 2, 3 and 4 here), after the
    last convolution and its norm, before the addition: ``position="after_conv3"``.

    The new block is the submodule ``context_block``. Every other name in the model, and with it every checkpoint, stays as it
    was. With ``"after_conv3"`` the residual block itself applies it: it becomes an instance of a subclass of its class, whose
    forward is the library's but for the one call more. So its norms can be frozen, exchanged (SyncBatchNorm) or fused. The
    block takes the addition and the ReLU behind it along, unless a hook or another activation stands there. With
    ``"after_add"`` and ``modules`` a forward hook applies it to the output of the module that it stands behind; a warning says
    once if the model was called and a block was not.

    Args:
        model: for ``stages``, a ResNet, RegNet or ConvNeXt of torchvision or timm, or a model that holds one (a detector, a
            segmentation model).
        stages: the stages to change, from 1 (in a ResNet ``layer1``) to 4 (``layer4``).
        ratio: hidden units per channel, for ``"gc"`` and ``"se"``.
        position: ``"after_conv3"`` (before the addition; in torchvision's and timm's BasicBlock and Bottleneck) or
            ``"after_add"`` (after the residual block: addition and activation), which is the one for RegNets and ConvNeXts.
        kind: ``"gc"`` (with ``fusion_types=("channel_add",)`` unless given, which starts as the identity), ``"se"`` (which
            multiplies its input by about 1/2 at first), ``"ese"`` or ``"eca"`` (likewise), ``"snl"`` or ``"nl"``.
        modules: name or names of modules to insert a block behind, instead of stages and position. A mapping also gives the
            channels of their outputs, which are otherwise read from the module's weights. They must not be norms.
        fuse_tail: whether a block before the addition takes the addition and the ReLU along.
        options: for the constructor of the block. Device and dtype are those of the module in front of it.

    Returns:
        The names of the new blocks in the model.

    Raises:
        TypeError: the model is no nn.Module.
        ValueError: an unknown kind, position or stage; a model without such stages; residual blocks of another library with
            ``"after_conv3"``; a module that is not there, is a norm, whose channels are unknown, or that already has a block.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {tuple(KINDS)}, got {kind!r}")
    if position not in POSITIONS:
        raise ValueError(f"position must be one of {POSITIONS}, got {position!r}")
    found = dict(model.named_modules(remove_duplicate=False))
    places: dict[str, int | None]
    if modules is None:
        places = {}
        for name in residual_blocks(model, stages):
            if all(found[name] is not found[other] for other in places):  # stages may share a residual block
                places[name] = None
    else:
        modules = (modules,) if isinstance(modules, str) else modules
        places = {name: modules[name] if isinstance(modules, Mapping) else None for name in modules}
        for name in places:
            _check_place(found, name)
    for name in places:
        if hasattr(found[name], NAME):
            raise ValueError(f"{name!r} has a {NAME} already")
    in_residual = modules is None and position == "after_conv3"
    classes = {name: _class_of(name, found[name], fuse_tail) for name in places} if in_residual else {}
    blocks = {name: _block(found[name], name, channels, ratio, kind, options) for name, channels in places.items()}
    for name, block in blocks.items():
        found[name].add_module(NAME, block)
        if in_residual:
            found[name].__class__ = classes[name]
        else:
            found[name].register_forward_hook(_apply)
    names = [f"{name}.{NAME}" if name else NAME for name in blocks]
    if not in_residual and names:
        model.register_forward_hook(_Watch({block: found[name] for block, name in zip(names, blocks, strict=True)}))
    return names


# ---- behind a module ---------------------------------------------------------------------------------------------------------


def _apply(module: Any, _arguments: tuple, output: Tensor) -> Tensor:
    """The forward hook that calls the block. It is a function without state, so it survives deepcopy and pickle."""
    block = getattr(module, NAME)
    if not is_compiling():
        block.__dict__["_calls"] = block.__dict__.get("_calls", 0) + 1
    return block(output)


def _apply_plain(self, input: tuple[Tensor], output: Tensor) -> Tensor:  # TorchScript wants these names
    return self.context_block(output)


def plain_hooks(hooks: MutableMapping[int, Any]) -> None:
    """Exchanges the hook that calls an inserted block for one that TorchScript can compile, and takes out the watch."""
    for key, hook in list(hooks.items()):
        if hook is _apply:
            hooks[key] = _apply_plain
        elif isinstance(hook, _Watch):
            del hooks[key]


class _Watch:
    """A hook of the model that says, once, that a block was never called, or is gone with the module that it stands behind."""

    def __init__(self, places: dict[str, nn.Module]) -> None:
        self.places = places  # by the name of the block, the module in front of it
        self.calls = dict.fromkeys(places, 0)
        self.told = False

    def __call__(self, model: nn.Module, _arguments: tuple, _output: Any) -> None:
        if is_compiling() or self.told:
            return
        for name, module in self.places.items():
            block = children(module).get(NAME)
            calls = self.calls[name] if block is None else vars(block).get("_calls", 0)
            if calls == self.calls[name]:
                self._look(model, name, module)
            self.calls[name] = calls

    def _look(self, model: nn.Module, name: str, module: nn.Module) -> None:
        """Warns that a block was not called, unless it is in place and was called before or may be called by compiled code."""
        parts = list(model.modules())
        hooked = children(module).get(NAME) is not None and (
            not modules_can_be_read or _apply in getattr(module, HOOKS[0]).values()
        )
        if hooked and any(part is module for part in parts):
            compiled = any(
                getattr(part, "_compiled_call_impl", None) is not None or "Optimized" in type(part).__name__ for part in parts
            )
            if self.calls[name] or compiled:
                return
            why = "the module that it stands behind was not called"
        else:
            why = "the module that it stands behind was exchanged"
        self.told = True
        warnings.warn(
            f"the model was called, and its inserted block {name} was not: {why}. Insert it behind another module.",
            RuntimeWarning,
            stacklevel=3,
        )


def _check_place(found: Mapping[str, nn.Module], name: str) -> None:
    """
    Raises:
        ValueError: there is no such module, or it is a norm.
    """
    if name not in found:
        near = difflib.get_close_matches(name, found, 3)
        hint = f"; near it are {', '.join(map(repr, near))}" if near else ""
        raise ValueError(f"modules must name modules of the model, got {name!r}{hint}")
    if "Norm" in type(found[name]).__name__:
        around = name.rpartition(".")[0]
        hint = f", such as {around!r}" if around else ""
        raise ValueError(
            f"modules must not name norms, which tools exchange and fuse, and what stands behind them is lost, got {name!r} "
            f"({type(found[name]).__name__}): name the module around it{hint}, or its convolution if the norm may come after"
        )


# ---- in a residual block -----------------------------------------------------------------------------------------------------


def _class_of(name: str, residual: nn.Module, fuse_tail: bool) -> type[Any]:
    try:
        return class_with_context_block(residual, fuse_tail=fuse_tail)
    except ValueError as why:
        raise ValueError(
            f"position 'after_conv3' needs torchvision's or timm's BasicBlock or Bottleneck, and {name} is none: {why}; "
            f"pass position='after_add', or modules=[{name!r}, ...] with modules that it calls"
        ) from None


# ---- the block ---------------------------------------------------------------------------------------------------------------


def _channels_of(layer: nn.Module | None) -> int | None:
    """The output channels of a convolution, a linear layer or a norm, from its weights, its statistics or its attributes."""
    if layer is None:
        return None
    transposed = bool(getattr(layer, "transposed", False))
    for tensor in () if transposed else (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
        if tensor.dim() > 0:
            return tensor.shape[0]
    attributes = (getattr(layer, name, None) for name in ("out_channels", "num_features", "num_channels", "out_features"))
    return next((channels for channels in attributes if isinstance(channels, int)), None)


def _channels(module: nn.Module, name: str) -> int:
    channels = _channels_of(module)
    for convolution, norm in LAST_LAYERS if channels is None else ():
        for layer in (norm, convolution):
            channels = _channels_of(children(module).get(layer)) if channels is None else channels
    if channels is None and is_residual_block_of_others(module):
        channels = next((found for part in reversed(list(module.modules())) if (found := _channels_of(part)) is not None), None)
    if channels is None:
        raise ValueError(f"the channels of {name!r} are unknown: give modules={{{name!r}: channels}}")
    return channels


def _block(module: nn.Module, name: str, channels: int | None, ratio: float, kind: str, options: dict[str, Any]) -> nn.Module:
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    factory: dict[str, Any] = {} if parameter is None else {"device": parameter.device, "dtype": parameter.dtype}
    if kind in WITH_A_BOTTLENECK:
        factory["ratio"] = ratio
    block = KINDS[kind](_channels(module, name) if channels is None else channels, **{**factory, **options})
    return block.train(module.training)
