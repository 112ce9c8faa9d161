"""The whole block as one operator, against the float64 reference."""

from __future__ import annotations

import itertools
import math

import eager
import grid
import pytest
import reference
import schema
import torch
from grid import GLOBAL_CONTEXT_INPUTS, Case, Random

from gcnet_ext import Branch


def check(backend, case: Case, grad_layout: str | None = None, seed: int = 0, **options) -> grid.Result:
    inputs = case.inputs(backend.to, seed)
    grad = Random(seed + 1, backend.to).feature_map(case.shape, case.dtype, grad_layout or case.layout)
    function, truth = grid.flat(backend.global_context, **options), grid.flat(reference.global_context, **options)
    return grid.check(function, truth, inputs, grad, GLOBAL_CONTEXT_INPUTS, vanishing=case.vanishing, sums=case.sums)


def check_inputs(backend, inputs, grad, **options) -> grid.Result:
    function, truth = grid.flat(backend.global_context, **options), grid.flat(reference.global_context, **options)
    return grid.check(function, truth, inputs, grad, GLOBAL_CONTEXT_INPUTS)


@pytest.mark.parametrize("case", grid.groups(), ids=str)
@pytest.mark.parametrize("pooling", grid.POOLINGS)
def test_groups(backend, case, pooling):
    check(backend, case._replace(pooling=pooling))


@pytest.mark.parametrize("layouts", list(itertools.permutations(grid.LAYOUTS)), ids="-grad-".join)
@pytest.mark.parametrize("dtype", grid.FLOATING)
def test_gradient_in_another_layout(backend, layouts, dtype):
    check(backend, Case((2, 33, 6, 7), dtype, layouts[0]), grad_layout=layouts[1])


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("fusion", grid.FUSIONS)
def test_expanded_gradient(backend, layout, fusion):
    inputs = Case((2, 12, 5, 5), layout=layout, fusion=fusion).inputs(backend.to)
    check_inputs(backend, inputs, None)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, *grid.HALF])
def test_parameters_of_two_dtypes(backend, dtype, first):
    """Every other parameter is float32, the rest are of the dtype of x."""
    inputs = list(Case((2, 12, 5, 5), dtype).inputs(backend.to))
    for index in range(1 + first, len(inputs), 2):
        inputs[index] = inputs[index].float()
    grad = Random(1, backend.to).feature_map(inputs[0].shape, dtype)
    check_inputs(backend, inputs, grad)


AFFINE = tuple(f"{branch}_norm_{parameter}" for branch in ("scale", "shift") for parameter in ("weight", "bias"))
BIASES = ("mask_bias", "scale_b1", "scale_b2", "shift_b1", "shift_b2")


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("missing", [*((name,) for name in (*BIASES, *AFFINE)), BIASES, AFFINE, BIASES + AFFINE], ids="+".join)
def test_missing_parameters(backend, missing, layout):
    check(backend, Case((3, 16, 5, 5), layout=layout, missing=missing))


@pytest.mark.parametrize("fusion", grid.FUSIONS)
@pytest.mark.parametrize("dtype", grid.FLOATING)
@pytest.mark.parametrize("bias", [True, False])
def test_one_linear_layer(backend, fusion, dtype, bias):
    """A branch without w2 is one linear layer C -> C, as in simplified non-local and GE-theta."""
    missing = tuple(f"{branch}_{name}" for branch in ("scale", "shift") for name in ("norm_weight", "norm_bias", "w2", "b2"))
    missing += () if bias else ("scale_b1", "shift_b1")
    check(backend, Case((2, 12, 5, 5), dtype, fusion=fusion, hidden=12, missing=missing))


def test_one_linear_layer_beside_two(backend):
    """The branches need not be alike: here they also have different numbers of hidden units."""
    random = Random(0, backend.to)
    linear = (random.normal(10, 10), random.normal(10), None, None, None, None)
    two = random.branch(10, 7, torch.float32)
    x, grad = (random.feature_map((3, 10, 4, 5), torch.float32) for _ in range(2))
    for branches in ((*linear, *two), (*two, *linear), (*random.branch(10, 3, torch.float32), *two)):
        inputs = (x, *random.mask(10, torch.float32), *branches)
        check_inputs(backend, inputs, grad)


