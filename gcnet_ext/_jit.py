"""GCNET_EXT_JIT=1: compile the sources of the checkout in place and use them. For work on the kernels."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

from torch.utils import cpp_extension

from . import _build


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
    """Compiles what has changed and imports the module; when nothing has, ninja finds nothing to do."""
    if not _build.CSRC.is_dir():
        raise RuntimeError(f"GCNET_EXT_JIT=1 needs a checkout: there are no sources in {_build.CSRC}")
    import pybind11

    _build.find_tools()
    cuda = _build.decide_cuda()
    library_paths = [cpp_extension.TORCH_LIB_PATH, *([str(cpp_extension.CUDA_HOME)] if cuda.build else [])]
    require_plain_paths([str(_build.ROOT), pybind11.get_include()], library_paths)
    build_directory = private(Path(os.environ.get("GCNET_EXT_JIT_DIR", _build.ROOT / "build" / "jit")))
    options: dict[str, Any] = {
        "extra_cflags": [shlex.quote(flag) for flag in _build.cxx_flags(cuda)],  # ninja hands them to a shell
        "extra_ldflags": list(_build.LINK_FLAGS),
        "verbose": os.environ.get("GCNET_EXT_JIT_VERBOSE", "0") == "1",
    }
    module = cpp_extension.load(
        name="_C",
        sources=[str(_build.ROOT / source) for source in _build.sources()],
        extra_include_paths=[pybind11.get_include()],
        build_directory=str(build_directory),
        **options,
    )
    if cuda.build:
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda.architectures
        # Compiled and linked beside _C, and loaded from there by _load.py as an installed one is.
        (build_directory / "cuda").mkdir(exist_ok=True)
        cpp_extension.load(
            name="_C_cuda",
            sources=[str(_build.ROOT / source) for source in _build.cuda_sources()],
            extra_cuda_cflags=[shlex.quote(flag) for flag in _build.cuda_flags(cuda)],
            build_directory=str(build_directory / "cuda"),
            is_python_module=False,
            with_cuda=True,
            **options,
        )
    return module
