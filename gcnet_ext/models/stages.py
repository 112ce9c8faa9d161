"""The stages of the networks that people have, and the residual blocks in each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any

from torch import nn

from .._torch import children

STAGES = (1, 2, 3, 4)
LAST_LAYERS = (("conv3", "bn3"), ("conv2", "bn2"))
"""The names of a ResNet's residual block's last convolution and of its norm, for a Bottleneck and for a BasicBlock."""
OTHERS = {
    ("timm.models.regnet", "RegNet"): ("s1", "s2", "s3", "s4"),
    ("torchvision.models.regnet", "RegNet"): tuple(f"trunk_output.block{stage}" for stage in STAGES),
    ("timm.models.convnext", "ConvNeXt"): tuple(f"stages.{stage - 1}.blocks" for stage in STAGES),
    ("torchvision.models.convnext", "ConvNeXt"): tuple(f"features.{2 * stage - 1}" for stage in STAGES),
}
"""By module and name of a class, where the residual blocks of each stage are."""
RESIDUAL_BLOCKS_OF_OTHERS = (
    ("timm.models.regnet", "Bottleneck"),
    ("timm.models.regnet", "PreBottleneck"),
    ("torchvision.models.regnet", "ResBottleneckBlock"),
    ("timm.models.convnext", "ConvNeXtBlock"),
    ("torchvision.models.convnext", "CNBlock"),
)


def residual_blocks(model: nn.Module, stages: Any) -> Iterator[str]:
    """The names of the residual blocks in these stages of the model.

    Raises:
        ValueError: it has no such stage, or stages in several places.
    """
    prefix, net, places = _net_in(model)
    for stage in [int(stage) if isinstance(stage, Integral) else stage for stage in _several(stages)]:
        layer = _below(net, places[stage - 1]) if stage in STAGES else None
        if layer is None:
            raise ValueError(
                f"stages must be numbers from 1 to 4 of stages of the model, got {stage!r}; or pass modules={examples(model)}"
            )
        for index, residual in layer.named_children():
            path = f"{prefix}{places[stage - 1]}.{index}"
            of_resnet = any(isinstance(getattr(residual, name, None), nn.Module) for names in LAST_LAYERS for name in names)
            if not of_resnet and not is_residual_block_of_others(residual):
                raise ValueError(f"{path} has neither conv3 nor conv2: it is no residual block; pass modules={examples(model)}")
            yield path


def is_residual_block_of_others(module: nn.Module) -> bool:
    """Whether it is the residual block of a RegNet or ConvNeXt, whose last layer has the channels of its output."""
    return (type(module).__module__, type(module).__name__) in RESIDUAL_BLOCKS_OF_OTHERS


def _several(stages: Any) -> list[Any]:
    """One stage, or any collection of them."""
    return list(stages) if isinstance(stages, Iterable) and not isinstance(stages, str) else [stages]


def _below(module: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = module
    for name in path.split("."):
        found = None if found is None else children(found).get(name)
    return found


def _places(module: nn.Module) -> Sequence[str] | None:
    """Where the residual blocks of each stage of a network are; None for what is no such network."""
    if any(isinstance(children(module).get(f"layer{stage}"), nn.Module) for stage in STAGES):
        return tuple(f"layer{stage}" for stage in STAGES)
    return next((OTHERS[key] for kind in type(module).__mro__ if (key := (kind.__module__, kind.__name__)) in OTHERS), None)


def _net_in(model: nn.Module) -> tuple[str, nn.Module, Sequence[str]]:
    """The prefix of its names and the one module that has stages, the model or something in it, and their places.

    Raises:
        ValueError: there are several.
    """
    if (places := _places(model)) is not None:
        return "", model, places
    found: list[tuple[str, nn.Module, Sequence[str]]] = []
    for name, module in model.named_modules():
        places = _places(module)
        if places is not None and not any(name.startswith(outer) for outer, *_ in found):
            found.append((f"{name}.", module, places))
    if len(found) > 1:
        raise ValueError(
            f"the model has stages in {', '.join(repr(name[:-1]) for name, *_ in found)}: pass one of these modules"
        )
    return found[0] if found else ("", model, tuple(f"layer{stage}" for stage in STAGES))


def examples(model: nn.Module) -> list[str]:
    """The names of the last three modules, at most two levels below the model, that hold a convolution."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    names = [
        name
        for name, module in model.named_modules()
        if len(name) > 0 and name.count(".") < 2 and any(isinstance(part, convolutions) for part in module.modules())
    ]
    return names[-3:]
