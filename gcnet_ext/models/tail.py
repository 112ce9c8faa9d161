"""Residual blocks whose last block is computed together with what stands behind it: the addition and the ReLU.

Such a residual block is an instance of a subclass of its class, and stays the object that it is. In every call it looks whether
something else stands between, such as a hook, another activation or paths that are dropped; then the forward of its former
class computes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .._torch import any_autocast, children, is_tracing, modes_are_active
from ..blocks import EfficientChannelAttention
from ..blocks._fused import FusedBlock, Tail
from ..blocks._layers import is_plain, is_untouched
from ..ops._dispatch import way_of
from .peer import Peer
from .skeleton import is_as_made, is_folded, is_of

FORWARDS = (FusedBlock.forward, EfficientChannelAttention.forward, Peer.forward)
"""The forwards of the blocks that may take a tail. A class that is derived from ours may have another."""
WITH_NEW_OUTPUTS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.Conv2d)
"""Layers that return memory of their own in every call."""


class WithTail(nn.Module):
    """The first base of such a residual block's class."""

    _former: type[nn.Module]
    """The class whose forward computes the block where something stands between: another base of this one, or a base of one."""
    _forward: Any
    """The forward of the former class when this one was made."""
    _block = "context_block"
    """The name of the last block."""
    _before_the_block: tuple[str, ...]
    """The names of the layers in front of the last block, the nearest first. One that is missing or an Identity is skipped."""
    _activation = "relu"
    _adds_in_place = True
    """Whether the former forward writes ``out += shortcut``, and not ``out + shortcut``."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # a submodule is a Tensor or a Module to mypy

        def _to_the_norm(self, x: Tensor) -> Tensor:
            """The forward as far as the norm before the last block, where `_norm_before_the_block` has found one."""

        def _to_the_block(self, x: Tensor) -> Tensor:
            """The forward as far as the last block."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "_former" in vars(cls):
            cls._forward = cls._former.forward

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self._block_with_tail() if isinstance(x, Tensor) else None
        if block is None:
            former: Tensor = self._former.forward(self, x)
            return former
        norm = self._norm_before_the_block()
        out: Tensor = self._to_the_block(x) if norm is None else self._to_the_norm(x)
        shortcut = x if self.downsample is None else self.downsample(x)
        tail = Tail(shortcut, self._may_overwrite(out, shortcut, x), norm)
        if norm is not None and not (out.is_cpu and way_of(out)):
            out, tail = tail.normed(out), tail.behind_norm()
        if out.shape == shortcut.shape and out.dtype == shortcut.dtype:
            fused: Tensor = block._with_tail(out, tail)
            return fused
        out = block(tail.normed(out))
        if self._adds_in_place:
            out += shortcut
        else:
            out = out + shortcut
        activated: Tensor = children(self)[self._activation](out)
        return activated

    def _block_with_tail(self) -> nn.Module | None:
        """The last block, if nothing but the addition and the ReLU is called behind it."""
        named = children(self)
        block = named.get(self._block)
        if block is None or not can_take_tail(block) or not is_untouched(block):
            return None
        plain = is_relu(named.get(self._activation)) and drops_nothing(named.get("drop_path"))
        return block if plain and self._former.forward is type(self)._forward else None

    def _norm_before_the_block(self) -> nn.Module | None:
        """The norm that the last block may take along, too: a BatchNorm in evaluation, of what a convolution returns."""
        if torch.is_grad_enabled() or any_autocast() or not (is_compiling() or nobody_watches()):
            return None
        named = children(self)
        layers = [layer for layer in map(named.get, self._before_the_block) if not does_nothing(layer)]
        return layers[0] if layers and is_affine(layers[0]) and has_new_output(layers[1:]) else None

    def _may_overwrite(self, out: Tensor, shortcut: Tensor, x: Tensor) -> bool:
        """Whether nobody but the last block will read out, which the layers before it have returned."""
        if torch.is_grad_enabled() or not (is_compiling() or nobody_watches()) or torch.compiler.is_exporting():
            return False
        named = children(self)
        layers = (named.get(name) for name in self._before_the_block)
        return out is not x and out is not shortcut and has_new_output(layers) and bool(way_of(out))


def become_without_tail(residual: WithTail) -> None:
    former: type[Any] = residual._former
    residual.__class__ = former


def can_take_tail(block: Any) -> bool:
    """Whether the block is one of ours that adds a residual and applies a ReLU in its own sweep."""
    return getattr(type(block), "forward", None) in FORWARDS and bool(block._takes_tail())


def is_relu(activation: nn.Module | None) -> bool:
    return type(activation) is nn.ReLU and is_plain(activation, nn.ReLU)


def drops_nothing(drop: nn.Module | None) -> bool:
    """Whether a module of stochastic depth does nothing now; None is no module."""
    if drop is None or is_plain(drop, nn.Identity):
        return True
    inactive: bool = is_of(drop, "timm.layers", "DropPath") and is_untouched(drop) and not (drop.training and drop.drop_prob)
    return inactive


def nobody_watches() -> bool:
    """Whether no trace and no mode of torch sees what the layers return. torch.compile cannot look at this."""
    return not (is_tracing() or modes_are_active())


def does_nothing(layer: nn.Module | None) -> bool:
    return layer is None or is_plain(layer, nn.Identity)


def is_frozen(norm: nn.Module | None) -> bool:
    if norm is None or is_compiling():  # torch.compile cannot follow where methods come from
        return False
    return is_of(norm, "torchvision.ops.misc", "FrozenBatchNorm2d") and is_as_made(norm)


def is_affine(norm: nn.Module | None) -> bool:
    """Whether the module is a norm over the batch that takes its statistics from its buffers."""
    return is_folded(norm) or is_frozen(norm)


def has_new_output(layers: Iterable[nn.Module | None]) -> bool:
    """Whether what layers return, of which the last one comes first, is memory that nobody else has seen."""
    last = next((layer for layer in layers if not does_nothing(layer)), None)
    return last is not None and (any(is_plain(last, kind) for kind in WITH_NEW_OUTPUTS) or is_frozen(last))
