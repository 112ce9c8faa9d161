"""First derivatives with create_graph=True and second derivatives, where the tensors of a call depend on each other.

The truth is the same function in plain PyTorch and float64. Where autograd goes a way twice the numbers are wrong by as
much as they are large, so the tolerances need no care.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import eager
import pytest
import reference
import torch
from grid import Case, Random
from registry import OPERATORS, OPS
from torch import Tensor, nn

import gcnet_ext
from gcnet_ext import Branch, GlobalContextBlock, SimplifiedNonLocalBlock, SqueezeExcitation

DOUBLE = torch.float64
SHAPE = (2, 4, 3, 2)
OPTIONS = {
    "defaults": {},
    "no norm": {"norm": False},
    "eps": {"eps": 0.1},
    "silu": {"activation": "silu"},
    "hard sigmoid": {"gate": "hard_sigmoid"},
    "its slope and offset": {"gate": "hard_sigmoid", "gate_alpha": 0.2, "gate_beta": 0.4},
}


def assert_same(ours: list[Tensor], theirs: list[Tensor], rtol: float = 1e-8) -> None:
    for got, want in zip(ours, theirs, strict=True):
        assert torch.allclose(got, want, rtol=rtol, atol=rtol * float(want.detach().abs().max().clamp(min=1e-3)))


def derivatives(function: Callable[..., Tensor], inputs: list[Tensor], backward: bool = False) -> list[Tensor]:
    """First derivatives without and with create_graph, and the derivatives of a penalty on these."""
    plain = torch.autograd.grad(function(*inputs).square().sum(), inputs, allow_unused=True, materialize_grads=True)
    loss = function(*inputs).square().sum()
    if backward:  # .backward() accumulates where torch.autograd.grad returns
        for leaf in inputs:
            leaf.grad = None
        loss.backward(create_graph=True)
        first = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in inputs]
        for leaf in inputs:
            leaf.grad = None
    else:
        first = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True, materialize_grads=True)
    penalty = sum((gradient.square().sum() for gradient in first), torch.zeros((), dtype=DOUBLE))
    second = torch.autograd.grad(penalty, inputs, allow_unused=True, materialize_grads=True)
    assert_same([gradient.detach() for gradient in first], list(plain))
    return [gradient.detach() for gradient in (*first, *second)]


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def compare(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *tensors: Tensor) -> None:
    for backward in (False, True):
        assert_same(derivatives(ours, leaves(*tensors), backward), derivatives(theirs, leaves(*tensors), backward))


# ---- functions: every pair of inputs, one of them made from the other --------------------------------------------------------


def made_from(source: Tensor, like: Tensor) -> Tensor:
    """A tensor of another's shape that depends on all of the source."""
    steps = torch.arange(1, like.numel() + 1, dtype=like.dtype, device=like.device).reshape(like.shape) / like.numel()
    return like + torch.tanh(source.mean() * steps + source.square().mean())


CASE = Case(SHAPE, DOUBLE, hidden=2)


def functions(backend):
    """Each function of its tensors, that of the reference, and the tensors by name."""
    return {
        name: (op.ours, op.truth, dict(zip(op.inputs, op.inputs_of(CASE, backend.to), strict=True))) for name, op in OPS.items()
    }


# Of an op with many inputs, some of every kind.
CHOSEN = {"x", "mask_weight", "scale_w1", "scale_b1", "scale_norm_weight", "scale_w2", "shift_w1", "shift_b2"}
NAMES = {
    name: [each for each in op.inputs if (each in CHOSEN or len(op.inputs) <= 4) and each not in op.vanishing(CASE)]
    for name, op in OPS.items()
}
PAIRS = [(op, *pair) for op, names in NAMES.items() for pair in itertools.permutations(names, 2)]


