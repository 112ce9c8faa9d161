"""bench/gpu_check.py as far as a CPU goes: arguments, steps, time limits and reports. No figure in here is one of a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from checkout import ROOT

BENCH = ROOT / "bench"


@pytest.fixture(scope="module")
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", BENCH / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH / "gpu_check.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_dry_run_writes_both_reports(tmp_path):
    done = run("--dry-run", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gpu_check.json", "gpu_check.txt", "scaling.json", "timings.json", "winners.json",
    ]  # fmt: skip
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert results["dry_run"]
    assert results["timings"]["dry_run"]
    ran = {step["name"]: step["status"] for step in results["steps"]}
    dry = {"ab", "timings", "scaling"}
    assert {name for name, status in ran.items() if status == "passed"} == dry
    assert {status for name, status in ran.items() if name not in dry} == {"skipped"}
    compared = results["winners"]["winners"]
    assert [each["direction"] for each in compared] == ["forward", "both"] * 2
    assert all(each["tried"] >= 4 for each in compared)
    assert not results["winners"]["left_out"]
    assert {row["axis"] for row in results["scaling"]} == {"P", "C", "N", "threads"}
    for row in results["timings"]["rows"]:
        assert set(row["candidates"]) == {"ours", "winner", "eager", "compiled rewrite", "compiled eager"}
        for figures in row["candidates"].values():
            assert set(figures) == {"forward", "training forward", "backward", "both"}
            for direction in figures:
                assert set(figures[direction]) == {"stream_hot", "stream_cold", "graph_hot", "graph_cold"}
        assert row["error_to_eager"] < 1e-5
    text = (tmp_path / "gpu_check.txt").read_text()
    assert text.startswith("DRY RUN")
    assert "targets" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = run("--out", str(tmp_path / "reports"))
    assert done.returncode != 0
    assert "torch sees no GPU here" in done.stderr
    assert not (tmp_path / "reports").exists()


def test_unknown_argument():
    assert run("--no-such-thing").returncode == 2


STEPS = [
    "import",
    "build",
    "probes",
    "tests",
    "soak",
    "ab",
    "timings",
    "kernels",
    "bytes",
    "memcheck",
    "racecheck",
    "synccheck",
    "scaling",
]


def test_steps_on_a_gpu_fit_into_400_seconds(gpu_check, tmp_path):
    """What is brought along need not be built; otherwise the last steps get what time is left."""
    steps = gpu_check.plan("9.0", tmp_path, tmp_path / "cache", dry=False)
    assert [step.name for step in steps] == STEPS
    assert dict(steps[1].environment) == {"TORCH_CUDA_ARCH_LIST": "9.0", "GCNET_EXT_CUDA": "1"}
    assert gpu_check.BUDGET == 400
    assert sum(step.limit for step in steps if step.name != "build") <= gpu_check.BUDGET
    assert gpu_check.plan("9.0", tmp_path, tmp_path, dry=False, built=True)[1].missing == "--built"
    files = {"gpu_check.json", "gpu_check.txt", *(f"{name}.json" for name in gpu_check.MEASURED)}
    assert len(files) <= 8


def test_what_was_brought_along_and_does_not_run_is_built(gpu_check):
    build = gpu_check.Step("build", ["true"], 5, missing="--built")
    passed, failed = ({"name": "import", "status": status} for status in ("passed", "failed with code 1"))
    assert gpu_check.chosen(build, [], [passed]).missing == "--built"
    assert gpu_check.chosen(build, [], [failed]).missing == ""
    assert gpu_check.chosen(build, ["timings"], [failed]).missing == "not in --only"


def test_some_steps_alone(tmp_path):
    done = run("--dry-run", "--only", "scaling", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    steps = json.loads((tmp_path / "gpu_check.json").read_text())["steps"]
    assert [step["name"] for step in steps if step["status"] == "passed"] == ["scaling"]
    unknown = run("--dry-run", "--only", "scaling,sleep", OUT=str(tmp_path))
    assert unknown.returncode == 2
    assert "--only must name steps (import, build, " in unknown.stderr


def test_the_tests_for_a_borrowed_gpu(tmp_path):
    """About 300, of every file that is about kernels, and each of them on the GPU."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu_window", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    names = [line for line in done.stdout.splitlines() if "::" in line]
    assert 200 <= len(names) <= 300
    assert all("cuda" in name and "emulated" not in name for name in names if "test_cuda_device" not in name)
    assert len({name.split("::")[0] for name in names}) >= 12


