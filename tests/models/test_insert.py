"""insert_blocks: into a ResNet by its stages, and into any model by the names of its modules."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import inspect
import itertools
import pickle
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import imitations
import pytest
import torch
from networks import KINDS, OwnNet, ResNet, X, library_of, randomise
from torch import nn

from gcnet_ext import insert_blocks
from gcnet_ext.models import residual

pytestmark = pytest.mark.usefixtures("libraries")
LIBRARIES = ("torchvision", "timm")


def plain(norm: nn.BatchNorm2d, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def by_hand(residual: nn.Module, context: nn.Module, x: torch.Tensor, position: str) -> torch.Tensor:
    """A residual block in evaluation, written once more."""
    y = plain(residual.bn2, residual.conv2(plain(residual.bn1, residual.conv1(x)).relu()))
    if hasattr(residual, "conv3"):
        y = plain(residual.bn3, residual.conv3(y.relu()))
    shortcut = x if residual.downsample is None else residual.downsample(x)
    return (shortcut + context(y)).relu() if position == "after_conv3" else context((shortcut + y).relu())


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("residual_kind", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize("position", ["after_conv3", "after_add"])
@pytest.mark.parametrize("kind", KINDS)
def test_stages(kind, position, residual_kind, library):
    """Each block gets and changes what its place says, and no name and no value has changed."""
    model = randomise(ResNet(library, residual_kind)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    order = [name for name, _ in model.named_parameters()]
    names = insert_blocks(model, (2, 4), 1 / 4, position, kind)
    assert names == [f"layer{stage}.{index}.context_block" for stage in (2, 4) for index in (0, 1)]
    assert all(type(model.get_submodule(name)) is KINDS[kind] and not model.get_submodule(name).training for name in names)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items()), "a name or a value has changed"
    assert [name for name, _ in model.named_parameters() if "context_block" not in name] == order
    randomise(model, "context_block")
    want = X
    for stage, index in itertools.product((1, 2, 3, 4), (0, 1)):
        path = f"layer{stage}.{index}"
        context = model.get_submodule(f"{path}.context_block") if stage in (2, 4) else nn.Identity()
        want = by_hand(model.get_submodule(path), context, want, position)
    assert torch.allclose(model(X), want, rtol=1e-4, atol=1e-4)
    for name in names:  # what the blocks do is not small beside the tolerance
        for parameter in model.get_submodule(name).parameters():
            nn.init.zeros_(parameter)
    assert not torch.allclose(model(X), want, rtol=1e-2)


def test_a_shortcut_with_layers():
    """As at the beginning of a stage."""
    layers = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
    model = ResNet()
    model.layer3[0].downsample = layers
    insert_blocks(randomise(model).eval(), (3,), 1 / 4)
    randomise(model, "context_block")
    block = model.layer3[0]
    assert torch.allclose(block(X), by_hand(block, block.context_block, X, "after_conv3"), rtol=1e-4, atol=1e-4)


FORWARDS = {
    "torchvision BasicBlock": "5149f5a6ca0ed162615ddd79b90804b855b52f1d10eccb823f82b58ff210df0e",
    "torchvision Bottleneck": "d92f494e60f1c0fa1a193d69d6bc92974d09fee9ab427c5c55914ef7234987a1",
    "timm BasicBlock": "71ec36ab9b7237a2040f533a58c64eb44eb67db4a4f62c1f0b6e13cc3fb92b23",
    "timm Bottleneck": "6d62f9e26235e2c6f5fc2c5f607925e67c8add841f3ac6895b7af5703ab00dd2",
}


@pytest.mark.parametrize("name", FORWARDS)
def test_the_forward_that_ours_was_written_from(name):
    """Ours says again what the library's says: see gcnet_ext/models/residual_*.py whether it still does, and note its hash."""
    library, kind = name.split()
    source = inspect.getsource(getattr(imitations.real(f"{library}.models.resnet"), kind).forward)
    assert hashlib.sha256(source.encode()).hexdigest() == FORWARDS[name], source


def output_and_calls(module: nn.Module) -> tuple[torch.Tensor, list[str]]:
    """Of X, and the modules in the order in which they were called, but for an inserted block."""
    calls: list[str] = []
    handles = [
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, part in module.named_modules()
        if name and "context_block" not in name
    ]
    torch.manual_seed(0)
    out = module(X)
    for handle in handles:
        handle.remove()
    return out, calls


