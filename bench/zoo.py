"""The blocks of the family in every architecture of timm and torchvision: how many are fused, called and left, and why.

    python bench/zoo.py [--models 'efficientnet*,resnet50'] [--check] [--time ROUNDS] [--json FILE]

Each architecture is built on the meta device, without weights, and given to `replace_blocks`. A line says how many blocks it
has, and how many of them one operator computes, how many have layers that are called between compiled pooling and fusion, and
how many are left. `--check` builds each of the named architectures on the CPU instead, with random weights, and compares the
output and all gradients before and after. `--time` builds them on the CPU, too, and takes turns, so many rounds, with the net
before and after: 4 images to infer, and to train with forward and backward. A library that is missing is left out.
"""

from __future__ import annotations

import argparse
import collections
import copy
import fnmatch
import functools
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import measure
import torch
from torch import Tensor, nn
from whole_models import infer, train

import gcnet_ext

FAMILY = {
    *("SEModule", "SqueezeExcite", "SqueezeExcitation", "EffectiveSEModule", "EseModule", "EcaModule", "GlobalContext"),
    "GlobalResponseNorm",
}
"""The classes of blocks that are to be taken wherever they stand."""
RELATIVES = {"FocalModulation", "SplitAttn", "SelectiveKernel", "BatNonLocalAttn", "SqueezeExciteCl", "CecaModule"}
"""Classes of the family whose formula is another one."""
SIZE = 64
"""Of the images on which outputs and gradients are compared, unless a net takes one size only."""
IMAGES = 4
"""In a batch that is timed."""


class Row(NamedTuple):
    """What was found in one architecture."""

    name: str
    checkpoints: int
    blocks: dict[str, int]
    """By class, how many blocks of the family it has."""
    fused: int
    called: int
    left: dict[str, int]
    """By class and reason, how many."""


def architectures(patterns: list[str]) -> Iterator[tuple[str, int]]:
    """The architectures whose names fit one of the patterns, and how many checkpoints timm has of each."""
    names: dict[str, int] = {}
    if importlib.util.find_spec("timm") is not None:
        timm = importlib.import_module("timm")
        checkpoints = collections.Counter(name.partition(".")[0] for name in timm.list_models(pretrained=True))
        names |= {name: checkpoints[name] for name in timm.list_models()}
    if importlib.util.find_spec("torchvision") is not None:
        models = importlib.import_module("torchvision.models")
        names |= {f"torchvision.{name}": 0 for name in models.list_models(models)}
    return ((name, count) for name, count in names.items() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns))


def made(name: str) -> nn.Module:
    """The architecture without pretrained weights, on the default device."""
    inner = name.removeprefix("torchvision.")
    net: nn.Module
    if inner == name:
        net = importlib.import_module("timm").create_model(name)
    else:
        net = importlib.import_module("torchvision.models").get_model(inner, weights=None)
    return net


def kinds(net: nn.Module) -> dict[str, int]:
    counted = collections.Counter(type(part).__name__ for part in net.modules())
    return {kind: count for kind, count in counted.items() if kind in FAMILY | RELATIVES}


def row(name: str, checkpoints: int) -> Row | None:
    """What `replace_blocks` finds in an architecture; None if it has no block of the family."""
    with torch.device("meta"):
        net = made(name)
    blocks = kinds(net)
    if not blocks:
        return None
    report = gcnet_ext.replace_blocks(net)
    left: collections.Counter[str] = collections.Counter()
    for path, part in net.named_modules():
        kind = type(part).__name__
        if kind in FAMILY | RELATIVES and path not in report.replaced:
            left[f"{kind}: {report.left.get(path, 'not seen')}"] += 1
    return Row(name, checkpoints, blocks, len(report.replaced) - len(report.called), len(report.called), dict(left))


def size_of(net: nn.Module) -> int:
    """Height and width of the images that the net was published with."""
    size: int = getattr(net, "default_cfg", {}).get("input_size", (3, 224, 224))[1]
    return size


# ---- outputs and gradients ---------------------------------------------------------------------------------------------------


