"""The error against float64, ours beside eager's in the same dtype: forward and gradients, from plain values to extreme ones.

    python bench/accuracy.py [--shapes 2x256x56x56,...] [--dtype float32,bfloat16,float16] [--values "one position",...]

Errors are relative, in norm, to eager in float64 on the same stored numbers. Of the output and of the gradient of x it is the
root mean square over the channels, each measured by its own size or a tenth of their median; of the parameters' gradients it is
the largest, but for those that vanish: the bias of the mask always, its weight where all positions are alike or one takes all.
A row is the geometric mean of a few seeds. What is not finite is infinitely wrong.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from global_context import DTYPES, LAYOUTS
from peers import Eager
from torch import Tensor, nn

import gcnet_ext

SHAPES = ("4x64x32x32", "2x256x56x56", "2x2048x7x7", "2x512x1x1", "1x3x1000x1000", "1x16x500x500")
QUANTITIES = ("out", "grad of x", "grad of parameters")
FUSIONS = ("channel_mul", "channel_add")
VANISHING = 1e-6  # in units of the largest gradient of a parameter


class Errors(NamedTuple):
    """Of one block in one row, in the order of QUANTITIES."""

    out: float
    grad_x: float
    grad_parameters: float


class Row(NamedTuple):
    dtype: torch.dtype
    shape: str
    layout: str
    values: str
    ours: Errors
    eager: Errors


# ---- values ------------------------------------------------------------------------------------------------------------------
# Each changes a standard normal x [N, C, H, W] and the weight of the mask [C], in float64, and returns both.


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("nchw,c->nhw", x, weight)


def _scaled(x: Tensor, weight: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Logits that reach from minus the largest to it."""
    return x, weight * largest / _logits(x, weight).abs().max()