def test_every_part_of_a_residual_block_of_timm():
    """drop_block, aa, se, drop_path and other activations are called where timm calls them: an identity changes nothing."""
    layers = imitations.real("timm.layers")
    for kind, stride in itertools.product(("BasicBlock", "Bottleneck"), (1, 2)):
        found = getattr(library_of("timm"), kind)
        block = found(
            16, 16 // found.expansion, stride=stride, act_layer=nn.SiLU, attn_layer="se", aa_layer=layers.BlurPool2d,
            drop_block=lambda: layers.DropBlock2d(0.4), drop_path=layers.DropPath(0.3),
            downsample=nn.Sequential(nn.AvgPool2d(stride, ceil_mode=True), nn.Conv2d(16, 16, 1)),
        )  # fmt: skip
        truth = copy.deepcopy(block)
        model = nn.Module()
        model.layer1 = nn.Sequential(block)
        insert_blocks(model, (1,), 1 / 4)
        assert type(block) is not type(truth)
        for training in (False, True):
            outputs, calls = zip(*(output_and_calls(each.train(training)) for each in (truth, block)), strict=True)
            assert torch.equal(*outputs)
            assert calls[0] == calls[1]


class Named(nn.Module):
    """Writes down that it was called."""

    def __init__(self, name: str, calls: list[str], function=lambda x: x) -> None:
        super().__init__()
        self.name, self.calls, self.function = name, calls, function

    def forward(self, x):
        self.calls.append(self.name)
        return self.function(x)


