"""to_plain: a copy of a model in plain PyTorch, with the same parameters, for tools that take no block of ours."""

from __future__ import annotations

import copy
import itertools
import re

import imitations
import pytest
import torch
from grid import Random
from networks import ResNet, X, randomise
from torch import fx, nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx

import gcnet_ext
from gcnet_ext import GlobalContextBlock, NonLocalBlock, SimplifiedNonLocalBlock, SqueezeExcitation, to_plain
from gcnet_ext.blocks.non_local import MODES
from gcnet_ext.ops._options import ACTIVATIONS

pytestmark = [pytest.mark.usefixtures("libraries"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
GATES = ("sigmoid", "hard_sigmoid")
POOLS_AND_FUSIONS = itertools.product(("att", "avg"), ("channel_mul", "channel_add", ("channel_add", "channel_mul")))
FUSED = {
    **{
        f"gc {pool} {fusions}": lambda pool=pool, fusions=fusions, i=i: GlobalContextBlock(
            8, 1 / 4, pool, fusions, activation=list(ACTIVATIONS)[i], gate=GATES[i % 2], norm=i % 3 > 0, gate_alpha=0.2
        )
        for i, (pool, fusions) in enumerate(POOLS_AND_FUSIONS)
    },
    **{
        f"se {name}": lambda name=name, i=i: SqueezeExcitation(
            8, planes=3, activation=name, slope=0.3, gate=GATES[i % 2], bias=i % 3 > 0, final_activation=("none", "relu")[i % 2]
        )
        for i, name in enumerate(ACTIVATIONS)
    },
    "snl": lambda: SimplifiedNonLocalBlock(8),
    "snl relu": lambda: SimplifiedNonLocalBlock(8, final_activation="relu"),
}
NON_LOCAL = {
    f"nl {mode} {sub_sample} {norm}": lambda mode=mode, sub_sample=sub_sample, norm=norm: NonLocalBlock(
        8, mode=mode, sub_sample=sub_sample, norm=norm, use_scale=not sub_sample
    )
    for mode in MODES
    for sub_sample, norm in ((False, None), (True, "batch"))
}
BLOCKS = {**FUSED, **NON_LOCAL}
SHAPES = ((2, 8, 6, 4), (3, 8, 10), (1, 8, 2, 4, 6))


def made(name: str) -> nn.Module:
    return randomise(BLOCKS[name]()).eval()


def calls(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, clean: bool = False):
    """x alone, and with a residual and positions that count: some, or none of a sample. Unless it is to be clean, there are
    infinities and NaN where nothing counts."""
    random = Random(sum(shape))
    x, residual, numbers = (random.normal(*sizes, dtype=dtype) for sizes in (shape, shape, shape[:1] + shape[2:]))
    yield (x,)
    if name in FUSED:
        padded = x.clone()
        valid = numbers > 0
        valid[0] = False
        if not clean:
            padded[0] = torch.inf
            padded[:, :, ~valid.any(0)] = torch.nan
        yield x, residual
        yield padded, residual, valid
        yield x, None, torch.ones(1, *shape[2:], dtype=torch.bool)


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    largest = max(1.0, want.detach().nan_to_num(0, 0, 0).abs().max().item())
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5 * largest, equal_nan=True)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_way_to_run_it(name, tmp_path):
    """As it is, scripted and saved, and traced by torch.fx: with any number of dimensions and arguments."""
    block = made(name)
    plain = to_plain(block)
    torch.jit.save(torch.jit.script(plain), tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    assert "gcnet_ext::" not in str(loaded.inlined_graph)
    for shape in SHAPES:
        for args in calls(name, shape):
            want = block(*args)
            for way in (plain, loaded, fx.symbolic_trace(plain)):
                assert_close(way(*args), want)


@pytest.mark.parametrize("name", list(BLOCKS)[::4])
def test_gradients_reach_the_parameters_of_the_model(name):
    """They are the same parameters, under the same keys. In float64, because kernels and layers round in different places."""
    block = made(name).train().double()
    plain = to_plain(block)
    assert list(plain.state_dict()) == list(block.state_dict())
    assert all(a is b for a, b in zip(plain.parameters(), block.parameters(), strict=True))
    for args in calls(name, SHAPES[0], torch.float64, clean=True):
        gradients = [
            torch.autograd.grad(model(*args).square().sum(), list(block.parameters()), allow_unused=True)
            for model in (block, plain, torch.jit.script(plain))
        ]
        for want, *others in zip(*gradients, strict=True):
            for got in others if want is not None else ():  # the blocks give zeros where torch gives nothing
                assert_close(torch.zeros_like(want) if got is None else got, want)


def test_the_model_stays_as_it_is():
    """Classes, hooks and modes; what a hook of the copy sees is the copy."""
    model = nn.Sequential(nn.Conv2d(16, 16, 1), GlobalContextBlock(16, 1 / 4), NonLocalBlock(16), nn.BatchNorm2d(16)).eval()
    seen = []
    model[1].register_forward_hook(lambda module, _inputs, _output: seen.append(module))
    model[1].channel_mul_conv[0].register_forward_hook(lambda module, _inputs, _output: seen.append(module))
    model[1].note = "mine"
    want, classes = model(X), [type(part) for part in model.modules()]
    plain = to_plain(model)
    assert [type(part) for part in model.modules()] == classes
    assert torch.equal(model(X), want)
    del seen[:]
    assert_close(plain(X), want)
    assert seen == [plain[1].channel_mul_conv[0], plain[1]]
    assert plain[1].note == "mine"
    assert not plain[1].training
    assert plain[3].running_mean is model[3].running_mean
    assert not [part for part in plain.modules() if isinstance(part, GlobalContextBlock | NonLocalBlock)]
    foreign = {f"1.{key.replace('conv_mask', 'conv_attn')}": value for key, value in model[1].state_dict().items()}
    plain.load_state_dict({**model.state_dict(), **foreign}, strict=False)
    assert torch.equal(copy.deepcopy(plain)(X), plain(X))


def test_a_changed_layer_is_called():
    """One for images sees images, and one may overwrite its input."""
    block = made("gc att channel_mul")
    block.conv_mask = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))
    block.channel_add_conv = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1))
    plain = to_plain(block)
    for args in calls("gc att channel_mul", SHAPES[0]):
        assert_close(plain(*args), block(*args))


