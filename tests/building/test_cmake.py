"""The CMake project: its Python package, installed, and used by another one (examples/cmake); and a C++ program that needs none
of it, with the library of the Python package (examples/cpp)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkout import ROOT, quick_compiler
from libraries import require_found

import gcnet_ext
from gcnet_ext import _load

pytestmark = pytest.mark.slow
EXAMPLE = ROOT / "examples" / "cmake"
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # the cmake of pip, and this python


def run(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """With a linker that drops libraries of which nothing is called, as in some distributions."""
    inherited = {name: value for name, value in os.environ.items() if name != "CMAKE_GENERATOR"}
    inherited["LDFLAGS"] = "-Wl,--as-needed"
    done = subprocess.run(list(map(str, command)), env={**inherited, "PATH": PATH}, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """Where the operators are installed, and the Python package of the build; built with make, as ninja may be missing."""
    for tool in ("cmake", "make"):
        if shutil.which(tool, path=PATH) is None:
            pytest.skip(f"{tool} is not on the PATH")
    folder = tmp_path_factory.mktemp("cmake")
    compiler = f"-DCMAKE_CXX_COMPILER={quick_compiler(folder)}"
    run("cmake", "-S", ROOT, "-B", folder / "build", "-G", "Unix Makefiles", compiler)
    run("cmake", "--build", folder / "build", "--target", "gcnet_ext", "_C", "--parallel", str(os.cpu_count()))
    run("cmake", "--install", folder / "build", "--prefix", folder / "prefix")
    shutil.move(folder / "build" / "python", folder / "python")
    shutil.rmtree(folder / "build")  # what is installed does without, and so does the Python package
    return folder / "prefix", folder / "python"


@pytest.fixture(scope="module")
def prefix(built) -> Path:
    return built[0]


@pytest.fixture(scope="module")
def configured(prefix, tmp_path_factory) -> tuple[Path, str]:
    """The example, and what cmake said of it."""
    build = tmp_path_factory.mktemp("fuse")
    where = f"-DCMAKE_PREFIX_PATH={prefix}", f"-DTORCH={torch.__path__[0]}"
    return build, run("cmake", "-S", EXAMPLE, "-B", build, "-G", "Unix Makefiles", *where).stdout


def test_only_the_library_and_its_package_are_installed(prefix):
    files = {str(path.relative_to(prefix)) for path in prefix.rglob("*") if path.is_file()}
    (library,) = {name for name in files if name.endswith(".so")}
    assert re.fullmatch(r"lib\w*(/[\w-]+)?/libgcnet_ext\.so", library)
    assert {Path(name).name for name in files if name != library} == {
        "gcnet_ext-config.cmake",
        "gcnet_ext-config-version.cmake",
        "gcnet_ext-targets.cmake",
        "gcnet_ext-targets-noconfig.cmake",
    }
    assert all(str(ROOT) not in (prefix / name).read_text() for name in files - {library}), "it can be moved"


def test_its_python_package_finds_the_library(built):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"GCNET_EXT_JIT": "0"}
    require_found(built[1] / "gcnet_ext" / "libgcnet_ext.so", built[1], environment)
    code = "from gcnet_ext import _load; assert _load.load_error is None, _load.load_error; print(_load.compiled.__file__)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=built[1], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == built[1] / "gcnet_ext"


@pytest.mark.skipif(_load.compiled is None, reason=f"no compiled library: {_load.load_error}")
def test_a_program_runs_a_packaged_model_with_the_library_of_the_python_package(tmp_path):
    """As its CMakeLists.txt says: nothing of gcnet_ext is compiled for it."""
    if shutil.which("cmake", path=PATH) is None:
        pytest.skip("cmake is not on the PATH")
    environment = {**os.environ, "PYTHONPATH": str(Path(gcnet_ext.__file__).parent.parent), "PATH": PATH}
    make_package = [sys.executable, str(ROOT / "examples" / "cpp" / "make_package.py"), str(tmp_path)]
    subprocess.run(make_package, env=environment, cwd=tmp_path, check=True)
    command = [sys.executable, "-m", "gcnet_ext", "--library"]
    libraries = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.split()
    build = tmp_path / "build"
    run("cmake", "-S", ROOT / "examples" / "cpp", "-B", build, "-G", "Unix Makefiles", f"-DTORCH={torch.__path__[0]}")
    run("cmake", "--build", build)
    program, package = build / "run_package", (tmp_path / "model.pt2", tmp_path / "example.pt")
    assert "largest difference to Python: " in run(program, *package, *libraries).stdout
    assert "libgcnet_ext.so" in libraries[0]
    assert run(program, *package, tmp_path / "none.so", check=False).returncode == 1
    assert run(program, *package, check=False).returncode == 2


def test_another_project_runs_an_operator(configured, prefix):
    build, told = configured
    (library,) = prefix.rglob("libgcnet_ext.so")
    assert re.search(rf"gcnet_ext \d+\.\d+\.\d+: {re.escape(str(library))}", told), told
    run("cmake", "--build", build)
    assert "gcnet_ext::channel_fuse: largest error" in run(build / "fuse").stdout


def test_another_version_is_refused(prefix, tmp_path):
    """find_package asks for a version, and takes no other minor one."""
    project = "cmake_minimum_required(VERSION 3.24)\nproject(p NONE)\nfind_package(gcnet_ext 0.99 CONFIG REQUIRED)\n"
    (tmp_path / "CMakeLists.txt").write_text(project)
    done = run("cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}", check=False)
    assert done.returncode != 0
    assert "compatible with requested version" in done.stderr
