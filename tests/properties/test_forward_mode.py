"""Forward mode, and derivatives of derivatives in which it takes part: as plain PyTorch's, computed in reverse mode.

Functions are compared with the plain PyTorch of their module, blocks with the blocks in eager, all of them in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import eager
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, vmap

from gcnet_ext import (
    Branch,
    GlobalContextBlock,
    NonLocalBlock,
    SimplifiedNonLocalBlock,
    SqueezeExcitation,
    attention_pool,
    channel_fuse,
    global_context,
)
from gcnet_ext.ops import attention_pool as pool
from gcnet_ext.ops import channel_fuse as fuse
from gcnet_ext.ops import global_context as whole

MODES = ("embedded_gaussian", "gaussian", "dot_product", "concatenation")
Function = Callable[..., Tensor]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def of_the_branches(function: Function, **options: object) -> Function:
    def call(x, mask, scale_w1, scale_w2, shift_w1, norm, shift_w2, residual):
        branches = Branch(scale_w1, None, None, None, scale_w2), Branch(shift_w1, None, norm, norm, shift_w2)
        return function(x, mask, None, *branches, residual=residual, **options)

    return call


VALID = torch.tensor([[True, True, False], [True, False, False]])
X, WEIGHTS = random(2, 4, 3), (random(3, 4), random(4, 3, seed=1), random(3, 4, seed=2), random(3), random(4, 3, seed=3))
# A function, its plain PyTorch and its tensors
CALLS: dict[str, tuple[Function, Function, tuple[Tensor, ...]]] = {
    "attention pool": (attention_pool, pool.reference, (X, random(4))),
    "average pool, valid": (lambda x: attention_pool(x, valid=VALID), lambda x: pool.reference(x, valid=VALID), (X,)),
    "attention pool, valid": (
        lambda x, w: attention_pool(x, w, valid=VALID),
        lambda x, w: pool.reference(x, w, valid=VALID),
        (X, random(4)),
    ),
    "channel fuse": (
        lambda x, scale, shift, residual: channel_fuse(x, scale, shift, residual=residual, final_activation="relu"),
        lambda x, scale, shift, residual: fuse.reference(x, scale, shift, residual=residual, final_activation="relu"),
        (X, random(2, 4), random(2, 4, seed=1), random(2, 4, 3, seed=2)),
    ),
    **{
        f"global context, {activation}": (
            of_the_branches(global_context, activation=activation, valid=VALID, **options),
            of_the_branches(whole.reference, activation=activation, valid=VALID, **options),
            (X, random(4), *WEIGHTS, random(2, 4, 3, seed=4)),
        )
        for activation, options in (
            ("relu", {"final_activation": "relu"}),
            ("gelu", {"gate": "hard_sigmoid"}),
            ("silu", {"eps": 0.1}),
        )
    },
}


def reverse(function: Function, tensors: tuple[Tensor, ...], which: int) -> Tensor:
    """The Jacobian of the function by the one tensor, by backward passes alone."""
    return torch.autograd.functional.jacobian(
        lambda tensor: function(*tensors[:which], tensor, *tensors[which + 1 :]), tensors[which]
    )


def assert_close(got: Tensor, want: Tensor) -> None:
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-10)


def times(jacobian: Tensor, tangent: Tensor) -> Tensor:
    return (jacobian.flatten(-tangent.dim()) @ tangent.flatten()) if tangent.dim() else jacobian * tangent


CASES = [(name, which) for name, (_, _, tensors) in CALLS.items() for which in range(len(tensors))]


@pytest.mark.parametrize(("name", "which"), CASES)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_dual_tensor_among_the_arguments(name, which, trained):
    """One has a tangent and the others have none; where something requires a gradient, too, and where nothing does."""
    function, truth, tensors = CALLS[name]
    tangent = random(*tensors[which].shape, seed=9)
    given = [tensor.clone().requires_grad_(trained) for tensor in tensors]
    with forward_ad.dual_level():
        given[which] = forward_ad.make_dual(given[which], tangent)
        found = forward_ad.unpack_dual(function(*given))
    assert found.tangent is not None
    assert_close(found.tangent, times(reverse(truth, tensors, which), tangent))
    assert_close(found.primal, truth(*tensors))
    assert found.tangent.requires_grad == trained or which > 0


@pytest.mark.parametrize(("name", "which"), CASES)
def test_of_all_orders(name, which):
    """jvp, jacfwd, and the four ways to a Hessian; nested forward mode is wrong in some functions of torch itself."""
    function, truth, tensors = CALLS[name]

    def of_one(call: Function) -> Function:
        return lambda tensor: call(*tensors[:which], tensor, *tensors[which + 1 :]).sin().sum()

    at, tangent = tensors[which], random(*tensors[which].shape, seed=9)
    want = torch.autograd.functional.jacobian(of_one(truth), at)
    assert_close(jvp(of_one(function), (at,), (tangent,))[1], (want * tangent).sum())
    assert_close(jacfwd(of_one(function))(at), want)
    second = torch.autograd.functional.hessian(of_one(truth), at)
    for inner, outer in itertools.product((jacfwd, jacrev), repeat=2):
        assert_close(outer(inner(of_one(function)))(at), second)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_in_every_layout(layout):
    x, tangent, weight = random(2, 4, 2, 3).contiguous(memory_format=layout), random(2, 4, 2, 3, seed=9), random(4)
    _, got = jvp(lambda v: attention_pool(v, weight), (x,), (tangent,))
    assert_close(got, times(reverse(pool.reference, (x, weight), 0), tangent))


def test_a_gradient_with_a_tangent():
    """The backward pass of a graph that was made before: forward mode over reverse mode."""
    for function, truth, tensors in CALLS.values():
        leaf = tensors[0].clone().requires_grad_()
        out = function(leaf, *tensors[1:])
        grad, tangent = random(*out.shape, seed=5), random(*out.shape, seed=6)
        with forward_ad.dual_level():
            (found,) = torch.autograd.grad(out, leaf, forward_ad.make_dual(grad, tangent))
            found_tangent = forward_ad.unpack_dual(found).tangent
        jacobian = reverse(truth, tensors, 0).flatten(-leaf.dim()).flatten(0, out.dim() - 1)
        assert_close(found_tangent.flatten(), tangent.flatten() @ jacobian)
        assert not found.requires_grad


def test_operators_called_by_name(kernels):
    """A raw operator with a tangent gives that of its first result, or refuses: it never drops it."""
    x, weight, tangent = X, random(4), random(*X.shape, seed=9)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        context, _ = torch.ops.gcnet_ext.attention_pool(dual, weight, None, None)
        out, _ = torch.ops.gcnet_ext.channel_fuse(dual, random(2, 4), None, None, 0)
        lists = [weight, None], [*WEIGHTS[:1], None, None, None, WEIGHTS[1], None], [None] * 6
        block = torch.ops.gcnet_ext.global_context(dual, *lists, None, None, None, 1, 0.0, None, 0)[0]
        alone = torch.ops.gcnet_ext.global_context_inference(dual, *lists, None, None, None, 1, 0.0, None, 0)
        found = [forward_ad.unpack_dual(result).tangent for result in (context, out, block, alone)]
        for overwrite in (
            lambda: torch.ops.gcnet_ext.channel_fuse_(dual, random(2, 4), None, None, 0),
            lambda: torch.ops.gcnet_ext.channel_fuse_backward(
                dual, x, None, None, 0, torch.empty(2, 0, dtype=torch.uint8), [True] * 4
            ),
        ):
            with pytest.raises(RuntimeError, match="must not have a tangent of forward-mode AD"):
                overwrite()

    def plain(v: Tensor) -> Tensor:
        return whole.reference(v, weight, None, Branch(WEIGHTS[0], None, None, None, WEIGHTS[1]), norm=False)

    wants = (
        times(reverse(pool.reference, (x, weight), 0), tangent),
        tangent * random(2, 4)[..., None],
        times(reverse(plain, (x,), 0), tangent),
    )
    for got, want in zip(found, (*wants, wants[-1]), strict=True):
        assert_close(got, want)


def test_overwriting_x_keeps_the_tangent():
    x, shift, tangent = X.clone(), random(2, 4), random(2, 4, seed=1)
    with forward_ad.dual_level():
        out = channel_fuse(x, None, forward_ad.make_dual(shift, tangent), inplace=True)
        found = forward_ad.unpack_dual(out)
        assert out is x
        assert_close(found.tangent, tangent[..., None].expand_as(x))
        assert_close(found.primal, X + shift[..., None])


# ---- blocks ------------------------------------------------------------------------------------------------------------------

BOTH = ("channel_add", "channel_mul")
BLOCKS: dict[str, tuple[nn.Module, nn.Module]] = {
    "global context": (GlobalContextBlock(4, 1 / 2, fusion_types=BOTH), eager.ContextBlock(4, 1 / 2, fusion_types=BOTH)),
    "average": (GlobalContextBlock(4, 1 / 2, "avg", BOTH), eager.ContextBlock(4, 1 / 2, "avg", BOTH)),
    "squeeze-excitation": (SqueezeExcitation(4, planes=3), eager.SqueezeExcitation(4, 3)),
    "simplified non-local": (SimplifiedNonLocalBlock(4), eager.SimplifiedNonLocal(4)),
}
IMAGE = random(2, 4, 2, 3)


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Ours and the one in eager with the same random parameters, in float64."""
    ours, theirs = BLOCKS[name]
    eager.randomise(theirs.double())
    ours.double().load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("called", [False, True], ids=["fused", "called"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, called):
    """By x and by each parameter; also with layers that are called."""
    ours, theirs = pair(name)
    handles = [module.register_forward_hook(lambda *_: None) for module in ours.modules() if called and module is not ours]
    tangent = random(*IMAGE.shape, seed=9)
    want = torch.autograd.functional.jvp(theirs, IMAGE, tangent)[1]
    assert_close(jvp(ours, (IMAGE,), (tangent,))[1], want)
    with forward_ad.dual_level():
        assert_close(forward_ad.unpack_dual(ours(forward_ad.make_dual(IMAGE, tangent))).tangent, want)
    for key, parameter in ours.named_parameters():
        values, direction = parameter.detach(), random(*parameter.shape, seed=8)
        _, got = jvp(lambda value, key=key: functional_call(ours, {key: value}, (IMAGE,)), (values,), (direction,))
        of_key = lambda value, key=key: functional_call(theirs, {key: value}, (IMAGE,))  # noqa: E731
        assert_close(got, torch.autograd.functional.jvp(of_key, values, direction)[1])
    for handle in handles:
        handle.remove()


def non_local(mode: str, sub_sample: bool) -> tuple[NonLocalBlock, nn.Module]:
    block = eager.randomise(NonLocalBlock(4, mode=mode, sub_sample=sub_sample, dtype=torch.float64))
    theirs = eager.NonLocal(4, mode=mode, sub_sample=sub_sample).double()
    theirs.load_state_dict({key.replace(".conv.", "."): value for key, value in block.state_dict().items()})
    return block, theirs


@pytest.mark.parametrize("sub_sample", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_non_local(mode, sub_sample):
    """In the softmax modes torch's attention has neither a tangent nor a second derivative, where this block must have both."""
    ours, theirs = non_local(mode, sub_sample)
    x, tangent = random(1, 4, 2, 3), random(1, 4, 2, 3, seed=9)
    want = torch.autograd.functional.jvp(theirs, x, tangent)[1]
    assert_close(jvp(ours, (x,), (tangent,))[1], want)
    with forward_ad.dual_level():
        assert_close(forward_ad.unpack_dual(ours(forward_ad.make_dual(x, tangent))).tangent, want)
    many = torch.stack([tangent, 2 * tangent])
    assert_close(vmap(lambda t: jvp(ours, (x,), (t,))[1])(many), torch.stack([want, 2 * want]))

    def loss(call: Function) -> Function:
        return lambda v: call(v).square().sum()

    second = torch.autograd.functional.hessian(loss(theirs), x)
    assert_close(torch.autograd.functional.hessian(loss(ours), x), second)
    assert_close(hessian(loss(ours))(x), second)
    for inner, outer in itertools.product((jacfwd, jacrev), repeat=2):
        assert_close(outer(inner(loss(ours)))(x), second)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_penalty_of_a_non_local_block(mode):
    """It reaches x and every parameter, and the first derivatives are those without create_graph."""
    results = []
    for block in non_local(mode, False):
        x = random(2, 4, 2, 3).requires_grad_()
        (grad,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        (without,) = torch.autograd.grad(block(x).square().sum(), x)
        assert_close(grad.detach(), without)
        given = [x, *(parameter for _, parameter in sorted(block.named_parameters()))]
        results.append(torch.autograd.grad(grad.square().sum(), given, allow_unused=True, materialize_grads=True))
    for got, want in zip(*results, strict=True):
        assert_close(got, want)


def test_a_gradient_with_a_tangent_of_a_non_local_block():
    ours, theirs = non_local("embedded_gaussian", False)
    x, grad, tangent = (random(2, 4, 2, 3, seed=seed) for seed in range(3))
    x.requires_grad_()
    with forward_ad.dual_level():
        (found,) = torch.autograd.grad(ours(x), x, forward_ad.make_dual(grad, tangent))
        got = forward_ad.unpack_dual(found).tangent
    assert_close(got, torch.autograd.grad(theirs(x), x, tangent)[0])


@pytest.mark.parametrize("mode", MODES[:2])
def test_no_weights_of_all_pairs_without_need(mode):
    """In training, what a softmax mode keeps for backward grows with P, not with P x P."""
    block = NonLocalBlock(4, mode=mode)
    kept = {}
    for positions in (256, 1024):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t):
            block(torch.randn(1, 4, positions, requires_grad=True))
        kept[positions] = max(sizes)
    assert kept[1024] <= 4 * kept[256] < 256 * 256
