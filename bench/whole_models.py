"""Whole models: what the blocks add to the time of a forward pass and of a training step.

    python bench/whole_models.py [--models resnet50,seresnet50] [--images 4] [--layouts NCHW,NHWC] [--compile] [--rounds 7]
                                 [--json FILE]

Four variants of one net: without any context block, with the peer's, with ours, and with ours that take the addition and the
ReLU behind them along. The peer's is the block of plain PyTorch in ResNet-50, which has the paper's placement (behind the last
norm of every residual block of c3 to c5), and timm's own in timm's models.

The share of a variant is what it adds to the net without blocks, over the time of that net. A whole net has 50 layers that are
not looked at, whose noise is larger than what is looked for. So the tails of the residual blocks are timed alone, each from its
last convolution's output to its own, as they were in the net, variant after variant; their sums are subtracted. Compiled, the
tails of a net are one graph, because a compiled net looks at its guards once, and their maps are channels_last, as compiled
convolutions write them; to train they are not timed alone, because torch.compile makes another backward pass of them alone than
of the net. The difference of the whole nets stands beside it, with a 95 % interval of the mean of its rounds. A library that is
missing is left out.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import frames
import measure
import torch
from peers import Eager
from torch import Tensor, nn

import gcnet_ext

SIZE = 224
VARIANTS = ("without", "peer", "ours", "ours and tail")
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
BLOCKS = ("context_block", "se", "attn")
"""The names of a residual block's last block in these nets."""


# ---- nets --------------------------------------------------------------------------------------------------------------------


def eager_of(block: gcnet_ext.GlobalContextBlock) -> Eager:
    eager = Eager(block.inplanes, block.planes, block.fusion_types)
    eager.load_state_dict(block.state_dict())
    return eager


