"""Where the operator libraries are: ``libgcnet_ext.so``, and beside it ``libgcnet_ext_cuda.so`` where there are CUDA kernels.

They know nothing of Python: ``torch.ops.load_library`` loads them, and so does a C++ program. In a wheel, an editable install
and the Python package that CMake puts together they are in the folder of the package; with GCNET_EXT_JIT=1 they are where that
compiles them.
"""

from __future__ import annotations

import os
from pathlib import Path

from . import _build


def by_jit() -> bool:
    """GCNET_EXT_JIT=1: the libraries are those that _jit.py compiles."""
    return os.environ.get("GCNET_EXT_JIT", "0") == "1"


def jit_folder() -> Path:
    """The folder in which _jit.py compiles them."""
    return Path(os.environ.get("GCNET_EXT_JIT_DIR", _build.ROOT / "build" / "jit")).absolute()


def folder() -> Path:
    """The folder in which the libraries are looked for."""
    return jit_folder() if by_jit() else Path(__file__).parent


def find(name: str = _build.LIBRARY) -> Path:
    """The file of the operator library, or with ``_build.CUDA_LIBRARY`` that of the CUDA kernels.

    Raises:
        FileNotFoundError: there is none.
    """
    # _jit.py compiles each library in a folder of its own, and all of them are below that of the first.
    for place in (folder(), folder() / name):
        if (path := place / f"{name}.so").is_file():
            return path
    raise FileNotFoundError(f"there is no {name}.so in {folder()}")
