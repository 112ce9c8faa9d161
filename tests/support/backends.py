"""Where the kernels of a test run: the CPU, a GPU, or the CUDA kernels emulated on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import emulated
import pytest
import schema
import torch
from hypothesis import currently_in_test_context, reject

import gcnet_ext
from gcnet_ext import _load


class RawOperators:
    """The raw operators with flat arguments. A test of one that the device has no kernel of is skipped."""

    def __init__(self, device: torch.device) -> None:
        self.key = device.type.upper()

    def __getattr__(self, name: str) -> schema.Flat:
        operator = schema.Flat(name)
        if not torch._C._dispatch_has_kernel_for_dispatch_key(operator.op.name(), self.key):
            pytest.skip(f"{name} has no kernel for {self.key}")
        return operator


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
    def ops(self) -> RawOperators:
        if not self.has_kernels:
            pytest.skip(f"no compiled kernels for {self.name}: {_load.why_no_kernels(self.name)}")
        return RawOperators(self.device)

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