OPTIONS = {
    "no norm": {"norm": False},
    "silu": {"activation": "silu"},
    "silu, no norm": {"activation": "silu", "norm": False},
    "eps of timm": {"eps": 1e-6},
    "large eps": {"eps": 0.5},
    "hard sigmoid of torch": {"gate": "hard_sigmoid"},
    "hard sigmoid of ONNX": {"gate": "hard_sigmoid", "gate_alpha": 0.2, "gate_beta": 0.5},
    "all": {"gate": "hard_sigmoid", "gate_alpha": 0.3, "gate_beta": 0.4, "activation": "silu", "norm": False, "eps": 1e-3},
}


@pytest.mark.parametrize("dtype", grid.FLOATING)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(backend, options, dtype):
    missing = () if options.get("norm", True) else AFFINE
    check(backend, Case((4, 24, 5, 5), dtype, hidden=6, missing=missing), **options)


def test_every_piece_of_the_hard_sigmoid(backend):
    """Below, between and above its corners; gradients are zero outside."""
    inputs = list(Case((2, 6, 3, 3), fusion="mul").inputs(backend.to))
    b2 = GLOBAL_CONTEXT_INPUTS.index("scale_b2")
    inputs[b2] = backend.to(torch.tensor([-50.0, -40.0, 0.0, 0.1, 40.0, 50.0]))
    got = check_inputs(backend, inputs, None, gate="hard_sigmoid")
    assert (got.out[:, :2] == 0).all()
    assert torch.equal(got.out[:, 4:], inputs[0][:, 4:])
    assert (got.grads[b2][[0, 1, 4, 5]] == 0).all()


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("dtype", grid.HALF)
@pytest.mark.parametrize("shape", [(2, 64, 7, 7), (2, 100, 32, 33)], ids=str)
def test_no_worse_than_eager_in_half(backend, dtype, layout, shape):
    case = Case(shape, dtype, layout, hidden=8)
    inputs = case.inputs(backend.to)
    grad = Random(1, backend.to).feature_map(shape, dtype, layout)
    truth = grid.exact(grid.flat(reference.global_context), inputs, grad)
    ours = grid.run(grid.flat(backend.global_context), inputs, grad)
    theirs = grid.run(eager.global_context, inputs, grad)
    assert grid.error(ours.out, truth.out) <= 1.05 * grid.error(theirs.out, truth.out)
    for name, got, want, other in zip(GLOBAL_CONTEXT_INPUTS, ours.grads, truth.grads, theirs.grads, strict=True):
        if name != "mask_bias":
            assert grid.error(got, want) <= 1.05 * grid.error(other, want), name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck_of_options(backend, options):
    missing = () if options.get("norm", True) else AFFINE
    inputs = Case((2, 3, 5), torch.float64, hidden=3, missing=missing).inputs(backend.to)
    assert grid.gradcheck(grid.flat(backend.global_context, **options), inputs)


GROUPS = {
    "x": ("x",),
    "mask_weight": ("mask_weight",),
    "mask_bias": ("mask_bias",),
    "scale": GLOBAL_CONTEXT_INPUTS[3:9],
    "shift": GLOBAL_CONTEXT_INPUTS[9:],
}


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("needs", list(itertools.product([0, 1], repeat=len(GROUPS))), ids=str)
def test_needs_input_grad(backend, needs, layout):
    inputs = Case((2, 8, 4, 5), layout=layout).inputs(backend.to)
    grad = Random(1, backend.to).feature_map((2, 8, 4, 5), torch.float32, layout)
    wanted = {name for group, need in zip(GROUPS, needs, strict=True) if need for name in GROUPS[group]}
    grid.check_needs(grid.flat(backend.global_context), inputs, grad, [name in wanted for name in GLOBAL_CONTEXT_INPUTS])


def test_gradient_of_the_mask_bias_is_zero_not_none(backend):
    inputs = Case((2, 8, 4, 5)).inputs(backend.to)
    got = grid.run(grid.flat(backend.global_context), inputs)
    assert got.grads[2].shape == inputs[2].shape
    # Plain PyTorch goes through the softmax and leaves its rounding errors.
    assert abs(got.grads[2].item()) <= (0 if backend.has_kernels else 1e-4)


