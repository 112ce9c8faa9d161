"""The blocks of timm, mmcv and torchvision: those of the library where it is installed, otherwise imitations of them.

An imitation has what gcnet_ext looks at: the names of class and module, the submodules, the attributes, and what it computes.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

INSTALLED = [name for name in ("timm", "torchvision", "mmcv") if importlib.util.find_spec(name) is not None]


def of_module(name: str):
    """Makes a class say that it is of that module."""

    def change(cls: type) -> type:
        cls.__module__ = name
        return cls

    return change


# ---- timm --------------------------------------------------------------------------------------------------------------------


@of_module("timm.layers.activations")
class Sigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid()


TIMM_LAYERS = {"sigmoid": Sigmoid, "hard_sigmoid": nn.Hardsigmoid}


@of_module("timm.layers.norm")
class LayerNorm2d(nn.LayerNorm):
    """Over the channels."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@of_module("timm.layers.mlp")
class ConvMlp(nn.Module):
    def __init__(self, channels: int, hidden: int, act_layer: Any) -> None:
        super().__init__()
        self.fc1, self.norm, self.act = nn.Conv2d(channels, hidden, 1), LayerNorm2d(hidden), act_layer()
        self.drop, self.fc2 = nn.Dropout(0.0), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.act(self.norm(self.fc1(x)))))


@of_module("timm.layers.global_context")
class GlobalContext(nn.Module):
    def __init__(
        self, channels, use_attn=True, fuse_add=False, fuse_scale=True, rd_ratio=1 / 8, act_layer=nn.ReLU, gate_layer="sigmoid"
    ) -> None:
        super().__init__()
        hidden = int(channels * rd_ratio)
        self.conv_attn = nn.Conv2d(channels, 1, 1) if use_attn else None
        self.mlp_add = ConvMlp(channels, hidden, act_layer) if fuse_add else None
        self.mlp_scale = ConvMlp(channels, hidden, act_layer) if fuse_scale else None
        self.gate = TIMM_LAYERS[gate_layer]()

    def forward(self, x: Tensor) -> Tensor:
        if self.conv_attn is None:
            context = x.mean((2, 3), keepdim=True)
        else:
            attention = self.conv_attn(x).flatten(2).softmax(2)
            context = (x.flatten(2) @ attention.transpose(1, 2)).unsqueeze(3)
        if self.mlp_scale is not None:
            x = x * self.gate(self.mlp_scale(context))
        return x if self.mlp_add is None else x + self.mlp_add(context)


@of_module("timm.layers.squeeze_excite")
class SEModule(nn.Module):
    def __init__(
        self, channels, rd_ratio=1 / 16, rd_divisor=8, add_maxpool=False, bias=True, act_layer=nn.ReLU, norm_layer=None,
        gate_layer: Any = "sigmoid",
    ) -> None:  # fmt: skip
        super().__init__()
        self.add_maxpool = add_maxpool
        hidden = max(rd_divisor, int(channels * rd_ratio) // rd_divisor * rd_divisor)
        self.fc1, self.fc2 = nn.Conv2d(channels, hidden, 1, bias=bias), nn.Conv2d(hidden, channels, 1, bias=bias)
        self.bn = nn.Identity() if norm_layer is None else norm_layer(hidden)
        self.act = act_layer(inplace=True) if act_layer in (nn.ReLU, nn.SiLU) else act_layer()
        self.gate = TIMM_LAYERS.get(gate_layer, gate_layer)()

    def forward(self, x: Tensor) -> Tensor:
        context = x.mean((2, 3), keepdim=True)
        if self.add_maxpool:
            context = (context + x.amax((2, 3), keepdim=True)) / 2
        return x * self.gate(self.fc2(self.act(self.bn(self.fc1(context)))))


@of_module("timm.layers.squeeze_excite")
class EffectiveSEModule(nn.Module):
    def __init__(self, channels, add_maxpool=False, gate_layer: Any = "hard_sigmoid") -> None:
        super().__init__()
        self.add_maxpool = add_maxpool
        self.fc, self.gate = nn.Conv2d(channels, channels, 1), TIMM_LAYERS.get(gate_layer, gate_layer)()

    def forward(self, x: Tensor) -> Tensor:
        context = x.mean((2, 3), keepdim=True)
        if self.add_maxpool:
            context = (context + x.amax((2, 3), keepdim=True)) / 2
        return x * self.gate(self.fc(context))


@of_module("timm.layers.grn")
class GlobalResponseNorm(nn.Module):
    def __init__(self, dim, eps=1e-6, channels_last=True) -> None:
        super().__init__()
        self.eps = eps
        self.spatial_dim, self.channel_dim = ((1, 2), -1) if channels_last else ((2, 3), 1)
        self.wb_shape = (1, 1, 1, -1) if channels_last else (1, -1, 1, 1)
        self.weight, self.bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        norms = x.norm(p=2, dim=self.spatial_dim, keepdim=True)
        response = norms / (norms.mean(dim=self.channel_dim, keepdim=True) + self.eps)
        return x + torch.addcmul(self.bias.view(self.wb_shape), self.weight.view(self.wb_shape), x * response)


@of_module("timm.models._efficientnet_blocks")
class SqueezeExcite(nn.Module):
    def __init__(self, in_chs, rd_ratio=0.25, act_layer: Any = nn.ReLU, gate_layer: Any = nn.Sigmoid) -> None:
        super().__init__()
        hidden = round(in_chs * rd_ratio)
        self.conv_reduce, self.conv_expand = nn.Conv2d(in_chs, hidden, 1), nn.Conv2d(hidden, in_chs, 1)
        self.act1, self.gate = act_layer(), gate_layer()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.conv_expand(self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True)))))


