"""`freeze`: a frozen block computes what it did, reads its parameters in every call, and does not look at its layers."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from test_replace_keeps import FUSED, X, model_of
from torch import nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch.nn.utils import parametrizations

import gcnet_ext
from gcnet_ext import freeze, replace_blocks

pytestmark = pytest.mark.usefixtures("kernels")

BLOCKS = {
    "gc": lambda: gcnet_ext.GlobalContextBlock(12, 1 / 4),
    "se": lambda: gcnet_ext.SqueezeExcitation(12, 1 / 4),
    "ese": lambda: gcnet_ext.EffectiveSqueezeExcitation(12),
    "snl": lambda: gcnet_ext.SimplifiedNonLocalBlock(12),
}


def randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return module.eval()


def gc() -> nn.Module:
    return randomised(BLOCKS["gc"]())


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 12, 5, 6, generator=torch.Generator().manual_seed(0))


def doubles(_module, _inputs, output):
    return 2 * output


# ---- what it does ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKS)
def test_the_same_bits_and_gradients(name, x):
    block = randomised(BLOCKS[name]())
    other = copy.deepcopy(block)
    assert freeze(block) == [""]
    for _ in range(2):
        assert torch.equal(block(x), other(x))
        assert torch.equal(block(x, x), other(x, x))
    for each in (block, other):
        each(x).square().sum().backward()
    for mine, theirs in zip(block.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_nothing_is_compared(x):
    block = gc()
    block(x)
    assert any(block._seen.arguments[:4])
    freeze(block)
    block(x)
    assert block._seen.arguments[:4] == ((), (), (), ())


def test_which_blocks_are_frozen(x):
    """Those that one operator computes, of which nothing is computed anew in each call."""
    hooked, parametrized = gc(), gc()
    hooked.conv_mask.register_forward_hook(doubles)
    parametrizations.weight_norm(parametrized.conv_mask)
    others = [gcnet_ext.NonLocalBlock(12), gcnet_ext.EfficientChannelAttention(12), gcnet_ext.GlobalResponseNorm(12)]
    net = nn.Sequential(nn.Conv2d(12, 12, 1), gc(), nn.Sequential(hooked, gc()), parametrized, *others).eval()
    want = net(x)
    assert freeze(net) == ["1", "2.1"]
    assert torch.equal(net(x), want)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("name", FUSED)
def test_replaced_blocks(name):
    model = model_of(name).eval()
    replace_blocks(model)
    want = model(X)
    assert freeze(model) == ["0"]
    for _ in range(2):
        assert torch.equal(model(X), want)


def test_without_kernels(monkeypatch, x):
    monkeypatch.setattr(gcnet_ext.blocks._fused, "unchanged", None)
    assert freeze(gc()) == []


@pytest.mark.parametrize(("model", "error"), [(None, TypeError), ({}, TypeError), (gc().train(), ValueError)])
def test_errors(model, error):
    with pytest.raises(error, match=r"^model must be (an nn\.Module, got|in evaluation mode, got one in training mode)"):
        freeze(model)


# ---- parameters are read in every call ---------------------------------------------------------------------------------------


def loaded(block):
    block.load_state_dict({name: 0.5 * value for name, value in block.state_dict().items()})


def loaded_below(block):
    block.conv_mask.load_state_dict({name: value + 1 for name, value in block.conv_mask.state_dict().items()})


def assigned(block):
    block.load_state_dict({name: 0.5 * value for name, value in block.state_dict().items()}, assign=True)


def moved(block):
    block.to(torch.float64).to(torch.float32)


def data_overwritten(block):
    block.conv_mask.weight.data.mul_(0.5)
    block.channel_mul_conv[0].weight.data = 0.5 * block.channel_mul_conv[0].weight.data


def exchanged(block):
    block.channel_mul_conv[3].bias = nn.Parameter(torch.ones(12))


def trained(block):
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    block(torch.ones(1, 12, 4, 4)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("change", [loaded, loaded_below, assigned, moved, data_overwritten, exchanged, trained])
def test_parameters_that_change(change, x):
    block = gc()
    freeze(block)
    block(x)
    other = copy.deepcopy(block)
    change(block)
    change(other)
    assert torch.equal(block(x), other(x))
    assert block._frozen is not None


def test_parameters_of_functional_call(x):
    block = gc()
    freeze(block)
    before = block(x)
    halves = {name: 0.5 * value for name, value in block.named_parameters()}
    other = gc()
    loaded(other)
    assert torch.equal(torch.func.functional_call(block, halves, (x,)), other(x))
    assert torch.equal(block(x), before)


def test_another_dtype(x):
    block = gc()
    freeze(block)
    block(x)
    other = copy.deepcopy(block).double()
    assert torch.equal(block.double()(x.double()), other(x.double()))


# ---- layers are not looked at, until somebody says so ------------------------------------------------------------------------


def again(block):
    freeze(block)


def through_training(block):
    block.train().eval()


@pytest.mark.parametrize("look", [again, through_training])
def test_a_hook_counts_when_the_layers_are_looked_at_again(look, x):
    block = gc()
    freeze(block)
    before = block(x)
    block.channel_mul_conv[3].register_forward_hook(doubles)
    assert torch.equal(block(x), before)
    look(block)
    assert not torch.allclose(block(x), before)
    assert block._frozen is None


def test_training_mode_of_the_model_ends_it():
    net = nn.Sequential(gc()).eval()
    freeze(net)
    assert net.eval()[0]._frozen is not None
    assert net.train()[0]._frozen is None


def pickled(block):
    return pickle.loads(pickle.dumps(block))


def saved(block):
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def replicated(block):
    """As DataParallel does, which puts the parameters of a replica in place afterwards."""
    replica = block._replicate_for_data_parallel()
    replica._modules = {name: copy.deepcopy(part) for name, part in block._modules.items()}
    return replica


@pytest.mark.parametrize("make", [copy.deepcopy, pickled, saved, replicated, gcnet_ext.to_plain])
def test_a_copy_is_not_frozen(make, x):
    block = gc()
    freeze(block)
    before = block(x)
    other = make(block)
    assert "_frozen" not in vars(other)
    other.channel_mul_conv = copy.deepcopy(other.channel_mul_conv)
    other.channel_mul_conv[3].register_forward_hook(doubles)
    assert not torch.allclose(other(x), before)
    assert torch.equal(block(x), before)


# ---- graphs ------------------------------------------------------------------------------------------------------------------


def guards(block: nn.Module, x: torch.Tensor) -> int:
    """The lines that describe the guards of its graph."""
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), block(x))
    (entry,) = _debug_get_cache_entry_list(type(block).forward.__code__)
    return len(str(entry.guard_manager).splitlines())


def test_a_graph_of_a_frozen_block_has_fewer_guards(fresh_dynamo, x):
    block = gc()
    before = guards(block, x)
    freeze(block)
    assert guards(block, x) < before / 2


def test_an_exported_program_is_the_same(x):
    block = gc()
    want = torch.export.export(block, (x,)).graph_module.code
    freeze(block)
    assert torch.export.export(block, (x,)).graph_module.code == want
