"""Which kernels the block launches on a GPU, and how long each takes beside a device copy of x.

    python bench/gpu_kernels.py [--json FILE] [--seconds 60]

By torch.profiler, so the gaps between launches do not count; the second-level cache is overwritten before every call. Each
figure is the median of many calls, in microseconds.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from typing import Any

import torch
from gpu_timing import ROWS, Clock, Function, Row, make_modules
from measure import output_file
from torch.profiler import ProfilerActivity, profile

CALLS = 10
FLUSH = "unsigned char"  # in the name of the kernel that overwrites the cache, and in no other


def short_name(kernel: str) -> str:
    """Without return type, namespaces and the list of parameters."""
    return re.sub(r"^void |gcnet_ext::cuda::|\(anonymous namespace\)::|c10::", "", kernel).split("(")[0][:90]


def time_kernels(clock: Clock, call: Function) -> dict[str, dict[str, float]]:
    """Launches of a call and microseconds of one launch, by the name of the kernel."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    durations: dict[str, list[float]] = {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            clock.flush.add_(1)
            call()
        torch.cuda.synchronize()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and FLUSH not in event.name:
            durations.setdefault(short_name(event.name), []).append(event.device_time_total)
    return {
        name: {"launches": len(times) / CALLS, "microseconds": statistics.median(times)} for name, times in durations.items()
    }


def time_row(clock: Clock, row: Row) -> dict[str, Any]:
    """The kernels of both directions."""
    layout = torch.channels_last if row.channels_last else torch.contiguous_format
    x = torch.randn(row[:4], device=clock.device).to(getattr(torch, row.dtype)).contiguous(memory_format=layout)
    block = make_modules(row, clock.device)["ours"]
    leaf = x.clone().requires_grad_()
    out, grad, copy = block(leaf), torch.randn_like(x), torch.empty_like(x)
    inputs = [leaf, *block.parameters()]

    def forward() -> None:
        with torch.no_grad():
            block(x)

    return {
        "row": str(row),
        "copy": clock.median(lambda: copy.copy_(x), cold=True),
        "forward": time_kernels(clock, forward),
        "backward": time_kernels(clock, lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=output_file, help="where the figures go, too")
    parser.add_argument("--seconds", type=float, default=60, help="start no further measurement after this time")
    arguments = parser.parse_args()
    clock, end, results = Clock(dry=False), time.monotonic() + arguments.seconds, []
    for row in ROWS:
        if time.monotonic() > end:
            print(f"not measured for want of time: {row}")
            continue
        result = time_row(clock, row)
        results.append(result)
        if arguments.json:  # after every row, for the time may end
            arguments.json.write_text(json.dumps(results, indent=1))
        torch.cuda.empty_cache()
        print(f"{result['row']}: a copy takes {result['copy']:.1f} us")
        for direction in ("forward", "backward"):
            for name, figures in result[direction].items():
                microseconds, launches = figures["microseconds"], figures["launches"]
                copies = launches * microseconds / result["copy"]
                print(f"  {direction:9}{launches:3.0f} x{microseconds:8.1f} us {copies:6.2f} copies  {name}")


if __name__ == "__main__":
    main()
