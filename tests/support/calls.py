"""Calls of raw operators with random tensors of a case, and with what forward leaves for backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from entry import GOOD, OPTIONS, Arguments, Sizes, To
from grid import Case, Random, accumulation
from registry import OP_OF, OPERATORS


def operator_arguments(ops: Any, name: str, case: Case, to: To = lambda tensor: tensor) -> Arguments:
    """All of them, in their order; every gradient is wanted but that of a residual, which there is not."""
    op, operator = OP_OF[name], OPERATORS[name]
    inputs = dict(zip(op.inputs, op.draw(case, to, 0), strict=True))
    available = {**inputs, **OPTIONS, "eps": GOOD["eps"], "residual": None, "valid": None, "need_residual": False}
    norm = Random(2, to)
    available |= {name: norm.normal(case.shape[1], dtype=case.dtype) for name in ("x_scale", "x_shift")}
    if "grad" in operator.arguments or operator.saved:
        forward = getattr(ops, op.name)
        results = forward(**inputs)
        results = (results,) if torch.is_tensor(results) else results
        names = [result.name for result in forward.op._schema.returns]
        lost = [name for name in operator.saved if not name.startswith("grad_") and name not in names]
        assert not lost, f"{name} takes {lost}: results of {op.name} must have these names in its schema, which has {names}"
        samples, channels, *spatial = case.shape
        branches = 2 if case.fusion == "both" else 1
        sizes = Sizes(
            samples, channels, math.prod(spatial), case.pooling == "att", branches * case.hidden, case.fusion != "add"
        )
        random, acc = Random(1, to), accumulation(inputs["x"])
        drawn = {name: random.normal(*of(sizes), dtype=acc, std=op.gradient_std(case)) for name, of in operator.saved.items()}
        available |= drawn | dict(zip(names, results, strict=True)) | {"grad": op.gradient_of(case, to)}
    return {name: available.get(name, True) for name in operator.arguments}
