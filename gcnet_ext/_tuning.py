"""Lets a thread override decisions of the CUDA plan functions, so that one build can be compared with itself on a GPU.

    with cuda_tuning(CudaTuning(splits=32)):
        out = block(x)
    out.backward(grad)  # follows the same decisions, in whichever thread it runs

A CUDA graph keeps the decisions under which it was captured. A graph of torch.compile follows those of the thread that runs it,
and its backward pass those of autograd's thread, where there are none.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import threading
from collections.abc import Iterator

ENGINES = ("", "v1", "v2", "tickets")
"""The CUDA engines, each at its number in csrc/plan_cuda.h."""


@dataclasses.dataclass(frozen=True)
class CudaTuning:
    """The decisions, as csrc/plan_cuda.h has them; 0, False or "" leaves one to the plan functions.

    Each choice computes the same but for the last bits.

    Args:
        streamed: the pool reads each tile twice, the second time from the caches, instead of keeping it in registers.
        larger_tile: how many sizes larger a tile of rows is than the smallest that holds all channels; the largest at most.
        splits: the most blocks that share a sample's pool or its channels_last sums, 1 to 64, or 256 in the second engine.
        row_lanes: lanes per row of the sums over an NCHW map: a power of two, 1 to 256.
        transform: 1: the last block of a sample computes it, if its shared memory is enough; 2: launches of its own do.
        engine: "v2": maps are walked by items, and the transform runs in stages that many blocks share, where these fit. "v1":
            neither. "tickets": as "v2", and where that fits, one launch has all stages of a direction, so that the last stage
            of a sample finds the map in the second-level cache. The default, "", is "v1" until a run on a GPU has shown the
            others right and faster.
        lag: with tickets, how many items of its first stage the last stage of a sample stays behind; -1 for none.
        cluster: with tickets, the most blocks that share a tile, 1 or 2; 2 needs sm_90 or sm_100.
        hints: with tickets, 1 if the kernels do not tell the caches what is not needed again.

    Raises:
        ValueError: a decision is none of these.
    """

    streamed: bool = False
    larger_tile: int = 0
    splits: int = 0
    row_lanes: int = 0
    transform: int = 0
    engine: str = ""
    lag: int = 0
    cluster: int = 0
    hints: int = 0

    def __post_init__(self) -> None:
        rules = {
            "larger_tile": (self.larger_tile in range(5), "0 to 4"),
            "splits": (self.splits in range(257), "0 to 256"),
            "row_lanes": (self.row_lanes in (0, *(2**i for i in range(9))), "0 or a power of two up to 256"),
            "transform": (self.transform in (0, 1, 2), "0, 1 or 2"),
            "engine": (self.engine in ENGINES, "'v1', 'v2', 'tickets' or ''"),
            "lag": (self.lag >= -1, "-1 or more"),
            "cluster": (self.cluster in (0, 1, 2), "0, 1 or 2"),
            "hints": (self.hints in (0, 1), "0 or 1"),
        }
        for name, (holds, wanted) in rules.items():
            if not holds:
                raise ValueError(f"CudaTuning: {name} must be {wanted}, got {getattr(self, name)!r}")

    def numbers(self) -> list[int]:
        """In the order of csrc/plan_cuda.h."""
        values = dataclasses.asdict(self) | {"engine": ENGINES.index(self.engine)}
        return [int(value) for value in values.values()]


class _Thread(threading.local):
    decided = CudaTuning()


_thread = _Thread()
library: ctypes.CDLL | None = None
"""The library of the CUDA kernels, for which the decisions are made; _load.py loads it."""


def decided() -> CudaTuning:
    """The decisions of this thread."""
    return _thread.decided


@contextlib.contextmanager
def cuda_tuning(tuning: CudaTuning) -> Iterator[None]:
    """While this lasts, the CUDA kernels that this thread calls follow these decisions, and their backward passes later on.

    Raises:
        RuntimeError: there are no CUDA kernels.
    """
    before = _thread.decided
    _tell(tuning)
    try:
        yield
    finally:
        _tell(before)


def _tell(tuning: CudaTuning) -> None:
    if library is None:
        raise RuntimeError("cuda_tuning needs the CUDA kernels, which are not loaded; `python -m gcnet_ext` says why")
    numbers = tuning.numbers()
    library.gcnet_ext_cuda_tuning((ctypes.c_int64 * len(numbers))(*numbers))
    _thread.decided = tuning
