"""setup.py: what it says, where it stops, and what a wheel holds."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

HIDE = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {module!r} else find_spec(name, *rest)
"""
CUDA_TORCH = """
import torch, torch.utils.cpp_extension
torch.version.cuda = "13.0"
torch.utils.cpp_extension.CUDA_HOME = {home!r}
"""
CPU_TORCH = "import torch; torch.version.cuda = None"
NO_NINJA = "import torch.utils.cpp_extension as extension; extension.is_ninja_available = lambda: False"


def setup(prelude: str = "", **environment: str) -> subprocess.CompletedProcess:
    """setup.py up to the point where it compiles, after a prelude that takes something away from this machine."""
    code = (
        f"{prelude}\nimport runpy, setuptools, sys\nsetuptools.setup = lambda **arguments: print('would build')\n"
        "sys.argv = ['setup.py', 'build_ext']\nrunpy.run_path('setup.py', run_name='__main__')"
    )
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("GCNET_EXT_", "FORCE_CUDA"))}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("prelude", "environment", "sentence"),
    [
        (HIDE.format(module="torch"), {}, "torch is not installed in .*install torch >= 2.11 first.*--no-build-isolation"),
        ("import torch; torch.__version__ = '2.10.1'", {}, "torch 2.10.1 is too old; .*pip install 'torch>=2.11'"),
        (HIDE.format(module="pybind11"), {}, "pybind11 is not installed; pip install pybind11"),
        ("", {"CXX": "no-such-compiler"}, "no C\\+\\+ compiler: no-such-compiler is not on the PATH; install g\\+\\+"),
        (NO_NINJA, {}, "ninja is not installed; pip install ninja"),
        ("", {"GCNET_EXT_CUDA": "yes"}, "GCNET_EXT_CUDA must be auto, 0 or 1, got 'yes'"),
        (
            "import torch; torch.version.cuda = None",
            {"GCNET_EXT_CUDA": "1"},
            "built without CUDA; install a CUDA build of torch",
        ),
        (CPU_TORCH, {"FORCE_CUDA": "1"}, "built without CUDA; install a CUDA build of torch"),
        (CUDA_TORCH.format(home="/nowhere"), {}, "there is no nvcc; install the CUDA 13.0 toolkit .* or set GCNET_EXT_CUDA=0"),
    ],
    ids=["torch", "old torch", "pybind11", "compiler", "ninja", "unknown choice", "CUDA=1", "FORCE_CUDA", "nvcc"],
)
def test_a_missing_piece_is_one_sentence(prelude, environment, sentence):
    result = setup(prelude, **environment)
    assert result.returncode == 1
    assert re.search(f"^gcnet_ext cannot be built: .*{sentence}", result.stderr, re.MULTILINE), result.stderr
    assert "Traceback" not in result.stderr
    assert "would build" not in result.stdout


@pytest.fixture
def toolkit(tmp_path):
    """A CUDA toolkit of another major than torch's, as far as its compiler tells."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.99'\n")
    nvcc.chmod(0o755)
    return tmp_path


def test_an_nvcc_of_another_major_is_refused(toolkit):
    result = setup(CUDA_TORCH.format(home=str(toolkit)))
    assert result.returncode == 1
    assert "is CUDA 12.4, but torch" in result.stderr
    assert "the majors must agree" in result.stderr
    assert "Traceback" not in result.stderr


def test_cuda_is_decided_by_torch_and_nvcc_and_overridden(toolkit):
    assert "CUDA kernels: no, GCNET_EXT_CUDA=0" in setup(CUDA_TORCH.format(home="/nowhere"), GCNET_EXT_CUDA="0").stdout
    cpu_torch = setup(CPU_TORCH)
    assert re.search("CUDA kernels: no, torch .* is built without CUDA", cpu_torch.stdout)
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text(nvcc.read_text().replace("12.4", "13.1"))
    cuda_torch = setup(CUDA_TORCH.format(home=str(toolkit)), TORCH_CUDA_ARCH_LIST="9.0+PTX")
    assert "CUDA kernels: yes, torch is built with CUDA 13.0" in cuda_torch.stdout, cuda_torch.stderr
    assert "sources for 9.0+PTX" in cuda_torch.stdout


def test_every_decision_is_printed():
    result = setup(GCNET_EXT_CUDA="0")
    assert result.returncode == 0, result.stderr
    for decision in ("torch ", "C++ compiler ", "ninja ", "pybind11 ", "CUDA kernels: ", "_C: ", "would build"):
        assert decision in result.stdout, decision


def test_cmake_and_the_jit_loader_ask_the_same_place():
    from gcnet_ext import _build

    answered = subprocess.run(
        [sys.executable, "gcnet_ext/_build.py", "sources"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answered.stdout.split(";") == _build.sources()
    on_disk = {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu")}
    assert on_disk == {Path(source) for source in (*_build.sources(), *_build.cuda_sources())}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True, env={**os.environ, "GCNET_EXT_CUDA": "0"})
    return next(folder.glob("gcnet_ext-*.whl"))


def test_a_wheel_holds_the_package_and_nothing_else(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    libraries = [name for name in names if name.endswith(".so")]
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "gcnet_ext").rglob("*") if path.suffix in (".py", ".typed")}
    assert len(libraries) == 1
    assert libraries[0].startswith("gcnet_ext/_C.")
    assert set(names) - set(libraries) == sources


def test_a_wheel_works_away_from_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import torch, gcnet_ext; from gcnet_ext import _library\n"
        "print(gcnet_ext.__file__, _library.load_error)\n"
        "print(gcnet_ext.GlobalContextBlock(16, 1 / 4)(torch.ones(1, 16, 3, 3)).sum().item())"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "GCNET_EXT_JIT": "0"}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    where, value = result.stdout.splitlines()
    assert where == f"{tmp_path / 'site' / 'gcnet_ext' / '__init__.py'} None"
    assert float(value) == 72.0  # a mul block starts as x / 2
