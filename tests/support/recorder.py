"""Which operators of ours a call or a graph has."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """Notes the operators of gcnet_ext that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gcnet_ext":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def operators_in(graph: torch.fx.Graph) -> list[str]:
    """The operators of ours in the graph of torch.compile or torch.export."""
    return [str(node.target) for node in graph.nodes if "gcnet_ext" in str(node.target)]


def kinds_in(traced: Any) -> set[str]:
    """The operators in a trace, but for those that only hold values."""
    return {node.kind() for node in traced.inlined_graph.nodes() if not node.kind().startswith("prim::")}
