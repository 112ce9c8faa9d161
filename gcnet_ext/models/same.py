"""Checks whether a block whose class is not exactly a known one computes what ours computes, on a copy with random numbers."""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import GLOBAL_HOOKS, parameters
from ..blocks._layers import BATCH_NORMS
from .skeleton import Left, Skeleton
from .watch import STANDARD

TOLERANCE = 1e-5
"""The relative tolerance. It is loose for float64, because some blocks take the softmax in float32."""
# Samples, the spatial sizes, and the size of the numbers.
INPUTS = ((1, (3, 5, 2), 1.0), (3, (4, 3, 2), 1.0), (2, (17, 2, 2), 1.0), (2, (3, 2, 3), 300.0))
MOST_OFTEN = (2, 1, 3)
"""The spatial dimensions of feature maps, the most usual first."""
ELSE = "it has the submodules of a known block, and"


def _nothing_left_over(block: nn.Module, skeleton: Skeleton) -> None:
    """Checks that the formula has a counterpart for every parameter and submodule of the block.

    Raises:
        Left: one has none.
    """
    for name, parameter in parameters(block).items():
        if parameter is not None:
            raise Left(f"its parameter {name} has no counterpart in ours")
    accounted = {id(part) for module in skeleton.modules() for part in module.modules()}
    for name, module in block.named_modules():
        if module is not block and id(module) not in accounted:
            raise Left(f"its submodule {name} ({type(module).__name__}) has no counterpart in ours")


@contextlib.contextmanager
def _without_global_hooks() -> Iterator[None]:
    """While this lasts, torch has no hook for every module."""
    tables = [getattr(nn.modules.module, name) for name in GLOBAL_HOOKS]
    saved = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, hooks in zip(tables, saved, strict=True):
            table.update(hooks)


@contextlib.contextmanager
def _without_hooks(block: nn.Module) -> Iterator[None]:
    """While this lasts, the block and what is below it have no hook of any kind."""
    saved = [
        (part.__dict__, name, value)
        for part in block.modules()
        for name, value in part.__dict__.items()
        if "_hooks" in name and isinstance(value, dict)
    ]
    for fields, name, value in saved:
        fields[name] = type(value)()
    try:
        yield
    finally:
        for fields, name, value in saved:
            fields[name] = value


def _tensors(block: nn.Module) -> list[Tensor]:
    return [*block.parameters(), *block.buffers()]


