"""The Global Context block in multiples of x.clone(): ours beside what a user would run instead.

    python bench/global_context.py [--shapes 8x256x56x56,...] [--dtype bfloat16] [--fusion add|mul|both] [--rounds 11]
                                   [--threads N] [--candidates "ours compiled,compile,rewrite,onnxruntime,openvino"]

Candidates: ours; eager, the block as every Python implementation writes it; timm's and mmcv's modules, where installed; and by
--candidates torch.compile of ours, of eager ("compile", "compile max-autotune") and of the same maths without a convolution,
which compiles better ("rewrite"), and, to infer in NCHW and float32, the engines of engines.py. Every result is compared with
eager's in float64 before it is timed.

A figure is the median of interleaved rounds, with the interquartile range. The floor is the bytes that a streaming block has to
move: x read twice and the output written once forward, 5 (add alone: 4) times x backward; at the speed of x.clone(), which
reads and writes x once each in the same run. More than 100 % means that a cache held what was read again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from typing import Any

import frames
import measure
import torch
from candidates import FUSIONS, check, make_candidates
from engines import ENGINES, Engine, make_engines
from torch import Tensor, nn

SHAPES = ("16x64x32x32", "8x256x56x56", "8x512x28x28", "8x1024x14x14", "8x2048x7x7", "1x1024x50x84", "1x512x100x168")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = ("NCHW", "NHWC")
COMPILED = ("ours compiled", "compile", "rewrite")


def feature_map(shape: str, layout: str, dtype: torch.dtype) -> Tensor:
    """N x C x spatial sizes; NHWC means channels innermost, in any number of dimensions."""
    samples, channels, *spatial = (int(size) for size in shape.split("x"))
    if layout == "NHWC":
        return torch.randn(samples, *spatial, channels).to(dtype).movedim(-1, 1)
    return torch.randn(samples, channels, *spatial).to(dtype)


def runs(module: nn.Module, leaf: Tensor, grad: Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed: inference, and forward with backward."""

    def train() -> None:
        module(leaf).backward(grad)
        leaf.grad = None

    return {"infer": torch.no_grad()(lambda: module(leaf.detach())), "train": train}


def floor_clones(fusion: str, direction: str) -> float:
    """The fewest bytes of a block that streams, in clones: of 2 bytes moved for each of x."""
    forward, backward = 3, 4 if fusion == "add" else 5
    return (forward if direction == "infer" else forward + backward) / 2


def rows_of(
    shape: str,
    layout: str,
    dtype: str,
    *,
    fusion: str = "both",
    compiled: Iterable[str] = (),
    rounds: int = 11,
    peers: bool = True,
) -> list[dict[str, Any]]:
    """One row per direction and candidate; with peers, the modules of the libraries that are installed are among them."""
    torch._dynamo.reset()
    compiled = tuple(compiled)
    x = feature_map(shape, layout, DTYPES[dtype])
    planar = x.dim() == 4  # the peers take images alone
    modules = make_candidates(x.shape[1], fusion, x.dtype, compiled if planar else (), peers=peers and planar)
    if not planar:
        del modules["eager"]
    else:
        modules |= make_engines(modules["ours"], x, tuple(name for name in compiled if name in ENGINES))
        check(modules, x)
    leaf, grad = x.clone().requires_grad_(), torch.randn_like(x)
    rows = []
    for direction in ("infer", "train"):
        able = {name: module for name, module in modules.items() if direction == "infer" or not isinstance(module, Engine)}
        calls = {"clone": x.clone, **{name: runs(module, leaf, grad)[direction] for name, module in able.items()}}
        timed = measure.interleaved(calls, rounds)
        clone = timed["clone"].median
        for name, measurement in timed.items():
            clones = measurement.median / clone
            rows.append({
                "x": shape, "layout": layout, "dtype": dtype, "fusion": fusion, "direction": direction, "candidate": name,
                "microseconds": measurement.median * 1e6, "iqr_microseconds": measurement.iqr * 1e6, "clones": clones,
                "of_floor": None if name == "clone" else floor_clones(fusion, direction) / clones,
            })  # fmt: skip
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per direction and candidate, the geometric mean over the rows: in clones, and how many times slower than ours."""
    result: dict[str, dict[str, float]] = {}
    for direction in ("infer", "train"):
        here = [row for row in rows if row["direction"] == direction]
        ours = {(row["x"], row["layout"], row["dtype"]): row["clones"] for row in here if row["candidate"] == "ours"}
        for candidate in dict.fromkeys(row["candidate"] for row in here if row["candidate"] != "clone"):
            own = [row for row in here if row["candidate"] == candidate]
            logs = [math.log(row["clones"]) for row in own]
            ratios = [math.log(row["clones"] / ours[row["x"], row["layout"], row["dtype"]]) for row in own]
            result[f"{direction} {candidate}"] = {
                "clones": math.exp(sum(logs) / len(logs)),
                "to_ours": math.exp(sum(ratios) / len(ratios)),
                "rows": len(own),
            }
    return result


def spread(row: dict[str, Any]) -> float:
    """The interquartile range of a row, in clones."""
    return row["clones"] * row["iqr_microseconds"] / row["microseconds"]


def cell(row: dict[str, Any]) -> str:
    """What a page says of a row: the clones and their spread."""
    return f"{row['clones']:.1f} ± {spread(row):.1f}"


def show(rows: list[dict[str, Any]]) -> None:
    cells = (
        {key: row[key] for key in ("x", "layout", "dtype", "direction", "candidate", "clones")}
        | {"+-": spread(row), "us": row["microseconds"]}
        for row in rows
    )
    print(frames.text("the block, in multiples of x.clone()", cells))
    shown = (
        {"candidate": name, "clones": figures["clones"], "times ours": figures["to_ours"], "rows": figures["rows"]}
        for name, figures in summary(rows).items()
    )
    print(frames.text("geometric means", shown))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="NxCxHxW, separated by commas")
    parser.add_argument("--fusion", choices=FUSIONS, default="both")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--candidates", default=",".join(COMPILED), help="compiled ones, separated by commas; or nothing")
    arguments = parser.parse_args()
    measure.keep_memory()
    torch.set_num_threads(arguments.threads)
    torch._dynamo.config.recompile_limit = 256
    torch.manual_seed(0)
    rows = []
    for shape in arguments.shapes.split(","):
        for layout in LAYOUTS:
            rows += rows_of(
                shape,
                layout,
                arguments.dtype,
                fusion=arguments.fusion,
                compiled=filter(None, arguments.candidates.split(",")),
                rounds=arguments.rounds,
            )
    show(rows)


if __name__ == "__main__":
    main()
