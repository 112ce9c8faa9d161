"""Whole models: what the blocks add to the time of a forward pass and of a training step, in plain PyTorch and compiled.

    python bench/whole_models.py [--rounds 7]

Three variants of one net, timed in turn: without any context block, with the block of plain PyTorch, and with ours. The share
of a block is what it adds to the net without, over the time of the net with it. ResNet-50 has the paper's placement (behind the
last norm of every residual block of c3 to c5); timm's models come with their own blocks, before and after replace_blocks.
A library that is missing is left out.
"""

from __future__ import annotations

import argparse
import copy
import importlib
from collections.abc import Callable
from typing import Any

import measure
import torch
from peers import Eager
from torch import Tensor, nn

import gcnet_ext

IMAGES, QUICK_IMAGES = (4, 3, 224, 224), (2, 3, 96, 96)
VARIANTS = ("without", "eager", "ours")


def swapped(model: nn.Module, wanted: Callable[[nn.Module], bool], make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A copy of the model with other modules in the place of some."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if wanted(module):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, make(module))
    return model


def eager_of(block: gcnet_ext.GlobalContextBlock) -> Eager:
    eager = Eager(block.inplanes, block.planes, block.fusion_types)
    eager.load_state_dict(block.state_dict())
    return eager


def resnet50() -> dict[str, nn.Module]:
    """The paper's: 13 blocks that add, ratio 1/16."""
    models = importlib.import_module("torchvision.models")
    ours = models.resnet50()
    gcnet_ext.insert_blocks(ours, stages=(2, 3, 4), ratio=1 / 16)
    for name, parameter in ours.named_parameters():
        if "context_block" in name:
            nn.init.normal_(parameter, std=0.01)
    is_ours = lambda module: isinstance(module, gcnet_ext.GlobalContextBlock)  # noqa: E731
    return {
        "without": swapped(ours, is_ours, lambda _: nn.Identity()),
        "eager": swapped(ours, is_ours, eager_of),
        "ours": ours,
    }


def timm_model(name: str) -> dict[str, nn.Module]:
    timm = importlib.import_module("timm")
    eager = timm.create_model(name)
    ours = copy.deepcopy(eager)
    gcnet_ext.replace_blocks(ours)
    without = swapped(eager, lambda module: type(module).__name__ == "GlobalContext", lambda _: nn.Identity())
    return {"without": without, "eager": eager, "ours": ours}


MODELS: dict[str, Callable[[], dict[str, nn.Module]]] = {
    "resnet50, GC at c3-c5": resnet50,
    "timm gcresnet50t": lambda: timm_model("gcresnet50t"),
    "timm gcresnext50ts": lambda: timm_model("gcresnext50ts"),
}


def infer(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def train(model: nn.Module, x: Tensor) -> None:
    model(x).sum().backward()


def check(variants: dict[str, nn.Module], x: Tensor) -> None:
    """Refuses to time a wrong result."""
    with torch.no_grad():
        eager, ours = (variants[name].eval()(x) for name in ("eager", "ours"))
    error = float((eager - ours).norm() / eager.norm())
    if not error < 1e-3:
        raise SystemExit(f"the models with eager blocks and with ours differ: relative error {error:.2e}")


def rows(rounds: int, quick: bool = False) -> list[dict[str, Any]]:
    """One row per model, direction and variant: time per image, and the share of the blocks."""
    found = []
    x = torch.randn(QUICK_IMAGES if quick else IMAGES)
    for name, make in MODELS.items():
        try:
            variants = make()
        except ImportError as error:
            print(f"{name} is left out: {error}")
            continue
        check(variants, x)
        for direction, step in (("infer", infer), ("train", train)):
            for model in variants.values():
                model.train(direction == "train")
            calls = {variant: lambda step=step, model=variants[variant]: step(model, x) for variant in VARIANTS}
            timed = measure.interleaved(calls, rounds)
            without = timed["without"].median
            for variant in VARIANTS:
                median = timed[variant].median
                found.append({
                    "model": name, "direction": direction, "variant": variant, "images": x.shape[0], "size": x.shape[2],
                    "milliseconds": median * 1e3, "iqr_milliseconds": timed[variant].iqr * 1e3,
                    "share": (median - without) / median,
                })  # fmt: skip
    return found


def show(found: list[dict[str, Any]]) -> None:
    print("whole models                     direction   variant     ms per batch      the blocks' share")
    for row in found:
        print(
            f"  {row['model']:<30} {row['direction']:<10} {row['variant']:<9} "
            f"{row['milliseconds']:9.1f} +- {row['iqr_milliseconds']:6.1f}   {row['share']:8.1%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    measure.keep_memory()
    torch.manual_seed(0)
    show(rows(arguments.rounds))


if __name__ == "__main__":
    main()
