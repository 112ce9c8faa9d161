"""What is compiled, and how: the one place that setup.py, the JIT loader and CMakeLists.txt ask.

To load this file takes only the standard library, so that setup.py and CMake can run it without importing the package. What
decides about CUDA imports torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
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
# The operators for CPUs, those for CUDA, and the Python module that asks the first library.
LIBRARY, CUDA_LIBRARY, MODULE = "libgcnet_ext", "libgcnet_ext_cuda", "_C"
# The soname: by it _C finds the library where it is loaded already, wherever that is.
LINK_FLAGS = ("-fopenmp", f"-Wl,-soname,{LIBRARY}.so")
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
    """The sources of ``libgcnet_ext.so``: schemas, the plan and the CPU kernels; relative to the root, sorted."""
    return sorted(str(path.relative_to(ROOT)) for folder in (CSRC, CSRC / "cpu") for path in folder.glob("*.cpp"))


def python_sources() -> list[str]:
    """The sources of ``gcnet_ext._C``, the only ones that depend on Python."""
    return sorted(str(path.relative_to(ROOT)) for path in (CSRC / "python").glob("*.cpp"))


def cuda_sources() -> list[str]:
    """The sources of ``libgcnet_ext_cuda.so``: implementations for CUDA, and what they share with the CPU library."""
    shared = [CSRC / name for name in ("arguments.cpp", "check.cpp", "layout.cpp", "plan_cuda.cpp")]
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
    """Whether the CUDA library is built, and why, or what to do for it; for which architectures, as in TORCH_CUDA_ARCH_LIST."""

    build: bool
    reason: str
    architectures: str = ""
    version: str = ""

    def sentence(self) -> str:
        return f"CUDA kernels: {'yes' if self.build else 'no'}, {self.reason}"


class BuildStop(Exception):  # noqa: N818
    """What keeps the package from being built, in one sentence that names the fix."""


def require_plain_path(path: str) -> None:
    """In the build file that torch writes for ninja only blanks are escaped: a $ would be expanded, the others end a path.

    Raises:
        BuildStop: the path has such a character.
    """
    if found := re.search(r"[$:|\n\r]", path):
        raise BuildStop(f"ninja does not take {found.group()!r} in the path {path!r}; use a path without it.")


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


def _gpus() -> list[int]:
    """The GPUs of this machine, each as its compute capability times ten; none where nvidia-smi does not answer."""
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return sorted({int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)\s*$", told, re.MULTILINE)})


def architecture_for(gpu: int, built: Iterable[int]) -> int | None:
    """The one of these architectures whose machine code a GPU runs: the newest of its major that is not newer than it."""
    return max((number for number in built if number // 10 == gpu // 10 and number <= gpu), default=None)


def covers(architectures: str, gpu: int) -> bool:
    """Whether kernels that were compiled for a TORCH_CUDA_ARCH_LIST run on a GPU, from machine code or from PTX."""
    found = [(int(major + minor), ptx) for major, minor, ptx in re.findall(r"(\d+)\.(\d)[a-z]?(\+PTX)?", architectures)]
    return architecture_for(gpu, [number for number, _ptx in found]) is not None or any(ptx and n <= gpu for n, ptx in found)


def _architectures(gpus: list[int]) -> tuple[str, str]:
    """The architectures to compile for, as in TORCH_CUDA_ARCH_LIST, and who chose them.

    Without that variable: those that the GPUs of this machine run, if torch has machine code for all of them; otherwise all
    that torch is built for, with PTX of the newest for later GPUs.
    """
    import torch

    if wanted := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return wanted, "TORCH_CUDA_ARCH_LIST"
    all_of_torch = sorted({int(number) for number in re.findall(r"sm_(\d+)\b", torch._C._cuda_getArchFlags() or "")})
    served = sorted({number for gpu in gpus if (number := architecture_for(gpu, all_of_torch)) is not None})

    def names(numbers: list[int]) -> str:
        return ";".join(f"{number // 10}.{number % 10}" for number in numbers)

    if gpus and all(architecture_for(gpu, served) is not None for gpu in gpus):
        return names(served), "the GPUs found here; set TORCH_CUDA_ARCH_LIST for others"
    return names(all_of_torch) + "+PTX", (
        "all that torch is built for, which takes minutes; TORCH_CUDA_ARCH_LIST=9.0 would build for one of them, "
        "GCNET_EXT_CUDA=0 for the CPU only"
    )


def decide_cuda() -> CudaDecision:
    """GCNET_EXT_CUDA=auto|0|1|gpu (FORCE_CUDA=1 is 1): whether there are CUDA kernels, which is for torch and nvcc to decide.

    ``auto``, the default, builds them where torch is a CUDA build and nvcc has its major version; ``1`` stops where that is not
    so. A container is built on machines without a GPU, so a GPU only shortens the list of architectures; but ``gpu``, which the
    Makefile sets for ``make demo`` and ``make test``, is ``auto`` where there is a GPU and ``0`` elsewhere.

    Raises:
        BuildStop: CUDA is wanted and something is missing, nvcc does not run, or the variable has another value.
    """
    import torch

    wanted = os.environ.get("GCNET_EXT_CUDA") or ("1" if os.environ.get("FORCE_CUDA", "0") == "1" else "auto")
    if wanted not in ("auto", "0", "1", "gpu"):
        raise BuildStop(f"GCNET_EXT_CUDA must be auto, 0, 1 or gpu, got {wanted!r}.")
    if wanted == "0":
        return CudaDecision(False, "GCNET_EXT_CUDA was 0; for CUDA kernels set it to auto")

    def without(why: str, fix: str) -> CudaDecision:
        if wanted == "1":
            raise BuildStop(
                f"CUDA kernels are wanted (GCNET_EXT_CUDA=1 or FORCE_CUDA=1), but {why}; {fix}, or set GCNET_EXT_CUDA=0 to "
                "build for the CPU only."
            )
        return CudaDecision(False, f"{why}; for CUDA kernels {fix}")

    cuda = torch.version.cuda
    if cuda is None:
        return without(f"torch {torch.__version__} is built without CUDA", "install a CUDA build of torch")
    gpus = _gpus()
    if wanted == "gpu" and not gpus:
        return CudaDecision(False, "nvidia-smi found no GPU; for CUDA kernels set GCNET_EXT_CUDA=auto")
    nvcc = _nvcc()
    if nvcc is None:
        return without(
            f"torch {torch.__version__} is built with CUDA {cuda} and no nvcc was found",
            f"install CUDA toolkit {cuda} and point CUDA_HOME at it",
        )
    path, version = nvcc
    if version.split(".")[0] != cuda.split(".")[0]:
        return without(
            f"torch {torch.__version__} is built with CUDA {cuda}, nvcc is {version}: the major versions must agree",
            f"point CUDA_HOME at a toolkit of CUDA {cuda.split('.')[0]}",
        )
    architectures, chosen_by = _architectures(gpus)
    reason = f"torch is built with CUDA {cuda}, {path} is of {version}; for {architectures} ({chosen_by})"
    return CudaDecision(True, reason, architectures, version)


def debug() -> bool:
    """GCNET_EXT_DEBUG=1 builds with debug information and assertions, without optimisation."""
    return os.environ.get("GCNET_EXT_DEBUG", "0") == "1"


def cuda_flags(cuda: CudaDecision) -> list[str]:
    """The flags of nvcc; the define is for the error on a GPU for which nothing was compiled."""
    return [*CUDA_FLAGS, _define("GCNET_EXT_CUDA_ARCHITECTURES", cuda.architectures)]


def _define(name: str, text: str) -> str:
    return f"-D{name}={json.dumps(text)}"


def cxx_flags(cuda: CudaDecision | None = None) -> list[str]:
    """The compiler flags of this build; whether there is a CUDA library beside it is only told to ``build_info()``."""
    told = cuda if cuda is not None else CudaDecision(False, "CMakeLists.txt builds none, and for CUDA kernels use setup.py")
    defined = {
        "GCNET_EXT_VERSION": version(),
        "GCNET_EXT_CUDA_VERSION": told.version,
        "GCNET_EXT_CUDA_ARCHITECTURES": told.architectures,
        "GCNET_EXT_WITHOUT_CUDA": "" if told.build else told.reason,
    }
    flags = [*CXX_FLAGS, *(_define(name, text) for name, text in defined.items())]
    # Python's own flags, which setuptools puts before these, have -g: ten times the size for nobody.
    return ["-g", "-O0", *flags[1:]] if debug() else ["-g0", *flags]


if __name__ == "__main__":
    # CMakeLists.txt: python gcnet_ext/_build.py sources|python_sources|cxx_flags|link_flags|version; the Makefile: cuda
    answers = {
        "sources": sources,
        "python_sources": python_sources,
        "cxx_flags": cxx_flags,
        "link_flags": lambda: LINK_FLAGS,
        "version": lambda: [version()],
        "cuda": lambda: [f"gcnet_ext: {decide_cuda().sentence()}\n"],
    }
    try:
        print(";".join(answers[sys.argv[1]]()), end="")
    except BuildStop as reason:
        sys.exit(f"gcnet_ext cannot be built: {reason}")