def test_replaced_blocks_become_what_they_were():
    kinds = imitations.library("torchvision.ops.misc")
    model = nn.Sequential(nn.Conv2d(16, 16, 1), kinds.SqueezeExcitation(16, 4), kinds.SqueezeExcitation(16, 8)).eval()
    want = model(X)
    assert len(gcnet_ext.replace_blocks(model).replaced) == 2
    with pytest.raises(RuntimeError, match="cannot compile a FusedSqueezeExcitation"):
        torch.jit.script(model)
    plain = to_plain(model)
    assert [type(part) for part in plain] == [nn.Conv2d, kinds.SqueezeExcitation, kinds.SqueezeExcitation]
    assert torch.equal(plain(X), want)
    assert torch.equal(torch.jit.script(plain)(X), want)
    assert gcnet_ext.replace_blocks(plain).replaced, "and can be replaced again"


@pytest.mark.parametrize("kind", ["gc", "nl"])
@pytest.mark.parametrize("where", [{}, {"position": "after_add"}, {"modules": ["layer1.0.conv1", "layer2.1.conv2"]}], ids=str)
def test_inserted_blocks(where, kind):
    model = ResNet()
    gcnet_ext.insert_blocks(model, ratio=1 / 4, kind=kind, **({"stages": (1, 3)} if "modules" not in where else {}), **where)
    if "modules" in where:
        for name in where["modules"]:
            assert hasattr(model.get_submodule(name), "context_block")
    randomise(model, "context_block").eval()
    plain = to_plain(model)
    assert list(plain.state_dict()) == list(model.state_dict())
    for way in (plain, torch.jit.script(plain)):
        assert_close(way(X), model(X))


@pytest.mark.parametrize("name", ["gc att channel_mul", "se relu", "nl dot_product False None"])
def test_quantization_in_graph_mode_leaves_a_block_alone(name):
    block = made(name)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), block, nn.Conv2d(8, 4, 1)).eval()
    x = Random(1).normal(2, 3, 9, 9)
    prepared = quantize_fx.prepare_fx(net, quantization.get_default_qconfig_mapping("fbgemm"), (x,))
    prepared(x)
    converted = quantize_fx.convert_fx(prepared)
    assert isinstance(converted.get_submodule("2"), type(block))
    assert "quantized" in type(converted.get_submodule("3")).__module__
    assert (converted(x) - net(x)).abs().max() < 0.1 * net(x).abs().max()


class Quantized(nn.Module):
    """A block between stubs, or with layers that are quantized."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stub, self.conv, self.back = quantization.QuantStub(), nn.Conv2d(3, 8, 3), quantization.DeQuantStub()
        self.block, self.last = block, nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.block(self.back(self.conv(self.stub(x)))).mean((2, 3)))


@pytest.mark.parametrize("name", ["gc avg channel_add", "se hardswish", "snl", "nl gaussian True batch"])
def test_quantization_in_eager_mode(name):
    net = to_plain(Quantized(made(name)).eval())
    x = Random(2).normal(4, 3, 9, 9)
    want = net(x)
    net.qconfig = quantization.get_default_qconfig("fbgemm")
    net.block.qconfig = net.last.qconfig = None
    prepared = quantization.prepare(net)
    prepared(x)
    converted = quantization.quantize_dynamic(quantization.convert(prepared), {nn.Linear})
    assert "quantized" in type(converted.conv).__module__
    assert (converted(x) - want).abs().max() < 0.1 * want.abs().max()
    assert torch.allclose(torch.jit.script(converted)(x), converted(x))


class Derived(SqueezeExcitation):
    def forward(self, x, residual=None, valid=None):
        return -super().forward(x, residual, valid)


def test_what_it_refuses():
    with pytest.raises(TypeError, match=r"^model must be an nn\.Module, got str$"):
        to_plain("model")
    with pytest.raises(TypeError, match=r"^Derived has a forward of its own"):
        to_plain(nn.Sequential(Derived(8, 1 / 4)))
    block = GlobalContextBlock(8, 1 / 4)
    block.process_group = object()
    with pytest.raises(
        RuntimeError, match=re.escape("process_group must be None for a block in plain PyTorch, got a group in 0")
    ):
        to_plain(nn.Sequential(block))
