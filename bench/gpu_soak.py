"""Whether the ticketed launches of the CUDA kernels always end, and always with the bits of a launch per stage.

    python bench/gpu_soak.py [--calls 2000] [--replays 1000]

Blocks of a ticketed launch wait for each other (csrc/cuda/tickets.cuh). So the block is called thousands of times, forward and
backward, with every lag and with and without clusters; a graph of it is replayed; and two streams run it at once. A launch
whose blocks wait for more than two seconds fails by itself.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import gcnet_ext
from gcnet_ext._tuning import CudaTuning, cuda_tuning

# One sample and many, few splits and many, and tiles that clusters share
SHAPES = ((1, 64, 12, 12), (16, 256, 28, 28), (3, 512, 40, 40), (2, 1024, 32, 32))
LAGS = (-1, 0, 1, 7, 10**6)
STAGES = CudaTuning(engine="v2")
TICKETS = tuple(CudaTuning(engine="tickets", lag=lag, cluster=cluster) for lag, cluster in itertools.product(LAGS, (1, 2)))


class Call(NamedTuple):
    """A block, and what it is called with."""

    block: nn.Module
    x: Tensor
    grad: Tensor

    def __call__(self) -> list[Tensor]:
        """The output and all gradients."""
        out = self.block(self.x)
        return [out.detach(), *torch.autograd.grad(out, [self.x, *self.block.parameters()], self.grad)]


def calls(
    device: str, shapes: Iterable[tuple[int, ...]] = SHAPES, dtypes: Iterable[torch.dtype] = (torch.float16,)
) -> list[Call]:
    """Of every shape and dtype."""
    torch.manual_seed(0)
    found = []
    for shape, dtype in itertools.product(shapes, dtypes):
        block = gcnet_ext.GlobalContextBlock(shape[1], ratio=1 / 16, fusion_types=("channel_mul", "channel_add"))
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.1)
        x, grad = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        found.append(Call(block.to(device, dtype), x.requires_grad_(), grad))
    return found


def under(tuning: CudaTuning, call: Call) -> list[Tensor]:
    with cuda_tuning(tuning):
        return call()


def differences(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> Tensor:
    """How many elements differ, without waiting for the device."""
    return torch.stack([(ours != theirs).sum() for ours, theirs in zip(found, wanted, strict=True)]).sum()


def soak(call: Call, count: int, tunings: Iterable[CudaTuning] = TICKETS) -> int:
    """How many elements differ in so many calls."""
    wanted = under(STAGES, call)
    each = itertools.cycle(tunings)
    return int(sum(differences(under(next(each), call), wanted) for _ in range(count)))


def replay(call: Call, count: int) -> int:
    """How many elements differ after each of so many replays of a graph."""
    wanted = under(STAGES, call)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        under(TICKETS[0], call)
    torch.cuda.current_stream().wait_stream(side)
    with cuda_tuning(CudaTuning(engine="tickets")), torch.cuda.graph(graph, stream=side):
        captured = call()
    found = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(count):
        captured[0].fill_(torch.nan)
        captured[1].fill_(torch.nan)
        graph.replay()
        found += differences(captured, wanted)
    return int(found)


def at_once(pair: list[Call], count: int) -> int:
    """How many elements differ where two streams call at once."""
    wanted = [under(STAGES, call) for call in pair]
    streams = [torch.cuda.Stream() for _ in pair]
    torch.cuda.synchronize()
    found = []
    for _ in range(count):
        for call, stream, expected in zip(pair, streams, wanted, strict=True):
            with torch.cuda.stream(stream):
                found.append(differences(under(CudaTuning(engine="tickets"), call), expected))
    torch.cuda.synchronize()
    return int(torch.stack(found).sum())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="in all")
    parser.add_argument("--replays", type=int, default=1000, help="of each graph")
    arguments = parser.parse_args()
    every = calls("cuda")
    wrong: dict[str, int] = {}

    def note(name: str, run: Callable[[], int]) -> None:
        wrong[name] = run()
        print(f"{name}: {wrong[name]} elements differ", flush=True)

    for call in every:
        shape = "x".join(map(str, call.x.shape))
        note(f"{shape}, {arguments.calls // len(every)} calls", lambda call=call: soak(call, arguments.calls // len(every)))
        note(f"{shape}, {arguments.replays} replays", lambda call=call: replay(call, arguments.replays))
    note("two streams at once", lambda: at_once(every[1:3], arguments.replays // 10))
    return 1 if any(wrong.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
