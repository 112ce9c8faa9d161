"""What is compiled, and how: the one place that setup.py, the JIT loader and CMakeLists.txt ask.

Only the standard library is used, so that setup.py and CMake can run this file without importing the package.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"

# ffp-contract: a*b+c in the kernels is one fused multiply-add, with every compiler and under every -std.
# fno-math-errno, fno-trapping-math: loops with sqrt and comparisons vectorise; infinities and NaN stay as IEEE 754 has them.
CXX_FLAGS = (
    "-O3",
    "-std=c++20",
    "-fopenmp",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",  # torch's headers have some
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
)
LINK_FLAGS = ("-fopenmp",)
# USE_CUDA: declares the current stream in the stable ABI. extended-lambda, relaxed-constexpr: the launch code uses both.
CUDA_FLAGS = (
    "-O3",
    "-std=c++20",
    "-DUSE_CUDA",
    "--expt-relaxed-constexpr",
    "--extended-lambda",
    "-Xcompiler=-fvisibility=hidden",
)
MINIMUM_TORCH = (2, 11)


def sources() -> list[str]:
    """The sources of ``gcnet_ext._C``: bindings, schemas, the plan and the CPU kernels; relative to the root, sorted."""
    return sorted(str(path.relative_to(ROOT)) for folder in (CSRC, CSRC / "cpu") for path in folder.glob("*.cpp"))


def cuda_sources() -> list[str]:
    """The sources of ``gcnet_ext._C_cuda``: implementations for CUDA, and what they share with the CPU library."""
    shared = [CSRC / name for name in ("check.cpp", "layout.cpp", "plan_cuda.cpp")]
    return sorted(str(path.relative_to(ROOT)) for path in (*(CSRC / "cuda").glob("*.cu"), *shared))


def headers() -> list[str]:
    """Every header: when one of them changes, what includes it is compiled again."""
    return sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob("*.h*"))


def version() -> str:
    """The version of the package, from the one file that states it."""
    return (ROOT / "gcnet_ext" / "_version.py").read_text().split('"')[1]


def torch_is_recent_enough(torch_version: str) -> bool:
    """Whether the installed torch has the stable ABI that the kernels target."""
    major, minor = torch_version.split(".")[:2]
    return (int(major), int(minor)) >= MINIMUM_TORCH


def find_tools() -> None:
    """Puts the scripts of this Python on the PATH: pip installs ninja there, and torch looks for it on the PATH alone."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


class CudaDecision(NamedTuple):
    """Whether the CUDA library is built, and why; for which architectures, as in TORCH_CUDA_ARCH_LIST."""

    build: bool
    reason: str
    architectures: str = ""
    version: str = ""


class BuildStop(Exception):  # noqa: N818
    """What keeps the package from being built, in one sentence that names the fix."""


def require_plain_path(path: str) -> None:
    """In the build file that torch writes for ninja only blanks are escaped: a $ would be expanded, the others end a path.

    Raises:
        BuildStop: the path has such a character.
    """
    if found := re.search(r"[$:|\n\r]", path):
        raise BuildStop(f"ninja does not take {found.group()!r} in the path {path!r}; move it to a path without.")


def _nvcc() -> tuple[str, str] | None:
    """Path and version of the CUDA compiler, where torch would look for it; tells torch where the rest of its toolkit is."""
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    path = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    if path is None:
        return None
    try:
        version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildStop(
            f"{path} does not run ({error}); point CUDA_HOME at a working toolkit, or set GCNET_EXT_CUDA=0 to build for the "
            "CPU only."
        ) from error
    # torch takes the folder above nvcc's, where nothing is if that nvcc only calls another one; the compiler knows better.
    steps = subprocess.run([path, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False).stderr
    if here := re.search(r"^#\$ _HERE_=(.+)$", steps, re.MULTILINE):
        cpp_extension.CUDA_HOME = str(Path(here.group(1)).parent)
    found = re.search(r"release (\d+\.\d+)", version)
    return (path, found.group(1)) if found else None


def _architectures() -> str:
    """TORCH_CUDA_ARCH_LIST, else what torch itself was built for, the newest also as PTX for the GPUs to come."""
    import torch

    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if wanted:
        return wanted
    numbers = sorted({int(number) for number in re.findall(r"sm_(\d+)\b", torch._C._cuda_getArchFlags() or "")})
    return ";".join(f"{number // 10}.{number % 10}" for number in numbers) + "+PTX"


def decide_cuda() -> CudaDecision:
    """GCNET_EXT_CUDA=auto|0|1 (FORCE_CUDA=1 is 1). It is torch and nvcc that decide, never a GPU in this machine.

    Raises:
        BuildStop: CUDA is wanted, or torch is a CUDA build, and something is missing.
    """
    import torch

    wanted = os.environ.get("GCNET_EXT_CUDA", "1" if os.environ.get("FORCE_CUDA", "0") == "1" else "auto")
    if wanted not in ("auto", "0", "1"):
        raise BuildStop(f"GCNET_EXT_CUDA must be auto, 0 or 1, got {wanted!r}.")
    if wanted == "0":
        return CudaDecision(False, "GCNET_EXT_CUDA=0")
    if torch.version.cuda is None:
        if wanted == "1":
            raise BuildStop(
                "CUDA kernels are wanted (GCNET_EXT_CUDA=1 or FORCE_CUDA=1), but torch "
                f"{torch.__version__} is built without CUDA; install a CUDA build of torch, or set GCNET_EXT_CUDA=0."
            )
        return CudaDecision(False, f"torch {torch.__version__} is built without CUDA")
    nvcc = _nvcc()
    if nvcc is None:
        raise BuildStop(
            f"torch {torch.__version__} is built with CUDA {torch.version.cuda}, but there is no nvcc; install the CUDA "
            f"{torch.version.cuda} toolkit and set CUDA_HOME, or set GCNET_EXT_CUDA=0 to build for the CPU only."
        )
    path, version = nvcc
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise BuildStop(
            f"{path} is CUDA {version}, but torch {torch.__version__} is built with CUDA {torch.version.cuda}; the majors "
            "must agree: point CUDA_HOME at a matching toolkit, or set GCNET_EXT_CUDA=0 to build for the CPU only."
        )
    return CudaDecision(True, f"torch is built with CUDA {torch.version.cuda}, {path} is {version}", _architectures(), version)


def debug() -> bool:
    """GCNET_EXT_DEBUG=1 builds with debug information and assertions, without optimisation."""
    return os.environ.get("GCNET_EXT_DEBUG", "0") == "1"


def cxx_flags(cuda: CudaDecision | None = None) -> list[str]:
    """The compiler flags of this build; the CUDA library beside it is only told to ``build_info()``."""
    built = cuda if cuda is not None and cuda.build else CudaDecision(False, "")
    flags = [
        *CXX_FLAGS,
        f'-DGCNET_EXT_VERSION="{version()}"',
        f'-DGCNET_EXT_CUDA_VERSION="{built.version}"',
        f'-DGCNET_EXT_CUDA_ARCHITECTURES="{built.architectures}"',
    ]
    return ["-g", "-O0", *flags[1:]] if debug() else flags


if __name__ == "__main__":
    # CMakeLists.txt: python gcnet_ext/_build.py sources|cxx_flags|link_flags|version
    answers = {"sources": sources, "cxx_flags": cxx_flags, "link_flags": lambda: LINK_FLAGS, "version": lambda: [version()]}
    print(";".join(answers[sys.argv[1]]()), end="")
