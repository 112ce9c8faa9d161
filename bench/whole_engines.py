"""A whole model in the engines that people deploy with, beside PyTorch: which is fastest, and what the blocks add in each.

    python bench/whole_engines.py [--images 1,4] [--rounds 11] [--json FILE]

ResNet-50 with 13 Global Context blocks, to infer, NCHW and float32, with as many threads as torch has. In PyTorch, eager and
compiled, the blocks are ours; an engine has the standard operators that the net was exported to (engines.py). Each net stands
beside the same net without blocks.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import frames
import measure
import torch
import whole_models
from engines import ENGINES, make_engines
from torch import Tensor, nn

TOLERANCE = 1e-3


def runtimes(net: nn.Module, x: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """The net, in every runtime that is installed."""
    return {"eager": net, "compiled": torch.compile(net), **make_engines(net, x, tuple(ENGINES))}


def rows_of(without: nn.Module, ours: nn.Module, x: Tensor, rounds: int) -> list[dict[str, Any]]:
    """One row per runtime."""
    pair = {"without": runtimes(without.eval(), x), "ours": runtimes(ours.eval(), x)}
    with torch.no_grad():
        for nets in pair.values():
            want = nets["eager"](x)
            for name, run in nets.items():
                error = float((run(x) - want).norm() / want.norm())
                if not error < TOLERANCE:
                    raise SystemExit(f"the net in {name} differs from the one in eager: relative error {error:.2e}")
    calls = {
        (variant, name): [functools.partial(whole_models.infer, run, x)]
        for variant, nets in pair.items()
        for name, run in nets.items()
    }
    seconds = whole_models.timed(calls, rounds)
    found = []
    for name in pair["ours"]:
        bare, blocks = seconds["without", name], seconds["ours", name]
        added = [a - b for a, b in zip(blocks, bare, strict=True)]
        base = statistics.median(bare)
        found.append({
            "images": x.shape[0], "runtime": name, "milliseconds": statistics.median(blocks) * 1e3,
            "milliseconds_without": base * 1e3, "added": statistics.mean(added) / base,
            "added_interval": 1.96 * statistics.stdev(added) / math.sqrt(rounds) / base,
        })  # fmt: skip
    return found


def table(found: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells, a line per size of batch and runtime."""
    cells = []
    for row in found:
        times = (f"{row[key]:.1f}" for key in ("milliseconds_without", "milliseconds"))
        cells.append([f"{row['images']}", row["runtime"], *times, f"{row['added']:.1%} ± {row['added_interval']:.1%}"])
    return ["images", "runtime", "without blocks, ms", "with blocks, ms", "added"], cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="1,4", help="sizes of batches, separated by commas")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=measure.output_file, default=None, help="where the figures go, too")
    arguments = parser.parse_args()
    measure.keep_memory()
    torch.manual_seed(0)
    variants = whole_models.resnet50()
    found = []
    for images in arguments.images.split(","):
        torch._dynamo.reset()
        x = torch.randn(int(images), 3, whole_models.SIZE, whole_models.SIZE)
        found += rows_of(variants["without"], variants["ours and tail"], x, arguments.rounds)
    print(frames.of_cells("ResNet-50 with 13 blocks, to infer", *table(found)))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": measure.machine(), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
