"""insert_blocks: into a ResNet by its stages, and into any model by the names of its modules."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from gcnet_ext import GlobalContextBlock, NonLocalBlock, SimplifiedNonLocalBlock, SqueezeExcitation, insert_blocks

KINDS = {"gc": GlobalContextBlock, "se": SqueezeExcitation, "snl": SimplifiedNonLocalBlock, "nl": NonLocalBlock}


class Residual(nn.Module):
    """A BasicBlock with the names of torchvision and timm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x):
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


class Bottleneck(nn.Module):
    """Three convolutions; the first two are narrower."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = channels // 2
        self.conv1, self.bn1 = nn.Conv2d(channels, narrow, 1), nn.BatchNorm2d(narrow)
        self.conv2, self.bn2 = nn.Conv2d(narrow, narrow, 3, padding=1), nn.BatchNorm2d(narrow)
        self.conv3, self.bn3 = nn.Conv2d(narrow, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return (x + self.bn3(self.conv3(y))).relu()


class ResNet(nn.Module):
    def __init__(self, channels: int = 16, residual: type[nn.Module] = Residual) -> None:
        super().__init__()
        for stage in (1, 2, 3, 4):
            self.add_module(f"layer{stage}", nn.Sequential(residual(channels), residual(channels)))

    def forward(self, x):
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def randomise(model: nn.Module) -> None:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "context_block" in name:
            nn.init.normal_(parameter, std=0.3)


X = torch.randn(2, 16, 6, 7, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("position", ["after_conv3", "after_add"])
@pytest.mark.parametrize("kind", KINDS)
def test_stages(kind, position):
    model = ResNet().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = insert_blocks(model, (2, 4), 1 / 4, position, kind)
    suffix = "bn2.context_block" if position == "after_conv3" else "context_block"
    assert names == [f"layer{stage}.{index}.{suffix}" for stage in (2, 4) for index in (0, 1)]
    assert all(type(model.get_submodule(name)) is KINDS[kind] and not model.get_submodule(name).training for name in names)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items()), "a name or a value has changed"
    randomise(model)

    def norm(n, y):
        return nn.functional.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, eps=n.eps)

    def by_hand(x):
        for stage, index in itertools.product((1, 2, 3, 4), (0, 1)):
            path = f"layer{stage}.{index}"
            residual = model.get_submodule(path)
            context = model.get_submodule(f"{path}.{suffix}") if stage in (2, 4) else nn.Identity()
            y = norm(residual.bn2, residual.conv2(norm(residual.bn1, residual.conv1(x)).relu()))
            x = (x + context(y)).relu() if position == "after_conv3" else context((x + y).relu())
        return x

    assert torch.allclose(model(X), by_hand(X), atol=1e-5)


@pytest.mark.parametrize("position", ["after_conv3", "after_add"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bottleneck_by_numbers(kind, position):
    """Random weights and statistics everywhere: the block gets and changes what its place says, and nothing else."""
    torch.manual_seed(0)
    model = ResNet(residual=Bottleneck).eval()
    names = insert_blocks(model, (3,), 1 / 4, position, kind)
    suffix = "bn3.context_block" if position == "after_conv3" else "context_block"
    assert names == [f"layer3.{index}.{suffix}" for index in (0, 1)]
    for tensor in (*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())):
        if tensor.dim() > 1:  # keeps the activations of order one
            nn.init.normal_(tensor, std=tensor[0].numel() ** -0.5)
        else:
            nn.init.uniform_(tensor, 0.5, 1.5)

    def plain(n, y):
        return nn.functional.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, eps=n.eps)

    def by_hand(residual, context, x):
        y = plain(residual.bn1, residual.conv1(x)).relu()
        y = plain(residual.bn2, residual.conv2(y)).relu()
        y = plain(residual.bn3, residual.conv3(y))
        return (x + context(y)).relu() if position == "after_conv3" else context((x + y).relu())

    want = model.layer2(model.layer1(X))
    for index in (0, 1):
        want = by_hand(model.layer3[index], model.get_submodule(f"layer3.{index}.{suffix}"), want)
    want = model.layer4(want)
    assert torch.allclose(model(X), want, rtol=1e-4, atol=1e-4)
    for name in names:  # what the block does is not small beside the tolerance
        for parameter in model.get_submodule(name).parameters():
            nn.init.zeros_(parameter)
    assert not torch.allclose(model(X), want, rtol=1e-2)


def test_copies_have_blocks_of_their_own():
    model = ResNet()
    names = insert_blocks(model, (3,), 1 / 4)
    randomise(model)
    model.eval()
    want = model(X)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), want)
        with torch.no_grad():
            for parameter in other.get_submodule(names[0]).parameters():
                parameter.zero_()
        assert torch.equal(model(X), want)
        assert not torch.equal(other(X), want)


def test_gradients_and_training():
    model = ResNet()
    insert_blocks(model, (4,), 1 / 4)
    model(X).square().mean().backward()
    last = model.layer4[1].bn2.context_block.channel_add_conv[3]
    assert last.weight.grad.abs().sum() > 0 or last.bias.grad.abs().sum() > 0


def test_by_names_and_with_channels():
    model = nn.Sequential(nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 4, 1)))
    assert insert_blocks(model, kind="se", ratio=1 / 2, modules=["0", "2.0"]) == ["0.context_block", "2.0.context_block"]
    assert (model[0].context_block.inplanes, model[2][0].context_block.inplanes) == (8, 4)
    assert insert_blocks(model, kind="nl", modules={"1": 8}, reduction=4, mode="dot_product") == ["1.context_block"]
    assert model[1].context_block.planes == 2
    assert model(X).shape == (2, 4, 6, 7)


def test_dtype_and_options():
    model = ResNet().double()
    insert_blocks(model, (2,), 1 / 4, fusion_types=("channel_mul",), pooling_type="avg")
    block = model.layer2[0].bn2.context_block
    assert block.fusion_types == ("channel_mul",)
    assert next(block.parameters()).dtype == torch.float64


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (ResNet(), {"kind": "cbam"}, "kind must be one of .*'gc'.* got 'cbam'"),
        (ResNet(), {"position": "before"}, "position must be one of .*'after_conv3'.* got 'before'"),
        (ResNet(), {"stages": (5,)}, "stages must be stages of the model, layer1 to layer4, got 5"),
        (nn.Sequential(nn.ReLU()), {}, "stages must be stages of the model, layer1 to layer4, got 2"),
        (ResNet(), {"modules": ["layer9"]}, "modules must name modules of the model, got 'layer9'"),
        (nn.Sequential(nn.ReLU()), {"modules": ["0"]}, "the channels of '0' are unknown"),
    ],
)
def test_bad_arguments(model, options, message):
    with pytest.raises(ValueError, match=message):
        insert_blocks(model, **options)
    assert not any("context_block" in name for name, _ in model.named_modules()), "something was put in all the same"


def test_twice():
    model = ResNet()
    insert_blocks(model, (2,), 1 / 4)
    with pytest.raises(ValueError, match=r"'layer2\.0\.bn2' has a context_block already"):
        insert_blocks(model, (2,), 1 / 4)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize(("name", "blocks"), [("resnet50", 13), ("resnet18", 6)])
def test_resnets(library, name, blocks):
    """13 blocks in a ResNet-50, as in the paper; add-only blocks start as the identity, so nothing changes yet."""
    if library == "timm":
        model = pytest.importorskip("timm").create_model(name)
    else:
        model = pytest.importorskip("torchvision.models").get_model(name)
    model.eval()
    x = torch.randn(1, 3, 64, 64)
    want = model(x)
    names = insert_blocks(model)
    assert len(names) == blocks
    assert torch.allclose(model(x), want, atol=1e-5)
