"""Writes the measured figures of README.md and docs/benchmarks.md from committed results, so that they cannot drift apart.

python bench/tables.py            writes them
python bench/tables.py --check    ends with 1 if a page says something else
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import capabilities
import frames
import global_context
import plots
import whole_engines
from engines import ENGINES

ROOT = Path(__file__).resolve().parent.parent
README, BENCHMARKS, RESULTS = ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "bench" / "results" / "cpu.json"
GPU_RESULTS = ROOT / "bench" / "results" / "h200" / "gpu_check.json"
WHOLE_MODELS = ROOT / "bench" / "results" / "whole_models.json"
WHOLE_ENGINES = ROOT / "bench" / "results" / "whole_engines.json"
BEGIN, END = "<!-- measured: written by bench/tables.py -->", "<!-- end of measured -->"
GPU_BEGIN, GPU_END = "<!-- measured on a GPU: written by bench/tables.py -->", "<!-- end of measured on a GPU -->"
CANDIDATES = ("ours", "eager", "compile", "rewrite")


def block(results: dict[str, Any]) -> str:
    rows = [row for row in results["block"] if row["x"] in global_context.SHAPES and row["dtype"] == "float32"]
    figures = {(row["x"], row["layout"], row["direction"], row["candidate"]): row for row in rows}
    engines = [name for name in ENGINES if any(key[3] == name for key in figures)]
    columns = [*(("infer", name) for name in (*CANDIDATES, *engines)), *(("train", name) for name in CANDIDATES)]
    header = ["x", *(f"{direction}: {candidate}" for direction, candidate in columns)]
    cells = []
    for x, layout in dict.fromkeys((row["x"], row["layout"]) for row in rows):
        found = [figures.get((x, layout, *column)) for column in columns]
        cells.append([f"{x} {layout}", *("" if row is None else global_context.cell(row) for row in found)])
    means = global_context.summary(rows)
    cells.append(
        ["**geometric mean**", *(f"**{means[f'{direction} {candidate}']['clones']:.2f}**" for direction, candidate in columns)]
    )
    return frames.markdown(header, cells)


def memory(results: dict[str, Any]) -> str:
    rows = [row for row in results["memory"] if row["layout"] == "NCHW"]
    cells = [
        [row["x"], row["candidate"], *(f"{row[key] / row['bytes_of_x']:.2f}" for key in ("infer_peak", "train_peak", "saved"))]
        for row in rows
        if row["candidate"] in CANDIDATES
    ]
    return frames.markdown(["x", "block", "infer: peak", "train: peak", "saved for backward"], cells)


def models(whole: dict[str, Any]) -> str:
    """What the blocks add to whole nets, of the net without them; one line per net, layout, direction and way to run it."""
    keys = ("model", "images", "layout", "direction", "compiled")
    figures = {(*(row[key] for key in keys), row["variant"]): row for row in whole["rows"]}

    def share(row: dict[str, Any]) -> str:
        nets = f"{row['whole']:.1%} ± {row['whole_interval']:.1%}"
        return f"({nets})" if row["share"] is None else f"**{row['share']:.1%}** ({nets})"

    cells = []
    for found in dict.fromkeys(key[:-1] for key in figures):
        model, images, layout, direction, compiled = found
        variants = (figures[(*found, variant)] for variant in ("peer", "ours", "ours and tail"))
        way = f"{direction}{', compiled' if compiled else ''}"
        cells.append([model, f"{images}, {layout}", way, *map(share, variants)])
    return frames.markdown(["model", "images", "", "the peer's block", "ours", "ours, with the addition and the ReLU"], cells)


def text(results: dict[str, Any], whole: dict[str, Any], in_engines: dict[str, Any]) -> str:
    """The part of docs/benchmarks.md between the first two marks."""
    machine, other = results["machine"], whole["machine"]
    parts = [
        f"On {machine['threads']} threads of {machine['processor']} ({machine['capability']}, second-level cache "
        f"{machine['second_level_cache']}), torch {machine['torch']}, float32, {machine['date']}; by `make bench PEERS=1`, "
        f"committed as [cpu.json](../bench/results/cpu.json). Medians of {results['rounds']} interleaved rounds ± the "
        "interquartile range, in multiples of `x.clone()`; both fusions, ratio 1/16. NHWC is channels_last.",
        block(results),
        "The same with the vector instructions of other processors, which `GCNET_EXT_CPU_CAPABILITY` chooses (`default`: those "
        "of every 64-bit x86 processor):",
        frames.markdown(*capabilities.table(results["capabilities"])),
        "Memory that is allocated beside x and the weights, in multiples of x:",
        memory(results),
    ]
    parts += [
        f"Whole models, images of 224x224, on {other['threads']} threads of {other['processor']}, torch {other['torch']}, "
        f"{other['date']}; by `python bench/whole_models.py`, committed as "
        "[whole_models.json](../bench/results/whole_models.json). What the blocks add, over the time of the net without them. "
        "A tail is the part of a residual block behind its last convolution. The figures in bold come from timing the tails "
        "alone, on the net's activations; those in brackets from timing whole nets, with a 95 % interval. c3-c5 are the stages "
        "2 to 4; the peer is the block in plain PyTorch, and in timm's nets timm's own. A net whose blocks do not stand at the "
        "end of a residual block has no tails. Compiled, the tails of a net are one graph; to train they are not timed alone.",
        models(whole),
        f"Whole models in the engines that people deploy with, torch {in_engines['machine']['torch']}, "
        f"{in_engines['machine']['date']}, same machine; by `python bench/whole_engines.py`, committed as "
        "[whole_engines.json](../bench/results/whole_engines.json). ResNet-50 with 13 blocks at c3-c5, to infer, NCHW; "
        "medians, and what the blocks add with a 95 % interval.",
        frames.markdown(*whole_engines.table(in_engines["rows"])),
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
            f"On one {found['gpus'][0]['name']}, torch {found['torch']}, commit {found['commit']}; by an earlier "
            "`make gpu-check`, committed as [gpu_check.txt](../bench/results/h200/gpu_check.txt). Medians, in multiples of a "
            "device copy of x; replayed CUDA graphs, the second-level cache overwritten before every call; both fusions, ratio "
            "1/16.",
            frames.markdown(["x", "copy, us", *directions], cells),
        ]
    )


def gains(results: dict[str, Any], gpu_results: dict[str, Any], whole: dict[str, Any]) -> str:
    """The box of README.md: what one block gains, as times of another implementation over ours."""
    rows, machine, gpu = plots.block_rows(results), results["machine"], gpu_results["environment"]
    time = {(r["x"], r["layout"], r["direction"], r["candidate"]): r["microseconds"] for r in rows}

    def cells(ratios: list[float], than: str, where: str) -> list[str]:
        return [f"**{plots.geometric_mean(ratios):.1f}x**", f"{min(ratios):.1f}x to {max(ratios):.1f}x", than, where]

    def to_eager(direction: str) -> list[float]:
        return [t / time[(*key[:3], "ours")] for key, t in time.items() if key[2:] == (direction, "eager")]

    def to_rewrite(direction: str) -> list[float]:
        return plots.gpu_ratios(gpu_results, direction)

    rewrite = "the fastest plain PyTorch that we found, in `torch.compile`"
    table = frames.markdown(
        ["speed-up of one block", "range", "compared with", "measured"],
        [
            cells(to_eager("infer"), "eager PyTorch", "CPU, inference"),
            cells(to_eager("train"), "eager PyTorch", "CPU, training step"),
            cells(to_rewrite("forward"), rewrite, "GPU, forward"),
            cells(to_rewrite("backward"), rewrite, "GPU, backward"),
        ],
    )
    case = {"direction": "infer", "images": 4, "layout": "NCHW", "compiled": False}
    rows_of_net = [row for row in whole["rows"] if row["model"].startswith("resnet50")]
    share = {row["variant"]: row["share"] for row in rows_of_net if case.items() <= row.items()}
    cpu = f"{machine['threads']} threads of an {machine['processor'].replace('(R)', '')}"
    return "\n\n".join(
        [
            table,
            "The block is the Global Context block with both fusions and ratio 1/16. Geometric means. CPU: "
            f"{cpu}, float32, {len(to_eager('infer'))} cases, commit {machine['revision'][:7]}. GPU: one "
            f"{gpu['gpus'][0]['name']}, float16 and float32, {len(to_rewrite('forward'))} cases, commit {gpu['commit']}; eager "
            "PyTorch, the forward pass of training and other cards were not measured. In a whole model: CPU inference of "
            f"ResNet-50 takes {share['ours and tail']:.1%} more time with 13 blocks than without, and {share['peer']:.1%} more "
            "with eager blocks; the blocks and what stands around them were timed alone. "
            "[All tables](docs/benchmarks.md)",
        ]
    )


def _between(page: str, begin: str, end: str, content: str) -> str:
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"


def pages(
    results: dict[str, Any], gpu_results: dict[str, Any], whole: dict[str, Any], in_engines: dict[str, Any]
) -> dict[Path, str]:
    """Each page, as it must be."""
    benchmarks = _between(BENCHMARKS.read_text(), BEGIN, END, text(results, whole, in_engines))
    return {
        README: _between(README.read_text(), BEGIN, END, gains(results, gpu_results, whole)),
        BENCHMARKS: _between(benchmarks, GPU_BEGIN, GPU_END, gpu_text(gpu_results)),
    }


def main() -> int:
    wanted = pages(*(json.loads(file.read_text()) for file in (RESULTS, GPU_RESULTS, WHOLE_MODELS, WHOLE_ENGINES)))
    other = [page for page, content in wanted.items() if page.read_text() != content]
    if "--check" in sys.argv:
        for page in other:
            print(f"{page.name} is not what bench/results says: run python bench/tables.py")
        return int(bool(other))
    for page in other:
        page.write_text(wanted[page])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
