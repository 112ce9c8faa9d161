"""How long the CUDA kernels take, by a model: predicted beside measured, for every committed report of a GPU.

    python bench/gpu_model.py                      prints it
    python bench/gpu_model.py --record LIBRARY     notes the instructions of the kernels, read with cuobjdump
    python bench/gpu_model.py --fit REPORT         looks for the constants once more

Two more tables have what it predicts for the second engine, CudaTuning(engine="v2"), beside what was measured of the first one:
stage by stage, and the whole in multiples of a copy of the map (bench/gpu_stages.py, bench/gpu_items.py).

A kernel takes as long as its parts do one after the other: a start, what it moves at the rate of the card, what it computes at
the rate of the card, and the chain of its last block. How the work is cut is asked of the plan functions, and how many
instructions a thread has for a tile is read from the machine code. The constants are fitted to one report, by kernel and never
to the totals that are printed; so a report of another card, or of kernels that have changed, is a test of the model.

Times are microseconds, sizes MB (10^6 bytes), rates MB per microsecond, which are TB/s.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gpu_items
import gpu_stages

import gcnet_ext
from gcnet_ext._tuning import CudaTuning

HERE = Path(__file__).resolve().parent
REPORTS = HERE / "results"
RECORD = REPORTS / "gpu_model.json"
LIMIT = 0.15
"""The most that the predictions of a report may be off, by the root of the mean square of the relative errors."""
# Why a report is outside of the limit: its folder, and a sentence.
OUTSIDE: dict[str, str] = {}


class Card(NamedTuple):
    """What a GPU gives. The rates are those that a copy reaches, not those of the data sheet."""

    multiprocessors: int
    copy: float  # MB/us of memory, read and written together
    clock: float  # 10^3 cycles/us


CARDS = {"NVIDIA H200": Card(132, 4.25, 1.85), "NVIDIA H100": Card(132, 3.0, 1.75)}
GRAPH, MEMSET, FILL = 3.6, 1.0, 0.8  # us of a graph around its kernels, of its memset, and of the zeros for a bias's gradient
L2_RATE = 2.0  # of the L2 cache, as a multiple of the memory's
TAIL_CHANNELS = 256  # up to so many, the last block of a sample computes the transform, too (kCudaTailWork)


class Shape(NamedTuple):
    """A row of a report."""

    name: str
    samples: int
    channels: int
    positions: int
    dtype: str
    channels_last: bool

    @property
    def element_size(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def megabytes(self) -> float:
        return self.samples * self.channels * self.positions * self.element_size / 1e6

    def plan(self, engine: str = "v1") -> dict[str, Any]:
        """How an engine cuts the map."""
        sizes = self.channels, self.positions, self.element_size
        tuning = CudaTuning(engine=engine).numbers()
        return gcnet_ext._load.compiled.plan("cuda", *sizes, self.channels_last, aligned=True, tuning=tuning)

    def narrow(self) -> bool:
        """Whether the rows do not allow accesses of 16 bytes."""
        return self.plan()["vector"] * self.element_size < 16


def shape_of(name: str) -> Shape:
    """Of a row's name, such as "64x256x56x56 float16 NCHW"."""
    sizes, dtype, layout = name.split()
    samples, channels, height, width = map(int, sizes.split("x"))
    return Shape(name, samples, channels, height * width, dtype, layout == "channels_last")


# ---- the kernels -------------------------------------------------------------------------------------------------------------

Constants = dict[str, float]
KERNELS = {
    # Our name: how the profiler's begin
    "pool": "attention_pool_rows|attention_pool_positions",
    "transform": "transform_layer",
    "fuse": "fuse_",
    "sums": "sums_",
    "transform_backward": "transform_backward",
    "dx": "attention_pool_backward",
    "parameters": "parameter_gradients",
}
FORWARD, BACKWARD = ("pool", "transform", "fuse"), ("sums", "transform_backward", "dx", "parameters")


DTYPES = {"float16": "Half", "bfloat16": "BFloat16", "float32": "float"}


