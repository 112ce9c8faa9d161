"""Layers that seem to be the plain ones and are not: a block computes what calling its submodules would give."""

from __future__ import annotations

import copy
from collections.abc import Callable

import eager
import pytest
import torch
from test_called_layers import BLOCKS, check, feature_map, in_every_slot, made
from torch import Tensor, nn

# ---- layers that seem to be the plain convolution ----------------------------------------------------------------------------


def conv_forward_on_the_module(conv: nn.Conv2d) -> None:
    old = conv._conv_forward
    conv._conv_forward = lambda x, weight, bias: old(x, weight * 3, bias)


def forward_on_the_module(conv: nn.Conv2d) -> None:
    old = conv.forward
    conv.forward = lambda x: old(x) * 3


def forward_of_another(conv: nn.Conv2d) -> None:
    other = copy.deepcopy(conv)
    with torch.no_grad():
        other.weight.mul_(3)
    conv.forward = other.forward


def call_impl_on_the_module(conv: nn.Conv2d) -> None:
    old = conv._call_impl
    conv._call_impl = lambda x: old(x) * 3


def compiled_call(conv: nn.Conv2d) -> None:
    old = conv._call_impl
    conv._compiled_call_impl = lambda x: old(x) * 3


def subclass(conv: nn.Conv2d, **attributes: object) -> None:
    conv.__class__ = type("Mine", (nn.Conv2d,), attributes)


def own_call(conv: nn.Conv2d) -> None:
    subclass(conv, __call__=lambda self, x: nn.Conv2d.__call__(self, x) * 3)


def own_call_impl(conv: nn.Conv2d) -> None:
    subclass(conv, _call_impl=lambda self, x: nn.Conv2d._call_impl(self, x) * 3)


def own_forward(conv: nn.Conv2d) -> None:
    subclass(conv, forward=lambda self, x: nn.Conv2d.forward(self, x) * 3)


def own_conv_forward(conv: nn.Conv2d) -> None:
    subclass(conv, _conv_forward=lambda self, x, weight, bias: nn.Conv2d._conv_forward(self, x, weight * 3, bias))


def weight_property(conv: nn.Conv2d) -> None:
    subclass(conv, weight=property(lambda self: self._parameters["weight"] * 3))


def bias_property(conv: nn.Conv2d) -> None:
    subclass(conv, bias=property(lambda self: self._parameters["bias"] * 3))


def own_getattribute(conv: nn.Conv2d) -> None:
    def look_up(self, name):
        found = nn.Conv2d.__getattr__(self, name) if name in ("weight", "bias") else object.__getattribute__(self, name)
        return found * 3 if name == "weight" else found

    subclass(conv, __getattribute__=look_up)


def own_getattr(conv: nn.Conv2d) -> None:
    def look_up(self, name):
        found = nn.Conv2d.__getattr__(self, name)
        return found * 3 if name == "weight" else found

    subclass(conv, __getattr__=look_up)


def shadowed_weight(conv: nn.Conv2d) -> None:
    conv.__dict__["weight"] = conv.weight.detach() * 3


def shadowed_bias(conv: nn.Conv2d) -> None:
    conv.__dict__["bias"] = conv.bias.detach() * 3


CHANGES = {
    change.__name__: change
    for change in (
        *(conv_forward_on_the_module, forward_on_the_module, forward_of_another, call_impl_on_the_module, compiled_call),
        *(
            own_call,
            own_call_impl,
            own_forward,
            own_conv_forward,
            weight_property,
            bias_property,
            own_getattribute,
            own_getattr,
        ),
        *(shadowed_weight, shadowed_bias),
    )
}


@pytest.mark.parametrize("used", [False, True], ids=["before the first call", "after it"])
@pytest.mark.parametrize("change", CHANGES)
@in_every_slot
def test_a_convolution_that_is_not_the_plain_one(kernels, name, slot, change, used):
    block, x = made(name), feature_map()
    before = block(x).detach() if used else None
    CHANGES[change](block.get_submodule(slot))
    check(block, x)
    if before is not None and (name, slot, change) not in BIAS_OF_A_MASK:
        assert not torch.allclose(block(x), before)


# The bias of a mask cancels.
BIAS_OF_A_MASK = {(name, "conv_mask", change) for name in ("gc", "snl") for change in ("bias_property", "shadowed_bias")}


