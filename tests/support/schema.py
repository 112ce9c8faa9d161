"""The operators with flat arguments: a test names every weight by itself, where the schema of csrc/ops.cpp has lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from entry import OPTIONS, no_bits
from registry import OPERATORS
from torch import Tensor

from gcnet_ext.ops._global_context_arguments import IN_LISTS

DEFAULTS = {
    "bias": None,
    "eps": 1e-6,
    "residual": None,
    "valid": None,
    "need_residual": False,
    **OPTIONS,
}
"""For those that a test does not name."""


class Flat:
    """An operator, called with one value for each element of its lists; lists in its results are opened, too."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.op = getattr(torch.ops.gcnet_ext, name).default
        lists = {**IN_LISTS, "needs": OPERATORS[name].needs}
        self.lists = {argument.name: lists.get(argument.name) for argument in self.op._schema.arguments}
        self.lists |= {name: None for name in ("scale", "shift") if "fuse" in self.name and name in self.lists}
        self.names = [name for argument, names in self.lists.items() for name in names or (argument,)]

    def named(self, *args: Any, **more: Any) -> dict[str, Any]:
        """All arguments by name; those that are not given have their defaults. The saved tensors follow one another."""
        given = {**dict(zip(self.names, args, strict=False)), **more}
        assert len(args) <= len(self.names), f"{self.name} has {len(self.names)} arguments, got {len(args)}"
        if "positive" in self.names and "positive" not in given:
            given["positive"] = no_bits(given["x"])
        assert given.keys() <= set(self.names), given.keys() - set(self.names)
        return {name: given[name] if name in given else DEFAULTS[name] for name in self.names}

    def nested(self, *args: Any, **more: Any) -> tuple[Any, ...]:
        """The arguments of the schema."""
        given = self.named(*args, **more)
        return tuple(
            given[argument] if names is None else [given[name] for name in names] for argument, names in self.lists.items()
        )

    def __call__(self, *args: Any, **more: Any) -> Any:
        return opened(self.op(*self.nested(*args, **more)))


def backward(grad: Tensor, inputs: Sequence[Tensor | None], saved: Sequence[Tensor], needs: Sequence[bool]) -> dict[str, Any]:
    """The arguments of global_context_backward: of the inputs and other results of the forward operator, x to shift_b2."""
    names = ("x", *IN_LISTS["mask"], *IN_LISTS["scale"], *IN_LISTS["shift"])
    named = {"grad": grad, **dict(zip(names, inputs, strict=True)), **dict(zip(IN_LISTS["saved"], saved, strict=True))}
    need_x, need_mask, need_scale, need_shift = needs
    wanted = need_x, need_mask, need_mask, need_scale, need_shift, False
    return {**named, **dict(zip(OPERATORS["global_context_backward"].needs, wanted, strict=True))}


def opened(results: Any) -> Any:
    """Each tensor of the results by itself."""
    if results is None or isinstance(results, Tensor):
        return results
    return tuple(tensor for result in results for tensor in (result if isinstance(result, list | tuple) else [result]))
