"""What was built and what this machine can use of it, in words: what ``python -m gcnet_ext`` prints."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import _build, _load
from ._torch import has_kernel_for_key
from ._version import __version__
from .ops import _dispatch, _switch

CAPABILITY_VARIABLE = "GCNET_EXT_CPU_CAPABILITY"
_INDENT = 14


Rows = dict[str, Callable[[], str]]


def describe() -> str:
    """The report: one row per fact, and for everything that is not used the reason. Never raises."""
    built, machine = ({name: _told(row) for name, row in rows.items()} for rows in (_built(), _machine()))
    return "\n".join([f"gcnet_ext {__version__}", "", *_section("Built", built), "", *_section("This machine", machine)])


def facts() -> dict[str, Any]:
    """What an issue report needs, for json.dumps: the rows of `describe`, and what else tells one machine from another. Never
    raises."""
    return {
        "gcnet_ext": __version__,
        "built": {name: _told(row) for name, row in _built().items()},
        "machine": {name: _told(row) for name, row in _machine().items()},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("GCNET_EXT_")},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _told(_processor),
        "GPUs": _gpus(),
    }


def _built() -> Rows:
    built: Rows = {"version": _version, "torch": _torch, "library": _library_path}
    if _load.compiled is not None:
        built |= {
            "compiler": lambda: str(_build_info()["compiler"]),
            "OpenMP": _openmp,
            "optimised": lambda: "no: a debug build (GCNET_EXT_DEBUG=1)" if _build_info()["debug"] else "yes",
            "CPU code": lambda: ", ".join(_build_info()["capabilities"]),
            "operators": _operators,
        }
    return built


def _machine() -> Rows:
    everywhere: Rows = {} if _switch.choice.get() is None else {"switch": _switched}
    return everywhere | {
        "CPU": _cpu,
        "threads": _threads,
        "CUDA": _cuda,
        "elsewhere": lambda: "plain PyTorch on every other device",
    }


def _told(row: Callable[[], str]) -> str:
    try:
        return row()
    except Exception as error:  # a report on a broken installation must not break on it
        return f"unknown ({type(error).__name__}: {error})"


def _section(title: str, rows: dict[str, str]) -> list[str]:
    lines = [title]
    for name, text in rows.items():
        first, *others = text.splitlines() or [""]
        lines += [f"  {name:<{_INDENT - 2}}{first}", *(" " * _INDENT + line for line in others)]
    return lines


def _compiled() -> ModuleType:
    if _load.compiled is None:
        raise RuntimeError("there is no compiled library")
    return _load.compiled


def _build_info() -> dict:
    return _compiled().build_info()


# ---- what was built ----------------------------------------------------------------------------------------------------------


def _version() -> str:
    if _load.compiled is None:
        return __version__
    library = _build_info()["version"]
    if library == __version__:
        return __version__
    return f"{__version__}, but the compiled kernels are of version {library}; {_load.HOW_TO_BUILD}"


def _torch() -> str:
    if _load.compiled is None:
        return f"running {torch.__version__}"
    info = _build_info()
    return f"built with {info['torch']} for the stable ABI of {info['abi_target']} and later, running {torch.__version__}"


def _library_path() -> str:
    return _load.why_no_kernels("cpu") if _load.compiled is None else str(_load.library)


def _openmp() -> str:
    openmp = _build_info()["openmp"]
    return str(openmp) if openmp else "no: the compiler built the kernels without it, they run on one thread"


def _operators() -> str:
    """The operators that have a kernel of their own, a line per device, and those that have none."""
    names = sorted(_dispatch.kernels)
    keys = [key for key in ("CPU", "CUDA") if key.lower() in _load.kernel_devices]
    found = {key: [name for name in names if has_kernel_for_key(f"gcnet_ext::{name}", key)] for key in keys}
    found["no kernel"] = [name for name in names if not any(name in with_kernel for with_kernel in found.values())]
    return "\n".join(f"{key}: {', '.join(listed)}" for key, listed in found.items() if listed) or "none"


# ---- what this machine can use -----------------------------------------------------------------------------------------------


def _switched() -> str:
    if _switch.choice.get():
        return "plain PyTorch everywhere: GCNET_EXT_PLAIN=1, or gcnet_ext.plain()"
    return "compiled kernels, in TorchScript and ONNX, too: gcnet_ext.plain(False)"


def _processor() -> str:
    """The name of the processor, which Linux tells in a file."""
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [_told(partial(torch.cuda.get_device_name, index)) for index in range(torch.cuda.device_count())]


def _cpu() -> str:
    return f"compiled kernels, {_capability()}" if "cpu" in _load.kernel_devices else f"plain PyTorch: {_why_not('cpu')}"


def _capability() -> str:
    """The variant of the CPU kernels that is used, and why it is not the best one that was built."""
    try:
        picked = _compiled().cpu_capability()
    except RuntimeError as error:
        return f"but every call will fail: {error}"
    if os.environ.get(CAPABILITY_VARIABLE):
        return f"{picked}, forced by {CAPABILITY_VARIABLE}"
    built = _build_info()["capabilities"]  # the best is first
    better = list(reversed(built[: built.index(picked)]))
    return f"{picked}; not {' or '.join(better)}, which this CPU does not support" if better else picked


def _threads() -> str:
    return f"{torch.get_num_threads()}, set by torch.set_num_threads or OMP_NUM_THREADS"


def _cuda() -> str:
    reasons = []
    if torch.version.cuda is None:
        reasons.append(f"torch {torch.__version__} is built without CUDA")
    elif not torch.cuda.is_available():
        reasons.append(f"torch is built with CUDA {torch.version.cuda} but finds no GPU it can use")
    if "cuda" not in _load.kernel_devices:
        reasons.append(_why_not("cuda"))
    if reasons:
        return "not used: " + "\nand: ".join(reasons)
    built_for = _build_info()["cuda_architectures"]
    lines = [f"compiled kernels for {built_for}, CUDA {torch.version.cuda}"]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        lines.append(f"{torch.cuda.get_device_name(index)} ({major}.{minor})")
        if not _build.covers(built_for, 10 * major + minor):
            lines[-1] += f": every call will fail; build again with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    return "\n".join(lines)


def _why_not(device: str) -> str:
    return "no compiled library, see above" if _load.compiled is None else _load.why_no_kernels(device)
