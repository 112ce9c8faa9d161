"""Blocks put into models that have none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .blocks import GlobalContextBlock, NonLocalBlock, SimplifiedNonLocalBlock, SqueezeExcitation

KINDS: dict[str, Callable[..., nn.Module]] = {
    "gc": lambda channels, ratio, **options: GlobalContextBlock(
        channels, ratio, **{"fusion_types": ("channel_add",), **options}
    ),
    "se": SqueezeExcitation,
    "snl": lambda channels, _ratio, **options: SimplifiedNonLocalBlock(channels, **options),
    "nl": lambda channels, _ratio, **options: NonLocalBlock(channels, **options),
}
POSITIONS = ("after_conv3", "after_add")
NAME = "context_block"


def insert_blocks(
    model: nn.Module,
    stages: Sequence[int] = (2, 3, 4),
    ratio: float = 1 / 16,
    position: str = "after_conv3",
    kind: str = "gc",
    *,
    modules: Sequence[str] | Mapping[str, int] | None = None,
    **options: Any,
) -> list[str]:
    """Put a block into every residual block of a ResNet, or behind any modules of any model, in place.

    In the paper (section 4.1) the GC block stands in every residual block of c3, c4 and c5 (stages 2, 3 and 4 here), after the
    last convolution and its norm, before the addition: ``position="after_conv3"``.

    A block becomes the submodule ``context_block`` of the module that it stands behind, and a forward hook applies it; so every
    other name in the model, and with it every checkpoint, stays as it was.

    Args:
        model: for ``stages``, a ResNet of torchvision or timm, of Bottleneck or BasicBlock.
        stages: the stages to change, from 1 (``layer1``) to 4 (``layer4``).
        ratio: hidden units per channel, for ``"gc"`` and ``"se"``.
        position: ``"after_conv3"`` (after the norm of the last convolution of a residual block) or ``"after_add"`` (after the
            residual block: addition and activation).
        kind: ``"gc"`` (with ``fusion_types=("channel_add",)`` unless given), ``"se"``, ``"snl"`` or ``"nl"``.
        modules: names of modules to insert a block after, instead of stages and position. A mapping also gives the channels of
            their outputs, which are otherwise read from ``num_features``, ``out_channels`` or a residual block's last norm.
        options: for the constructor of the block. Device and dtype are those of the module in front of it.

    Returns:
        The names of the new blocks in the model.

    Raises:
        ValueError: an unknown kind, position or stage; a model without such stages; a module that is not there, whose channels
            are unknown, or that already has a block.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {tuple(KINDS)}, got {kind!r}")
    places: dict[str, int | None]
    if modules is None:
        places = dict(_residual_places(model, stages, position))
    else:
        places = {name: modules[name] if isinstance(modules, Mapping) else None for name in modules}
    found = dict(model.named_modules())
    for name in places:
        if name not in found:
            raise ValueError(f"modules must name modules of the model, got {name!r}")
        if hasattr(found[name], NAME):
            raise ValueError(f"{name!r} has a {NAME} already")
    blocks = {name: _block(found[name], name, channels, ratio, kind, options) for name, channels in places.items()}
    for name, block in blocks.items():
        found[name].add_module(NAME, block)
        found[name].register_forward_hook(_apply)
    return [f"{name}.{NAME}" if name else NAME for name in blocks]


def _apply(module: Any, _arguments: tuple, output: Tensor) -> Tensor:
    """The hook. A function of this module, with nothing of its own: it survives deepcopy and pickle."""
    return module._modules[NAME](output)


def _residual_places(model: nn.Module, stages: Sequence[int], position: str) -> Iterator[tuple[str, int]]:
    """Name and channels of the module behind which a block belongs, for every residual block of the stages."""
    if position not in POSITIONS:
        raise ValueError(f"position must be one of {POSITIONS}, got {position!r}")
    for stage in stages:
        layer = getattr(model, f"layer{stage}", None)
        if stage not in (1, 2, 3, 4) or layer is None:
            raise ValueError(f"stages must be stages of the model, layer1 to layer4, got {stage!r}; or pass modules=")
        for index, residual in layer.named_children():
            norm = _last_norm(residual)
            if norm is None:
                raise ValueError(f"layer{stage}.{index} has no bn3 or bn2; pass modules= instead")
            path = f"layer{stage}.{index}"
            yield f"{path}.{norm}" if position == "after_conv3" else path, getattr(residual, norm).num_features


def _last_norm(residual: nn.Module) -> str | None:
    """The norm after the last convolution: bn3 of a Bottleneck, bn2 of a BasicBlock."""
    return next((name for name in ("bn3", "bn2") if hasattr(getattr(residual, name, None), "num_features")), None)


def _channels(module: nn.Module, name: str) -> int:
    for attribute in ("num_features", "out_channels"):
        if isinstance(getattr(module, attribute, None), int):
            return getattr(module, attribute)
    norm = _last_norm(module)
    if norm is None:
        raise ValueError(f"the channels of {name!r} are unknown: give modules={{{name!r}: channels}}")
    return getattr(module, norm).num_features


def _block(module: nn.Module, name: str, channels: int | None, ratio: float, kind: str, options: dict[str, Any]) -> nn.Module:
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    factory: dict[str, Any] = {} if parameter is None else {"device": parameter.device, "dtype": parameter.dtype}
    block = KINDS[kind](_channels(module, name) if channels is None else channels, ratio, **{**factory, **options})
    return block.train(module.training)
