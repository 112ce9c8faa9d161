"""GCNET_EXT_JIT=1: compile the sources of the checkout in place and use them. For work on the kernels."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

from torch.utils import cpp_extension

from . import _build, _libraries


def private(folder: Path) -> Path:
    """The folder, which nobody but this user may have written to: what lies in it is executed.

    Raises:
        RuntimeError: it belongs to somebody else, or is open to others.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if {found.st_uid for found in (folder.stat(), folder.lstat())} != {os.geteuid()}:
        raise RuntimeError(f"{folder} belongs to another user; name a folder of your own with GCNET_EXT_JIT_DIR")
    if folder.stat().st_mode & 0o077:
        raise RuntimeError(f"{folder} is open to other users; chmod 700 it, or name another folder with GCNET_EXT_JIT_DIR")
    return folder


def require_plain_paths(quoted: list[str], unquoted: list[str]) -> None:
    """ninja hands command lines to a shell, and no path may become a command. torch quotes all but those of libraries.

    Raises:
        BuildStop: a path has a character that would do something.
    """
    for path in (*quoted, *unquoted):
        _build.require_plain_path(path)
    for path in unquoted:
        if shlex.quote(path) != path:
            raise _build.BuildStop(f"the path {path!r} has spaces or characters special to a shell; move or rename it.")


def load() -> ModuleType:
    """Compiles what has changed, loads the operator libraries and imports the module. When nothing has, ninja does nothing."""
    if not _build.CSRC.is_dir():
        raise RuntimeError(f"GCNET_EXT_JIT=1 needs a checkout: there are no sources in {_build.CSRC}")
    import pybind11

    _build.find_tools()
    cuda = _build.decide_cuda()
    library_paths = [cpp_extension.TORCH_LIB_PATH, *([str(cpp_extension.CUDA_HOME)] if cuda.build else [])]
    require_plain_paths([str(_build.ROOT), pybind11.get_include()], library_paths)
    folder = private(_libraries.jit_folder())
    options: dict[str, Any] = {
        "extra_cflags": [shlex.quote(flag) for flag in _build.cxx_flags(cuda)],  # ninja hands them to a shell
        "verbose": os.environ.get("GCNET_EXT_JIT_VERBOSE", "0") == "1",
    }
    as_needed = "-Wl,--as-needed"  # torch names all of its libraries, that for Python among them, which these do without
    cpp_extension.load(
        name=_build.LIBRARY,
        sources=[str(_build.ROOT / source) for source in _build.sources()],
        extra_ldflags=[as_needed, *_build.LINK_FLAGS],
        build_directory=str(folder),
        is_python_module=False,
        **options,
    )
    if cuda.build:
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda.architectures
        cpp_extension.load(
            name=_build.CUDA_LIBRARY,
            sources=[str(_build.ROOT / source) for source in _build.cuda_sources()],
            extra_cuda_cflags=[shlex.quote(flag) for flag in _build.cuda_flags(cuda)],
            extra_ldflags=[as_needed, "-fopenmp"],
            build_directory=str(below(folder, _build.CUDA_LIBRARY)),
            is_python_module=False,
            with_cuda=True,
            **options,
        )
    return cpp_extension.load(
        name=_build.MODULE,
        sources=[str(_build.ROOT / source) for source in _build.python_sources()],
        extra_include_paths=[pybind11.get_include()],
        # Of the folder it is compiled in, so that nothing of the path is given to a shell. When it is imported, the library is
        # loaded already, and found by its soname.
        extra_ldflags=[as_needed, f"../{_build.LIBRARY}.so"],
        build_directory=str(below(folder, _build.MODULE)),
        **options,
    )


def below(folder: Path, name: str) -> Path:
    """A folder for the build file and the objects of one library: those of another one would be taken for its own."""
    (folder / name).mkdir(exist_ok=True)
    return folder / name
