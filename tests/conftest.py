"""Fixtures: the backends that every op is tested on, the number of threads, and what a run says about itself."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.errors import UnsatisfiedAssumption

from gcnet_ext import _load

# Here and not in pyproject.toml, so that a copy of this folder runs beside an installed package.
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS / "support"), str(TESTS / "native"), str(TESTS.parent / "examples")]
import brief  # noqa: E402
import emulated  # noqa: E402
import imitations  # noqa: E402
from backends import Backend, EmulatedCuda, why_no_backend  # noqa: E402
from checkout import ROOT  # noqa: E402

# Here and not in a test file: pytest --hypothesis-profile=explore looks for the name before it reads one.
settings.register_profile("gcnet_ext", deadline=None, max_examples=40, derandomize=True)
settings.register_profile("brief", settings.get_profile("gcnet_ext"), max_examples=20)
settings.register_profile(
    "explore", deadline=None, max_examples=10**5, derandomize=False, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("gcnet_ext")


@pytest.fixture(scope="session", params=["cpu", "cuda-emulated", "cuda"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend in turn; one that this machine or this build does not have is skipped, and says why."""
    if reason := why_no_backend(request.param):
        pytest.skip(reason)
    if request.param == "cuda-emulated":
        return EmulatedCuda()
    if request.param == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # torch's own convolutions would be too coarse to compare with float64
    return Backend(request.param)


@pytest.fixture(autouse=True)
def emulation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Puts the emulated operators in the place of those of the CPU, for the tests of that backend and no other."""
    if "backend" in request.fixturenames and isinstance(request.getfixturevalue("backend"), EmulatedCuda):
        with emulated.installed():
            yield
    else:
        yield


@pytest.fixture
def device(backend: Backend) -> torch.device:
    return backend.device


@pytest.fixture(scope="session")
def cpu() -> Backend:
    """The CPU alone, for what has no meaning elsewhere: threads, CPU capabilities, resident memory."""
    return Backend("cpu")


@pytest.fixture
def kernels() -> None:
    """For tests of what only the compiled CPU kernels promise."""
    if "cpu" not in _load.kernel_devices:
        pytest.skip(f"no compiled kernels: {_load.why_no_kernels('cpu')}")


@pytest.fixture(params=["default", "avx2", "avx512", "avx512_bf16"])
def capability(request: pytest.FixtureRequest, kernels: None) -> str:
    """Each CPU capability in turn; one that this machine or this build does not have is skipped."""
    if request.param not in _load.compiled.usable_capabilities():
        pytest.skip(f"this processor or this build has no {request.param}")
    return request.param


@pytest.fixture
def threads():
    """Sets torch's number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """torch.compile has seen nothing before the test, and forgets what it saw."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def python(request: pytest.FixtureRequest):
    """Runs a script in an interpreter of its own, in the checkout, and returns the completed process.

    It can import the helper modules, and those beside the test.
    """

    folders = [str(folder) for folder in (TESTS / "support", TESTS / "native", request.path.parent, ROOT)]

    def run(script: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-c", script],
            check=False,
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    words = "with --hypothesis-profile=explore: how long all tests of hypothesis may take together"
    parser.addoption("--fuzz-seconds", type=float, default=1800, help=words)
    brief.add_option(parser)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in brief.for_the_window(items):
        item.add_marker("gpu_window")
    brief.leave_out(config, items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    brief.tell(session.config)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    brief.summary(config, terminalreporter)


class TimeIsUp(KeyboardInterrupt):
    """Ends the examples of a test: hypothesis lets an interrupt through at once, and takes it for no finding."""


def share_of_time(item: pytest.Function) -> float:
    """The seconds of a test of hypothesis: the same for each that is not skipped."""
    backends = [
        item.callspec.params.get("backend", "") if hasattr(item, "callspec") else ""
        for item in item.session.items
        if hasattr(getattr(item, "obj", None), "hypothesis")
    ]
    workers = getattr(item.config, "workerinput", {"workercount": 1})["workercount"]
    return item.config.getoption("--fuzz-seconds") * workers / sum(not why_no_backend(name) for name in backends)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """In the profile explore the clock ends a test, not the number of its examples."""
    handle = getattr(pyfuncitem.obj, "hypothesis", None)
    if handle is None or settings.get_current_profile_name() != "explore":
        return (yield)
    test, end, found = handle.inner_test, time.monotonic() + share_of_time(pyfuncitem), False

    @functools.wraps(test)
    def until_the_end(*args: Any, **kwargs: Any) -> None:
        nonlocal found
        # After a finding hypothesis looks for the smallest one, and ends that by itself after five minutes.
        if time.monotonic() > end and not found:
            raise TimeIsUp
        try:
            test(*args, **kwargs)
        except Exception as error:
            found = found or not isinstance(error, UnsatisfiedAssumption)
            raise

    handle.inner_test = until_the_end
    try:
        return (yield)
    except TimeIsUp:
        return True
    finally:
        handle.inner_test = test


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "representative: the selection that test_capabilities.py runs for every CPU capability")
    config.pluginmanager.register(brief.Workers(config))
    if brief.asked_for(config) and not config.getoption("--hypothesis-profile"):
        settings.load_profile("brief")


def pytest_report_header() -> str:
    if _load.compiled is None:
        return f"gcnet_ext: plain PyTorch, {_load.why_no_kernels('cpu')}"
    devices, capability = sorted(_load.kernel_devices), _load.compiled.cpu_capability()
    return f"gcnet_ext: compiled kernels for {devices}, CPU capability {capability}, {_load.library}"


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """An imitation in the place of every library that is not installed."""
    for name, module in imitations.missing().items():
        monkeypatch.setitem(sys.modules, name, module)
