"""How the time of the block grows with P, C, N and the number of threads: where it is linear, and where it is not.

    python bench/scaling.py [--rounds 11] [--quick] [--json FILE]

The slope is that of log(time) against log(size) between neighbouring sizes: 1 is linear; below, fixed costs still count.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import frames
import measure
import torch
from candidates import make_candidates
from global_context import feature_map, runs

# what varies: sizes, and the shape that a size makes
AXES = {
    "P": ((16, 64, 256, 1024, 4096, 16384, 65536), lambda size: f"2x128x{size}"),
    "C": ((16, 32, 64, 128, 256, 512, 1024, 2048), lambda size: f"4x{size}x256"),
    "N": ((1, 2, 4, 8, 16, 32, 64), lambda size: f"{size}x256x196"),
}


def _time(shape: str, layout: str, rounds: int) -> dict[str, Any]:
    x = feature_map(shape, layout, torch.float32)
    ours = make_candidates(x.shape[1], "both", x.dtype)["ours"]
    calls = {"clone": x.clone, **runs(ours, x.clone().requires_grad_(), torch.randn_like(x))}
    timed = measure.interleaved(calls, rounds)
    return {
        "x": shape,
        "layout": layout,
        "threads": torch.get_num_threads(),
        **{name: measurement.median * 1e6 for name, measurement in timed.items()},
        **{f"{name}_iqr": measurement.iqr * 1e6 for name, measurement in timed.items()},
    }


def rows(rounds: int, quick: bool = False) -> list[dict[str, Any]]:
    """One row per axis and size; times in microseconds."""
    found = []
    for axis, (sizes, shape_of) in AXES.items():
        for layout in ("NCHW",) if quick else ("NCHW", "NHWC"):
            before = None
            for size in sizes[::3] if quick else sizes:
                row = {"axis": axis, "size": size, **_time(shape_of(size), layout, rounds)}
                for direction in ("infer", "train"):
                    row[f"{direction}_slope"] = before and (
                        math.log(row[direction] / before[direction]) / math.log(size / before["size"])
                    )
                found.append(row)
                before = row
    every = torch.get_num_threads()
    for threads in sorted({1, *(2**k for k in range(every.bit_length()) if 2**k <= every), every}):
        torch.set_num_threads(threads)
        found.append({"axis": "threads", "size": threads, **_time("8x256x56x56", "NCHW", rounds)})
    torch.set_num_threads(every)
    return found


def show(found: list[dict[str, Any]]) -> None:
    shown = (
        {key: row[key] for key in ("axis", "size", "x", "layout")}
        | {"infer us": row["infer"], "infer slope": row.get("infer_slope")}
        | {"train us": row["train"], "train slope": row.get("train_slope")}
        | {"infer/clone": row["infer"] / row["clone"]}
        for row in found
    )
    print(frames.text("scaling, float32, both fusions", shown))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, one layout")
    parser.add_argument("--json", type=measure.output_file, help="where the figures go, too")
    arguments = parser.parse_args()
    measure.keep_memory()
    found = rows(arguments.rounds, arguments.quick)
    show(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
