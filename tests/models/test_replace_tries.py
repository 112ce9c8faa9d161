"""What replace_blocks finds out by calling a block: whether a look-alike computes something else, now or later."""

from __future__ import annotations

import copy

import eager
import imitations
import pytest
import torch
from look_alikes import Pasted, Scaled, X, timm_se
from torch import nn
from torch.nn import functional as F

from gcnet_ext import replace_blocks

pytestmark = pytest.mark.usefixtures("libraries")


class Dropped(Pasted):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return x + self.drop(super().forward(x) - x)


class FunctionDropped(Pasted):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.2, self.training)


class DropPath(Pasted):
    def forward(self, x):
        if not self.training:
            return super().forward(x)
        keep = torch.rand(len(x), 1, 1, 1, dtype=x.dtype) < 0.5
        return x + keep * (super().forward(x) - x)


class LayerScale(Pasted):
    """A parameter that is one at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(16, 1, 1))

    def forward(self, x):
        return x + self.gamma * (super().forward(x) - x)


class ReZero(Pasted):
    """A branch that is switched off at the start, by a parameter of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(()))
        self.spatial = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x):
        out = super().forward(x)
        return out + self.alpha * out * self.spatial(out).sigmoid()


class Running(Pasted):
    """A buffer that is zero at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16, 1, 1))

    def forward(self, x):
        return super().forward(x - self.mean)


class Normed(Pasted):
    """A norm that acts in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(16, affine=False, momentum=0.0)

    def forward(self, x):
        return super().forward(self.norm(x) if self.training else x)


class Tempered(Pasted):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return super().forward(x) * self.temperature


class Counting(Pasted):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Shifted(Pasted):
    def forward(self, x):
        return super().forward(x) + 1e-3


class Broken(Pasted):
    def forward(self, x):
        raise KeyError("broken")


class Reads(Pasted):
    """One that computes the same only for a batch of one."""

    def forward(self, x):
        return super().forward(x) if len(x) == 1 else super().forward(x).flip(0)


class Unused(Pasted):
    """A layer that is not called yet."""

    def __init__(self) -> None:
        super().__init__()
        self.later = nn.Conv2d(16, 16, 1)


OTHERS = (
    Dropped,
    FunctionDropped,
    DropPath,
    LayerScale,
    ReZero,
    Running,
    Normed,
    Tempered,
    Counting,
    Shifted,
    Broken,
    Reads,
    Unused,
)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", OTHERS)
def test_look_alikes_are_left(kind, training):
    model = eager.randomise(nn.Sequential(kind())) if kind in (Dropped, Shifted) else nn.Sequential(kind())
    model.train(training)
    keys, before = list(model.state_dict()), dict(vars(model[0]))
    report = replace_blocks(model)
    assert report.replaced == {}
    assert list(report.left) == ["0"]
    assert type(model[0]) is kind
    assert list(model.state_dict()) == keys
    assert vars(model[0]) == before


@pytest.mark.parametrize(("name", "value"), [("strength", 0.25), ("enabled", False), ("mode", "half"), ("strength", 1.0)])
@pytest.mark.parametrize("ran_before", [False, True])
def test_a_setting_that_changes_later_counts(name, value, ran_before):
    model = eager.randomise(nn.Sequential(Scaled()))
    truth = copy.deepcopy(model)
    assert list(replace_blocks(model).replaced) == ["0"]
    if ran_before:
        model(X)
    for each in (model[0], truth[0]):
        setattr(each, name, value)
    assert torch.allclose(model(X), truth(X), atol=1e-5)
    assert (model[0]._plain_layers() is not None) == (value == 1.0)


class Bare(Pasted):
    pass


class Idle(Pasted):
    """With modules that do nothing, and a buffer that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.sigmoid, self.softmax = nn.Dropout(0.0), nn.Sigmoid(), nn.Softmax(dim=2)
        self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))


class Restated(Pasted):
    """The formula in other words."""

    def forward(self, x):
        attention = self.conv_mask(x).flatten(2).softmax(2)
        context = torch.einsum("ncp,nop->nc", x.flatten(2), attention)[:, :, None, None]
        return torch.addcmul(self.channel_add_conv(context), x, self.channel_mul_conv(context).sigmoid())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", [Bare, Idle, Restated])
def test_look_alikes_are_taken(kind, training):
    model = eager.randomise(nn.Sequential(kind())).train(training)
    want = model(X)
    assert list(replace_blocks(model).replaced) == ["0"]
    assert model[0]._plain_layers() is not None
    assert torch.allclose(model(X), want, atol=1e-5)
    if kind is Idle:
        model[0].softmax.dim = 1  # none of these is called in this class; but that is for its forward to say
        assert model[0]._plain_layers() is None
        model[0].softmax.dim, model[0].drop.p = 2, 0.5
        assert model[0]._plain_layers() is None
        assert torch.allclose(model(X), want, atol=1e-5)


def subclass(kind: type[nn.Module], **methods) -> type[nn.Module]:
    return type("Another", (kind,), methods)


@pytest.mark.parametrize("name", ["timm SEModule", "timm GlobalContext", "torchvision SqueezeExcitation", "mmcv ContextBlock"])
def test_a_subclass_is_tried(name):
    """One that computes the same is taken, and one that does not is left."""
    library, kind = name.split()
    library = {"timm": "timm.layers", "torchvision": "torchvision.ops", "mmcv": "mmcv.cnn"}[library]
    kind = getattr(imitations.library(library), kind)
    arguments = (16, 1 / 4) if "mmcv" in name else (16, 4) if "torchvision" in name else (16,)
    plain = eager.randomise(nn.Sequential(subclass(kind)(*arguments)))
    other = nn.Sequential(subclass(kind, forward=lambda self, x: kind.forward(self, x) + 1)(*arguments))
    want = plain(X)
    assert list(replace_blocks(plain).replaced) == ["0"]
    assert torch.allclose(plain(X), want, atol=1e-5)
    assert replace_blocks(other).left == {"0": "it has the submodules of a known block, and computes something else"}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_class_that_is_patched(monkeypatch, when):
    """As a deployment tool does it: what is patched counts, before the replacement and after it."""
    model = eager.randomise(nn.Sequential(timm_se(), timm_se()))
    kind = type(model[0])
    former = kind.forward
    if when == "after":
        assert len(replace_blocks(model).replaced) == 2
        model(X)
    monkeypatch.setattr(kind, "forward", lambda self, x: former(self, x) + 1)
    if when == "before":
        assert len(replace_blocks(model).left) == 2
    assert torch.allclose(model(X), former(model[1], former(model[0], X) + 1) + 1, atol=1e-5)
