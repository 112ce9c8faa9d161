"""setup.py and _build.py: what they decide, what they say, and where they stop."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from checkout import ROOT

from gcnet_ext import _build

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
FLAGS = "import torch; torch._C._cuda_getArchFlags = lambda: 'sm_75 sm_80 sm_86 sm_90 sm_90a sm_120 compute_120'"
NO_NINJA = "import torch.utils.cpp_extension as extension; extension.is_ninja_available = lambda: False"


def run(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    ours = ("GCNET_EXT_", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True, check=False
    )


def setup(prelude: str = "", **environment: str) -> subprocess.CompletedProcess:
    """setup.py up to the point where it compiles, after a prelude that takes something away from this machine."""
    code = (
        f"{prelude}\nimport runpy, setuptools, sys\nsetuptools.setup = lambda **arguments: print('would build')\n"
        "sys.argv = ['setup.py', 'build_ext']\nrunpy.run_path('setup.py', run_name='__main__')"
    )
    return run(code, environment)


def decision(prelude: str, **environment: str) -> str:
    """What the Makefile prints before it builds."""
    code = "import runpy, sys; sys.argv = ['_build.py', 'cuda']; runpy.run_path('gcnet_ext/_build.py', run_name='__main__')"
    done = run(f"{prelude}\n{code}", environment)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch("gcnet_ext: CUDA kernels: .*\n", done.stdout), done.stdout
    return done.stdout.removeprefix("gcnet_ext: CUDA kernels: ").strip()


@pytest.mark.parametrize(
    ("prelude", "environment", "sentence"),
    [
        (HIDE.format(module="torch"), {}, "torch is not installed in .*install torch >= 2.11 first.*--no-build-isolation"),
        ("import torch; torch.__version__ = '2.10.1'", {}, "torch 2.10.1 is too old; .*pip install 'torch>=2.11'"),
        (HIDE.format(module="pybind11"), {}, "pybind11 is not installed; pip install pybind11"),
        ("", {"CXX": "no-such-compiler"}, "no C\\+\\+ compiler: no-such-compiler is not on the PATH; install g\\+\\+"),
        (NO_NINJA, {}, "ninja is not installed; pip install ninja"),
        ("", {"GCNET_EXT_CUDA": "yes"}, "GCNET_EXT_CUDA must be auto, 0, 1 or gpu, got 'yes'"),
        (
            "import torch; torch.version.cuda = None",
            {"GCNET_EXT_CUDA": "1"},
            "built without CUDA; install a CUDA build of torch",
        ),
        (CPU_TORCH, {"FORCE_CUDA": "1"}, "built without CUDA; install a CUDA build of torch"),
        (
            CUDA_TORCH.format(home="/nowhere"),
            {"GCNET_EXT_CUDA": "1"},
            "no nvcc was found; install CUDA toolkit 13.0 and point CUDA_HOME at it, or set GCNET_EXT_CUDA=0",
        ),
    ],
    ids=["torch", "old torch", "pybind11", "compiler", "ninja", "unknown choice", "CUDA=1", "FORCE_CUDA", "nvcc"],
)
def test_a_missing_piece_is_one_sentence(prelude, environment, sentence):
    result = setup(prelude, **environment)
    assert result.returncode == 1
    assert re.search(f"^gcnet_ext cannot be built: .*{sentence}", result.stderr, re.MULTILINE), result.stderr
    assert "Traceback" not in result.stderr
    assert "would build" not in result.stdout


def script(path: Path, line: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(tmp_path):
    """What a build needs of this one."""
    copy = tmp_path / "checkout"
    for folder in ("csrc", "gcnet_ext"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    return copy


@pytest.fixture
def toolkit(tmp_path):
    """Makes a CUDA toolkit of that version, as far as its compiler tells."""

    def make(version: str) -> str:
        script(tmp_path / "bin" / "nvcc", f"echo 'Cuda compilation tools, release {version}, V{version}.99'")
        return CUDA_TORCH.format(home=str(tmp_path))

    return make


@pytest.fixture
def gpus(tmp_path):
    """Makes a machine with GPUs of these compute capabilities, as far as nvidia-smi tells: a PATH."""

    def make(*capabilities: str) -> str:
        answer = "\n".join(f"echo {number}" for number in capabilities) or "exit 9"
        tool = script(tmp_path / "tools" / "nvidia-smi", answer)
        return os.pathsep.join([str(tool.parent), os.environ["PATH"]])

    return make


@pytest.mark.parametrize("choice", [{}, {"GCNET_EXT_CUDA": "auto"}, {"GCNET_EXT_CUDA": ""}], ids=["unset", "auto", "empty"])
def test_without_an_nvcc_the_cpu_kernels_are_built(choice):
    """A CUDA torch is what PyPI has; most who install it have no CUDA compiler."""
    done = setup(CUDA_TORCH.format(home="/nowhere"), **choice)
    assert done.returncode == 0, done.stderr
    assert re.search(
        "^gcnet_ext: CUDA kernels: no, torch .* is built with CUDA 13.0 and no nvcc was found; for CUDA kernels install "
        "CUDA toolkit 13.0 and point CUDA_HOME at it$",
        done.stdout,
        re.MULTILINE,
    )
    assert "libgcnet_ext_cuda" not in done.stdout
    assert done.stdout.endswith("would build\n")


def test_with_an_nvcc_of_another_major_the_cpu_kernels_are_built(toolkit):
    prelude = toolkit("12.4")
    done = setup(prelude)
    assert done.returncode == 0, done.stderr
    assert "CUDA kernels: no, torch " in done.stdout
    assert (
        "nvcc is 12.4: the major versions must agree; for CUDA kernels point CUDA_HOME at a toolkit of CUDA 13" in done.stdout
    )
    wanted = setup(prelude, GCNET_EXT_CUDA="1")
    assert wanted.returncode == 1
    assert "the major versions must agree; point CUDA_HOME at a toolkit of CUDA 13, or set GCNET_EXT_CUDA=0" in wanted.stderr
    assert "Traceback" not in wanted.stderr


def test_cuda_is_decided_by_torch_and_nvcc_and_overridden(toolkit):
    assert "CUDA kernels: no, GCNET_EXT_CUDA was 0" in setup(toolkit("13.1"), GCNET_EXT_CUDA="0").stdout
    cpu_torch = setup(CPU_TORCH)
    assert re.search("CUDA kernels: no, torch .* is built without CUDA", cpu_torch.stdout)
    cuda_torch = setup(toolkit("13.1"), TORCH_CUDA_ARCH_LIST="9.0+PTX")
    assert "CUDA kernels: yes, torch is built with CUDA 13.0" in cuda_torch.stdout, cuda_torch.stderr
    assert "sources for 9.0+PTX" in cuda_torch.stdout
    assert '-DGCNET_EXT_CUDA_ARCHITECTURES="9.0+PTX"' in cuda_torch.stdout


def test_make_builds_cuda_kernels_where_there_is_a_gpu(toolkit, gpus):
    prelude = f"{toolkit('13.0')}\n{FLAGS}"
    assert decision(prelude, GCNET_EXT_CUDA="gpu", PATH=gpus()) == (
        "no, nvidia-smi found no GPU; for CUDA kernels set GCNET_EXT_CUDA=auto"
    )
    assert decision(prelude, GCNET_EXT_CUDA="auto", PATH=gpus()).startswith("yes, ")
    assert decision(prelude, GCNET_EXT_CUDA="gpu", PATH=gpus("9.0")).startswith("yes, ")


ALL = "7.5;8.0;8.6;9.0;12.0+PTX"


@pytest.mark.parametrize(
    ("capabilities", "architectures"),
    [
        ((), ALL),
        (("9.0", "9.0"), "9.0"),
        (("9.0", "8.0"), "8.0;9.0"),
        (("8.9",), "8.6"),  # machine code of an older minor version runs
        (("12.1",), "12.0"),
        (("10.3",), ALL),  # no machine code for it: it needs the PTX
        (("9.0", "7.0"), ALL),
        (("[N/A]",), ALL),
    ],
    ids=lambda value: ",".join(value) or "none" if isinstance(value, tuple) else "",
)
def test_a_gpu_shortens_the_list_of_architectures(toolkit, gpus, capabilities, architectures):
    told = decision(f"{toolkit('13.0')}\n{FLAGS}", PATH=gpus(*capabilities))
    assert told.startswith("yes, torch is built with CUDA 13.0, ")
    assert re.search(r"; for (\S+) \(", told)[1] == architectures
    assert "TORCH_CUDA_ARCH_LIST" in told
    assert ("GCNET_EXT_CUDA=0" in told) == (architectures == ALL), "how to get a shorter build"


def test_which_gpus_are_covered():
    built = "7.5;8.0;9.0a+PTX"
    assert [gpu for gpu in (70, 75, 80, 86, 89, 90, 100, 120) if _build.covers(built, gpu)] == [75, 80, 86, 89, 90, 100, 120]
    assert [gpu for gpu in (75, 80, 86, 90, 100) if _build.covers("8.6", gpu)] == [86]


def test_every_decision_is_printed():
    result = setup(GCNET_EXT_CUDA="0")
    assert result.returncode == 0, result.stderr
    decisions = ("torch ", "C++ compiler ", "ninja ", "pybind11 ", "CUDA kernels: ", "libgcnet_ext: ", "_C: ", "would build")
    for decision in decisions:
        assert decision in result.stdout, decision


@pytest.mark.parametrize("debug", ["0", "1"])
def test_debug_information_is_for_those_who_ask(debug):
    """Python's own flags ask for it; ours come after them."""
    flags = re.search("libgcnet_ext: .* flags (.*)", setup(GCNET_EXT_CUDA="0", GCNET_EXT_DEBUG=debug).stdout)[1].split()
    assert ("-g" in flags, "-g0" in flags, "-O3" in flags) == ((True, False, False) if debug == "1" else (False, True, True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "answers", ["exit 1", '[ "$1" = --version ] && echo c++ 9.1 || { echo "no such option: -std=c++20"; exit 1; }']
)
def test_a_compiler_that_fails_is_one_sentence(checkout, tmp_path, answers):
    compiler = script(tmp_path / "c++", answers)
    environment = {**os.environ, "GCNET_EXT_CUDA": "0", "CXX": str(compiler)}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert ("no such option: -std=c++20" in done.stdout) == ("-std" in answers)
    told = done.stderr.strip().splitlines()[-1]
    assert re.match(
        r"gcnet_ext cannot be built: .* It must know C\+\+20: install g\+\+ >= 11 or clang >= 14, or set CXX\.$", told
    )
    assert "Traceback" not in done.stderr
    assert list(checkout.rglob("*.so")) == []


def test_cmake_and_the_jit_loader_ask_the_same_place():
    answered = subprocess.run(
        [sys.executable, "gcnet_ext/_build.py", "sources"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answered.stdout.split(";") == _build.sources()
    answered = subprocess.run(
        [sys.executable, "gcnet_ext/_build.py", "python_sources"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answered.stdout.split(";") == _build.python_sources() == ["csrc/python/bindings.cpp"]
    on_disk = {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu")}
    assert on_disk == {Path(source) for source in (*_build.sources(), *_build.python_sources(), *_build.cuda_sources())}


EXTENSIONS = """
import json, runpy, setuptools, sys
def show(*, ext_modules, cmdclass, **_):
    command = cmdclass["build_ext"](setuptools.Distribution({"name": "gcnet_ext", "ext_modules": ext_modules}))
    command.parallel = 2
    command.ensure_finalized()
    print(json.dumps({"parallel": command.parallel, "extensions": [
        [command.get_ext_fullpath(e.name), e.sources, e.libraries, command.get_export_symbols(e)] for e in ext_modules]}))
setuptools.setup = show
sys.argv = ["setup.py", "build_ext"]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.parametrize("cuda", [False, True], ids=["CPU", "CUDA"])
def test_only_the_module_is_of_one_python(toolkit, cuda):
    """It is built after the library that it is linked with, which is linked with nothing for Python."""
    prelude = toolkit("13.1") if cuda else ""
    done = run(f"{prelude}\n{EXTENSIONS}", {"TORCH_CUDA_ARCH_LIST": "9.0", "GCNET_EXT_CUDA": "1" if cuda else "0"})
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert not told["parallel"]
    extensions = {Path(path).name: rest for path, *rest in told["extensions"]}
    module = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
    assert list(extensions) == ["libgcnet_ext.so", *(["libgcnet_ext_cuda.so"] if cuda else []), module]
    assert extensions["libgcnet_ext.so"] == [_build.sources(), ["c10", "torch_cpu"], []]
    if cuda:
        assert extensions["libgcnet_ext_cuda.so"] == [_build.cuda_sources(), ["c10", "torch_cpu", "torch_cuda"], []]
    assert extensions[module] == [_build.python_sources(), [], ["PyInit__C"]]
    python = [file for file in ROOT.glob("csrc/**/*.*") if re.search("Python.h|pybind11/", file.read_text())]
    assert {file.parent for file in python} == {ROOT / "csrc" / "python"}, "no other file depends on Python"


# ---- make --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def make(checkout, tmp_path):
    """make build in a copy, with this python and its packages for the virtual environment."""
    if shutil.which("make") is None:
        pytest.skip("make is not on the PATH")
    for file in ("Makefile", "requirements-dev.txt"):
        shutil.copy(ROOT / file, checkout)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "GCNET_EXT_"))}

    def run(*arguments: str, **variables: str) -> tuple[int, str]:
        command = ["make", "build", f"VENV={tmp_path / 'venv'}", *arguments]
        done = subprocess.run(command, cwd=checkout, env=environment | variables, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    return run


def test_make_names_a_python_that_is_too_old(make, tmp_path):
    code = f'exec {shlex.quote(sys.executable)} -c "import sys; sys.version_info = (3, 9); $2"'
    failed, told = make(f"PYTHON={script(tmp_path / 'python3', code)}")
    assert failed
    assert "python3 is Python 3.9, and 3.10 or newer is needed: name one with PYTHON=" in told
    assert "Traceback" not in told
    assert not (tmp_path / "venv").exists()


def test_make_shows_why_a_build_stops(make, tmp_path):
    """pip would hide it; and nothing is taken for built."""
    python = shlex.quote(sys.executable)
    script(tmp_path / "venv" / "bin" / "python", f'exec {python} "$@"')
    script(tmp_path / "venv" / "bin" / "pip", f'exec {python} -m pip "$@"')
    (tmp_path / "venv" / "installed-some-torch").touch()
    failed, told = make("TORCH=some torch", CXX="no-such-compiler", PIP_NO_INDEX="1")
    assert failed
    assert re.search("^gcnet_ext: CUDA kernels: (yes|no), ", told, re.MULTILINE)
    assert "gcnet_ext cannot be built: no C++ compiler: no-such-compiler is not on the PATH; install g++" in told
    assert list((tmp_path / "venv").glob("built-*")) == []
