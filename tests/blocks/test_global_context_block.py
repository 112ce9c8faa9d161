"""The module: constructor, parameters and state dict, and the whole of it against the block in eager PyTorch."""

from __future__ import annotations

import copy
import io
import pickle

import eager
import grid
import pytest
import reference
import torch
from grid import Random
from torch import nn

from gcnet_ext import GlobalContextBlock

FUSION_TYPES = {"mul": ("channel_mul",), "add": ("channel_add",), "both": ("channel_add", "channel_mul")}


def pair(backend, channels=16, ratio=0.25, pooling="att", fusion="both", **options):
    """Our block, and the eager one in float64 with the same random parameters, loaded with strict=True."""
    truth = eager.randomise(eager.ContextBlock(channels, ratio, pooling, FUSION_TYPES[fusion]))
    block = GlobalContextBlock(channels, ratio, pooling, FUSION_TYPES[fusion], device=backend.device, **options)
    block.load_state_dict(truth.state_dict(), strict=True)
    return block, truth.double()


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def check(block: nn.Module, truth: nn.Module, x: torch.Tensor, sums: float = 150) -> None:
    """Output, gradient of x and of every parameter."""
    for module in (block, truth):
        module.zero_grad()
    ours, theirs = x.detach().clone().requires_grad_(), x.detach().cpu().double().requires_grad_()
    out, want = block(ours), truth(theirs)
    grad = Random(9).feature_map(tuple(x.shape), x.dtype)
    out.backward(grad.to(x.device))
    want.backward(grad.double())
    acc = grid.accumulation(x)
    assert out.dtype == x.dtype
    grid.assert_close(out, want.detach(), acc, "out")
    grid.assert_close(ours.grad, theirs.grad, acc, "gradient of x", sums=sums)
    expected = gradients(truth)
    constant = bool((x.flatten(2) == x.flatten(2)[:, :, :1]).all())
    for name, gradient in gradients(block).items():
        # A bias of the mask shifts every logit alike, and where all positions are the same so does the weight: their gradient
        # is zero, and so is its natural scale.
        vanishes = "conv_mask" in name and (name.endswith("bias") or constant)
        largest = float(grad.abs().max()) if vanishes else 0.0
        # Of the mask's own bias the truth has only its rounding errors, which differ from one processor to the next.
        want = torch.zeros_like(expected[name]) if name == "conv_mask.bias" else expected[name]
        grid.assert_close(gradient, want, acc, name, sums=sums, largest=largest)


def gradcheck_module(module: nn.Module, x: torch.Tensor) -> bool:
    """torch.autograd.gradcheck of a float64 module in x and all of its parameters."""
    names = [name for name, _ in module.named_parameters()]

    def function(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    return grid.gradcheck(function, (x, *module.parameters()))


# ---- against the block in eager PyTorch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("pooling", grid.POOLINGS)
@pytest.mark.parametrize("fusion", FUSION_TYPES)
@pytest.mark.parametrize("channels", [16, 100])
def test_equals_the_block_in_eager(backend, channels, fusion, pooling, layout):
    block, truth = pair(backend, channels, 0.25, pooling, fusion)
    check(block, truth, Random(1, backend.to).feature_map((3, channels, 6, 7), torch.float32, layout))


def test_the_snippet_that_many_projects_copied(backend):
    """GlobalContextBlock(64, ratio=1/16) on torch.randn(16, 64, 32, 32)."""
    block = GlobalContextBlock(64, ratio=1 / 16).to(backend.device)
    truth = eager.randomise(eager.ContextBlock(64, 1 / 16, "att", ("channel_mul",)))
    block.load_state_dict(truth.state_dict(), strict=True)
    check(block, truth.double(), Random(1, backend.to).feature_map((16, 64, 32, 32), torch.float32))


@pytest.mark.parametrize("spatial", [(20,), (4, 5), (2, 2, 5), (1, 2, 2, 5)], ids=str)
def test_any_number_of_spatial_dimensions(backend, spatial):
    """Sequences, images and video: the same numbers in the same order give the same result."""
    block, truth = pair(backend)
    image = Random(1, backend.to).feature_map((2, 16, 4, 5), torch.float32)
    check(block, truth, image)
    assert torch.equal(block(image.reshape(2, 16, *spatial)), block(image).reshape(2, 16, *spatial))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("fusion", FUSION_TYPES)
def test_float32_module_on_another_dtype(backend, dtype, fusion):
    block, truth = pair(backend, fusion=fusion)
    check(block, truth, Random(1, backend.to).feature_map((2, 16, 5, 5), dtype))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_cast_module(backend, cast):
    block, truth = pair(backend)
    block = getattr(block, cast)()
    truth.load_state_dict(block.state_dict())  # the rounded parameters
    dtype = next(block.parameters()).dtype
    check(block, truth, Random(1, backend.to).feature_map((2, 16, 5, 5), dtype))


NEEDING = [name for name, _ in GlobalContextBlock(16, 0.25, fusion_types=FUSION_TYPES["both"]).named_parameters()]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "called"])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "all but this"])
@pytest.mark.parametrize("name", NEEDING)
def test_requires_grad_of_each_parameter(backend, name, alone, fused):
    """One parameter alone, and all but one: the gradients of eager, and None where none is asked for."""
    block, truth = pair(backend)
    x = Random(1, backend.to).feature_map((2, 16, 5, 5), torch.float32)
    grad = Random(9, backend.to).feature_map((2, 16, 5, 5), torch.float32)
    for module in (block, truth):
        for path, parameter in module.named_parameters():
            parameter.requires_grad_((path == name) == alone)
        if not fused:
            for layer in list(module.modules())[1:]:
                layer.register_forward_hook(lambda *_: None)
    block(x).backward(grad)
    truth(x.cpu().double()).backward(grad.cpu().double())
    for (path, ours), theirs in zip(block.named_parameters(), truth.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), path
        if ours.grad is not None and path != "conv_mask.bias":  # whose gradient is nothing but rounding errors
            grid.assert_close(ours.grad, theirs.grad, torch.float32, path, sums=150)


