"""How long the sweeps of the second CUDA engine take (csrc/cuda/items.cuh), by a model of blocks that copy what they need next
while they work on what they have.

No run has measured them: the constants are not fitted. They are what memory, launches and the loops of the first engine are
known to take on these GPUs. bench/gpu_model.py prints the predictions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from gpu_stages import FROM_L2, LANES, STAGE_LAUNCH, TRIP

if TYPE_CHECKING:
    from gpu_model import Card, Shape

BLOCK_RATE = FROM_L2  # MB/us of copies that one block has under way
MULTIPROCESSOR_RATE = 0.095  # of all its blocks
BARRIERS = 0.4  # us of an item in which its block neither moves nor computes
ISSUED = 0.6  # of the instructions that a multiprocessor could start
PIECE = 16384  # bytes of an item of the fusion: 256 threads with four accesses of 16 bytes
SWEEP_BLOCKS = 3  # on a multiprocessor, of the fusion, the sums and the flat stages
L2, L2_RATE = 30.0, 2.0  # MB of a map that a sweep finds in the cache after another one, and how much faster
# Instructions of a lane for one element of 16 bits. In float32 nothing is widened or rounded.
PER_ELEMENT = {"pool": 6.0, "position_sums": 3.5, "fuse": 3.0, "sums": 5.0, "dx": 10.0}
OF_FLOAT32 = 0.75


class Sweep(NamedTuple):
    """A launch that goes through maps once."""

    items: int  # what a block works on at a time
    blocks: int  # on a multiprocessor
    elements: float  # of one map
    loaded: float  # MB that are copied
    cached: float  # MB of those that are in the L2 cache
    stored: float  # MB
    instructions: float  # of a lane, for each element

    def microseconds(self, card: Card) -> float:
        slots = card.multiprocessors * self.blocks
        running = min(self.items, slots)
        rounds = math.ceil(self.items / slots)
        each = math.ceil(running / card.multiprocessors)
        # Of one round: what memory takes, what the blocks can have under way, and what a multiprocessor computes.
        memory = (self.loaded - self.cached * (1 - 1 / L2_RATE) + self.stored) / card.copy * running / self.items
        copies = self.loaded / self.items / min(BLOCK_RATE, MULTIPROCESSOR_RATE / each)
        computing = each * self.elements / self.items * self.instructions / LANES / ISSUED / (card.clock * 1e3)
        steady = max(memory, copies, computing) + BARRIERS / each
        # The first item waits for its copies, and behind the last one's computation nothing is under way.
        return STAGE_LAUNCH + TRIP + rounds * steady + min(max(memory, copies), computing)


def sweeps(shape: Shape, card: Card) -> dict[str, float]:
    """Microseconds of the pool, the fusion, the sums and dx by the second engine, for maps that it takes."""
    plan = shape.plan(engine="v2")
    narrow = OF_FLOAT32 if shape.dtype == "float32" else 1.0
    lanes = {name: narrow * count for name, count in PER_ELEMENT.items()}
    whole = shape.megabytes
    cached = min(whole, L2)
    elements = whole * 1e6 / shape.element_size
    pieces = math.ceil(whole * 1e6 / PIECE)

    def sweep(items: int, blocks: int, kernel: str, maps: int, *, found: float = 0.0, stored: bool = False) -> float:
        made = Sweep(items, blocks, elements, maps * whole, found, whole if stored else 0.0, lanes[kernel])
        return made.microseconds(card)

    fuse = sweep(pieces, SWEEP_BLOCKS, "fuse", 1, found=cached, stored=True)
    if plan["path"] == "flat":
        flat = shape.samples * plan["flat_pieces"]
        position_sums = sweep(flat, SWEEP_BLOCKS, "position_sums", 1)
        again = sweep(flat, SWEEP_BLOCKS, "position_sums", 1, found=cached)
        return {
            "pool": position_sums + again,
            "fuse": fuse,
            "sums": sweep(flat, SWEEP_BLOCKS, "sums", 2),
            # u, from what is left of x in the cache, and then dx from g and x.
            "dx": sweep(flat, SWEEP_BLOCKS, "position_sums", 1, found=cached / 2)
            + sweep(flat, SWEEP_BLOCKS, "dx", 2, found=cached, stored=True),
        }
    blocks = max(1, 512 // plan["threads"])
    backward = max(1, 512 // plan["backward_threads"])
    sums = shape.samples * plan["sums_channel_groups"] * plan["sums_splits"]
    return {
        "pool": sweep(shape.samples * plan["splits"], blocks, "pool", 1),
        "fuse": fuse,
        "sums": sweep(sums, SWEEP_BLOCKS, "sums", 2),
        "dx": sweep(shape.samples * plan["backward_splits"], backward, "dx", 2, stored=True),
    }
