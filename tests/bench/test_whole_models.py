"""bench/whole_models.py: the tails that it times are the ends of the net's residual blocks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from networks import ResNet, randomise
from torch import nn

from gcnet_ext import insert_blocks, replace_blocks

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import whole_models

pytestmark = pytest.mark.usefixtures("libraries")


def nets(library: str) -> dict[str, nn.Module]:
    """With the peer's block or without one, and with ours and the tail."""
    if library == "timm":
        peer = randomise(ResNet("timm", "Bottleneck", attn_layer="se")).eval()
        ours = whole_models.with_blocks(peer, lambda block: block)
        replace_blocks(ours)
        return {"without": whole_models.with_blocks(peer, lambda _: nn.Identity()), "ours": ours}
    ours = ResNet(kind="Bottleneck").eval()
    insert_blocks(ours, (1, 2, 3, 4), 1 / 4)
    randomise(ours)
    return {"without": whole_models.with_blocks(ours, lambda _: nn.Identity()), "ours": ours}


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_each_tail_is_the_end_of_its_residual_block(library, shortcut):
    x = torch.randn(2, 16, 6, 7, generator=torch.Generator().manual_seed(0))
    for net in nets(library).values():
        first = net.layer1[0]
        if shortcut:
            first.downsample = randomise(nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))).eval()
        found = whole_models.tails(net, x)
        assert len(found) == 8
        with torch.no_grad():
            want = x
            for residual, tail in zip([block for stage in net.children() for block in stage], found, strict=True):
                want = residual(want)
                assert torch.allclose(tail.module(tail.x.clone()), want, rtol=1e-5, atol=1e-5)


def test_compiled_tails_are_one_graph():
    """To infer, in the memory format of compiled convolutions; to train they are not timed alone."""
    net, x = nets("torchvision")["ours"], torch.randn(2, 16, 6, 7)
    (all_of_them,) = whole_models.tails_of_net(net, x, "infer", compiled=True)
    assert len(all_of_them.maps) == 8
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in all_of_them.maps)
    assert whole_models.tails_of_net(net, x, "train", compiled=True) == []
    assert len(whole_models.tails_of_net(net, x, "train", compiled=False)) == 8


def test_a_share_is_what_the_tails_take_more(monkeypatch):
    """Of seconds that are made up: the net without blocks takes 10, and each of its eight tails 1, or with blocks 1.5."""
    built = {**dict.fromkeys(whole_models.VARIANTS), **nets("torchvision")}
    variants = {name: built["without" if name == "without" else "ours"] for name in whole_models.VARIANTS}

    def timed(calls, rounds):
        per_call = 10.0 if len(calls["ours"]) == 1 else 1.0
        return {name: [len(each) * per_call * (1 if name == "without" else 1.5)] * rounds for name, each in calls.items()}

    monkeypatch.setattr(whole_models, "timed", timed)
    rows = whole_models.rows_of("a net", variants, torch.randn(2, 16, 6, 7), "NHWC", False, 3)
    assert len(rows) == 2 * len(whole_models.VARIANTS)
    for row in rows:
        without = row["variant"] == "without"
        assert row["share"] == pytest.approx(0.0 if without else 8 * 0.5 / 10)
        assert row["whole"] == pytest.approx(0.0 if without else 0.5)
        assert row["whole_interval"] == 0.0
