"""The blocks as modules of plain PyTorch, which every tool for such modules takes: TorchScript, torch.fx, quantization.

A block becomes one by a change of its class (`become_plain`), so that its layers, parameters, keys, hooks and mode stay. Every
layer is called as the module it is. TorchScript compiles this file, and torch.fx takes the functions for leaves, because they
look at the number of dimensions and at what is None.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _layers
from ._fused import NOT_COPIED, FusedBlock
from .effective_squeeze_excitation import EffectiveSqueezeExcitation
from .efficient_channel_attention import EfficientChannelAttention
from .global_context import GlobalContextBlock
from .global_response_norm import GlobalResponseNorm
from .non_local import NonLocalBlock
from .simplified_non_local import SimplifiedNonLocalBlock
from .squeeze_excitation import SqueezeExcitation


def image_of(x: Tensor, column: bool) -> Tensor:
    """x as a layer for images takes it: what is no image becomes a column of its positions, [N, C, P, 1]."""
    return x.flatten(2).unsqueeze(3) if column and x.dim() != 4 else x


def averaged(x: Tensor, valid: Tensor | None) -> Tensor:
    """The mean over the positions that count, [N, C, 1, 1]."""
    positions = x.flatten(2)
    if valid is None:
        return positions.mean(2)[:, :, None, None]
    counting = valid.flatten(1)
    total = positions.masked_fill(~counting.unsqueeze(1), 0.0).sum(2)
    return (total / counting.sum(1, keepdim=True).to(x.dtype).clamp(min=1))[:, :, None, None]


def attended(x: Tensor, logits: Tensor, valid: Tensor | None) -> Tensor:
    """The mean over the positions that count, weighted with the softmax of the logits, [N, C, 1, 1]."""
    positions, logits = x.flatten(2), logits.flatten(1)
    if valid is None:
        return torch.matmul(positions, logits.softmax(1).to(x.dtype).unsqueeze(2)).unsqueeze(3)
    counting = valid.flatten(1)
    others = ~counting
    somewhere = counting.any(1, keepdim=True)  # where no position counts, the logits stay, so that no NaN arises from them
    attention = logits.masked_fill(others & somewhere, float("-inf")).softmax(1).masked_fill(others, 0.0)
    positions = positions.masked_fill(others.unsqueeze(1), 0.0)
    return torch.matmul(positions, attention.to(x.dtype).unsqueeze(2)).unsqueeze(3)


def gated(t: Tensor, hard: bool, alpha: float, beta: float) -> Tensor:
    """sigmoid(t), or clip(alpha t + beta, 0, 1)."""
    return (alpha * t + beta).clamp(0.0, 1.0) if hard else t.sigmoid()


def fused(x: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    """act(x * scale + shift + residual) of a scale and a shift [N, C, 1, 1], in the dtype of x."""
    per_channel = [x.shape[0], x.shape[1]] + [1 for _ in range(x.dim() - 2)]
    out = x
    if scale is not None:
        out = out * scale.reshape(per_channel)
    if shift is not None:
        out = out + shift.reshape(per_channel)
    if residual is not None:
        out = out + residual
    return (out.relu() if relu else out).to(x.dtype)


def sub_sampled(image: Tensor, x: Tensor, pooled: bool) -> Tensor:
    """The positions that are attended to, [N, D, Q], of an image of x's positions."""
    if not pooled:
        return image.flatten(2)
    spatial = image.reshape(image.shape[:2] + x.shape[2:])
    if x.dim() == 3:
        return F.max_pool1d(spatial, 2)
    return F.max_pool2d(spatial, 2).flatten(2) if x.dim() == 4 else F.max_pool3d(spatial, [1, 2, 2]).flatten(2)


def pairs(theta: Tensor, phi: Tensor) -> Tensor:
    """theta_p and phi_q behind each other for every p and q, [N, 2 D, P, Q]."""
    every_p, every_q = theta.unsqueeze(3), phi.unsqueeze(2)
    return torch.cat([every_p.expand(-1, -1, -1, phi.shape[2]), every_q.expand(-1, -1, theta.shape[2], -1)], 1)


def like(out: Tensor, x: Tensor) -> Tensor:
    """out in the shape and dtype of x."""
    return out.reshape(x.shape).to(x.dtype)


for _name in ("image_of", "averaged", "attended", "gated", "fused", "sub_sampled", "pairs", "like"):
    torch.fx.wrap(_name)


class Plain(nn.Module):
    """What a block of ours becomes: it has the layers and the attributes of the block."""

    if TYPE_CHECKING:  # a submodule is a Tensor or a Module to mypy

        def __getattr__(self, name: str) -> Any: ...


