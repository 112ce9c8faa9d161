"""64-bit Arm: the CPU's loops, which know no torch, are cross-compiled, and an emulator runs their fuzz program.

This needs Debian's packages g++-aarch64-linux-gnu and qemu-user; without them it is skipped.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from checkout import ROOT
from torch.utils.cpp_extension import include_paths

from gcnet_ext import _build

COMPILER, DISASSEMBLER, EMULATOR = "aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump", "qemu-aarch64"
RUNS = 2000
pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """The fuzz program of tests/native/cpu. A warning of the compiler is an error."""
    for tool in (COMPILER, DISASSEMBLER, EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    folder = tmp_path_factory.mktemp("arm")
    loops = [*sorted((ROOT / "csrc" / "cpu").glob("kernels_*.cpp")), ROOT / "csrc" / "plan_cpu.cpp"]
    fuzz = [ROOT / "tests" / "native" / "cpu" / name for name in ("fuzz.cpp", "fuzz_main.cpp")]
    flags = [*_build.CXX_FLAGS, "-Werror"]
    headers = [part for path in include_paths() for part in ("-isystem", path)]
    run(COMPILER, "-static", *flags, *headers, *loops, *fuzz, "-o", folder / "fuzz")
    return folder / "fuzz"


@pytest.fixture(scope="module")
def functions(program) -> list[str]:
    """The machine code of the program, function by function."""
    return run(DISASSEMBLER, "--demangle", "--disassemble", "--no-show-raw-insn", program).split("\n\n")


def test_random_inputs_find_nothing(program, tmp_path):
    assert f"{RUNS} inputs, nothing found" in run(EMULATOR, program, "--runs", str(RUNS), cwd=tmp_path)


@pytest.mark.parametrize("name", ["channel_fuse<float>", "position_dots<float>", "add_rows<float>", "pool_gradient<float>"])
def test_the_vectors_are_those_of_neon(functions, name):
    """Four floats at a time. Single numbers are left for the ends of rows, and for the sum of the four at the end of a loop."""
    title = re.compile(rf".*capability_default::{re.escape(name)}\(")
    code = "".join(text for text in functions if title.match(text))
    assert code, name
    vectors = len(re.findall(r"\t(?:fmla|fmul|fadd)\tv\d+\.4s", code))
    single = len(re.findall(r"\t(?:fmadd|fmul|fadd)\ts\d+", code))
    assert vectors > single, f"{vectors} instructions on vectors, {single} on single numbers"
