"""Draws results of bench/run.py, and beside them those of a GPU: what is gained, speed-up, roofline, scaling.

python bench/plots.py results.json [folder [gpu_check.json]]
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from global_context import SHAPES, floor_clones, summary

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Distinct in shape as well as in colour, for those who do not see the colours.
STYLES = {
    "ours": ("#1b6ca8", "o"),
    "ours compiled": ("#7fb3d5", "h"),
    "rewrite": ("#555555", "s"),
    "compile max-autotune": ("#f5b041", "v"),
    "compile": ("#e67e22", "^"),
    "eager": ("#c0392b", "D"),
}
LABELS = {
    "ours": "gcnet_ext",
    "ours compiled": "gcnet_ext in torch.compile",
    "rewrite": "rewritten, torch.compile",
    "compile max-autotune": "torch.compile, max-autotune",
    "compile": "torch.compile",
    "eager": "eager PyTorch",
}
DIRECTIONS = {"infer": "inference", "train": "training step"}


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def block_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """All that was measured in float32."""
    return [row for row in results["block"] if row["dtype"] == "float32"]


def shown_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Of these the shapes that every candidate was measured on."""
    return [row for row in block_rows(results) if row["x"] in SHAPES]


def gpu_ratios(gpu_results: dict[str, Any], direction: str) -> list[float]:
    """Per row of the GPU's report how many times as long as ours the compiled rewrite takes, x not in the cache."""
    rows = (row["candidates"] for row in gpu_results["timings"]["rows"])
    found = [(row["ours"], row.get("compiled rewrite")) for row in rows if row.get("ours")]
    return [other[direction]["graph_cold"] / ours[direction]["graph_cold"] for ours, other in found if other]


def _machine(results: dict[str, Any]) -> str:
    machine = results["machine"]
    processor = machine["processor"].replace("(R)", "").replace(" Processor", "")
    return f"{machine['threads']} threads of an {processor} CPU ({machine['capability']})"


def _bare(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)


def gain(results: dict[str, Any], gpu_results: dict[str, Any] | None = None) -> Figure:
    """The times of the others as multiples of ours, geometric means; what was not measured is said."""
    means = summary(block_rows(results))
    candidates = ("eager", "compile", "rewrite", "ours")
    groups = {
        f"CPU, {DIRECTIONS[way]}": {name: means[f"{way} {name}"]["to_ours"] for name in candidates if f"{way} {name}" in means}
        for way in DIRECTIONS
    }
    if gpu_results is not None:
        gpu = gpu_results["environment"]["gpus"][0]["name"].removeprefix("NVIDIA ")
        for way in ("forward", "backward"):
            groups[f"{gpu}, {way}"] = {"rewrite": geometric_mean(gpu_ratios(gpu_results, way)), "ours": 1.0}
    figure, axes = plt.subplots(
        1, len(groups), figsize=(2.7 * len(groups), 2.3), sharey=True, sharex=True, layout="constrained"
    )
    for axis, (title, values) in zip(axes, groups.items(), strict=True):
        for place, name in enumerate(candidates):
            if name in values:
                axis.barh(place, values[name], 0.7, color=STYLES[name][0])
                axis.text(values[name] + 0.08, place, f"{values[name]:.1f}x", va="center", fontsize=9)
            else:
                axis.text(0.08, place, "not measured", va="center", fontsize=8, color="#777777")
        axis.set_title(title, fontsize=10)
        axis.set_yticks(range(len(candidates)), [LABELS[name] for name in candidates])
        axis.tick_params(left=False)
        axis.set_xticks([])
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    axes[0].set_xlim(0, 1.25 * max(max(values.values()) for values in groups.values()))
    axes[0].invert_yaxis()
    figure.supxlabel(
        "time of one Global Context block, as a multiple of gcnet_ext's (geometric mean; shorter is faster)", fontsize=9
    )
    return figure


