"""tests/README.md: every file of the tree is in a line of its first table, and the folders and helpers it names are there."""

from __future__ import annotations

import fnmatch
import re
import subprocess

import pytest
from checkout import ROOT

PAGE = ROOT / "tests" / "README.md"


def cells(column: int) -> list[str]:
    """What is set as code in that column of the first table."""
    table = PAGE.read_text().split("\n\n")[2]
    return [name for line in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", line.split("|")[column])]


def test_every_file_is_in_a_line():
    if not (ROOT / ".git").exists():
        pytest.skip("this is a part of the tree, not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders = ("csrc/", "gcnet_ext/", "bench/", "docs/", "examples/", "tests/")
    files = [file for file in listed if file.startswith(folders) and file != "gcnet_ext/py.typed"]
    patterns = cells(1)
    assert len(patterns) > 10
    missing = [file for file in files if not any(fnmatch.fnmatch(file, pattern) for pattern in patterns)]
    assert not missing


def test_what_is_to_be_run_is_there():
    tests = [name for name in cells(2) if name.startswith("tests/")]
    assert len(tests) > 10
    assert all((ROOT / test).is_dir() for test in tests)


def test_every_folder_and_every_helper_is_explained():
    named = set(re.findall(r"`([^`]+)`", PAGE.read_text()))
    folders = {f"tests/{path.name}" for path in PAGE.parent.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {name for name in named if re.fullmatch(r"tests/\w+", name)}
    helpers = {path.name for path in (PAGE.parent / "support").glob("*.py") if not path.name.startswith("test_")}
    assert helpers == {name for name in named if re.fullmatch(r"\w+\.py", name)} - {"setup.py"}
