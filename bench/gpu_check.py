"""Everything that a machine with a GPU is needed for, in at most 400 seconds and without a network: `make gpu-check`.

    python bench/gpu_check.py [--out DIR] [--seconds 400] [--built] [--only STEP,STEP] [--commit NAME] [--dry-run]

Builds the package for this GPU (unless it is --built and runs), measures what the GPU gives (probes), runs the tests that are
chosen for a GPU while the peers are compiled, calls the kernels whose blocks wait for each other a few thousand times (soak),
compares what a caller can decide in the place of the plans (ab), times the block and its kernels, counts the bytes of some
launches, runs a small set under compute-sanitizer, and times the CPU of the machine.
Every step is killed at its limit, and one that fails does not keep the later ones from running.

After every step gpu_check.json and gpu_check.txt are written to DIR (the environment variable OUT, or bench/results/gpu), and
every step writes what it has measured there at once, so that nothing is lost if the machine is. --dry-run needs no GPU: it
tests nothing, times two tiny shapes on the CPU, and writes a report that says so.

Needed: torch >= 2.11 with CUDA, nvcc, ninja, pybind11, pytest and hypothesis.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 400  # seconds in all
WORKERS = 14  # of the tests; two more compile what they are timed beside
MEASURED = ("probes", "winners", "timings", "kernels", "scaling")  # files that steps write, beside gpu_check.json and .txt
KEPT_LINES = 60  # of the output of a step
FORWARD_TARGET, BACKWARD_TARGET, LARGE = 1.7, 3.0, 50e6  # multiples of a device copy, for tensors above LARGE bytes


class Step(NamedTuple):
    """One command; it gets at most `limit` seconds. `missing` says why it cannot run here."""

    name: str
    command: list[str]
    limit: float
    environment: tuple[tuple[str, str], ...] = ()
    missing: str = ""
    meanwhile: tuple[str, ...] = ()
    """Another command that runs as long as this one does; nobody waits for it."""


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


def plan(capability: str, folder: Path, cache: Path, dry: bool, built: bool = False) -> list[Step]:
    """The steps, in the order of what they are worth; what they measure goes to a file of their name in the folder.

    The cache is a folder for what Inductor compiles.
    """
    python = sys.executable
    parallel = ["-n", str(min(WORKERS, max(1, (os.cpu_count() or 1) - 2)))] if importlib.util.find_spec("xdist") else []
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    no_sanitizer = "" if Path(sanitizer).exists() else "compute-sanitizer is not installed"
    profiler = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    no_profiler = "" if Path(profiler).exists() else "ncu is not installed"
    timing = [python, str(ROOT / "bench" / "gpu_timing.py")]
    ab = [python, str(ROOT / "bench" / "gpu_ab.py"), "--json", str(folder / "winners.json")]
    winners = ["--winners", str(folder / "winners.json")]
    scaling = [python, str(ROOT / "bench" / "scaling.py"), "--quick", "--json", str(folder / "scaling.json")]
    if dry:
        without = "dry run"
        return [
            *(Step(name, [], 0, missing=without) for name in ("import", "build", "probes", "tests", "soak")),
            Step("ab", [*ab, "--seconds", "20", "--dry-run"], 60),
            Step("timings", [*timing, *winners, "--json", str(folder / "timings.json"), "--seconds", "60", "--dry-run"], 120),
            *(Step(name, [], 0, missing=without) for name in ("kernels", "bytes", "memcheck", "racecheck", "synccheck")),
            Step("scaling", [*scaling, "--rounds", "1"], 120),
        ]
    build_for = (("TORCH_CUDA_ARCH_LIST", capability), ("GCNET_EXT_CUDA", "1"))
    here = (
        ("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])),
        ("TORCHINDUCTOR_CACHE_DIR", str(cache)),
    )
    one_thread = (*here, ("OMP_NUM_THREADS", "1"))  # in each of the workers
    small_set = [python, str(ROOT / "bench" / "gpu_small_set.py")]
    install = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
    tests = [python, "-m", "pytest", "-q", "-m", "gpu_window", "-p", "no:cacheprovider", *parallel, "tests"]
    kernels = [python, str(ROOT / "bench" / "gpu_kernels.py"), "--json", str(folder / "kernels.json"), "--seconds", "18"]
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    no_compiler = "" if Path(nvcc).exists() else "nvcc is not installed"
    compiled = [nvcc, "-O3", "-std=c++17", f"-arch=sm_{capability.replace('.', '')}", "-o", str(cache / "gpu_probe"), "--run"]
    probes = [*compiled, "--run-args", str(folder / "probes.json"), str(ROOT / "bench" / "gpu_probe.cu")]
    checked = [sanitizer, "--error-exitcode", "1", "--launch-timeout", "60"]
    counted = "dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum"
    one_call = [python, str(ROOT / "bench" / "profile_op.py"), "global_context", "64x256x56x56", "--dtype", "float16"]
    bytes_of = [profiler, "--clock-control", "none", "--csv", "--metrics", counted, "--launch-count", "6"]
    kernels_of = ["--kernel-name", "regex:attention_pool|fuse_|sums_|transform|parameter"]
    once = ["--direction", "train", "--device", "cuda", "--seconds", "0"]
    return [
        Step("import", small_set, 20, here),
        Step("build", install, 110, build_for, missing="--built" if built else ""),
        Step("probes", probes, 25, here, no_compiler),
        Step("tests", tests, 65, one_thread, meanwhile=(*timing, "--compile-only")),
        Step("soak", [python, str(ROOT / "bench" / "gpu_soak.py")], 20, here),
        Step("ab", [*ab, "--seconds", "55"], 60, here),
        Step("timings", [*timing, *winners, "--json", str(folder / "timings.json"), "--seconds", "75"], 82, here),
        Step("kernels", kernels, 24, here),
        Step("bytes", [*bytes_of, *kernels_of, *one_call, *once], 24, here, no_profiler),
        Step("memcheck", [*checked, "--tool", "memcheck", *small_set], 12, here, no_sanitizer),
        Step("racecheck", [*checked, "--tool", "racecheck", *small_set], 36, here, no_sanitizer),
        Step("synccheck", [*checked, "--tool", "synccheck", *small_set], 12, here, no_sanitizer),
        Step("scaling", scaling, 20, here),
    ]


def killed(process: subprocess.Popen) -> bytes:
    """What the process has printed; it and all that it has started are gone then."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0] or b""


