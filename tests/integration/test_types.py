"""The annotations: a user's script passes `mypy --strict`, and mypy finds nothing in the package itself."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT
from registry import OPS

import gcnet_ext

USER = Path(__file__).with_name("typed_user.py")
# Each line is wrong, and mypy must say so, with this code. torch's own nn.Module would take and return anything.
MISTAKES = """
import torch
import gcnet_ext
from torch import nn

x = torch.randn(2, 8, 3, 5)
block = gcnet_ext.GlobalContextBlock("8", 1 / 4)  # arg-type
block(x, x, x, x)  # call-arg
block("x")  # arg-type
name: str = block(x)  # assignment
gcnet_ext.SqueezeExcitation(8)(x).no_such_method()  # attr-defined
gcnet_ext.NonLocalBlock(8, reductions=2)  # call-arg
gcnet_ext.SimplifiedNonLocalBlock(8).attention_map()  # call-arg
gcnet_ext.channel_fuse(x, x, x, x)  # call-arg
gcnet_ext.global_context(x, scale=x)  # arg-type
gcnet_ext.attention_pool(x, bias=0.5)  # arg-type
gcnet_ext.attention_map(x)  # call-arg
gcnet_ext.Branch()  # call-arg
gcnet_ext.insert_blocks(nn.Identity(), stages=2)  # arg-type
gcnet_ext.replace_blocks(nn.Identity()).kept  # attr-defined
count: int = gcnet_ext.to_peer_state_dict(nn.Identity(), "timm")  # assignment
gcnet_ext.demo  # attr-defined
"""


def mypy(*arguments: str | Path) -> tuple[int, str]:
    """In the checkout, whose cache makes the second run a short one."""
    pytest.importorskip("mypy")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", "--no-pretty", "--hide-error-context", *map(str, arguments)],
        env={**os.environ, "MYPYPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def strict(script: Path) -> tuple[int, str]:
    """As mypy treats an installed package: its annotations count, errors in it are not the user's."""
    return mypy("--strict", "--follow-imports", "silent", "--cache-dir", ".mypy_cache/strict", script)


def test_the_package_says_that_it_is_typed():
    assert (Path(gcnet_ext.__file__).parent / "py.typed").is_file()


def test_a_users_script_passes_strict():
    assert strict(USER) == (0, "")


def test_a_users_script_has_every_public_name_and_runs(python):
    tree = ast.parse(USER.read_text())
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert set(gcnet_ext.__all__) - set(OPS) <= used
    assert python(USER.read_text()).stdout.startswith(gcnet_ext.__version__)


def test_the_function_of_every_op_is_typed(tmp_path):
    """It returns a tensor, and takes nothing that may be anything."""
    script = tmp_path / "revealed.py"
    script.write_text("import gcnet_ext\n" + "".join(f"reveal_type(gcnet_ext.{name})\n" for name in OPS))
    code, told = strict(script)
    assert code == 0, told
    revealed = re.findall(r'Revealed type is "(.*)"$', told, re.MULTILINE)
    assert len(revealed) == len(OPS)
    for signature in revealed:
        assert re.fullmatch(r"def \(x: .*\) -> torch\.(_tensor\.)?Tensor", signature)
        assert not re.search(r"\bAny\b", signature)


def test_mistakes_are_reported(tmp_path):
    """Every one, on its line and under its name; and nothing else."""
    script = tmp_path / "mistakes.py"
    script.write_text(MISTAKES)
    code, told = strict(script)
    assert code == 1
    found = re.findall(rf"{re.escape(script.name)}:(\d+): error: .*\[([\w-]+)\]$", told, re.MULTILINE)
    lines = enumerate(MISTAKES.splitlines(), 1)
    assert found == [(str(number), line.split("# ")[1]) for number, line in lines if "  # " in line], told


def test_the_package_passes():
    """With the settings of pyproject.toml."""
    assert mypy() == (0, "")
