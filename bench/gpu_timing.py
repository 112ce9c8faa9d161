"""Times the block on a GPU against a device copy of x, eager, torch.compile and the compile-friendly rewrite.

    python bench/gpu_timing.py --json FILE [--seconds 240] [--winners FILE] [--dry-run]
    python bench/gpu_timing.py --compile-only     compiles the peers into Inductor's cache, for a later call

Forward for inference and for training, backward, and both; one call at a time from Python ("stream") and as a replayed CUDA
graph ("graph"); with x as the last call left it in the caches ("hot") and with the second-level cache overwritten before every
call ("cold"). Each figure is the median of many calls, in microseconds, by CUDA events. "winner" is ours under the decisions
that gpu_ab.py found to be faster than the default, where it found some. What does not fit into the time is left out and said to
be; the file is written after every row, so that what was measured stays if the time ends.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import output_file
from peers import Eager, Rewrite
from torch import Tensor, nn

import gcnet_ext
from gcnet_ext._tuning import CudaTuning, cuda_tuning

FUSIONS = ("channel_mul", "channel_add")
RATIO = 1 / 16
ITERATIONS = 25
FLUSH_BYTES = 512 << 20  # several times the second-level cache of any GPU

Function = Callable[[], Any]


class Row(NamedTuple):
    """One feature map."""

    samples: int
    channels: int
    height: int
    width: int
    dtype: str
    channels_last: bool = False

    def __str__(self) -> str:
        sizes = "x".join(str(size) for size in self[:4])
        return f"{sizes} {self.dtype} {'channels_last' if self.channels_last else 'NCHW'}"


# The stages of a ResNet-50, of a detector and of a video network (its depth is part of the height here).
SIZES = (
    (1, 256, 56, 56), (8, 256, 56, 56), (64, 256, 56, 56),
    (64, 512, 28, 28),
    (64, 1024, 14, 14),
    (8, 2048, 7, 7), (64, 2048, 7, 7),
    (1, 1024, 50, 84), (8, 1024, 50, 84),
    (1, 512, 100, 168), (8, 512, 100, 168),
    (64, 1024, 56, 14), (8, 1024, 896, 28),
)  # fmt: skip
ROWS = (
    *(Row(*sizes, dtype="float16") for sizes in SIZES),
    *(Row(*sizes, dtype="float32") for sizes in SIZES[2:-1]),
    *(Row(*sizes, dtype="float16", channels_last=True) for sizes in (SIZES[2], SIZES[4], SIZES[8])),
    Row(*SIZES[8], dtype="bfloat16"),
)
DRY_ROWS = (Row(2, 16, 6, 7, "float32"), Row(2, 16, 6, 7, "float32", channels_last=True))


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


class Clock:
    """Times calls on a GPU; in a dry run, on the CPU, only to exercise everything around it."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.flush = torch.empty(1 if dry else FLUSH_BYTES, dtype=torch.uint8, device=self.device)

    def median(self, call: Function, *, cold: bool, calls: int = ITERATIONS) -> float:
        """Microseconds of one call, the median of so many."""
        for _ in range(3):
            call()
        if self.dry:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e6
        torch.cuda.synchronize()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        for start, end in events:
            if cold:
                self.flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) * 1e3 for start, end in events)

    def graph(self, call: Function) -> Function:
        """The call as a CUDA graph; captured on the current stream, or on one of its own when that is the default stream."""
        if self.dry:
            return call
        stream = torch.cuda.current_stream()
        if stream == torch.cuda.default_stream():
            stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept = call()
        return lambda: (graph.replay(), kept)

    def every_way(self, call: Function) -> dict[str, Any]:
        """Stream and graph, hot and cold; an error instead of the figures of a way that does not work."""

        def hot_and_cold(way: str, prepare: Callable[[Function], Function]) -> dict[str, Any]:
            try:
                prepared = prepare(call)
                return {f"{way}_{state}": self.median(prepared, cold=state == "cold") for state in ("hot", "cold")}
            except Exception as error:
                return {f"{way}_error": describe(error)}

        return {**hot_and_cold("stream", lambda call: call), **hot_and_cold("graph", self.graph)}


Tunings = dict[str, CudaTuning]  # of "forward", which is inference, and of "both", which is training


def time_module(clock: Clock, module: nn.Module, x: Tensor, grad: Tensor, tunings: Tunings) -> dict[str, Any]:
    """Forward without gradients and with what backward needs, backward alone, and both."""
    infer, train = (cuda_tuning(tunings[name]) if name in tunings else nullcontext() for name in ("forward", "both"))

    def forward() -> Tensor:
        with torch.no_grad():
            return module(x)

    def training_forward() -> Tensor:
        return module(leaf)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(leaf), inputs, grad)

    leaf = x.clone().requires_grad_()
    inputs = [leaf, *module.parameters()]

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, grad, retain_graph=True)

    figures = {}
    with infer:
        figures["forward"] = clock.every_way(forward)
    with train:
        figures["training forward"] = clock.every_way(training_forward)
        # The backward pass runs on the stream of the forward pass; a graph captures it only there.
        stream = None if clock.dry else torch.cuda.Stream()
        with torch.cuda.stream(stream):
            out = module(leaf)
        if not clock.dry:
            torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            figures["backward"] = clock.every_way(backward)
            figures["both"] = clock.every_way(both)
    return figures


