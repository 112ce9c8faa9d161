"""Efficient channel attention: average pooling, a convolution over neighbouring channels, a gate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from .._torch import is_traced
from ..ops import attention_pool
from ..ops._options import FINAL_ACTIVATIONS
from ..ops.channel_fuse import channel_fuse
from . import _layers
from ._batch_norm import affine_map
from ._fused import Tail


def kernel_size_for(channels: int) -> int:
    """The neighbours that a channel looks at, itself among them: the odd size near ``(log2 C + 1) / 2``, at least 3.

    The paper's equation 12 with gamma = 2 and b = 1, rounded as in timm.
    """
    size = int((math.log2(channels) + 1) / 2)
    return max(3, size if size % 2 else size + 1)


class EfficientChannelAttention(nn.Module):
    """The block of ECA-Net on compiled kernels: ``out = x * sigmoid(conv1d(mean of x))``, a convolution over the channels.

    Source: Q. Wang et al., "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks", 2020,
    https://arxiv.org/abs/1910.03151, equations 5, 9 and 12. Parameter names and shapes are those of timm and of the original.

    Args:
        channels: C, the channels of the input and of the output.
        kernel_size: channels that each channel's gate depends on, odd. None takes what the paper derives from C: 3 below 128
            channels, 5 below 2048, 7 below 32768.
        final_activation: of the result, behind the residual if one is given: ``"none"`` or ``"relu"``.
        inplace: overwrite the input with the output. For inference: with autograd it is an error.
        device, dtype: of the parameter, as in every nn.Module.

    Shapes:
        Input ``[N, C, *spatial]``; the output is like it, in its dtype and memory format.
        ``block(x, residual, valid)`` adds a residual of the shape and dtype of x to the result before the final activation, and
        pools over the positions that count: valid is bool, ``[N, *spatial]`` or ``[1, *spatial]``. Both may be None.

    Raises:
        ValueError: an argument of the constructor is not valid. The message says what is valid.
        RuntimeError: the input has a wrong rank, dtype, device, number of channels, or no positions. The message says what.

    Pooling and fusion are compiled, and between them the convolution runs in plain PyTorch, as a module if it was replaced or
    hooked. Channels outside of the input count as zeros.
    """

    if TYPE_CHECKING:  # nn.Module.__call__ takes and returns Any

        def __call__(self, x: Tensor, residual: Tensor | None = None, valid: Tensor | None = None) -> Tensor: ...

    def __init__(
        self,
        channels: int,
        kernel_size: int | None = None,
        *,
        final_activation: str = "none",
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _layers.check_count("channels", channels)
        _layers.check_choice("final_activation", final_activation, FINAL_ACTIVATIONS)
        if kernel_size is None:
            kernel_size = kernel_size_for(channels)
        _layers.check_count("kernel_size", kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.inplanes = channels
        self.final_activation = final_activation
        self.inplace = inplace
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        if not isinstance(x, Tensor):
            return _layers.of_no_tensor(self, x, residual=residual, valid=valid)
        return self._output(x, residual, valid, self.final_activation, self.inplace, None)

    def _takes_tail(self) -> bool:
        """Whether nothing of the block itself stands between its result and a tail."""
        return self.final_activation == "none"

    def _with_tail(self, x: Tensor, tail: Tail) -> Tensor:
        """The output of the block and of the tail behind it."""
        return self._output(x, tail.residual, None, "relu", self.inplace or tail.inplace, tail.norm)

    def _output(
        self,
        x: Tensor,
        residual: Tensor | None,
        valid: Tensor | None,
        final_activation: str,
        inplace: bool,
        norm: nn.Module | None,
    ) -> Tensor:
        _layers.check_channels(x, self.inplanes)
        context = attention_pool.unrounded(x, None, None, valid)
        scale, shift = fusion(self.conv, context, x, norm)
        return channel_fuse(x, scale, shift, residual=residual, final_activation=final_activation, inplace=inplace)

    def __prepare_scriptable__(self) -> NoReturn:
        _layers.not_scriptable(self)

    def extra_repr(self) -> str:
        return f"{self.inplanes}"


def fusion(conv: nn.Module, context: Tensor, x: Tensor, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """The scale and the shift [N, C] of x, for its context, or for that of ``norm(x)``, which is ``x * a + b``:
    ``norm(x) * s = x * (a s) + b s``."""
    if norm is None:
        return gate(conv, context, x), None
    a, b = (values.to(context.dtype) for values in affine_map(norm))
    scale = gate(conv, context * a + b, x)
    return scale * a, scale * b


def gate(conv: nn.Module, context: Tensor, x: Tensor) -> Tensor:
    """The scale [N, C] of x that the convolution makes of the context [N, C], in the dtype of the context.

    A plain one is written as a sum over neighbours, in the accumulation dtype whatever that of the weight is and under
    autocast, too. Any other is called as the module it is.
    """
    if not _is_over_neighbours(conv):
        return _layers.call(conv, context[:, None], x.dtype)[:, 0].to(context.dtype).sigmoid()
    weight: Any = conv.weight
    size = weight.shape[2]
    padded = nn.functional.pad(context, (size // 2, size // 2))
    if is_traced():  # the exporter to ONNX that traces does not know unfold
        neighbours = torch.stack([padded[:, i : i + context.shape[1]] for i in range(size)], 2)
    else:
        neighbours = padded.unfold(1, size, 1)  # [N, C, kernel_size]
    return (neighbours * weight.reshape(-1).to(context.dtype)).sum(2).sigmoid()


def _is_over_neighbours(conv: nn.Module) -> bool:
    return bool(
        _layers.is_plain(conv, nn.Conv1d)
        and conv.weight.shape[:2] == (1, 1)
        and conv.bias is None
        and conv.padding == (conv.weight.shape[2] // 2,)
        and (conv.stride, conv.dilation, conv.padding_mode) == ((1,), (1,), "zeros")
    )