class PlainGlobalContext(Plain):
    """`GlobalContextBlock`."""

    def forward(self, x: Tensor, residual: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        mask = self.conv_mask
        context = averaged(x, valid) if mask is None else attended(x, mask(image_of(x, self.column)), valid)
        scale = None
        if self.channel_mul_conv is not None:  # it gets a copy, because a layer may overwrite what it gets
            scale = gated(self.channel_mul_conv(context.clone()), self.hard, self.alpha, self.beta)
        shift = None
        if self.channel_add_conv is not None:
            shift = self.channel_add_conv(context)
        return fused(x, scale, shift, residual, self.relu)


class PlainSqueezeExcitation(Plain):
    """`SqueezeExcitation`."""

    def forward(self, x: Tensor, residual: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        t = self.fc2(self.activation(self.fc1(averaged(x, valid))))
        return fused(x, gated(t, self.hard, self.alpha, self.beta), None, residual, self.relu)


class PlainEffectiveSqueezeExcitation(Plain):
    """`EffectiveSqueezeExcitation`."""

    def forward(self, x: Tensor, residual: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        scale = gated(self.fc(averaged(x, valid)), self.hard, self.alpha, self.beta)
        return fused(x, scale, None, residual, self.relu)


class PlainEfficientChannelAttention(Plain):
    """`EfficientChannelAttention`."""

    def forward(self, x: Tensor, residual: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        t = self.conv(averaged(x, valid).flatten(1).unsqueeze(1)).transpose(1, 2).unsqueeze(3)
        return fused(x, t.sigmoid(), None, residual, self.relu)


class PlainGlobalResponseNorm(Plain):
    """`GlobalResponseNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        by_channels = x.movedim(-1, 1) if self.channels_last else x
        norms = by_channels.flatten(2).norm(2, 2)
        response = norms / (norms.mean(1, keepdim=True) + self.eps)
        out = fused(by_channels, 1.0 + self.weight * response, self.bias.expand_as(response), None, False)
        return out.movedim(1, -1) if self.channels_last else out


class PlainSimplifiedNonLocal(Plain):
    """`SimplifiedNonLocalBlock`."""

    def forward(self, x: Tensor, residual: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        context = attended(x, self.conv_mask(image_of(x, self.column)), valid)
        return fused(x, None, self.conv_out(context), residual, self.relu)


class PlainNonLocal(Plain):
    """`NonLocalBlock`. It forms the weights of all pairs of positions, as mmcv's block does."""

    def forward(self, x: Tensor) -> Tensor:
        image = image_of(x, True)
        theta, phi = image, image
        if self.theta is not None and self.phi is not None:
            theta, phi = self.theta(image), self.phi(image)
        theta, phi, g = theta.flatten(2), sub_sampled(phi, x, self.sub_sample), sub_sampled(self.g(image), x, self.sub_sample)
        if self.concat_project is not None:
            weights = self.concat_project(pairs(theta, phi)).squeeze(1).relu() / phi.shape[2]  # [N, P, Q]
        else:
            weights = torch.matmul(theta.transpose(1, 2), phi)
            weights = weights / phi.shape[2] if self.mode == "dot_product" else (weights * self.factor).softmax(2)
        y = torch.matmul(g, weights.transpose(1, 2))
        return x + like(self.conv_out(y.unsqueeze(3)), x)


TWINS: dict[type[nn.Module], type[nn.Module]] = {
    EffectiveSqueezeExcitation: PlainEffectiveSqueezeExcitation,
    EfficientChannelAttention: PlainEfficientChannelAttention,
    GlobalContextBlock: PlainGlobalContext,
    GlobalResponseNorm: PlainGlobalResponseNorm,
    NonLocalBlock: PlainNonLocal,
    SimplifiedNonLocalBlock: PlainSimplifiedNonLocal,
    SqueezeExcitation: PlainSqueezeExcitation,
}


def become_plain(block: nn.Module) -> None:
    """Gives one of our blocks the class of its twin, in place.

    Raises:
        TypeError: its class is derived from ours and has a forward of its own.
    """
    kind, twin = next((kind, twin) for kind, twin in TWINS.items() if isinstance(block, kind))
    if type(block).forward is not kind.forward:
        raise TypeError(f"{type(block).__name__} has a forward of its own, which only it knows how to write in plain PyTorch")
    fields: dict[str, object] = {}
    if isinstance(block, FusedBlock):
        mask, gate = getattr(block, "conv_mask", None), getattr(block, "gate", _layers.Gate())
        fields = {"relu": block.final_activation == "relu", "hard": gate.kind == "hard_sigmoid"}
        fields |= {"alpha": float(gate.alpha), "beta": float(gate.beta)}
        fields["column"] = mask is not None and _layers.is_for_images(mask)
    elif isinstance(block, EfficientChannelAttention):
        fields["relu"] = block.final_activation == "relu"
    elif isinstance(block, NonLocalBlock):
        fields["factor"] = block.planes**-0.5 if block.mode == "embedded_gaussian" and block.use_scale else 1.0
    block.__class__ = twin
    for name in NOT_COPIED:
        block.__dict__.pop(name, None)
    block.__dict__.update(fields)
