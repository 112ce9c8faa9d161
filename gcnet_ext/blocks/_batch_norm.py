"""A BatchNorm in evaluation: an affine map of each channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scale_of(norm: Any) -> Tensor:
    """What a channel is multiplied by, ``weight / sqrt(running_var + eps)`` [C], at least in float32."""
    variance = norm.running_var
    scale: Tensor = (variance.to(torch.promote_types(variance.dtype, torch.float32)) + norm.eps).rsqrt()
    return scale if norm.weight is None else scale * norm.weight


def affine_map(norm: Any) -> tuple[Tensor, Tensor]:
    """The scale and the shift [C] with which ``norm(x) = x * scale + shift``."""
    scale = scale_of(norm)
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias
