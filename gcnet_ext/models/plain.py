"""Models without a block of ours, for tools that take modules of plain PyTorch only."""

from __future__ import annotations

import copy
import itertools
from typing import Any

from torch import nn

from .._torch import HOOKS
from ..blocks.plain import TWINS, become_plain
from .insert import plain_hooks
from .peer import Peer, become_former
from .tail import WithTail, become_without_tail


def to_plain(model: nn.Module) -> nn.Module:
    """A copy of the model in which every block of this package is a module of plain PyTorch, with the same parameters.

    The copy shares parameters and buffers with the model, which stays as it is, and has the same keys, hooks and modes. No
    kernel and no operator of ours is in it, so that TorchScript, torch.fx, quantization and every exporter take it. It is
    slower, and rounds between its layers. A block that `replace_blocks` has changed becomes what it was before, one with
    ``inplace=True`` no longer overwrites its input, and a `NonLocalBlock` forms the weights of all pairs of positions. The
    plain modules take x in the dtype of their parameters, as the layers of torch do.

    Args:
        model: any module that deepcopy takes; it may be a block.

    Returns:
        The copy.

    Raises:
        TypeError: the model is no nn.Module, or has a block whose class is derived from ours with a forward of its own.
        RuntimeError: a block has a ``process_group``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    groups = [name for name, part in model.named_modules() if getattr(part, "process_group", None) is not None]
    ours = [name for name in groups if isinstance(model.get_submodule(name), tuple(TWINS))]
    if ours:  # deepcopy would say something of pickle
        raise RuntimeError(f"process_group must be None for a block in plain PyTorch, got a group in {ours[0] or 'the model'}")
    shared: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    made = copy.deepcopy(model, shared)
    for part in list(made.modules()):
        if isinstance(part, Peer):
            become_former(part)
        elif isinstance(part, tuple(TWINS)):
            become_plain(part)
        elif isinstance(part, WithTail):
            become_without_tail(part)
        plain_hooks(getattr(part, HOOKS[0]))
    return made
