"""The switch between compiled kernels and plain PyTorch, which users turn with `plain`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar

_at_first: bool | None = True if os.environ.get("GCNET_EXT_PLAIN", "0") == "1" else None
choice: ContextVar[bool | None] = ContextVar("gcnet_ext.plain", default=_at_first)
"""True: plain PyTorch. False: compiled kernels, and operators of ours in what TorchScript and ONNX get, too. None: compiled
kernels, but no operators of ours there."""
latest: bool | None = _at_first
"""The choice that was made last, for a graph that torch.compile or torch.export captures. torch.compile knows nothing of a
ContextVar, but notices that a variable has changed, and captures anew. All threads share it: while one captures, no other may
choose. As long as nobody has turned the switch, every call reads it, which touches less memory than the ContextVar."""
was_turned = False


@contextlib.contextmanager
def plain(enabled: bool = True) -> Iterator[None]:
    """In this context every block and function of this package runs in plain PyTorch, and no warning says so.

    A graph that is captured in it, by torch.compile or torch.export, holds no operator of ours, and `run_decompositions` takes
    them out of a program that was exported before. The context belongs to its thread, or task of asyncio. GCNET_EXT_PLAIN=1 in
    the environment, before the import, has the same effect everywhere.

    Args:
        enabled: True for plain PyTorch. False for compiled kernels, whatever the environment or an outer context says, even
            where they are not used by default: torch.jit.trace and torch.onnx.export then record our operators. What they write
            runs only where the library of the operators is loaded.

    Raises:
        TypeError: enabled is neither True nor False.
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled must be True or False, got {enabled!r}")
    global latest, was_turned  # noqa: PLW0603 - a field of an object would touch one more cache line in every call
    was_turned = True
    before = choice.set(enabled)
    latest = enabled
    try:
        yield
    finally:
        choice.reset(before)
        latest = choice.get()
