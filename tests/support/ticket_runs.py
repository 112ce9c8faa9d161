"""Ticketed launches in the emulator: on GPUs of several sizes, with several lags, in several orders."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gcnet_ext._tuning import CudaTuning, cuda_tuning

TICKETS, ITEMS = CudaTuning(engine="tickets"), CudaTuning(engine="v2")


class Run(NamedTuple):
    multiprocessors: int
    lag: int
    schedule: str
    seed: int


RUNS = (Run(1, -1, "depth-first", 0), Run(2, 1, "round-robin", 2), Run(4, 9, "depth-first", 1), Run(2, 10**6, "round-robin", 0))


def assert_same_bits(monkeypatch: pytest.MonkeyPatch, call: Callable[[], list[Tensor]], runs: Iterable[Run] = RUNS) -> None:
    """Each run gives the bits of the launches of the second engine."""
    with cuda_tuning(ITEMS):
        expected = call()
    for run in runs:
        for name, value in (("MULTIPROCESSORS", run.multiprocessors), ("SCHEDULE", run.schedule), ("SEED", run.seed)):
            monkeypatch.setenv(f"GCNET_EMULATION_{name}", str(value))
        with cuda_tuning(CudaTuning(engine="tickets", lag=run.lag)):
            found = call()
        for index, (one, other) in enumerate(zip(expected, found, strict=True)):
            assert torch.equal(one, other), f"result {index}, {run}"
