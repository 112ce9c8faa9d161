"""The bits of the final ReLU as csrc/ops.cpp has them, in plain PyTorch: how many there are, and a mask in bits and back."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Channels next to each other and positions apart: the rule of csrc/layout.h, word for word."""
    channels = x.shape[1]
    spatial = list(zip(x.shape[2:], x.stride()[2:], strict=True))
    if channels == 1 or x.stride(1) != 1 or all(size == 1 for size, _ in spatial):
        return False
    return all(stride >= channels for size, stride in spatial if size != 1)


def _rows(x: Tensor) -> tuple[int, int]:
    """How many rows a sample has, and their length: channels, or in channels_last positions."""
    channels, positions = x.shape[1], 1
    for size in x.shape[2:]:  # numel() would turn the symbolic sizes of a captured graph into numbers
        positions = positions * size
    return (positions, channels) if is_channels_last(x) else (channels, positions)


def bytes_of(x: Tensor) -> int:
    """How many bytes the bits of a sample of x take: each row begins with a byte of its own."""
    rows, length = _rows(x)
    return rows * ((length + 7) // 8)


def unpack(positive: Tensor, x: Tensor) -> Tensor:
    """The bits as a bool mask of the shape of x, which is True where the ReLU passes a gradient."""
    rows, length = _rows(x)
    places = torch.arange(8, dtype=torch.uint8, device=positive.device)
    bits = (positive.reshape(x.shape[0], rows, (length + 7) // 8, 1) >> places & 1).flatten(2)[:, :, :length].bool()
    if is_channels_last(x):
        return bits.reshape(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)
    return bits.reshape(x.shape)


def pack(out: Tensor, x: Tensor, final_activation: int) -> Tensor:
    """The bits of out, which an operator has made of x, in the memory format of x; none where there is no final ReLU."""
    if not final_activation:
        return out.new_empty((x.shape[0], 0), dtype=torch.uint8)
    passes = ~(out <= 0)  # a NaN passes
    in_rows = passes.movedim(1, -1).flatten(1, -2) if is_channels_last(x) else passes.flatten(2)  # [N, rows, length]
    rows, length = in_rows.shape[1:]
    element, row = torch.arange(length, device=out.device), torch.arange(rows, device=out.device)
    values = in_rows.to(torch.uint8) << (element % 8).to(torch.uint8)
    byte = row.unsqueeze(1) * ((length + 7) // 8) + element // 8
    # For a reshape to [N, rows, bytes of a row] torch.compile would guard the sizes, even of a graph that throws the bits away.
    return values.new_zeros((x.shape[0], bytes_of(x))).index_add(1, byte.flatten(), values.flatten(1))
