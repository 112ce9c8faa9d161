"""Replaced and inserted blocks under DistributedDataParallel and FSDP2."""

from __future__ import annotations

import copy
import os
import sys
import traceback
from collections import OrderedDict

import eager
import imitations
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import free_port
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gcnet_ext import insert_blocks, replace_blocks

PROCESSES = 2


def replaced(model: nn.Module) -> None:
    assert len(replace_blocks(model).replaced) == 2


def inserted(model: nn.Module) -> None:
    for name in insert_blocks(model, (2,), 1 / 4):
        block = model.get_submodule(name)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))


def with_tails(model: nn.Module) -> None:
    assert list(replace_blocks(model).tails.values()) == ["", ""]


def models():
    """A model, and what is done to it."""
    pasted = nn.Sequential(*(eager.ContextBlock(16, 1 / 4, "att", ("channel_add", "channel_mul")) for _ in range(2)))
    yield eager.randomise(pasted).double(), replaced
    residual = imitations.library("torchvision.models.resnet").BasicBlock
    stage = nn.Sequential(OrderedDict(layer2=nn.Sequential(residual(16, 16), residual(16, 16))))
    yield copy.deepcopy(eager.randomise(stage).double().eval()), inserted
    insert_blocks(stage, (2,), 1 / 4, fuse_tail=False)
    yield eager.randomise(stage).double().eval(), with_tails


def gradients(model: nn.Module) -> list[torch.Tensor]:
    found = [parameter.grad for parameter in model.parameters()]
    return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone() for grad in found if grad is not None]


def check(rank: int) -> None:
    x = torch.randn(4 * PROCESSES, 16, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = x[4 * rank : 4 * (rank + 1)]
    for model, change in models():
        truth = copy.deepcopy(model)
        change(truth)
        truth(x).square().mean().backward()
        want = gradients(truth)
        for strategy in ("ddp", "ddp before", "fsdp"):
            if strategy == "ddp before" and change is inserted:
                continue  # new parameters, which it would not know
            each = copy.deepcopy(model)
            wrapped = DistributedDataParallel(each) if strategy == "ddp before" else each
            change(each)
            if strategy == "ddp":
                wrapped = DistributedDataParallel(each)
            elif strategy == "fsdp":
                for block in (*getattr(each, "layer2", each), each):
                    fully_shard(block)
            for _ in range(2):
                each.zero_grad()
                wrapped(own).square().mean().backward()
            for got, expected in zip(gradients(each), want, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-11, msg=f"{change.__name__}, {strategy}")


def work(rank: int, port: int, failures) -> None:
    try:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.set_num_threads(1)
        sys.modules.update(imitations.missing())
        dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
        check(rank)
        dist.destroy_process_group()
    except Exception:
        failures.put(f"process {rank}: {traceback.format_exc()}")
        raise
    os._exit(0)  # see test_train.py


def test_gradients_of_the_processes_are_those_of_one():
    failures = mp.get_context("spawn").SimpleQueue()
    try:
        mp.spawn(work, args=(free_port(), failures), nprocs=PROCESSES)
    except mp.ProcessRaisedException:
        pytest.fail(failures.get())
