"""Which blocks replace_blocks takes, which it leaves and why, and how it says so."""

from __future__ import annotations

import copy
import pickle
import warnings

import eager
import imitations
import pytest
import torch
from look_alikes import Pasted, Scaled, X, timm_se
from torch import nn

import gcnet_ext
from gcnet_ext import Report, replace_blocks

pytestmark = pytest.mark.usefixtures("libraries")

# ---- reasons -----------------------------------------------------------------------------------------------------------------


def converted_to_integers() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        block = nn.Sequential(timm_se()).eval()
        block.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
        torch.ao.quantization.prepare(block, inplace=True)
        block(X)
        return torch.ao.quantization.convert(block)[0]


def with_a_linear() -> nn.Module:
    block = timm_se()
    block.fc2 = nn.Linear(4, 16)
    return block


def with_a_pooling_hook() -> nn.Module:
    block = imitations.library("torchvision.ops").SqueezeExcitation(16, 4)
    block.avgpool.register_forward_hook(lambda *_: None)
    return block


class OwnState(Pasted):
    """One that pickles what it knows of."""

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name in vars(Pasted())}


def test_a_class_with_a_state_of_its_own():
    block = eager.randomise(OwnState())
    want = block(X)
    assert len(replace_blocks(block).replaced) == 1
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(other) is type(block)
        assert torch.allclose(other(X), want, atol=1e-5)


def with_a_copy_of_its_own() -> nn.Module:
    return type("Reduced", (Pasted,), {"__reduce__": lambda self: (Pasted, ())})()


def without_a_layer() -> nn.Module:
    block = timm_se()
    del block.fc2
    return block


def with_taken_names() -> nn.Module:
    return type("Taken", (Pasted,), {"_computed": lambda self, x: x})()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: timm_se(add_maxpool=True), "it adds a max-pooling"),
        (lambda: timm_se(norm_layer=lambda units, **_: nn.GroupNorm(1, units)), "it has a GroupNorm between its layers"),
        (lambda: timm_se(gate_layer=nn.Tanh), "its gate is Tanh, not a sigmoid"),
        (converted_to_integers, "its Conv2d is not a convolution of torch"),
        (with_a_linear, "its layer Linear is not a convolution of torch"),
        (with_a_pooling_hook, "its AdaptiveAvgPool2d with a hook must be called"),
        (without_a_layer, "it could not be read: AttributeError: 'SEModule' object has no attribute 'fc2'"),
        (with_taken_names, "its class has a _computed of its own"),
        (with_a_copy_of_its_own, "its class has a way of its own to be copied"),
    ],
)
def test_left(make, why):
    """With its reason; and the others are replaced all the same."""
    model = nn.Sequential(make(), Pasted())
    kind = type(model[0])
    report = replace_blocks(model)
    assert list(report.replaced) == ["1"]
    assert report.left["0"].startswith(why)
    assert report.kinds["0"].endswith(kind.__qualname__)
    assert type(model[0]) is kind


class ChannelAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)


class Cbam(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.channel, self.spatial = ChannelAttention(), nn.Conv2d(2, 1, 7, padding=3)


class EcaModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)


class GlobalResponseNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(16)), nn.Parameter(torch.zeros(16))


class Squeezed(nn.Module):
    """No telling name, but the layers of a gate, which opens for the sum of the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.sigmoid = nn.Linear(16, 4), nn.Linear(4, 16), nn.Sigmoid()

    def forward(self, x):
        return x * self.sigmoid(self.up(self.down(x.sum((2, 3)))))[:, :, None, None]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()


class SEResidualBlock(Residual):
    """Named after what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.se = Squeezed()
        self.attention = EcaModule()


def test_what_looks_like_attention_is_listed():
    model = nn.ModuleDict(
        {
            "cbam": Cbam(), "eca": EcaModule(), "grn": GlobalResponseNorm(), "gate": Squeezed(), "block": SEResidualBlock(),
            "mha": nn.MultiheadAttention(16, 2), "plain": Residual(), "linear": nn.Linear(16, 16), "pasted": Pasted(),
            "ours": gcnet_ext.SqueezeExcitation(16),
            "classifier": nn.Sequential(nn.Linear(16, 10), nn.Sigmoid()),
        }
    )  # fmt: skip
    report = replace_blocks(model)
    assert list(report.replaced) == ["pasted"]
    assert set(report.left) == {"cbam", "eca", "grn", "gate", "block.se", "block.attention", "mha"}
    unlike = "it has the submodules of a known block, and computes something else"
    assert {name for name, why in report.left.items() if why == unlike} == {"gate", "block.se"}
    assert set(report.left.values()) == {unlike, "its class is none of those that are known"}


