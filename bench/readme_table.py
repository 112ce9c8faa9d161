"""Writes the measured tables of README.md from a committed result, so that the two cannot drift apart.

python bench/readme_table.py            writes them
python bench/readme_table.py --check    ends with 1 if README.md says something else
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import global_context

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "bench" / "results" / "cpu.json"
GPU_RESULTS = ROOT / "bench" / "results" / "h200" / "gpu_check.json"
BEGIN, END = "<!-- measured: written by bench/readme_table.py -->", "<!-- end of measured -->"
GPU_BEGIN, GPU_END = "<!-- measured on a GPU: written by bench/readme_table.py -->", "<!-- end of measured on a GPU -->"
CANDIDATES = ("ours", "eager", "compile", "rewrite")


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(lines)


def block(results: dict[str, Any]) -> str:
    rows = [row for row in results["block"] if row["x"] in global_context.SHAPES and row["dtype"] == "float32"]
    figures = {(row["x"], row["layout"], row["direction"], row["candidate"]): row for row in rows}
    columns = [(direction, candidate) for direction in ("infer", "train") for candidate in CANDIDATES]
    header = ["x", *(f"{direction}: {candidate}" for direction, candidate in columns)]
    cells = []
    for x, layout in dict.fromkeys((row["x"], row["layout"]) for row in rows):
        found = [figures[x, layout, direction, candidate] for direction, candidate in columns]
        spread = [f"{row['clones']:.1f} ± {row['clones'] * row['iqr_microseconds'] / row['microseconds']:.1f}" for row in found]
        cells.append([f"{x} {layout}", *spread])
    means = global_context.summary(rows)
    cells.append(
        ["**geometric mean**", *(f"**{means[f'{direction} {candidate}']['clones']:.2f}**" for direction, candidate in columns)]
    )
    return _table(header, cells)


def memory(results: dict[str, Any]) -> str:
    rows = [row for row in results["memory"] if row["layout"] == "NCHW"]
    cells = [
        [row["x"], row["candidate"], *(f"{row[key] / row['bytes_of_x']:.2f}" for key in ("infer_peak", "train_peak", "saved"))]
        for row in rows
        if row["candidate"] in CANDIDATES
    ]
    return _table(["x", "block", "infer: peak", "train: peak", "saved for backward"], cells)


def models(results: dict[str, Any]) -> str:
    figures = {(row["model"], row["direction"], row["variant"]): row for row in results["models"]}
    cells = []
    for model, direction in dict.fromkeys((row["model"], row["direction"]) for row in results["models"]):
        without, eager, ours = (figures[model, direction, variant] for variant in ("without", "eager", "ours"))
        times = [f"{row['milliseconds']:.0f} ± {row['iqr_milliseconds']:.0f}" for row in (without, eager, ours)]
        cells.append([model, direction, *times, f"{eager['share']:.1%}", f"{ours['share']:.1%}"])
    return _table(["model", "", "without, ms", "eager, ms", "ours, ms", "share: eager", "share: ours"], cells)


def text(results: dict[str, Any]) -> str:
    """The part of the README between the two marks."""
    machine = results["machine"]
    images = next((row for row in results.get("models", ())), None)
    parts = [
        f"On {machine['threads']} threads of {machine['processor']} ({machine['capability']}, second-level cache "
        f"{machine['second_level_cache']}), torch {machine['torch']}, float32, {machine['date']}; by `make bench PEERS=1`, "
        f"committed as [bench/results/cpu.json](bench/results/cpu.json). Medians of {results['rounds']} interleaved rounds "
        "± the interquartile range, in multiples of `x.clone()`; both fusions, ratio 1/16. NHWC is channels_last; `compile` is "
        "`torch.compile` of eager, `rewrite` that of the same maths without a convolution, which compiles better.",
        block(results),
        "Memory beside x and the weights, in multiples of x:",
        memory(results),
    ]
    if images is not None:
        parts += [
            f"Whole models, {images['images']} images of {images['size']}x{images['size']}; the share is what the blocks add:",
            models(results),
        ]
    return "\n\n".join(parts)


def gpu_text(results: dict[str, Any]) -> str:
    """The same of a GPU: multiples of a device copy of x, in replayed CUDA graphs, with x not in the cache."""
    found, way = results["environment"], "graph_cold"
    cells = []
    for row in results["timings"]["rows"]:
        ours, rewrite = (row["candidates"].get(name) for name in ("ours", "compiled rewrite"))
        if not rewrite:
            continue
        figures = [each[direction][way] / row["copy"][way] for direction in ("forward", "backward") for each in (ours, rewrite)]
        cells.append([row["row"], f"{row['copy'][way]:.1f}", *(f"{figure:.2f}" for figure in figures)])
    directions = ("forward: ours", "forward: rewrite", "backward: ours", "backward: rewrite")
    return "\n\n".join(
        [
            f"On one {found['gpus'][0]['name']}, torch {found['torch']}, commit {found['commit']}; by `make gpu-check`, "
            "committed as [bench/results/h200](bench/results/h200/gpu_check.txt). Medians, in multiples of a device copy of x; "
            "replayed CUDA graphs, the second-level cache overwritten before every call; both fusions, ratio 1/16; `rewrite` "
            "as above.",
            _table(["x", "copy, us", *directions], cells),
        ]
    )


def _between(readme: str, begin: str, end: str, content: str) -> str:
    before, rest = readme.split(begin)
    return f"{before}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"


def replaced(readme: str, results: dict[str, Any], gpu_results: dict[str, Any]) -> str:
    return _between(_between(readme, BEGIN, END, text(results)), GPU_BEGIN, GPU_END, gpu_text(gpu_results))


def main() -> int:
    readme = README.read_text()
    wanted = replaced(readme, json.loads(RESULTS.read_text()), json.loads(GPU_RESULTS.read_text()))
    if "--check" in sys.argv:
        if readme != wanted:
            print("README.md is not what bench/results says: run python bench/readme_table.py")
        return int(readme != wanted)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
