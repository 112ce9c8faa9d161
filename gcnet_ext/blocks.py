"""The blocks as nn.Modules. Parameters live in ordinary submodules under the names of the reference implementation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .functional import Transform
from .reference import accumulation_dtype

POOLING_TYPES = ("att", "avg")
FUSION_TYPES = ("channel_add", "channel_mul")


class GlobalContextBlock(nn.Module):
    """The Global Context block of GCNet on compiled kernels: context modelling, transform and fusion.

    ``context = attention pooling of x``; ``out = x * sigmoid(mul(context)) + add(context)``, either branch optional, each
    ``1x1 conv, LayerNorm, ReLU, 1x1 conv`` with ``int(inplanes * ratio)`` hidden units.

    Source: https://arxiv.org/abs/1904.11492, equation 5 and figure 4d. Signature, parameter names, shapes and initialisation
    are those of the reference implementation (mmcv ``ContextBlock``), so its checkpoints load with ``strict=True``.

    Args:
        inplanes: C, the channels of the input and of the output.
        ratio: hidden units per channel, 1/16 in the paper; ``int(inplanes * ratio)`` must be at least 1.
        pooling_type: ``"att"`` (attention pooling) or ``"avg"`` (average pooling).
        fusion_types: ``"channel_mul"``, ``"channel_add"`` or a sequence of them.
        eps: epsilon of the LayerNorms.
        device, dtype: of the parameters, as in every nn.Module.

    Shapes:
        Input ``[N, C, *spatial]`` with one, two or three (or more) spatial dimensions; the output is like it, in its dtype and
        memory format. The input is float16, bfloat16, float32 or float64, the parameters of its dtype or float32.

    Raises:
        ValueError: an argument of the constructor is not among the valid ones, which the message lists.
        RuntimeError: the input has a wrong rank, dtype, device, number of channels, or no positions. The message says what.

    A submodule may be replaced, parametrized or hooked: what is no longer the plain layer is called as a module, with the
    compiled pooling and fusion around it.
    """

    def __init__(
        self,
        inplanes: int,
        ratio: float,
        pooling_type: str = "att",
        fusion_types: str | Iterable[str] = ("channel_mul",),
        *,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        fusion_types = (fusion_types,) if isinstance(fusion_types, str) else tuple(fusion_types)
        if pooling_type not in POOLING_TYPES:
            raise ValueError(f"pooling_type must be one of {POOLING_TYPES}, got {pooling_type!r}")
        if not fusion_types or not set(fusion_types) <= set(FUSION_TYPES):
            raise ValueError(f"fusion_types must be one or more of {FUSION_TYPES}, got {fusion_types!r}")
        planes = int(inplanes * ratio)
        if planes < 1:
            raise ValueError(
                f"inplanes * ratio must be at least 1 (one hidden unit), got {inplanes} * {ratio} = {inplanes * ratio}"
            )
        self.inplanes = inplanes
        self.ratio = ratio
        self.planes = planes
        self.pooling_type = pooling_type
        self.fusion_types = fusion_types
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def branch(fusion: str) -> nn.Sequential | None:
            if fusion not in fusion_types:
                return None
            return nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, **factory),
                nn.LayerNorm([planes, 1, 1], eps=eps, **factory),
                nn.ReLU(),
                nn.Conv2d(planes, inplanes, 1, **factory),
            )

        self.conv_mask = nn.Conv2d(inplanes, 1, 1, **factory) if pooling_type == "att" else None
        self.channel_add_conv = branch("channel_add")
        self.channel_mul_conv = branch("channel_mul")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the reference does: both branches start at zero, so an add-only block starts as the identity."""
        if self.conv_mask is not None:
            nn.init.kaiming_normal_(self.conv_mask.weight, mode="fan_in", nonlinearity="relu")
            nn.init.zeros_(self.conv_mask.bias)
        for branch in (self.channel_add_conv, self.channel_mul_conv):
            if branch is not None:
                branch[0].reset_parameters()
                branch[1].reset_parameters()
                nn.init.zeros_(branch[3].weight)
                nn.init.zeros_(branch[3].bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() > 1 and x.shape[1] != self.inplanes:
            raise RuntimeError(f"x must have {self.inplanes} channels (inplanes), got shape {list(x.shape)}")
        fused = self._fused_arguments()
        if fused is not None:
            mask_weight, mask_bias, scale, shift, eps = fused
            return functional.global_context(x, mask_weight, mask_bias, scale, shift, eps=eps)
        context = self._context(x)
        scale = None if self.channel_mul_conv is None else _call_branch(self.channel_mul_conv, context).sigmoid()
        shift = None if self.channel_add_conv is None else _call_branch(self.channel_add_conv, context)
        return functional.channel_fuse(x, scale, shift)

    def attention_map(self, x: Tensor) -> Tensor:
        """Where the block looks: the softmax over positions, ``[N, *spatial]``, for pictures. Not differentiable."""
        if self.conv_mask is None:
            raise RuntimeError("pooling_type must be 'att' for an attention map, got 'avg'")
        if _is_pointwise(self.conv_mask):
            return functional.attention_map(x, self.conv_mask.weight, self.conv_mask.bias)
        return self._called_attention(x).detach().reshape(x.shape[:1] + x.shape[2:])

    def extra_repr(self) -> str:
        return f"{self.inplanes}, ratio={self.ratio}, pooling_type={self.pooling_type!r}, fusion_types={self.fusion_types!r}"

    def _fused_arguments(self) -> tuple[Tensor | None, Tensor | None, Transform | None, Transform | None, float] | None:
        """Mask weight and bias, scale, shift and eps of the fused operator; None when a submodule is not the plain layer."""
        # From the dictionaries, here and in _parameter: nn.Module's look-up of 20 attributes costs as much as a small kernel.
        modules = self._modules
        mask, add, mul = map(modules.get, ("conv_mask", "channel_add_conv", "channel_mul_conv"))
        if mask is not None and not _is_pointwise(mask):
            return None
        shift = None if add is None else _fused_branch(add)
        scale = None if mul is None else _fused_branch(mul)
        if (add is not None and shift is None) or (mul is not None and scale is None):
            return None
        if shift is not None and scale is not None and shift[1] != scale[1]:
            return None
        return (
            None if mask is None else _parameter(mask, "weight"),
            None if mask is None else _parameter(mask, "bias"),
            None if scale is None else scale[0],
            None if shift is None else shift[0],
            (scale or shift)[1],
        )

    def _context(self, x: Tensor) -> Tensor:
        if self.conv_mask is None:
            return functional.attention_pool(x)
        if _is_pointwise(self.conv_mask):
            return functional.attention_pool(x, self.conv_mask.weight, self.conv_mask.bias)
        positions = x.flatten(2).to(accumulation_dtype(x))
        return torch.einsum("ncp,np->nc", positions, self._called_attention(x)).to(x.dtype)

    def _called_attention(self, x: Tensor) -> Tensor:
        """The softmax over positions [N, P] of what the mask, called as the module it is, makes of x."""
        as_image = x if x.dim() == 4 or not isinstance(self.conv_mask, nn.Conv2d) else x.flatten(2).unsqueeze(3)
        logits = self.conv_mask(_in_dtype_of(self.conv_mask, as_image))
        return logits.flatten(1).to(accumulation_dtype(x)).softmax(1)


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module does what its class says and nothing else: no override, no hook."""
    own = module.__dict__
    return (
        (type(module) is kind or (isinstance(module, kind) and type(module).forward is kind.forward))
        and "forward" not in own
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and not own["_backward_hooks"]
        and not own["_backward_pre_hooks"]
    )


def _is_pointwise(module: nn.Module) -> bool:
    """Whether the module is a 1x1 convolution, whatever its weights are computed from."""
    return (
        _is_plain(module, nn.Conv2d)
        and type(module)._conv_forward is nn.Conv2d._conv_forward
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.padding == (0, 0)
        and module.groups == 1
    )


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    parameter = module._parameters.get(name)
    return getattr(module, name) if parameter is None else parameter  # a parametrized weight is a property


def _fused_branch(branch: nn.Module) -> tuple[Transform, float] | None:
    """The weights and the eps of a branch that is conv, LayerNorm over all it gets, ReLU, conv; None for any other."""
    if not _is_plain(branch, nn.Sequential) or len(branch._modules) != 4:
        return None
    first, norm, activation, last = branch._modules.values()
    if not (
        _is_pointwise(first)
        and _is_plain(norm, nn.LayerNorm)
        and norm.normalized_shape == (first.out_channels, 1, 1)
        and _is_plain(activation, nn.ReLU)
        and _is_pointwise(last)
    ):
        return None
    weights = [_parameter(module, name) for module in (first, norm, last) for name in ("weight", "bias")]
    return Transform(*weights), norm.eps


def _in_dtype_of(module: nn.Module, tensor: Tensor) -> Tensor:
    """The tensor in the dtype of the module's parameters: a mixed block takes what the fused operator takes."""
    return tensor.to(next(module.parameters(), tensor).dtype)


def _call_branch(branch: nn.Module, context: Tensor) -> Tensor:
    """The branch of context [N, C], called as the module it is."""
    return branch(_in_dtype_of(branch, context)[:, :, None, None]).flatten(1).to(accumulation_dtype(context))
