"""How long a ticketed launch takes (csrc/cuda/tickets.cuh), by a simulation of its blocks in steps of time.

    python bench/gpu_tickets.py    prints the predictions, beside those of v2 and what was measured of v1; this takes minutes

A block takes the next item, copies what that needs of the maps while it works on the item before, waits until the stage before
is done, and works. The blocks share the rates of the memory and of the second-level cache, and those of a multiprocessor share
its arithmetic. A map that is read again is in the cache as far as no more than the cache holds has come in since.

No run has measured any of this: the constants are not fitted, and what the cache does with hints is a guess, which the probes
of bench/gpu_check.py and the comparison of lags in bench/gpu_ab.py are for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import gpu_model
import numpy as np
from gpu_items import ISSUED, L2_RATE, MULTIPROCESSOR_RATE, OF_FLOAT32, PER_ELEMENT, PIECE
from gpu_stages import FROM_L2, LANES, RATIO

if TYPE_CHECKING:
    from gpu_model import Card, Shape

STEP = 0.1  # us
BLOCKS = 2  # on a multiprocessor
LATENCY, FROM_CACHE = 1.0, 0.6  # us until the first byte of a copy comes
BUBBLE = 0.5  # us of an item in which its block neither moves nor computes, a ticket and its barriers among them
HOP = 1.0  # us until a block sees that a stage is done
SMALL_TRIP = 0.4  # us of a load from the second-level cache that an item of the transform waits for
CACHE = 31.0  # MB of a map that are still there when it is read again
LAUNCH = 2.0  # us until all blocks have their first item, the memset of the counters among them
LAGS = (8.0, 12.0, 16.0, 20.0, 28.0, math.inf)  # MB; the best of these is taken, as a comparison on a GPU would


class Stage(NamedTuple):
    """What a sample has of a stage; or the whole batch, of one that needs all samples of another."""

    items: int
    copied: float = 0.0  # MB of maps that an item copies
    again: bool = False  # those are read for the second time, and not needed again
    cached: float = 0.0  # MB of weights and partial results
    cycles: float = 0.0  # that an item's arithmetic takes a multiprocessor
    waits: float = BUBBLE  # us of an item in which its block does neither
    stored: float = 0.0  # MB
    of_all: int | None = None  # the number of the stage of which it needs all samples


def order(samples: int, stages: list[Stage], lag: int) -> list[tuple[int, int]]:
    """(stage, sample) of each ticket, as csrc/ticket_order.h has them. Stages of the whole batch come last."""
    whole = [(k, 0) for k, stage in enumerate(stages) if stage.of_all is not None for _ in range(stage.items)]
    stages = [stage for stage in stages if stage.of_all is None]
    first, last = stages[0].items, stages[-1].items
    late = [0, *(stage.items for stage in stages[1:-1]), last + min(lag, samples * first) * last // first]

    def before(k: int, rounds: int) -> int:
        return min(max(rounds * stages[k].items - late[k], 0), samples * stages[k].items)

    found = []
    total = samples * sum(stage.items for stage in stages)
    rounds = 0
    while len(found) < total:
        count = [before(k, rounds + 1) - before(k, rounds) for k in range(len(stages))]
        of = [[(k, (before(k, rounds) + i) // stages[k].items) for i in range(count[k])] for k in range(len(stages))]
        for between in of[1:-1]:
            found += between
        both, taken = len(of[0]) + len(of[-1]), 0
        for place in range(both):
            due = (place + 1) * len(of[-1]) // both
            found.append(of[-1][taken] if due > taken else of[0][place - taken])
            taken = due
        rounds += 1
    return found + whole


def simulate(samples: int, stages: list[Stage], lag: int, card: Card, cluster: int = 1, hints: bool = True) -> float:
    """Microseconds from the first item to the last. Where blocks form clusters, "block" below is a cluster of them."""
    tickets = order(samples, stages, lag)
    homes = card.multiprocessors // cluster
    blocks = min(homes * BLOCKS, len(tickets))
    home = np.arange(blocks) % homes
    kind, whose = (np.array(column) for column in zip(*tickets, strict=True))
    done = np.zeros((len(stages), samples))
    known = np.full((len(stages), samples), np.inf)  # when others see that the stage is done
    begun, ended = (
        np.full(samples, np.inf),
        np.zeros(samples),
    )  # MB that had come in when a sample's first stage began and ended
    copying, ready, working = (np.full(blocks, -1) for _ in range(3))
    memory, cache, late, cycles, waits = (np.zeros(blocks) for _ in range(5))
    drawn = finished = 0
    time = arrived = stores = 0.0
    while finished < len(tickets):
        for block in np.flatnonzero((copying < 0) & (ready < 0)):
            if drawn == len(tickets):
                break
            stage, sample = stages[kind[drawn]], whose[drawn]
            hit = 0.0
            if stage.again:  # the part of the sample that has come in since the cache had room
                span = max(ended[sample] - begun[sample], 1e-9)
                hit = min(max((ended[sample] - max(arrived - CACHE, begun[sample])) / span, 0.0), 1.0)
            memory[block], cache[block] = stage.copied * (1 - hit), stage.copied * hit
            late[block] = 0.0 if stage.copied == 0 else FROM_CACHE if hit == 1 else LATENCY
            if kind[drawn] == 0:
                begun[sample] = min(begun[sample], arrived)
            arrived += memory[block] if kind[drawn] == 0 or not hints else 0.0
            if kind[drawn] == 0:
                ended[sample] = arrived
            copying[block] = drawn
            drawn += 1
        moving = (copying >= 0) & (late <= 0)
        load = np.bincount(home[moving], minlength=homes)[home]
        most = cluster * np.minimum(FROM_L2, MULTIPROCESSOR_RATE / np.maximum(load, 1))
        wanted = np.where(moving & (memory > 0), most, 0.0)
        storing = min(stores / STEP, card.copy)
        share = min(1.0, card.copy / max(wanted.sum() + storing, 1e-9))
        memory -= wanted * share * STEP
        stores -= storing * share * STEP
        hits = np.where(moving & (memory <= 0) & (cache > 0), most * 1.3, 0.0)
        cache -= hits * min(1.0, L2_RATE * card.copy / max(hits.sum(), 1e-9)) * STEP
        late -= np.where(copying >= 0, STEP, 0.0)
        arriving = (copying >= 0) & (late <= 0) & (memory <= 1e-9) & (cache <= 1e-9)
        ready = np.where(arriving, copying, ready)
        copying = np.where(arriving, -1, copying)
        for block in np.flatnonzero((working < 0) & (ready >= 0)):
            ticket = ready[block]
            stage = stages[kind[ticket]]
            before = known[kind[ticket] - 1, whose[ticket]] if stage.of_all is None else known[stage.of_all].max()
            if kind[ticket] > 0 and before > time:
                continue
            working[block], ready[block] = ticket, -1
            cycles[block] = stage.cycles / cluster / ISSUED / (card.clock * 1e3)
            waits[block] = stage.waits + stage.cached / FROM_L2
        computing = (working >= 0) & (waits <= 0)
        load = np.bincount(home[computing], minlength=homes)[home]
        cycles -= np.where(computing, STEP / np.maximum(load, 1), 0.0)
        waits -= np.where(working >= 0, STEP, 0.0)
        time += STEP
        for block in np.flatnonzero((working >= 0) & (waits <= 0) & (cycles <= 0)):
            place = kind[working[block]], whose[working[block]]
            done[place] += 1
            if done[place] == stages[place[0]].items:
                known[place] = time + HOP
            stores += stages[place[0]].stored
            if not hints:
                arrived += stages[place[0]].stored
            working[block] = -1
            finished += 1
    return time + stores / card.copy


def fits(shape: Shape) -> bool:
    """Whether each direction of a map of this shape is a ticketed launch."""
    plan = shape.plan(engine="tickets")
    return plan["cluster"] > 0 and plan["backward_cluster"] > 0 and plan["sums_splits"] == 1


def stages(shape: Shape, direction: str, cluster: int, multiprocessors: int) -> list[Stage]:
    """What a sample of the map has to go through. Of pieces and parts, each block of a cluster has one."""
    plan, whole = shape.plan(engine="tickets"), shape.megabytes / shape.samples
    elements, units = whole * 1e6 / shape.element_size, 2 * shape.channels * RATIO
    lanes = {name: (OF_FLOAT32 if shape.dtype == "float32" else 1.0) * count / LANES for name, count in PER_ELEMENT.items()}
    pieces = math.ceil(whole * 1e6 / PIECE / cluster)

    def sweep(items: int, kernel: str, maps: int, *, again: bool = False, stored: bool = False) -> Stage:
        cycles = elements / items * lanes[kernel]
        return Stage(items, maps * whole / items, again, cycles=cycles, stored=whole / items if stored else 0.0)

    def layer(slices: int, tiles: int, megabytes: float, *, in_turns: bool) -> Stage:
        """Of tiles of both branches; an item goes through as many of them as there are more items than blocks."""
        turns = min(tiles, max(1, math.ceil(shape.samples * slices * tiles / (multiprocessors * BLOCKS)))) if in_turns else 1
        items = slices * math.ceil(tiles / turns)
        return Stage(math.ceil(items / cluster), cached=megabytes / items, waits=BUBBLE + SMALL_TRIP * (2 + turns))

    weights, merged = shape.channels * units * shape.element_size / 1e6, plan["splits"] * shape.channels * 4 / 1e6
    slices, of_branch = plan["slices"], units / 2
    if direction == "forward":
        first = layer(slices, 2 * math.ceil(of_branch / 32), weights + merged, in_turns=True)
        second = layer(1, 2 * math.ceil(shape.channels / 32), weights, in_turns=True)
        return [sweep(plan["splits"], "pool", 1), first, second, sweep(pieces, "fuse", 1, again=True, stored=True)]
    sums = sweep(math.ceil(plan["sums_channel_groups"] / cluster), "sums", 2)
    first = layer(slices, 2 * math.ceil(of_branch / 64), weights, in_turns=False)
    second = layer(1, math.ceil(shape.channels / 64), weights, in_turns=False)
    dx = sweep(plan["backward_splits"], "dx", 2, again=True, stored=True)

    def gradients(items: int, entries: int, values: int, terms: int, trips: float, of_all: int) -> Stage:
        """Items that each add the terms of so many entries, and read so many values of each term."""
        waits, cached = BUBBLE + SMALL_TRIP * (1 + trips), values * terms * 4 / 1e6
        cycles = cluster * entries * terms / LANES
        return Stage(math.ceil(items / cluster), cached=cached, cycles=cycles, waits=waits, of_all=of_all)

    # Four matrices, in tiles of 16 x 128 entries, and the weight of the mask, with 8 entries for a block.
    tiles, samples, splits = (
        4 * math.ceil(of_branch / 16) * math.ceil(shape.channels / 128),
        shape.samples,
        plan["backward_splits"],
    )
    matrices = gradients(tiles, 16 * 128, 16 + 128, samples, samples / 32, of_all=2)
    mask = gradients(math.ceil(shape.channels / 8), 8, 8, samples * splits, samples * splits / 256, of_all=3)
    return [sums, first, second, dx, matrices, mask]


def predict(shape: Shape, direction: str, card: Card, hints: bool = True) -> tuple[float, float]:
    """Microseconds of the launch and the lag in MB, with the best lag."""
    plan = shape.plan(engine="tickets")
    cluster = plan["cluster" if direction == "forward" else "backward_cluster"]
    found = stages(shape, direction, cluster, card.multiprocessors)
    item = found[0].copied
    times = {}
    for lag in LAGS:
        if math.isinf(lag) or lag < shape.megabytes:
            items = shape.samples * found[0].items if math.isinf(lag) else round(lag / item)
            times[lag] = LAUNCH + simulate(shape.samples, found, items, card, cluster, hints)
    best = min(times, key=times.__getitem__)
    return times[best], best


def lines_of(name: str, report: dict[str, Any], record: dict[str, Any]) -> Iterator[str]:
    """Of one report: copies of the map as measured of v1, and as predicted for v2 and for tickets with the best lag."""
    card, timed = gpu_model.card_of(report), {row["row"]: row for row in report["timings"]["rows"]}
    yield f"{name}: copies of the map; measured, predicted for v2, for tickets (and the lag in MB), for tickets without hints"
    for row in gpu_model.rows_of(report):
        if not fits(row.shape):
            continue
        copy = timed[row.shape.name]["copy"]["graph_cold"]
        v2 = gpu_model.predict(row.shape, card, record["constants"], record["instructions"], engine="v2")
        cells = ""
        for direction in ("forward", "backward"):
            (time, lag), (without, _) = (predict(row.shape, direction, card, hints) for hints in (True, False))
            found = [getattr(row, direction), getattr(v2, direction), time + gpu_model.GRAPH, without + gpu_model.GRAPH]
            multiples = [f"{each / copy:6.2f}" for each in found]
            cells += f"  {direction} {' '.join(multiples[:3])} ({lag:g}) {multiples[3]}"
        yield f"{row.shape.name:36}{cells}"


def main() -> None:
    record = json.loads(gpu_model.RECORD.read_text())
    for name, report in gpu_model.reports().items():
        for line in lines_of(name, report, record):
            print(line, flush=True)


if __name__ == "__main__":
    main()
