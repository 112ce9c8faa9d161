"""bench/gpu_soak.py in the emulator, without graphs and streams: what it says it calls is called, what differs is counted."""

from __future__ import annotations

import importlib

import pytest
from checkout import ROOT

from gcnet_ext._tuning import decided

pytestmark = pytest.mark.usefixtures("module")


@pytest.fixture
def gpu_soak(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("gpu_soak")


@pytest.mark.parametrize("shape", [(1, 64, 8, 8), (3, 16, 16, 17)], ids=str)
def test_every_ticketed_launch_gives_the_bits_of_a_launch_per_stage(gpu_soak, shape):
    (call,) = gpu_soak.calls("cpu", [shape])
    assert gpu_soak.soak(call, len(gpu_soak.TICKETS)) == 0


def test_what_differs_is_counted(gpu_soak):
    """One call of two adds 1 to the first two elements of every result: output, gradient of x, and of 14 parameters."""
    (call,) = gpu_soak.calls("cpu", [(1, 64, 8, 8)])

    class Wrong(gpu_soak.Call):
        def __call__(self):
            found = super().__call__()
            if decided().engine == "tickets" and decided().cluster == 2:
                for tensor in found:
                    tensor.flatten()[:2] += 1
            return found

    found = Wrong(*call)
    results = len(found())
    assert gpu_soak.soak(found, 2, gpu_soak.TICKETS[:2]) == 2 * results - 1  # the bias of the mask has one element
