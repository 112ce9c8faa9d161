"""Modules that look like attention over channels or positions, whether anybody here knows them or not."""

from __future__ import annotations

from torch import nn

from .._torch import children
from .look_alikes import is_named_so, kind_of, sizes_of, words_of
from .readers import eca_of, grn_of, known_reader_of, non_local_of

CONTAINERS = frozenset(("block", "bottleneck", "net", "stage", "model", "backbone", "encoder", "decoder", "basic", "mlp"))
MOST_MODULES = 30
"""A module with more than so many below it is a network, not a block."""


def looks_like_attention(module: nn.Module) -> bool:
    """Whether the name of its class, or its layers, say that it weighs channels or positions.

    A residual block that holds such a module, or a block of the family, is none itself.
    """
    below = [part for part in module.modules() if part is not module]
    if len(below) > MOST_MODULES or (not below and not any(True for _ in module.parameters())):
        return False
    if any(known_reader_of(part) or non_local_of(part) or eca_of(part) or grn_of(part) for part in below):
        return False
    words = words_of(module)
    if words & CONTAINERS and any(is_named_so(part) for part in below):
        return False
    if is_named_so(module):
        return True
    return _ends_in_a_gate(module) and not any(kind_of(part) for part in below)


def _ends_in_a_gate(module: nn.Module) -> bool:
    """Whether it has a sigmoid, and one or two 1x1 layers that lead from some channels to as many."""
    leaves = [part for part in module.modules() if not children(part)]
    sigmoid = any("sigmoid" in type(part).__name__.lower() for part in leaves)
    sizes = [size for part in leaves if all(size := sizes_of(part))]
    return sigmoid and len(sizes) in (1, 2) and sizes[0][1] == sizes[-1][0]