@of_module("timm.models.hgnet")
class EseModule(nn.Module):
    def __init__(self, chs) -> None:
        super().__init__()
        self.conv, self.sigmoid = nn.Conv2d(chs, chs, 1), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.sigmoid(self.conv(x.mean((2, 3), keepdim=True)))


@of_module("timm.layers.eca")
class EcaModule(nn.Module):
    def __init__(self, channels=None, kernel_size=3, gate_layer: Any = "sigmoid", use_mlp=False) -> None:
        super().__init__()
        if channels is not None:
            size = int(abs(math.log(channels, 2) + 1) / 2)
            kernel_size = max(size if size % 2 else size + 1, 3)
        padding = (kernel_size - 1) // 2
        if use_mlp:
            self.conv, self.act = nn.Conv1d(1, 8, 1), nn.ReLU()
            self.conv2 = nn.Conv1d(8, 1, kernel_size, padding=padding)
        else:
            self.conv, self.act, self.conv2 = nn.Conv1d(1, 1, kernel_size, padding=padding, bias=False), None, None
        self.gate = TIMM_LAYERS[gate_layer]()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.mean((2, 3)).view(x.shape[0], 1, -1))
        if self.conv2 is not None:
            y = self.conv2(self.act(y))
        return x * self.gate(y).view(x.shape[0], -1, 1, 1).expand_as(x)


# ---- torchvision -------------------------------------------------------------------------------------------------------------


@of_module("torchvision.ops.misc")
class SqueezeExcitation(nn.Module):
    def __init__(self, input_channels, squeeze_channels, activation=nn.ReLU, scale_activation=nn.Sigmoid) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(input_channels, squeeze_channels, 1), nn.Conv2d(squeeze_channels, input_channels, 1)
        self.activation, self.scale_activation = activation(), scale_activation()

    def forward(self, input: Tensor) -> Tensor:
        return input * self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(input)))))


@of_module("torchvision.models.resnet")
class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inplanes, planes, stride=1, downsample=None, norm_layer: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False), norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False), norm_layer(planes)
        self.downsample, self.stride = downsample, stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


