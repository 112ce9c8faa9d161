"""Derivatives beyond one backward pass: second derivatives, torch.func, forward mode, checkpointing."""

from __future__ import annotations

import warnings

import grid
import pytest
import torch
from grid import Case, Random
from registry import OPS
from torch.utils.checkpoint import checkpoint

from gcnet_ext import GlobalContextBlock


def calls(backend, op: str, layout: str = "contiguous"):
    """The op's function, that of the reference, and inputs."""
    inputs = OPS[op].inputs_of(Case((2, 3, 2, 2), torch.float64, layout, hidden=2), backend.to)
    return OPS[op].ours, OPS[op].truth, inputs


def leaves(tensors):
    return [tensor.detach().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_gradgradcheck(backend, op, layout):
    """Second derivatives by finite differences of the first, without a warning."""
    function, _, inputs = calls(backend, op, layout)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.autograd.gradgradcheck(function, leaves(inputs), fast_mode=len(inputs) > 4)


@pytest.mark.parametrize("op", OPS)
def test_gradient_penalty(backend, op):
    """The gradients with create_graph=True are those without, and a penalty on them reaches every parameter."""
    function, truth, inputs = calls(backend, op)
    results = []
    for call in (function, truth):
        given = leaves(inputs)
        (grad,) = torch.autograd.grad(call(*given).square().sum(), given[0], create_graph=True)
        penalties = torch.autograd.grad(grad.square().sum(), given, allow_unused=True)
        plain = leaves(inputs)
        (without,) = torch.autograd.grad(call(*plain).square().sum(), plain[0])
        assert torch.allclose(grad, without, rtol=1e-10, atol=1e-12)
        results.append([grad.detach(), *(torch.zeros(()) if penalty is None else penalty for penalty in penalties)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("op", OPS)
def test_functional_gradient(backend, op):
    """torch.func.grad is the gradient of autograd."""
    function, _, inputs = calls(backend, op)
    got = torch.func.grad(lambda x: function(x, *inputs[1:]).square().sum())(inputs[0])
    given = leaves(inputs)
    (want,) = torch.autograd.grad(function(*given).square().sum(), given[0])
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("op", "which"), [(name, which) for name, op in OPS.items() for which in op.inputs[:2]])
def test_wrappers_that_outlive_their_transform(backend, op, which):
    """What torch.func.grad has wrapped and somebody has kept: the gradient reaches the tensor within."""
    function, _, inputs = calls(backend, op)
    given, index = leaves(inputs), OPS[op].inputs.index(which)
    kept = []
    torch.func.grad(lambda tensor: (kept.append(tensor), tensor.sum())[1])(given[index])
    for call in (*given[:index], *kept, *given[index + 1 :]), given:
        given[index].grad = None
        function(*call).square().sum().backward()
        kept.append(given[index].grad)
    assert torch.equal(kept[1], kept[2])


@pytest.mark.parametrize("op", OPS)
def test_forward_mode(backend, op):
    """The product of a Jacobian with a vector, forward, is that of two backward passes."""
    function, truth, inputs = calls(backend, op)
    tangent = Random(2, backend.to).normal(*inputs[0].shape, dtype=torch.float64)
    _, got = torch.func.jvp(lambda x: function(x, *inputs[1:]), (inputs[0],), (tangent,))
    _, want = torch.autograd.functional.jvp(lambda x: truth(x, *inputs[1:]), inputs[0], tangent)
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("op", OPS)
def test_vmap(backend, op):
    """A batch of batches, one call."""
    function, _, inputs = calls(backend, op)
    many = Random(3, backend.to).normal(4, *inputs[0].shape, dtype=torch.float64)
    got = torch.func.vmap(lambda x: function(x, *inputs[1:]))(many)
    want = torch.stack([function(x, *inputs[1:]) for x in many])
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-12)


def test_gradient_of_every_sample(backend):
    """vmap of grad over a block: the gradients of its parameters for each sample apart add up to those of the batch."""
    block = GlobalContextBlock(6, 0.5, device=backend.device, dtype=torch.float64)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(Random(4, backend.to).normal(*parameter.shape, dtype=torch.float64))
    x = Random(5, backend.to).normal(3, 6, 4, 5, dtype=torch.float64)
    parameters = {name: parameter.detach() for name, parameter in block.named_parameters()}

    def loss(parameters, sample):
        return torch.func.functional_call(block, parameters, (sample[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    block(x).square().sum().backward()
    for name, parameter in block.named_parameters():
        assert torch.allclose(each[name].sum(0), parameter.grad, rtol=1e-9, atol=1e-10), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(backend, reentrant):
    """Recomputed in backward: the same bits."""
    function = grid.flat(backend.global_context)
    inputs = Case((2, 10, 5, 7)).inputs(backend.to)
    grad = Random(1, backend.to).feature_map((2, 10, 5, 7), torch.float32)
    want = grid.run(function, inputs, grad)
    given = leaves(inputs)
    out = checkpoint(function, *given, use_reentrant=reentrant)
    out.backward(grad)
    assert torch.equal(out, want.out)
    for leaf, gradient in zip(given, want.grads, strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_backward_twice(backend):
    """retain_graph keeps what backward needs; without it a second pass is an error."""
    given = leaves(Case((2, 10, 5, 7)).inputs(backend.to))
    out = grid.flat(backend.global_context)(*given)
    first = torch.autograd.grad(out.sum(), given, retain_graph=True)
    again = torch.autograd.grad(out.sum(), given)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), given)


def test_changed_in_place(backend):
    """x written to between forward and backward is an error, not a wrong gradient."""
    given = leaves(Case((2, 10, 5, 7)).inputs(backend.to))
    x = given[0] * 1
    out = grid.flat(backend.global_context)(x, *given[1:])
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
