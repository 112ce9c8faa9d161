"""The block, as ours and as what a user would run instead, with the same random weights."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
from peers import Eager, Rewrite
from torch import Tensor, nn

import gcnet_ext

FUSIONS = {"add": ("channel_add",), "mul": ("channel_mul",), "both": ("channel_mul", "channel_add")}
RATIO = 1 / 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
COMPILED = {"compile": "default", "compile max-autotune": "max-autotune-no-cudagraphs"}


def _peer(library: str, make: Callable[[Any], nn.Module]) -> nn.Module | None:
    """The module of another library, None where that is not installed."""
    try:
        return make(importlib.import_module(library))
    except ImportError:
        return None


def make_candidates(
    channels: int, fusion: str, dtype: torch.dtype, compiled: tuple[str, ...] = (), peers: bool = False
) -> dict[str, nn.Module]:
    """Modules by name, "ours" and "eager" first; `compiled` names what of COMPILED, "ours compiled" and "rewrite" is wanted."""
    fusions, units = FUSIONS[fusion], max(1, int(channels * RATIO))
    ours, eager = gcnet_ext.GlobalContextBlock(channels, RATIO, fusion_types=fusions), Eager(channels, units, fusions)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.1)
    eager.load_state_dict(ours.state_dict())
    modules: dict[str, nn.Module] = {"ours": ours, "eager": eager}
    if peers:
        timm = _peer(
            "timm.layers",
            lambda layers: layers.GlobalContext(
                channels, fuse_add="channel_add" in fusions, fuse_scale="channel_mul" in fusions, rd_ratio=RATIO
            ),
        )
        if timm is not None:
            timm.load_state_dict(gcnet_ext.to_peer_state_dict(ours, "timm"))
            for module in timm.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = 1e-5  # the only difference
        mmcv = _peer("mmcv.cnn", lambda cnn: cnn.ContextBlock(channels, RATIO, fusion_types=fusions))
        if mmcv is not None:
            mmcv.load_state_dict(ours.state_dict())
        modules |= {name: module for name, module in (("timm", timm), ("mmcv", mmcv)) if module is not None}
    if "ours compiled" in compiled:
        modules["ours compiled"] = torch.compile(copy.deepcopy(ours))
    for name, mode in COMPILED.items():
        if name in compiled:
            modules[name] = torch.compile(copy.deepcopy(eager), mode=mode)
    if "rewrite" in compiled:
        rewrite = Rewrite(channels, units, fusions)
        load_rewrite(rewrite, ours)
        modules["rewrite"] = torch.compile(rewrite)
    return {name: module.to(dtype) for name, module in modules.items()}


def load_rewrite(rewrite: Rewrite, block: gcnet_ext.GlobalContextBlock) -> None:
    """The weights of the block under the names of the rewrite."""
    state = {"weight": block.conv_mask.weight.flatten(), "bias": block.conv_mask.bias}
    for name, branch in (("add", block.channel_add_conv), ("mul", block.channel_mul_conv)):
        if branch is not None:
            for index in (0, 1, 3):
                weight, bias = branch[index].weight, branch[index].bias
                state[f"{name}.{index}.weight"] = weight.flatten() if index == 1 else weight.flatten(1)
                state[f"{name}.{index}.bias"] = bias.flatten()
    rewrite.load_state_dict({key: tensor.detach() for key, tensor in state.items()})


def check(modules: dict[str, nn.Module], x: Tensor) -> dict[str, float]:
    """The relative error of each to eager in float64. Refuses to go on with a wrong result."""
    errors = {}
    with torch.no_grad():
        truth = copy.deepcopy(modules["eager"]).double()(x.double())
        for name, module in modules.items():
            errors[name] = float((module(x).double() - truth).norm() / truth.norm())
            # half precision: eager rounds logits and weights, so it is the one that is off
            if not errors[name] < (TOLERANCE[x.dtype] if name == "ours" or x.dtype == torch.float32 else 0.1):
                raise SystemExit(f"{name} is wrong for {tuple(x.shape)} in {x.dtype}: relative error {errors[name]:.2e}")
    return errors
