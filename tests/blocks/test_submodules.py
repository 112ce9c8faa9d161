"""A submodule of the block that was replaced, parametrized, hooked or subclassed: the block computes what the module says."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict

import grid
import pytest
import torch
from grid import Random
from test_global_context_block import check, pair
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from gcnet_ext import GlobalContextBlock


class Lora(nn.Conv2d):
    """A 1x1 convolution with a low-rank update beside it, in a forward of its own."""

    def __init__(self, in_channels: int, out_channels: int, rank: int = 2) -> None:
        super().__init__(in_channels, out_channels, 1)
        self.down, self.up = nn.Conv2d(in_channels, rank, 1), nn.Conv2d(rank, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.up(self.down(x))


class Doubled(nn.Conv2d):
    """Overrides the method that nn.Conv2d.forward calls."""

    def _conv_forward(self, *arguments):
        return 2 * super()._conv_forward(*arguments)


class Square(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.square()


def with_both(change):
    """Applies a change of one branch to both of them."""

    def apply(block):
        for branch in (block.channel_add_conv, block.channel_mul_conv):
            change(branch)

    return apply


def replace(index, make):
    def change(branch):
        branch[index] = make(branch[index])

    return with_both(change)


def set_mask(make):
    def change(block):
        block.conv_mask = make()

    return change


def hook(branch):
    branch[0].register_forward_hook(lambda module, inputs, output: output * 2)


def pre_hook(branch):
    branch[3].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))


def own_forward(branch):
    forward = branch[0].forward
    branch[0].forward = lambda x: forward(x) - 1


def no_first_bias(branch):
    branch[0].bias = None


def no_affine(branch):
    branch[1] = nn.LayerNorm(branch[1].normalized_shape, elementwise_affine=False)


def plain_weight(branch):
    """As a hypernetwork sets it: an attribute that is a tensor and no parameter."""
    weight = branch[0].weight.detach() * 2
    del branch[0].weight
    branch[0].weight = weight


CHANGES = {
    "spectral norm": with_both(lambda branch: parametrizations.spectral_norm(branch[0]).eval()),
    "weight norm": with_both(lambda branch: parametrizations.weight_norm(branch[3])),
    "weight norm of the mask": lambda block: parametrizations.weight_norm(block.conv_mask),
    "own parametrization": with_both(lambda branch: parametrize.register_parametrization(branch[0], "weight", Square())),
    "pruned": with_both(lambda branch: prune.l1_unstructured(branch[0], "weight", 0.5)),
    "weight norm by a hook": with_both(lambda branch: nn.utils.weight_norm(branch[0])),
    "forward hook": with_both(hook),
    "forward pre-hook": with_both(pre_hook),
    "forward hook of the mask": lambda block: block.conv_mask.register_forward_hook(lambda m, i, out: out * 2),
    "forward set on the instance": with_both(own_forward),
    "LoRA in a branch": replace(0, lambda conv: Lora(conv.in_channels, conv.out_channels)),
    "LoRA in the mask": set_mask(lambda: Lora(16, 1)),
    "_conv_forward overridden": replace(0, lambda conv: Doubled(conv.in_channels, conv.out_channels, 1)),
    "_conv_forward of the mask overridden": set_mask(lambda: Doubled(16, 1, 1)),
    "3x3 mask": set_mask(lambda: nn.Conv2d(16, 1, 3, padding=1)),
    "dilated 3x3 mask": set_mask(lambda: nn.Conv2d(16, 1, 3, padding=2, dilation=2)),
    "two-layer mask": set_mask(lambda: nn.Sequential(nn.Conv2d(16, 4, 1), nn.Tanh(), nn.Conv2d(4, 1, 1))),
    "mask without bias": set_mask(lambda: nn.Conv2d(16, 1, 1, bias=False)),
    "grouped convolution": replace(0, lambda conv: nn.Conv2d(16, 4, 1, groups=4)),
    "Tanh": replace(2, lambda _: nn.Tanh()),
    "SiLU": replace(2, lambda _: nn.SiLU()),
    "no norm": replace(1, lambda _: nn.Identity()),
    "norm without affine": with_both(no_affine),
    "GroupNorm": replace(1, lambda _: nn.GroupNorm(1, 4)),
    "no bias": with_both(no_first_bias),
    "three layers": with_both(lambda branch: branch.append(nn.Conv2d(16, 16, 1))),
    "other eps": with_both(lambda branch: setattr(branch[1], "eps", 0.3)),
    "eps of one branch": lambda block: setattr(block.channel_add_conv[1], "eps", 0.3),
    "one linear layer": lambda block: setattr(block, "channel_add_conv", nn.Sequential(nn.Conv2d(16, 16, 1))),
    "another width": lambda block: setattr(
        block, "channel_add_conv", nn.Sequential(nn.Conv2d(16, 7, 1), nn.LayerNorm([7, 1, 1]), nn.ReLU(), nn.Conv2d(7, 16, 1))
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_changed(backend, change, layout, used):
    """The same change to our block and to the block in eager float64, which calls its modules one by one.

    A block that was used before remembers what its submodules were.
    """
    block, truth = pair(backend)
    if used:
        block(Random(0, backend.to).feature_map((2, 16, 6, 5), torch.float32))
    for module in (block, truth):
        torch.manual_seed(0)  # for the parameters and vectors that the change draws
        change(module.float())
    truth.load_state_dict(block.state_dict(), strict=True)
    check(block.to(backend.device), truth.double(), Random(1, backend.to).feature_map((2, 16, 6, 5), torch.float32, layout))


def test_weight_that_is_no_parameter(backend):
    block, truth = pair(backend)
    for module in (block, truth):
        plain_weight(module.channel_add_conv)
    check(block, truth, Random(1, backend.to).feature_map((2, 16, 6, 5), torch.float32))


def test_functional_call(backend):
    """Parameters given for one call, and gradients to them."""
    block, truth = pair(backend)
    other = {name: parameter.detach() * 1.5 for name, parameter in block.named_parameters()}
    x = Random(1, backend.to).feature_map((2, 16, 6, 5), torch.float32)
    got = torch.func.functional_call(block, other, (x,))
    truth.load_state_dict(other)
    grid.assert_close(got, truth(x.cpu().double()).detach(), torch.float32)


def test_a_parametrization_is_computed_once(backend):
    """In training, spectral norm moves on with every look at the weight."""
    block, _ = pair(backend, fusion="mul")
    looks = []

    class Count(nn.Module):
        def forward(self, weight):
            looks.append(1)
            return weight * 1

    for module in (block.conv_mask, block.channel_mul_conv[0]):
        parametrize.register_parametrization(module, "weight", Count())
    looks.clear()
    block(Random(1, backend.to).feature_map((2, 16, 6, 5), torch.float32))
    assert len(looks) == 2


@pytest.mark.parametrize("dtype", grid.HALF)
@pytest.mark.parametrize("name", ["3x3 mask", "Tanh", "LoRA in the mask", "eps of one branch"])
def test_changed_block_on_half_inputs(backend, name, dtype):
    """float32 parameters on an x in half precision work as they do in the unchanged block, with float32 sums."""
    block, truth = pair(backend)
    for module in (block, truth):
        torch.manual_seed(0)
        CHANGES[name](module.float())
    x = Random(1, backend.to).feature_map((2, 16, 6, 5), dtype)
    got, want = block.to(backend.device)(x), truth.double()(x.cpu().double())
    assert got.dtype == dtype
    # The context may pass through the dtype of x on its way to the replaced module.
    assert grid.error(got, want.detach()) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "path", ["conv_mask", "channel_mul_conv", "channel_mul_conv.0", "channel_mul_conv.1", "channel_mul_conv.2"]
)
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_are_called(backend, path, kind):
    block, _ = pair(backend, fusion="mul")
    calls = []
    getattr(block.get_submodule(path), kind)(lambda *arguments: calls.append(path))
    x = Random(1, backend.to).feature_map((2, 16, 5, 5), torch.float32).requires_grad_()
    block(x).sum().backward()
    assert calls == [path]


def test_a_removed_hook_is_forgotten(backend):
    """With the hook gone the block is again what it was, to the bit."""
    block, _ = pair(backend)
    x = Random(1, backend.to).feature_map((2, 16, 5, 5), torch.float32)
    before = block(x)
    handle = block.channel_mul_conv[0].register_forward_hook(lambda module, inputs, output: output * 2)
    assert not torch.allclose(block(x), before)
    handle.remove()
    assert torch.equal(block(x), before)


def test_attention_map_of_a_changed_mask(backend):
    """The map that is shown is the one that is used."""
    block, truth = pair(backend)
    for module in (block, truth):
        torch.manual_seed(0)
        CHANGES["LoRA in the mask"](module.float())
    x = Random(1, backend.to).feature_map((2, 16, 5, 6), torch.float32)
    want = truth.double().conv_mask(x.cpu().double()).flatten(1).softmax(1).reshape(2, 5, 6)
    got = block.to(backend.device).attention_map(x.requires_grad_())
    grid.assert_close(got, want.detach(), torch.float32)
    assert not got.requires_grad


def test_frozen_parameters(backend):
    """A branch or the mask that requires no gradient gets none, and the rest of the gradients do not change."""
    block, truth = pair(backend)
    x = Random(1, backend.to).feature_map((2, 16, 5, 5), torch.float32)
    check(block, truth, x)
    for frozen in ("conv_mask", "channel_add_conv", "channel_mul_conv"):
        everything = {name: parameter.grad.clone() for name, parameter in block.named_parameters()}
        block.zero_grad()
        block.get_submodule(frozen).requires_grad_(False)
        block(x.clone().requires_grad_()).backward(Random(9, backend.to).feature_map(tuple(x.shape), x.dtype))
        for name, parameter in block.named_parameters():
            if name.startswith(frozen):
                assert parameter.grad is None
            else:
                assert torch.equal(parameter.grad, everything[name])
        block.requires_grad_(True)
        check(block, truth, x)


def test_weights_shared_between_blocks(backend):
    """A submodule used twice gets the sum of both gradients."""
    first, truth = pair(backend, fusion="add")
    second = GlobalContextBlock(16, 0.25, fusion_types="channel_add", device=backend.device)
    second.load_state_dict(first.state_dict())
    shared, alone = nn.Sequential(first, first), nn.Sequential(first, second)
    x = Random(1, backend.to).feature_map((2, 16, 5, 5), torch.float32)
    check(shared, nn.Sequential(truth, truth), x)
    total = first.channel_add_conv[0].weight.grad.clone()
    first.zero_grad()
    alone(x).backward(Random(9, backend.to).feature_map(tuple(x.shape), x.dtype))
    parts = first.channel_add_conv[0].weight.grad + second.channel_add_conv[0].weight.grad
    assert torch.allclose(total, parts, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_used_block_is_its_own(backend, copied):
    block, _ = pair(backend)
    x = Random(1, backend.to).feature_map((2, 16, 5, 5), torch.float32)
    before = block(x)
    other = copied(block)
    assert torch.equal(other(x), before)
    with torch.no_grad():
        other.channel_mul_conv[3].bias.add_(1)
    changed = other(x)
    assert not torch.allclose(changed, before)
    other.conv_mask.register_forward_hook(lambda module, inputs, output: output * 2)
    assert not torch.allclose(other(x), changed)
    assert torch.equal(block(x), before)


def test_a_replica_of_a_used_block_has_its_own_parameters(backend):
    """As DataParallel makes them: a block of the same fields, into which other submodules are put."""
    block, truth = pair(backend)
    other = copy.deepcopy(block)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    truth.load_state_dict(other.state_dict())
    x = Random(1, backend.to).feature_map((2, 16, 5, 5), torch.float32)
    block(x)
    replica = block._replicate_for_data_parallel()
    for name, module in other.named_children():
        replica._modules[name] = module
    grid.assert_close(replica(x), truth(x.cpu().double()).detach(), torch.float32)


def test_another_gate_in_a_used_block(backend):
    block, _ = pair(backend)
    x = Random(1, backend.to).feature_map((2, 16, 5, 5), torch.float32)
    block(x)
    other = GlobalContextBlock(16, 0.25, fusion_types=block.fusion_types, gate="hard_sigmoid").to(backend.device)
    other.load_state_dict(block.state_dict())
    block.gate = other.gate
    assert torch.equal(block(x), other(x))


def test_hooks_that_were_thrown_away_by_hand(backend):
    """As everybody removes hooks whose handles are lost: with another dictionary. A hook in that one is called, too."""
    block, _ = pair(backend)
    x = Random(1, backend.to).feature_map((2, 16, 5, 5), torch.float32)
    before = block(x)
    for module in block.modules():
        module._forward_hooks = OrderedDict()
    assert torch.equal(block(x), before)
    block.conv_mask.register_forward_hook(lambda module, inputs, output: output * 2)
    assert not torch.allclose(block(x), before)


def test_a_branch_that_was_longer_for_a_while(backend):
    """nn.Sequential.pop makes another dictionary of its layers."""
    block, truth = pair(backend)
    x = Random(1, backend.to).feature_map((2, 16, 6, 5), torch.float32)
    before = block(x)
    for branch in (block.channel_mul_conv, truth.channel_mul_conv):
        branch.append(nn.Identity())
        branch.pop(-1)
    assert torch.equal(block(x), before)
    for branch in (block.channel_mul_conv, truth.channel_mul_conv):
        torch.manual_seed(0)
        branch[3] = nn.Conv2d(4, 16, 1)
    truth.load_state_dict(block.state_dict())
    check(block.to(backend.device), truth.double(), x)


def test_a_mask_with_a_stride(backend):
    """Settings of a layer that change in place: a mask of every second position is no mask of x, and the block says so."""
    block, _ = pair(backend)
    x = Random(1, backend.to).feature_map((2, 16, 6, 6), torch.float32)
    block(x)
    block.conv_mask.stride = (2, 2)
    with pytest.raises(RuntimeError):
        block(x)
