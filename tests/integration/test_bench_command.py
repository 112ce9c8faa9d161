"""``python -m gcnet_ext bench``: it times what it says, with this package and without it, and says what it cannot do."""

from __future__ import annotations

import json
import re
import sys
import time
from types import SimpleNamespace

import eager
import pytest
import torch
from recorder import Recorder
from torch import nn

from gcnet_ext import _bench
from gcnet_ext.__main__ import main

SHAPE = "2,16,7,5"


def net() -> nn.Module:
    """A convolution, a GC block of plain PyTorch, and what timm's models have beside a forward."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), eager.ContextBlock(16, 1 / 4))
    model.default_cfg = {"input_size": (3, 9, 11)}
    return model


@pytest.fixture
def timm(monkeypatch):
    """A timm with two models, one of which has no block."""
    models = {"gcnet": net, "plainnet": lambda: nn.Conv2d(3, 16, 3)}

    def create_model(name):
        if name not in models:
            raise RuntimeError(f"Unknown model ({name})")
        return models[name]()

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))


def told(capsys, *arguments: str) -> str:
    assert main(["bench", "--seconds", "0.1", *arguments]) == 0
    return capsys.readouterr().out


def test_a_block_of_any_shape(capsys):
    out = told(capsys, "--shape", SHAPE, "--device", "cpu")
    assert out.startswith(f"cpu ({torch.get_num_threads()} threads), float32, torch {torch.__version__}\n")
    number = r"\d+\.\d+"
    for direction in _bench.DIRECTIONS:
        line = rf"^block 2x16x7x5 {direction} +{number} +{number} ms +({number})x \(({number}) to ({number})\)$"
        gain, low, high = map(float, re.search(line, out, re.MULTILINE).groups())
        assert 0 < low <= gain <= high


def test_json_has_the_rows(capsys):
    rows = json.loads(told(capsys, "--shape", SHAPE, "--json"))
    assert [(row["name"], row["direction"]) for row in rows] == [("block 2x16x7x5", "infer"), ("block 2x16x7x5", "train")]
    for row in rows:
        assert min(row["without"], row["ours"]) > 0
        assert row["rounds"] >= 1


def test_without_a_shape_it_times_the_maps_of_a_resnet(monkeypatch, capsys):
    monkeypatch.setattr(
        _bench, "measured", lambda pair, _seconds, _device: _bench.Row(*pair[:2], 2e-3, 1e-3, 2.0, (1.5, 2.5), 3)
    )
    monkeypatch.setattr(_bench, "SHAPES", ((1, 16, 3, 3), (1, 32, 2, 2)))
    lines = told(capsys).splitlines()[-4:]
    assert [line.split()[1:3] for line in lines] == [[s, d] for s in ("1x16x3x3", "1x32x2x2") for d in ("infer", "train")]
    assert all(line.endswith("   2.000     1.000 ms   2.00x (1.50 to 2.50)") for line in lines)


def test_one_side_has_our_operators_and_the_other_computes_the_same_without_them(kernels):
    pairs = list(_bench.block_pairs([(2, 16, 5, 7)], torch.device("cpu")))
    assert [pair.direction for pair in pairs] == ["infer", "train"]
    names = {}
    for pair in pairs:
        for side in ("without", "ours"):
            with Recorder() as recorder:
                getattr(pair, side)()
            names[pair.direction, side] = recorder.names
    assert names["infer", "ours"] == ["global_context_inference"]
    assert names["train", "ours"] == ["global_context", "global_context_backward"]
    assert names["infer", "without"] == names["train", "without"] == []
    assert torch.allclose(pairs[0].without(), pairs[0].ours(), atol=1e-5)


def test_both_sides_are_timed_in_turn_until_the_time_is_over():
    order = []

    def call(name: str):
        return lambda: (order.append(name), time.sleep(_bench.LEAST_SECONDS))

    row = _bench.measured(
        _bench.Pair("a", "infer", call("without"), call("ours")), 10 * _bench.LEAST_SECONDS, torch.device("cpu")
    )
    assert order == ["without", "ours"] * (2 + row.rounds)
    assert row.rounds > 1
    assert row.without >= _bench.LEAST_SECONDS <= row.ours


def test_the_gain_is_the_time_without_over_the_time_with(monkeypatch):
    monkeypatch.setattr(_bench, "timed", lambda call, _times, _device: call())
    row = _bench.measured(_bench.Pair("a", "train", lambda: 6.0, lambda: 2.0), 0.0, torch.device("cpu"))
    assert row == _bench.Row("a", "train", 6.0, 2.0, 3.0, (3.0, 3.0), 1)


def test_a_model_before_and_after(kernels, timm, capsys):
    out = told(capsys, "--model", "timm:gcnet")
    assert "1 replaced, 0 left" in out
    assert re.search(r"^gcnet infer .*\ngcnet train ", out, re.MULTILINE)
    report, pairs = _bench.model_pairs("timm:gcnet", None, torch.device("cpu"))
    assert report.startswith("1 replaced")
    infer = next(iter(pairs))
    for side, names in ((infer.without, []), (infer.ours, ["global_context_inference"])):
        with Recorder() as recorder:
            assert side().shape == (4, 16, 7, 9)
        assert recorder.names == names
    (_, pairs) = _bench.model_pairs("timm:gcnet", (1, 3, 6, 5), torch.device("cpu"))
    assert next(iter(pairs)).ours().shape == (1, 16, 4, 3)


WRONG = {
    "no library": (["--model", "torchvision:resnet50"], "--model must be timm:NAME, got torchvision:resnet50"),
    "no name": (["--model", "timm:"], "--model must be timm:NAME, got timm:"),
    "unknown": (["--model", "timm:nonet"], r"--model timm:nonet: Unknown model \(nonet\)"),
    "no block": (["--model", "timm:plainnet"], "--model timm:plainnet has no block that replace_blocks takes: 0 replaced"),
    "shape of words": (["--shape", "a,b"], "argument --shape: must be positive numbers N,C,H,W, got a,b"),
    "shape of zeros": (["--shape", "0,3,4,5"], "argument --shape: must be positive numbers N,C,H,W, got 0,3,4,5"),
    "short shape": (["--shape", "2,3"], "argument --shape: must be positive numbers N,C,H,W, got 2,3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line(timm, capsys, case):
    arguments, words = WRONG[case]
    with pytest.raises(SystemExit) as exit_code:
        main(["bench", *arguments])
    assert exit_code.value.code == 2
    assert re.search(f"bench: error: {words}", capsys.readouterr().err)


def test_without_timm_it_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SystemExit):
        main(["bench", "--model", "timm:gcnet"])
    assert "--model timm:gcnet needs timm: pip install timm" in capsys.readouterr().err


def test_the_bar_is_for_a_terminal_alone(monkeypatch, capsys):
    _bench.progress(1, 4, "block")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    _bench.progress(1, 4, "block infer")
    assert capsys.readouterr().err.startswith("\r[#####               ] block infer")
    _bench.progress(4, 4, "")
    assert capsys.readouterr().err.strip() == ""