def tripled(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, *arguments: method(self, *arguments) * 3


CLASSES = [
    *((nn.Conv2d, name) for name in ("forward", "_conv_forward", "__call__", "_call_impl")),
    *((cls, "forward") for cls in (nn.LayerNorm, nn.ReLU, nn.Sequential)),
    (nn.Module, "_call_impl"),
]


@pytest.mark.parametrize("used", [False, True], ids=["before the first call", "after it"])
@pytest.mark.parametrize(("cls", "method"), CLASSES, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("name", BLOCKS)
def test_a_class_that_is_patched(kernels, monkeypatch, name, cls, method, used):
    block, x = made(name), feature_map()
    before = block(x).detach()
    if not used:
        block = made(name)
    monkeypatch.setattr(cls, method, tripled(getattr(cls, method)) if cls is not nn.Module else patched_call_impl)
    check(block, x)
    if any(isinstance(module, cls) for module in list(block.modules())[1:]):
        assert not torch.allclose(block(x), before)


def patched_call_impl(self: nn.Module, *arguments: Tensor, _original: Callable[..., Tensor] = nn.Module._call_impl) -> Tensor:
    found = _original(self, *arguments)
    return found * 3 if isinstance(self, nn.Conv2d) else found


def test_a_subclass_that_is_patched_later(kernels):
    """A class of the user's own, whose base is torch's; and a patch that is taken back."""
    mine = type("Mine", (nn.Conv2d,), {})
    block, x = made("gc"), feature_map()
    block.channel_add_conv[3].__class__ = mine
    before = block(x).detach()
    mine.forward = tripled(nn.Conv2d.forward)
    check(block, x)
    assert not torch.allclose(block(x), before)
    del mine.forward
    assert torch.equal(block(x), before)


def test_a_class_that_was_patched_before_the_import(kernels, python):
    done = python(
        "import torch\n"
        "from torch import nn\n"
        "old = nn.Conv2d.forward\n"
        "nn.Conv2d.forward = lambda self, x: old(self, x) * 3\n"
        "import eager, gcnet_ext\n"
        "block = eager.randomise(gcnet_ext.GlobalContextBlock(8, 1 / 2)).double()\n"
        "x = torch.randn(2, 8, 3, 4, dtype=torch.float64)\n"
        "assert torch.allclose(block(x), eager.OwnLayers(block)(x))\n"
        "nn.Conv2d.forward = old\n"
        "assert torch.allclose(block(x), eager.OwnLayers(block)(x))\n"
        "print('as called')"
    )
    assert done.stdout.strip() == "as called"


@pytest.mark.parametrize("used", [False, True], ids=["before the first call", "after it"])
def test_children_in_another_order(kernels, used):
    """ReLU before LayerNorm: the same modules under the same names."""
    block, x = made("gc"), feature_map()
    before = block(x).detach() if used else None
    for branch in (block.channel_mul_conv, block.channel_add_conv):
        children = branch._modules
        for name in ("2", "1", "3"):
            children[name] = children.pop(name)
    check(block, x)
    assert before is None or not torch.allclose(block(x), before)


class Reversed(nn.Sequential):
    def __iter__(self):
        first, norm, activation, last = self._modules.values()
        return iter((first, activation, norm, last))


@pytest.mark.parametrize("used", [False, True], ids=["before the first call", "after it"])
def test_a_sequence_that_goes_its_own_way(kernels, used):
    block, x = made("gc"), feature_map()
    before = block(x).detach() if used else None
    block.channel_mul_conv.__class__ = Reversed
    check(block, x)
    assert before is None or not torch.allclose(block(x), before)


@pytest.mark.parametrize("cls", [nn.ReLU, nn.LayerNorm])
def test_other_plain_layers_with_a_call_of_their_own(kernels, cls):
    block, x = made("gc"), feature_map()
    block(x)
    for module in block.modules():
        if type(module) is cls:
            module.__class__ = type("Mine", (cls,), {"__call__": tripled(cls.__call__)})
    check(block, x)


# ---- torch.compile -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKS)
def test_plain_layers_are_one_node_of_a_graph(kernels, fresh_dynamo, name):
    graphs = []

    def backend(module, inputs):
        graphs.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return module

    torch.compile(made(name), fullgraph=True, backend=backend)(feature_map())
    assert sum("gcnet_ext.global_context" in target for target in graphs[0]) == 1
    assert not any("conv2d" in target for target in graphs[0])


@pytest.mark.parametrize("change", CHANGES)
def test_patched_after_compiling(kernels, fresh_dynamo, change):
    """Noticed wherever plain PyTorch notices it."""
    block, x = made("gc"), feature_map()
    compiled, plain = (torch.compile(module, backend="eager") for module in (block, eager.OwnLayers(copy.deepcopy(block))))
    before = compiled(x).detach()
    assert torch.allclose(before, plain(x))
    for module in (block, plain._orig_mod.block):
        CHANGES[change](module.channel_add_conv[3])
    got, want = compiled(x), plain(x)
    assert torch.allclose(got, want) or (torch.allclose(want, before) and torch.allclose(got, block(x)))


@pytest.mark.parametrize("method", ["forward", "_conv_forward"])
def test_a_class_that_is_patched_after_compiling(kernels, fresh_dynamo, method):
    mine = type("Mine", (nn.Conv2d,), {})
    block, x = made("gc"), feature_map()
    block.channel_add_conv[3].__class__ = mine
    compiled = torch.compile(block, backend="eager")
    before = compiled(x).detach()
    setattr(mine, method, tripled(getattr(nn.Conv2d, method)))
    assert torch.allclose(compiled(x), block(x))
    assert not torch.allclose(compiled(x), before)
