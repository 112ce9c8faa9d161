"""Squeeze-excitation: average pooling, a bottleneck, a gate."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops._options import FINAL_ACTIVATIONS, GATES
from ..ops.attention_pool import attention_pool
from ..ops.channel_fuse import channel_fuse
from . import _layers, _state_dict
from ._fused import FusedBlock, Layers, layers, two_layers
from ._layers import Gate


class SqueezeExcitation(FusedBlock):
    """The squeeze-excitation block on compiled kernels: ``out = x * gate(fc2(activation(fc1(mean of x))))``.

    Source: J. Hu, L. Shen, G. Sun, "Squeeze-and-Excitation Networks", 2018, https://arxiv.org/abs/1709.01507, equations 2 to 4.
    Parameter names and shapes are those of torchvision; checkpoints of timm and of the original load as they are.

    Args:
        inplanes: C, the channels of the input and of the output.
        ratio: hidden units per channel, at most 1; ``int(inplanes * ratio)`` must be at least 1. In torchvision
            the second argument is the number of hidden units (``planes`` here); other libraries take the reduction, 1/ratio.
        in_channels: mmcv's name for inplanes.
        planes: the hidden units themselves, instead of a ratio.
        activation: between the two layers: ``"none"``, ``"relu"``, ``"silu"``, ``"gelu"``, ``"gelu_tanh"``, ``"hardswish"`` or
            ``"leaky_relu"``.
        slope: of ``"leaky_relu"`` below 0.
        gate: ``"sigmoid"``, or ``"hard_sigmoid"`` for ``clip(gate_alpha t + gate_beta, 0, 1)``.
        gate_alpha, gate_beta: of the hard sigmoid; torch uses 1/6 and 1/2, ONNX 0.2 and 0.5.
        final_activation: of the result, behind the residual if one is given: ``"none"`` or ``"relu"``.
        bias: whether the two layers have one.
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

    Runs on the fused operator. The default initialisation is torch's, so the block starts near half its input, as the gate of
    small numbers is near 1/2. When a submodule was replaced or hooked, it is called as a module, with the compiled pooling and
    fusion around it.
    """

    if TYPE_CHECKING:  # nn.Module.__call__ takes and returns Any

        def __call__(self, x: Tensor, residual: Tensor | None = None, valid: Tensor | None = None) -> Tensor: ...

    def __init__(
        self,
        inplanes: int | None = None,
        ratio: float = 1 / 16,
        *,
        in_channels: int | None = None,
        planes: int | None = None,
        activation: str = "relu",
        slope: float = 0.01,
        gate: str = "sigmoid",
        gate_alpha: float = 1 / 6,
        gate_beta: float = 0.5,
        final_activation: str = "none",
        bias: bool = True,
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _layers.check_choice("gate", gate, GATES)
        _layers.check_choice("final_activation", final_activation, FINAL_ACTIVATIONS)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.inplanes = inplanes = _layers.count_channels(inplanes, in_channels)
        self.final_activation = final_activation
        self.inplace = inplace
        self.planes = _layers.hidden_units(inplanes, ratio, planes)
        self.gate = Gate(gate, gate_alpha, gate_beta)
        self.fc1 = nn.Conv2d(inplanes, self.planes, 1, bias=bias, **factory)
        self.activation = _layers.make_activation(activation, slope)
        self.fc2 = nn.Conv2d(self.planes, inplanes, 1, bias=bias, **factory)
        self.register_load_state_dict_pre_hook(partial(_state_dict.accept, _state_dict.SQUEEZE_EXCITATION))

    def extra_repr(self) -> str:
        return f"{self.inplanes}, planes={self.planes}, gate={self.gate.kind!r}"

    def _plain_layers(self) -> Layers | None:
        scale = two_layers(self.fc1, None, self.activation, self.fc2)
        return None if scale is None else layers(None, scale, None, self.gate, self.final_activation)

    def _with_called_layers(self, x: Tensor, residual: Tensor | None, valid: Tensor | None) -> Tensor:
        hidden = _layers.call(self.fc1, _layers.as_image(attention_pool(x, valid=valid)), x.dtype)
        hidden = _layers.call(self.activation, hidden, hidden.dtype)
        scale = self.gate(_layers.call(self.fc2, hidden, hidden.dtype).flatten(1).to(_layers.accumulation_dtype(x)))
        return channel_fuse(x, scale, residual=residual, final_activation=self.final_activation, inplace=self.inplace)
