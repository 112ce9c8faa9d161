"""Trains a ResNet with GC blocks, in one process or many, on the demo's digits or on a folder of images.

    python examples/train.py
    torchrun --nproc-per-node 2 examples/train.py --strategy fsdp --amp bfloat16 --accumulate 2
    torchrun --nproc-per-node 8 examples/train.py --data imagenet/train --batch 32 --amp float16

It may be killed at any time: the next call with the same --checkpoint goes on from the last save and gives the same curve. The
batches depend on the seed, the epoch and --batch times the number of processes alone. Processes talk over NCCL if each has a
GPU, otherwise over gloo. --data needs torchvision, --log tensorboard.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import demo
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as distributed_state
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from tqdm import tqdm

from gcnet_ext import GlobalContextBlock, insert_blocks

FULL = distributed_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_FIRST = distributed_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


class Residual(nn.Module):
    """Two 3x3 convolutions and a GC block before the addition. GroupNorm: a sample does not see who shares its batch."""

    def __init__(self, inputs: int, outputs: int, stride: int, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.GroupNorm(8, outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.GroupNorm(8, outputs),
            GlobalContextBlock(outputs, 1 / 4, fusion_types="channel_add"),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        body = checkpoint(self.body, x, use_reentrant=False) if self.recompute and self.training else self.body(x)
        return (body + self.shortcut(x)).relu()


def small_resnet(classes: int, recompute: bool) -> nn.Module:
    """For grey images of 28x28."""
    stages = [Residual(16, 16, 1, recompute), Residual(16, 32, 2, recompute), Residual(32, 64, 2, recompute)]
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def load(arguments: argparse.Namespace) -> tuple[Dataset, nn.Module]:
    """The training images and a model for them, the same in every process."""
    torch.manual_seed(arguments.seed)
    if arguments.data is None:
        digits = demo.load_digits()
        return TensorDataset(digits.train_images, digits.train_labels), small_resnet(10, arguments.recompute)
    from torchvision import datasets, models, transforms

    change = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    images = datasets.ImageFolder(arguments.data, transforms.Compose(change))
    model = models.resnet50(num_classes=len(images.classes))
    insert_blocks(model)
    return images, model


def batches(data: Dataset, arguments: argparse.Namespace, epoch: int, skip: int, device: torch.device) -> Iterator[tuple]:
    """This process's part of every whole batch of the epoch, from batch `skip` on."""
    size = arguments.batch * dist.get_world_size()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(arguments.seed + epoch))
    first = dist.get_rank() * arguments.batch
    own = [part[first : first + arguments.batch].tolist() for part in order.split(size) if len(part) == size][skip:]
    for images, labels in DataLoader(data, batch_sampler=own, num_workers=arguments.workers):
        yield images.to(device), labels.to(device)


class State:
    """What a checkpoint holds: model, optimizer, scaler, how far it is, and the losses so far."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.epoch = self.batch = 0
        self.losses: list[float] = []

    def save(self, path: Path) -> None:
        """Collects on all processes; the first writes, in one step, so that a kill leaves the old file or the new one."""
        model, optimizer = distributed_state.get_state_dict(self.model, self.optimizer, options=FULL)
        if dist.get_rank() == 0:
            how_far = {"epoch": self.epoch, "batch": self.batch, "losses": self.losses, "scaler": self.scaler.state_dict()}
            new = path.with_suffix(".new")
            torch.save({"model": model, "optimizer": optimizer, **how_far}, new)
            os.replace(new, path)

    def load(self, path: Path) -> None:
        if not path.exists():
            return
        saved = torch.load(path, map_location="cpu", weights_only=True)
        distributed_state.set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
            options=FROM_FIRST,
        )
        self.scaler.load_state_dict(saved["scaler"])
        self.epoch, self.batch, self.losses = saved["epoch"], saved["batch"], saved["losses"]


def train(state: State, data: Dataset, arguments: argparse.Namespace, device: torch.device) -> None:
    amp = torch.autocast(device.type, getattr(torch, arguments.amp)) if arguments.amp else contextlib.nullcontext()
    first, writer = dist.get_rank() == 0, None
    if first and arguments.log:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(arguments.log)
    per_epoch = len(data) // (arguments.batch * dist.get_world_size()) // arguments.accumulate * arguments.accumulate
    for epoch in range(state.epoch, arguments.epochs):
        bar = tqdm(total=per_epoch, initial=state.batch, desc=f"epoch {epoch + 1}/{arguments.epochs}", disable=not first)
        loss_of_step = torch.zeros((), device=device)
        for index, (images, labels) in enumerate(batches(data, arguments, epoch, state.batch, device), state.batch):
            if index == per_epoch:
                break
            steps = (index + 1) % arguments.accumulate == 0
            set_synchronised(state.model, steps)
            with amp:
                loss = F.cross_entropy(state.model(images).float(), labels) / arguments.accumulate
            state.scaler.scale(loss).backward()
            loss_of_step += loss.detach()
            bar.update()
            if not steps:
                continue
            state.scaler.step(state.optimizer)
            state.scaler.update()
            state.optimizer.zero_grad()
            dist.all_reduce(loss_of_step)
            state.losses.append(loss_of_step.item() / dist.get_world_size())
            loss_of_step.zero_()
            bar.set_postfix(loss=f"{state.losses[-1]:.3f}")
            if writer:
                writer.add_scalar("loss", state.losses[-1], len(state.losses))
            state.epoch, state.batch = (epoch, index + 1) if index + 1 < per_epoch else (epoch + 1, 0)
            if len(state.losses) % arguments.save_every == 0 or state.batch == 0:
                state.save(arguments.checkpoint)
        bar.close()
        state.batch = 0


def set_synchronised(model: nn.Module, synchronised: bool) -> None:
    """Whether the next backward pass adds up the gradients of all processes; before the last one they wait."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = synchronised
    else:
        model.set_requires_gradient_sync(synchronised)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with a folder of images per class; the demo's digits without")
    parser.add_argument("--images", type=int, help="only so many, the first")
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=50, help="images per process")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step of the optimizer")
    parser.add_argument("--amp", choices=("bfloat16", "float16"), help="automatic mixed precision")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="of the data loader")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint.pt"))
    parser.add_argument("--save-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--log", type=Path, metavar="DIR", help="for TensorBoard")
    arguments = parser.parse_args()

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)  # what torchrun sets
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.device_count() > local else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    data, model = load(arguments)
    if arguments.images:
        data = Subset(data, range(min(arguments.images, len(data))))
    model.to(device)
    if arguments.strategy == "ddp":
        model = DistributedDataParallel(model, device_ids=[local] if device.type == "cuda" else None)
    else:
        mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
        for module in [module for module in model.modules() if isinstance(module, Residual)]:
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    scaler = torch.amp.GradScaler(device.type, enabled=arguments.amp == "float16")
    state = State(model, torch.optim.AdamW(model.parameters(), lr=arguments.lr), scaler)
    state.load(arguments.checkpoint)
    train(state, data, arguments, device)
    # No process ends while another still saves. And gloo's threads, which FSDP's caches keep alive, have then let go of all
    # tensors: to free one while Python shuts down would abort.
    dist.barrier(device_ids=[local] if device.type == "cuda" else None)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
