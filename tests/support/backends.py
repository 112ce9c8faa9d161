"""Where the kernels of a test run: the CPU, a GPU, or the CUDA kernels emulated on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import emulated
import pytest
import schema
import torch
from hypothesis import currently_in_test_context, reject

import gcnet_ext
from gcnet_ext import _load


class Backend:
    """What the tests of an op call: the functions of gcnet_ext; and `ops`, the raw operators with flat arguments (schema.py).

    `to` moves a dense tensor to where the backend computes; views are taken after that, so strides survive.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.device = torch.device(name)

    def __getattr__(self, name: str) -> Callable[..., torch.Tensor]:
        return getattr(gcnet_ext, name)

    @property
    def has_kernels(self) -> bool:
        return self.name in _load.kernel_devices

    @property
    def ops(self) -> SimpleNamespace:
        if not self.has_kernels:
            pytest.skip(f"no compiled kernels for {self.name}: {_load.why_no_kernels(self.name)}")
        return SimpleNamespace(**{name: schema.Flat(name) for name in emulated.operators("gcnet_ext")})

    def to(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device)


class EmulatedCuda(Backend):
    """The CUDA operators on CPU tensors, thread by thread: a thousand times as slow as on a GPU, so small tensors only."""

    most_elements = 310_000

    def __init__(self) -> None:
        super().__init__("cpu")
        self.name = "cuda-emulated"

    @property
    def has_kernels(self) -> bool:
        return True

    def to(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() > self.most_elements:
            if currently_in_test_context():
                reject()  # this example, but not those that follow
            pytest.skip(f"too large to emulate: {list(tensor.shape)}")
        return tensor


def why_no_backend(name: str) -> str:
    """Why the tests of that backend are skipped; empty when they run."""
    if name == "cuda-emulated" and (reason := emulated.why_not()):
        return f"the emulated operators cannot be compiled: {reason}"
    if name == "cuda" and not torch.cuda.is_available():
        return "torch.cuda.is_available() is False"
    if name == "cuda" and "cuda" not in _load.kernel_devices:
        return "this build of gcnet_ext has no CUDA kernels"
    return ""