@pytest.mark.parametrize(("op", "source", "made"), PAIRS)
def test_one_input_made_from_another(cpu, kernels, op, source, made):
    ours, theirs, arguments = functions(cpu)[op]
    places = list(arguments)
    varied = [name for name in ("x", source, made) if name != made]

    def call(function):
        def with_dependence(*given):
            tensors = {**arguments, **dict(zip(varied, given, strict=True))}
            tensors[made] = made_from(tensors[source], tensors[made])
            return function(*(tensors[name] for name in places))

        return with_dependence

    varied = list(dict.fromkeys(varied))
    compare(call(ours), call(theirs), *(arguments[name] for name in varied))


@pytest.mark.parametrize("op", NAMES)
def test_all_inputs_made_from_x(backend, op):
    ours, theirs, arguments = functions(backend)[op]

    def call(function):
        return lambda x: function(*(x if name == "x" else made_from(x, like) for name, like in arguments.items()))

    compare(call(ours), call(theirs), arguments["x"])


@pytest.mark.parametrize("op", NAMES)
def test_gradgradcheck_with_dependent_inputs(cpu, kernels, op):
    ours, _, arguments = functions(cpu)[op]
    (x,) = leaves(arguments["x"])

    def call(x):
        return ours(*(x if name == "x" else made_from(x, like) for name, like in arguments.items()))

    assert torch.autograd.gradgradcheck(call, (x,), fast_mode=len(arguments) > 4)


def test_the_same_tensor_twice(backend):
    """As scale and as shift; as the weights of both branches; as both layers of one; as both parameters of a norm."""
    random = Random(2, backend.to)
    x, square, both = (random.normal(*sizes, dtype=DOUBLE) for sizes in (SHAPE, (4, 4), (4,)))
    scale = random.normal(*SHAPE[:2], dtype=DOUBLE)
    compare(
        lambda x, scale: backend.channel_fuse(x, scale, scale),
        lambda x, scale: reference.channel_fuse(x, scale, scale),
        x,
        scale,
    )

    def call(function):
        def with_shared(x, square, both):
            shared = Branch(square, both, both, both, square, both)
            return function(x, both, None, shared, shared)

        return with_shared

    compare(call(backend.global_context), call(reference.global_context), x, square, both)


@pytest.mark.parametrize("name", OPTIONS)
def test_options(backend, name):
    """Each away from its default, all inputs made from one; the parameters of a norm that is off have gradients of zero."""
    _, _, arguments = functions(backend)["global_context"]

    def call(function):
        def with_options(x, *given):
            tensors = dict(zip(list(arguments)[1:], given, strict=True))
            tensors["scale_w1"] = made_from(x, tensors["scale_w1"])
            values = list(tensors.values())
            scale, shift = Branch(*values[2:8]), Branch(*values[8:])
            return function(x, *values[:2], scale, shift, **OPTIONS[name])

        return with_options

    compare(call(backend.global_context), call(reference.global_context), *arguments.values())


@pytest.mark.parametrize("needed", ["scale_norm_weight", "shift_norm_bias"])
def test_nothing_but_what_is_off_needs_a_gradient(backend, needed):
    _, _, arguments = functions(backend)["global_context"]
    tensors = {name: tensor.detach().clone().requires_grad_(name == needed) for name, tensor in arguments.items()}
    values = list(tensors.values())
    out = backend.global_context(*values[:3], Branch(*values[3:9]), Branch(*values[9:]), norm=False)
    (gradient,) = torch.autograd.grad(out.sum(), [tensors[needed]], create_graph=True)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_an_x_that_other_gradients_go_through(backend):
    """torch.autograd.grad with respect to one input alone, of a call whose other inputs are made from it."""
    x, scale = Random(3, backend.to).normal(*SHAPE, dtype=DOUBLE), Random(4, backend.to).normal(*SHAPE[:2], dtype=DOUBLE)
    for module in (backend, reference):
        (leaf,) = leaves(scale)
        made = x * leaf[:, :, None, None]
        (alone,) = torch.autograd.grad(module.channel_fuse(made, leaf).sum(), made, create_graph=True)
        (beyond,) = torch.autograd.grad(alone.square().sum(), leaf)
        assert torch.allclose(alone, leaf[:, :, None, None].expand_as(alone))
        assert torch.allclose(beyond, 2 * leaf * 6)