def test_a_step_is_stopped_at_its_limit(gpu_check):
    code = "import time; print('started', flush=True); time.sleep(60)"
    result = gpu_check.run_step(gpu_check.Step("sleep", [sys.executable, "-c", code], 2), 100)
    assert result["status"] == "stopped after 2 s"
    assert result["output"] == ["started"]


def test_nothing_of_a_step_survives_it(gpu_check, tmp_path):
    """Neither what it has started nor what runs meanwhile."""
    alive = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(alive)!r}).touch()"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    step = gpu_check.Step("parent", [sys.executable, "-c", parent], 2, meanwhile=(sys.executable, "-c", child))
    start = time.monotonic()
    assert gpu_check.run_step(step, 100)["status"] == "stopped after 2 s"
    time.sleep(max(0.0, 6 - (time.monotonic() - start)))
    assert not alive.exists()


def test_a_failing_step_keeps_its_output(gpu_check):
    result = gpu_check.run_step(gpu_check.Step("fail", [sys.executable, "-c", "print('why'); exit(3)"], 60), 100)
    assert (result["status"], result["output"]) == ("failed with code 3", ["why"])
    assert gpu_check.run_step(gpu_check.Step("gone", ["/no/such/program"], 60), 100)["status"].startswith("failed:")
    assert gpu_check.run_step(gpu_check.Step("late", [sys.executable], 60), 0)["why"] == "no time left"