def results(net: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of x and of every parameter."""
    x = x.clone().requires_grad_()
    out = net(x)
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    weighted = out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    found = torch.autograd.grad(weighted.sum(), [x, *parameters], allow_unused=True)
    return [out.detach(), *(torch.zeros(()) if gradient is None else gradient for gradient in found)]


def worst(name: str) -> float:
    """The largest difference of an output or a gradient before and after, over the largest number of that tensor; in
    evaluation, with random weights, in float64 but for what a net casts itself."""
    torch.manual_seed(0)
    net = made(name).eval().double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for buffer in net.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand(buffer.shape, generator=generator, dtype=torch.float64), alpha=0.1)
    size = size_of(net) if getattr(net, "default_cfg", {}).get("fixed_input_size") else SIZE
    x = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)
    replaced = copy.deepcopy(net)
    report = gcnet_ext.replace_blocks(replaced)
    if not report.replaced:
        raise SystemExit(f"{name}: nothing was replaced\n{report}")
    pairs = zip(results(net, x), results(replaced, x), strict=True)
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs if a.numel())


# ---- times -------------------------------------------------------------------------------------------------------------------


def times(name: str, rounds: int) -> dict[str, Any]:
    """The milliseconds of a batch before and after, to infer and to train, and the median over the rounds of after / before."""
    torch.manual_seed(0)
    before = made(name)
    after = copy.deepcopy(before)
    gcnet_ext.replace_blocks(after)
    x = torch.randn(IMAGES, 3, size_of(before), size_of(before))
    found: dict[str, Any] = {"images": IMAGES, "size": x.shape[2]}
    steps: dict[str, Callable[[nn.Module, Tensor], None]] = {"infer": infer, "train": train}
    for direction, step in steps.items():
        nets = {"before": before.train(direction == "train"), "after": after.train(direction == "train")}
        taken = measure.interleaved({key: functools.partial(step, net, x) for key, net in nets.items()}, rounds)
        pairs = zip(taken["before"].raw_times, taken["after"].raw_times, strict=True)
        found[direction] = {
            **{key: each.median * 1e3 for key, each in taken.items()},
            "ratio": statistics.median(b / a for a, b in pairs),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="*", help="patterns of names, with commas between")
    parser.add_argument("--check", action="store_true", help="compare outputs and gradients, too")
    parser.add_argument("--time", type=int, default=0, metavar="ROUNDS", help="time them before and after, too")
    parser.add_argument("--json", type=measure.output_file, help="a file for the rows")
    arguments = parser.parse_args()
    if arguments.time:
        measure.keep_memory()
    found: list[dict[str, Any]] = []
    rows: list[Row] = []
    for name, checkpoints in architectures(arguments.models.split(",")):
        try:
            one = row(name, checkpoints)
        except Exception as error:  # an architecture that its own library cannot build here
            print(f"{name}: not built: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        if one is None:
            continue
        difference = worst(name) if arguments.check else None
        rows.append(one)
        taken = times(name, arguments.time) if arguments.time else None
        more = {"difference": difference, "times": taken}
        found.append({**one._asdict(), **{key: value for key, value in more.items() if value is not None}})
        blocks = " ".join(f"{count} {kind}" for kind, count in one.blocks.items())
        left = "; ".join(f"{count} left, {why}" for why, count in one.left.items())
        told = "" if difference is None else f", differs by {difference:.1e}"
        for way in () if taken is None else ("infer", "train"):
            told += f", {way} {taken[way]['before']:.1f} -> {taken[way]['after']:.1f} ms ({taken[way]['ratio']:.3f})"
        print(f"{name}: {blocks}: {one.fused} fused, {one.called} called{f', {left}' if left else ''}{told}", flush=True)
    whole = [each for each in rows if not each.left]
    print(
        f"{len(rows)} architectures with {sum(each.checkpoints for each in rows)} checkpoints have a block of the family or a "
        f"relative; every block is taken in {len(whole)} with {sum(each.checkpoints for each in whole)}"
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": measure.machine(), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
