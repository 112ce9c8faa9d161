"""Loads the operator libraries and the module that asks them, and says why one is missing.

A failed load is kept, not swallowed: `load_error` holds it, `python -m gcnet_ext` prints it, and the first call that has to do
without kernels warns with it.
"""

from __future__ import annotations

import ctypes
import importlib
from pathlib import Path
from types import ModuleType

import torch

from . import _build, _libraries, _tuning

HOW_TO_BUILD = "build them with `pip install --no-build-isolation .` in a checkout (see Install in README.md)"


def _load() -> tuple[Path | None, ModuleType | None, Exception | None]:
    loaded = None
    try:
        if _libraries.by_jit():
            from . import _jit

            module = _jit.load()
            return _libraries.find(), module, None
        found = _libraries.find()
        torch.ops.load_library(str(found))
        loaded = found
        return loaded, importlib.import_module("gcnet_ext._C"), None
    except Exception as error:
        return loaded, None, error


library, compiled, load_error = _load()
"""The operator library, and the module ``gcnet_ext._C`` that asks it; in the place of one that is not loaded there is None, and
the error says why."""


def _load_cuda() -> str | None:
    """Loads the CUDA implementations beside the operator library; returns why not, or None when they are there."""
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
        cuda_library = str(_libraries.find(_build.CUDA_LIBRARY))
        torch.ops.load_library(cuda_library)
        _tuning.library = ctypes.CDLL(cuda_library)
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
        if isinstance(load_error, (FileNotFoundError, ModuleNotFoundError)) and _build.CSRC.is_dir():
            why += f". If you have installed gcnet_ext, run in another folder: here Python imports the checkout {_build.ROOT}"
        return why
    if device == "cuda" and cuda_error is not None:
        return cuda_error
    return f"there are no kernels for {device}"