def _copied(block: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy without hooks on the CPU, in float64, with random parameters and buffers."""
    try:
        with _without_hooks(block):
            copied = copy.deepcopy(block)
    except Exception as error:
        raise Left(f"it cannot be copied to be compared: {type(error).__name__}: {error}") from error
    own = {id(part) for part in (*block.modules(), *_tensors(block))}
    if any(id(part) in own for part in (*copied.modules(), *_tensors(copied))):
        raise Left("a copy of it is not one of its own, so it cannot be tried")
    copied = copied.to_empty(device="cpu").double().requires_grad_()
    with torch.no_grad():
        for tensor in _tensors(copied):
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.normal_(0, 0.5, generator=generator)
            else:
                tensor.random_(0, 2, generator=generator)
        for norm in _batch_norms(copied):
            if norm.running_var is not None:
                norm.running_var.abs_()
    return copied


def _batch_norms(block: nn.Module) -> list[Any]:
    return [part for part in block.modules() if isinstance(part, BATCH_NORMS)]


@contextlib.contextmanager
def _without_random_numbers() -> Iterator[None]:
    """
    Raises:
        Left: a random generator of torch, Python or numpy was used meanwhile. It is put back.
    """
    numpy = sys.modules.get("numpy")
    torchs, python = torch.default_generator.get_state(), random.getstate()
    numpys = numpy.random.get_state() if numpy else None
    yield
    used = random.getstate() != python or not torch.equal(torch.default_generator.get_state(), torchs)
    if numpy and str(numpy.random.get_state()) != str(numpys):  # it ends in how many numbers have been taken
        used = True
        numpy.random.set_state(numpys)
    torch.default_generator.set_state(torchs)
    random.setstate(python)
    if used:
        raise Left(f"{ELSE} computes at random")


class _Trial:
    """What a call of a block does: its output, gradients, and what else it leaves behind."""

    def __init__(self, block: nn.Module, forward: Callable[[Tensor], Any], x: Tensor) -> None:
        leaf = x.clone().requires_grad_()
        given = leaf.view_as(leaf)
        own = x.clone()
        inputs = [leaf, *block.parameters()]
        try:
            self.out = forward(given)
        except Exception as error:
            raise Left(f"it does not take a {x.dim() - 2}-D feature map: {type(error).__name__}: {error}") from error
        if not isinstance(self.out, Tensor) or self.out.shape != x.shape:
            raise Left(f"{ELSE} gives no feature map like its input")
        if not torch.equal(given, own):
            raise Left(f"{ELSE} overwrites its input")
        if not self.out.requires_grad:
            raise Left(f"{ELSE} gives its output no gradient")
        weights = torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view_as(x)
        found = torch.autograd.grad((self.out * weights).sum(), inputs, allow_unused=True)
        self.gradients = [torch.zeros_like(a) if g is None else g for a, g in zip(inputs, found, strict=True)]
        self.out = self.out.detach()
        self.buffers = [buffer.clone() for buffer in block.buffers()]

    def equals(self, other: _Trial) -> bool:
        tensors = [(self.out, other.out), *zip(self.gradients, other.gradients, strict=True)]
        tensors += zip(self.buffers, other.buffers, strict=True)
        return all(_close(a.double(), b.double()) for a, b in tensors)


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether no element differs by more than TOLERANCE * max(1, largest element); a NaN counts as a difference."""
    return a.numel() == 0 or float((a - b).abs().max()) <= TOLERANCE * max(1.0, float(a.abs().max()))


Read = Callable[[Any], Skeleton]
Convert = Callable[[nn.Module, int], None]


def dims_of(block: nn.Module, read: Read, convert: Convert) -> int:
    """The spatial dimensions of inputs for which the block computes what it would compute once it is replaced.

    Its layers tell them; where all are linear, the first of `MOST_OFTEN` that fits is taken. ``convert(copy, dims)`` makes a
    copy of the block a peer for inputs of that many.

    Outputs, gradients and buffers are compared, in evaluation and in training, for several inputs, with numbers other than
    those that the block happens to have. Neither the block nor a global random generator is changed.

    Raises:
        Left: it computes something else, does something else besides, or cannot be tried.
    """
    skeleton = read(block)
    _nothing_left_over(block, skeleton)
    reasons = []
    for dims in (skeleton.dims,) if skeleton.dims else MOST_OFTEN:
        generator = torch.Generator("cpu").manual_seed(0)
        try:
            with torch.inference_mode(False):
                _try(_copied(block, generator), read, convert, dims, generator)
            return dims
        except Left as reason:  # at most three times
            reasons.append(reason)
    raise reasons[0]


def _try(copied: Any, read: Read, convert: Convert, dims: int, generator: torch.Generator) -> None:
    """Compares what a copy of a block computes as it was with what it computes as a peer, for `dims_of`."""
    first: Any = read(copied).branches()[0].first
    channels = first.weight.shape[1]
    convert(copied, dims)
    fields = {name: value for name, value in vars(copied).items() if name not in STANDARD}
    with torch.enable_grad(), _without_global_hooks():
        for training in (False, True):
            of_batch = any(training or norm.running_mean is None for norm in _batch_norms(copied))
            fewest = 2 if of_batch else 1  # a BatchNorm takes no statistics of a single value
            for samples, sizes, size in [each for each in INPUTS if each[0] >= fewest]:
                shape = samples, channels, *sizes[:dims]
                x = size * torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator)
                copied.train(training)
                buffers = [buffer.clone() for buffer in copied.buffers()]
                with _without_random_numbers():
                    want = _Trial(copied, copied._as_before, x)
                if {name: value for name, value in vars(copied).items() if name not in STANDARD} != fields:
                    raise Left("its forward changes its attributes")
                with torch.no_grad():
                    for buffer, value in zip(copied.buffers(), buffers, strict=True):
                        buffer.copy_(value)
                if not want.equals(_Trial(copied, copied, x)):
                    raise Left(f"{ELSE} computes something else")
