"""Peak and saved-for-backward memory of every candidate, as torch's allocator saw it, in multiples of x.

python bench/memory.py [--shapes 8x256x56x56,...]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import frames
import measure
import torch
from candidates import make_candidates
from global_context import COMPILED, LAYOUTS, feature_map

SHAPES = ("8x256x56x56", "8x1024x14x14", "1x512x100x168")


def rows_of(shape: str, layout: str, compiled: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Bytes beside x and the weights: at most during inference, at most during a training step, kept for backward."""
    torch._dynamo.reset()
    x = feature_map(shape, layout, torch.float32)
    grad, leaf = torch.randn_like(x), x.clone().requires_grad_()
    found = []
    for name, module in make_candidates(x.shape[1], "both", x.dtype, tuple(compiled), peers=True).items():
        given = [leaf, *module.parameters()]

        def step(module=module, given=given) -> None:
            torch.autograd.grad(module(leaf), given, grad)

        infer = torch.no_grad()(lambda module=module: module(x))
        for _ in range(2):  # compiles; and what is allocated once
            infer()
            step()
        found.append({
            "x": shape, "layout": layout, "candidate": name, "bytes_of_x": x.nbytes,
            "infer_peak": measure.peak_memory(infer)[0],
            "train_peak": measure.peak_memory(step)[0],
            "saved": measure.saved_memory(lambda module=module: module(leaf), given),
        })  # fmt: skip
    return found


def show(found: list[dict[str, Any]]) -> None:
    figures = {"infer peak": "infer_peak", "train peak": "train_peak", "saved for backward": "saved"}
    shown = (
        {key: row[key] for key in ("x", "layout", "candidate")}
        | {name: row[key] / row["bytes_of_x"] for name, key in figures.items()}
        for row in found
    )
    print(frames.text("memory in multiples of x", shown, decimals=3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    arguments = parser.parse_args()
    show([row for shape in arguments.shapes.split(",") for layout in LAYOUTS for row in rows_of(shape, layout, COMPILED)])


if __name__ == "__main__":
    main()
