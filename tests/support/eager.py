"""The block as everybody writes it in eager PyTorch, with the names and the formulas of the reference implementation (mmcv).

It gives the state dicts that must load, and the error that a half-precision block has without kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ContextBlock(nn.Module):
    def __init__(self, channels: int, ratio: float, pooling_type: str = "att", fusion_types: Sequence[str] = ("channel_add",)):
        super().__init__()
        planes = int(channels * ratio)

        def branch() -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(channels, planes, 1), nn.LayerNorm([planes, 1, 1]), nn.ReLU(), nn.Conv2d(planes, channels, 1)
            )

        if pooling_type == "att":
            self.conv_mask = nn.Conv2d(channels, 1, 1)
        self.pooling_type = pooling_type
        self.channel_add_conv = branch() if "channel_add" in fusion_types else None
        self.channel_mul_conv = branch() if "channel_mul" in fusion_types else None

    def forward(self, x: Tensor) -> Tensor:
        if self.pooling_type == "att":
            attention = self.conv_mask(x).flatten(2).softmax(2)
            context = torch.matmul(x.flatten(2), attention.transpose(1, 2)).unsqueeze(3)
        else:
            context = nn.functional.adaptive_avg_pool2d(x, 1)
        out = x
        if self.channel_mul_conv is not None:
            out = out * torch.sigmoid(self.channel_mul_conv(context))
        if self.channel_add_conv is not None:
            out = out + self.channel_add_conv(context)
        return out


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter random values of about the size that keeps the activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 and parameter.shape[0] != parameter.numel() else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return module


def attention_pool(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The context as the block in eager computes it, every step in the dtype of x."""
    channels = x.shape[1]
    attention = nn.functional.conv2d(x, weight.reshape(1, channels, 1, 1), bias).flatten(2).softmax(2)
    return torch.matmul(x.flatten(2), attention.transpose(1, 2)).squeeze(2)


