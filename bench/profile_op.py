"""One op on one shape, again and again: for perf, callgrind or ncu; and its instruction counts, which no noise touches.

    python bench/profile_op.py global_context 8x256x56x56 --layout NHWC --direction train     runs for --seconds
    perf record python bench/profile_op.py ...      ncu python bench/profile_op.py ... --device cuda --seconds 0
    python bench/profile_op.py global_context 2x64x28x28 --count                              counts instructions
    python bench/profile_op.py --record                                   writes bench/results/instructions.json

Counting runs one call on one thread under valgrind's callgrind and adds up what this package's functions executed themselves;
Python and torch are left out. valgrind has no AVX-512, so it counts the AVX2 kernels. The compiler counts, too: the record says
which one it was, and tests/bench/test_bench.py holds the counts within 5 % of it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from candidates import FUSIONS, RATIO
from global_context import DTYPES, LAYOUTS, feature_map, runs

import gcnet_ext

HERE = Path(__file__).resolve().parent
RECORD = HERE / "results" / "instructions.json"
OPS = ("attention_pool", "channel_fuse", "global_context")
CAPABILITY = "avx2"
NAMESPACE = ("gcnet_ext::", "9gcnet_ext")  # The second is how it stands in the names that valgrind cannot demangle.
Case = tuple[str, str, str, str, str]
# What is recorded: both layouts and ways of cutting, small enough for valgrind
RECORDED: tuple[Case, ...] = (
    ("global_context", "2x64x32x32", "NCHW", "float32", "infer"),
    ("global_context", "2x64x32x32", "NCHW", "float32", "train"),
    ("global_context", "2x64x32x32", "NHWC", "float32", "infer"),
    ("global_context", "2x64x32x32", "NHWC", "float32", "train"),
    ("global_context", "2x64x32x32", "NHWC", "bfloat16", "train"),
    ("global_context", "1x64x80x80", "NCHW", "float32", "train"),
    ("attention_pool", "2x64x32x32", "NCHW", "float32", "infer"),
    ("channel_fuse", "2x64x32x32", "NHWC", "float32", "infer"),
)


def prepare(op: str, shape: str, layout: str, dtype: str, direction: str, device: str = "cpu") -> Callable[[], Any]:
    """The call, with everything that it needs made."""
    torch.manual_seed(0)
    x = feature_map(shape, layout, DTYPES[dtype]).to(device)
    channels = x.shape[1]
    if op == "global_context":
        module = gcnet_ext.GlobalContextBlock(channels, RATIO, fusion_types=FUSIONS["both"], device=device, dtype=x.dtype)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        return runs(module, x.clone().requires_grad_(), torch.randn_like(x))[direction]
    weight, scale = torch.randn(channels, device=device) / channels**0.5, torch.randn(x.shape[:2], device=device)
    call = {
        "attention_pool": lambda x: gcnet_ext.attention_pool(x, weight),
        "channel_fuse": lambda x: gcnet_ext.channel_fuse(x, scale, scale),
    }[op]
    if direction == "infer":
        return torch.no_grad()(lambda: call(x))
    leaf = x.clone().requires_grad_()
    grad = torch.randn_like(call(leaf))
    return lambda: torch.autograd.grad(call(leaf), leaf, grad)


class Turns:
    """The first call makes every one of the calls, to warm up; each one after that is another's turn."""

    def __init__(self, cases: tuple[Case, ...]) -> None:
        self.calls = [prepare(*case) for case in cases]
        self.turns = iter(self.calls)
        self.warm = False

    def __call__(self) -> None:
        for call in [next(self.turns)] if self.warm else self.calls:
            call()
        self.warm = True


COUNTED = """
import os, subprocess, sys
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
from profile_op import Turns
run = Turns({cases!r})
run()
subprocess.run(["vgdb", f"--pid={{os.getpid()}}", "instrumentation", "on"], check=True, stdout=subprocess.DEVNULL)
for _ in {cases!r}:
    torch._C._valgrind_toggle()
    run()
    torch._C._valgrind_toggle_and_dump_stats()
"""
"""Only from `instrumentation` on does valgrind look at every instruction. To do so from the start, as torch.utils.benchmark
does, takes four times as long, because the import of torch has far more of them than the calls."""


def count(cases: tuple[Case, ...]) -> list[dict[str, int]]:
    """Per case, the instructions of one call by function of this package, the most first. One start of valgrind for all."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind"
        options = ["--tool=callgrind", "--instr-atstart=no", "--collect-atstart=no", f"--callgrind-out-file={out}"]
        script = COUNTED.format(here=str(HERE), cases=cases)
        environment = {**os.environ, "GCNET_EXT_CPU_CAPABILITY": CAPABILITY}
        done = subprocess.run(
            ["valgrind", *options, sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"valgrind failed: {done.stderr[-3000:]}")
        return [functions_of(Path(f"{out}.{number}")) for number in range(1, len(cases) + 1)]


def functions_of(profile: Path) -> dict[str, int]:
    """The instructions of each function of this package in a file of callgrind, the most first."""
    command = ["callgrind_annotate", "--threshold=100", "--show-percs=no", str(profile)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts: dict[str, int] = {}
    for instructions, function in re.findall(r"^ *([\d,]+) +[^:\n]*:(.*?)(?: \[[^\]\n]*\])?$", told, re.MULTILINE):
        if any(space in function for space in NAMESPACE):
            counts[function] = counts.get(function, 0) + int(instructions.replace(",", ""))
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def compiler() -> str:
    """The first line of what the compiler says of itself: another one makes other code."""
    command = os.environ.get("CXX", "c++").split()[0]
    return subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def why_not() -> str:
    """Why nothing can be counted here; empty when it can."""
    for tool in ("valgrind", "vgdb", "callgrind_annotate"):
        if shutil.which(tool) is None:
            return f"{tool}, a part of valgrind, is not installed"
    if not torch._C._valgrind_supported_platform():
        return "this build of torch does not support valgrind"
    return ""


def record() -> None:
    counts = {" ".join(case): sum(found.values()) for case, found in zip(RECORDED, count(RECORDED), strict=True)}
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps({"compiler": compiler(), "capability": CAPABILITY, "instructions": counts}, indent=1) + "\n")
    print(RECORD.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=OPS, nargs="?", default="global_context")
    parser.add_argument("shape", nargs="?", default="8x256x56x56", help="NxCxHxW")
    parser.add_argument("--layout", choices=LAYOUTS, default="NCHW")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--direction", choices=("infer", "train"), default="infer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long; at least one call is made")
    parser.add_argument("--count", action="store_true", help="count instructions instead")
    parser.add_argument("--record", action="store_true", help="count all of RECORDED and write the record")
    arguments = parser.parse_args()
    if (arguments.count or arguments.record) and why_not():
        sys.exit(f"instructions cannot be counted: {why_not()}")
    if arguments.record:
        return record()
    case = arguments.op, arguments.shape, arguments.layout, arguments.dtype, arguments.direction
    if arguments.count:
        (found,) = count((case,))
        for name, instructions in list(found.items())[:20]:
            print(f"{instructions:>14,}  {name[:110]}")
        print(f"{sum(found.values()):>14,}  instructions of gcnet_ext in all, {CAPABILITY}, one thread")
        return None
    call, calls, start = prepare(*case, arguments.device), 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < arguments.seconds:
        call()
        calls += 1
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    print(f"{calls} calls, {(time.perf_counter() - start) / calls * 1e6:.0f} us each")
    return None


if __name__ == "__main__":
    main()
