"""Effective squeeze-excitation: average pooling, one layer, a gate."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..ops._options import FINAL_ACTIVATIONS, GATES
from ..ops.attention_pool import attention_pool
from ..ops.channel_fuse import channel_fuse
from . import _layers, _state_dict
from ._fused import FusedBlock, Layers, layers, one_layer
from ._layers import Gate


class EffectiveSqueezeExcitation(FusedBlock):
    """The squeeze-excitation block of VoVNet on compiled kernels: ``out = x * gate(fc(mean of x))``, without a bottleneck.

    Source: Y. Lee, J. Park, "CenterMask: Real-Time Anchor-Free Instance Segmentation", 2020, https://arxiv.org/abs/1911.06667,
    the section on effective squeeze-excitation. Parameter names and shapes are those of timm's ``EffectiveSEModule``;
    checkpoints of timm's HGNets and of RTMDet's ``ChannelAttention`` load as they are.

    Args:
        channels: C, the channels of the input and of the output.
        gate: ``"hard_sigmoid"`` for ``clip(gate_alpha t + gate_beta, 0, 1)``, as in the authors' code and in timm, or
            ``"sigmoid"``, as in HGNet.
        gate_alpha, gate_beta: of the hard sigmoid; torch uses 1/6 and 1/2, ONNX 0.2 and 0.5.
        final_activation: of the result, behind the residual if one is given: ``"none"`` or ``"relu"``.
        inplace: overwrite the input with the output. For inference: with autograd it is an error.
        device, dtype: of the parameters, as in every nn.Module.

    Shapes:
        Input ``[N, C, *spatial]``; the output is like it, in its dtype and memory format.
        ``block(x, residual, valid)`` adds a residual of the shape and dtype of x to the result before the final activation, and
        pools over the positions that count: valid is bool, ``[N, *spatial]`` or ``[1, *spatial]``. Both may be None.

    Raises:
        ValueError: an argument of the constructor is not valid. The message says what is valid.
        RuntimeError: the input has a wrong rank, dtype, device, number of channels, or no positions. The message says what.

    Runs on the fused operator. The block starts near half its input, as the gate of small numbers is near 1/2. When its layer
    was replaced or hooked, it is called as a module, with the compiled pooling and fusion around it.
    """

    if TYPE_CHECKING:  # nn.Module.__call__ takes and returns Any

        def __call__(self, x: Tensor, residual: Tensor | None = None, valid: Tensor | None = None) -> Tensor: ...

    def __init__(
        self,
        channels: int,
        gate: str = "hard_sigmoid",
        *,
        gate_alpha: float = 1 / 6,
        gate_beta: float = 0.5,
        final_activation: str = "none",
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _layers.check_count("channels", channels)
        _layers.check_choice("gate", gate, GATES)
        _layers.check_choice("final_activation", final_activation, FINAL_ACTIVATIONS)
        self.inplanes = channels
        self.final_activation = final_activation
        self.inplace = inplace
        self.gate = Gate(gate, gate_alpha, gate_beta)
        self.fc = nn.Conv2d(channels, channels, 1, device=device, dtype=dtype)
        self.register_load_state_dict_pre_hook(partial(_state_dict.accept, _state_dict.EFFECTIVE_SQUEEZE_EXCITATION))

    def extra_repr(self) -> str:
        return f"{self.inplanes}, gate={self.gate.kind!r}"

    def _plain_layers(self) -> Layers | None:
        if not _layers.is_pointwise(self.fc):
            return None
        return layers(None, one_layer(self.fc), None, self.gate, self.final_activation)

    def _with_called_layers(self, x: Tensor, residual: Tensor | None, valid: Tensor | None) -> Tensor:
        scale = self.gate(_layers.call_on_context(self.fc, _layers.as_image(attention_pool(x, valid=valid)), x))
        return channel_fuse(x, scale, residual=residual, final_activation=self.final_activation, inplace=self.inplace)
