"""What is compiled, and how: the one place that setup.py, the JIT loader and CMakeLists.txt ask.

Only the standard library is used, so that setup.py and CMake can run this file without importing the package.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

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
MINIMUM_TORCH = (2, 11)


def sources() -> list[str]:
    """The sources of ``gcnet_ext._C``: bindings, schemas, the plan and the CPU kernels; relative to the root, sorted."""
    return sorted(str(path.relative_to(ROOT)) for folder in (CSRC, CSRC / "cpu") for path in folder.glob("*.cpp"))


def headers() -> list[str]:
    """Every header: when one of them changes, what includes it is compiled again."""
    return sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob("*.h*"))


def version() -> str:
    """The version of the package, from the one file that states it."""
    scope: dict[str, str] = {}
    exec((ROOT / "gcnet_ext" / "_version.py").read_text(), scope)
    return scope["__version__"]


def torch_is_recent_enough(torch_version: str) -> bool:
    """Whether the installed torch has the stable ABI that the kernels target."""
    major, minor = torch_version.split(".")[:2]
    return (int(major), int(minor)) >= MINIMUM_TORCH


def find_tools() -> None:
    """Puts the scripts of this Python on the PATH: pip installs ninja there, and torch looks for it on the PATH alone."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def debug() -> bool:
    """GCNET_EXT_DEBUG=1 builds with debug information and assertions, without optimisation."""
    return os.environ.get("GCNET_EXT_DEBUG", "0") == "1"


def cxx_flags() -> list[str]:
    """The compiler flags of this build."""
    flags = [*CXX_FLAGS, f'-DGCNET_EXT_VERSION="{version()}"']
    return ["-g", "-O0", *flags[1:]] if debug() else flags


if __name__ == "__main__":
    # CMakeLists.txt: python gcnet_ext/_build.py sources|cxx_flags|link_flags|version
    answers = {"sources": sources, "cxx_flags": cxx_flags, "link_flags": lambda: LINK_FLAGS, "version": lambda: [version()]}
    print(";".join(answers[sys.argv[1]]()), end="")
