"""Private names of torch: all of them are in gcnet_ext/_torch.py, and without them everything works as with them."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from checkout import ROOT

import gcnet_ext

PRIVATE = re.compile(
    r"\btorch(\.\w+)*\._(?!_)\w+|\._(modules|parameters|buffers|op|schema)\b|\b_(forward|backward)(_pre)?_hooks\b"
)
READS_FIELDS = ("blocks/_fused.py", "blocks/_layers.py")
"""They read the fields of modules whose names are in the table, where the table says that they can be read."""


def test_private_names_are_in_one_table():
    package = ROOT / "gcnet_ext"
    found = [
        f"{path.relative_to(package)}: {name[0]}"
        for path in sorted(package.rglob("*.py"))
        if path.name not in ("_torch.py", "_build.py") and str(path.relative_to(package)) not in READS_FIELDS
        for name in PRIVATE.finditer(re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL))
    ]
    assert found == []


ANOTHER_WAY = """
import torch
from gcnet_ext import _torch
assert _torch.below_autograd is not getattr(torch._C, "_AutoDispatchBelowAutograd")
assert _torch.any_requires_grad is not torch._C._any_requires_grad
assert _torch.forward_level is _torch._forward_level
assert _torch.inside_transform is not torch._C._are_functorch_transforms_active
assert _torch.is_tracing is torch.jit.is_tracing
assert not _torch.modules_can_be_read
"""


def test_the_public_names_are_used(python, kernels):
    python(ANOTHER_WAY, GCNET_EXT_PUBLIC_TORCH="1")


@pytest.mark.parametrize(
    ("tests", "other"),
    [
        ("ops/test_global_context.py", ""),
        ("ops/test_in_place.py", " and not compiled"),  # it compares bits of layers that are called
        ("properties/test_derivatives.py", ""),
        ("properties/test_forward_mode.py", " and not all_pairs"),
        ("properties/test_create_graph.py", " and not autocast"),  # it casts the layers that are called
        ("blocks/test_called_layers.py", " and not two_outputs"),  # a called layer has words of its own
    ],
)
def test_without_private_names(tests, other, kernels):
    """Some of the tests of the CPU, with public names alone. Blocks call their layers there."""
    selection = ["--brief", "-k", f"not emulated{other}", str(ROOT / "tests" / tests)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection],
        env={**os.environ, "GCNET_EXT_PUBLIC_TORCH": "1"},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


def test_functions_between_block_and_operator(kernels):
    """Four functions of this package stand between a block's forward and the operator, once its layers have been looked at."""
    import torch

    package = os.path.dirname(gcnet_ext.__file__)
    block, x = gcnet_ext.GlobalContextBlock(16, 1 / 4), torch.randn(2, 16, 5, 7)
    called = []

    def look(frame, event, _argument):
        if event == "call" and frame.f_code.co_filename.startswith(package):
            called.append(frame.f_code.co_name)

    with torch.no_grad():
        block(x)
        sys.setprofile(look)
        try:
            block(x)
        finally:
            sys.setprofile(None)
    assert called == ["forward", "way_of", "weights", "with_lists", "below_autograd"]
