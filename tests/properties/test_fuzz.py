"""Anything at all as arguments: the float64 reference's result, or an error that names the argument. Nothing else happens.

pytest tests/properties/test_fuzz.py --hypothesis-profile=explore    # longer, and other examples in every run
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import emulated
import fuzzing
import pytest
import reference
import schema
import torch
from fuzzing import Arguments, Drawn, Thing, compare, copies, examples, outcome, refused
from hypothesis import given
from hypothesis import strategies as st
from registry import IN_PLACE, OP_OF, OPERATORS, OPS
from torch import Tensor

from gcnet_ext import Branch


def test_every_operator_has_an_entry():
    """Else it would not be drawn for."""
    assert set(OPERATORS) == set(emulated.operators("gcnet_ext"))


# ---- the operators -----------------------------------------------------------------------------------------------------------


def check_operator(backend, op: str, arguments: Arguments, *, sound: bool = False) -> None:
    made = fuzzing.made(arguments, backend.to)
    before = copies(made)
    call = getattr(backend.ops, op)
    found = outcome(lambda: call(*made.values()))
    check_shapes(call, arguments, found)
    if not any(torch.is_tensor(value) for value in made.values()):
        assert isinstance(found, Exception)  # the dispatcher's, in words of its own
    elif not refused(found, tuple(arguments), sound=sound):
        operator = OPERATORS[op]
        assert not operator.in_place or not shares_memory(arguments["x"])
        outputs = (made["x"],) if operator.in_place else found
        if outputs[-1].dtype == torch.uint8 and fuzzing.has_final_relu(arguments):
            fuzzing.assert_bits(outputs[-1], outputs[0], made["x"])
            outputs = (*outputs[:-1], schema.no_bits(made["x"]))
        compare(outputs, operator.formula, fuzzing.with_masks(before, made["x"]), operator.in_parts)


def check_shapes(call: Callable[..., Any], arguments: Arguments, found: tuple[Tensor, ...] | Exception) -> None:
    """On the meta device: the same sizes, strides and dtypes, or the same words."""
    if any(isinstance(value, Thing) or (isinstance(value, Drawn) and value.kind != "strided") for value in arguments.values()):
        return
    on_meta = outcome(lambda: call(*fuzzing.made(arguments, lambda tensor: tensor.to("meta")).values()))
    if isinstance(found, Exception):
        assert str(on_meta) == str(found)
    else:
        assert not isinstance(on_meta, Exception), on_meta
        description = [[(t.shape, t.stride(), t.dtype) for t in tensors if t is not None] for tensors in (on_meta, found)]
        assert description[0] == description[1]


@pytest.mark.parametrize("op", OPERATORS)
@given(data=st.data())
@examples(90)
def test_operators(backend, op, data):
    arguments = data.draw(fuzzing.good(op))
    check_operator(backend, op, arguments, sound=is_sound(arguments, op))


@pytest.mark.parametrize("op", OPERATORS)
@given(data=st.data())
@examples(120)
def test_operators_with_anything(backend, op, data):
    check_operator(backend, op, data.draw(fuzzing.calls(op)))


def is_sound(arguments: Arguments, op: str) -> bool:
    """Of arguments that fit together: whether the operator must accept them."""
    x = arguments["x"]
    if x.sizes[1] == 0 or (0 in x.sizes[2:] and OP_OF[op].needs_positions):
        return False
    return not OPERATORS[op].in_place or 0 in x.sizes or nests(x)


def nests(x: Drawn) -> bool:
    """Whether every dimension steps over all that the shorter steps reach. (An x that does not may still share no memory.)"""
    steps = sorted((stride, size) for size, stride in zip(x.sizes, x.strides, strict=True) if size > 1)
    return all(step >= before * size and step > 0 for (before, size), (step, _) in itertools.pairwise([(0, 1), *steps]))


def shares_memory(x: Drawn) -> bool:
    """By counting elements, not by the rule of csrc/layout.cpp."""
    offsets = torch.zeros(1, dtype=torch.int64)
    for size, stride in zip(x.sizes, x.strides, strict=True):
        offsets = (offsets[:, None] + torch.arange(size) * stride).flatten()
    return len(offsets.unique()) < len(offsets)


# ---- the functions -----------------------------------------------------------------------------------------------------------


def in_plain_pytorch(op: str, **options: Any) -> Callable[[Arguments], Tensor]:
    """The function of the reference, of arguments that are all numbers."""
    return lambda a: OPS[op].call(OPS[op].reference, fuzzing.with_bool(a), **options)


def differentiable(arguments: Arguments) -> list[str]:
    """The names of those that can have a gradient."""
    return [name for name, value in arguments.items() if isinstance(value, Drawn) and value.dtype.is_floating_point]


def differentiated(call: Callable[[Arguments], Tensor], needs: list[str]) -> fuzzing.Formula:
    """The output, and the gradient of every argument that needs one."""

    def formula(a: Arguments) -> list[Tensor]:
        leaves = {
            name: value.detach().requires_grad_(name in needs) if torch.is_tensor(value) else value
            for name, value in a.items()
            if name != "the gradient"
        }
        out = call(leaves)
        given_ = [leaves[name] for name in needs]
        if not out.requires_grad:  # without a norm nothing depends on its parameters
            return [out, *(torch.zeros_like(leaf) for leaf in given_)]
        found = torch.autograd.grad(out, given_, a["the gradient"], allow_unused=True)
        # The bias of a mask cancels: its gradient is zero whatever the rest is.
        zero = [grad is None or name in ("bias", "mask_bias") for name, grad in zip(needs, found, strict=True)]
        grads = [torch.zeros_like(leaf) if none else grad for none, grad, leaf in zip(zero, found, given_, strict=True)]
        return [out.detach(), *grads]

    return formula


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
@examples(60)
def test_functions(backend, op, data):
    """Forward, and backward to any of the arguments from a gradient of any strides and values."""
    arguments = data.draw(fuzzing.good(op))
    x = arguments["x"]
    needs = [name for name in differentiable(arguments) if data.draw(st.booleans())]
    sizes = x.sizes if OPS[op].is_map else x.sizes[:2]
    made = fuzzing.made({**arguments, "the gradient": data.draw(fuzzing.tensors(sizes, x.dtype))}, backend.to)
    found = outcome(lambda: tuple(differentiated(lambda a: OPS[op].call(OPS[op].function, a), needs)(made)))
    if not refused(found, tuple(arguments), sound=is_sound(arguments, op)):
        assert [got.dtype for got in found] == [made[name].dtype for name in ("x", *needs)]
        truth, model = in_plain_pytorch(op), OPS[op].model
        compare(found, differentiated(truth, needs), made, differentiated(model, needs))


@pytest.mark.parametrize("op", [op.name for op in IN_PLACE.values()])
@given(data=st.data())
@examples(40)
def test_functions_in_place(backend, op, data):
    arguments = data.draw(fuzzing.good(op))
    made = fuzzing.made(arguments, backend.to)
    needs = [name for name in differentiable(arguments) if data.draw(st.integers(0, 9)) == 0]
    before = copies(made)
    leaves = {name: value.requires_grad_(name in needs) if torch.is_tensor(value) else value for name, value in made.items()}
    found = outcome(lambda: OPS[op].call(OPS[op].function, leaves, inplace=True))
    if refused(found, tuple(arguments), sound=is_sound(arguments, f"{op}_") and not needs):
        assert torch.equal(leaves["x"].nan_to_num(7), before["x"].nan_to_num(7)), "refused, and overwritten all the same"
    else:
        assert found[0] is leaves["x"]
        assert not needs
        assert not shares_memory(arguments["x"])
        compare(found, OPERATORS[f"{op}_"].formula, before)


@given(data=st.data())
@examples(60)
def test_attention_map(backend, data):
    arguments = data.draw(fuzzing.calls("attention_pool", keep=NOT_OF_THE_FUNCTIONS))
    made = fuzzing.made(arguments, backend.to)
    found = outcome(lambda: backend.attention_map(**made))
    if not refused(found, tuple(arguments), sound=False):
        sizes = made["x"].shape[:1] + made["x"].shape[2:]
        compare(
            found,
            lambda a: (reference.attention_map(**fuzzing.with_bool(a)),),
            made,
            lambda a: (OPERATORS["attention_pool"].formula(a)[1].reshape(sizes),),
        )


NOT_OF_THE_FUNCTIONS = ("residual", "valid", *schema.OPTIONS)


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
@examples(120)
def test_functions_with_anything(backend, op, data):
    """In the place of an argument of the operator, or of one of the function's own."""
    arguments = data.draw(fuzzing.calls(op, keep=NOT_OF_THE_FUNCTIONS))
    options = {}
    for name in data.draw(st.lists(st.sampled_from(OPS[op].options), max_size=1)) if OPS[op].options else ():
        options[name] = data.draw(fuzzing.WITH_A_TRUTH_VALUE if name == "inplace" else fuzzing.NO_TENSOR).make()
    made = fuzzing.made(arguments, backend.to)
    before = copies(made)
    found = outcome(lambda: OPS[op].call(OPS[op].function, made, **options))
    if not refused(found, (*arguments, *OPS[op].options), sound=False):
        options.pop("inplace", None)
        before = fuzzing.without_replaced(before, options)
        compare(found, lambda a: (in_plain_pytorch(op, **options)(a),), before)


