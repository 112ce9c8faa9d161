"""Models of timm, torchvision and mmcv before and after replace_blocks: how many times faster, forward and training step.

    python bench/whole_models.py

Every round times both once, in turn; each figure is the ratio of the fastest rounds. A library that is missing is left out.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import math
import os
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gcnet_ext import replace_blocks

# Freed memory stays in the heap: otherwise each large output is faulted in anew, which hides what is compared.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 33), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
IMAGE, MAP = (4, 3, 160, 160), (4, 256, 56, 56)
# name: module to import, what makes the model of it, input
MODELS: dict[str, tuple[str, Callable, tuple[int, ...]]] = {
    "timm gcresnet50t": ("timm", lambda timm: timm.create_model("gcresnet50t"), IMAGE),
    "timm gc_efficientnetv2_rw_t": ("timm", lambda timm: timm.create_model("gc_efficientnetv2_rw_t"), IMAGE),
    "torchvision mobilenet_v3_large": ("torchvision.models", lambda models: models.mobilenet_v3_large(), IMAGE),
    "mmcv ContextBlock(256)": ("mmcv.cnn", lambda cnn: nn.Sequential(cnn.ContextBlock(256, 1 / 16)), MAP),
}


def infer(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model.eval()(x)


def train(model: nn.Module, x: Tensor) -> None:
    model.train()(x).sum().backward()


def speedup(before: nn.Module, after: nn.Module, step: Callable, x: Tensor, rounds: int) -> float:
    best = [math.inf, math.inf]
    for _ in range(rounds):
        for index, model in enumerate((before, after)):
            start = time.perf_counter()
            step(model, x)
            best[index] = min(best[index], time.perf_counter() - start)
    return best[0] / best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    if not KEEP_MEMORY.keys() <= os.environ.keys():  # the C library reads them when the process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    for name, (library, make, sizes) in MODELS.items():
        try:
            before = make(importlib.import_module(library))
        except ImportError as error:
            print(f"{name:<32} left out: {error}")
            continue
        after, x = copy.deepcopy(before), torch.randn(sizes)
        blocks = len(replace_blocks(after).replaced)
        figures = [f"{step.__name__} {speedup(before, after, step, x, rounds):.2f}x" for step in (infer, train)]
        print(f"{name:<32} {blocks:>3} blocks  {'  '.join(figures)}", flush=True)


if __name__ == "__main__":
    main()