def test_the_report_is_grouped_and_prints_itself():
    model = nn.Sequential(
        *(timm_se() for _ in range(6)), *(timm_se(act_layer=nn.Tanh) for _ in range(2)), timm_se(add_maxpool=True), Cbam()
    )
    report = replace_blocks(model)
    assert isinstance(report, Report)
    kind = f"{imitations.library('timm.layers').SEModule.__module__}.SEModule"
    assert str(report).splitlines() == [
        "8 replaced, 2 left",
        f"  replaced  6 x {kind}, fused, alone, because no residual block that is known ends with it: 0, 1, 2, 3 and 2 more",
        f"  replaced  2 x {kind}, pooling and fusion compiled, but its activation Tanh is called: 6, 7",
        f"  left      {kind}, because it adds a max-pooling to the average: 8",
        f"  left      {__name__}.Cbam, because its class is none of those that are known: 9",
    ]
    assert repr(report) == str(report), "a notebook shows it"
    assert report.called == {"6": "its activation Tanh", "7": "its activation Tanh"}
    again = replace_blocks(model)
    assert (again.replaced, set(again.left)) == ({}, {"8", "9"})


def test_nothing_replaced_says_what_is_known():
    report = replace_blocks(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
    assert (report.replaced, report.left) == ({}, {})
    assert str(report).startswith("0 replaced, 0 left\n  known are mmcv's ContextBlock")
    assert "insert_blocks" in str(report)


class Wrapper(nn.Module):
    """One that gives the attributes of what it holds, as torch.compile's and FSDP's do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        return self.inner(x)


def test_blocks_inside_of_others_are_found():
    attention = type("MyAttention", (nn.Sequential,), {})(imitations.library("mmcv.cnn").NonLocal2d(16), nn.Conv2d(16, 16, 1))
    model = nn.Sequential(Wrapper(Pasted()), attention, torch.compile(Pasted(), backend="eager"))
    assert list(replace_blocks(model).replaced) == ["0.inner", "1.0", "2._orig_mod"]


def test_under_hooks_of_all_modules():
    """They are not called with a probe, and do not keep a block from being replaced."""
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    model = nn.Sequential(Pasted(), timm_se())
    try:
        report = replace_blocks(model)
    finally:
        handle.remove()
    assert (len(report.replaced), report.called) == (2, {})
    assert calls == []


def test_the_second_call_and_blocks_of_ours():
    for model in (nn.Sequential(Pasted()), nn.Sequential(gcnet_ext.SqueezeExcitation(16))):
        replace_blocks(model)
        assert "the blocks of this package stay" in str(replace_blocks(model))
        assert "that has none" not in str(replace_blocks(model))


@pytest.mark.parametrize("model", ["resnet50", None, nn.Sequential, [nn.ReLU()]])
def test_a_model_that_is_none(model):
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got (str|NoneType|type|list)"):
        replace_blocks(model)


# ---- the rest of PyTorch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Pasted, timm_se, Scaled])
def test_compiled_exported_and_traced(kind):
    """In one graph, with the operator in it; by torch.fx as one node."""
    model = eager.randomise(nn.Sequential(nn.Identity(), kind())).eval()
    want = model(X)
    replace_blocks(model)
    for ran_before in (False, True):
        torch.compiler.reset()
        assert torch.allclose(torch.compile(model, backend="aot_eager", fullgraph=True)(X), want, atol=1e-5)
        exported = torch.export.export(model, (X,))
        assert torch.allclose(exported.module()(X), want, atol=1e-5)
        assert any("gcnet_ext.global_context" in str(node.target) for node in exported.graph.nodes)
        traced = torch.fx.symbolic_trace(model)
        assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1"]
        assert torch.allclose(traced(X), want, atol=1e-5)
        if not ran_before:
            model(X)


@pytest.mark.parametrize("kind", [Pasted, timm_se])
def test_functional_calls_and_transforms(kind):
    model = eager.randomise(nn.Sequential(kind()))
    truth = copy.deepcopy(model)
    replace_blocks(model)
    doubled = {name: 2 * parameter.detach() for name, parameter in model.named_parameters()}
    got, want = (torch.func.functional_call(each, doubled, (X,)) for each in (model, truth))
    assert torch.allclose(got, want, atol=1e-4)
    got, want = (torch.func.grad(lambda x, each=each: each(x).square().sum())(X) for each in (model, truth))
    assert torch.allclose(got, want, atol=1e-4)
    got, want = (torch.func.vmap(each)(X[:, None]) for each in (model, truth))
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("kind", [Pasted, timm_se])
def test_autocast(kind):
    """What autocast casts, the operator takes in its own accuracy."""
    model = eager.randomise(nn.Sequential(kind()))
    want = model(X)
    replace_blocks(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model(X), want, atol=1e-5)
        assert torch.allclose(model(X.bfloat16()).float(), want, rtol=0.05, atol=0.05)
    assert model[0]._plain_layers() is not None