# ---- what it has found -------------------------------------------------------------------------------------------------------


def test_a_gate_that_is_flat_lets_nothing_pass(backend):
    """Not the NaN of another position's gradient, either: zero times NaN is none."""
    x, grad = backend.to(torch.ones(1, 2, 3, requires_grad=False)), backend.to(torch.ones(1, 2, 3))
    grad[0, 0, 0] = math.nan
    w1 = backend.to(torch.full((2, 2), 9.0)).requires_grad_()
    out = backend.global_context(x, scale=Branch(w1), gate="hard_sigmoid")
    assert torch.equal(torch.autograd.grad(out, w1, grad)[0], torch.zeros_like(w1))


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_a_hidden_unit_that_is_nan(backend, activation):
    """The gradient of b2 is not touched by it, that of b1 gets what autograd gives it."""
    x = backend.to(torch.ones(1, 2, 3))
    weights = [torch.ones(2, 2), torch.tensor([math.nan, 1.0]), None, None, torch.ones(2, 2), torch.ones(2)]
    weights = [None if weight is None else backend.to(weight) for weight in weights]

    def gradients(module: Any) -> list[Tensor]:
        leaves = [None if weight is None else weight.clone().requires_grad_() for weight in weights]
        out = module.global_context(x, shift=Branch(*leaves), norm=False, activation=activation)
        return list(torch.autograd.grad(out.sum(), [leaf for leaf in leaves if leaf is not None]))

    for ours, theirs in zip(gradients(backend), gradients(reference), strict=True):
        assert torch.allclose(ours, theirs, equal_nan=True)