def speedup(results: dict[str, Any]) -> Figure:
    """How many times as long as ours each of the others takes: one row per shape, and the geometric mean at the bottom."""
    rows = shown_rows(results)
    means = summary(rows)
    places = [
        (x, layout) for layout in ("NCHW", "NHWC") for x in SHAPES if any((r["x"], r["layout"]) == (x, layout) for r in rows)
    ]
    figure, axes = plt.subplots(1, 2, figsize=(11, 6), sharey=True, layout="constrained")
    for axis, (way, title) in zip(axes, DIRECTIONS.items(), strict=True):
        time = {(r["x"], r["layout"], r["candidate"]): r["microseconds"] for r in rows if r["direction"] == way}
        for name in reversed(STYLES):
            found = [
                (i, time[(*place, name)] / time[(*place, "ours")]) for i, place in enumerate(places) if (*place, name) in time
            ]
            if f"{way} {name}" in means:
                found.append((len(places) + 0.5, means[f"{way} {name}"]["to_ours"]))
            colour, marker = STYLES[name]
            axis.plot([v for _, v in found], [y for y, _ in found], marker, color=colour, label=LABELS[name], markersize=6)
        axis.axvline(1, color=STYLES["ours"][0], linewidth=0.8)
        axis.axhline(len(places) - 0.25, color="#999999", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xticks([0.7, 1, 1.5, 2, 3, 4, 6, 8], ["0.7", "1", "1.5", "2", "3", "4", "6", "8"])
        axis.set_xticks([], minor=True)
        axis.set_xlabel("time, as a multiple of gcnet_ext's")
        axis.set_yticks([*range(len(places)), len(places) + 0.5], [*map(" ".join, places), "geometric mean"])
        axis.set_title(title)
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        _bare(axis)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
    figure.suptitle(f"One Global Context block, float32, {_machine(results)}")
    return figure


def roofline(results: dict[str, Any]) -> Figure:
    """Per shape the rate at which the least bytes of a streaming block are moved, beside the rate of a copy of the same x."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for axis, (way, title) in zip(axes, DIRECTIONS.items(), strict=True):
        rows = [row for row in shown_rows(results) if row["direction"] == way]
        for layout, offset in (("NCHW", -0.12), ("NHWC", 0.12)):
            places = [x for x in SHAPES if any(r["x"] == x for r in rows)]
            rates: dict[str, list[float]] = {"clone": [], "ours": [], "eager": []}
            for x in places:
                size = 4 * math.prod(map(int, x.split("x")))
                found = {r["candidate"]: r["microseconds"] for r in rows if (r["x"], r["layout"]) == (x, layout)}
                for name, list_ in rates.items():
                    least = 2 if name == "clone" else 2 * floor_clones("both", way)
                    list_.append(least * size / found[name] / 1e3)
            at = np.arange(len(places)) + offset
            for name, label in (("ours", "gcnet_ext"), ("eager", "eager PyTorch")):
                marker = {"NCHW": "o", "NHWC": "s"}[layout]
                axis.plot(at, rates[name], marker, color=STYLES[name][0], label=f"{label}, {layout}", markersize=5)
            axis.hlines(
                rates["clone"], at - 0.1, at + 0.1, color="black", label="attainable: a copy of x" if offset < 0 else None
            )
            axis.vlines(at, rates["ours"], rates["clone"], color=STYLES["ours"][0], linewidth=0.8)
        axis.set_xticks(range(len(places)), places, rotation=30, ha="right")
        axis.set_ylim(0)
        axis.set_title(title)
        _bare(axis)
    axes[0].set_ylabel("GB/s of the bytes that a streaming block moves")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=5)
    figure.suptitle(
        f"Achieved against attainable, float32, {_machine(results)}\n"
        "(above the attainable rate: what is read a second time comes from a cache)",
        fontsize=11,
    )
    return figure


def scaling(results: dict[str, Any]) -> Figure:
    """Time per element of x against P, C and N: where a line is level, time grows as x does."""
    names = [name for name in dict.fromkeys(row["axis"] for row in results["scaling"]) if name != "threads"]
    words = {"P": "positions P", "C": "channels C", "N": "samples N"}
    figure, axes = plt.subplots(1, len(names), figsize=(11, 4), sharey=True, layout="constrained")
    for axis, name in zip(np.atleast_1d(axes), names, strict=True):
        rows = [row for row in results["scaling"] if row["axis"] == name and row["layout"] == "NCHW"]
        elements = np.array([math.prod(map(int, row["x"].split("x"))) for row in rows])
        for key, label, colour, marker in (
            ("train", "training step", "#c0392b", "D"),
            ("infer", "inference", "#1b6ca8", "o"),
            ("clone", "a copy of x", "#777777", "x"),
        ):
            axis.errorbar(
                [row["size"] for row in rows], 1e3 * np.array([row[key] for row in rows]) / elements,
                1e3 * np.array([row[f"{key}_iqr"] for row in rows]) / elements,
                marker=marker, markersize=4, label=label, color=colour, capsize=2,
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel(f"{words[name]} (x from {rows[0]['x']} to {rows[-1]['x']})", fontsize=9)
        _bare(axis)
    np.atleast_1d(axes)[0].set_ylabel("nanoseconds per element of x")
    np.atleast_1d(axes)[0].legend(frameon=False)
    figure.suptitle(f"How time grows: one Global Context block, NCHW, float32, {_machine(results)}", fontsize=11)
    return figure


def source_of(results: dict[str, Any], gpu_results: dict[str, Any] | None = None) -> str:
    """What a picture says of the results that it was drawn from, for a test to compare."""
    return hashlib.sha256(json.dumps([results, gpu_results], sort_keys=True).encode()).hexdigest()


def draw(results: dict[str, Any], folder: Path, gpu_results: dict[str, Any] | None = None) -> list[Path]:
    """The pictures of the sections that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {}
    if results.get("block"):
        figures = {"gain": gain(results, gpu_results), "speedup": speedup(results), "roofline": roofline(results)}
    if results.get("scaling"):
        figures["scaling"] = scaling(results)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Description": source_of(results, gpu_results)})
        plt.close(figure)
    return [folder / f"{name}.png" for name in figures]


if __name__ == "__main__":
    source = Path(sys.argv[1])
    gpu = json.loads(Path(sys.argv[3]).read_text()) if len(sys.argv) > 3 else None
    print(*draw(json.loads(source.read_text()), Path(sys.argv[2]) if len(sys.argv) > 2 else source.parent, gpu))
