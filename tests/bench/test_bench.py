"""The benchmarks: that they measure what they say, refuse wrong results, and see a slower kernel."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import json
import subprocess
import sys
import time

import grid
import pytest
import torch
from checkout import ROOT
from registry import OPS
from torch import nn

import gcnet_ext
from gcnet_ext import _load

BENCH = ROOT / "bench"
pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture(autouse=True)
def bench_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


def module(name: str):
    return importlib.import_module(name)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


# ---- what is measured --------------------------------------------------------------------------------------------------------


def test_rounds_are_interleaved():
    """Every round calls each candidate in turn; the figures are medians over the rounds, with their spread."""
    calls = []
    timed = module("measure").interleaved({name: lambda name=name: calls.append(name) or time.sleep(3e-3) for name in "ab"}, 4)
    turns = [name for name, before in zip(calls, [None, *calls], strict=False) if name != before]
    assert turns[-8:] == ["a", "b"] * 4
    for name in "ab":
        assert len(timed[name].times) == 4
        assert timed[name].median >= 3e-3
        assert timed[name].iqr >= 0


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path):
    (tmp_path / "file").touch()
    measure = module("measure")
    assert measure.output_file(str(tmp_path / "new" / "figures.json")) == tmp_path / "new" / "figures.json"
    assert not list((tmp_path / "new").iterdir())
    for place, got in (("file/figures.json", r"/.*/file/figures.json \(File exists\)"), ("", "the folder /")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^must be a file that can be written, got {got}"):
            measure.output_file(f"{tmp_path}/{place}")
    done = run("bench/scaling.py", "--json", str(tmp_path))
    assert done.returncode == 2
    assert "argument --json: must be a file that can be written, got the folder" in done.stderr


def test_machine():
    found = module("measure").machine()
    for key in ("date", "processor", "cores", "threads", "torch", "revision", "build", "capability"):
        assert found[key], key
    json.dumps(found)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_rows_of_the_block(layout):
    rows = module("global_context").rows_of("2x32x8x8", layout, "float32", rounds=3)
    assert {(row["direction"], row["candidate"]) for row in rows} >= {
        (direction, candidate) for direction in ("infer", "train") for candidate in ("clone", "ours", "eager")
    }
    for row in rows:
        assert row["microseconds"] > 0
        if row["candidate"] == "clone":
            assert row["clones"] == 1
        else:
            floor = 1.5 if row["direction"] == "infer" else 4  # clones: 3 and 8 times the bytes of x
            assert row["of_floor"] == pytest.approx(floor / row["clones"])


def test_a_wrong_result_is_not_timed():
    candidates, x = module("candidates"), torch.randn(2, 32, 5, 5)
    modules = candidates.make_candidates(32, "both", torch.float32)
    assert candidates.check(modules, x)["ours"] < 1e-5
    with torch.no_grad():
        modules["ours"].channel_add_conv[3].bias.add_(0.1)
    with pytest.raises(SystemExit, match="ours is wrong"):
        candidates.check(modules, x)


def test_candidates_share_their_weights():
    """What is compiled, too: the rewrite gets the weights under other names."""
    candidates, x = module("candidates"), torch.randn(2, 32, 5, 5)
    modules = candidates.make_candidates(32, "both", torch.float32, ("rewrite", "compile", "ours compiled"))
    assert set(candidates.check(modules, x)) >= {"ours", "eager", "rewrite", "compile", "ours compiled"}


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_an_engine_computes_the_block(name):
    """For any x of its shape. It is timed to infer, and only in float32 and NCHW."""
    pytest.importorskip(name)
    candidates, engines, x = module("candidates"), module("engines"), torch.randn(2, 32, 5, 5)
    modules = candidates.make_candidates(32, "both", torch.float32)
    modules |= engines.make_engines(modules["ours"], x, (name,))
    assert candidates.check(modules, x)[name] < 1e-5
    assert candidates.check(modules, torch.randn(2, 32, 5, 5))[name] < 1e-5
    for other in (x.double(), x.contiguous(memory_format=torch.channels_last)):
        assert engines.make_engines(modules["ours"], other, (name,)) == {}
    rows = module("global_context").rows_of("2x32x5x5", "NCHW", "float32", compiled=(name,), rounds=2)
    assert [row["direction"] for row in rows if row["candidate"] == name] == ["infer"]


def test_a_whole_model_in_every_runtime():
    """One that computes something else is not timed."""
    pytest.importorskip("onnxruntime")
    whole, x = module("whole_engines"), torch.randn(1, 3, 8, 8)
    without = nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    ours = copy.deepcopy(without)
    ours.insert(1, gcnet_ext.GlobalContextBlock(8, 1 / 4))
    rows = whole.rows_of(without, ours, x, rounds=2)
    assert {row["runtime"] for row in rows} >= {"eager", "compiled", "onnxruntime"}
    assert all(row["milliseconds"] > 0 and row["milliseconds_without"] > 0 for row in rows)
    header, cells = whole.table(rows)
    assert len(cells) == len(rows)
    assert all(len(cell) == len(header) for cell in cells)

    class Drifting(nn.Module):
        calls = 0.0

        def forward(self, x):
            self.calls += 1
            return x + self.calls

    with pytest.raises(SystemExit, match="differs from the one in eager"):
        whole.rows_of(Drifting(), without, x, rounds=2)


def test_rows_of_each_capability(kernels):
    """Each in a process of its own, which has that capability."""
    capabilities = module("capabilities")
    rows = capabilities.rows(rounds=2, quick=True)
    usable = [name for name in _load.compiled.usable_capabilities() if name != "avx512_bf16"]
    assert list(dict.fromkeys(row["capability"] for row in rows)) == usable
    header, cells = capabilities.table(rows)
    assert len(header) == 1 + 2 * len(usable)
    assert [cell[0] for cell in cells] == ["16x64x32x32 NCHW", "16x64x32x32 NHWC", "**geometric mean**"]


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_rows_of_an_op(op, layout):
    rows = module("ops").rows_of(OPS[op], grid.Case((2, 16, 6, 5), layout=layout), rounds=3)
    assert {(row["direction"], row["candidate"]) for row in rows} == {
        (direction, candidate) for direction in ("infer", "train") for candidate in ("ours", "eager")
    }
    assert all(row["clones"] > 0 for row in rows)


def test_a_wrong_op_is_not_timed():
    wrong = dataclasses.replace(
        OPS["channel_fuse"], flat=lambda function: lambda x, *_: x + (function is gcnet_ext.channel_fuse)
    )
    with pytest.raises(SystemExit, match=r"channel_fuse of .* is wrong"):
        module("ops").rows_of(wrong, grid.Case((2, 16, 6, 5)), rounds=3)


def test_unknown_op():
    done = run(str(BENCH / "ops.py"), "channel_sum")
    assert done.returncode == 2
    assert "got channel_sum" in done.stderr


def test_memory_is_measured():
    """Ours: the output, and nothing else of x's size; eager: what it is known to keep."""
    rows = {row["candidate"]: row for row in module("memory").rows_of("2x64x40x40", "NCHW")}
    size = rows["ours"]["bytes_of_x"]
    assert size <= rows["ours"]["infer_peak"] < 1.1 * size
    assert rows["ours"]["saved"] < 0.1 * size
    assert rows["eager"]["infer_peak"] >= 2 * size