@of_module("torchvision.models.resnet")
class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inplanes, planes, stride=1, downsample=None, norm_layer: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inplanes, planes, 1, bias=False), norm_layer(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False), norm_layer(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), norm_layer(4 * planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample, self.stride = downsample, stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


# ---- mmcv --------------------------------------------------------------------------------------------------------------------


@of_module("mmcv.cnn.bricks.wrappers")
class Conv2d(nn.Conv2d):
    pass


@of_module("mmcv.cnn.bricks.wrappers")
class Conv3d(nn.Conv3d):
    pass


CONVOLUTIONS = {1: nn.Conv1d, 2: Conv2d, 3: Conv3d}


@of_module("mmcv.cnn.bricks.context_block")
class ContextBlock(nn.Module):
    def __init__(self, in_channels, ratio, pooling_type="att", fusion_types=("channel_add",)) -> None:
        super().__init__()
        planes = int(in_channels * ratio)

        def branch() -> nn.Sequential:
            first, last = nn.Conv2d(in_channels, planes, 1), nn.Conv2d(planes, in_channels, 1)
            return nn.Sequential(first, nn.LayerNorm([planes, 1, 1]), nn.ReLU(inplace=True), last)

        self.pooling_type, self.fusion_types = pooling_type, fusion_types
        if pooling_type == "att":
            self.conv_mask = nn.Conv2d(in_channels, 1, 1)
        self.channel_add_conv = branch() if "channel_add" in fusion_types else None
        self.channel_mul_conv = branch() if "channel_mul" in fusion_types else None

    def forward(self, x: Tensor) -> Tensor:
        if self.pooling_type == "att":
            attention = self.conv_mask(x).flatten(2).softmax(2)
            context = (x.flatten(2) @ attention.transpose(1, 2)).unsqueeze(3)
        else:
            context = x.mean((2, 3), keepdim=True)
        out = x
        if self.channel_mul_conv is not None:
            out = out * self.channel_mul_conv(context).sigmoid()
        return out if self.channel_add_conv is None else out + self.channel_add_conv(context)


@of_module("mmcv.cnn.bricks.conv_module")
class ConvModule(nn.Module):
    """A convolution and a norm, which is registered under a short name."""

    def __init__(self, conv: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = conv
        self.norm_name = None if norm is None else {nn.BatchNorm2d: "bn", nn.GroupNorm: "gn"}[type(norm)]
        if norm is not None:
            self.add_module(self.norm_name, norm)

    @property
    def norm(self) -> nn.Module | None:
        return None if self.norm_name is None else getattr(self, self.norm_name)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.norm is None else self.norm(x)


class _NonLocal(nn.Module):
    dims: int

    def __init__(
        self, in_channels, reduction=2, use_scale=True, norm_cfg=None, mode="embedded_gaussian", sub_sample=False
    ) -> None:
        super().__init__()
        self.in_channels, self.reduction, self.use_scale, self.mode = in_channels, reduction, use_scale, mode
        self.sub_sample = sub_sample
        self.inter_channels = planes = max(in_channels // reduction, 1)
        conv = CONVOLUTIONS[self.dims]
        norm = {
            None: lambda: None, "BN": lambda: nn.BatchNorm2d(in_channels), "GN": lambda: nn.GroupNorm(2, in_channels),
        }[norm_cfg and norm_cfg["type"]]()  # fmt: skip
        self.g = ConvModule(conv(in_channels, planes, 1))
        self.conv_out = ConvModule(conv(planes, in_channels, 1, bias=norm is None), norm)
        if mode != "gaussian":
            self.theta, self.phi = (ConvModule(conv(in_channels, planes, 1)) for _ in range(2))
        if mode == "concatenation":
            self.concat_project = ConvModule(Conv2d(2 * planes, 1, 1, bias=False))
        if sub_sample:
            pool = {1: nn.MaxPool1d(2), 2: nn.MaxPool2d(2), 3: nn.MaxPool3d((1, 2, 2))}[self.dims]
            self.g = nn.Sequential(self.g, pool)
            self.phi = pool if mode == "gaussian" else nn.Sequential(self.phi, pool)

    def forward(self, x: Tensor) -> Tensor:
        g = self.g(x).flatten(2).transpose(1, 2)
        if self.mode == "gaussian":
            theta, phi = x.flatten(2), (self.phi(x) if self.sub_sample else x).flatten(2)
        else:
            theta, phi = self.theta(x).flatten(2), self.phi(x).flatten(2)
        if self.mode == "concatenation":
            pairs = (*theta.shape, phi.shape[2])
            features = torch.cat([theta.unsqueeze(3).expand(pairs), phi.unsqueeze(2).expand(pairs)], 1)
            weights = self.concat_project(features).relu().squeeze(1)
        else:
            weights = theta.transpose(1, 2) @ phi
        if self.mode in ("dot_product", "concatenation"):
            weights = weights / weights.shape[2]
        else:
            scaled = self.mode == "embedded_gaussian" and self.use_scale
            weights = (weights / (theta.shape[1] ** 0.5 if scaled else 1)).softmax(2)
        y = (weights @ g).transpose(1, 2).reshape(x.shape[0], self.inter_channels, *x.shape[2:])
        return x + self.conv_out(y)


def _non_local(dims: int) -> type:
    return of_module("mmcv.cnn.bricks.non_local")(type(f"NonLocal{dims}d", (_NonLocal,), {"dims": dims}))


IMITATIONS = {
    "timm.layers": SimpleNamespace(
        GlobalContext=GlobalContext,
        SEModule=SEModule,
        EffectiveSEModule=EffectiveSEModule,
        EcaModule=EcaModule,
        LayerNorm2d=LayerNorm2d,
        ConvMlp=ConvMlp,
    ),
    "torchvision.ops": SimpleNamespace(SqueezeExcitation=SqueezeExcitation),
    "torchvision.models.resnet": SimpleNamespace(BasicBlock=BasicBlock, Bottleneck=Bottleneck),
    "mmcv.cnn": SimpleNamespace(ContextBlock=ContextBlock, **{f"NonLocal{dims}d": _non_local(dims) for dims in (1, 2, 3)}),
}


def is_imitation(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("timm", "torchvision", "mmcv")


def missing() -> dict[str, ModuleType]:
    """The imitations of what is not installed, as modules by name, with the packages around them."""
    contents: dict[str, dict[str, Any]] = {name: dict(vars(those)) for name, those in IMITATIONS.items()}
    for each in (*globals().values(), *vars(IMITATIONS["mmcv.cnn"]).values()):
        if isinstance(each, type) and is_imitation(each):
            contents.setdefault(each.__module__, {})[each.__name__] = each
    found: dict[str, ModuleType] = {}
    for name, those in contents.items():
        library, *inner = name.split(".")
        if library not in INSTALLED:
            for depth in range(len(inner) + 1):
                path = ".".join((library, *inner[:depth]))
                found.setdefault(path, ModuleType(path))
            vars(found[name]).update(those)
    return found


def library(name: str) -> ModuleType:
    """The library itself, or its imitation while that is in sys.modules."""
    return importlib.import_module(name)


def real(name: str) -> ModuleType:
    """The library itself; skips the test where it is not installed."""
    if name.partition(".")[0] not in INSTALLED:
        pytest.skip(f"{name} is not installed")
    return importlib.import_module(name)
