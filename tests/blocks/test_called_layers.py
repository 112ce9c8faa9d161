"""Layers that a block calls: with weights stored in any dtype, in every rank, wrapped, and overwriting their input."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import eager
import pytest
import torch
import torch.nn.functional as F
from grid import Random
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from gcnet_ext import GlobalContextBlock, NonLocalBlock, SimplifiedNonLocalBlock, SqueezeExcitation

DOUBLE = torch.float64
SHAPE = (2, 8, 3, 4)


def global_context() -> nn.Module:
    return GlobalContextBlock(8, 1 / 2, fusion_types=("channel_mul", "channel_add"))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "gc": global_context,
    "se": lambda: SqueezeExcitation(8, 1 / 2),
    "snl": lambda: SimplifiedNonLocalBlock(8),
}
# Every convolution of every block.
SLOTS = [
    *(("gc", f"channel_{fusion}_conv.{index}") for fusion in ("mul", "add") for index in (0, 3)),
    *(("gc", "conv_mask"), ("se", "fc1"), ("se", "fc2"), ("snl", "conv_mask"), ("snl", "conv_out")),
]
in_every_slot = pytest.mark.parametrize(("name", "slot"), SLOTS)


def made(name: str, dtype: torch.dtype = DOUBLE) -> nn.Module:
    return eager.randomise(BLOCKS[name]()).to(dtype)


def feature_map(dtype: torch.dtype = DOUBLE, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return Random(0, lambda tensor: tensor).normal(*shape, dtype=DOUBLE).to(dtype)


def put(block: nn.Module, slot: str, module: nn.Module) -> None:
    parent, _, name = slot.rpartition(".")
    block.get_submodule(parent).register_module(name, module)


def check(block: nn.Module, x: Tensor) -> None:
    """The output, and the gradients of x and of all that is trained, as of the submodules themselves."""
    results = []
    for module in (block, eager.OwnLayers(block)):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        wanted = [leaf, *(parameter for parameter in block.parameters() if parameter.requires_grad)]
        grads = torch.autograd.grad(out.square().sum(), wanted, allow_unused=True, materialize_grads=True)
        results.append([out.detach(), *grads])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        rtol = 1e-10 if x.dtype == DOUBLE else 2e-5
        assert torch.allclose(ours, theirs, rtol=rtol, atol=rtol * max(1.0, float(theirs.abs().max())))


# ---- the dtype of what a layer is given --------------------------------------------------------------------------------------


class Stored(nn.Module):
    """Weights that are kept in fewer bits than the layer computes in."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        self.stored = nn.Parameter(conv.weight.detach().to(dtype), requires_grad=False)
        self.own_bias = nn.Parameter(conv.bias.detach())
        self.gain = nn.Parameter(torch.ones((), dtype=dtype), requires_grad=False)  # neither first nor last says the dtype

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.stored.to(x.dtype), self.own_bias.to(x.dtype)) * self.gain.to(x.dtype)