def test_eps(backend):
    block, truth = pair(backend, eps=0.1)
    truth.channel_add_conv[1].eps = truth.channel_mul_conv[1].eps = 0.1
    check(block, truth, Random(1, backend.to).feature_map((2, 16, 5, 5), torch.float32))


def test_attention_map(backend):
    block, truth = pair(backend)
    x = Random(1, backend.to).feature_map((2, 16, 5, 6), torch.float32)
    want = truth.conv_mask(x.cpu().double()).flatten(1).softmax(1).reshape(2, 5, 6)
    got = block.attention_map(x)
    grid.assert_close(got, want.detach(), torch.float32)
    assert not got.requires_grad
    with pytest.raises(RuntimeError, match="pooling_type must be 'att' for an attention map, got 'avg'"):
        GlobalContextBlock(16, 0.25, "avg").attention_map(x)


# ---- parameters, state dict, initialisation ----------------------------------------------------------------------------------


def names_and_shapes(channels: int, planes: int, pooling: str, fusion: str) -> dict[str, tuple[int, ...]]:
    """Those of mmcv, as in peers.md section 1.1."""
    shapes = {"conv_mask.weight": (1, channels, 1, 1), "conv_mask.bias": (1,)} if pooling == "att" else {}
    for branch in FUSION_TYPES[fusion]:
        shapes |= {
            f"{branch}_conv.0.weight": (planes, channels, 1, 1),
            f"{branch}_conv.0.bias": (planes,),
            f"{branch}_conv.1.weight": (planes, 1, 1),
            f"{branch}_conv.1.bias": (planes, 1, 1),
            f"{branch}_conv.3.weight": (channels, planes, 1, 1),
            f"{branch}_conv.3.bias": (channels,),
        }
    return shapes


@pytest.mark.parametrize("pooling", grid.POOLINGS)
@pytest.mark.parametrize("fusion", FUSION_TYPES)
@pytest.mark.parametrize(("channels", "ratio", "planes"), [(64, 1 / 16, 4), (100, 0.25, 25), (10, 0.19, 1), (6, 1, 6)])
def test_names_and_shapes(channels, ratio, planes, fusion, pooling):
    block = GlobalContextBlock(channels, ratio, pooling, FUSION_TYPES[fusion])
    assert {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()} == names_and_shapes(
        channels, planes, pooling, fusion
    )
    assert {name for name, _ in block.named_parameters()} == set(block.state_dict())


@pytest.mark.parametrize(
    ("channels", "ratio", "count"), [(512, 1 / 16, 33_889), (1024, 1 / 16, 133_313), (2048, 1 / 4, 2_102_785)]
)
def test_number_of_parameters(channels, ratio, count):
    """peers.md section 2."""
    block = GlobalContextBlock(channels, ratio, fusion_types="channel_add")
    assert sum(parameter.numel() for parameter in block.parameters()) == count


