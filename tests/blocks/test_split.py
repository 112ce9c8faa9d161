"""process_group=: images split over processes along a spatial dimension, against the same images in one process."""

from __future__ import annotations

import itertools
import os
import traceback

import eager
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import free_port

from gcnet_ext import GlobalContextBlock, _load
from gcnet_ext.ops import _split_pool

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


def part_of(rank: int, size: int, dim: int) -> tuple[slice, ...]:
    """Unequal parts: the last process takes what is left."""
    cuts = [index * (SHAPE[dim] // size) for index in range(size)] + [SHAPE[dim]]
    return (slice(None),) * dim + (slice(cuts[rank], cuts[rank + 1]),)


def valid_positions() -> torch.Tensor:
    """Some count: in the last sample none, and in the first one none of the first process's."""
    valid = torch.rand(SHAPE[0], *SHAPE[2:], generator=torch.Generator().manual_seed(1)) > 0.4
    valid[-1] = False
    valid[0, : SHAPE[2] // 2] = False
    valid[0, :, : SHAPE[3] // 2] = False
    return valid


def of_positions(part: tuple[slice, ...]) -> tuple[slice, ...]:
    """The part of a tensor without channels."""
    return part[:1] + part[2:]


def check_first(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """Output, gradient of the own part, and the sum of the parameters' gradients, for every case."""
    for (pooling, dtype, layout, dim), padded in itertools.product(CASES, (False, True)):
        x, grad = inputs(dtype, layout)
        part = part_of(rank, size, dim)
        residual, valid = (grad.flip(1), valid_positions()) if padded else (None, None)
        own_residual, own_valid = (residual[part], valid[of_positions(part)]) if padded else (None, None)
        whole = block_of(pooling, dtype)
        x_whole = x.clone().requires_grad_()
        want = whole(x_whole, residual, valid)
        want.backward(grad)
        block = block_of(pooling, dtype, group)
        own = x[part].clone().requires_grad_()
        out = block(own, own_residual, own_valid)
        out.backward(grad[part])
        close(out, want[part], dtype)
        close(own.grad, x_whole.grad[part], dtype, 10)
        for (name, parameter), expected in zip(block.named_parameters(), whole.parameters(), strict=True):
            total = parameter.grad.clone()
            dist.all_reduce(total, group=group)
            if name != "conv_mask.bias":
                scale = float(expected.grad.abs().max()) or 1.0
                close(total / scale, expected.grad / scale, dtype, 10)
            else:
                assert total.abs().max() == 0


def hooked(block: GlobalContextBlock) -> GlobalContextBlock:
    """A layer that is called, so that the scale depends on x by way of plain PyTorch, too."""
    block.channel_mul_conv[3].register_forward_hook(lambda module, inputs, output: output.tanh())
    return block


def penalised(block: GlobalContextBlock, x: torch.Tensor, valid: torch.Tensor | None) -> list[torch.Tensor]:
    """The gradient of x with create_graph, and the gradients of a penalty on it: of x and of every parameter."""
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(block(x, valid=valid).square().sum(), x, create_graph=True)
    wanted = [x, *block.parameters()]
    second = torch.autograd.grad(first.square().sum(), wanted, allow_unused=True, materialize_grads=True)
    return [first.detach(), *second]


def check_second(rank: int, size: int, group: dist.ProcessGroup) -> None:
    for pooling, valid in itertools.product(("att", "avg"), (None, valid_positions())):
        x, _ = inputs(torch.float64, "contiguous")
        part = part_of(rank, size, 2)
        want = penalised(hooked(block_of(pooling, torch.float64)), x, valid)
        own_valid = None if valid is None else valid[of_positions(part)]
        got = penalised(hooked(block_of(pooling, torch.float64, group)), x[part], own_valid)
        for ours, theirs in zip(got[:2], want[:2], strict=True):
            close(ours, theirs[part], torch.float64, 10 * float(theirs.abs().max()))
        for ours, theirs in zip(got[2:], want[2:], strict=True):
            dist.all_reduce(ours, group=group)
            close(ours, theirs, torch.float64, 10 * max(1.0, float(theirs.abs().max())))


def work(rank: int, size: int, port: int, members: list[int], failures) -> None:
    try:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.set_num_threads(1)
        dist.init_process_group("gloo", rank=rank, world_size=size)
        group = dist.new_group(members)  # every process must take part in making it
        if rank in members:
            check_first(members.index(rank), len(members), group)
            check_second(members.index(rank), len(members), group)
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        failures.put(f"process {rank}: {traceback.format_exc()}")
        raise


@pytest.mark.parametrize("members", [[0], [0, 1, 2, 3], [0, 2]], ids=str)
def test_equals_the_unsplit_result(members):
    """First and second derivatives, in groups of all processes and in one of some of them, which number them anew."""
    failures = mp.get_context("spawn").SimpleQueue()
    size = max(members) + 1
    try:
        mp.spawn(work, args=(size, free_port(), members, failures), nprocs=size)
    except mp.ProcessRaisedException:
        pytest.fail(failures.get())


@pytest.fixture
def alone(tmp_path):
    """A group of one process, this one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_mask_that_is_not_the_plain_layer(alone):
    block = block_of("att", torch.float32, alone)
    block.conv_mask = torch.nn.Sequential(block.conv_mask)
    with pytest.raises(RuntimeError, match="conv_mask must be a plain 1x1 convolution without hooks"):
        block(torch.ones(1, 16, 2, 2))


def test_without_kernels(monkeypatch, alone):
    monkeypatch.setattr(_load, "kernel_devices", frozenset())
    block = block_of("att", torch.float32, alone)
    with pytest.raises(RuntimeError, match="process_group needs the compiled kernels"):
        block(torch.ones(1, 16, 2, 2))


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_inside_a_functional_transform(alone, transform):
    block, x = block_of("att", torch.float32, alone), torch.ones(2, 1, 16, 2, 2)
    calls = {
        "vmap": lambda: torch.func.vmap(block)(x),
        "grad": lambda: torch.func.grad(lambda x: block(x).sum())(x[0]),
        "jvp": lambda: torch.func.jvp(block, (x[0],), (x[0],)),
    }
    with pytest.raises(RuntimeError, match=r"^process_group must be None inside a transform of torch.func"):
        calls[transform]()
    given = {name: parameter.detach() for name, parameter in block.named_parameters()}
    assert torch.func.functional_call(block, given, (x[0],)).shape == x[0].shape


@pytest.mark.parametrize("needed", [["conv_mask.bias"], ["conv_mask.weight"], []], ids=str)
def test_create_graph_with_frozen_parameters(alone, needed):
    block = block_of("att", torch.float64, alone)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name in needed or name.startswith("channel_add"))
    x, _ = inputs(torch.float64, "contiguous")
    wanted = [parameter for parameter in block.parameters() if parameter.requires_grad]
    want = torch.autograd.grad(block(x).square().sum(), wanted)
    got = torch.autograd.grad(block(x).square().sum(), wanted, create_graph=True)
    for ours, theirs in zip(got, want, strict=True):
        close(ours.detach(), theirs, torch.float64, 10 * max(1.0, float(theirs.abs().max())))


def test_accuracy_under_autocast(alone):
    """No product of the pool is cast, forward, backward or with create_graph."""
    block = block_of("att", torch.float32, alone)
    x, _ = inputs(torch.float32, "contiguous")
    weight, bias = block.conv_mask.weight, block.conv_mask.bias

    def results(x, weight, bias):
        leaf = x.clone().requires_grad_()
        context = _split_pool.attention_pool(leaf, weight, bias, None, alone)
        (plain,) = torch.autograd.grad(context.square().sum(), leaf, retain_graph=True)
        (first,) = torch.autograd.grad(context.square().sum(), leaf, create_graph=True)
        return [context, plain, first, *torch.autograd.grad(first.square().sum(), leaf)]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(x, weight, bias)
    for ours, theirs in zip(got, results(x.double(), weight.double(), bias.double()), strict=True):
        assert float((ours - theirs).detach().abs().max()) <= 1e-5 * float(theirs.detach().abs().max())