def test_an_infinite_context(backend):
    """As an argument of the backward operator. The weight gradient of its channel is not finite: whether it is an infinity or
    NaN is decided by threads without positions, which multiply the context with zero."""
    random = fuzzing.grid.Random(0, backend.to)
    arguments = {
        "grad_context": random.normal(2, 7), "x": random.normal(2, 2, 7).transpose(1, 2), "weight": random.normal(7),
        "context": random.normal(2, 7), "attention": random.normal(2, 2).abs(), "valid": None,
        "bias": None, "need_x": True, "need_weight": True, "need_bias": True,
    }  # fmt: skip
    arguments["context"][0, 0] = math.inf
    found = backend.ops.attention_pool_backward(**arguments)
    assert not found[1][0].isfinite()
    operator = OPERATORS["attention_pool_backward"]
    compare(found, operator.formula, arguments, operator.in_parts)


def test_huge_positions_that_are_alike(backend):
    """Rounding moves their logits by more than 1: a softmax that takes them for equal is right, and so is one that does not."""
    x = Drawn((2, 5, 33), (5, 1, 0), torch.float64, std=1e20)
    check_operator(backend, "attention_pool", {"x": x, "weight": Drawn((5,), (1,)), "bias": None, "valid": None}, sound=True)


def test_parameters_of_a_norm_that_is_not_there(backend):
    """Nothing depends on them."""
    random = fuzzing.grid.Random(0, backend.to)
    branch = [weight.requires_grad_() for weight in random.branch(5, 4, torch.float32)]
    out = backend.global_context(random.feature_map((2, 5, 3, 4), torch.float32), shift=Branch(*branch), norm=False)
    for gradient in torch.autograd.grad(out.sum(), branch[2:4]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_x_with_a_lazy_minus_sign(backend):
    """The imaginary part of a conjugate, overwritten."""
    x = backend.to(torch.randn(2, 3, 4, dtype=torch.complex64)).conj().imag
    assert x.is_neg()
    scale = torch.full((2, 3), 2.0, device=x.device)
    want = backend.channel_fuse(x, scale)
    assert backend.channel_fuse(x, scale, inplace=True) is x
    assert torch.equal(x, want)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("op", OPERATORS)
def test_none_where_a_tensor_must_be(cpu, kernels, op, device):
    """C++ gets an undefined tensor. (In a list torch itself refuses it.)"""
    good = {name: value.to(device) if torch.is_tensor(value) else value for name, value in OPERATORS[op].good.items()}
    for name in ("x", "grad", *OPERATORS[op].saved, "positive"):
        in_a_list = "saved" in schema.Flat(op).lists and name in schema.IN_LISTS["saved"]
        if name in good and not in_a_list and sum(map(torch.is_tensor, good.values())) > 1:
            found = outcome(lambda name=name: getattr(cpu.ops, op)(*{**good, name: None}.values()))
            assert str(found) == f"gcnet_ext::{OPERATORS[op].public}: {name} must be a tensor, got None"


@pytest.mark.parametrize("thing", ["a string", "None", "a list of tensors", "an array", "a float", "an object"])
def test_x_that_is_no_tensor(backend, thing):
    x = Thing(thing).make()
    for call in (backend.attention_pool, backend.channel_fuse, lambda x: backend.channel_fuse(x, inplace=True)):
        with pytest.raises(TypeError, match=r"^x must be a Tensor, got "):
            call(x)


@pytest.mark.parametrize("weights", [torch.ones(3, 3), [torch.ones(3, 3)] * 6, (torch.ones(3, 3),), "weights", 0], ids=type)
def test_a_branch_that_is_none(backend, weights):
    """A list of another length once moved every argument behind it."""
    x = torch.ones(2, 3, 4, device=backend.device)
    with pytest.raises(TypeError, match=r"scale must be a Branch or None, got (Tensor|list|tuple|str|int)$"):
        backend.global_context(x, scale=weights, shift=Branch(torch.ones(3, 3)))


def test_no_map_without_a_weight(backend):
    with pytest.raises(RuntimeError, match=r"weight must be given for an attention map, got None$"):
        backend.attention_map(torch.ones(2, 3, 4, device=backend.device), None)


@pytest.mark.parametrize("layout", fuzzing.LAYOUTS)
def test_tensors_that_are_not_strided(cpu, kernels, layout):
    """The dispatcher finds no kernel; the message says which argument is to blame."""
    other = fuzzing.LAYOUTS[layout](torch.ones(2, 3))
    for op in ("channel_fuse", "channel_fuse_"):
        found = outcome(lambda op=op: getattr(cpu.ops, op)(torch.ones(2, 3, 4), other, None))
        assert str(found).startswith(f"gcnet_ext::{op}: scale must be a strided tensor, got a ")
    for leaf in (torch.ones(2, 3, 4), torch.ones(2, 3, 4, requires_grad=True)):
        found = outcome(lambda leaf=leaf: cpu.global_context(leaf, shift=Branch(other)))
        assert str(found).startswith("gcnet_ext::global_context: shift_w1 must be a strided tensor, got a ")
    with pytest.raises(RuntimeError, match=r"grad must be a strided tensor, got a "):
        cpu.ops.channel_fuse_backward(other, torch.ones(2, 3, 4), None, None, need_x=True, need_scale=True, need_shift=True)