def test_quick_run(tmp_path):
    """The sections that take seconds, their JSON, and the pictures."""
    done = run(str(BENCH / "run.py"), "--quick", "--only", "overhead,scaling,memory", "--json", str(tmp_path / "quick.json"))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "quick.json").read_text())
    assert results["quick"]
    assert {row["axis"] for row in results["scaling"]} == {"P", "C", "N", "threads"}
    assert any(row["x"].startswith("0x") for row in results["overhead"])  # an op that does nothing
    assert (tmp_path / "scaling.png").stat().st_size > 5000


def test_unknown_section():
    done = run(str(BENCH / "run.py"), "--only", "blocks")
    assert done.returncode == 2
    assert "got blocks" in done.stderr


# ---- results -----------------------------------------------------------------------------------------------------------------


def results_with(clones: dict[str, float], iqr: float = 1.0) -> dict:
    machine = {"date": "2026-01-01", "processor": "p", "torch": "t", "revision": "0" * 40}
    rows = [
        {
            "x": "1x2x3x4", "layout": "NCHW", "dtype": "float32", "fusion": "both", "direction": "infer", "candidate": name,
            "microseconds": 100.0, "iqr_microseconds": iqr, "clones": value, "of_floor": None,
        }
        for name, value in {"clone": 1.0, **clones}.items()
    ]  # fmt: skip
    return {"machine": machine, "block": rows}


