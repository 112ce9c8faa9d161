"""Our blocks in a user's own code, as docs/usage.md says: by timm's constructors, a YOLO file, and plugins of mmdet.

YOLO's parser and mmdet's registry are written here in a few lines, after the originals, which are not installed.
"""

from __future__ import annotations

import pickle

import eager
import imitations
import pytest
import torch
from torch import nn

import gcnet_ext
from gcnet_ext import EfficientChannelAttention, GlobalContextBlock, SqueezeExcitation, replace_blocks, timm_layer

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def trained(net: nn.Module) -> bool:
    """Whether each parameter gets a gradient."""
    net.train()(X).square().sum().backward()
    return all(parameter.grad is not None for parameter in net.parameters())


def blocks(net: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [part for part in net.modules() if isinstance(part, kind)]


# ---- timm --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "block"), [("gc", GlobalContextBlock), ("se", SqueezeExcitation), ("eca", EfficientChannelAttention)]
)
def test_attention_of_timms_resnets(kind, block):
    """And the addition and the ReLU behind it are taken along, if somebody asks for it."""
    timm = imitations.real("timm")
    net = timm.create_model("resnet18", num_classes=5, block_args={"attn_layer": timm_layer(kind)})
    assert len(blocks(net, block)) == 8
    assert trained(net)
    eager.randomise(nn.ModuleList(blocks(net, block)))
    with torch.no_grad():
        want = net.eval()(X)
        report = replace_blocks(net)
        assert list(report.tails.values()) == [""] * 8
        assert torch.allclose(net(X), want, rtol=1e-4, atol=1e-4)


def test_squeeze_excitation_of_timms_efficientnets():
    """Units, activations and keys are those of timm's own block, whose weights load."""
    timm = imitations.real("timm")
    theirs = timm.create_model("efficientnet_b0", num_classes=5)
    ours = timm.create_model("efficientnet_b0", num_classes=5, se_layer=timm_layer("se"))
    assert len(blocks(ours, SqueezeExcitation)) == 16
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.allclose(ours.eval()(X), theirs.eval()(X), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["gc", "se", "ese", "eca", "snl", "nl"])
def test_called_as_timms_builders_call(kind):
    layer = timm_layer(kind)
    assert pickle.loads(pickle.dumps(layer)) == layer
    for options in ({}, {"rd_ratio": 1.0}, {"rd_ratio": 0.25, "act_layer": nn.SiLU, "device": "meta", "dtype": torch.float64}):
        made = layer(8, **options)
        parameter = next(made.parameters())
        assert parameter.dtype == options.get("dtype", torch.float32)
        assert parameter.device.type == options.get("device", "cpu")


def test_what_timm_gives_and_what_was_chosen():
    made = timm_layer("se")(32, rd_ratio=0.25, act_layer=nn.SiLU)
    assert (made.planes, type(made.activation)) == (8, nn.SiLU)
    made = timm_layer("se", activation="gelu", planes=3)(32, rd_ratio=0.25, act_layer="relu")
    assert (made.planes, type(made.activation)) == (3, nn.GELU)
    assert type(timm_layer("gc")(32, act_layer="hard_swish").channel_add_conv[2]) is nn.Hardswish
    assert timm_layer("se")(4, rd_ratio=0.01).planes == 1


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"kind must be one of \('gc', .*\), got 'cbam'"):
        timm_layer("cbam")
    with pytest.raises(ValueError, match="act_layer must make an activation that the block knows, got a Mish"):
        timm_layer("se")(16, act_layer=nn.Mish)
    with pytest.raises(ValueError, match="activation must be one of"):
        timm_layer("se")(16, act_layer="mish")


# ---- YOLO --------------------------------------------------------------------------------------------------------------------

CONFIG = [  # from, number, module, arguments
    [-1, 1, "nn.Conv2d", [3, 16, 3, 2, 1]],
    [-1, 1, "GlobalContextBlock", [16]],
    [-1, 2, "GlobalContextBlock", [16, 0.25]],
    [-1, 1, "GlobalContextBlock", [16, 0.0625, "att", ["channel_add"]]],
    [-1, 1, "SqueezeExcitation", [16]],
]


def parsed(config: list[list]) -> nn.Sequential:
    """What parse_model of YOLOv5 and ultralytics makes of a file: the name of a module is looked up, and called."""
    names = {"nn": nn, **vars(gcnet_ext)}
    layers = []
    for i, (source, number, name, arguments) in enumerate(config):
        make = eval(name, names)
        made = [make(*arguments) for _ in range(number)]
        layer = nn.Sequential(*made) if number > 1 else made[0]
        layer.i, layer.f, layer.type, layer.np = i, source, name, sum(p.numel() for p in layer.parameters())
        layers.append(layer)
    return nn.Sequential(*layers)


def test_a_yolo_file():
    net = parsed(CONFIG)
    assert net[1].ratio == 1 / 16
    assert trained(net)


# ---- mmdet -------------------------------------------------------------------------------------------------------------------

PLUGINS: dict[str, type[nn.Module]] = {}


def build_plugin_layer(config: dict, postfix: str, **options) -> tuple[str, nn.Module]:
    """As in mmcv.cnn: the class of that name in the registry, called by names; and the name of the layer."""
    config = dict(config)
    kind = PLUGINS[config.pop("type")]
    return f"{kind._abbr_}{postfix}", kind(**config, **options)


def test_a_plugin_of_mmdet():
    PLUGINS["GlobalContextBlock"] = GlobalContextBlock
    config = {"type": "GlobalContextBlock", "ratio": 1 / 4, "fusion_types": ("channel_add",)}
    name, layer = build_plugin_layer(config, "_1", in_channels=16)
    assert name == "context_block_1"
    assert layer.inplanes == 16
    assert torch.equal(layer(torch.ones(1, 16, 2, 2)), torch.ones(1, 16, 2, 2))
