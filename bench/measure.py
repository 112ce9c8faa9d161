"""What every benchmark shares: interleaved timings with their spread, memory, and a description of machine and build."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import collect_env
from torch.utils.benchmark import Measurement, TaskSpec, Timer

import gcnet_ext
from gcnet_ext import _load

ROOT = Path(__file__).resolve().parent.parent
# Freed memory stays in the heap: otherwise each large output is faulted in anew, which hides what is compared.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 33), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
LEAST_SECONDS = 2e-3  # of one timing: shorter calls are repeated

Call = Callable[[], Any]


def keep_memory() -> None:
    """Starts the script again with KEEP_MEMORY, which the C library reads when a process starts."""
    if not KEEP_MEMORY.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})


def output_file(text: str) -> Path:
    """An argument that names a file to write: what keeps it from being written is told before anything is measured."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"must be a file that can be written, got {text} ({error.strerror})") from error
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file that can be written, got the folder {text}")
    return path


def interleaved(candidates: dict[str, Call], rounds: int) -> dict[str, Measurement]:
    """Every round times each candidate once, in turn, so that a drifting machine hits them alike."""
    threads = torch.get_num_threads()
    timers = {name: Timer("run()", globals={"run": run}, num_threads=threads) for name, run in candidates.items()}
    repeats = {}
    for name, timer in timers.items():
        timer.timeit(2)  # compiles, allocates
        repeats[name] = max(1, round(LEAST_SECONDS / timer.timeit(1).mean))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds[name].append(timer.timeit(repeats[name]).mean * repeats[name])
    return {
        name: Measurement(
            number_per_run=repeats[name],
            raw_times=seconds[name],
            task_spec=TaskSpec(stmt="", setup="", description=name, num_threads=threads),
        )
        for name in candidates
    }


class Memory(NamedTuple):
    """Bytes beside the inputs: the most at once, and what forward leaves for backward."""

    peak: int
    saved: int


def peak_memory(call: Call) -> tuple[int, Any]:
    """The most bytes that torch's allocator had given out during the call, and what the call returned."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    current = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            current += event.nbytes()
            most = max(most, current)
    return most, result


def saved_memory(call: Callable[[], Tensor], given: list[Tensor]) -> int:
    """Bytes that autograd keeps for backward, but for the given tensors themselves."""
    saved: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        out = call()
    own = {tensor.untyped_storage().data_ptr() for tensor in given}
    del out
    return sum(size for pointer, size in saved.items() if pointer not in own)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def machine() -> dict[str, Any]:
    """Where, when and with what the figures were taken."""
    found = collect_env.get_env_info()
    changed = " and changes" if _git("status", "--porcelain", "--untracked-files=no") else ""
    of_processor = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in _lines(found.cpu_info))}
    return {
        "date": datetime.date.today().isoformat(),
        "processor": of_processor.get("Model name", platform.machine()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "second_level_cache": of_processor.get("L2 cache"),
        "gpu": found.nvidia_gpu_models,
        "driver": found.nvidia_driver_version,
        "system": f"{found.os}, {found.python_platform}",
        "python": found.python_version,
        "torch": found.torch_version,
        "packages": _lines(found.pip_packages),
        "gcnet_ext": gcnet_ext.__version__,
        "revision": _git("rev-parse", "HEAD") + changed,
        "build": None if _load.compiled is None else _load.compiled.build_info(),
        "capability": None if _load.compiled is None else _load.compiled.cpu_capability(),
    }


def _lines(text: str | None) -> list[str]:
    return (text or "").splitlines()