def _one_position(x: Tensor, weight: Tensor, _dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x[:, :, x.shape[2] // 2, x.shape[3] // 3] += 50 * weight / weight.square().sum()
    return x, weight


def _minus_infinity(x: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The first channel masks half of the positions: their logits overflow, and they have no part in the attention."""
    exponent = 11 if dtype == torch.float16 else 15
    x[:, 0] = 0
    x[:, 0, :, : x.shape[3] // 2] = 2.0**exponent
    weight[0] = -torch.finfo(dtype).max / 2 ** (exponent - 1)
    return x, weight


def _far(x: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale = 2e2 if dtype == torch.float16 else 1e12
    return x * scale, weight / scale


def _near(x: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x * (1e-4 if dtype == torch.float16 else 1e-30), weight


VALUES: dict[str, Callable[[Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]]] = {
    "plain": lambda x, weight, _: (x, weight),
    "logits to 100": lambda x, weight, _: _scaled(x, weight, 100.0),
    "logits to 10000": lambda x, weight, _: _scaled(x, weight, 1e4),
    "one position": _one_position,
    "all alike": lambda x, weight, _: (x[:, :, :1, :1].expand_as(x).contiguous(), weight),
    "-inf logits": _minus_infinity,
    "huge x": _far,
    "tiny x": _near,
}


def blocks(shape: str, dtype: torch.dtype, values: str, seed: int) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Ours and eager's block with the same weights, x and a gradient."""
    torch.manual_seed(seed)
    n, c, h, w = (int(size) for size in shape.split("x"))
    hidden = max(4, c // 16)
    ours = gcnet_ext.GlobalContextBlock(c, 1.0, planes=hidden, fusion_types=FUSIONS)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.dim() == 4 else 1.0)
        x = torch.randn(n, c, h, w, dtype=torch.float64) + 0.25
        x, weight = VALUES[values](x, ours.conv_mask.weight.double().flatten(), dtype)
        ours.conv_mask.weight.copy_(weight.reshape(1, c, 1, 1))
    eager = Eager(c, hidden, FUSIONS)
    eager.load_state_dict(ours.state_dict())
    grad = torch.randn(n, c, h, w) / math.sqrt(h * w)
    return ours.to(dtype), eager.to(dtype), x.to(dtype), grad.to(dtype)


# ---- errors ------------------------------------------------------------------------------------------------------------------


def results(block: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The output, and the gradients of x and of every parameter but the bias of the mask."""
    leaf = x.detach().requires_grad_()
    given = [leaf, *(parameter for name, parameter in block.named_parameters() if name != "conv_mask.bias")]
    out = block(leaf)
    return [out.detach(), *torch.autograd.grad(out, given, grad)]


def _ratio(difference: Tensor, size: Tensor) -> float:
    """The root mean square of the quotients; nothing out of nothing is zero."""
    quotient = torch.where(difference == 0, 0.0, difference / size).nan_to_num(math.inf, math.inf)
    return float(quotient.square().mean().sqrt())


def _of_channels(difference: Tensor, want: Tensor) -> float:
    differences, sizes = (tensor.transpose(0, 1).flatten(1).norm(dim=1) for tensor in (difference, want))
    return _ratio(differences, sizes.clamp(min=0.1 * float(sizes.median())))


def errors(found: list[Tensor], truth: list[Tensor]) -> Errors:
    differences = [got.double() - want for got, want in zip(found, truth, strict=True)]
    sizes = [want.norm() for want in truth]
    largest = max(sizes[2:])
    relative = [_ratio(difference.norm(), size) for difference, size in zip(differences, sizes, strict=True)]
    parameters = max(error for error, size in zip(relative[2:], sizes[2:], strict=True) if size > VANISHING * largest)
    return Errors(_of_channels(differences[0], truth[0]), _of_channels(differences[1], truth[1]), parameters)


def _typical(found: Iterable[float]) -> float:
    """The geometric mean: of an error that a seed makes a hundred times as large, the others must not be lost."""
    return math.exp(statistics.fmean(math.log(max(each, 1e-12)) for each in found))


def row(shape: str, layout: str, dtype: torch.dtype, values: str, seeds: int = 5) -> Row:
    memory_format = torch.channels_last if layout == "NHWC" else torch.contiguous_format
    found: dict[str, list[Errors]] = {"ours": [], "eager": []}
    for seed in range(seeds):
        ours, eager, *maps = blocks(shape, dtype, values, seed)
        truth = results(copy.deepcopy(eager).double(), *(tensor.double() for tensor in maps))
        dense = [tensor.contiguous(memory_format=memory_format) for tensor in maps]
        found["ours"].append(errors(results(ours, *dense), truth))
        found["eager"].append(errors(results(eager, *dense), truth))
    typical = {name: Errors(*map(_typical, zip(*each, strict=True))) for name, each in found.items()}
    return Row(dtype, shape, layout, values, **typical)


def rows(shapes: Iterable[str], dtypes: Iterable[torch.dtype], values: Iterable[str] = tuple(VALUES)) -> Iterator[Row]:
    for dtype in dtypes:
        for shape in shapes:
            for layout in LAYOUTS:
                for name in values:
                    yield row(shape, layout, dtype, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--dtype", default=",".join(DTYPES))
    parser.add_argument("--values", default=",".join(VALUES))
    arguments = parser.parse_args()
    print("relative error, ours / eager                                " + "".join(f"{name:>24}" for name in QUANTITIES))
    dtypes = [DTYPES[name] for name in arguments.dtype.split(",")]
    for found in rows(arguments.shapes.split(","), dtypes, arguments.values.split(",")):
        pairs = (f"{ours:.1e} / {eager:.1e}" for ours, eager in zip(found.ours, found.eager, strict=True))
        name = str(found.dtype).removeprefix("torch.")
        print(f"  {name:>8} {found.shape:>14} {found.layout} {found.values:>16}" + "".join(f"{pair:>24}" for pair in pairs))


if __name__ == "__main__":
    main()