def class_of(library: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> type:
    """The class of a residual block with a context block, beside a library of which only the names are there."""
    resnet = SimpleNamespace(BasicBlock=nn.Module, Bottleneck=nn.Module)
    monkeypatch.setitem(sys.modules, library, SimpleNamespace())
    monkeypatch.setitem(sys.modules, f"{library}.models", SimpleNamespace(resnet=resnet))
    path = Path(residual.__file__).with_name(f"residual_{library}.py")
    spec = importlib.util.spec_from_file_location("gcnet_ext.models.tried", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, kind)


@pytest.mark.parametrize("drop_path", [False, True])
@pytest.mark.parametrize("downsample", [False, True])
@pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_the_order_of_a_tail(library, kind, downsample, drop_path, monkeypatch):
    """The block, what stochastic depth leaves of it, the shortcut, the activation of their sum."""
    calls: list[str] = []
    activation = {"torchvision": "relu", "timm": "act2" if kind == "BasicBlock" else "act3"}[library]
    drop_path = drop_path and library == "timm"
    layers = [f"{layer}{index}" for layer in ("conv", "bn", "act") for index in (1, 2, 3)]
    parts = {name: Named(name, calls) for name in (*layers, "relu", "drop_block", "aa", "downsample", "drop_path")}
    parts |= {} if downsample else {"downsample": None}
    parts |= {} if drop_path else {"drop_path": None}
    block = SimpleNamespace(**parts, se=None, context_block=Named("context_block", calls, lambda x: 2 * x))
    found = class_of(library, kind, monkeypatch)
    for name in ("_to_the_norm", "_behind_the_norm", "_to_the_block"):
        if hasattr(found, name):
            setattr(block, name, functools.partial(getattr(found, name), block))
    out = found.forward(block, X.clone())
    tail = ["context_block", *["drop_path"] * drop_path, *["downsample"] * downsample, activation]
    assert calls[-len(tail) :] == tail
    assert calls.count("context_block") == 1
    assert torch.equal(out, 3 * X)


def test_copies_have_blocks_of_their_own():
    model = ResNet()
    names = insert_blocks(model, (3,), 1 / 4)
    randomise(model, "context_block")
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
    last = model.layer4[1].context_block.channel_add_conv[3]
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
    block = model.layer2[0].context_block
    assert block.fusion_types == ("channel_mul",)
    assert next(block.parameters()).dtype == torch.float64


# ---- any norm, any model that holds a ResNet ---------------------------------------------------------------------------------


class Frozen(nn.Module):
    """Buffers instead of parameters, as torchvision's FrozenBatchNorm2d."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x):
        return x * self.weight[:, None, None]


class Nothing(nn.Identity):
    def __init__(self, _channels: int) -> None:
        super().__init__()


NORMS = {
    "BatchNorm": nn.BatchNorm2d,
    "SyncBatchNorm": nn.SyncBatchNorm,
    "without weights": lambda channels: nn.BatchNorm2d(channels, affine=False, track_running_stats=False),
    "GroupNorm": lambda channels: nn.GroupNorm(4, channels),
    "GroupNorm without weights": lambda channels: nn.GroupNorm(4, channels, affine=False),
    "InstanceNorm": nn.InstanceNorm2d,
    "frozen": Frozen,
    "nothing": Nothing,
    "LayerNorm2d": lambda channels: imitations.library("timm.layers").LayerNorm2d(channels),
}


@pytest.mark.parametrize("position", ["after_conv3", "after_add"])
@pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize("norm", NORMS)
def test_residual_blocks_of_any_norm(norm, kind, position):
    model = ResNet(kind=kind, norm_layer=NORMS[norm])
    names = insert_blocks(model, (2, 3), 1 / 4, position)
    assert [model.get_submodule(name).inplanes for name in names] == [16] * 4


@pytest.mark.parametrize("norm", NORMS)
def test_a_residual_block_of_ones_own_after_the_addition(norm):
    model = OwnNet(norm=NORMS[norm])
    names = insert_blocks(model, (2,), 1 / 4, "after_add")
    assert [model.get_submodule(name).inplanes for name in names] == [16, 16]


class Detector(nn.Module):
    def __init__(self, *backbones: nn.Module) -> None:
        super().__init__()
        self.backbones = nn.ModuleList(nn.ModuleDict({"body": backbone}) for backbone in backbones)


def test_a_model_that_holds_a_resnet():
    assert insert_blocks(Detector(ResNet()), (2,), 1 / 4)[0] == "backbones.0.body.layer2.0.context_block"
    outer = nn.Sequential(nn.ModuleDict(dict(ResNet().named_children())))  # as a layer getter makes it
    assert insert_blocks(outer, (2,), 1 / 4) == ["0.layer2.0.context_block", "0.layer2.1.context_block"]
    with pytest.raises(ValueError, match=r"stages in 'backbones\.0\.body', 'backbones\.1\.body': pass one of these modules"):
        insert_blocks(Detector(ResNet(), ResNet()))


@pytest.mark.slow
def test_torchvisions_models_with_a_backbone():
    models = imitations.real("torchvision.models")
    backbones = imitations.real("torchvision.models.detection.backbone_utils")
    fpn = backbones.resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    assert insert_blocks(fpn)[0] == "body.layer2.0.context_block"
    deeplab = models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None).eval()
    want = deeplab(X[:, :3, :, :].repeat(1, 1, 8, 8))["out"]
    assert len(insert_blocks(deeplab)) == 13
    assert torch.allclose(deeplab(X[:, :3, :, :].repeat(1, 1, 8, 8))["out"], want, atol=1e-4)


@pytest.mark.slow
def test_timms_features():
    timm = imitations.real("timm")
    model = timm.create_model("resnet26", features_only=True).eval()
    x = torch.randn(1, 3, 64, 64)
    want = model(x)
    assert len(insert_blocks(model)) == 6
    assert all(torch.allclose(got, expected, atol=1e-4) for got, expected in zip(model(x), want, strict=True))


# ---- behind a module ---------------------------------------------------------------------------------------------------------


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)))


def test_one_name():
    assert insert_blocks(chain(), modules="2.0", ratio=1 / 2) == ["2.0.context_block"]


def test_a_block_that_is_not_called_is_said_once():
    """The module that it stands behind was exchanged, or its weights are used without calling it."""
    for change in (
        lambda model: model.__setitem__(0, nn.Conv2d(16, 8, 1)),
        lambda model: setattr(model[0], "context_block", None) or model[0]._forward_hooks.clear(),
        lambda model: model[0]._forward_hooks.clear(),
    ):
        model = chain()
        insert_blocks(model, modules={"0": 8, "2": 4}, ratio=1 / 2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2):
                model(X)
                copy.deepcopy(model)(X)
        change(model)
        with pytest.warns(RuntimeWarning, match=r"its inserted block 0\.context_block was not"):
            model(X)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(X)


class Sometimes(nn.Module):
    """A part is checkpointed, and one is called in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)
        return self.head(x) if self.training else x