def make_modules(row: Row, device: torch.device) -> dict[str, nn.Module]:
    """The candidates in the order in which they are timed; the first two compute the same."""
    torch.manual_seed(0)
    dtype = getattr(torch, row.dtype)
    ours = gcnet_ext.GlobalContextBlock(row.channels, ratio=RATIO, fusion_types=FUSIONS)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.1)
    eager = Eager(row.channels, ours.planes, FUSIONS)
    eager.load_state_dict(ours.state_dict())
    rewrite = Rewrite(row.channels, ours.planes, FUSIONS)
    modules = {"ours": ours, "eager": eager, "compiled rewrite": rewrite, "compiled eager": eager}
    made = {name: module.to(device, dtype) for name, module in modules.items()}
    return {**made, "winner": made["ours"]}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def time_row(clock: Clock, row: Row, names: tuple[str, ...], result: dict[str, Any], tunings: Tunings) -> None:
    """Adds the figures of these candidates to the result."""
    dtype = getattr(torch, row.dtype)
    layout = torch.channels_last if row.channels_last else torch.contiguous_format
    x = torch.randn(row[:4], device=clock.device).to(dtype).contiguous(memory_format=layout)
    grad, copy = torch.randn_like(x), torch.empty_like(x)
    modules = make_modules(row, clock.device)
    if "copy" in names:
        result["bytes"] = x.numel() * x.element_size()
        result["copy"] = clock.every_way(lambda: copy.copy_(x))
        with torch.no_grad():
            result["error_to_eager"] = relative_error(modules["ours"](x), modules["eager"](x))
    for name in names:
        if name == "copy":
            continue
        module = modules[name]
        if name.startswith("compiled"):
            torch._dynamo.reset()
            module = torch.compile(module, backend="eager" if clock.dry else "inductor")
        try:
            result["candidates"][name] = time_module(clock, module, x, grad, tunings if name == "winner" else {})
        except Exception as error:
            result["candidates"][name] = {"error": describe(error)}


def compile_peers() -> None:
    """Compiles the peers for every row, forward and backward, into Inductor's cache on the disk."""
    device = torch.device("cuda")
    for name in ("compiled rewrite", "compiled eager"):
        for row in ROWS:
            torch._dynamo.reset()
            layout = torch.channels_last if row.channels_last else torch.contiguous_format
            x = torch.randn(row[:4], device=device).to(getattr(torch, row.dtype)).contiguous(memory_format=layout)
            module = torch.compile(make_modules(row, device)[name])
            with torch.no_grad():
                module(x)
            module(x.requires_grad_()).sum().backward()
            torch.cuda.empty_cache()
            print(f"{row}: {name}", flush=True)


def read_winners(path: Path | None) -> dict[str, Tunings]:
    """The decisions that gpu_ab.py found to be faster than the default, by row and direction."""
    found: dict[str, Tunings] = {}
    for each in json.loads(path.read_text())["winners"] if path and path.exists() else []:
        if any(each["winner"].values()):
            found.setdefault(each["row"], {})[each["direction"]] = CudaTuning(**each["winner"])
    return found


def measure(seconds: float, dry: bool, path: Path, winners: Path | None) -> None:
    """All rows, what matters most first, until the time is up; writes the file after each."""
    clock = Clock(dry)
    end = time.monotonic() + seconds
    rows = DRY_ROWS if dry else ROWS
    results: dict[Row, dict[str, Any]] = {row: {"row": str(row), "candidates": {}} for row in rows}
    left_out: list[str] = []
    tuned = {} if dry else read_winners(winners)

    def write() -> None:
        found = {"dry_run": dry, "unit": "microseconds", "left_out": left_out, "rows": list(results.values())}
        path.write_text(json.dumps(found, indent=1))

    write()
    for names in (("copy", "ours"), ("winner",), ("compiled rewrite",), ("eager",), ("compiled eager",)):
        for row in rows:
            if names == ("winner",) and str(row) not in tuned and not dry:
                continue  # the default is the winner
            if time.monotonic() > end:
                left_out.append(f"{row}: {', '.join(names)}")
                continue
            try:
                time_row(clock, row, names, results[row], tuned.get(str(row), {}))
            except Exception as error:  # a GPU with too little memory for this row
                results[row]["error"] = describe(error)
            write()
            print(f"{row}: {', '.join(names)}", flush=True)
            if not dry:
                torch.cuda.empty_cache()
    write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=output_file, help="where the figures go")
    parser.add_argument("--compile-only", action="store_true", help="time nothing, compile the peers into Inductor's cache")
    parser.add_argument("--winners", type=Path, help="what gpu_ab.py wrote")
    parser.add_argument("--seconds", type=float, default=240, help="start no further measurement after this time")
    parser.add_argument("--dry-run", action="store_true", help="two tiny shapes on the CPU: no figures of a GPU")
    arguments = parser.parse_args()
    if arguments.compile_only:
        compile_peers()
    elif arguments.json is None:
        parser.error("--json must name a file")
    else:
        measure(arguments.seconds, arguments.dry_run, arguments.json, arguments.winners)


if __name__ == "__main__":
    main()
