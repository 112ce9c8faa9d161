"""GCNET_EXT_JIT=1: compile the sources of the checkout in place and use them. For work on the kernels."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

from torch.utils import cpp_extension

from . import _build


def load() -> ModuleType:
    """Compiles what has changed and imports the module; when nothing has, ninja finds nothing to do."""
    if not _build.CSRC.is_dir():
        raise RuntimeError(f"GCNET_EXT_JIT=1 needs a checkout: there are no sources in {_build.CSRC}")
    import pybind11

    _build.find_tools()
    build_directory = Path(os.environ.get("GCNET_EXT_JIT_DIR", _build.ROOT / "build" / "jit"))
    build_directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    return cpp_extension.load(
        name="_C",
        sources=[str(_build.ROOT / source) for source in _build.sources()],
        extra_include_paths=[pybind11.get_include()],
        extra_cflags=_build.cxx_flags(),
        extra_ldflags=list(_build.LINK_FLAGS),
        build_directory=str(build_directory),
        verbose=os.environ.get("GCNET_EXT_JIT_VERBOSE", "0") == "1",
    )
