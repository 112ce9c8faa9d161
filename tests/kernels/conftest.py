"""What the tests of the emulated CUDA kernels share."""

from __future__ import annotations

import ctypes

import emulated
import pytest

from gcnet_ext import _tuning


@pytest.fixture(scope="module")
def module():
    """The emulated operators in the place of those of the CPU, and their decisions in the place of a GPU library's."""
    if reason := emulated.why_not():
        pytest.skip(f"the emulated operators cannot be compiled: {reason}")
    with emulated.installed() as module, pytest.MonkeyPatch.context() as patch:
        patch.setattr(_tuning, "library", ctypes.CDLL(module.__file__))
        yield module