def test_report_of_a_gpu(gpu_check):
    ways = ("stream_hot", "stream_cold", "graph_hot", "graph_cold")

    def figures(forward: float, backward: float) -> dict:
        return {"forward": dict.fromkeys(ways, forward), "backward": dict.fromkeys(ways, backward)}

    row = {
        "row": "64x256x56x56 float16 NCHW",
        "bytes": 103e6,
        "copy": dict.fromkeys(ways, 50.0),
        "candidates": {"ours": figures(75, 200), "compiled rewrite": figures(70, 300), "eager": {"error": "broke"}},
    }
    timings = {"rows": [row], "left_out": ["1x1x1x1 float32 NCHW: eager"]}
    assert gpu_check.targets(timings) == [
        "64x256x56x56 float16 NCHW: forward takes 1.50 copies, the compiled rewrite 1.40",
        "64x256x56x56 float16 NCHW: backward takes 4.00 copies, the target is 3.0",
    ]
    failed = {"name": "tests", "status": "failed with code 1", "why": "", "seconds": 5.0, "output": ["1 failed"]}
    launches = {"pool<Half>": {"launches": 1.0, "microseconds": 50.0}, "layer<Half>": {"launches": 2.0, "microseconds": 5.0}}
    kernels = [{"row": "64x256x56x56 float16 NCHW", "copy": 50.0, "forward": launches, "backward": {}}]
    found = {"dry_run": False, "environment": {"torch": "x"}, "seconds": 9.0, "steps": [failed]}
    default = {"streamed": False, "splits": 0}
    faster = {"row": "64x256x56x56 float16 NCHW", "direction": "both", "winner": {**default, "splits": 32}}
    same = {"row": "64x256x56x56 float16 NCHW", "direction": "forward", "winner": default}
    winners = {
        "winners": [{**each, "microseconds": 90.0, "default": 100.0, "tried": 9} for each in (faster, same)],
        "left_out": ["b"],
    }
    measured = {"timings": timings, "kernels": kernels, "winners": winners, "probes": {"ticket, ns": 700.0}}
    text = gpu_check.report({**found, **measured})
    assert re.search(r"^ticket, ns +700$", text, re.MULTILINE)
    assert re.search(r"both +90.0, default +100.0, 9 tried: splits=32$", text, re.MULTILINE)
    assert re.search(r"forward +90.0, default +100.0, 9 tried: default$", text, re.MULTILINE)
    assert "not compared: b" in text
    assert "60.0 =  1.20 copies: pool 50.0 + layer 10.0" in text
    assert "targets missed:" in text
    assert "failed with code 1" in text
    assert "64x256x56x56 float16 NCHW, eager: broke" in text
    assert "not measured for want of time: 1x1x1x1 float32 NCHW: eager" in text


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_the_probes_compile(tmp_path):
    """For the GPUs that are lent, without a warning; where there is none they end with the reason."""
    program, report = tmp_path / "gpu_probe", tmp_path / "probes.json"
    command = ["nvcc", "-O3", "-std=c++17", "-arch=sm_90", "-Werror", "all-warnings", "-o", str(program)]
    done = subprocess.run([*command, str(BENCH / "gpu_probe.cu")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if not torch.cuda.is_available():
        ran = subprocess.run([str(program), str(report)], capture_output=True, text=True, check=False)
        assert ran.returncode == 1
        assert ran.stderr.startswith("gpu_probe: ")
        assert not report.exists()


@pytest.fixture
def gpu_ab(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("gpu_ab")


def test_decisions_that_are_compared(gpu_ab):
    """Each changes a plan of its map, or the transform; the default is the first."""
    for row in gpu_ab.ROWS:
        for direction in ("forward", "both"):
            found = gpu_ab.variants(row, direction)
            unplanned = [tuning for tuning in found if tuning.transform or tuning.engine == "tickets"]
            changing = [tuning for tuning in found if tuning not in (*unplanned, gpu_ab.CudaTuning(engine="v2"))]
            plans = [gpu_ab.plan(row, tuning) for tuning in changing]
            assert found[0] == gpu_ab.DEFAULT
            assert len(changing) >= 2
            assert {(tuning.hints, tuning.cluster) for tuning in unplanned} == {(0, 0), (1, 0), (0, 1)}
            assert len({tuning.lag for tuning in unplanned}) >= 3
            assert all(plan not in plans[:index] for index, plan in enumerate(plans))


def test_the_winner_is_two_percent_ahead(gpu_ab):
    fast, other = gpu_ab.CudaTuning(splits=8), gpu_ab.CudaTuning(transform=2)
    assert gpu_ab.chosen({gpu_ab.DEFAULT: [100.0, 100.0, 130.0], fast: [98.5, 90.0, 99.0], other: [101.0]}) == gpu_ab.DEFAULT
    assert gpu_ab.chosen({gpu_ab.DEFAULT: [100.0], fast: [97.9, 97.0, 99.0], other: [98.0]}) == fast
    assert gpu_ab.together([fast, other, gpu_ab.CudaTuning(splits=16)]) == gpu_ab.CudaTuning(splits=8, transform=2)


def test_the_timings_take_the_winners(gpu_ab, tmp_path):
    timing = importlib.import_module("gpu_timing")
    names = "row", "direction", "winner"
    rows = [("a", "forward", {"splits": 8}), ("a", "both", {"splits": 0}), ("b", "forward", {"splits": 0})]
    path = tmp_path / "winners.json"
    path.write_text(json.dumps({"winners": [dict(zip(names, row, strict=True)) for row in rows]}))
    assert timing.read_winners(path) == {"a": {"forward": gpu_ab.CudaTuning(splits=8)}}
    assert timing.read_winners(tmp_path / "none.json") == timing.read_winners(None) == {}
