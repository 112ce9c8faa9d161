"""bench/gpu_model.py: the model of the CUDA kernels' times against the committed reports."""

from __future__ import annotations

import copy
import importlib
import json
import sys

import pytest
from checkout import ROOT

import gcnet_ext

REPORTS = sorted(path.parent.name for path in (ROOT / "bench" / "results").glob("*/gpu_check.json"))

pytestmark = pytest.mark.skipif(gcnet_ext._load.compiled is None, reason="the plan functions are in the compiled library")


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
    return importlib.import_module("gpu_model")


@pytest.fixture
def record(model):
    return json.loads(model.RECORD.read_text())


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_is_within_the_limit_or_says_why_not(model, record, name):
    """A report is committed as it is. If the model is further off, bench/gpu_model.py gets a sentence in OUTSIDE."""
    report = model.reports()[name]
    off = {direction: model.root_mean_square(values) for direction, values in model.errors(report, record).items()}
    within = max(off.values()) <= model.LIMIT
    assert within or model.OUTSIDE.get(name), f"{name}: {off}; add a sentence to OUTSIDE in bench/gpu_model.py that says why"
    assert not (within and name in model.OUTSIDE), f"{name} is within the limit: {off}; OUTSIDE need not name it"


def test_outside_names_reports(model):
    assert set(model.OUTSIDE) <= set(REPORTS)


def test_the_limit_notices_a_slower_gpu(model, record):
    """Kernels that take half as long again are not within it."""
    report = copy.deepcopy(model.reports()[REPORTS[0]])
    for row in report["timings"]["rows"]:
        for direction in ("forward", "backward"):
            row["candidates"]["ours"][direction]["graph_cold"] *= 1.5
    for values in model.errors(report, record).values():
        assert model.root_mean_square(values) > model.LIMIT


def test_the_search_finds_constants(model, record):
    """Those of a kernel's own predictions, from another beginning."""
    report = model.reports()[REPORTS[0]]
    card, rows = model.card_of(report), list(model.rows_of(report))
    constants = {"start": 5.0, "chain": 2.0, "product": 4.0}
    made = [row._replace(kernels={**row.kernels, "transform": model.layers(row.shape, card, constants, {})}) for row in rows]
    found = model.fitted("transform", made, card, {})
    assert found == pytest.approx(constants, rel=0.05)


def test_larger_maps_take_longer(model, record):
    card = model.CARDS["NVIDIA H200"]
    times = [
        model.predict(model.shape_of(f"{samples}x1024x50x84 float16 NCHW"), card, record["constants"], record["instructions"])
        for samples in (1, 2, 8, 64)
    ]
    assert [time.forward for time in times] == sorted(time.forward for time in times)
    assert times[-1].backward > 8 * times[0].backward


def test_the_second_engine_is_predicted(model, record):
    """Faster than what was measured of the first one, where a launch has its price and memory is never faster than a copy."""
    for report in model.reports().values():
        card = model.card_of(report)
        for row in model.rows_of(report):
            found = model.predict(row.shape, card, record["constants"], record["instructions"], engine="v2")
            assert found.forward < row.forward
            assert found.backward < row.backward
            for kernel in ("transform", "transform_backward"):
                assert 2 * model.gpu_stages.STAGE_LAUNCH < found.kernels[kernel] < 20
                assert row.kernels[kernel] == 0 or found.kernels[kernel] < row.kernels[kernel] + 1, (row.shape.name, kernel)
            for kernel, passes in (("pool", 1), ("fuse", 2), ("sums", 2), ("dx", 3)):
                from_memory = passes * row.shape.megabytes - model.gpu_items.L2
                assert found.kernels[kernel] > max(model.gpu_stages.STAGE_LAUNCH, from_memory / card.copy), (
                    row.shape.name,
                    kernel,
                )


@pytest.mark.parametrize("kernel", ["pool", "fuse", "sums", "dx"])
def test_the_sweeps_of_larger_maps_take_longer(model, kernel):
    card = model.CARDS["NVIDIA H200"]
    for sizes in ("256x56x56", "1024x50x84", "2048x7x7"):
        shapes = [model.shape_of(f"{samples}x{sizes} float16 NCHW") for samples in (1, 4, 64, 256)]
        times = [model.gpu_items.sweeps(shape, card)[kernel] for shape in shapes]
        assert times == sorted(times)
        # Where a map is far larger than the cache, it is memory that takes the time.
        assert times[-1] == pytest.approx(times[-2] * 4, rel=0.35) or shapes[-1].megabytes < 200


def test_prints_every_report(model, record):
    for name, report in model.reports().items():
        for lines_of in (model.lines_of_stages, model.lines_of_copies):
            assert len(list(lines_of(name, report, record))) == 2 + len(list(model.rows_of(report)))
        lines = list(model.lines_of(name, report, record))
        assert len(lines) == 3 + len(list(model.rows_of(report)))
        assert "root mean square" in lines[-1] or name in model.OUTSIDE
