"""`make test` runs some of every kind of test, and says at its end what it left out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import brief
import pytest
from checkout import ROOT

TESTS = """
import pytest

class TestClass:
    @pytest.mark.parametrize("case", range(10))
    def test_of_a_class(self, case):
        print("ran", case)

@pytest.mark.parametrize("case", range(10))
@pytest.mark.parametrize("backend", ["one", "cuda-emulated"])
def test_of_backends(backend, case):
    print("ran", backend, case)

@pytest.mark.parametrize("case", range(10))
def test_of_cases(case):
    print("ran", case)

def test_single():
    print("ran")

@pytest.mark.slow
def test_slow():
    print("ran")
"""
CONFTEST = """
import brief
pytest_addoption = brief.add_option

def pytest_configure(config):
    config.addinivalue_line("markers", "slow")
    config.pluginmanager.register(brief.Workers(config))

def pytest_collection_modifyitems(config, items):
    brief.leave_out(config, items)

def pytest_sessionfinish(session):
    brief.tell(session.config)

def pytest_terminal_summary(terminalreporter, config):
    brief.summary(config, terminalreporter)
"""


@pytest.mark.parametrize(
    ("count", "most", "kept"), [(3, 4, [0, 1, 2]), (10, 4, [0, 3, 6, 9]), (5, 4, [0, 1, 2, 4]), (9, 2, [0, 8])]
)
def test_cases_are_spread_evenly(count, most, kept):
    assert brief.spread(list(range(count)), most) == kept


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "two workers"])
def test_what_is_left_out_is_told(tmp_path: Path, workers: list[str]):
    if workers:
        pytest.importorskip("xdist")
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT / 'tests' / 'support')!r})\n{CONFTEST}")

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *workers, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    told = run("--brief")
    assert "13 passed" in told
    assert f"{7 + 2 * 7 + 7 + 1:5d} of test_some.py\n29 tests in all; `make test-all` runs them, too." in told
    told = run("--brief-with-slow")
    assert "14 passed" in told
    assert f"{7 + 2 * 7 + 7:5d} of test_some.py\n28 tests in all" in told
    everything = run()
    assert "42 passed" in everything
    assert "left out" not in everything
