"""Tensors of a class that decides itself what an operator does with them: to blocks and functions as to plain modules."""

from __future__ import annotations

from typing import Any, ClassVar

import eager
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gcnet_ext import (
    Branch,
    GlobalContextBlock,
    NonLocalBlock,
    SimplifiedNonLocalBlock,
    SqueezeExcitation,
    attention_map,
    attention_pool,
    channel_fuse,
    global_context,
)

BOTH = ("channel_add", "channel_mul")
BLOCKS = {
    "global context": lambda: GlobalContextBlock(8, 1 / 2, fusion_types=BOTH),
    "average": lambda: GlobalContextBlock(8, 1 / 2, "avg"),
    "squeeze-excitation": lambda: SqueezeExcitation(8, 1 / 2),
    "simplified non-local": lambda: SimplifiedNonLocalBlock(8),
    "non-local": lambda: NonLocalBlock(8),
    "concatenation": lambda: NonLocalBlock(8, mode="concatenation"),
}
CONVOLUTIONS = [
    (name, path) for name, make in BLOCKS.items() for path, layer in make().named_modules() if isinstance(layer, nn.Conv2d)
]
X = torch.randn(2, 8, 3, 4, generator=torch.Generator().manual_seed(0))


class Labelled(Tensor):
    """Carries a label through every function, and writes down which functions there were."""

    called: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.called.append(getattr(function, "__name__", ""))
        out = super().__torch_function__(function, types, args, kwargs or {})
        labels = [leaf.label for leaf in tree_leaves((args, kwargs)) if hasattr(leaf, "label")]
        if isinstance(out, Labelled) and labels:
            out.label = labels[0]
        return out


def labelled(tensor: Tensor) -> Any:
    found: Any = tensor.clone().as_subclass(Labelled)
    found.label = "kept"
    return found


class Quantized(Tensor):
    """A weight in eight bits, of which a convolution is all that is known."""

    @staticmethod
    def __new__(cls, weight: Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight: Tensor) -> None:
        self.step = weight.detach().abs().amax() / 127
        self.steps = (weight.detach() / self.step).round().to(torch.int8)

    def plain(self) -> Tensor:
        return self.steps * self.step

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.conv2d:
            x, weight, *others = args
            return function(x, weight.plain(), *others, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten.detach.default:
            return cls(args[0].plain())
        raise NotImplementedError(f"{operator} of a quantized weight")


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("name", BLOCKS)
def test_an_input_with_a_label(name, used, trained):
    """The label comes out, the convolutions of the block were seen, and the fused path is back for a plain tensor."""
    block = eager.randomise(BLOCKS[name]())
    want = block(X) if used else None
    given = labelled(X).requires_grad_(trained)
    Labelled.called.clear()
    out = block(given)
    seen = Labelled.called.count("conv2d")
    assert type(out) is Labelled
    assert out.label == "kept"
    assert seen == sum(isinstance(layer, nn.Conv2d) for layer in block.modules()) - (name == "concatenation")
    plain = block(X)
    assert type(plain) is Tensor
    assert torch.allclose(out.detach().as_subclass(Tensor), plain, rtol=1e-4, atol=1e-5)
    assert want is None or torch.equal(plain, want)


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize(("name", "path"), CONVOLUTIONS)
def test_a_weight_that_only_its_layer_understands(name, path, used):
    """Set before the first call, or later, where the block must notice that the weight is of another class now."""
    if path == "concat_project.conv" and not used:
        pytest.skip("one of the two is enough: this block looks at its layers in every call")
    block = eager.randomise(BLOCKS[name]())
    if used:
        block(X)
    layer = block.get_submodule(path)
    quantized = Quantized(layer.weight)
    layer.weight = nn.Parameter(quantized, requires_grad=False)
    found = block(X).detach()
    layer.weight = nn.Parameter(quantized.plain())
    assert torch.allclose(found, block(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda tensor: attention_pool(tensor, torch.ones(8)),
        lambda tensor: attention_pool(X, tensor[0, :, 0, 0]),
        lambda tensor: attention_map(tensor, torch.ones(8)),
        lambda tensor: channel_fuse(tensor, torch.ones(2, 8)),
        lambda tensor: channel_fuse(X, tensor[:, :, 0, 0]),
        lambda tensor: channel_fuse(X, residual=tensor),
        lambda tensor: global_context(tensor, shift=Branch(torch.ones(8, 8))),
        lambda tensor: global_context(X, tensor[0, :, 0, 0], shift=Branch(torch.ones(8, 8))),
        lambda tensor: global_context(X, shift=Branch(torch.ones(8, 8)), residual=tensor),
    ],
)
def test_functions(call):
    out, want = call(labelled(X)), call(X)
    assert type(out) is Labelled
    assert out.label == "kept"
    assert torch.allclose(out.as_subclass(Tensor), want, rtol=1e-4, atol=1e-5)


class Bare(Tensor):
    """A subclass with no ways of its own."""


def test_a_bare_subclass_uses_the_kernels(kernels):
    """Nothing of it would be lost."""
    block = eager.randomise(BLOCKS["global context"]())
    assert torch.equal(block(X.clone().as_subclass(Bare)).as_subclass(Tensor), block(X))
