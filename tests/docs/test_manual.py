"""The manual of `make docs`: Sphinx builds it without a warning, and everything public has its place in the API reference."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

import gcnet_ext

pytest.importorskip("sphinx")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "docs" / "conf.py").exists(), reason="this is a part of the tree, without docs"),
]


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """As the Makefile does."""
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "--fail-on-warning",
        "--keep-going",
        "-c",
        str(root / "docs"),
        "-b",
        "html",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [*command, str(root), str(out)], env=environment, cwd=root, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("manual")
    done = build(ROOT, out)
    assert (done.returncode, done.stderr) == (0, "")
    return out


def test_the_makefile_builds_it_in_the_same_way():
    (command,) = re.findall(r"^SPHINX = (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert command.endswith("-m sphinx -q --fail-on-warning --keep-going -c docs")


def test_every_public_name_has_its_place(pages):
    text = (pages / "docs" / "api.html").read_text()
    places = set(re.findall(r'id="gcnet_ext\.(\w+)"', text))
    assert places == set(gcnet_ext.__all__) - {"__version__"}
    for section in ("Parameters", "Returns", "Raises", "Shapes"):
        assert f">{section}<" in text, f"the docstrings' section {section} is not read as one"


def test_every_page_is_in_the_table_of_contents(pages):
    text = (pages / "docs" / "index.html").read_text()
    written = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert written <= set(re.findall(r'href="(\w+)\.html"', text))


WRONG = {
    "nowhere.md": "[nowhere](nowhere.md)",
    "no_such.py": "[no file](../bench/no_such.py)",
    "no_such_function": "```{eval-rst}\n.. autofunction:: gcnet_ext.no_such_function\n```",
}


def test_what_leads_nowhere_ends_the_build(tmp_path):
    copy = tmp_path / "copy"
    for name in ("docs", "bench", "examples", "tests", "csrc", "gcnet_ext"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for path in (path for path in ROOT.iterdir() if path.is_file()):
        shutil.copy(path, copy)
    with (copy / "docs" / "api.md").open("a") as text:
        text.writelines(f"\n{added}\n" for added in WRONG.values())
    done = build(copy, tmp_path / "out")
    assert done.returncode != 0
    for warning in WRONG:
        assert warning in done.stderr
