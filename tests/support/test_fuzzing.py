"""What test_fuzz.py relies on: a mistake is noticed, what rounding decides is none, and the clock ends a search."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from checkout import ROOT
from entry import PARAMETERS
from fuzzing import bits, compare, plain, without_replaced
from hypothesis import settings
from torch import Tensor

INF = math.inf
ONE = torch.ones(1)


def thirds(x: Tensor) -> Tensor:
    """x/3 * 3 - x: zero, but for rounding."""
    return x / 3 * 3 - x


def largest_power(logits: Tensor) -> Tensor:
    return (logits - logits.amax(0)).exp()


@pytest.mark.parametrize(
    ("formula", "right", "wrong"),
    [
        (lambda x: x, (1.0,), (-1.0, 1.001, INF, -INF, math.nan)),
        (lambda x: x * INF, (INF,), (0.0, -INF, math.nan)),
        (lambda x: x * -INF, (-INF,), (0.0, INF, math.nan)),
        (lambda x: x * math.nan, (math.nan,), (0.0, INF, -INF)),
        (thirds, (0.0, 1e-7, -1e-7), (0.001, INF, -INF, math.nan)),
        # Infinity times what may be zero, or on either side of it.
        (lambda x: thirds(x) * INF, (math.nan, INF, -INF), (0.0,)),
        (lambda x: thirds(x) * INF - INF, (math.nan, -INF), (0.0, INF)),
        # The largest power of a softmax with huge logits.
        (lambda x: largest_power(x * 1e20), (1.0,), (0.0, INF, -INF, math.nan)),
        # Infinity times a zero that is exact.
        (lambda x: (x - x.abs()).clamp(0, 0) * INF, (math.nan,), (0.0, INF, -INF)),
        # A clip at its corner: its gradient is one or zero, and nothing else.
        (lambda x: 1.0 * (x / 3 * 3 <= 1), (0.0, 1.0), (INF, -INF, math.nan)),
        (lambda x: 1.0 * (x / 3 * 3 <= 1) * INF, (math.nan, INF), (0.0, -INF)),
        (lambda x: (x / 3 * 3).clamp(0, 1), (1.0,), (0.0, 0.999)),
    ],
)
def test_a_mistake_is_noticed_and_rounding_is_none(formula: Callable[[Tensor], Tensor], right, wrong):
    for got in right:
        compare((ONE * got,), lambda a: (formula(a["x"]),), {"x": ONE})
    for got in wrong:
        with pytest.raises(AssertionError, match=r"output 0: 1 of 1 elements, element 0 is "):
            compare((ONE * got,), lambda a: (formula(a["x"]),), {"x": ONE})


def test_bits_of_a_single_element_whose_stride_is_zero():
    one = torch.ones(1).as_strided((1, 1, 1), (0, 0, 0))
    assert bits(one).tolist() == bits(torch.ones(1)).tolist()
    assert torch.equal(bits(one * math.nan), bits(one * math.nan))


def test_an_argument_that_another_stands_in_for_is_not_judged():
    """Findings of the search that were none: the calls had used what was right."""
    without_numbers = torch.empty(0, device="meta")
    arguments = {"x": ONE, "scale_w1": without_numbers, "scale_b2": ONE, "shift_w1": ONE, "eps": "relu", "silu": True}
    replaced = without_replaced(arguments, {"eps": True, "scale": None, "activation": "relu"})
    assert plain(replaced) == {**arguments, **{f"scale_{name}": None for name in PARAMETERS}, "eps": 1.0}
    assert without_replaced(arguments, {"gate": "sigmoid"}) == arguments


TESTS = """
import time
from pathlib import Path
from hypothesis import given, strategies as st

CALLS = Path(__file__).with_name("calls")

@given(st.integers())
def test_sound(number):
    with CALLS.open("a") as calls:
        print(number, file=calls)

@given(st.integers())
def test_unsound(number):
    time.sleep(0.02)
    assert number < 1000
"""


def test_the_clock_ends_a_search(python, tmp_path):
    """Each test has its share, and a finding is made as small as otherwise."""
    (tmp_path / "test_searched.py").write_text(TESTS)
    arguments = ["-q", "-p", "conftest", "-p", "no:cacheprovider", "--durations=2", "--durations-min=0", "--rootdir"]
    arguments += [str(tmp_path), str(tmp_path), "--hypothesis-profile=explore", "--fuzz-seconds=1"]
    script = f"import sys, pytest; sys.path.append({str(ROOT / 'tests')!r}); sys.exit(pytest.main({arguments!r}))"
    done = python(script, check=False, HYPOTHESIS_STORAGE_DIRECTORY=str(tmp_path / "hypothesis"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout, done.stdout
    assert "number=1000" in done.stdout, done.stdout
    duration = next(line for line in done.stdout.splitlines() if line.endswith("test_sound"))
    assert float(duration.split("s ")[0]) >= 0.5, done.stdout  # its half of the second, and more on busy cores
    assert 0 < len((tmp_path / "calls").read_text().splitlines()) < settings.get_profile("explore").max_examples
