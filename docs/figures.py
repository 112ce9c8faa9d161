"""Draws the figures of docs/memory.md from the plans of the compiled library, and from the order of tickets that the model of
bench/gpu_tickets.py shares with the kernels.

python docs/figures.py [--out docs]
"""

from __future__ import annotations

import argparse
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from gcnet_ext import _load
from gcnet_ext._tuning import CudaTuning

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import gpu_model
import gpu_tickets

BYTES = 4  # float32
CACHE = 2 << 20  # bytes of the second-level cache of one core, of the modelled processor
DARK, LIGHT, LINE, MISS = "#4878a8", "#a9c6e3", "#c44e52", "#dd8452"


def plan(channels: int, positions: int, channels_last: bool = False) -> dict:
    return _load.compiled.plan("cpu", channels, positions, BYTES, channels_last)


def by_channels(channels: int, positions: int, channels_last: bool) -> bool:
    """Whether the pool takes the blocks of the sweep: then, and only then, a sample of several blocks is one split in NCHW."""
    cut = plan(channels, positions, channels_last)
    return not channels_last and cut["splits"] == 1 and cut["tile"] == positions


# ---- cuts.png: a sample of [C, P], cut for the pool and for the sweeps ------------------------------------------------------


class Cut(NamedTuple):
    """Blocks of so many channels by so many positions; `tile` positions are walked at a time."""

    channels: int
    positions: int
    tile: int


MOST_SHOWN, SHOWN = 25, 12
SAMPLES = (  # title, C, P, channels_last
    ("NCHW, small: 256 x 28x28", 256, 28 * 28, False),
    ("NCHW, large: 512 x 100x168", 512, 100 * 168, False),
    ("channels_last: 256 x 56x56", 256, 56 * 56, True),
)


def cut_of_pool(channels: int, positions: int, channels_last: bool) -> Cut:
    cut = plan(channels, positions, channels_last)
    if by_channels(channels, positions, channels_last):
        return Cut(cut["sweep_channels"], positions, positions)
    return Cut(channels, cut["split"], cut["tile"])


def cut_of_sweep(channels: int, positions: int, channels_last: bool) -> Cut:
    cut = plan(channels, positions, channels_last)
    return Cut(cut["sweep_channels"], cut["sweep_positions"], cut["sweep_positions"])


