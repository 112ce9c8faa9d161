"""The CUDA operators on CPU tensors: torch glue, launches and kernels of csrc/cuda, compiled with g++ and emulated.

    with emulated.installed():
        gcnet_ext.global_context(x, ...)  # forward and backward now run the CUDA kernels

Memory that an operator allocates starts as NaN, so that what no kernel wrote shows.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils import cpp_extension

EMULATOR = Path(__file__).resolve().parent / "emulator"
CSRC = EMULATOR.parents[2] / "csrc"
FLAGS = ["-O2", "-std=c++20", "-DUSE_CUDA", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-Wno-unused-parameter", "-Wno-unknown-pragmas"]  # torch's headers; #pragma unroll


def why_not() -> str:
    """Why the operators cannot be compiled here; empty when they can."""
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        return "there is no C++ compiler"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return "" if find_ninja() else "ninja is not installed"


def find_ninja() -> bool:
    """pip installs ninja beside Python, and torch looks for it on the PATH alone."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return cpp_extension.is_ninja_available()


def operators(namespace: str) -> list[str]:
    """The names of its operators, asked from the dispatcher: each is emulated, or the missing one shows."""
    return [name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{namespace}::")]


def emulated_sources(build: Path) -> list[Path]:
    """Writes a C++ source for the schemas and one for every .cu file, which puts its operators into the emulated namespace.

    A file that is already right is left as it is, so that it is not compiled again.
    """
    sources = []
    for source in (CSRC / "ops.cpp", *sorted((CSRC / "cuda").glob("*.cu"))):
        path = build / f"{source.stem}.emulated.cpp"
        text = f'#include "emulated_namespace.h"\n\n#include "{source}"\n'
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        sources.append(path)
    return sources


@functools.cache
def load() -> ModuleType:
    """Compiles what has changed, once per process, and registers torch.ops.gcnet_ext_emulated."""
    find_ninja()
    build = Path(os.environ.get("GCNET_EMULATED_BUILD_DIR", CSRC.parent / "build" / f"emulated-{torch.__version__}"))
    build.mkdir(parents=True, exist_ok=True)
    shared = [CSRC / name for name in ("arguments.cpp", "check.cpp", "layout.cpp", "plan_cuda.cpp")]
    sources = [*emulated_sources(build), EMULATOR / "module.cpp", EMULATOR / "cuda_emulation.cpp", *shared]
    return cpp_extension.load(
        name="gcnet_ext_emulated",
        sources=[str(source) for source in sources],
        extra_include_paths=[str(EMULATOR), __import__("pybind11").get_include()],
        extra_cflags=FLAGS,
        extra_ldflags=["-Wl,-Bsymbolic"],
        build_directory=str(build),
    )


def call_on_unwritten_memory(op: Callable[..., Any], *arguments: Any) -> Any:
    """Calls the operator with every new tensor filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return op(*arguments)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def installed() -> Iterator[ModuleType]:
    """While this lasts, the operators of gcnet_ext on CPU tensors are the emulated ones."""
    module = load()
    library = torch.library.Library("gcnet_ext", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # that they are overridden is the point
        for name in operators("gcnet_ext"):
            op = getattr(torch.ops.gcnet_ext_emulated, name).default
            if not torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CPU"):  # there are operators of the CPU alone
                continue
            library.impl(name, functools.partial(call_on_unwritten_memory, op), "CPU")
    try:
        yield module
    finally:
        library._destroy()
