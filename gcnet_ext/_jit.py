"""GCNET_EXT_JIT=1: compile the sources of the checkout in place and use them. For work on the kernels."""

from __future__ import annotations

import os
import shlex
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
    cuda = _build.decide_cuda()
    build_directory = Path(os.environ.get("GCNET_EXT_JIT_DIR", _build.ROOT / "build" / "jit"))
    build_directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    options = {
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
        # Compiled and linked beside _C, and loaded from there by _library.py as an installed one is.
        (build_directory / "cuda").mkdir(exist_ok=True)
        cpp_extension.load(
            name="_C_cuda",
            sources=[str(_build.ROOT / source) for source in _build.cuda_sources()],
            extra_cuda_cflags=list(_build.CUDA_FLAGS),
            build_directory=str(build_directory / "cuda"),
            is_python_module=False,
            with_cuda=True,
            **options,
        )
    return module