def test_in_place_on_what_a_graph_has_made(backend):
    """x may be overwritten once the gradients are taken, not between."""
    x, scale = Random(3, backend.to).normal(*SHAPE, dtype=DOUBLE), Random(4, backend.to).normal(*SHAPE[:2], dtype=DOUBLE)
    (leaf,) = leaves(x)
    made = leaf * 1
    out = backend.channel_fuse(made, made.mean((2, 3)))
    with torch.no_grad():
        backend.channel_fuse(made, scale, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), leaf, create_graph=True)


@pytest.mark.parametrize("name", [name for name in OPERATORS if name.endswith("_backward")])
def test_an_operator_of_the_backward_pass_has_no_derivative(cpu, name):
    """It is an error, not a gradient that silently lacks a part."""
    arguments = {
        key: value.clone().requires_grad_() if torch.is_tensor(value) and key == "x" else value
        for key, value in OPERATORS[name].good.items()
    }
    with pytest.raises(RuntimeError, match=f"gcnet_ext::{name}: its arguments must not require a gradient, got one that does"):
        getattr(cpu.ops, name)(*arguments.values())
    with torch.no_grad():
        getattr(cpu.ops, name)(*arguments.values())


# ---- blocks ------------------------------------------------------------------------------------------------------------------


BOTH = {"fusion_types": ("channel_mul", "channel_add")}
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "gc": lambda: GlobalContextBlock(4, 1 / 2, **BOTH),
    "gc, average pooling, no norm": lambda: GlobalContextBlock(4, 1 / 2, "avg", norm=False, **BOTH),
    "gc, silu, hard sigmoid": lambda: GlobalContextBlock(4, 1 / 2, activation="silu", gate="hard_sigmoid", **BOTH),
    "se": lambda: SqueezeExcitation(4, 1 / 2),
    "snl": lambda: SimplifiedNonLocalBlock(4),
}


def nothing(block: nn.Module) -> None:
    pass


def convolutions(block: nn.Module) -> list[nn.Module]:
    return [module for module in block.modules() if isinstance(module, nn.Conv2d)]


def hook_inside(block: nn.Module) -> None:
    convolutions(block)[-1].register_forward_hook(lambda module, inputs, output: output.tanh())


def hook_of_the_first(block: nn.Module) -> None:
    convolutions(block)[0].register_forward_hook(lambda module, inputs, output: output * 1.5)


def wrapped(block: nn.Module) -> None:
    """Every layer that is called begins and ends with something of its own."""
    for parent in list(block.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d):
                setattr(parent, name, nn.Sequential(nn.Tanh(), child))


def one_weight_in_all(block: nn.Module) -> None:
    first = {}
    for module in convolutions(block):
        for name in ("weight", "bias"):
            tensor = getattr(module, name)
            setattr(module, name, first.setdefault((name, tuple(tensor.shape)), tensor))


CHANGES = {change.__name__: change for change in (nothing, hook_inside, hook_of_the_first, wrapped, one_weight_in_all)}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_applied_twice(backend, name, change):
    block = eager.randomise(BLOCKS[name]()).to(device=backend.device, dtype=DOUBLE)
    CHANGES[change](block)
    x = Random(5, backend.to).normal(*SHAPE, dtype=DOUBLE)
    parameters = {key: value for key, value in block.named_parameters() if key.rpartition("conv_mask.")[2] != "bias"}
    truth = eager.OwnLayers(copy.deepcopy(block))
    theirs = dict(truth.block.named_parameters())

    (own,), (their_own,) = leaves(x), leaves(x)
    assert_same(
        derivatives(lambda x, *_: block(block(x)), [own, *parameters.values()]),
        derivatives(lambda x, *_: truth(truth(x)), [their_own, *(theirs[key] for key in parameters)]),
    )


