"""``python -m gcnet_ext bench``: what this package gains on this machine, for the block alone or for a model of timm."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from . import _load
from .blocks import GlobalContextBlock
from .models import replace_blocks, to_plain

SHAPES = ((8, 256, 56, 56), (8, 512, 28, 28), (8, 1024, 14, 14), (8, 2048, 7, 7))
"""The maps of a ResNet-50 that sees eight images of 224 x 224."""
IMAGES = 4
DIRECTIONS = ("infer", "train")
LEAST_SECONDS = 0.02
"""One measurement repeats its call until it lasts about so long."""

Call = Callable[[], Any]


class Pair(NamedTuple):
    """One line of the table: the same computation without this package and with it."""

    name: str
    direction: str
    without: Call
    ours: Call


class Row(NamedTuple):
    """Seconds of one call, the medians of the rounds; the gain is the median of each round's ratio, between its quartiles."""

    name: str
    direction: str
    without: float
    ours: float
    gain: float
    quartiles: tuple[float, float]
    rounds: int


# ---- what is measured --------------------------------------------------------------------------------------------------------


def pairs_of(name: str, without: nn.Module, ours: nn.Module, x: torch.Tensor) -> Iterator[Pair]:
    """Inference in evaluation mode, and a training step: forward, and the gradients of x and of every parameter."""
    for direction in DIRECTIONS:
        of_direction = _infers if direction == "infer" else _trains
        calls = [of_direction(copy.deepcopy(module), x) for module in (without, ours)]
        yield Pair(name, direction, *calls)


def _infers(module: nn.Module, x: torch.Tensor) -> Call:
    module.eval()
    return torch.no_grad()(lambda: module(x))


def _trains(module: nn.Module, x: torch.Tensor) -> Call:
    module.train()
    leaf = x.clone().requires_grad_()
    wanted = [leaf, *module.parameters()]

    def step() -> None:
        out = module(leaf)
        torch.autograd.grad(out, wanted, torch.ones_like(out), allow_unused=True)

    return step


def block_pairs(shapes: Iterable[tuple[int, ...]], device: torch.device) -> Iterator[Pair]:
    """The block of GCNet, ratio 1/16, beside the same block in plain PyTorch."""
    for shape in shapes:
        ours = GlobalContextBlock(shape[1], 1 / 16, device=device)
        for parameter in ours.parameters():
            nn.init.normal_(parameter, std=0.05)
        name = "block " + "x".join(map(str, shape))
        yield from pairs_of(name, to_plain(ours), ours, torch.randn(shape, device=device))


def model_pairs(name: str, shape: tuple[int, ...] | None, device: torch.device) -> tuple[str, Iterator[Pair]]:
    """What `replace_blocks` says of the model, and the model before and after it."""
    kind, _, name = name.partition(":")
    if kind != "timm" or not name:
        raise ValueError(f"--model must be timm:NAME, got {kind}{_}{name}")
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ValueError(f"--model timm:{name} needs timm: pip install timm ({error})") from error
    try:
        without = timm.create_model(name).to(device)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"--model timm:{name}: {error}") from error
    ours = copy.deepcopy(without)
    report = replace_blocks(ours)
    if not report.replaced:
        raise ValueError(f"--model timm:{name} has no block that replace_blocks takes: {report}")
    size = shape or (IMAGES, *without.default_cfg["input_size"])
    return str(report), pairs_of(name, without, ours, torch.randn(size, device=device))


# ---- how it is measured ------------------------------------------------------------------------------------------------------


def timed(call: Call, times: int, device: torch.device) -> float:
    """Seconds of one call, measured over so many calls in a row."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(times):
        call()
    wait()
    return (time.perf_counter() - start) / times


def measured(pair: Pair, seconds: float, device: torch.device) -> Row:
    """Both calls in turn, round after round, until the time is over: a machine that gets slower hits both alike."""
    end = time.perf_counter() + seconds
    calls = pair.without, pair.ours
    for call in calls:
        call()  # the first call allocates, and looks at the layers
    repeats = [max(1, round(LEAST_SECONDS / timed(call, 1, device))) for call in calls]
    rounds: list[tuple[float, float]] = []
    while not rounds or time.perf_counter() < end:
        without, ours = (timed(call, times, device) for call, times in zip(calls, repeats, strict=True))
        rounds.append((without, ours))
    gains = [without / ours for without, ours in rounds]
    low, gain, high = statistics.quantiles(gains, n=4) if len(gains) > 1 else gains * 3
    without, ours = (statistics.median(each) for each in zip(*rounds, strict=True))
    return Row(pair.name, pair.direction, without, ours, gain, (low, high), len(rounds))


def progress(done: int, of: int, name: str) -> None:
    """A bar on the terminal; nothing where there is none."""
    if sys.stderr.isatty():
        bar = "#" * (20 * done // of)
        sys.stderr.write(f"\r[{bar:<20}] {name:<40}" if done < of else "\r" + " " * 64 + "\r")
        sys.stderr.flush()


def table(rows: list[Row]) -> str:
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}          without      ours    gain (middle half of the rounds)"]
    for row in rows:
        times = f"{row.without * 1e3:8.3f} {row.ours * 1e3:9.3f} ms"
        low, high = row.quartiles
        lines.append(f"{row.name:{width}} {row.direction} {times} {row.gain:6.2f}x ({low:.2f} to {high:.2f})")
    return "\n".join(lines)


# ---- the command -------------------------------------------------------------------------------------------------------------


def sizes(text: str) -> tuple[int, ...]:
    """An argument N,C,H,W."""
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) < 3 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"must be positive numbers N,C,H,W, got {text}")
    return shape


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", type=sizes, help="N,C,H,W of the block's input or of the model's images")
    parser.add_argument("--model", metavar="timm:NAME", help="a model of timm, before and after replace_blocks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=40.0, help="how long to measure, all lines together")
    parser.add_argument("--json", action="store_true", help="the rows for a program")


def run(arguments: argparse.Namespace) -> str:
    """Measures, and returns what is to be printed.

    Raises:
        ValueError: the model is not there or has no block for this package. The message says which.
    """
    device, report = torch.device(arguments.device), ""
    if arguments.model:
        report, found = model_pairs(arguments.model, arguments.shape, device)
    else:
        found = block_pairs([arguments.shape] if arguments.shape else SHAPES, device)
    pairs, rows = list(found), []
    for i, pair in enumerate(pairs):
        progress(i, len(pairs), f"{pair.name} {pair.direction}")
        rows.append(measured(pair, arguments.seconds / len(pairs), device))
    progress(len(pairs), len(pairs), "")
    if arguments.json:
        return json.dumps([row._asdict() for row in rows], indent=1)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    lines = [f"{device.type} ({where}), float32, torch {torch.__version__}", *([report] if report else []), "", table(rows)]
    if device.type not in _load.kernel_devices:
        lines.append(f"There are no compiled kernels here: {_load.why_no_kernels(device.type)}")
    return "\n".join(lines)
