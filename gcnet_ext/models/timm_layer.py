"""Blocks of this package for the constructors of timm's models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .insert import KINDS, WITH_A_BOTTLENECK
from .skeleton import kind_of_activation

NAMES = {"swish": "silu", "hard_swish": "hardswish"}
"""timm's names for activations -> ours."""


@dataclass(frozen=True)
class TimmLayer:
    """What `timm_layer` returns: it makes a block when timm calls it. It can be pickled and compared."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(
        self,
        channels: int,
        *,
        rd_ratio: float = 1 / 16,
        act_layer: str | Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        given: dict[str, Any] = {"device": device, "dtype": dtype}
        if self.kind in WITH_A_BOTTLENECK:
            given["planes"] = max(1, round(channels * rd_ratio))
            if act_layer is not None:
                given["activation"], given["slope"] = _activation(act_layer)
        return KINDS[self.kind](channels, **{**given, **self.options})


def timm_layer(kind: str, **options: Any) -> TimmLayer:
    """A constructor of blocks of this package, for timm's ``attn_layer=`` and ``se_layer=``.

    timm calls it with the channels and, where its builder has them, ``rd_ratio`` (hidden units per channel, rounded), then
    ``act_layer``, ``device`` and ``dtype``. Blocks without a bottleneck ignore the first two::

        timm.create_model("resnet50", block_args=dict(attn_layer=gcnet_ext.timm_layer("gc")))
        timm.create_model("efficientnet_b0", se_layer=gcnet_ext.timm_layer("se"))

    Args:
        kind: ``"gc"``, ``"se"``, ``"ese"``, ``"eca"``, ``"snl"`` or ``"nl"``, as in `insert_blocks`.
        options: for the constructor of the block; they take precedence over what timm gives.

    Returns:
        The constructor.

    Raises:
        ValueError: an unknown kind; or, when timm calls it, an activation that the block does not know.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {tuple(KINDS)}, got {kind!r}")
    return TimmLayer(kind, options)


def _activation(act_layer: str | Callable[..., nn.Module]) -> tuple[str, float]:
    """The activation that timm names, or that a constructor makes, and its slope."""
    if isinstance(act_layer, str):
        return NAMES.get(act_layer, act_layer), 0.01  # the constructor of the block refuses another name
    known = kind_of_activation(made := act_layer())
    if known is None:
        raise ValueError(f"act_layer must make an activation that the block knows, got a {type(made).__name__}")
    return known
