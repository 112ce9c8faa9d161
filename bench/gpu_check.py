"""Everything that a machine with a GPU is needed for, in under nine minutes and without a network: `make gpu-check`.

    python bench/gpu_check.py [--out DIR] [--seconds 530] [--built] [--commit NAME] [--dry-run]

Builds the package for this GPU (unless it is --built), runs the tests on it, times the block and its kernels, and runs a small
set under compute-sanitizer. Writes gpu_check.json and gpu_check.txt to DIR (the environment variable OUT, or
bench/results/gpu). Every step has its time limit; one that fails does not keep the later ones from running. --dry-run needs
no GPU: it builds and tests nothing, times two tiny shapes on the CPU, and writes a report that says so.

Needed: torch >= 2.11 with CUDA, nvcc, ninja, pybind11, pytest and hypothesis.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 530  # seconds in all
TIMINGS = 0.3  # of them, for the timings
KEPT_LINES = 60  # of the output of a step
FORWARD_TARGET, BACKWARD_TARGET, LARGE = 1.7, 3.0, 50e6  # multiples of a device copy, for tensors above LARGE bytes


class Step(NamedTuple):
    """One command; it gets at most `limit` seconds. `missing` says why it cannot run here."""

    name: str
    command: list[str]
    limit: float
    environment: tuple[tuple[str, str], ...] = ()
    missing: str = ""


def environment(commit: str | None) -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "nvcc": output([shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc", "--version"]).splitlines()[-2:],
        "commit": commit or output(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]),
        "gpus": [],
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found["gpus"].append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_bytes": properties.total_memory,
                "l2_bytes": properties.L2_cache_size,
            }
        )
    query = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit"
    found["nvidia_smi"] = output(["nvidia-smi", query, "--format=csv,noheader"])
    return found


def output(command: list[str]) -> str:
    """What a command prints; empty when it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def plan(capability: str, folder: Path, dry: bool, seconds: float = BUDGET, built: bool = False) -> list[Step]:
    """The steps, in order; what they measure goes to timings.json and kernels.json in the folder."""
    python = sys.executable
    workers = ["-n", str(max(1, (os.cpu_count() or 1) - 2))] if importlib.util.find_spec("xdist") else []
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    no_sanitizer = "" if Path(sanitizer).exists() else "compute-sanitizer is not installed"
    small_set = [python, str(ROOT / "bench" / "gpu_small_set.py")]
    time_it = [python, str(ROOT / "bench" / "gpu_timing.py"), "--json", str(folder / "timings.json")]
    kernels = [python, str(ROOT / "bench" / "gpu_kernels.py"), "--json", str(folder / "kernels.json"), "--seconds", "30"]
    if dry:
        only_timing = "dry run"
        return [
            *(Step(name, [], 0, missing=only_timing) for name in ("build", "tests")),
            Step("kernels", [], 0, missing=only_timing),
            Step("timings", [*time_it, "--seconds", "60", "--dry-run"], 120),
            *(Step(name, [], 0, missing=only_timing) for name in ("memcheck", "racecheck")),
        ]
    build_for = (("TORCH_CUDA_ARCH_LIST", capability), ("GCNET_EXT_CUDA", "1"))
    here = (("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])),)
    one_thread = (*here, ("OMP_NUM_THREADS", "1"))  # in each of the workers
    timing_seconds = TIMINGS * seconds
    install = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
    selection = ["-m", "not slow", "-k", "cuda and not emulated"]
    tests = [python, "-m", "pytest", "-q", *selection, "-p", "no:cacheprovider", *workers, "tests"]
    checked = [sanitizer, "--error-exitcode", "1", "--launch-timeout", "60"]
    return [
        Step("build", install, 200, build_for, missing="--built" if built else ""),
        Step("tests", tests, 170, one_thread),
        Step("kernels", kernels, 60, here),
        Step("timings", [*time_it, "--seconds", f"{timing_seconds:.0f}"], timing_seconds + 20, here),
        Step("memcheck", [*checked, "--tool", "memcheck", *small_set], 90, here, no_sanitizer),
        Step("racecheck", [*checked, "--tool", "racecheck", *small_set], 90, here, no_sanitizer),
    ]


def run_step(step: Step, left: float) -> dict[str, Any]:
    """Runs it and tells how it went; its last lines are kept."""
    if step.missing:
        return {"name": step.name, "status": "skipped", "why": step.missing, "seconds": 0.0, "output": []}
    limit = min(step.limit, left)
    start = time.monotonic()
    if limit <= 1:
        return {"name": step.name, "status": "skipped", "why": "no time left", "seconds": 0.0, "output": []}
    try:
        done = subprocess.run(
            step.command,
            cwd=ROOT,
            env={**os.environ, **dict(step.environment)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit,
            check=False,
        )
        status, text = "passed" if done.returncode == 0 else f"failed with code {done.returncode}", done.stdout
    except subprocess.TimeoutExpired as expired:
        status, text = f"stopped after {limit:.0f} s", expired.stdout or b""
    except OSError as error:
        status, text = f"failed: {error}", b""
    kept = text.decode(errors="replace").replace(str(ROOT), ".").replace(sys.prefix, "(prefix)")  # no folder of this machine
    lines = kept.splitlines()[-KEPT_LINES:]
    return {"name": step.name, "status": status, "why": "", "seconds": time.monotonic() - start, "output": lines}


def multiple(row: dict[str, Any], name: str, direction: str, way: str) -> float | None:
    """How many device copies of x a candidate takes, both timed in the same way."""
    found = row["candidates"].get(name, {}).get(direction, {}).get(way)
    copy = row.get("copy", {}).get(way)
    return found / copy if found and copy else None


def targets(timings: dict[str, Any]) -> list[str]:
    """What misses its target, one sentence each."""
    missed = []
    for row in timings["rows"]:
        for direction, target in (("forward", FORWARD_TARGET), ("backward", BACKWARD_TARGET)):
            ours = multiple(row, "ours", direction, "graph_cold")
            if ours and ours > target and row["bytes"] > LARGE:
                missed.append(f"{row['row']}: {direction} takes {ours:.2f} copies, the target is {target}")
            rewrite = multiple(row, "compiled rewrite", direction, "graph_cold")
            if ours and rewrite and ours > rewrite:
                missed.append(f"{row['row']}: {direction} takes {ours:.2f} copies, the compiled rewrite {rewrite:.2f}")
    return missed


def table(timings: dict[str, Any], direction: str, way: str) -> list[str]:
    """Multiples of a device copy, a row per feature map and a column per candidate."""
    names = ["ours", "compiled rewrite", "eager", "compiled eager"]
    lines = [f"{direction}, {way.replace('_', ', ')}: copy in microseconds, the others in copies"]
    lines.append(f"{'':40}{'copy':>10}" + "".join(f"{name:>18}" for name in names))
    for row in timings["rows"]:
        copy = row.get("copy", {}).get(way)
        cells = [multiple(row, name, direction, way) for name in names]
        text = "".join(f"{'-' if cell is None else f'{cell:.2f}':>18}" for cell in cells)
        lines.append(f"{row['row']:40}{'-' if copy is None else f'{copy:.1f}':>10}{text}")
    return [*lines, ""]


def kernel_lines(rows: list[dict[str, Any]]) -> list[str]:
    """What a call is made of, by the profiler."""
    lines = ["kernels, cold, without the gaps between them: microseconds"] if rows else []
    for row in rows:
        for direction in ("forward", "backward"):
            each = {name.split("<")[0]: f["launches"] * f["microseconds"] for name, f in row[direction].items()}
            parts = " + ".join(f"{name} {microseconds:.1f}" for name, microseconds in each.items())
            copies = sum(each.values()) / row["copy"]
            lines.append(f"{row['row']:40}{direction:9}{sum(each.values()):8.1f} ={copies:6.2f} copies: {parts}")
    return [*lines, ""]


def errors_in(figures: dict[str, Any]) -> list[str]:
    """What went wrong with a candidate: all of it, or one way of calling it."""
    found = [text for key, text in figures.items() if key.endswith("error")]
    return found + [text for part in figures.values() if isinstance(part, dict) for text in errors_in(part)]


def report(results: dict[str, Any]) -> str:
    """The results in words."""
    lines = []
    if results["dry_run"]:
        lines += ["DRY RUN: nothing was built or tested, and the times are those of a CPU.", ""]
    lines += [f"{key}: {value}" for key, value in results["environment"].items()]
    lines += ["", f"{results['seconds']:.0f} s in all"]
    for step in results["steps"]:
        lines.append(f"  {step['name']:10} {step['status']:24} {step['seconds']:6.1f} s  {step['why']}")
    for step in results["steps"]:
        if step["output"] and (step["status"] != "passed" or step["name"] == "tests"):
            lines += ["", f"last lines of {step['name']}:", *(f"  {line}" for line in step["output"])]
    timings = results["timings"]
    lines += ["", *kernel_lines(results["kernels"])]
    if timings:
        for way in ("graph_cold", "graph_hot", "stream_cold", "stream_hot"):
            for direction in ("forward", "backward"):
                lines += table(timings, direction, way)
        lines += [f"not measured for want of time: {row}" for row in timings["left_out"]]
        for row in timings["rows"]:
            lines += [f"{row['row']}: {row['error']}"] if "error" in row else []
            for name, figures in row["candidates"].items():
                lines += [f"{row['row']}, {name}: {error}" for error in errors_in(figures)]
        missed = [] if results["dry_run"] else targets(timings)
        lines += ["", "targets: all met" if not missed else "targets missed:", *missed] if not results["dry_run"] else []
    return "\n".join(lines) + "\n"


def check(dry: bool, seconds: float, built: bool, commit: str | None, progress: Callable[[str], None]) -> dict[str, Any]:
    """Runs all steps and collects what they found."""
    start = time.monotonic()
    found = environment(commit)
    if not found["gpus"] and not dry:
        raise SystemExit("gpu_check: torch sees no GPU here; --dry-run exercises this script without one.")
    steps, measured = [], {"timings": None, "kernels": []}
    capability = found["gpus"][0]["capability"] if found["gpus"] else ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step in plan(capability, folder, dry, seconds, built):
            steps.append(run_step(step, seconds - (time.monotonic() - start)))
            progress(f"{step.name}: {steps[-1]['status']} {steps[-1]['why']}, {steps[-1]['seconds']:.1f} s")
        for path in folder.glob("*.json"):
            measured[path.stem] = json.loads(path.read_text())
    return {"dry_run": dry, "environment": found, "seconds": time.monotonic() - start, "steps": steps, **measured}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the reports; the default is $OUT, or bench/results/gpu")
    parser.add_argument(
        "--dry-run", action="store_true", help="without a GPU: times tiny shapes on the CPU, writes the reports"
    )
    parser.add_argument("--seconds", type=float, default=BUDGET, help="what all of it may take")
    parser.add_argument("--commit", help="what is measured, where git does not know")
    parser.add_argument("--built", action="store_true", help="the package is built already, where this Python finds it")
    arguments = parser.parse_args()
    out = arguments.out or Path(os.environ.get("OUT") or ROOT / "bench" / "results" / "gpu")
    results = check(
        arguments.dry_run,
        arguments.seconds,
        arguments.built,
        arguments.commit,
        lambda text: print(f"gpu_check: {text}", flush=True),
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu_check.json").write_text(json.dumps(results, indent=1))
    (out / "gpu_check.txt").write_text(report(results))
    print(report(results))
    return 0 if all(step["status"] in ("passed", "skipped") for step in results["steps"]) else 1


if __name__ == "__main__":
    sys.exit(main())
