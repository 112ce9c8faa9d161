"""The residual blocks of torchvision and timm: with a context block before their addition, and with a tail that is fused.

Such a residual block becomes an instance of a subclass of its class. The subclasses of a library stand in a module of their
own, which imports the library: it is only loaded when a residual block of that library is there, or unpickled.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import nn

from .._torch import children
from .skeleton import is_original
from .tail import WithTail, can_take_tail

NAME = "context_block"
LIBRARIES = {
    "torchvision.models.resnet": "residual_torchvision",
    "timm.models.resnet": "residual_timm",
    "timm.models.senet": "residual_senet",
}


def _subclasses(table: str) -> dict[type[Any], type[Any]]:
    """The table of that name in our modules for the libraries that are loaded."""
    found: dict[type[Any], type[Any]] = {}
    for library, ours in LIBRARIES.items():
        if library in sys.modules:
            found |= getattr(importlib.import_module(f".{ours}", __package__), table)
    return found


def class_with_context_block(residual: nn.Module, *, fuse_tail: bool) -> type[Any]:
    """What the residual block becomes.

    Raises:
        ValueError: its class is not exactly torchvision's or timm's BasicBlock or Bottleneck, or it has a forward of its own.
    """
    kind = _former(residual)
    made = _subclasses("WITH_CONTEXT_BLOCK").get(kind)
    if made is None:
        raise ValueError(f"its class {kind.__module__}.{kind.__qualname__} is not exactly torchvision's or timm's")
    if "forward" in vars(residual) or not is_original(kind):
        raise ValueError("it has a forward of its own, or somebody has exchanged that of its class")
    return _subclasses("WITH_TAIL")[made] if fuse_tail else made


def _former(residual: nn.Module) -> type[Any]:
    return residual._former if isinstance(residual, WithTail) else type(residual)


def fuse_tails(model: nn.Module) -> dict[str, str]:
    """Lets the residual blocks of the model compute the addition and the ReLU together with the block before them.

    Returns:
        By the name of each block of ours: empty where they do, and otherwise why not.
    """
    kinds = _subclasses("WITH_TAIL")
    found: dict[str, str] = {}
    parents = {id(part): (residual, name) for residual in model.modules() for name, part in children(residual).items()}
    for path, block in model.named_modules():
        if not can_take_tail(block):
            continue
        residual, name = parents.get(id(block), (None, ""))
        found[path] = _why_not(residual, name, kinds)
        if residual is not None and not found[path]:
            residual.__class__ = kinds.get(type(residual), type(residual))
    return found


def _why_not(residual: nn.Module | None, name: str, kinds: dict[type[Any], type[Any]]) -> str:
    kind = type(residual) if isinstance(residual, WithTail) else kinds.get(type(residual))
    if residual is None or kind is None or kind._block != name:
        return "no residual block that is known ends with it"
    if "forward" in vars(residual) or not is_original(kind._former):
        return "the residual block has a forward of its own"
    activation = type(children(residual).get(kind._activation))
    return "" if activation is nn.ReLU else f"{activation.__name__} and not ReLU stands behind the addition"
