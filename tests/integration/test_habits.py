"""What people do with every PyTorch module, for each block of the family."""

from __future__ import annotations

import copy
import io
import multiprocessing
import threading

import eager
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from gcnet_ext import GlobalContextBlock, NonLocalBlock, SimplifiedNonLocalBlock, SqueezeExcitation

BLOCKS = {
    "gc": lambda: GlobalContextBlock(16, 1 / 4, fusion_types=("channel_add", "channel_mul")),
    "se": lambda: SqueezeExcitation(16, 1 / 4),
    "snl": lambda: SimplifiedNonLocalBlock(16),
    "nl": lambda: NonLocalBlock(16),
}
FUSED = ("gc", "se", "snl")


@pytest.fixture(params=BLOCKS)
def block(request) -> nn.Module:
    return eager.randomise(BLOCKS[request.param]())


def image(requires_grad: bool = False) -> torch.Tensor:
    x = torch.randn(2, 16, 9, 7, generator=torch.Generator().manual_seed(0))
    return x.requires_grad_(requires_grad)


def gradients(function, block: nn.Module) -> list[torch.Tensor]:
    block.zero_grad()
    x = image(True)
    function(x).square().sum().backward()
    return [x.grad, *(parameter.grad.clone() for parameter in block.parameters())]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(block, use_reentrant):
    plain = gradients(block, block)
    recomputed = gradients(lambda x: checkpoint(block, x, use_reentrant=use_reentrant), block)
    assert all(torch.equal(got, want) for got, want in zip(recomputed, plain, strict=True))


def test_copies(block):
    """deepcopy, torch.save and load, and moving to shared memory: the same bits, on memory of their own."""
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(block), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(image()), block(image()))
        nn.init.zeros_(next(other.parameters()))
        assert next(block.parameters()).abs().sum() > 0
    want = block(image())
    assert torch.equal(block.share_memory()(image()), want)
    assert all(parameter.is_shared() for parameter in block.parameters())


def test_moving_average(block):
    average = torch.optim.swa_utils.AveragedModel(block, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(block)
    assert torch.equal(average(image()), block(image()))
    before = [parameter.detach().clone() for parameter in block.parameters()]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(1.0)
    average.update_parameters(block)
    for mean, old in zip(average.module.parameters(), before, strict=True):
        assert torch.allclose(mean, old + 0.5)


class Blocked(Dataset):
    """A data set that applies the block in the worker, as augmentation by a model does."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        with torch.no_grad():
            return self.block(image() * (index + 1))


def test_workers_by_fork_after_kernels_have_run(block):
    """The threads of the parent's kernels are not in the child; the worker has one thread, and uses no other."""
    x = torch.randn(4, 16, 64, 64)
    block(x)  # on all threads of the parent
    loader = DataLoader(Blocked(block), batch_size=None, num_workers=2, timeout=60, multiprocessing_context="fork")
    for index, got in enumerate(loader):
        assert torch.allclose(got, block(image() * (index + 1)).detach(), atol=1e-5)


def answer(block: nn.Module, queue) -> None:
    torch.set_num_threads(1)
    queue.put(block(image()).detach().numpy())


def test_a_process_of_its_own(block):
    """Pickled to a spawned process, which imports the package anew."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=answer, args=(block, queue))
    process.start()
    got = torch.from_numpy(queue.get(timeout=120))
    process.join()
    assert torch.allclose(got, block(image()), atol=1e-6)


def test_several_python_threads(block):
    want, found = block(image()).detach(), [None] * 8

    def work(index: int) -> None:
        for _ in range(5):
            found[index] = block(image()).detach()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got, want) for got in found)


def test_deterministic_algorithms(block):
    want = gradients(block, block)
    torch.use_deterministic_algorithms(True)
    try:
        got = gradients(block, block)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_inference_mode(block):
    want = block(image()).detach()
    with torch.inference_mode():
        out = block(image())
    assert out.is_inference()
    assert torch.equal(out, want)


@pytest.mark.parametrize("kind", BLOCKS)
def test_without_memory(kind):
    """On the meta device and under FakeTensorMode: shapes, dtypes and layouts, forward and backward, and no number."""
    with torch.device("meta"):
        block = BLOCKS[kind]()
    x = torch.empty(2, 16, 9, 7, device="meta", requires_grad=True)
    out = block(x)
    out.sum().backward()
    assert (out.shape, out.device.type, x.grad.shape) == (x.shape, "meta", x.shape)
    materialised = block.to_empty(device="cpu")
    for parameter in materialised.parameters():
        nn.init.zeros_(parameter)
    assert materialised(image()).shape == x.shape
    with FakeTensorMode():
        block = BLOCKS[kind]()
        x = torch.empty(2, 16, 9, 7).to(memory_format=torch.channels_last).requires_grad_()
        out = block(x)
        out.sum().backward()
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("kind", FUSED)
def test_profiler_shows_readable_names_with_shapes(kind):
    block = BLOCKS[kind]()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        block(image(True)).sum().backward()
    shapes = {event.key: event.input_shapes for event in profile.key_averages(group_by_input_shape=True)}
    assert shapes["gcnet_ext::global_context"][0] == [2, 16, 9, 7]
    assert shapes["gcnet_ext::global_context_backward"][:2] == [[2, 16, 9, 7], [2, 16, 9, 7]]


def test_optimizers_and_schedulers(block):
    """A few steps of AdamW with weight decay on a copy and on the original give the same parameters."""

    def train(module: nn.Module) -> list[torch.Tensor]:
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(image()).square().mean().backward()
            optimizer.step()
        return [parameter.detach() for parameter in module.parameters()]

    other = copy.deepcopy(block)
    assert all(torch.equal(a, b) for a, b in zip(train(block), train(other), strict=True))
