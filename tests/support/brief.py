"""``pytest --brief``, which is `make test`: some of every kind of test in a few minutes, and at the end what was left out.

Of each test function, with each backend, a few cases are run, evenly spread over all that it has, the first and the last among
them. Tests that are marked as slow are left out: they compile, take gigabytes, or search for long. ``--brief-with-slow``, for
.ci/run, chooses as many cases and leaves no slow test out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

MOST_CASES = 3
EMULATED = "cuda-emulated"
LEFT_OUT = pytest.StashKey[dict[str, int]]()


def add_option(parser: pytest.Parser) -> None:
    parser.addoption(
        "--brief", action="store_true", help=f"at most {MOST_CASES} cases of a test per backend, and none that is slow"
    )
    parser.addoption(
        "--brief-with-slow", action="store_true", help=f"at most {MOST_CASES} cases of a test per backend, of slow ones, too"
    )


def asked_for(config: pytest.Config) -> bool:
    return bool(config.getoption("--brief") or config.getoption("--brief-with-slow"))


def spread(cases: list[Any], most: int) -> list[Any]:
    """At most so many of the cases: the first, the last, and those evenly in between."""
    if len(cases) <= most:
        return cases
    return [cases[i * (len(cases) - 1) // max(most - 1, 1)] for i in range(most)]


def chosen(items: Iterable[pytest.Item], *, slow: bool) -> Iterator[pytest.Item]:
    """What is run in brief, with slow tests or without."""
    groups: dict[tuple, list[pytest.Item]] = defaultdict(list)
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        backend = EMULATED if item.path.stem.endswith("_emulated") else parameters.get("backend")
        if slow or item.get_closest_marker("slow") is None:
            groups[item.path, getattr(item, "originalname", item.name), item.cls, backend].append(item)
    for cases in groups.values():
        yield from spread(cases, MOST_CASES)


WINDOW = 300
"""Tests that are run on a borrowed GPU, about."""
# The files whose tests are about a GPU's kernels; of each test some cases are chosen.
WINDOW_FILES = (
    "every_op", "attention_pool", "channel_fuse", "global_context", "global_context_block", "layouts", "in_place",
    "determinism", "amp", "cuda_device", "memory", "derivatives", "create_graph", "squeeze_excitation", "simplified_non_local",
    "properties", "limits",
)  # fmt: skip


def for_the_window(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """About 300 of the tests on the backend "cuda", evenly spread over the functions: as many of each as fit."""
    groups: dict[tuple, list[pytest.Item]] = defaultdict(list)
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        on_a_gpu = parameters.get("backend") == "cuda" or item.path.stem == "test_cuda_device"
        if on_a_gpu and item.path.stem.removeprefix("test_") in WINDOW_FILES and item.get_closest_marker("slow") is None:
            groups[item.path, getattr(item, "originalname", item.name), item.cls].append(item)
    most = 1
    while groups and most < WINDOW and sum(min(len(cases), most + 1) for cases in groups.values()) <= WINDOW:
        most += 1
    return [item for cases in groups.values() for item in spread(cases, most)]


def leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Shortens the list of items, and notes of which files."""
    if not asked_for(config):
        return
    kept = {id(item) for item in chosen(items, slow=config.getoption("--brief-with-slow"))}
    left_out = [item for item in items if id(item) not in kept]
    items[:] = [item for item in items if id(item) in kept]
    config.hook.pytest_deselected(items=left_out)
    config.stash[LEFT_OUT] = dict(Counter(item.path.name for item in left_out))


class Workers:
    """What the processes of xdist have left out, which is the same in each: they collect, and the one that reports does not."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", {})


def tell(config: pytest.Config) -> None:
    """For the process that reports."""
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = config.stash.get(LEFT_OUT, {})


def summary(config: pytest.Config, terminal: Any) -> None:
    if left_out := config.stash.get(LEFT_OUT, {}):
        terminal.section("left out by --brief or --brief-with-slow")
        for name, count in sorted(left_out.items(), key=lambda found: (-found[1], found[0])):
            terminal.line(f"{count:5d} of {name}")
        terminal.line(f"{sum(left_out.values())} tests in all; `make test-all` runs them, too.")
