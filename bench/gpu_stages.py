"""How long the stages of the transform take (csrc/cuda/transform_split.cuh), by a model of what a block of theirs waits for.

No run has measured them: the constants are not fitted, but what memory and launches are known to take on these GPUs.
bench/gpu_model.py prints the predictions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_model import Card, Shape

STAGE_LAUNCH = 2.0  # us: the end of the launch before, the wait for it and the start, with weights on their way
TRIP = 0.8  # us of a load that everything waits for
LANES = 128  # instructions of lanes that a multiprocessor starts in a cycle
FROM_L2 = 0.075  # MB/us of one block
STAGE_BLOCKS, STAGE_SAMPLES = 2, 8  # on a multiprocessor; most of a block
RATIO, BRANCHES = 1 / 16, 2  # of the blocks that are timed


def dealt(samples: int, slices: int, tiles: int, slots: int) -> tuple[int, int, int]:
    """Samples of a block, turns of a block and blocks, as SplitWork has them (csrc/cuda/transform_split_work.cuh)."""
    together = 1
    while together < STAGE_SAMPLES and math.ceil(samples / together) * slices * tiles > slots:
        together *= 2
    blocks = math.ceil(samples / together) * slices * tiles
    turns = max(1, math.ceil(blocks / slots))
    return together, turns, math.ceil(blocks / turns)


def stage(card: Card, blocks: int, trips: float, megabytes: float, products: float) -> float:
    """Blocks that each wait for so many loads, read so much and multiply so often, two of them on a multiprocessor."""
    waves = math.ceil(blocks / (card.multiprocessors * STAGE_BLOCKS))
    computing = products * STAGE_BLOCKS / LANES / (card.clock * 1e3)
    return STAGE_LAUNCH + waves * (trips * TRIP + max(megabytes / FROM_L2, computing))


def stages(shape: Shape, card: Card) -> dict[str, float]:
    """Microseconds of what the stages change."""
    cut, slots = shape.plan(), card.multiprocessors * STAGE_BLOCKS
    slices, width, units = cut["slices"], cut["slice_channels"], int(shape.channels * RATIO)
    size = shape.element_size

    together, turns, blocks = dealt(shape.samples, slices, BRANCHES * math.ceil(units / 32), slots)
    merged = together * width * cut["splits"]
    rounds = 1 + math.ceil(merged / 256 / 16)  # a thread has 16 partial sums under way
    first = stage(card, blocks, rounds + turns, (merged * 4 + 32 * turns * width * size) / 1e6, 32 * turns * width * 8)

    together, turns, blocks = dealt(shape.samples, 1, BRANCHES * math.ceil(shape.channels / 32), slots)
    parts = together * units * slices
    steps = turns * math.ceil(units / 128)
    trips = math.ceil(parts / 256 / 32) + steps
    second = stage(card, blocks, trips, (parts * 4 + 32 * turns * units * size) / 1e6, 32 * turns * units * 8)

    together, _, blocks = dealt(shape.samples, slices, BRANCHES * math.ceil(units / 64), slots)
    back_first = stage(card, blocks, 1 + width / 128, (together * 4 + 64 * size) * width / 1e6, 64 * width * 8)
    together, _, blocks = dealt(shape.samples, 1, math.ceil(shape.channels / 64), slots)
    parts = together * BRANCHES * units * slices
    trips = math.ceil(parts / 256 / 32) + BRANCHES * math.ceil(units / 128)
    back_second = stage(card, blocks, trips, (parts * 4 + 64 * BRANCHES * units * size) / 1e6, 64 * BRANCHES * units * 8)
    return {"transform": first + second, "transform_backward": back_first + back_second}
