"""The Global Context block on the CPU, in multiples of x.clone(): ours beside what a user would run instead.

    python bench/global_context.py [--dtype bfloat16] [--fusion add|mul|both] [--threads N] [--rounds 11] [--no-compile]

Candidates: ours; eager, the block as every Python implementation writes it; compile, torch.compile of that; rewrite,
torch.compile of the same maths without a convolution, which compiles better. Every result is compared with eager's in float64
before it is timed. A round times every candidate once, in turn, so that a drifting machine hits them alike; a figure is the
fastest round.

Freed memory is kept in the heap (MALLOC_TRIM_THRESHOLD_, set here), so that kernels are compared and not page faults.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable

import torch
from peers import Eager, Rewrite
from torch import Tensor, nn

import gcnet_ext

KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 33), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
SHAPES = ("16x64x32x32", "8x256x56x56", "8x512x28x28", "8x1024x14x14", "8x2048x7x7", "1x1024x50x84", "1x512x100x168")
FUSIONS = {"add": ("channel_add",), "mul": ("channel_mul",), "both": ("channel_mul", "channel_add")}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def make_modules(channels: int, fusions: tuple[str, ...], dtype: torch.dtype, compiled: bool) -> dict[str, nn.Module]:
    """The candidates; ours and eager share their weights, every one of them random."""
    units = channels // 16
    ours, eager = gcnet_ext.GlobalContextBlock(channels, 1 / 16, fusion_types=fusions), Eager(channels, units, fusions)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.1)
    eager.load_state_dict(ours.state_dict())
    modules = {"ours": ours, "eager": eager}
    if compiled:
        torch._dynamo.reset()
        modules["compiled ours"] = torch.compile(ours)
        modules["compile"] = torch.compile(Eager(channels, units, fusions))
        modules["rewrite"] = torch.compile(Rewrite(channels, units, fusions))
    return {name: module.to(dtype) for name, module in modules.items()}


def check(modules: dict[str, nn.Module], x: Tensor) -> None:
    """Ours against eager in float64; refuses to time a wrong result."""
    with torch.no_grad():
        ours = modules["ours"](x).double()
        error = float((ours - modules["eager"].double()(x.double())).norm() / x.double().norm())
    modules["eager"].to(x.dtype)
    if not error < TOLERANCE[x.dtype]:
        raise SystemExit(f"wrong result for {tuple(x.shape)}: relative error {error:.2e}")


def fastest(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest round of each."""
    for run in candidates.values():
        for _ in range(3):
            run()
    best = dict.fromkeys(candidates, math.inf)
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def measure(x: Tensor, modules: dict[str, nn.Module], rounds: int) -> dict[str, dict[str, float]]:
    """Multiples of x.clone() per direction and candidate."""
    grad, leaf = torch.randn_like(x), x.clone().requires_grad_()

    def infer(module: nn.Module) -> Callable[[], object]:
        return torch.no_grad()(lambda: module(x))

    def train(module: nn.Module) -> Callable[[], object]:
        def step() -> None:
            module(leaf).backward(grad)
            leaf.grad = None

        return step

    figures = {}
    for direction, wrap in (("infer", infer), ("train", train)):
        seconds = fastest({"clone": x.clone, **{name: wrap(module) for name, module in modules.items()}}, rounds)
        figures[direction] = {name: seconds[name] / seconds["clone"] for name in modules}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="NxCxHxW, separated by commas")
    parser.add_argument("--fusion", choices=FUSIONS, default="both")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes most of the time")
    arguments = parser.parse_args()
    if not KEEP_MEMORY.keys() <= os.environ.keys():  # the C library reads them when the process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    torch.set_num_threads(arguments.threads)
    torch._dynamo.config.recompile_limit = 256
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    print(
        f"torch {torch.__version__}, {arguments.threads} threads, {arguments.dtype}, {arguments.fusion}; multiples of x.clone()"
    )
    rows = []
    for shape in arguments.shapes.split(","):
        sizes = [int(size) for size in shape.split("x")]
        for layout, memory_format in LAYOUTS.items():
            x = torch.randn(sizes).to(dtype).contiguous(memory_format=memory_format)
            modules = make_modules(sizes[1], FUSIONS[arguments.fusion], dtype, not arguments.no_compile)
            check(modules, x)
            rows.append(measure(x, modules, arguments.rounds))
            cells = [
                f"{direction}  " + "  ".join(f"{name} {multiple:5.1f}" for name, multiple in figures.items())
                for direction, figures in rows[-1].items()
            ]
            print(f"{shape:>14} {layout}  " + " | ".join(cells), flush=True)
    for direction in ("infer", "train"):
        for name in rows[0][direction]:
            mean = math.exp(sum(math.log(row[direction][name]) for row in rows) / len(rows))
            print(f"geometric mean  {direction}  {name:8} {mean:5.2f}")


if __name__ == "__main__":
    main()
