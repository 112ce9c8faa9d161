"""Compares, per feature map, what a caller can decide in the place of the CUDA plan functions (gcnet_ext/_tuning.py).

    python bench/gpu_ab.py --json FILE [--seconds 60] [--dry-run]

For inference (forward) and for training (both directions), as replayed graphs with cold caches. First every decision by itself,
and those together that were ahead, in a few calls; then the best again beside the default, in turn, in more. The winner is the
one with the least median if that is 2 % ahead of the default, and otherwise the default. The file is written after every map.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_timing import DRY_ROWS, ROWS, Clock, Function, Row, make_modules
from measure import output_file

import gcnet_ext
from gcnet_ext._tuning import CudaTuning, cuda_tuning

AHEAD = 0.02  # what a winner has to be faster by
ROUNDS = 8  # of the second comparison
BEST = 3  # decisions that get there
DEFAULT = CudaTuning()


def under(tuning: CudaTuning, clock: Clock) -> contextlib.AbstractContextManager[None]:
    """The decisions; in a dry run nothing, for the CPU has none."""
    return contextlib.nullcontext() if clock.dry else cuda_tuning(tuning)


def plan(row: Row, tuning: CudaTuning) -> dict[str, Any]:
    """How a map is cut under these decisions."""
    size = 4 if row.dtype == "float32" else 2
    positions = row.height * row.width
    return gcnet_ext._load.compiled.plan(
        "cuda", row.channels, positions, size, row.channels_last, aligned=True, tuning=tuning.numbers()
    )


def variants(row: Row, direction: str) -> list[CudaTuning]:
    """The default and each other decision by itself, and the second engine with some, without those that change no plan."""
    single = [CudaTuning(streamed=True)]
    single += [CudaTuning(larger_tile=larger) for larger in range(1, 5)]
    single += [CudaTuning(splits=splits) for splits in (8, 16, 32)]
    single += [CudaTuning(row_lanes=2**power) for power in range(9)] if direction == "both" and not row.channels_last else []
    second = CudaTuning(engine="v2")
    single += [second, *(dataclasses.replace(second, larger_tile=larger) for larger in (1, 2))]
    single += [dataclasses.replace(second, splits=splits) for splits in (32, 64)]
    tickets = CudaTuning(engine="tickets")
    unplanned = [tickets, *(dataclasses.replace(tickets, lag=lag) for lag in lags(row, direction))]
    unplanned += [dataclasses.replace(tickets, hints=1), dataclasses.replace(tickets, cluster=1)]
    plans, found = [plan(row, DEFAULT)], [DEFAULT]
    for tuning in single:
        if (cut := plan(row, tuning)) not in plans:
            plans.append(cut)
            found.append(tuning)
    # Those that change no plan: the transform and the tickets are not in it.
    unplanned += [CudaTuning(transform=1), CudaTuning(transform=2), *([] if second in found else [second])]
    return [*found, *unplanned]


def lags(row: Row, direction: str) -> list[int]:
    """How many items the last stage may stay behind: those of some megabytes of a map, and all."""
    cut = plan(row, CudaTuning(engine="v2"))
    size = 4 if row.dtype == "float32" else 2
    item = row.channels * row.height * row.width * size / (cut["splits"] if direction == "forward" else cut["backward_splits"])
    return [*dict.fromkeys(max(1, round(megabytes * 1e6 / item)) for megabytes in (8, 12, 16, 20, 28)), 2**31 - 1]


def together(tunings: Sequence[CudaTuning]) -> CudaTuning:
    """What each of these decides; of two that decide the same thing the earlier one counts."""
    decided: dict[str, Any] = {}
    for tuning in tunings:
        for name, value in dataclasses.asdict(tuning).items():
            if value:
                decided.setdefault(name, value)
    return CudaTuning(**decided)


def call_of(direction: str, clock: Clock, row: Row) -> Function:
    """One call of the block, for inference or for training."""
    layout = torch.channels_last if row.channels_last else torch.contiguous_format
    x = torch.randn(row[:4], device=clock.device).to(getattr(torch, row.dtype)).contiguous(memory_format=layout)
    block, leaf, grad = make_modules(row, clock.device)["ours"], x.clone().requires_grad_(), torch.randn_like(x)
    inputs = [leaf, *block.parameters()]

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return block(x)

    return forward if direction == "forward" else lambda: torch.autograd.grad(block(leaf), inputs, grad)


def chosen(times: dict[CudaTuning, list[float]]) -> CudaTuning:
    """The winner."""
    medians = {tuning: statistics.median(found) for tuning, found in times.items()}
    best = min(medians, key=medians.__getitem__)
    return best if medians[best] <= (1 - AHEAD) * medians[DEFAULT] else DEFAULT


def compare(row: Row, direction: str, clock: Clock) -> dict[str, Any]:
    """The winner of a map and direction, in microseconds beside the default and the runner-up."""
    call = call_of(direction, clock, row)
    graphs: dict[CudaTuning, Function] = {}

    def timed(tuning: CudaTuning, calls: int) -> float:
        if tuning not in graphs:
            with under(tuning, clock):
                graphs[tuning] = clock.graph(call)
        return clock.median(graphs[tuning], cold=True, calls=calls)

    first = {tuning: timed(tuning, 6) for tuning in variants(row, direction)}
    ranked = sorted(first, key=first.__getitem__)
    ahead = [tuning for tuning in ranked if first[tuning] < (1 - AHEAD / 2) * first[DEFAULT]]
    candidates = dict.fromkeys([DEFAULT, together(ahead), *ranked[:BEST]])
    times: dict[CudaTuning, list[float]] = {tuning: [] for tuning in candidates}
    for _ in range(ROUNDS):
        for tuning, found in times.items():
            found.append(timed(tuning, 6))
    winner = chosen(times)
    others = {tuning: statistics.median(found) for tuning, found in times.items() if tuning != winner}
    second = min(others, key=others.__getitem__, default=winner)
    return {
        "row": str(row),
        "direction": direction,
        "winner": dataclasses.asdict(winner),
        "microseconds": statistics.median(times[winner]),
        "spread": [min(times[winner]), max(times[winner])],
        "default": statistics.median(times[DEFAULT]),
        "second": {**dataclasses.asdict(second), "microseconds": others.get(second)},
        "tried": len(graphs),
        "first": [{**dataclasses.asdict(tuning), "microseconds": value} for tuning, value in first.items()],
    }


def measure(seconds: float, dry: bool, path: Path) -> None:
    """All maps until the time is up; what does not fit is said to be left out."""
    clock, end = Clock(dry), time.monotonic() + seconds
    found: list[dict[str, Any]] = []
    left_out: list[str] = []
    for row in DRY_ROWS if dry else ROWS:
        for direction in ("forward", "both"):
            if time.monotonic() > end:
                left_out.append(f"{row}: {direction}")
                continue
            try:
                found.append(compare(row, direction, clock))
                print(f"{row}, {direction}: {found[-1]['winner']}", flush=True)
            except Exception as error:  # a GPU with too little memory for this map
                left_out.append(f"{row}: {direction}: {error}"[:500])
            if not dry:
                torch.cuda.empty_cache()
        path.write_text(json.dumps({"dry_run": dry, "unit": "microseconds", "winners": found, "left_out": left_out}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=output_file, required=True, help="where the winners go")
    parser.add_argument("--seconds", type=float, default=60, help="start no further comparison after this time")
    parser.add_argument("--dry-run", action="store_true", help="two tiny maps on the CPU, where every decision is the same")
    arguments = parser.parse_args()
    measure(arguments.seconds, arguments.dry_run, arguments.json)


if __name__ == "__main__":
    main()