def started(command: Sequence[str], environment: tuple[tuple[str, str], ...], output: int) -> subprocess.Popen:
    """The command, with what it starts in a group of their own."""
    variables = {**os.environ, **dict(environment)}
    return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def run_step(step: Step, left: float) -> dict[str, Any]:
    """Runs it and tells how it went; its last lines are kept."""
    if step.missing:
        return {"name": step.name, "status": "skipped", "why": step.missing, "seconds": 0.0, "output": []}
    limit = min(step.limit, left)
    start = time.monotonic()
    if limit <= 1:
        return {"name": step.name, "status": "skipped", "why": "no time left", "seconds": 0.0, "output": []}
    beside = None
    try:
        process = started(step.command, step.environment, subprocess.PIPE)
        beside = started(step.meanwhile, step.environment, subprocess.DEVNULL) if step.meanwhile else None
        try:
            text, _ = process.communicate(timeout=limit)
            status = "passed" if process.returncode == 0 else f"failed with code {process.returncode}"
        except subprocess.TimeoutExpired:
            status, text = f"stopped after {limit:.0f} s", killed(process)
    except OSError as error:
        status, text = f"failed: {error}", b""
    finally:
        if beside is not None:
            killed(beside)
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
    names = ["ours", "winner", "compiled rewrite", "eager", "compiled eager"]
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


def probe_lines(probes: dict[str, float]) -> list[str]:
    """What the GPU gives."""
    return [*(["probes:"] if probes else []), *(f"{name:60}{value:10.4g}" for name, value in probes.items()), ""]


