"""Whether a block whose class nobody vouches for computes what ours computes: tried on a copy, with numbers of its own."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .skeleton import Left, Skeleton

SIZES = (6, 5, 4)
TOLERANCE = 1e-9
"""Of float64."""
SCALARS = (bool, int, float, complex, str, bytes, tuple, frozenset, type(None))


def attributes(block: nn.Module) -> dict[str, Any]:
    """What a forward may read besides parameters, buffers and submodules."""
    return {
        name: value
        for name, value in vars(block).items()
        if isinstance(value, SCALARS) and name != "training" and not name.startswith("_")
    }


def _nothing_left_over(block: nn.Module, skeleton: Skeleton) -> None:
    """
    Raises:
        Left: a parameter or a submodule of the block has no counterpart in the formula.
    """
    for name, parameter in block._parameters.items():
        if parameter is not None:
            raise Left(f"its parameter {name} has no counterpart in ours")
    accounted = {id(part) for module in skeleton.modules() for part in module.modules()}
    for name, module in block.named_modules():
        if module is not block and id(module) not in accounted:
            raise Left(f"its submodule {name} ({type(module).__name__}) has no counterpart in ours")


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
        fields[name] = type(value)() if type(value) in (dict, OrderedDict) else {}
    try:
        yield
    finally:
        for fields, name, value in saved:
            fields[name] = value


def _copied(block: nn.Module, random: torch.Generator) -> nn.Module:
    """A copy without hooks on the CPU, in float64, with random parameters and buffers."""
    try:
        with _without_hooks(block):
            copied = copy.deepcopy(block)
        copied = copied.to_empty(device="cpu").double()
    except Exception as error:
        raise Left(f"it could not be copied to be compared: {type(error).__name__}: {error}") from error
    for tensor in (*copied.parameters(), *copied.buffers()):
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.normal_(0, 0.5, generator=random)
        else:
            tensor.random_(0, 2, generator=random)
    return copied


def check(block: nn.Module, read: Callable[[Any], Skeleton], become: Callable[[nn.Module], None]) -> None:
    """Does nothing if the block computes what it would compute as a peer; `become` makes a copy of it one.

    It is tried in evaluation and in training, with numbers other than those that it happens to have. Neither the block nor the
    global random generators are touched.

    Raises:
        Left: it computes something else, or cannot be tried.
    """
    skeleton = read(block)
    _nothing_left_over(block, skeleton)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        copied: Any = _copied(block, random)
        before = attributes(copied)
        first: Any = read(copied).branches()[0].first
        x = torch.randn(2, first.weight.shape[1], *SIZES[: skeleton.dims], dtype=torch.float64, generator=random)
        become(copied)
        for training in (False, True):
            copied.train(training)
            buffers = {buffer: buffer.clone() for buffer in copied.buffers()}  # a spectral norm changes its own in training

            def called(forward: Callable[[Tensor], Any], seed: int, buffers: dict[Tensor, Tensor] = buffers) -> Any:
                for buffer, value in buffers.items():
                    buffer.copy_(value)
                return _called(forward, x, seed)

            want, again = (called(copied._as_before, seed) for seed in (0, 1))
            if not isinstance(want, Tensor) or want.shape != x.shape:
                raise Left("it has the submodules of a known block, and gives no feature map like its input")
            if not torch.equal(want, again):
                raise Left("it has the submodules of a known block, and computes at random")
            if not torch.allclose(want, called(copied, 0), rtol=TOLERANCE, atol=TOLERANCE):
                raise Left("it has the submodules of a known block, and computes something else")
        if attributes(copied) != before:
            raise Left("its forward changes its attributes")


def _called(forward: Callable[[Tensor], Any], x: Tensor, seed: int) -> Any:
    """What this forward makes of x, with the global random generator of the CPU at this seed."""
    torch.default_generator.manual_seed(seed)
    try:
        return forward(x.clone())
    except Exception as error:
        raise Left(f"it does not take a {x.dim() - 2}-D feature map: {type(error).__name__}: {error}") from error
