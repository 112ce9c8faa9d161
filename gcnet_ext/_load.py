"""Loads the compiled libraries, and says why one is missing.

A failed load is kept, not swallowed: `load_error` holds it, `python -m gcnet_ext` prints it, and the first call that has to do
without kernels warns with it.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from pathlib import Path
from types import ModuleType

import torch

from . import _build, _tuning

HOW_TO_BUILD = "build them with `pip install --no-build-isolation .` in a checkout (see Install in README.md)"


def _load() -> tuple[ModuleType | None, Exception | None]:
    try:
        if os.environ.get("GCNET_EXT_JIT", "0") == "1":
            from . import _jit

            return _jit.load(), None
        return importlib.import_module("gcnet_ext._C"), None
    except Exception as error:
        return None, error


compiled, load_error = _load()
"""The module ``gcnet_ext._C`` and None, or None and the error that loading it raised."""


def _load_cuda() -> str | None:
    """Loads the CUDA implementations beside the compiled module; returns why not, or None when they are there."""
    if compiled is None:
        return None
    built = compiled.build_info()
    if not built["cuda"]:
        return f"this build has no CUDA kernels: {built['without_cuda']}, and {HOW_TO_BUILD}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    if built["cuda"].split(".")[0] != torch.version.cuda.split(".")[0]:
        return (
            f"the CUDA kernels are built with CUDA {built['cuda']} and torch {torch.__version__} with CUDA "
            f"{torch.version.cuda}: the major versions must agree; {HOW_TO_BUILD}, which uses the installed torch"
        )
    try:
        (library,) = Path(str(compiled.__file__)).parent.glob("**/_C_cuda*.so")
        torch.ops.load_library(str(library))
        _tuning.library = ctypes.CDLL(str(library))
    except Exception as error:
        return (
            f"the CUDA kernels, built with CUDA {built['cuda']} for torch {built['torch']}, could not be loaded into "
            f"torch {torch.__version__} with CUDA {torch.version.cuda} ({type(error).__name__}: {error}); {HOW_TO_BUILD}"
        )
    return None


cuda_error = _load_cuda()
"""Why there are no CUDA kernels, or None."""


def _devices_of(compiled: ModuleType | None, cuda_error: str | None) -> frozenset[str]:
    if compiled is None:
        return frozenset()
    return frozenset({"cpu", "meta"} if cuda_error is not None else {"cpu", "cuda", "meta"})


kernel_devices = _devices_of(compiled, cuda_error)
"""The types of the devices that have compiled kernels; "meta" stands for their shapes."""


def why_no_kernels(device: str) -> str:
    """One sentence: why tensors on this device do without compiled kernels, and what to do about it."""
    if load_error is not None:
        why = f"the compiled kernels could not be loaded ({type(load_error).__name__}: {load_error}); {HOW_TO_BUILD}"
        if isinstance(load_error, ModuleNotFoundError) and _build.CSRC.is_dir():
            why += f". If you have installed gcnet_ext, run in another folder: here Python imports the checkout {_build.ROOT}"
        return why
    if device == "cuda" and cuda_error is not None:
        return cuda_error
    return f"there are no kernels for {device}"