def channel_fuse(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x * scale[:, :, None, None] + shift[:, :, None, None]


def global_context(x: Tensor, mask_weight: Tensor, mask_bias: Tensor, *branches: Tensor) -> Tensor:
    """The whole block in eager, on an image and with nothing missing."""
    context = attention_pool(x, mask_weight, mask_bias)[:, :, None, None]

    def transform(*weights: Tensor) -> Tensor:
        w1, b1, norm_weight, norm_bias, w2, b2 = weights
        hidden = nn.functional.conv2d(context, w1[:, :, None, None], b1)
        norm = [tensor[:, None, None] for tensor in (norm_weight, norm_bias)]
        hidden = nn.functional.layer_norm(hidden, hidden.shape[1:], *norm)
        return nn.functional.conv2d(hidden.relu(), w2[:, :, None, None], b2)

    return x * transform(*branches[:6]).sigmoid() + transform(*branches[6:])


class SqueezeExcitation(nn.Module):
    """As in torchvision: two 1x1 convolutions with a gate."""

    def __init__(self, channels: int, planes: int, activation: nn.Module | None = None, gate: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, planes, 1), nn.Conv2d(planes, channels, 1)
        self.activation, self.gate = activation or nn.ReLU(), gate or nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        context = x.flatten(2).mean(2)[:, :, None, None]
        return x * self.gate(self.fc2(self.activation(self.fc1(context)))).reshape(*x.shape[:2], *(1 for _ in x.shape[2:]))


class EffectiveSqueezeExcitation(nn.Module):
    """The squeeze-excitation of VoVNet: one layer, and a gate."""

    def __init__(self, channels: int, gate: str = "hard_sigmoid") -> None:
        super().__init__()
        self.fc, self.gate = nn.Conv2d(channels, channels, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.fc.weight.flatten(1), self.fc.bias
        t = x.flatten(2).mean(2) @ weight.T + bias
        gate = t.sigmoid() if self.gate == "sigmoid" else (t / 6 + 0.5).clamp(0, 1)
        return x * gate.reshape(*x.shape[:2], *(1 for _ in x.shape[2:]))


class GlobalResponseNorm(nn.Module):
    """Algorithm 1 of the ConvNeXt V2 paper."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels)), eps

    def forward(self, x: Tensor) -> Tensor:
        spatial = [1 for _ in x.shape[2:]]
        norms = x.flatten(2).square().sum(2).sqrt()
        response = norms / (norms.mean(1, keepdim=True) + self.eps)
        weight, bias = self.weight.reshape(-1, *spatial), self.bias.reshape(-1, *spatial)
        return weight * (x * response.reshape(*norms.shape, *spatial)) + bias + x


class EfficientChannelAttention(nn.Module):
    """Equations 5 and 9 of the ECA paper: a convolution over neighbouring channels, with zeros beside them."""

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        context = x.flatten(2).mean(2)
        near = self.conv.weight.shape[2] // 2
        padded = torch.nn.functional.pad(context, (near, near))
        t = sum(weight * padded[:, k : k + x.shape[1]] for k, weight in enumerate(self.conv.weight.flatten()))
        return x * t.sigmoid().reshape(*x.shape[:2], *(1 for _ in x.shape[2:]))


class SimplifiedNonLocal(nn.Module):
    """Equation 3 of the GCNet paper, with W after the pooling."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_mask, self.conv_out = nn.Conv2d(channels, 1, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        positions = x.flatten(2).unsqueeze(3)
        attention = self.conv_mask(positions).flatten(1).softmax(1)
        context = torch.einsum("ncp,np->nc", positions.flatten(2), attention)[:, :, None, None]
        return x + self.conv_out(context).reshape(*x.shape[:2], *(1 for _ in x.shape[2:]))


class NonLocal(nn.Module):
    """mmcv's NonLocal1d, 2d and 3d with the weights of all pairs of positions, as its documentation gives them."""

    def __init__(self, channels: int, reduction: int = 2, mode: str = "embedded_gaussian", sub_sample=False, use_scale=True):
        super().__init__()
        planes = max(channels // reduction, 1)
        self.mode, self.sub_sample, self.scale = mode, sub_sample, planes**-0.5 if use_scale else 1.0
        self.g, self.conv_out = nn.Conv2d(channels, planes, 1), nn.Conv2d(planes, channels, 1)
        if mode != "gaussian":
            self.theta, self.phi = nn.Conv2d(channels, planes, 1), nn.Conv2d(channels, planes, 1)
        if mode == "concatenation":
            self.concat_project = nn.Conv2d(2 * planes, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        image = x.flatten(2).unsqueeze(3)

        def pooled(tensor: Tensor) -> Tensor:
            if self.sub_sample:
                spatial = tensor.reshape(*tensor.shape[:2], *x.shape[2:])
                pool = {3: nn.MaxPool1d(2), 4: nn.MaxPool2d(2), 5: nn.MaxPool3d((1, 2, 2))}[x.dim()]
                return pool(spatial).flatten(2)
            return tensor.flatten(2)

        g = pooled(self.g(image)).transpose(1, 2)
        if self.mode == "gaussian":
            theta, phi = image.flatten(2), pooled(image)
        else:
            theta, phi = self.theta(image).flatten(2), pooled(self.phi(image))
        if self.mode == "concatenation":
            pairs = (*theta.shape, phi.shape[2])
            features = torch.cat([theta.unsqueeze(3).expand(pairs), phi.unsqueeze(2).expand(pairs)], 1)
            weights = self.concat_project(features).relu().squeeze(1) / phi.shape[2]
        else:
            weights = theta.transpose(1, 2) @ phi
            if self.mode == "dot_product":
                weights = weights / phi.shape[2]
            else:
                weights = (weights * (self.scale if self.mode == "embedded_gaussian" else 1)).softmax(2)
        return x + self.conv_out((weights @ g).transpose(1, 2).unsqueeze(3)).reshape(x.shape)


class OwnLayers(nn.Module):
    """What a block of gcnet_ext is to compute: its own submodules, called one by one, and plain PyTorch around them."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        per_channel = (*x.shape[:2], *(1 for _ in x.shape[2:]))
        mask = getattr(block, "conv_mask", None)
        if mask is None:
            context = x.flatten(2).mean(2)
        else:
            attention = mask(x if x.dim() == 4 else x.flatten(2).unsqueeze(3)).flatten(1).softmax(1)
            context = (x.flatten(2) * attention[:, None]).sum(2)
        context = context[:, :, None, None]
        if hasattr(block, "fc1"):
            return x * block.gate(block.fc2(block.activation(block.fc1(context)))).reshape(per_channel)
        if hasattr(block, "conv_out"):
            return x + block.conv_out(context).reshape(per_channel)
        out = x
        if block.channel_mul_conv is not None:
            out = out * block.gate(block.channel_mul_conv(context)).reshape(per_channel)
        if block.channel_add_conv is not None:
            out = out + block.channel_add_conv(context.clone()).reshape(per_channel)  # the other branch has saved its own
        return out