def with_blocks(net: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A copy of the net with other modules in the place of its blocks."""
    net = copy.deepcopy(net)
    for residual, name in residual_blocks(net):
        setattr(residual, name, make(getattr(residual, name)))
    return net


def residual_blocks(net: nn.Module) -> list[tuple[Any, str]]:
    """The residual blocks of the net that have a context block, and its name in each."""
    return [(part, name) for part in net.modules() for name in BLOCKS if getattr(part, name, None) is not None]


def resnet50() -> dict[str, nn.Module]:
    """The paper's: 13 blocks that add, ratio 1/16."""
    plain = importlib.import_module("torchvision.models").resnet50()
    ours = copy.deepcopy(plain)
    gcnet_ext.insert_blocks(ours, stages=(2, 3, 4), ratio=1 / 16, fuse_tail=False)
    for name, parameter in ours.named_parameters():
        if "context_block" in name:
            nn.init.normal_(parameter, std=0.01)
    tail = copy.deepcopy(ours)
    gcnet_ext.replace_blocks(tail)
    variants = with_blocks(ours, lambda _: nn.Identity()), with_blocks(ours, eager_of), ours, tail
    return dict(zip(VARIANTS, variants, strict=True))


def timm_model(name: str) -> dict[str, nn.Module]:
    peer = importlib.import_module("timm").create_model(name)
    for norm in (part for part in peer.modules() if isinstance(part, nn.BatchNorm2d)):
        nn.init.ones_(norm.weight)  # timm's last norms begin with zeros, which no block changes
    ours, tail = copy.deepcopy(peer), copy.deepcopy(peer)
    gcnet_ext.replace_blocks(ours, fuse_tail=False)
    gcnet_ext.replace_blocks(tail)
    return dict(zip(VARIANTS, (with_blocks(peer, lambda _: nn.Identity()), peer, ours, tail), strict=True))


OF_TIMM = ("seresnet50", "seresnet18", "ecaresnet50t", "gcresnet50t")
MODELS: dict[str, Callable[[], dict[str, nn.Module]]] = {
    "resnet50, GC at c3-c5": resnet50,
    **{f"timm {name}": functools.partial(timm_model, name) for name in OF_TIMM},
}


# ---- tails -------------------------------------------------------------------------------------------------------------------


class Given(nn.Module):
    """A shortcut that was recorded."""

    def __init__(self, shortcut: Tensor) -> None:
        super().__init__()
        self.shortcut = shortcut

    def forward(self, _x: Tensor) -> Tensor:
        return self.shortcut


class Convolved(nn.Module):
    """Stands for the last convolution, and returns its output, which the tail may overwrite as it may in the net."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view_as(x)


# A tail takes the norm behind a convolution along, because nobody else has what a convolution returns.
gcnet_ext.blocks._layers.METHODS[Convolved] = {}
gcnet_ext.models.tail.WITH_NEW_OUTPUTS += (Convolved,)


class Tail(NamedTuple):
    """The end of a residual block, as a module that takes the output of the last convolution, and what it was called with."""

    module: nn.Module
    x: Tensor
    shortcut: Tensor


class Tails(nn.Module):
    """Several tails, one after the other."""

    def __init__(self, found: list[Tail]) -> None:
        super().__init__()
        self.ends = nn.ModuleList(tail.module for tail in found)

    def forward(self, *maps: Tensor) -> list[Tensor]:
        return [end(x) for end, x in zip(self.ends, maps, strict=True)]


def tails(net: nn.Module, x: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> list[Tail]:
    """The tails of the net's residual blocks, with what they get where the net gets x. A net without such blocks has none."""
    kept: dict[int, list[Tensor]] = {}
    handles = []
    found = [residual for residual, name in residual_blocks(net) if name != "attn"]

    def keep(residual: Any, output: Tensor) -> None:
        kept.setdefault(id(residual), []).append(output.detach().clone(memory_format=memory_format))

    for residual in found:
        last = residual.conv3 if hasattr(residual, "conv3") else residual.conv2
        handles.append(last.register_forward_hook(lambda _m, _i, output, residual=residual: keep(residual, output)))
        first = residual if residual.downsample is None else residual.downsample
        if first is residual:
            handles.append(residual.register_forward_pre_hook(lambda residual, inputs: keep(residual, inputs[0])))
        else:
            handles.append(first.register_forward_hook(lambda _m, _i, output, residual=residual: keep(residual, output)))
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    made = []
    for residual in found:
        first, second = kept[id(residual)]
        output, shortcut = (second, first) if residual.downsample is None else (first, second)
        made.append(Tail(_end_of(residual, shortcut), output, shortcut))
    return made


def _end_of(residual: nn.Module, shortcut: Tensor) -> nn.Module:
    """A copy of the residual block with the identity in the place of all layers before its last norm."""
    end: Any = copy.deepcopy(residual)
    last = "bn3" if hasattr(end, "bn3") else "bn2"
    for name, part in list(end.named_children()):
        if name not in (last, *BLOCKS, "relu", f"act{last[-1]}") and part is not None:
            setattr(end, name, Convolved() if name == f"conv{last[-1]}" else nn.Identity())
    end.downsample = Given(shortcut)
    if hasattr(end, "relu"):  # torchvision's one is called before the last convolution, too
        vars(end)["_to_the_norm"] = getattr(end, f"conv{last[-1]}")
    return end


# ---- times -------------------------------------------------------------------------------------------------------------------


def infer(module: Callable[..., Any], *maps: Tensor) -> None:
    with torch.no_grad():
        module(*maps)


def train(module: nn.Module, x: Tensor) -> None:
    module(x).sum().backward()


class InferTails:
    """A call of tails. What they get is made anew before each call, as they may have overwritten it."""

    def __init__(self, run: Callable[..., Any], maps: list[Tensor]) -> None:
        self.run, self.maps = run, maps
        self.kept = [x.clone(memory_format=torch.preserve_format) for x in maps]

    def prepare(self) -> None:
        for x, kept in zip(self.maps, self.kept, strict=True):
            x.copy_(kept)

    def __call__(self) -> None:
        infer(self.run, *self.maps)


def train_tails(module: nn.Module, maps: list[Tensor], wanted: list[Tensor], grads: list[Tensor]) -> None:
    torch.autograd.grad(module(*maps), wanted, grads)


def seconds_of(call: Callable[[], Any]) -> float:
    if isinstance(call, InferTails):
        call.prepare()
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def check(variants: dict[str, nn.Module], x: Tensor) -> None:
    """Refuses to time a wrong result."""
    with torch.no_grad():
        peer, *ours = (variants[name].eval()(x) for name in VARIANTS[1:])
    for each in ours:
        error = float((peer - each).norm() / peer.norm())
        if not error < 1e-3:
            raise SystemExit(f"the models with the peer's blocks and with ours differ: relative error {error:.2e}")


def timed(calls: dict[str, list[Callable[[], Any]]], rounds: int) -> dict[str, list[float]]:
    """By variant, the sum of the seconds of its calls, in every round. The variants take turns with every call."""
    for each in calls.values():
        for call in each:
            call()
    found: dict[str, list[float]] = {name: [0.0] * rounds for name in calls}
    for turn in range(rounds):
        for step in zip(*calls.values(), strict=True):
            order = list(zip(calls, step, strict=True))
            for name, call in order[turn % len(order) :] + order[: turn % len(order)]:
                found[name][turn] += seconds_of(call)
    return found


def of_net(net: nn.Module, x: Tensor, direction: str, compiled: bool) -> Callable[[], Any]:
    return functools.partial(infer if direction == "infer" else train, torch.compile(net) if compiled else net, x)


def of_tails(found: list[Tail], direction: str, compiled: bool) -> Callable[[], Any]:
    module = Tails(found)
    run, maps = torch.compile(module) if compiled else module, [tail.x for tail in found]
    if direction == "infer":
        return InferTails(run, maps)
    wanted = [*maps, *(tail.shortcut for tail in found)]
    for tensor in wanted:
        tensor.requires_grad_()
    return functools.partial(train_tails, run, maps, [*wanted, *module.parameters()], [torch.ones_like(x) for x in maps])


def tails_of_net(net: nn.Module, x: Tensor, direction: str, compiled: bool) -> list[Callable[[], Any]]:
    """The calls that are timed for the tails of the net: one for each, or compiled, one for all, and none to train."""
    if compiled and direction == "train":
        return []
    found = tails(net, x, torch.channels_last if compiled else torch.preserve_format)
    groups = [found] if compiled and found else [[tail] for tail in found]
    return [of_tails(group, direction, compiled) for group in groups]


def rows_of(
    name: str, variants: dict[str, nn.Module], x: Tensor, layout: str, compiled: bool, rounds: int
) -> list[dict[str, Any]]:
    """One row per direction and variant."""
    found = []
    x = x.to(memory_format=LAYOUTS[layout])
    for module in variants.values():
        module.to(memory_format=LAYOUTS[layout])
    check(variants, x)
    for direction in ("infer", "train"):
        for module in variants.values():
            module.train(direction == "train")
        torch._dynamo.reset()
        whole = timed({key: [of_net(net, x, direction, compiled)] for key, net in variants.items()}, rounds)
        torch._dynamo.reset()
        ends = {key: tails_of_net(net, x, direction, compiled) for key, net in variants.items()}
        parts = timed(ends, 3 * rounds)
        without = statistics.median(whole["without"])
        for key in VARIANTS:
            differences = [a - b for a, b in zip(whole[key], whole["without"], strict=True)]
            more = [a - b for a, b in zip(parts[key], parts["without"], strict=True)]
            spread = 1.96 * statistics.stdev(differences) / math.sqrt(rounds) if rounds > 1 else math.nan
            found.append({
                "model": name, "direction": direction, "variant": key, "images": x.shape[0], "size": x.shape[2],
                "layout": layout, "compiled": compiled, "milliseconds": statistics.median(whole[key]) * 1e3,
                "share": statistics.median(more) / without if ends[key] else None,
                "whole": statistics.mean(differences) / without, "whole_interval": spread / without,
            })  # fmt: skip
    return found


def rows(
    rounds: int,
    models: tuple[str, ...] = tuple(MODELS),
    images: tuple[int, ...] = (4,),
    layouts: tuple[str, ...] = ("NCHW",),
    compiled: bool = False,
) -> list[dict[str, Any]]:
    found = []
    for name in models:
        try:
            variants = MODELS[name]()
        except ImportError as error:
            print(f"{name} is left out: {error}")
            continue
        for count in images:
            x = torch.randn(count, 3, SIZE, SIZE)
            for layout in layouts:
                found += rows_of(name, variants, x, layout, compiled, rounds)
    return found


def show(found: list[dict[str, Any]]) -> None:
    shown = (
        {key: row[key] for key in ("model", "images", "layout", "compiled", "direction", "variant")}
        | {"ms per batch": row["milliseconds"]}
        | {"the blocks' share": "" if row["share"] is None else f"{row['share']:.1%}"}
        | {"of whole nets": f"{row['whole']:.1%} +- {row['whole_interval']:.1%}"}
        for row in found
    )
    print(frames.text("whole models", shown, decimals=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", help="parts of their names, separated by commas")
    parser.add_argument("--images", default="4", help="sizes of batches, separated by commas")
    parser.add_argument("--layouts", default="NCHW", help=", ".join(LAYOUTS))
    parser.add_argument("--compile", action="store_true", help="by torch.compile, the nets and the tails")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=measure.output_file, default=None, help="a file that the results are added to")
    arguments = parser.parse_args()
    measure.keep_memory()
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 256
    wanted = [name for name in MODELS if any(part in name.split(",")[0].split() for part in arguments.models.split(","))]
    found = rows(
        arguments.rounds,
        models=tuple(wanted) if arguments.models else tuple(MODELS),
        images=tuple(int(count) for count in arguments.images.split(",")),
        layouts=tuple(arguments.layouts.split(",")),
        compiled=arguments.compile,
    )
    show(found)
    if arguments.json is not None:
        file: Path = arguments.json
        before = json.loads(file.read_text()) if file.exists() and file.stat().st_size else {"rows": []}
        file.write_text(json.dumps({"machine": measure.machine(), "rows": [*before["rows"], *found]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
