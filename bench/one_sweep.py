"""Times a block with a residual and a final ReLU against the block, `add_` and `relu_`: one sweep over the output, or three.

    python bench/one_sweep.py [--dtype float32] [--rounds 15]

Each round calls every candidate in turn, once untimed and then timed, so that all find their own tensors in the caches. A
figure is the fastest of the rounds, in multiples of x.clone(); the geometric means are those of the maps above 1 MB.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence

import measure
import torch
from torch import Tensor, nn

import gcnet_ext

SHAPES = (
    (16, 64, 32, 32), (8, 256, 56, 56), (8, 512, 28, 28), (8, 1024, 14, 14), (8, 2048, 7, 7), (1, 1024, 50, 84),
    (1, 512, 100, 168),
)  # fmt: skip
LARGE = 1e6  # bytes of a map that counts in the mean
Call = Callable[[], object]


def candidates(x: Tensor) -> dict[str, Call]:
    """Both ways, in inference and in training."""
    channels = x.shape[1]
    fusions = ("channel_mul", "channel_add")
    one, plain = (
        gcnet_ext.GlobalContextBlock(channels, fusion_types=fusions, final_activation=final) for final in ("relu", "none")
    )
    for parameter in one.parameters():
        nn.init.normal_(parameter, std=0.1)
    plain.load_state_dict(one.state_dict())
    one, plain = one.to(x.dtype), plain.to(x.dtype)
    residual, grad = torch.randn_like(x), torch.randn_like(x)
    leaf, own = x.clone().requires_grad_(), residual.clone().requires_grad_()

    def infer(call: Callable[[Tensor, Tensor], Tensor]) -> Call:
        def run() -> None:
            with torch.no_grad():
                call(x, residual)

        return run

    def train(call: Callable[[Tensor, Tensor], Tensor]) -> Call:
        def run() -> None:
            call(leaf, own).backward(grad)
            leaf.grad = own.grad = None

        return run

    def three(x: Tensor, residual: Tensor) -> Tensor:
        return plain(x).add_(residual).relu_()

    return {
        "clone": x.clone,
        "one, infer": infer(one),
        "three, infer": infer(three),
        "one, train": train(one),
        "three, train": train(three),
    }


def fastest(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    best = dict.fromkeys(calls, math.inf)
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    measure.keep_memory()
    ratios: dict[str, list[float]] = {"infer": [], "train": []}
    for shape in SHAPES:
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape).to(getattr(torch, arguments.dtype)).contiguous(memory_format=layout)
            best = fastest(candidates(x), arguments.rounds)
            name = f"{'x'.join(map(str, shape))} {'NCHW' if layout is torch.contiguous_format else 'channels_last'}"
            cells = []
            for way, found in ratios.items():
                one, three = best[f"one, {way}"], best[f"three, {way}"]
                cells.append(f"{way} {one / best['clone']:5.2f} and {three / best['clone']:5.2f} clones: {one / three:.2f}")
                if x.nbytes > LARGE:
                    found.append(one / three)
            print(f"{name:32}{'   '.join(cells)}", flush=True)
    print(", ".join(f"{way}: {mean(found):.2f}" for way, found in ratios.items()))


if __name__ == "__main__":
    main()
