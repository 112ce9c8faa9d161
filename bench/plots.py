"""Draws results of bench/run.py: speed-up per shape, roofline, scaling.

python bench/plots.py results.json [folder]
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "ours": "#1b6ca8",
    "ours compiled": "#7fb3d5",
    "eager": "#c0392b",
    "compile": "#e59866",
    "compile max-autotune": "#f5b041",
    "rewrite": "#7d8c93",
    "timm": "#8e44ad",
    "mmcv": "#145a32",
}


def _block_rows(results: dict[str, Any], direction: str, dtype: str = "float32") -> list[dict[str, Any]]:
    return [row for row in results["block"] if row["direction"] == direction and row["dtype"] == dtype]


def speedup(results: dict[str, Any], file: Path) -> None:
    """How many times faster ours is than each of the others, per shape; longer is better."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 11), sharey=True, layout="constrained")
    for axis, direction in zip(axes, ("infer", "train"), strict=True):
        rows = _block_rows(results, direction)
        places = list(dict.fromkeys((row["x"], row["layout"]) for row in rows if row["candidate"] not in ("ours", "clone")))
        ours = {(row["x"], row["layout"]): row["microseconds"] for row in rows if row["candidate"] == "ours"}
        others = [c for c in dict.fromkeys(row["candidate"] for row in rows) if c not in ("ours", "clone")]
        height = 0.8 / max(1, len(others))
        for index, other in enumerate(others):
            own = {(row["x"], row["layout"]): row["microseconds"] for row in rows if row["candidate"] == other}
            values = [own[place] / ours[place] if place in own else math.nan for place in places]
            axis.barh(np.arange(len(places)) + index * height, values, height, label=other, color=COLOURS[other])
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_yticks(np.arange(len(places)) + 0.4 - height / 2, [" ".join(place) for place in places], fontsize=8)
        axis.set_xlabel("times slower than ours")
        axis.set_title({"infer": "inference", "train": "forward and backward"}[direction])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=8)
    figure.suptitle(
        f"Global Context block, float32, {results['machine']['processor']}, {results['machine']['threads']} threads"
    )
    figure.savefig(file, dpi=110)
    plt.close(figure)


def roofline(results: dict[str, Any], file: Path) -> None:
    """Time against bytes of x, beside the byte floor of a streaming block at the speed of the copy in the same run."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for axis, direction in zip(axes, ("infer", "train"), strict=True):
        rows = _block_rows(results, direction)
        size = {row["x"]: 4 * math.prod(int(s) for s in row["x"].split("x")) / 1e6 for row in rows}
        for candidate in ("clone", "ours", "rewrite", "eager"):
            own = [row for row in rows if row["candidate"] == candidate]
            axis.scatter(
                [size[row["x"]] for row in own], [row["microseconds"] for row in own], s=22, label=candidate,
                color=COLOURS.get(candidate, "#bbbbbb"), marker="x" if candidate == "clone" else "o",
            )  # fmt: skip
        floors = sorted((size[row["x"]], row["microseconds"] * row["of_floor"]) for row in rows if row["candidate"] == "ours")
        axis.plot(*zip(*floors, strict=True), color="black", linewidth=0.8, linestyle="--", label="byte floor, streaming")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("MB of x")
        axis.set_ylabel("microseconds")
        axis.set_title({"infer": "inference", "train": "forward and backward"}[direction])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def scaling(results: dict[str, Any], file: Path) -> None:
    """Ours and the copy against P, C, N and the number of threads; the dotted line is linear."""
    names = list(dict.fromkeys(row["axis"] for row in results["scaling"]))
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 4), layout="constrained")
    for axis, name in zip(np.atleast_1d(axes), names, strict=True):
        rows = [row for row in results["scaling"] if row["axis"] == name and row["layout"] == "NCHW"]
        sizes = [row["size"] for row in rows]
        for key, label, colour in (
            ("train", "forward and backward", "#c0392b"), ("infer", "inference", "#1b6ca8"), ("clone", "clone", "#999999"),
        ):  # fmt: skip
            axis.errorbar(
                sizes, [row[key] for row in rows], [row[f"{key}_iqr"] for row in rows], marker="o", markersize=4,
                label=label, color=colour, capsize=2,
            )  # fmt: skip
        last, exponent = rows[-1], -1 if name == "threads" else 1
        line = [last["infer"] * (size / last["size"]) ** exponent for size in sizes]
        axis.plot(sizes, line, color="black", linestyle=":", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel({"threads": "threads (8x256x56x56)"}.get(name, f"{name} ({rows[0]['x']} to {last['x']})"))
        axis.spines[["top", "right"]].set_visible(False)
    np.atleast_1d(axes)[0].set_ylabel("microseconds")
    np.atleast_1d(axes)[0].legend(frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """The pictures of the sections that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for section, name, picture in (
        ("block", "speedup", speedup),
        ("block", "roofline", roofline),
        ("scaling", "scaling", scaling),
    ):
        if results.get(section):
            drawn.append(folder / f"{name}.png")
            picture(results, drawn[-1])
    return drawn


if __name__ == "__main__":
    source = Path(sys.argv[1])
    print(*draw(json.loads(source.read_text()), Path(sys.argv[2]) if len(sys.argv) > 2 else source.parent))
