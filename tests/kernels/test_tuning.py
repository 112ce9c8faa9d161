"""Decisions in the place of the CUDA plan functions: what is told to the library with the kernels, and when.

test_tuning_emulated.py has the kernels that follow them.
"""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace

import pytest
import torch
from grid import Case
from registry import OPS

import gcnet_ext
from gcnet_ext import _build, _libraries, _load, _tuning
from gcnet_ext._tuning import CudaTuning, cuda_tuning

pytestmark = pytest.mark.usefixtures("kernels")
STREAMED, LANES = CudaTuning(streamed=True), CudaTuning(row_lanes=8)


@pytest.fixture
def told(monkeypatch) -> list[tuple[str, list[int]]]:
    """What the library is told, with the name of the thread, in the place of a library."""
    calls: list[tuple[str, list[int]]] = []
    library = SimpleNamespace(
        gcnet_ext_cuda_tuning=lambda numbers: calls.append((threading.current_thread().name, list(numbers)))
    )
    monkeypatch.setattr(_tuning, "library", library)
    return calls


def test_decisions_are_taken_back(told):
    with cuda_tuning(STREAMED):
        assert _tuning.decided() == STREAMED
        with cuda_tuning(LANES):
            pass
        assert _tuning.decided() == STREAMED
    with pytest.raises(KeyError), cuda_tuning(LANES):
        raise KeyError
    assert _tuning.decided() == CudaTuning()
    streamed, lanes, default = [1, *[0] * 8], [0, 0, 0, 8, *[0] * 5], [0] * 9
    assert [numbers for _, numbers in told] == [streamed, lanes, streamed, default, lanes, default]


def test_other_threads_decide_for_themselves(told):
    found = []
    with cuda_tuning(STREAMED):
        other = threading.Thread(target=lambda: found.append(_tuning.decided()))
        other.start()
        other.join()
    assert found == [CudaTuning()]
    assert {name for name, _ in told} == {threading.current_thread().name}


def outputs() -> dict[str, torch.Tensor]:
    """What each op and a block give, with a graph."""
    found = {}
    for name, op in OPS.items():
        inputs = op.inputs_of(Case((2, 4, 3, 3)))
        found[name] = op.ours(*(None if tensor is None else tensor.requires_grad_() for tensor in inputs))
    found["block"] = gcnet_ext.GlobalContextBlock(4, 1)(torch.randn(2, 4, 3, 3, requires_grad=True))
    return found


def test_backward_follows_the_decisions_of_its_forward_pass(told):
    with cuda_tuning(STREAMED):
        streamed = outputs()
    plain = outputs()
    for name, out in streamed.items():
        told.clear()
        out.sum().backward()
        assert [numbers for _, numbers in told] == [STREAMED.numbers(), [0] * 9], name
    with cuda_tuning(LANES):
        for name, out in plain.items():
            told.clear()
            out.sum().backward()
            assert [numbers for _, numbers in told] == [[0] * 9, LANES.numbers()], name


def test_nothing_is_told_without_decisions(told):
    for out in outputs().values():
        out.sum().backward()
    assert told == []


def test_plans_follow_the_decisions():
    def plan(*arguments, **decisions) -> dict:
        return _load.compiled.plan("cuda", *arguments, tuning=CudaTuning(**decisions).numbers())

    map_56 = 256, 3136, 2, False
    assert plan(*map_56) == _load.compiled.plan("cuda", *map_56)
    assert plan(*map_56, streamed=True)["path"] == "streamed"
    assert [plan(*map_56, larger_tile=larger)["tile"] for larger in range(5)] == [128, 64, 64, 32, 32]
    assert plan(*map_56, splits=8)["splits"] == 7
    assert plan(*map_56, row_lanes=16)["row_lanes"] == 16


@pytest.mark.parametrize(
    ("decision", "text"),
    [
        ({"larger_tile": 5}, "larger_tile must be 0 to 4, got 5"),
        ({"larger_tile": -1}, "larger_tile must be 0 to 4, got -1"),
        ({"splits": 257}, "splits must be 0 to 256, got 257"),
        ({"row_lanes": 3}, "row_lanes must be 0 or a power of two up to 256, got 3"),
        ({"row_lanes": 512}, "row_lanes must be 0 or a power of two up to 256, got 512"),
        ({"transform": 3}, "transform must be 0, 1 or 2, got 3"),
        ({"engine": "v3"}, "engine must be 'v1', 'v2', 'tickets' or '', got 'v3'"),
        ({"lag": -2}, "lag must be -1 or more, got -2"),
        ({"cluster": 3}, "cluster must be 0, 1 or 2, got 3"),
        ({"hints": 2}, "hints must be 0 or 1, got 2"),
    ],
    ids=str,
)
def test_no_such_decision(decision, text):
    with pytest.raises(ValueError, match=text):
        CudaTuning(**decision)


@pytest.mark.skipif(_load.cuda_error is not None, reason=str(_load.cuda_error))
def test_the_library_for_gpus_takes_decisions():
    assert ctypes.CDLL(str(_libraries.find(_build.CUDA_LIBRARY))).gcnet_ext_cuda_tuning


def test_without_cuda_kernels(monkeypatch):
    monkeypatch.setattr(_tuning, "library", None)
    with pytest.raises(RuntimeError, match="needs the CUDA kernels"), cuda_tuning(CudaTuning(splits=2)):
        pass
    assert _tuning.decided() == CudaTuning()