@pytest.mark.parametrize("trailing", [1, 2, 3])
def test_weights_of_convolutions(backend, trailing):
    """[H, C, 1, 1] is [H, C]; the gradient has the shape of the weight."""
    inputs = Case((2, 8, 4, 5)).inputs(backend.to)
    as_convolutions = (
        inputs[0],
        inputs[1].reshape(1, 8, *[1] * trailing),
        *(tensor.reshape(*tensor.shape, *[1] * trailing) for tensor in inputs[2:]),
    )
    grad = Random(1, backend.to).feature_map((2, 8, 4, 5), torch.float32)
    plain = grid.run(grid.flat(backend.global_context), inputs, grad)
    got = grid.run(grid.flat(backend.global_context), as_convolutions, grad)
    assert torch.equal(got.out, plain.out)
    for tensor, ours, theirs in zip(as_convolutions, got.grads, plain.grads, strict=True):
        assert ours.shape == tensor.shape
        assert torch.equal(ours.flatten(), theirs.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_parameters(backend, dtype):
    """Weights that are views: transposed, every other row, expanded."""
    random = Random(0, backend.to)
    x, grad = (random.feature_map((2, 8, 4, 5), dtype) for _ in range(2))
    scale = (
        random.normal(8, 4, dtype=dtype).t(),
        random.normal(8, dtype=dtype)[::2],
        random.normal(1, dtype=dtype).expand(4),
        random.normal(4, 3, dtype=dtype)[:, 1],
        random.normal(8, 8, dtype=dtype)[:, ::2],
        random.normal(1, dtype=dtype).expand(8),
    )
    inputs = (x, random.normal(16, dtype=dtype)[::2], random.normal(1, dtype=dtype), *scale, *(None,) * 6)
    check_inputs(backend, inputs, grad)


@pytest.mark.representative
@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("dtype", grid.FLOATING)
@pytest.mark.parametrize("pooling", grid.POOLINGS)
def test_the_sign_of_zero(backend, pooling, dtype, layout):
    """As in plain PyTorch: -0 times a gate is -0 where nothing is added to it."""
    inputs = list(Case((2, 19, 5, 7), dtype, layout, pooling, fusion="mul").inputs(backend.to))
    x = inputs[0] = inputs[0].clone()
    x[:, :, ::2] *= 0
    block, in_place = grid.flat(backend.global_context), grid.flat(backend.global_context, inplace=True)
    for out in (block(*inputs), grid.run(block, inputs, x).out, in_place(x.clone(), *inputs[1:])):
        assert torch.equal(out.signbit(), x.signbit())
        assert (out[:, :, ::2] == 0).all()


# ---- infinities and NaN ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("nan", ["w1", "b1", "norm_weight", "norm_bias", "w2", "b2"])
def test_nan_in_one_hidden_unit(backend, nan, norm, activation):
    """In the weights of one unit; output and every gradient have their NaN where those of the reference have them."""
    missing = () if norm else AFFINE
    inputs = list(Case((2, 6, 3, 5), missing=missing).inputs(backend.to))
    for branch in ("scale", "shift"):
        index = GLOBAL_CONTEXT_INPUTS.index(f"{branch}_{nan}")
        if inputs[index] is not None:
            inputs[index] = inputs[index].clone()
            inputs[index][1] = math.nan
    grad = Random(1, backend.to).feature_map((2, 6, 3, 5), torch.float32)
    options = {"norm": norm, "activation": activation}
    got = grid.run(grid.flat(backend.global_context, **options), inputs, grad)
    want = grid.exact(grid.flat(reference.global_context, **options), inputs, grad)
    assert torch.allclose(got.out.cpu().double(), want.out, rtol=1e-3, atol=1e-4, equal_nan=True)
    for name, ours, theirs in zip(GLOBAL_CONTEXT_INPUTS, got.grads, want.grads, strict=True):
        if ours is not None and name != "mask_bias":  # zero by definition; autograd's is 0 * NaN
            assert torch.allclose(ours.cpu().double(), theirs, rtol=1e-3, atol=1e-3, equal_nan=True), name


@pytest.mark.parametrize("mask_bias", [math.inf, -math.inf, math.nan], ids=str)
def test_every_logit_not_finite(backend, mask_bias):
    """A softmax over nothing but -inf, +inf or NaN is NaN, and so is the whole output."""
    inputs = list(Case((2, 8, 4, 5)).inputs(backend.to))
    inputs[2] = torch.full_like(inputs[2], mask_bias)
    assert grid.flat(reference.global_context)(*inputs).isnan().all()
    assert grid.flat(backend.global_context)(*inputs).isnan().all()


@pytest.mark.parametrize("layout", grid.LAYOUTS)
def test_positions_with_a_logit_of_minus_infinity(backend, layout):
    """A logit that overflows to -inf takes its position out of the attention; what is left is as without the position."""
    inputs = list(Case((2, 8, 3, 5), layout=layout).inputs(backend.to))
    inputs[0] = inputs[0].clone()
    inputs[0][:, 0] = 0
    inputs[0][0, 0, 1, 2] = inputs[0][1, 0, 2, 4] = 10
    inputs[1] = inputs[1].clone()
    inputs[1][0] = -torch.finfo(torch.float32).max
    want = grid.flat(reference.global_context)(*inputs)
    assert want.isfinite().all()
    grid.assert_close(grid.flat(backend.global_context)(*inputs), want.cpu().double(), torch.float32)


def test_large_values_in_float16(backend):
    """Sums beyond 65504 do not overflow: they are taken in float32."""
    random = Random(0, backend.to)
    x = (random.feature_map((2, 8, 16, 16), torch.float16) * 0.1 + 3000).half()
    inputs = (x, *Case((2, 8, 16, 16), torch.float16, pooling="avg").inputs(backend.to)[1:])
    got = grid.flat(backend.global_context)(*inputs)
    want = grid.exact(grid.flat(reference.global_context), inputs).out
    grid.assert_close(got, want, torch.float32)


# ---- the raw operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", grid.combinations(), ids=str)
def test_raw(backend, case):
    """What forward leaves for backward, and that the backward operator gives what autograd gives, and nothing unasked."""
    ops = backend.ops
    inputs = case.inputs(backend.to)
    x, acc = inputs[0], grid.accumulation(inputs[0])
    out, *saved = ops.global_context(*inputs)
    context, attention, hidden, gate, positive = saved
    assert torch.equal(out, ops.global_context_inference(*inputs))
    assert torch.equal(out, grid.flat(backend.global_context)(*inputs))
    doubles = [None if tensor is None else tensor.cpu().double() for tensor in inputs]
    want_context = reference.attention_pool(*doubles[:3])
    grid.assert_close(context, want_context, acc, "context")
    if case.pooling == "att":
        grid.assert_close(attention, reference.attention_map(*doubles[:3]).flatten(1), acc, "attention")
    first_layers = [want_context @ doubles[i].t() + doubles[i + 1] for i in (3, 9) if doubles[i] is not None]
    grid.assert_close(hidden, torch.cat(first_layers, 1), acc, "hidden")
    if case.fusion != "add":
        grid.assert_close(gate, reference.branch(want_context, Branch(*doubles[3:9])).sigmoid(), acc, "gate")
    assert attention.shape == (x.shape[0], 49 if case.pooling == "att" else 0)
    assert gate.shape == (x.shape[0], 0 if case.fusion == "add" else 10)
    assert (positive.shape, positive.dtype) == ((x.shape[0], 0), torch.uint8)
    assert context.dtype == attention.dtype == hidden.dtype == gate.dtype == acc

    grad = Random(1, backend.to).feature_map(case.shape, case.dtype, case.layout)
    want = grid.run(grid.flat(backend.global_context), inputs, grad).grads
    for needs in itertools.product([False, True], repeat=4):
        got = ops.global_context_backward(**schema.backward(grad, inputs, saved, needs))
        each = (needs[0], *[needs[1]] * 2, *[needs[2]] * 6, *[needs[3]] * 6, False)
        for need, ours, theirs in zip(each, got, (*want, None), strict=True):
            if need and theirs is not None:
                assert torch.equal(ours, theirs)
            else:
                assert ours.shape == (0,)
