"""Tensors like those that the kernels return, in shape, dtype and memory format, with nothing computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _relu_bits
from ._precision import accumulation_dtype


def accumulated(x: Tensor, *sizes: int) -> Tensor:
    """A tensor of these sizes in the accumulation dtype."""
    return x.new_empty(sizes, dtype=accumulation_dtype(x))


def like_map(x: Tensor) -> Tensor:
    """A dense tensor of the shape and memory format of x."""
    if _relu_bits.is_channels_last(x):
        return x.new_empty((x.shape[0], *x.shape[2:], x.shape[1])).movedim(-1, 1)
    return x.new_empty(x.shape)


def _no_gradient(x: Tensor) -> Tensor:
    return x.new_empty((0,))


def map_gradient(needed: bool, x: Tensor) -> Tensor:
    """The gradient of x, or of a residual; empty when it is not needed."""
    return like_map(x) if needed else _no_gradient(x)


def gradient(needed: bool, parameter: Tensor | None, x: Tensor) -> Tensor:
    """The gradient of a parameter; empty when it is not needed."""
    if not needed or parameter is None:
        return _no_gradient(x)
    if parameter.is_contiguous():  # new_empty could give a dimension of size 1 another stride
        return parameter.new_empty_strided(parameter.shape, parameter.stride())
    return parameter.new_empty(parameter.shape)


def gradients(needed: bool, parameters: Sequence[Tensor | None], x: Tensor) -> list[Tensor]:
    """The gradients of the weights of a branch."""
    return [gradient(needed, parameter, x) for parameter in parameters]


def bits(x: Tensor, final_activation: int) -> Tensor:
    """The bits of the final ReLU; none where there is no such ReLU."""
    return x.new_empty((x.shape[0], _relu_bits.bytes_of(x) if final_activation else 0), dtype=torch.uint8)