class Quantised(nn.Module):
    """Whole numbers, and a scale."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        weight = conv.weight.detach()
        scale = weight.abs().amax() / 127
        self.numbers = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        self.scale, self.own_bias = nn.Parameter(scale), nn.Parameter(conv.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.numbers.to(x.dtype) * self.scale.to(x.dtype), self.own_bias.to(x.dtype))


STORED = {
    "int8": Quantised,
    **{
        str(dtype).removeprefix("torch."): functools.partial(Stored, dtype=dtype)
        for dtype in (torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32)
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("kind", STORED)
@in_every_slot
def test_weights_stored_in_fewer_bits(kernels, name, slot, kind, dtype):
    block = made(name, dtype)
    put(block, slot, STORED[kind](block.get_submodule(slot)))
    check(block, feature_map(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["int8", "float16", "bfloat16"])
@in_every_slot
def test_stored_weights_in_a_mixed_block(kernels, name, slot, kind, dtype):
    """x in half precision, the other parameters in float32: what lies between is float32."""
    block = made(name, torch.float32)
    put(block, slot, STORED[kind](block.get_submodule(slot)))
    x = feature_map(dtype)
    want = eager.OwnLayers(copy.deepcopy(block))(x.float())
    got = block(x)
    assert got.dtype == dtype
    # Rounded are the context, on its way to the layers, and the result.
    assert float((got.float() - want).detach().abs().max()) <= 3 * torch.finfo(dtype).eps * float(want.detach().abs().max())


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("slot", ["g.conv", "phi.conv", "theta.conv", "conv_out.conv"])
def test_stored_weights_in_the_non_local_block(slot, kind):
    block = eager.randomise(NonLocalBlock(8)).double()
    dense = copy.deepcopy(block)
    layer = STORED[kind](block.get_submodule(slot))
    put(block, slot, layer)
    with torch.no_grad():
        weight = layer.numbers * layer.scale if kind == "int8" else layer.stored.double()
        dense.get_submodule(slot).weight.copy_(weight)
    assert torch.allclose(block(feature_map()), dense(feature_map()), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", BLOCKS)
def test_autocast_says_the_dtype(kernels, name):
    """A called layer under autocast computes in bfloat16, as everywhere; it is given what x is."""
    block, seen = made(name, torch.float32), []
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block(feature_map(torch.float32))
    assert seen
    assert all(output == torch.bfloat16 for _, output in seen)


def test_an_activation_that_wants_an_image(kernels):
    """Between the layers of squeeze-excitation stands [N, H, 1, 1], as in every other implementation."""
    block = made("se")
    block.activation = nn.Sequential(nn.GroupNorm(2, 4), nn.PReLU(4), nn.Dropout2d(0.5)).double().eval()
    check(block, feature_map())


def test_a_mask_with_two_outputs(kernels):
    block = made("gc")
    block.conv_mask = nn.Conv2d(8, 2, 1).double()
    with pytest.raises(RuntimeError, match=r"mask_weight must have shape \[8\], trailing ones aside, got \[2, 8, 1, 1\]"):
        block(feature_map())
    block.conv_mask = nn.Conv2d(8, 2, 3, padding=1).double()
    with pytest.raises(
        RuntimeError, match=r"conv_mask must give one logit per position of x, 2 \* 12, got shape \[2, 2, 3, 4\]$"
    ):
        block(feature_map())


# ---- wrapped masks -----------------------------------------------------------------------------------------------------------

SHAPES = ((2, 8, 6), SHAPE, (2, 8, 2, 3, 2), (2, 8, 2, 1, 3, 2))
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "Sequential": nn.Sequential,
    "Sequential of Sequential": lambda mask: nn.Sequential(nn.Identity(), nn.Sequential(mask, nn.Identity())),
    "torch.compile": lambda mask: torch.compile(mask, backend="eager"),
    "checkpoint": checkpoint_wrapper,
    "int8": Quantised,
    "hook": lambda mask: mask.register_forward_hook(lambda *_: None) and mask,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["gc", "snl"])
def test_a_wrapped_mask(kernels, fresh_dynamo, name, shape, wrapper):
    block, x = made(name), feature_map(shape=shape)
    block.conv_mask = WRAPPERS[wrapper](block.conv_mask)
    check(block, x)
    attention = block.attention_map(x)
    assert attention.shape == shape[:1] + shape[2:]
    assert torch.allclose(attention.flatten(1).sum(1), torch.ones(2, dtype=DOUBLE))


@pytest.mark.parametrize(("shape", "conv"), [((2, 8, 6), nn.Conv1d), ((2, 8, 2, 3, 2), nn.Conv3d)], ids=["1-D", "3-D"])
def test_a_mask_of_the_rank_of_x(kernels, shape, conv):
    """Wrapped or not, a mask that sees neighbours gets x as it is."""
    block, x = made("gc"), feature_map(shape=shape)
    for mask in (conv(8, 1, 3, padding=1).double(), nn.Sequential(conv(8, 1, 3, padding=1).double(), nn.Tanh())):
        block.conv_mask = mask
        want = mask(x).flatten(1).softmax(1).reshape(shape[:1] + shape[2:])
        assert torch.allclose(block.attention_map(x), want)
        assert block(x).shape == shape


# ---- layers that overwrite their input ---------------------------------------------------------------------------------------

IN_PLACE: dict[str, Callable[[], nn.Module]] = {
    "ReLU": lambda: nn.ReLU(inplace=True),
    "Hardswish": lambda: nn.Hardswish(inplace=True),
    "Dropout": lambda: nn.Dropout(0.0, inplace=True),
    "LeakyReLU": lambda: nn.LeakyReLU(0.3, inplace=True),
}
FIRST = {"gc": ("channel_mul_conv", "channel_add_conv"), "se": ("fc1",), "snl": ("conv_out",)}


@pytest.mark.parametrize("layer", IN_PLACE)
@pytest.mark.parametrize(("name", "slot"), [(name, slot) for name, slots in FIRST.items() for slot in slots])
def test_a_branch_that_begins_in_place(kernels, name, slot, layer):
    """It trains, and what is overwritten is seen by the branch behind it and by nothing else."""
    block = made(name)
    put(block, slot, nn.Sequential(IN_PLACE[layer](), block.get_submodule(slot)))
    check(block, feature_map())


@pytest.mark.parametrize("name", ["gc", "snl"])
def test_a_mask_that_begins_in_place(kernels, name):
    """It overwrites x itself, in plain PyTorch, too."""
    block = made(name)
    block.conv_mask = nn.Sequential(nn.ReLU(inplace=True), block.conv_mask)
    with torch.no_grad():
        x, other = feature_map(), feature_map()
        assert torch.allclose(block(x), eager.OwnLayers(block)(other))
        assert torch.equal(x, other)