@pytest.mark.parametrize("name", BLOCKS)
def test_functional_transforms(backend, name):
    """grad of grad, hessian-vector products and per-sample gradients by torch.func, of a block with a layer that is called."""
    block = eager.randomise(BLOCKS[name]()).to(device=backend.device, dtype=DOUBLE)
    hook_inside(block)
    truth = eager.OwnLayers(copy.deepcopy(block))
    random = Random(6, backend.to)
    x, v = random.normal(*SHAPE, dtype=DOUBLE), random.normal(*SHAPE, dtype=DOUBLE)

    def penalty(module):
        return lambda x: torch.func.grad(lambda x: module(x).square().sum())(x).square().sum()

    assert_same([torch.func.grad(penalty(block))(x)], [torch.func.grad(penalty(truth))(x)])
    products = [torch.func.jvp(torch.func.grad(lambda x, m=m: m(x).square().sum()), (x,), (v,))[1] for m in (block, truth)]
    assert_same(products[:1], products[1:])
    each = [torch.func.vmap(torch.func.grad(lambda s, m=m: m(s[None]).square().sum()))(x) for m in (block, truth)]
    assert_same(each[:1], each[1:])


# ---- autocast ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["create_graph", "second derivative", "torch.func.grad", "backward outside"])
@pytest.mark.parametrize("name", ["gc", "se", "snl"])
def test_autocast_casts_nothing(cpu, kernels, name, way):
    """Also not in the matrix products of a gradient that is taken in the region of autocast: float32 in, float32 accuracy."""
    block = eager.randomise(BLOCKS[name]())
    x = Random(7, cpu.to).normal(2, 4, 6, 5, dtype=torch.float32)

    def gradients(block: nn.Module, x: Tensor) -> list[Tensor]:
        (leaf,) = leaves(x)
        wanted = [leaf, *block.parameters()]
        if way == "torch.func.grad":
            return [torch.func.grad(lambda x: block(x).square().sum())(x)]
        first = torch.autograd.grad(block(leaf).square().sum(), wanted, create_graph=True)
        if way == "create_graph":
            return list(first)
        return list(torch.autograd.grad(first[0].square().sum(), [leaf]))

    want = gradients(copy.deepcopy(block).double(), x.double())
    if way == "backward outside":  # the forward pass alone is in the region
        (leaf,) = leaves(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = block(leaf)
        (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        got = list(torch.autograd.grad(first.square().sum(), [leaf]))
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = gradients(block, x)
    scale = max(float(tensor.detach().abs().max()) for tensor in want)
    for ours, theirs in zip(got, want, strict=True):
        assert float((ours.double() - theirs).detach().abs().max()) <= 2e-5 * scale  # a product in bfloat16 is off by 4e-3


def test_autocast_and_a_mask_that_is_called(cpu, kernels):
    """The sum over positions under the attention of another mask is no product for autocast either."""
    block = eager.randomise(GlobalContextBlock(4, 1 / 2, fusion_types="channel_add"))
    block.conv_mask.register_forward_hook(lambda module, inputs, output: output.float())
    x = Random(8, cpu.to).normal(2, 4, 6, 5, dtype=torch.float32)
    attention = block.conv_mask(x.bfloat16().float())
    want = gcnet_ext.blocks._layers.called_context(block.conv_mask, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gcnet_ext.blocks._layers.called_context(lambda_mask(attention), x)
    exact = (x.double().flatten(2) * attention.double().flatten(1).softmax(1)[:, None]).sum(2)
    assert got.dtype == want.dtype == torch.float32
    assert torch.allclose(got.double(), exact, rtol=1e-5, atol=1e-6)


def lambda_mask(logits: Tensor) -> nn.Module:
    """A mask that gives these logits whatever x is."""

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return logits

    return Fixed()
