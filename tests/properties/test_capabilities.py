"""Every CPU capability in turn: the same selection of the grid, in an interpreter of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import brief
import pytest
from checkout import ROOT

from gcnet_ext import _load

pytestmark = pytest.mark.usefixtures("kernels")


def usable() -> list[str]:
    return _load.compiled.usable_capabilities()


def test_the_best_is_chosen(python):
    """Without a wish, the first of those that this machine can use."""
    script = "from gcnet_ext import _load; print(_load.compiled.cpu_capability())"
    assert python(script, GCNET_EXT_CPU_CAPABILITY="").stdout.strip() == usable()[0]


def test_usable_capabilities():
    """What the kernel of this machine says of its processor decides."""
    with open("/proc/cpuinfo") as lines:
        flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    needed = {
        "default": set(),
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
    }
    needed["avx512_bf16"] = needed["avx512"] | {"avx512_bf16"}
    assert set(usable()) == {name for name in _load.compiled.build_info()["capabilities"] if needed[name] <= flags}
    assert "default" in usable()


def test_representative_selection(capability, request):
    """All of the tests marked representative, or in brief some of each, with this capability and on the CPU."""
    files = ["tests/properties/test_every_op.py", "tests/ops"]
    fewer = ["--brief"] if brief.asked_for(request.config) else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "representative", "-k", "cpu", "-p", "no:cacheprovider", *fewer, *files],
        env={**os.environ, "GCNET_EXT_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert f"CPU capability {capability}" in done.stdout, "another capability ran"
    assert " passed" in done.stdout


COMPARE = """
import torch, grid, gcnet_ext
from grid import Case
for case in grid.combinations():
    result = grid.run(grid.flat(gcnet_ext.global_context), case.inputs())
    print(*(float(t.double().norm()) for t in (result.out, *result.grads) if t is not None))
"""


def test_capabilities_agree(python):
    """Different vector lengths sum in different orders, and differ by rounding errors only."""
    runs = [python(COMPARE, GCNET_EXT_CPU_CAPABILITY=capability).stdout.split() for capability in usable()]
    first = [float(value) for value in runs[0]]
    for run in runs[1:]:
        assert [float(value) for value in run] == pytest.approx(first, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", ["avx1024", "AVX2", "avx2 "])
def test_unknown_capability(python, name):
    """An error that names the variable, lists what this machine can use, and says what was given."""
    done = python(
        "import torch, gcnet_ext; print(gcnet_ext.attention_pool(torch.ones(1, 2, 3)))",
        check=False,
        GCNET_EXT_CPU_CAPABILITY=name,
    )
    assert done.returncode != 0
    assert f"GCNET_EXT_CPU_CAPABILITY must be one of {', '.join(usable())} on this machine, got {name}" in done.stderr


def test_bfloat16_below_the_normal_numbers(python):
    """As README says: AVX512_BF16 rounds them to zero, the other capabilities keep them."""
    script = "import torch, gcnet_ext; x = torch.full((1, 64, 5), 1e-39).bfloat16(); one = torch.ones(1, 64)"
    script += "; product = gcnet_ext.channel_fuse(x, one); print(torch.equal(product, x), product.eq(0).all().item())"
    for capability in usable():
        told = python(script, GCNET_EXT_CPU_CAPABILITY=capability).stdout.split()
        assert told == (["False", "True"] if capability == "avx512_bf16" else ["True", "False"]), capability
