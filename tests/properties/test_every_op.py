"""What holds for every op of tests/ops, on the grid of shapes, dtypes and layouts.

Value and gradients are those of the float64 reference, no more is computed than was asked for, and what is not finite stays in
its sample.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import grid
import pytest
import torch
from calls import operator_arguments
from grid import Case
from registry import OPS
from torch.utils.flop_counter import FlopCounterMode


def each(cases: Callable[[str], Iterable[Case]]) -> pytest.MarkDecorator:
    """Every op with its cases: those that differ in what makes a difference to the op."""
    return pytest.mark.parametrize(
        ("op", "case"),
        [pytest.param(op, case, id=f"{op}-{case}") for op in OPS for case in grid.distinct(cases(op), **OPS[op].fixed)],
    )


def product(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype] = (torch.float32,), **more) -> list[Case]:
    """Every shape, dtype, layout, pooling and fusion together."""
    choices = itertools.product(shapes, dtypes, grid.LAYOUTS, grid.POOLINGS, grid.FUSIONS)
    return [Case(*choice, **more) for choice in choices]


def check(backend, op: str, case: Case, grad_layout: str | None = None) -> grid.Result:
    found, inputs = OPS[op], OPS[op].inputs_of(case, backend.to)
    grad = found.gradient_of(case, backend.to, layout=grad_layout)
    names = {"vanishing": found.vanishing(case), "sums": case.sums}
    got = grid.check(found.ours, found.truth, inputs, grad, found.inputs, **names)
    assert got.out.shape == (case.shape if found.is_map else case.shape[:2])
    return got


# ---- numbers -----------------------------------------------------------------------------------------------------------------


@pytest.mark.representative
@each(lambda _op: grid.combinations())
def test_combinations(backend, op, case):
    """Every dtype, layout, pooling and fusion; the output and the gradient of x lie in memory as x does."""
    got = check(backend, op, case)
    x = OPS[op].inputs_of(case, backend.to)[0]
    assert not OPS[op].is_map or grid.memory_format_kept(got.out, x)
    assert not backend.has_kernels or grid.memory_format_kept(got.grads[0], x)


@pytest.mark.representative
@each(lambda _op: grid.sizes())
def test_sizes(backend, op, case):
    check(backend, op, case)


@pytest.mark.representative
@each(lambda _op: grid.large())
def test_large(backend, op, case):
    check(backend, op, case)


@each(lambda _op: grid.views())
def test_views(backend, op, case):
    """x as a view, with a contiguous gradient; and the other way round where the gradient is a map."""
    check(backend, op, case, grad_layout="contiguous")
    if OPS[op].is_map:
        check(backend, op, case._replace(layout="contiguous"), grad_layout=case.layout)


def with_float32_parameters(op: str) -> list[Case]:
    dtypes = (torch.bfloat16, torch.float16, torch.float64)
    cases = product([(3, 20, 5, 7)], dtypes, parameter_dtype=torch.float32)
    return [case for case in cases if case.pooling == "att"] if len(OPS[op].inputs) > 1 else []


@each(with_float32_parameters)
def test_float32_parameters(backend, op, case):
    check(backend, op, case)


def small(op: str) -> list[Case]:
    """For finite differences, which take a call for every element."""
    shapes = ((1,), (5,), (2, 3), (2, 1, 3)) if len(OPS[op].inputs) <= 4 else ((2, 3),)
    return product([(2, 3, *spatial) for spatial in shapes], (torch.float64,), hidden=2)


@each(small)
def test_gradcheck(backend, op, case):
    assert grid.gradcheck(OPS[op].ours, OPS[op].inputs_of(case, backend.to))


# ---- what was asked for ------------------------------------------------------------------------------------------------------


def choices(count: int) -> list[tuple[bool, ...]]:
    """Which inputs need a gradient: any of a few; of many each alone, and all but each."""
    if count <= 4:
        return list(itertools.product([False, True], repeat=count))
    return [tuple((i == index) == alone for i in range(count)) for index in range(count) for alone in (True, False)]


@each(lambda _op: [case for case in product([(2, 8, 4, 5)]) if case.pooling == "att"])
def test_needs_input_grad(backend, op, case):
    found, inputs = OPS[op], OPS[op].inputs_of(case, backend.to)
    for needs in choices(len(inputs)):
        grid.check_needs(found.ours, inputs, found.gradient_of(case, backend.to), needs)


@each(lambda _op: grid.combinations())
def test_backward_operators(backend, op, case):
    """They give what autograd gives, and nothing unasked."""
    found, inputs = OPS[op], OPS[op].inputs_of(case, backend.to)
    grad = found.gradient_of(case, backend.to)
    want = grid.run(found.ours, inputs, grad).grads
    for operator in found.operators:
        if not operator.name.endswith("_backward"):
            continue
        ops, first = backend.ops, operator.arguments[0]
        arguments = operator_arguments(ops, operator.name, case, backend.to)
        arguments[first] = grad.to(arguments[first].dtype)
        for wanted in ({}, *({name: name == need for name in operator.needs} for need in operator.needs)):
            results = getattr(ops, operator.name)(**arguments | wanted)
            results = (results,) if torch.is_tensor(results) else results
            for name, ours, theirs in zip(found.inputs, results, want, strict=False):
                need = wanted.get(f"need_{name}", wanted.get(f"need_{name.split('_')[0]}", True))
                if need and theirs is not None:
                    assert torch.equal(ours, theirs), f"the gradient of {name} is not autograd's: {ours} in place of {theirs}"
                else:
                    assert ours.shape == (0,), f"the gradient of {name} was computed, and nobody needed it"


@each(lambda _op: product([(0, 8, 4, 5), (0, 8, 3), (0, 1, 3), (0, 1, 1, 1)]))
def test_empty_batch(backend, op, case):
    """Nothing comes out, and the gradients of the parameters are zero."""
    found, inputs = OPS[op], OPS[op].inputs_of(case, backend.to)
    got = grid.run(found.ours, inputs, found.gradient_of(case, backend.to))
    assert got.out.shape == (case.shape if found.is_map else case.shape[:2])
    assert got.grads[0].shape == case.shape
    for tensor, gradient in zip(inputs[1:], got.grads[1:], strict=True):
        assert tensor is None or torch.equal(gradient, torch.zeros_like(tensor))


# ---- infinities and NaN ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
@each(lambda _op: product([(3, 10, 6, 7)], grid.FLOATING))
def test_a_bad_sample_spoils_no_other(backend, op, case, value):
    """The result has the non-finite values of the reference, and the other samples are as if nothing had happened."""
    found = OPS[op]
    inputs, grad = list(found.inputs_of(case, backend.to)), found.gradient_of(case, backend.to)
    good = grid.run(found.ours, inputs, grad)
    inputs[0] = inputs[0].clone()
    inputs[0][1, 4, 5, 6] = value
    bad, want = grid.run(found.ours, inputs, grad), found.truth(*inputs)
    assert torch.equal(bad.out.isnan(), want.isnan())
    assert torch.equal(bad.out[want.isinf()], want[want.isinf()])
    for sample in (0, 2):
        assert torch.equal(bad.out[sample], good.out[sample])
        assert torch.equal(bad.grads[0][sample], good.grads[0][sample])


# ---- what tools see ----------------------------------------------------------------------------------------------------------


def test_flops(kernels, cpu):
    """What the flop counter of torch counts."""
    case = Case((2, 16, 6, 5))
    for op in OPS.values():
        with FlopCounterMode(display=False) as counter:
            op.ours(*op.inputs_of(case))
        assert counter.get_total_flops() == op.flops(case), op.name
