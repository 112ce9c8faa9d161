"""process_group=: images split over processes along a spatial dimension, against the same images in one process."""

from __future__ import annotations

import os
import socket
import traceback

import eager
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gcnet_ext import GlobalContextBlock, _library

pytestmark = pytest.mark.usefixtures("kernels")

FUSIONS = ("channel_add", "channel_mul")
SHAPE = (3, 16, 12, 10)


def inputs(dtype: torch.dtype, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    # One process has the largest logits by far, another has none that counts.
    x[:, :, -3:] *= 4
    if layout == "channels_last":
        x, grad = (tensor.to(memory_format=torch.channels_last) for tensor in (x, grad))
    return x, grad


def block_of(pooling: str, dtype: torch.dtype, group=None) -> GlobalContextBlock:
    block = GlobalContextBlock(16, 1 / 4, pooling, FUSIONS, process_group=group)
    return eager.randomise(block).to(torch.float64 if dtype == torch.float64 else torch.float32)


CASES = [
    (pooling, dtype, layout, dim)
    for pooling in ("att", "avg")
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
    for layout in ("contiguous", "channels_last")
    for dim in (2, 3)
]


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, sums: float = 1) -> None:
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype] * sums
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


def work(rank: int, size: int, port: int, failures) -> None:
    try:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.set_num_threads(1)
        dist.init_process_group("gloo", rank=rank, world_size=size)
        for pooling, dtype, layout, dim in CASES:
            x, grad = inputs(dtype, layout)
            whole = block_of(pooling, dtype)
            x_whole = x.clone().requires_grad_()
            want = whole(x_whole)
            want.backward(grad)
            # Unequal parts: the last process takes what is left.
            cuts = [index * (SHAPE[dim] // size) for index in range(size)] + [SHAPE[dim]]
            part = (slice(None),) * dim + (slice(cuts[rank], cuts[rank + 1]),)
            block = block_of(pooling, dtype, dist.group.WORLD)
            own = x[part].clone().requires_grad_()
            out = block(own)
            out.backward(grad[part])
            close(out, want[part], dtype)
            close(own.grad, x_whole.grad[part], dtype, 10)
            for (name, parameter), expected in zip(block.named_parameters(), whole.parameters(), strict=True):
                total = parameter.grad.clone()
                dist.all_reduce(total)
                if name != "conv_mask.bias":
                    scale = float(expected.grad.abs().max()) or 1.0
                    close(total / scale, expected.grad / scale, dtype, 10)
                else:
                    assert total.abs().max() == 0
        dist.destroy_process_group()
    except Exception:
        failures.put(f"process {rank}: {traceback.format_exc()}")
        raise


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_equals_the_unsplit_result(processes):
    """Output, gradient of the own part, and the sum of the parameters' gradients, for every case."""
    failures = mp.get_context("spawn").SimpleQueue()
    try:
        mp.spawn(work, args=(processes, free_port(), failures), nprocs=processes)
    except mp.ProcessRaisedException:
        pytest.fail(failures.get())


def test_a_mask_that_is_not_the_plain_layer(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        block = block_of("att", torch.float32, dist.group.WORLD)
        block.conv_mask = torch.nn.Sequential(block.conv_mask)
        with pytest.raises(RuntimeError, match="conv_mask must be the plain 1x1 convolution with a process_group"):
            block(torch.ones(1, 16, 2, 2))
    finally:
        dist.destroy_process_group()


def test_without_kernels(monkeypatch, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        monkeypatch.setattr(_library, "_kernel_devices", frozenset())
        block = block_of("att", torch.float32, dist.group.WORLD)
        with pytest.raises(RuntimeError, match="process_group needs the compiled kernels"):
            block(torch.ones(1, 16, 2, 2))
    finally:
        dist.destroy_process_group()