@pytest.mark.parametrize(
    ("old", "new", "iqr", "code", "words"),
    [
        ({"ours": 2.0}, {"ours": 2.1}, 1.0, 0, ["1 figures compared, 0 of ours slower"]),
        ({"ours": 2.0}, {"ours": 2.6}, 1.0, 1, ["slower  1.30x", "1 of ours slower"]),
        ({"ours": 2.0}, {"ours": 2.6}, 20.0, 0, ["0 of ours slower"]),  # within the spread of the two
        ({"ours": 2.6}, {"ours": 2.0}, 1.0, 0, ["faster  0.77x"]),
        ({"eager": 2.0, "ours": 2.0}, {"eager": 3.0, "ours": 2.0}, 1.0, 0, ["slower  1.50x", "2 figures", "0 of ours slower"]),
        ({"ours": 2.0}, {"eager": 2.0}, 1.0, 2, ["no figure in common"]),
    ],
)
def test_compare(tmp_path, old, new, iqr, code, words):
    for name, clones in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(results_with(clones, iqr)))
    done = run(str(BENCH / "compare.py"), str(tmp_path / "old.json"), str(tmp_path / "new.json"))
    assert done.returncode == code, done.stdout + done.stderr
    for text in words:
        assert text in done.stdout


def test_the_pages_say_what_was_measured():
    done = run(str(BENCH / "tables.py"), "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_pictures_are_those_of_the_results():
    """Each says from which results it was drawn."""
    image, plots, tables = pytest.importorskip("PIL.Image"), module("plots"), module("tables")
    source = plots.source_of(json.loads(tables.RESULTS.read_text()), json.loads(tables.GPU_RESULTS.read_text()))
    pictures = {path.stem: image.open(path).info["Description"] for path in (BENCH / "results").glob("*.png")}
    assert pictures == dict.fromkeys(("gain", "roofline", "scaling", "speedup"), source), "python bench/plots.py"


def test_another_figure_is_noticed():
    tables = module("tables")

    def changed(*results: dict) -> set[str]:
        return {page.name for page, text in tables.pages(*results).items() if text != page.read_text()}

    files = tables.RESULTS, tables.GPU_RESULTS, tables.WHOLE_MODELS, tables.WHOLE_ENGINES
    results, gpu_results, whole, in_engines = (json.loads(file.read_text()) for file in files)
    assert changed(results, gpu_results, whole, in_engines) == set()
    ours = next(row for row in results["block"] if row["candidate"] == "ours" and row["x"] == "8x256x56x56")
    ours["clones"] *= 2
    assert changed(results, gpu_results, whole, in_engines) == {"benchmarks.md"}
    for row in results["block"]:
        row["microseconds"] *= 1 + (row["candidate"] == "ours")
    assert changed(results, gpu_results, whole, in_engines) == {"README.md", "benchmarks.md"}
    results = json.loads(tables.RESULTS.read_text())
    for row in gpu_results["timings"]["rows"]:
        row["candidates"]["ours"]["forward"]["graph_cold"] *= 2
    assert changed(results, gpu_results, whole, in_engines) == {"README.md", "benchmarks.md"}
    gpu_results = json.loads(tables.GPU_RESULTS.read_text())
    for row in whole["rows"]:
        row["share"] = None if row["share"] is None else row["share"] + 0.01
    assert changed(results, gpu_results, whole, in_engines) == {"README.md", "benchmarks.md"}
    whole = json.loads(tables.WHOLE_MODELS.read_text())
    in_engines["rows"][0]["milliseconds"] *= 2
    assert changed(results, gpu_results, whole, in_engines) == {"benchmarks.md"}


# ---- profiling ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["global_context", "attention_pool", "channel_fuse"])
@pytest.mark.parametrize("direction", ["infer", "train"])
def test_one_op_on_one_shape(op, direction):
    done = run(str(BENCH / "profile_op.py"), op, "2x16x5x5", "--direction", direction, "--seconds", "0")
    assert done.returncode == 0, done.stderr
    assert "1 calls" in done.stdout


@pytest.mark.slow
def test_instruction_counts():
    """Within 5 % of the record: a slower kernel, or a loop that no longer vectorises, shows on any machine."""
    profile = module("profile_op")
    if reason := profile.why_not():
        pytest.skip(f"instructions cannot be counted: {reason}")
    recorded = json.loads(profile.RECORD.read_text())
    if recorded["compiler"] != profile.compiler():
        pytest.skip(f"recorded with {recorded['compiler']}, this is {profile.compiler()}")
    if "avx2" not in profile.gcnet_ext._load.compiled.build_info()["capabilities"]:
        pytest.skip("no AVX2 kernels in this build")
    found = {
        " ".join(case): sum(each.values()) for case, each in zip(profile.RECORDED, profile.count(profile.RECORDED), strict=True)
    }
    assert set(found) == set(recorded["instructions"])
    for case, instructions in found.items():
        assert instructions == pytest.approx(recorded["instructions"][case], rel=0.05), case
