"""bench/zoo.py on some architectures of timm and torchvision, where they are installed."""

from __future__ import annotations

import os
import subprocess
import sys

import imitations
import pytest
from checkout import ROOT

# Of each class of blocks a small net, and how many blocks it has.
NETS = {
    "mobilenetv3_small_050": ("SqueezeExcite", 9),
    "legacy_seresnet18": ("SEModule", 8),
    "seresnet18": ("SEModule", 8),
    "regnety_002": ("SEModule", 13),
    "ese_vovnet19b_dw": ("EffectiveSEModule", 4),
    "hgnet_tiny": ("EseModule", 5),
    "eca_resnext26ts": ("EcaModule", 8),
    "gcresnext26ts": ("GlobalContext", 8),
    "convnextv2_atto": ("GlobalResponseNorm", 12),
}


@pytest.fixture
def zoo(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import zoo

    return zoo


@pytest.mark.parametrize("name", NETS)
def test_every_block_is_taken_and_computes_the_same(zoo, name):
    imitations.real("timm")
    kind, count = NETS[name]
    row = zoo.row(name, 1)
    assert row.blocks == {kind: count}
    assert (row.fused, row.called, row.left) == (count, 0, {})
    assert zoo.worst(name) < 1e-6


def test_what_is_left_is_told():
    imitations.real("timm")
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "zoo.py"), "--models", "resnest14d,seresnet18,resnet18"],
        cwd=ROOT, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert "resnest14d: 4 SplitAttn: 0 fused, 0 called, 4 left, SplitAttn: its class is none of those that are known" in lines
    assert "seresnet18: 8 SEModule: 8 fused, 0 called" in lines
    assert lines[-1].startswith("2 architectures with ")
    assert "every block is taken in 1 with " in lines[-1]


def test_times_are_compared(zoo):
    imitations.real("timm")
    found = zoo.times("mobilenetv3_small_050", rounds=2)
    assert (found["images"], found["size"]) == (4, 224)
    for direction in ("infer", "train"):
        before, after, ratio = (found[direction][key] for key in ("before", "after", "ratio"))
        assert before > 0
        assert after > 0
        assert 0.01 < ratio < 100
