"""The operator library and the module `_C`, which asks it: how they are found, alone and together, and what is said otherwise.

A wheel and an editable install are in test_packaging.py, GCNET_EXT_JIT=1 is in test_jit.py and CMake in test_cmake.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from libraries import require_found, require_works_alone, symbols

import gcnet_ext
from gcnet_ext import __main__ as command_line
from gcnet_ext import _build, _libraries, _load

needs_library = pytest.mark.skipif(_load.compiled is None, reason=f"no compiled library: {_load.load_error}")


@pytest.fixture
def package(tmp_path) -> Path:
    """The package without its libraries, in a folder of its own."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    return Path(shutil.copytree(Path(gcnet_ext.__file__).parent, tmp_path / "site" / "gcnet_ext", ignore=ignored))


@pytest.fixture
def run(package) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs python where it imports that package."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=package.parent, env=environment(), capture_output=True, text=True, check=False)

    return run


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"GCNET_EXT_JIT": "0"}


# ---- where they are ----------------------------------------------------------------------------------------------------------


@needs_library
def test_the_command_prints_the_library_that_is_loaded(capsys):
    assert command_line.main(["--library"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == str(_load.library) == str(_libraries.find())
    assert told[1:] == ([str(_libraries.find(_build.CUDA_LIBRARY))] if "cuda" in _load.kernel_devices else [])
    require_works_alone(Path(told[0]))


@needs_library
def test_the_command_prints_the_library_of_the_cuda_kernels_in_a_second_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "libgcnet_ext_cuda.so").touch()
    monkeypatch.setattr(_libraries, "folder", lambda: tmp_path)
    monkeypatch.setattr(_load, "kernel_devices", frozenset({"cpu", "cuda", "meta"}))
    assert command_line.main(["--library"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(_load.library), str(tmp_path / "libgcnet_ext_cuda.so")]


def test_without_a_library_the_command_says_why(package, run):
    done = run("-m", "gcnet_ext", "--library")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("gcnet_ext has no library here: ")
    assert f"could not be loaded (FileNotFoundError: there is no libgcnet_ext.so in {package})" in done.stderr
    assert _load.HOW_TO_BUILD in done.stderr
    assert "Traceback" not in done.stderr


def test_a_library_that_is_none_is_not_named(package, run):
    (package / "libgcnet_ext.so").write_text("no ELF file")
    done = run("-m", "gcnet_ext", "--library")
    assert (done.returncode, done.stdout) == (1, "")
    assert str(package / "libgcnet_ext.so") in done.stderr


@needs_library
def test_beside_the_package(package):
    shutil.copy(_load.library, package)
    shutil.copy(_load.compiled.__file__, package)
    require_found(package / "libgcnet_ext.so", package.parent, environment())


# ---- one without the other ---------------------------------------------------------------------------------------------------

PLAIN = """
import sys, warnings
# That of an editable install would find the module in the checkout.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, gcnet_ext
    from gcnet_ext import _load
    assert not caught, "importing alone is no reason to warn"
    x = torch.randn(2, 6, 4, 5)
    block = gcnet_ext.GlobalContextBlock(6, 0.5)
    for _ in range(2):
        assert torch.equal(block(x), x / 2)
assert _load.compiled is None and not _load.kernel_devices
print(len(caught), caught[0].message)
"""


@needs_library
def test_without_the_module_plain_pytorch_is_used(package, run):
    """As under a Python that the package was not built for; the library serves C++ programs all the same."""
    library = Path(shutil.copy(_load.library, package))
    done = run("-c", PLAIN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 gcnet_ext uses plain PyTorch on cpu: the compiled kernels could not be loaded (")
    assert "No module named 'gcnet_ext._C'" in done.stdout
    require_found(library, package.parent, environment())


@needs_library
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("version", ["0.0.1", gcnet_ext.__version__])
def test_a_library_of_another_version_is_one_sentence(package, run, tmp_path, version):
    """It offers the same names; calling them would crash, which the last line here shows."""
    names = {name for name in symbols(Path(_load.compiled.__file__), "undefined") if name.startswith("gcnet_ext")}
    source = f'extern "C" const char* gcnet_ext_version() {{ return "{version}"; }}\n'
    source += "".join(f'extern "C" void {name}() {{ __builtin_trap(); }}\n' for name in names - {"gcnet_ext_version"})
    (tmp_path / "other.cpp").write_text(source)
    library = package / "libgcnet_ext.so"
    options = ("-shared", "-fPIC", "-Wl,-soname,libgcnet_ext.so")
    subprocess.run(["c++", *options, tmp_path / "other.cpp", "-o", library], check=True)
    shutil.copy(_load.compiled.__file__, package)
    done = run("-c", PLAIN)
    if version == gcnet_ext.__version__:
        assert done.returncode < 0, "it was killed by a signal"
        return
    assert done.returncode == 0, done.stderr
    why = (
        f"gcnet_ext._C is of version {gcnet_ext.__version__} and libgcnet_ext.so, which it needs, of version 0.0.1: "
        "they must come from one build"
    )
    assert f"(ImportError: {why})" in done.stdout