def test_no_false_alarm():
    model, parts = Sometimes(), chain()
    insert_blocks(model, modules=["body", "head"], ratio=1 / 2)
    insert_blocks(parts, modules=["0"], ratio=1 / 2)
    parts[0].compile(backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for training in (True, False, True, False):
            model.train(training)(X.clone().requires_grad_()).sum().backward()
            parts(X)


def test_a_module_that_is_never_called_is_said():
    model = Sometimes().eval()
    insert_blocks(model, modules=["body", "head"], ratio=1 / 2)
    with pytest.warns(RuntimeWarning, match=r"head\.context_block was not: the module that it stands behind was not called"):
        model(X)


def test_shared_modules_and_any_collection_of_stages():
    model = ResNet()
    model.layer3[1] = model.layer2[1]
    names = insert_blocks(model, {2, 3}, 1 / 4)
    assert sorted(names) == ["layer2.0.context_block", "layer2.1.context_block", "layer3.0.context_block"]
    assert len(insert_blocks(ResNet(), range(3, 5), 1 / 4)) == 4
    assert len(insert_blocks(ResNet(), 2, 1 / 4)) == 2
    twice = nn.ModuleDict({"a": nn.Conv2d(4, 4, 1)})
    twice["b"] = twice["a"]
    assert insert_blocks(twice, modules="b", ratio=1 / 2) == ["b.context_block"]


def test_a_class_whose_forward_was_exchanged(monkeypatch):
    model = ResNet()
    former = type(model.layer2[0]).forward
    monkeypatch.setattr(type(model.layer2[0]), "forward", lambda self, x: former(self, x) + 1)
    with pytest.raises(ValueError, match=r"layer2\.0 is none: it has a forward of its own, or somebody has exchanged"):
        insert_blocks(model)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (ResNet, {"kind": "cbam"}, "kind must be one of .*'gc'.* got 'cbam'"),
        (ResNet, {"position": "before"}, "position must be one of .*'after_conv3'.* got 'before'"),
        (ResNet, {"stages": (5,)}, "stages must be numbers from 1 to 4 of stages of the model, got 5"),
        (chain, {}, r"stages must be numbers .* got 2; or pass modules=\['0', '2', '2\.0'\]"),
        (ResNet, {"modules": ["layer9"]}, "modules must name modules of the model, got 'layer9'; near it are 'layer"),
        (ResNet, {"modules": "layer2.0.cov1"}, r"got 'layer2\.0\.cov1'; near it are 'layer2\.0\.conv1'"),
        (chain, {"modules": ["1"]}, r"the channels of '1' are unknown: give modules=\{'1': channels\}"),
        (chain, {"modules": ["2.1"]}, r"must not name norms, .* got '2\.1' \(BatchNorm2d\): .* such as '2'"),
        (OwnNet, {"stages": (2,)}, r"layer2\.0 is none: its class .*Own is not exactly .*position='after_add'"),
    ],
)  # fmt: skip
def test_bad_arguments(make, options, message):
    model = make()
    classes = [type(part) for part in model.modules()]
    with pytest.raises(ValueError, match=message):
        insert_blocks(model, **options)
    assert [type(part) for part in model.modules()] == classes, "something was put in all the same"


def test_residual_blocks_that_are_not_exactly_known():
    model = ResNet()
    model.layer2[1].__class__ = type("Mine", (type(model.layer2[1]),), {})
    with pytest.raises(ValueError, match=r"layer2\.1 is none: its class .*Mine is not exactly torchvision's or timm's"):
        insert_blocks(model)
    model = ResNet()
    model.layer3[0].forward = model.layer3[0].forward
    with pytest.raises(ValueError, match=r"layer3\.0 is none: it has a forward of its own"):
        insert_blocks(model)
    assert not any("context_block" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("model", ["resnet50", None, ResNet])
def test_a_model_that_is_none(model):
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got (str|NoneType|type)"):
        insert_blocks(model)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize(("name", "blocks"), [("resnet50", 13), ("resnet18", 6)])
def test_resnets(library, name, blocks):
    """13 blocks in a ResNet-50, as in the paper; add-only blocks start as the identity, so nothing changes yet."""
    models = imitations.real("timm" if library == "timm" else "torchvision.models")
    model = (models.create_model if library == "timm" else models.get_model)(name).eval()
    x = torch.randn(1, 3, 64, 64)
    want = model(x)
    names = insert_blocks(model)
    assert len(names) == blocks
    assert torch.allclose(model(x), want, atol=1e-5)
