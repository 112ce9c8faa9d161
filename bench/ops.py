"""Ops beside their reference, which is eager PyTorch, in multiples of x.clone(): forward, and with backward, in both layouts.

    python bench/ops.py [OP ...] [--shapes 8x256x56x56,...] [--dtype float32] [--rounds 11] [--threads N]

Every op of tests/ops, or those that are named; their entries there say what they are called with. A result that is not that of
the reference is not timed. A figure is the median of interleaved rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import frames
import measure
import torch
from global_context import DTYPES

sys.path.append(str(measure.ROOT / "tests" / "support"))
import grid
from entry import Op
from registry import OPS


def runs(op: Op, function: Callable[..., torch.Tensor], case: grid.Case) -> dict[str, measure.Call]:
    """What is timed: inference, and forward with backward to every input."""
    inputs, grad = op.inputs_of(case), op.gradient_of(case)
    return {"infer": torch.no_grad()(lambda: function(*inputs)), "train": lambda: grid.run(function, inputs, grad)}


def rows_of(op: Op, case: grid.Case, rounds: int) -> list[dict[str, Any]]:
    """One row per direction and candidate.

    Raises:
        SystemExit: ours is wrong.
    """
    inputs = op.inputs_of(case)
    candidates = {"ours": op.ours, "eager": op.truth}
    ours, want = op.ours(*inputs), op.truth(*inputs)
    if not torch.allclose(ours, want, rtol=8 * torch.finfo(case.dtype).eps, atol=1e-4):
        sys.exit(f"{op.name} of {case} is wrong: it is off by up to {float((ours - want).abs().max()):.1e}")
    rows = []
    for direction in ("infer", "train"):
        calls = {name: runs(op, function, case)[direction] for name, function in candidates.items()}
        timed = measure.interleaved({"clone": inputs[0].clone, **calls}, rounds)
        for name in candidates:
            found = {"op": op.name, "case": str(case), "direction": direction, "candidate": name}
            rows.append({**found, "clones": timed[name].median / timed["clone"].median})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}")
    parser.add_argument("--shapes", default="8x256x56x56", help="NxCxHxW, separated by commas")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.ops if name not in OPS]:
        parser.error(f"OP must be one of {', '.join(OPS)}, got {', '.join(unknown)}")
    measure.keep_memory()
    torch.set_num_threads(arguments.threads)
    for name in arguments.ops or OPS:
        for shape in arguments.shapes.split(","):
            for layout in grid.LAYOUTS:
                sizes = tuple(int(size) for size in shape.split("x"))
                case = grid.Case(sizes, DTYPES[arguments.dtype], layout, hidden=max(1, sizes[1] // 16))
                rows = rows_of(OPS[name], case, arguments.rounds)
                ours = {row["direction"]: row["clones"] for row in rows if row["candidate"] == "ours"}
                shown = (
                    {key: row[key] for key in ("direction", "candidate", "clones")}
                    | {"times ours": row["clones"] / ours[row["direction"]]}
                    for row in rows
                )
                print(frames.text(f"{name} {shape} {layout}", shown))


if __name__ == "__main__":
    main()
