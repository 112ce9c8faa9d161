""".github/workflows: that GitHub's schema holds, and that they cover the versions that are promised. Nothing runs them here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT

yaml = pytest.importorskip("ruamel.yaml")
pytest.importorskip("check_jsonschema")
tomllib = pytest.importorskip("tomllib")  # Python 3.11

WORKFLOWS = ROOT / ".github" / "workflows"
if not WORKFLOWS.is_dir():
    pytest.skip("a source archive has no workflows", allow_module_level=True)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def jobs(name: str) -> dict[str, Any]:
    return yaml.YAML(typ="safe").load((WORKFLOWS / name).read_text())["jobs"]


def complaints(*files: Path) -> str:
    """What the schema of GitHub's workflows says against the files, or nothing."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr if done.returncode else ""


def test_the_schema_holds(tmp_path):
    files = sorted(WORKFLOWS.iterdir())
    assert {file.name for file in files} >= {"tests.yml", "wheels.yml"}
    assert complaints(*files) == ""
    broken = tmp_path / "tests.yml"
    broken.write_text((WORKFLOWS / "tests.yml").read_text().replace("runs-on:", "run-on:"))
    assert "run-on" in complaints(broken)


def test_every_promised_python_is_tested_and_has_a_wheel():
    prefix = "Programming Language :: Python :: 3."
    promised = {text.removeprefix(prefix) for text in PROJECT["project"]["classifiers"] if text.startswith(prefix)}
    assert f">=3.{min(map(int, promised))}" == PROJECT["project"]["requires-python"]
    assert {f"3.{minor}" for minor in promised} == set(jobs("tests.yml")["test"]["strategy"]["matrix"]["python"])
    assert {f"cp3{minor}-*" for minor in promised} == set(PROJECT["tool"]["cibuildwheel"]["build"].split())


def test_the_oldest_torch_is_tested():
    (oldest,) = (text.removeprefix("torch>=") for text in PROJECT["project"]["dependencies"])
    assert f"{oldest}.0" in jobs("tests.yml")["test"]["strategy"]["matrix"]["torch"]
    assert PROJECT["tool"]["cibuildwheel"]["test-requires"] == f"torch=={oldest}.0"


def test_wheels_leave_out_the_same_libraries_everywhere():
    """Those that torch has loaded: in `make wheel` and by cibuildwheel."""
    (line,) = (line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("OF_TORCH := "))
    command = PROJECT["tool"]["cibuildwheel"]["repair-wheel-command"].split()
    excluded = [command[place + 1].strip("'") for place, word in enumerate(command) if word == "--exclude"]
    assert line.removeprefix("OF_TORCH := ").split() == excluded
