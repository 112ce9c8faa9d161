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
BEGIN, END = "<!-- measured: written by bench/readme_table.py -->", "<!-- end of measured -->"
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


def replaced(readme: str, results: dict[str, Any]) -> str:
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text(results)}\n\n{END}{rest.split(END)[1]}"


def main() -> int:
    readme, wanted = README.read_text(), replaced(README.read_text(), json.loads(RESULTS.read_text()))
    if "--check" in sys.argv:
        if readme != wanted:
            print("README.md is not what bench/results/cpu.json says: run python bench/readme_table.py")
        return int(readme != wanted)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