def draw_cut(axes: Axes, channels: int, positions: int, cut: Cut) -> str:
    """The first blocks, every other one dark, and lines between tiles; returns what is drawn, in words."""
    rows, columns = -(-channels // cut.channels), -(-positions // cut.positions)
    blocks = f"{rows * columns} blocks" if max(rows, columns) <= MOST_SHOWN else f"first {SHOWN} of {rows * columns} blocks"
    if max(rows, columns) > MOST_SHOWN:
        rows, columns = min(rows, SHOWN), min(columns, SHOWN)
    channels_shown, positions_shown = min(channels, rows * cut.channels), min(positions, columns * cut.positions)
    for row in range(rows):
        for column in range(columns):
            c0, p0 = row * cut.channels, column * cut.positions
            size = (min(cut.positions, positions - p0), min(cut.channels, channels - c0))
            color = DARK if (row + column) % 2 == 0 else LIGHT
            axes.add_patch(Rectangle((p0, c0), *size, facecolor=color, linewidth=0))
    if cut.tile < cut.positions:
        for p in range(cut.tile, positions_shown, cut.tile):
            if p % cut.positions:
                axes.plot((p, p), (0, channels_shown), color="white", linewidth=1)
    axes.set(xlim=(0, positions_shown), ylim=(channels_shown, 0), xticks=(0, positions_shown), yticks=(0, channels_shown))
    of_channels = "all channels" if cut.channels == channels else f"{cut.channels} channel{'s' * (cut.channels > 1)}"
    of_positions = "all positions" if cut.positions == positions else f"{cut.positions} positions"
    tiles = f"; tiles of {cut.tile}" if cut.tile < cut.positions else ""
    return f"{blocks}\n{of_channels} x {of_positions}{tiles}"


def draw_cuts(path: Path) -> None:
    figure, grid = plt.subplots(2, 3, figsize=(11, 5.6), layout="constrained")
    for column, (title, channels, positions, channels_last) in enumerate(SAMPLES):
        for axes, kind, cut_of in zip(grid[:, column], ("pool", "sweep"), (cut_of_pool, cut_of_sweep), strict=True):
            words = draw_cut(axes, channels, positions, cut_of(channels, positions, channels_last))
            axes.set_title(f"{title}\n{kind}: {words}" if kind == "pool" else f"{kind}: {words}", fontsize=9)
            axes.set_xlabel("positions", fontsize=8, labelpad=-8)
            axes.set_ylabel("channels", fontsize=8, labelpad=-14)
            axes.tick_params(labelsize=8)
            arrow = {"arrowstyle": "->", "color": LINE, "lw": 2.5}
            start, end = ((0.04, 0.95), (0.04, 0.55)) if channels_last else ((0.02, 0.93), (0.35, 0.93))
            axes.annotate("", end, start, "axes fraction", "axes fraction", arrowprops=arrow)
    figure.suptitle("One sample of x, float32. Arrow: neighbours in memory. Neighbouring blocks differ in colour.", fontsize=10)
    save(figure, path)


# ---- parts.png: blocks of a sample that threads may share -------------------------------------------------------------------

POWERS_C, POWERS_P = range(3, 12), range(4, 17)


def draw_parts(path: Path) -> None:
    figure, grid = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
    levels = (1, 2, 4, 8, 16, 32, 65)
    colors = ListedColormap(plt.get_cmap("Blues")([0.05, 0.2, 0.35, 0.55, 0.75, 0.95]))
    for axes, channels_last in zip(grid, (False, True), strict=True):
        parts = [[parts_of(2**c, 2**p, channels_last) for p in POWERS_P] for c in POWERS_C]
        axes.imshow(parts, origin="lower", cmap=colors, norm=BoundaryNorm(levels, colors.N), aspect="auto")
        for row, c in enumerate(POWERS_C):
            for column, p in enumerate(POWERS_P):
                count, whole = parts[row][column], by_channels(2**c, 2**p, channels_last)
                shade = "white" if count >= 16 else "black"
                text = f"[{count}]" if whole else count
                axes.text(column, row, text, ha="center", va="center", fontsize=9, color=shade)
        axes.set_xticks(range(len(POWERS_P)), [f"$2^{{{p}}}$" for p in POWERS_P], fontsize=8)
        axes.set_yticks(range(len(POWERS_C)), [f"{2**c}" for c in POWERS_C], fontsize=8)
        axes.set_xlabel("positions P", fontsize=9)
        axes.set_title(
            "channels_last" if channels_last else "NCHW; in brackets: cut by channels, else by positions", fontsize=10
        )
    grid[0].set_ylabel("channels C", fontsize=9)
    figure.suptitle("Into how many blocks the attention pool cuts one sample, float32", fontsize=10)
    save(figure, path)


def parts_of(channels: int, positions: int, channels_last: bool) -> int:
    cut = plan(channels, positions, channels_last)
    return cut["sweep_channel_blocks"] if by_channels(channels, positions, channels_last) else cut["splits"]


# ---- order.png: forwards and backwards, in a model of the cache -------------------------------------------------------------


class Pass(NamedTuple):
    """A loop over the blocks of a thread: what it reads and writes of each, and in which direction."""

    name: str
    reads: str
    writes: str
    backwards: bool


FORWARD = (Pass("logits", "x", "", True), Pass("context", "x", "", False), Pass("fusion", "x", "o", True))
BACKWARD = (Pass("sums of g, g x", "gx", "", False), Pass("u", "x", "", True), Pass("dx, dw", "gx", "d", False))


class Access(NamedTuple):
    step: int
    block: int
    misses: int  # of the pass's reads of this block
    reads: int


def walk(passes: Iterable[Pass], blocks: int, block_bytes: int) -> Iterator[Access]:
    """A least-recently-used cache of whole blocks, empty at first; what is written stays in it, too."""
    cache: OrderedDict[tuple[str, int], None] = OrderedDict()
    step = 0

    def touch(key: tuple[str, int]) -> bool:
        found = key in cache
        cache[key] = None
        cache.move_to_end(key)
        while len(cache) * block_bytes > CACHE:
            cache.popitem(last=False)
        return found

    for each in passes:
        for block in reversed(range(blocks)) if each.backwards else range(blocks):
            misses = sum(not touch((name, block)) for name in each.reads)
            for name in each.writes:
                touch((name, block))
            yield Access(step, block, misses, len(each.reads))
            step += 1


def draw_order(path: Path) -> None:
    channels, positions = 1024, 28 * 28
    cut = plan(channels, positions)
    blocks, block_bytes = cut["sweep_channel_blocks"] // 2, cut["sweep_channels"] * positions * BYTES
    figure, grid = plt.subplots(2, 2, figsize=(11, 5), layout="constrained", sharey=True)
    for row, (direction, passes) in zip(grid, (("forward", FORWARD), ("backward", BACKWARD)), strict=True):
        for axes, built in zip(row, (True, False), strict=True):
            taken = passes if built else [each._replace(backwards=False) for each in passes]
            accesses = list(walk(taken, blocks, block_bytes))
            for access in accesses:
                share = access.misses / access.reads
                axes.add_patch(Rectangle((access.step, access.block), 1, 1, facecolor=LIGHT, edgecolor="white"))
                axes.add_patch(Rectangle((access.step, access.block), 1, share, facecolor=MISS, edgecolor="white"))
            for index, each in enumerate(taken):
                axes.text((index + 0.5) * blocks, blocks + 0.25, each.name, ha="center", va="bottom", fontsize=8)
                axes.axvline(index * blocks, color="#999999", linewidth=0.6)
            missed, read = (sum(getattr(access, name) for access in accesses) / blocks for name in ("misses", "reads"))
            order = "the order of the kernels" if built else "every pass forwards"
            axes.set_title(f"{direction}, {order}: reads {read:g} x, of which {missed:g} x miss", fontsize=9)
            axes.set(
                xlim=(0, len(accesses)), ylim=(0, blocks + 1.2), xticks=(), yticks=(0, blocks), yticklabels=("0", f"{blocks}")
            )
            axes.tick_params(labelsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel("block of the thread", fontsize=9)
    for axes in grid[1]:
        axes.set_xlabel("time: one block after the other", fontsize=9)
    figure.suptitle(
        "One of two threads on a sample of 1024 x 28x28 in NCHW, float32. A model of its second-level cache of 2 MiB,\n"
        "empty at first; orange: the share of what the step reads (x, in the backward pass also g) that is not in it.",
        fontsize=9,
    )
    save(figure, path)


# ---- tickets.png: a launch for each stage, and one launch with tickets ------------------------------------------------------

MAP = "64x256x56x56 float16 NCHW"
MULTIPROCESSORS = 132


class Reading(NamedTuple):
    """What the first or the last stage reads of one sample: the MB that were read by any stage when it begins and ends."""

    begin: float
    end: float


def readings(tickets: list[tuple[int, int]], stages: list[gpu_tickets.Stage]) -> dict[tuple[int, int], Reading]:
    """Of each stage that reads a map, and each sample."""
    found: dict[tuple[int, int], Reading] = {}
    read = 0.0
    for stage, sample in tickets:
        if copied := stages[stage].copied:
            begin = found[stage, sample].begin if (stage, sample) in found else read
            read += copied
            found[stage, sample] = Reading(begin, read)
    return found


def draw_tickets(path: Path) -> None:
    shape, tuning = gpu_model.shape_of(MAP), CudaTuning(engine="tickets").numbers()
    samples, middle = range(shape.samples), shape.samples // 2
    figure, grid = plt.subplots(2, 2, figsize=(11, 5.6), layout="constrained", sharey=True)
    for row, direction, maps in zip(grid, ("forward", "backward"), ("x", "x and g"), strict=True):
        found = gpu_tickets.stages(shape, direction, 1, MULTIPROCESSORS)
        stages = [stage for stage in found if stage.of_all is None]  # the others read no map
        item = round(stages[0].copied * 1e6)
        lag = _load.compiled.plan_cuda_lag(item * stages[0].items, shape.samples, item, tuning)
        by_stage = [(k, sample) for k, stage in enumerate(stages) for sample in samples for _ in range(stage.items)]
        orders = {"a launch for each stage": by_stage, "one launch": gpu_tickets.order(shape.samples, stages, lag)}
        for axes, (name, tickets) in zip(row, orders.items(), strict=True):
            found = readings(tickets, stages)
            for (stage, sample), each in found.items():
                color = DARK if stage == 0 else MISS
                axes.add_patch(Rectangle((each.begin, sample), each.end - each.begin, 1, facecolor=color, linewidth=0))
            first, last = found[0, middle], found[len(stages) - 1, middle]
            arrow = {"arrowstyle": "->", "color": LINE, "lw": 1.5, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (last.begin, middle + 0.5), (first.end, middle + 0.5), arrowprops=arrow)
            between = last.begin - first.end
            axes.set_title(f"{direction}, {name}: {between:.0f} MB of {maps} are read in between", fontsize=9)
            axes.set(xlim=(0, max(each.end for each in found.values())), ylim=(shape.samples, 0))
            axes.tick_params(labelsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel("sample", fontsize=9)
    for axes in grid[1]:
        axes.set_xlabel("MB read so far", fontsize=9)
    title = f"{MAP}. Blue: the first stage reads a sample; orange: the last stage reads it again."
    figure.suptitle(title, fontsize=10)
    save(figure, path)


FIGURES = {"cuts.png": draw_cuts, "parts.png": draw_parts, "order.png": draw_order, "tickets.png": draw_tickets}


def save(figure: plt.Figure, path: Path) -> None:
    """With all of its texts beside the picture: by them tests/docs/test_docs.py sees that a plan is no longer the one drawn."""
    texts = "\n".join(text.get_text() for text in figure.findobj(Text) if text.get_text())
    figure.savefig(path, dpi=90, metadata={"Software": None, "Description": texts})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    arguments = parser.parse_args()
    for name, draw in FIGURES.items():
        draw(arguments.out / name)


if __name__ == "__main__":
    main()
