"""What tools do to a model with inserted blocks: they lose none."""

from __future__ import annotations

import copy
import pickle
import warnings

import imitations
import pytest
import torch
from networks import KINDS, ResNet, X, randomise
from torch import nn
from torch.fx.experimental import optimization

from gcnet_ext import insert_blocks, plain, replace_blocks

pytestmark = pytest.mark.usefixtures("libraries")


def fused_by_hand(model):
    for block in model.modules():
        if hasattr(block, "conv2") and not hasattr(block, "conv3"):
            block.conv2, block.bn2 = nn.utils.fusion.fuse_conv_bn_eval(block.conv2, block.bn2), nn.Identity()
    return model


def frozen(model):
    for name, part in model.named_modules():
        if isinstance(part, nn.BatchNorm2d):
            parent, _, last = name.rpartition(".")
            ours = nn.BatchNorm2d(part.num_features).eval().requires_grad_(False)
            ours.load_state_dict(part.state_dict())
            setattr(model.get_submodule(parent), last, ours)
    return model


def quantization_fusion(model):
    pairs = [[f"layer{stage}.{i}.conv{n}", f"layer{stage}.{i}.bn{n}"] for stage in (1, 2, 3) for i in (0, 1) for n in (1, 2)]
    return torch.ao.quantization.fuse_modules(model, pairs)


TOOLS = {
    "SyncBatchNorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "fused by hand": fused_by_hand,
    "fused by torch.fx": optimization.fuse,
    "fused for quantization": quantization_fusion,
    "norms exchanged by type": frozen,
    "torch.fx": torch.fx.symbolic_trace,
    "torch.compile": lambda model: torch.compile(model, backend="aot_eager", fullgraph=True),
    "torch.export": lambda model: torch.export.export(model, (X,)).module(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", ["after_conv3", "after_add"])
def test_tools_lose_no_block(tool, kind, position):
    model = ResNet().eval()
    names = insert_blocks(model, (1, 3), 1 / 4, position, kind)
    randomise(model)
    want = model(X)
    other = TOOLS[tool](copy.deepcopy(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert torch.allclose(other(X), want, rtol=1e-3, atol=1e-3)
    for name in names:
        for parameter in model.get_submodule(name).parameters():
            nn.init.zeros_(parameter)
    assert not torch.allclose(model(X), want, rtol=1e-2), "the blocks do something"


def test_names_of_nodes_stay():
    """A graph that torch.fx traces has the nodes of the model without blocks, and one more for each block."""
    model = ResNet(kind="Bottleneck")
    before = [node.name for node in torch.fx.symbolic_trace(model).graph.nodes]
    names = [name.replace(".", "_") for name in insert_blocks(model, (2,), 1 / 4)]
    after = [node.name for node in torch.fx.symbolic_trace(model).graph.nodes]
    assert [name for name in after if name not in names] == before
    assert set(names) <= set(after)


def of_torchvision(name):
    models = imitations.real("torchvision.models")
    return models.get_model(name, weights=None), imitations.library("torchvision.models.feature_extraction")


def of_timm(name):
    timm = imitations.real("timm")
    return timm.create_model(name), imitations.library("timm.models._features_fx")


@pytest.mark.slow
@pytest.mark.parametrize("in_plain_pytorch", [False, True])
@pytest.mark.parametrize(
    ("make", "name", "stages"),
    [
        (of_torchvision, "resnet18", ["layer2", "layer4"]),  # blocks are inserted
        (of_timm, "seresnet18", ["layer1", "layer3"]),  # blocks are replaced, and take the tail along
        (of_timm, "gcresnext26ts", ["stages.1", "stages.3"]),
        (of_timm, "regnety_002", ["s2", "s4"]),
    ],
)
def test_feature_extractors_of_libraries(make, name, stages, in_plain_pytorch):
    """They trace the model with a tracer of their own: a block is one node, and the features stay."""
    model, tools = make(name)
    (replace_blocks if make is of_timm else insert_blocks)(randomise(model).eval())
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    traced = copy.deepcopy(model)
    want: dict[str, torch.Tensor] = {}
    for stage in stages:
        model.get_submodule(stage).register_forward_hook(lambda _m, _i, out, stage=stage: want.update({stage: out}))
    model(x)
    with plain(in_plain_pytorch):
        features = tools.create_feature_extractor(traced, stages)(x)
    assert list(features) == stages
    for stage in stages:
        assert torch.allclose(features[stage], want[stage], rtol=1e-3, atol=1e-3 * float(want[stage].detach().abs().max()))
    assert all(feature.requires_grad for feature in features.values())


def test_checkpointing_and_gradients():
    model = insert_and_randomise(ResNet())
    want = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in backward(model, X)]
    again = [p.grad for p in backward(model, X, lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False))]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(again, want, strict=True))
    assert all(grad.abs().sum() > 0 for grad in again if grad.dim() > 1)


def insert_and_randomise(model):
    insert_blocks(model, (3, 4), 1 / 4)
    return randomise(model).eval()


def backward(model, x, call=None):
    model.zero_grad()
    (call or model)(x).square().mean().backward()
    return list(model.parameters())


def test_state_dicts_with_weights_only(tmp_path):
    model = insert_and_randomise(ResNet())
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = ResNet().eval()
    insert_blocks(other, (3, 4), 1 / 4)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    assert torch.equal(other(X), model(X))