def test_state_dict_round_trip(backend):
    block, truth = pair(backend)
    back = eager.ContextBlock(16, 0.25, "att", FUSION_TYPES["both"])
    back.load_state_dict(block.state_dict(), strict=True)
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor.double(), truth.state_dict()[name])


def test_initialisation():
    """The mask as kaiming_normal with fan_in, the last convolution of both branches zero, the rest as torch has it."""
    torch.manual_seed(0)
    block = GlobalContextBlock(4096, 1 / 16, fusion_types=FUSION_TYPES["both"])
    std = (2 / 4096) ** 0.5
    assert abs(block.conv_mask.weight.std() / std - 1) < 0.05
    assert (block.conv_mask.weight.abs().max() / std) > 3  # normal, not uniform
    assert (block.conv_mask.bias == 0).all()
    for branch in (block.channel_add_conv, block.channel_mul_conv):
        first, norm, _, last = branch
        assert not last.weight.any()
        assert not last.bias.any()
        assert (norm.weight == 1).all()
        assert not norm.bias.any()
        assert norm.eps == 1e-5
        assert abs(first.weight.abs().max() * 4096**0.5 - 1) < 0.01  # uniform, as nn.Conv2d has it
        assert first.bias.any()


@pytest.mark.parametrize("dtype", grid.FLOATING)
def test_starts_as_the_identity(backend, dtype):
    """An add-only block is the identity at the start, and a mul block halves x."""
    x = Random(1, backend.to).feature_map((2, 16, 5, 5), dtype)
    add, mul = (GlobalContextBlock(16, 0.25, fusion_types=FUSION_TYPES[f], device=backend.device) for f in ("add", "mul"))
    assert torch.equal(add(x), x)
    assert torch.equal(mul(x), x * 0.5)


def test_reset_parameters_forgets(backend):
    block, _ = pair(backend, fusion="add")
    block.reset_parameters()
    x = Random(1, backend.to).feature_map((2, 16, 5, 5), torch.float32)
    assert torch.equal(block(x), x)
    assert (block.channel_add_conv[1].weight == 1).all()


def test_device_and_dtype_of_the_constructor():
    block = GlobalContextBlock(16, 0.25, device="meta", dtype=torch.bfloat16)
    assert {(parameter.device.type, parameter.dtype) for parameter in block.parameters()} == {("meta", torch.bfloat16)}


def test_one_fusion_as_a_string():
    for fusion in ("channel_add", "channel_mul"):
        assert set(GlobalContextBlock(16, 0.25, fusion_types=fusion).state_dict()) == set(
            GlobalContextBlock(16, 0.25, fusion_types=(fusion,)).state_dict()
        )


def test_defaults_are_those_of_the_snippet():
    block = GlobalContextBlock(64, ratio=1 / 16)
    assert block.pooling_type == "att"
    assert block.fusion_types == ("channel_mul",)
    assert block.channel_add_conv is None


def test_extras_are_keyword_only():
    with pytest.raises(TypeError):
        GlobalContextBlock(16, 0.25, "att", ("channel_mul",), 1e-5)


def test_repr_tells_the_arguments():
    text = repr(GlobalContextBlock(64, 1 / 16, "att", ["channel_add", "channel_mul"]))
    for part in ("64", "ratio=0.0625", "pooling_type='att'", "channel_add", "channel_mul"):
        assert part in text


# ---- copies ------------------------------------------------------------------------------------------------------------------


def saved_and_loaded(block: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(block.state_dict(), buffer)
    buffer.seek(0)
    other = GlobalContextBlock(16, 0.25, fusion_types=FUSION_TYPES["both"])
    other.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    return other


def pickled_by_torch(block: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda block: pickle.loads(pickle.dumps(block)),
    "torch.save": pickled_by_torch,
    "state dict, weights only": saved_and_loaded,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies(backend, duplicate):
    block, _ = pair(backend)
    x = Random(1, backend.to).feature_map((2, 16, 5, 5), torch.float32)
    block(x).sum().backward()  # a used block is copied, too
    other = duplicate(block).to(backend.device)
    assert torch.equal(other(x), block(x))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert not torch.equal(other(x), block(x))


def test_training_step(backend):
    """An optimiser's step along the gradients lowers the loss."""
    block, _ = pair(backend)
    x = Random(1, backend.to).feature_map((4, 16, 5, 5), torch.float32)
    target = reference.channel_fuse(x, torch.full((4, 16), 0.3, device=x.device), torch.ones(4, 16, device=x.device))
    optimiser = torch.optim.SGD(block.parameters(), lr=0.02)
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        loss = (block(x) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
