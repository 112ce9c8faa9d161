"""The Global Context block. Parameters live in ordinary submodules under the names of the reference implementation."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._torch import children
from ..ops import _split_pool
from ..ops._options import FINAL_ACTIVATIONS, GATES
from ..ops.attention_pool import attention_map, attention_pool
from ..ops.channel_fuse import channel_fuse
from . import _layers, _state_dict
from ._fused import FusedBlock, Layers, PlainBranch, layers, two_layers
from ._layers import Gate

POOLING_TYPES = ("att", "avg")
FUSION_TYPES = ("channel_add", "channel_mul")


class GlobalContextBlock(FusedBlock):
    """The Global Context block of GCNet on compiled kernels: context modelling, transform and fusion.

    ``context = attention pooling of x``; ``out = x * sigmoid(mul(context)) + add(context)``; one branch may be absent; each is
    ``1x1 conv, LayerNorm, ReLU, 1x1 conv`` with ``int(inplanes * ratio)`` hidden units.

    Source: https://arxiv.org/abs/1904.11492, equation 5 and figure 4d. Parameter names, shapes and initialisation are those of
    the reference implementation (mmcv ``ContextBlock``), so its checkpoints load with ``strict=True``. Arguments and defaults
    are those of the snippet of the block that circulates in many repositories (ratio has no default there). mmcv's differ in
    two things: inplanes is called ``in_channels``, which is accepted here, too, and fusion_types are ``("channel_add",)`` by
    default. A ``channel_add`` block starts as the identity; a ``channel_mul`` block multiplies its input by 1/2 at first,
    because its last layer is zero and sigmoid(0) = 1/2.

    Args:
        inplanes: C, the channels of the input and of the output.
        ratio: hidden units per channel, at most 1, and 1/16 in the paper; ``int(inplanes * ratio)`` must be at least 1.
        pooling_type: ``"att"`` (attention pooling) or ``"avg"`` (average pooling).
        fusion_types: ``"channel_mul"``, ``"channel_add"`` or a sequence of them.
        in_channels: mmcv's name for inplanes.
        planes: the hidden units themselves, instead of a ratio.
        norm: whether a LayerNorm stands between the two layers of a branch.
        eps: epsilon of the LayerNorms.
        activation: between the two layers: ``"none"``, ``"relu"``, ``"silu"``, ``"gelu"``, ``"gelu_tanh"``, ``"hardswish"`` or
            ``"leaky_relu"``.
        slope: of ``"leaky_relu"`` below 0.
        gate: what the scale goes through: ``"sigmoid"``, or ``"hard_sigmoid"`` for ``clip(gate_alpha t + gate_beta, 0, 1)``.
        gate_alpha, gate_beta: of the hard sigmoid; torch uses 1/6 and 1/2, ONNX 0.2 and 0.5.
        final_activation: of the result, behind the residual if one is given: ``"none"`` or ``"relu"``.
        process_group: a torch.distributed group; each of its processes holds a part of every image, split along a spatial
            dimension. The context is that of the whole image: one collective of ``N (C + 1)`` numbers in forward, one of
            ``N C`` in backward. The caller sums the gradients of the parameters over the group. deepcopy of the block fails.
        inplace: overwrite the input with the output, as nn.ReLU can. For inference: with autograd it is an error.
        device, dtype: of the parameters, as in every nn.Module.

    Shapes:
        Input ``[N, C, *spatial]`` with one, two or three (or more) spatial dimensions; the output is like it, in its dtype and
        memory format. The input is float16, bfloat16, float32 or float64, the parameters of its dtype or float32.
        ``block(x, residual, valid)`` adds a residual of the shape and dtype of x to the result before the final activation, and
        pools over the positions that count: valid is bool, ``[N, *spatial]`` or ``[1, *spatial]``. Both may be None.

    Raises:
        ValueError: an argument of the constructor is not valid. The message says what is valid.
        TypeError: inplanes is missing, or both inplanes and in_channels are given.
        RuntimeError: the input has a wrong rank, dtype, device, number of channels, or no positions; or it would be overwritten
            where autograd needs it. The message says what.

    Submodules may be parametrized, replaced or hooked (then they are called). The fusion stays compiled, and so does the
    pooling if conv_mask is unchanged.
    """

    _abbr_ = "context_block"
    """What mmdet names a plugin of this class in its model."""

    if TYPE_CHECKING:  # nn.Module.__call__ takes and returns Any

        def __call__(self, x: Tensor, residual: Tensor | None = None, valid: Tensor | None = None) -> Tensor: ...

    def __init__(
        self,
        inplanes: int | None = None,
        ratio: float = 1 / 16,
        pooling_type: str = "att",
        fusion_types: str | Iterable[str] = ("channel_mul",),
        *,
        in_channels: int | None = None,
        planes: int | None = None,
        norm: bool = True,
        eps: float = 1e-5,
        activation: str = "relu",
        slope: float = 0.01,
        gate: str = "sigmoid",
        gate_alpha: float = 1 / 6,
        gate_beta: float = 0.5,
        final_activation: str = "none",
        process_group: torch.distributed.ProcessGroup | None = None,
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        fusion_types = (
            (fusion_types,) if isinstance(fusion_types, str) or not isinstance(fusion_types, Iterable) else tuple(fusion_types)
        )
        _layers.check_choice("pooling_type", pooling_type, POOLING_TYPES)
        if not fusion_types or not all(isinstance(fusion, str) and fusion in FUSION_TYPES for fusion in fusion_types):
            raise ValueError(f"fusion_types must be one or more of {FUSION_TYPES}, got {fusion_types!r}")
        _layers.check_choice("gate", gate, GATES)
        _layers.check_choice("final_activation", final_activation, FINAL_ACTIVATIONS)
        self.inplanes = inplanes = _layers.count_channels(inplanes, in_channels)
        self.ratio = ratio
        self.planes = planes = _layers.hidden_units(inplanes, ratio, planes)
        self.pooling_type = pooling_type
        self.fusion_types = fusion_types
        self.gate = Gate(gate, gate_alpha, gate_beta)
        self.final_activation = final_activation
        self.process_group = process_group
        self.inplace = inplace
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def branch(fusion: str) -> nn.Sequential | None:
            if fusion not in fusion_types:
                return None
            return nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, **factory),
                nn.LayerNorm([planes, 1, 1], eps=eps, **factory) if norm else nn.Identity(),
                _layers.make_activation(activation, slope),
                nn.Conv2d(planes, inplanes, 1, **factory),
            )

        self.conv_mask = nn.Conv2d(inplanes, 1, 1, **factory) if pooling_type == "att" else None
        self.channel_add_conv = branch("channel_add")
        self.channel_mul_conv = branch("channel_mul")
        self.register_load_state_dict_pre_hook(partial(_state_dict.accept, _state_dict.GLOBAL_CONTEXT))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the reference does: both branches start at zero, so an add-only block starts as the identity."""
        mask: Any = self.conv_mask  # a submodule of a submodule is a Tensor or a Module to mypy
        branch: Any
        if mask is not None:
            nn.init.kaiming_normal_(mask.weight, mode="fan_in", nonlinearity="relu")
            nn.init.zeros_(mask.bias)
        for branch in (self.channel_add_conv, self.channel_mul_conv):
            if branch is not None:
                branch[0].reset_parameters()
                if isinstance(branch[1], nn.LayerNorm):
                    branch[1].reset_parameters()
                nn.init.zeros_(branch[3].weight)
                nn.init.zeros_(branch[3].bias)

    def attention_map(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Where the block looks: the softmax over positions of x ``[N, C, *spatial]``, for pictures.

        Returns ``[N, *spatial]`` in float32, or in float64 for a float64 x. Not differentiable. Errors are those of
        `gcnet_ext.attention_map`, which explains valid, and a RuntimeError if the block pools by the average.
        """
        if self.conv_mask is None:
            raise RuntimeError("pooling_type must be 'att' for an attention map, got 'avg'")
        if _layers.is_pooled_with(self.conv_mask, x):
            return attention_map(x, self.conv_mask.weight, self.conv_mask.bias, valid=valid)
        return _layers.called_attention(self.conv_mask, x, valid).detach().reshape(x.shape[:1] + x.shape[2:])

    def extra_repr(self) -> str:
        return f"{self.inplanes}, ratio={self.ratio}, pooling_type={self.pooling_type!r}, fusion_types={self.fusion_types!r}"

    def _plain_layers(self) -> Layers | None:
        if self.process_group is not None:
            return None
        mask, add, mul = self.conv_mask, self.channel_add_conv, self.channel_mul_conv
        scale, shift = (None if branch is None else _branch(branch) for branch in (mul, add))
        if (scale is None and mul is not None) or (shift is None and add is not None):
            return None
        return (
            None
            if mask is not None and not _layers.is_pointwise(mask)
            else layers(mask, scale, shift, self.gate, self.final_activation)
        )

    def _with_called_layers(self, x: Tensor, residual: Tensor | None, valid: Tensor | None) -> Tensor:
        context = _layers.as_image(self._context(x, valid))
        mul, add = self.channel_mul_conv, self.channel_add_conv
        scale = None if mul is None else self.gate(_layers.call_on_context(mul, context, x))
        shift = None if add is None else _layers.call_on_context(add, context.clone(), x)  # mul may have saved context
        return channel_fuse(x, scale, shift, residual=residual, final_activation=self.final_activation, inplace=self.inplace)

    def _context(self, x: Tensor, valid: Tensor | None) -> Tensor:
        if self.process_group is not None:
            mask = self.conv_mask
            if mask is not None and not _layers.is_pooled_with(mask, x):
                raise RuntimeError("with process_group, conv_mask must be a plain 1x1 convolution without hooks, got another")
            weight, bias = (None, None) if mask is None else (mask.weight, mask.bias)
            return _split_pool.attention_pool(x, weight, bias, valid, self.process_group)
        if self.conv_mask is None:
            return attention_pool(x, valid=valid)
        if _layers.is_pooled_with(self.conv_mask, x):
            return attention_pool(x, self.conv_mask.weight, self.conv_mask.bias, valid=valid)
        return _layers.called_context(self.conv_mask, x, valid)


def _branch(branch: Any) -> PlainBranch | None:
    """The layers of a branch that is a plain Sequential of conv, LayerNorm or Identity, activation and conv; otherwise None."""
    if not _layers.is_plain(branch, nn.Sequential) or len(children(branch)) != 4:
        return None
    return two_layers(*children(branch).values())