def winner_lines(found: dict[str, Any]) -> list[str]:
    """Which decisions are faster than the plans' own."""
    lines = ["winners, in microseconds of a graph with cold caches"]
    for each in found["winners"]:
        decisions = ", ".join(f"{name}={value}" for name, value in each["winner"].items() if value) or "default"
        figures = f"{each['microseconds']:8.1f}, default {each['default']:8.1f}, {each['tried']} tried"
        lines.append(f"{each['row']:40}{each['direction']:9}{figures}: {decisions}")
    return [*lines, *(f"not compared: {row}" for row in found["left_out"]), ""]


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
    lines += ["", *probe_lines(results["probes"] or {}), *(winner_lines(results["winners"]) if results["winners"] else [])]
    lines += ["", *kernel_lines(results["kernels"] or [])]
    if timings:
        for way in ("graph_cold", "graph_hot", "stream_cold", "stream_hot"):
            for direction in ("forward", "training forward", "backward", "both"):
                lines += table(timings, direction, way)
        lines += [f"not measured for want of time: {row}" for row in timings["left_out"]]
        for row in timings["rows"]:
            lines += [f"{row['row']}: {row['error']}"] if "error" in row else []
            for name, figures in row["candidates"].items():
                lines += [f"{row['row']}, {name}: {error}" for error in errors_in(figures)]
        missed = [] if results["dry_run"] else targets(timings)
        lines += ["", "targets: all met" if not missed else "targets missed:", *missed] if not results["dry_run"] else []
    return "\n".join(lines) + "\n"


def chosen(step: Step, only: Sequence[str], done: list[dict[str, Any]]) -> Step:
    """The step as it is to be run after these: not if others are wanted, and a build if what was brought along does not run."""
    if only and step.name not in only:
        return step._replace(missing="not in --only")
    broken = any(each["name"] == "import" and each["status"] not in ("passed", "skipped") for each in done)
    return step._replace(missing="") if step.missing == "--built" and broken else step


def read(path: Path) -> Any:
    """What a step has written; None if it wrote nothing, or was killed while it did."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def check(
    out: Path, dry: bool, seconds: float, built: bool, only: Sequence[str], commit: str | None, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Runs the steps; after each one the reports in the folder hold what has been found so far."""
    start = time.monotonic()
    found = environment(commit)
    if not found["gpus"] and not dry:
        raise SystemExit("gpu_check: torch sees no GPU here; --dry-run exercises this script without one.")
    capability = found["gpus"][0]["capability"] if found["gpus"] else ""
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"dry_run": dry, "environment": found, "seconds": 0.0, "steps": []}
    with tempfile.TemporaryDirectory() as cache:
        for step in plan(capability, out.resolve(), Path(cache), dry, built):
            done = run_step(chosen(step, only, results["steps"]), seconds - (time.monotonic() - start))
            results["steps"].append(done)
            progress(f"{step.name}: {done['status']} {done['why']}, {done['seconds']:.1f} s")
            for measured in MEASURED:
                results[measured] = read(out / f"{measured}.json")
            results["seconds"] = time.monotonic() - start
            (out / "gpu_check.json").write_text(json.dumps(results, indent=1))
            (out / "gpu_check.txt").write_text(report(results))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the reports; the default is $OUT, or bench/results/gpu")
    parser.add_argument(
        "--dry-run", action="store_true", help="without a GPU: times tiny shapes on the CPU, writes the reports"
    )
    parser.add_argument("--seconds", type=float, default=BUDGET, help="what all of it may take")
    parser.add_argument("--commit", help="what is measured, where git does not know")
    parser.add_argument("--built", action="store_true", help="the package is built already, where this Python finds it")
    parser.add_argument("--only", default="", metavar="STEP,STEP", help="these steps alone")
    arguments = parser.parse_args()
    only = [name for name in arguments.only.split(",") if name]
    names = [step.name for step in plan("", Path(), Path(), dry=False)]
    if unknown := [name for name in only if name not in names]:
        parser.error(f"--only must name steps ({', '.join(names)}), got {', '.join(unknown)}")
    results = check(
        arguments.out or Path(os.environ.get("OUT") or ROOT / "bench" / "results" / "gpu"),
        arguments.dry_run,
        arguments.seconds,
        arguments.built,
        only,
        arguments.commit,
        lambda text: print(f"gpu_check: {text}", flush=True),
    )
    print(report(results))
    return 0 if all(step["status"] in ("passed", "skipped") for step in results["steps"]) else 1


if __name__ == "__main__":
    sys.exit(main())
