"""The simplified non-local block: attention pooling, one linear transform, add."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops._options import FINAL_ACTIVATIONS
from ..ops.attention_pool import attention_map, attention_pool
from ..ops.channel_fuse import channel_fuse
from . import _layers
from ._fused import FusedBlock, Layers, layers, one_layer
from ._layers import Gate


class SimplifiedNonLocalBlock(FusedBlock):
    """The simplified non-local block on compiled kernels: ``out = x + W sum_p softmax_p(conv_mask(x)) x_p``.

    Source: Y. Cao et al., "GCNet", 2019, https://arxiv.org/abs/1904.11492, equation 3 and figure 4b: one query-independent
    attention for all positions, and the transform W (C to C) after the pooling instead of before it.

    Args:
        inplanes: C, the channels of the input and of the output.
        in_channels: mmcv's name for inplanes.
        final_activation: of the result, behind the residual if one is given: ``"none"`` or ``"relu"``.
        inplace: overwrite the input with the output. For inference: with autograd it is an error.
        device, dtype: of the parameters, as in every nn.Module.

    Shapes:
        Input ``[N, C, *spatial]``; the output is like it, in its dtype and memory format.
        ``block(x, residual, valid)`` adds a residual of the shape and dtype of x to the result before the final activation, and
        pools over the positions that count: valid is bool, ``[N, *spatial]`` or ``[1, *spatial]``. Both may be None.

    Raises:
        ValueError: an argument of the constructor is not valid. The message says what is valid.
        TypeError: inplanes is missing, or both inplanes and in_channels are given.
        RuntimeError: the input has a wrong rank, dtype, device, number of channels, or no positions. The message says what.

    Runs on the fused operator. A submodule that was replaced or hooked is called as a module, with the compiled kernels
    around it. The block starts as the identity: W is zero.
    """

    if TYPE_CHECKING:  # nn.Module.__call__ takes and returns Any

        def __call__(self, x: Tensor, residual: Tensor | None = None, valid: Tensor | None = None) -> Tensor: ...

    def __init__(
        self,
        inplanes: int | None = None,
        *,
        in_channels: int | None = None,
        final_activation: str = "none",
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.inplanes = inplanes = _layers.count_channels(inplanes, in_channels)
        _layers.check_choice("final_activation", final_activation, FINAL_ACTIVATIONS)
        self.final_activation = final_activation
        self.inplace = inplace
        self.conv_mask = nn.Conv2d(inplanes, 1, 1, **factory)
        self.conv_out = nn.Conv2d(inplanes, inplanes, 1, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the mask as a GC block's, and W with zeros."""
        nn.init.kaiming_normal_(self.conv_mask.weight, mode="fan_in", nonlinearity="relu")
        tensor: Any
        for tensor in (self.conv_mask.bias, self.conv_out.weight, self.conv_out.bias):
            nn.init.zeros_(tensor)

    def attention_map(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Where the block looks: the softmax over positions of x ``[N, C, *spatial]``, for pictures.

        Returns ``[N, *spatial]`` in float32, or in float64 for a float64 x. Not differentiable. Errors are those of
        `gcnet_ext.attention_map`, which explains valid.
        """
        if _layers.is_pooled_with(self.conv_mask, x):
            return attention_map(x, self.conv_mask.weight, self.conv_mask.bias, valid=valid)
        return _layers.called_attention(self.conv_mask, x, valid).detach().reshape(x.shape[:1] + x.shape[2:])

    def extra_repr(self) -> str:
        return f"{self.inplanes}"

    def _plain_layers(self) -> Layers | None:
        if not _layers.is_pointwise(self.conv_mask) or not _layers.is_pointwise(self.conv_out):
            return None
        return layers(self.conv_mask, None, one_layer(self.conv_out), Gate(), self.final_activation)

    def _with_called_layers(self, x: Tensor, residual: Tensor | None, valid: Tensor | None) -> Tensor:
        mask = self.conv_mask
        if _layers.is_pooled_with(mask, x):
            context = attention_pool(x, mask.weight, mask.bias, valid=valid)
        else:
            context = _layers.called_context(mask, x, valid)
        shift = _layers.call_on_context(self.conv_out, _layers.as_image(context), x)
        return channel_fuse(x, None, shift, residual=residual, final_activation=self.final_activation, inplace=self.inplace)