def kernel_of(shape: Shape, kernel: str, names: Iterable[str]) -> str:
    """Which of these kernels is the shape's pool or dx, by its plan."""
    plan, dtype = shape.plan(), DTYPES[shape.dtype]
    way = f"attention_pool_{'backward_' if kernel == 'dx' else ''}{plan['path']}<{dtype}, "
    if plan["path"] != "rows":
        return f"{way}{plan['vector']}>"
    lanes = plan["tile"] // plan["vector"]
    pattern = re.compile(rf"{way}RowShape<{plan['vector']}, {lanes}, (\d+), {plan['threads']}>>")
    found = {int(match[1]): name for name in names if (match := pattern.fullmatch(name))}
    fitting = [rows for rows in found if plan["threads"] // lanes * rows >= shape.channels]
    if not fitting:
        raise ValueError(f"the instructions of {pattern.pattern} are not noted: run bench/gpu_model.py --record LIBRARY")
    return found[min(fitting)]


def tiles(shape: Shape, card: Card, constants: Constants, kernel: str, passes: int, instructions: dict[str, int]) -> float:
    """The pool (one pass over x) or dx (g and x read, dx written): blocks of tiles, in waves of as many as run at a time."""
    plan = shape.plan()
    blocks_each = max(1, 512 // plan["threads"])  # 512 threads of 128 registers fill a multiprocessor
    left = shape.samples * plan["splits"]
    elements = plan["tile"] * shape.channels
    megabytes = elements * shape.element_size * passes / 1e6
    # A tile takes about as many instructions of a thread as its whole code has.
    cycles = (
        instructions[kernel_of(shape, kernel, instructions)] * plan["threads"] / gpu_stages.LANES * constants["instructions"]
    )
    cycles *= constants["narrow"] if shape.narrow() else 1.0
    time = constants["start"]
    while left > 0:
        running = min(left, card.multiprocessors * blocks_each)
        busy = min(card.multiprocessors, running)
        each = min(blocks_each, math.ceil(running / card.multiprocessors))
        memory = each * megabytes / min(card.copy / busy, constants["rate"])
        issue = each * cycles / (card.clock * 1e3)
        time += constants["block"] + plan["tiles_per_split"] * (max(memory, issue) + constants["exposed"] * min(memory, issue))
        left -= running
    return time


def pool(shape: Shape, card: Card, constants: Constants, instructions: dict[str, int]) -> float:
    merged = shape.plan()["splits"] * shape.channels * 4 / 1e6  # of a sample, by its last block
    tail = constants["tail"] if shape.channels <= TAIL_CHANNELS else 0.0
    return tiles(shape, card, constants, "pool", 1, instructions) + merged * constants["merge"] + tail


def dx(shape: Shape, card: Card, constants: Constants, instructions: dict[str, int]) -> float:
    return tiles(shape, card, constants, "dx", 3, instructions)


def fuse(shape: Shape, card: Card, constants: Constants, _instructions: dict[str, int]) -> float:
    """x read, from the L2 cache as far as it is still there, and the output written."""
    cached = min(shape.megabytes, constants["cached"])
    slow = constants["narrow"] * shape.megabytes / shape.element_size if shape.narrow() else 0.0
    return constants["start"] + (2 * shape.megabytes - cached * (1 - 1 / L2_RATE)) / (constants["rate"] * card.copy) + slow


def sums(shape: Shape, card: Card, constants: Constants, _instructions: dict[str, int]) -> float:
    """g and x read, row by row."""
    tail = constants["tail"] if shape.channels <= TAIL_CHANNELS else 0.0
    rows = constants["row"] * shape.samples * shape.channels / 1e3
    slow = constants["narrow"] * shape.megabytes / shape.element_size if shape.narrow() else 0.0
    return constants["start"] + 2 * shape.megabytes / (constants["rate"] * card.copy) + tail + rows + slow


def layers(shape: Shape, _card: Card, constants: Constants, _instructions: dict[str, int]) -> float:
    """A transform: chains of loads as long as the channels, and products of samples and weights."""
    if shape.channels <= TAIL_CHANNELS:
        return 0.0  # the last block of the kernel before does it
    chain = constants["chain"] * shape.channels / 256
    return constants["start"] + chain + constants["product"] * shape.samples * shape.channels**2 / 1e8


def parameters(shape: Shape, _card: Card, constants: Constants, _instructions: dict[str, int]) -> float:
    chain = constants["chain"] * shape.channels / 256
    return constants["start"] + chain + constants["product"] * shape.samples * shape.channels / 1e5


MODELS: dict[str, Callable[[Shape, Card, Constants, dict[str, int]], float]] = {
    "pool": pool, "transform": layers, "fuse": fuse, "sums": sums, "transform_backward": layers, "dx": dx,
    "parameters": parameters,
}  # fmt: skip

# Where the search for the constants begins.
START: dict[str, Constants] = {
    "pool": {"start": 6, "block": 1.5, "rate": 0.08, "instructions": 1, "exposed": 0.9, "narrow": 2, "merge": 40, "tail": 10},
    "dx": {"start": 2, "block": 0.5, "rate": 0.06, "instructions": 1, "exposed": 0.9, "narrow": 2},
    "fuse": {"start": 2.5, "rate": 1, "cached": 20, "narrow": 0.3},
    "sums": {"start": 4, "rate": 0.8, "tail": 12, "row": 0.1, "narrow": 0.6},
    "transform": {"start": 8, "chain": 1, "product": 6},
    "transform_backward": {"start": 10, "chain": 2, "product": 2.5},
    "parameters": {"start": 4, "chain": 0.8, "product": 6},
}
# What a constant can be: a multiprocessor has no more than 0.11 MB/us, and an instruction is not started in less than one turn.
BOUNDS = {"rate": (0.03, 1.2), "instructions": (0.3, 4.0), "exposed": (0.0, 1.0), "narrow": (0.01, 6.0)}


# ---- reports -----------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """What a report has of one shape."""

    shape: Shape
    kernels: dict[str, float]
    forward: float
    backward: float


def rows_of(report: dict[str, Any]) -> Iterator[Row]:
    """Those that were timed, and whose kernels were, too."""
    timed = {row["row"]: row for row in report["timings"]["rows"]}
    for row in report["kernels"]:
        ours = timed.get(row["row"], {}).get("candidates", {}).get("ours", {})
        totals = [ours.get(direction, {}).get("graph_cold") for direction in ("forward", "backward")]
        if None in totals:
            continue
        measured = {**row["forward"], **{f"{name} backward": figures for name, figures in row["backward"].items()}}
        kernels = {
            kernel: sum(f["launches"] * f["microseconds"] for name, f in measured.items() if re.match(pattern, name))
            for kernel, pattern in KERNELS.items()
        }
        yield Row(shape_of(row["row"]), kernels, *totals)


def reports() -> dict[str, dict[str, Any]]:
    """The committed ones, by their folder."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(REPORTS.glob("*/gpu_check.json"))}


def card_of(report: dict[str, Any]) -> Card:
    return CARDS[report["environment"]["gpus"][0]["name"]]


# ---- predictions -------------------------------------------------------------------------------------------------------------


class Predicted(NamedTuple):
    kernels: dict[str, float]
    forward: float
    backward: float


def predict(
    shape: Shape, card: Card, constants: dict[str, Constants], instructions: dict[str, int], *, engine: str = "v1"
) -> Predicted:
    """Microseconds of each kernel, and of a captured graph of each direction with cold caches."""
    if engine == "v1":
        kernels = {kernel: model(shape, card, constants[kernel], instructions) for kernel, model in MODELS.items()}
        beside = {"forward": GRAPH + MEMSET, "backward": GRAPH + MEMSET + FILL}
    else:
        # The gradients of the parameters begin before dx is done, and no counter has to be zero.
        early = {**constants["parameters"], "start": constants["parameters"]["start"] / 2}
        kernels = {**gpu_stages.stages(shape, card), **gpu_items.sweeps(shape, card)}
        kernels["parameters"] = parameters(shape, card, early, instructions)
        beside = {"forward": GRAPH, "backward": GRAPH}
    forward, backward = (sum(kernels[kernel] for kernel in direction) for direction in (FORWARD, BACKWARD))
    return Predicted(kernels, forward + beside["forward"], backward + beside["backward"])


def errors(report: dict[str, Any], record: dict[str, Any]) -> dict[str, list[float]]:
    """Predicted / measured - 1, for each shape of a report, by direction."""
    card, found = card_of(report), {"forward": [], "backward": []}
    for row in rows_of(report):
        predicted = predict(row.shape, card, record["constants"], record["instructions"])
        for direction, each in found.items():
            each.append(getattr(predicted, direction) / getattr(row, direction) - 1)
    return found


def root_mean_square(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


def lines_of(name: str, report: dict[str, Any], record: dict[str, Any]) -> Iterator[str]:
    """A table of one report, in words."""
    card = card_of(report)
    yield f"{name}, commit {report['environment']['commit']}: microseconds of a graph with cold caches"
    yield f"{'':42}{'forward':>9}{'model':>8}{'':6}{'backward':>10}{'model':>8}"
    for row in rows_of(report):
        predicted = predict(row.shape, card, record["constants"], record["instructions"])
        cells = ""
        for direction, width in (("forward", 9), ("backward", 10)):
            measured, found = getattr(row, direction), getattr(predicted, direction)
            cells += f"{measured:{width}.1f}{found:8.1f}{found / measured - 1:+6.0%}"
        yield f"{row.shape.name:42}{cells}"
    off = {direction: root_mean_square(values) for direction, values in errors(report, record).items()}
    yield "off by (root mean square): " + ", ".join(f"{direction} {value:.1%}" for direction, value in off.items())
    if name in OUTSIDE:
        yield f"outside of the limit, because {OUTSIDE[name]}"


def lines_of_stages(name: str, report: dict[str, Any], record: dict[str, Any]) -> Iterator[str]:
    """Each kernel of one report as it was measured, and the same work in the second engine as it is predicted."""
    yield f"{name}: microseconds of each kernel as measured, > as predicted for the second engine (0: in the tail of another)"
    yield " " * 42 + "".join(f"{kernel:>19}" for kernel in MODELS)
    for row in rows_of(report):
        found = predict(row.shape, card_of(report), record["constants"], record["instructions"], engine="v2")
        cells = "".join(f"{row.kernels[kernel]:10.1f} > {found.kernels[kernel]:6.1f}" for kernel in MODELS)
        yield f"{row.shape.name:42}{cells}"


def lines_of_copies(name: str, report: dict[str, Any], record: dict[str, Any]) -> Iterator[str]:
    """Both directions of one report in multiples of the copy beside them: measured, and predicted for the second engine."""
    timed = {row["row"]: row for row in report["timings"]["rows"]}
    yield f"{name}: copies of the map, as measured and as predicted for the second engine; the compiled rewrite as measured"
    headings = "".join(f"{title:>9}" for title in ("forward", "v2", "rewrite", "backward", "v2", "rewrite"))
    yield f"{'':42}{'copy, us':>9}{headings}"
    for row in rows_of(report):
        of_row = timed[row.shape.name]
        copy = of_row["copy"]["graph_cold"]
        found = predict(row.shape, card_of(report), record["constants"], record["instructions"], engine="v2")
        cells = f"{copy:9.1f}"
        for direction in ("forward", "backward"):
            rewritten = of_row["candidates"].get("compiled rewrite", {}).get(direction, {}).get("graph_cold")
            cells += f"{getattr(row, direction) / copy:9.2f}{getattr(found, direction) / copy:9.2f}"
            cells += f"{'-':>9}" if rewritten is None else f"{rewritten / copy:9.2f}"
        yield f"{row.shape.name:42}{cells}"


# ---- the record --------------------------------------------------------------------------------------------------------------


def fitted(kernel: str, rows: list[Row], card: Card, instructions: dict[str, int]) -> Constants:
    """The constants of a kernel with the least mean square of log(predicted / measured): one after the other is made larger or
    smaller, in ever smaller steps, as long as that helps."""
    data = [(row.shape, row.kernels[kernel]) for row in rows if row.kernels[kernel] > 0]

    def cost(constants: Constants) -> float:
        ratios = (MODELS[kernel](shape, card, constants, instructions) / measured for shape, measured in data)
        return sum(math.log(ratio) ** 2 for ratio in ratios) / len(data)

    best = dict(START[kernel])
    least, step = cost(best), 0.4
    while step > 0.01:
        before = least
        for name, factor in itertools.product(START[kernel], (1 + step, 1 / (1 + step))):
            low, high = BOUNDS.get(name, (0.0, math.inf))
            tried = {**best, name: min(max(best[name] * factor, low), high)}
            if cost(tried) < least:
                best, least = tried, cost(tried)
        step = step if least < before else 0.6 * step
    return {name: float(f"{value:.3g}") for name, value in best.items()}


def recorded_instructions(library: Path, rows: list[Row]) -> dict[str, int]:
    """Of the kernels of the pool and of dx that the shapes run, on sm_90."""
    sys.path.insert(0, str(HERE.parent / "tests" / "native"))
    import machine_code

    found = {name: sum(counts.values()) for name, counts in machine_code.instructions(library, "sm_90").items()}
    wanted = {kernel_of(row.shape, kernel, found) for row in rows for kernel in ("pool", "dx")}
    return {name: found[name] for name in sorted(wanted)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, metavar="LIBRARY", help="the CUDA library whose kernels' instructions are noted")
    parser.add_argument("--fit", metavar="REPORT", help="the folder of the report to fit the constants to")
    arguments = parser.parse_args()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    found = reports()
    if arguments.record:
        rows = [row for report in found.values() for row in rows_of(report)]
        record["instructions"] = recorded_instructions(arguments.record, rows)
    if arguments.fit:
        report = found[arguments.fit]
        rows, card = list(rows_of(report)), card_of(report)
        record["fitted_to"] = arguments.fit
        record["constants"] = {kernel: fitted(kernel, rows, card, record["instructions"]) for kernel in MODELS}
    if arguments.record or arguments.fit:
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    for name, report in found.items():
        print("\n".join(lines_of(name, report, record)))
        print("\n".join(lines_of_stages(name, report, record)))
        print("\n".join(lines_of_copies(name, report, record)))


if __name__ == "__main__":
    main()
