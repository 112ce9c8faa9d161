"""Tries the gcnet_ext that is installed, with torch alone: that it is the wheel's, computes, loads no library twice, and has an
operator library that works without it.

python try_wheel.py    in an environment with the wheel, outside of the checkout; `make wheel` does that
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

import gcnet_ext
from gcnet_ext import _load

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
from libraries import require_works_alone


def require(holds: bool, what: str) -> None:
    print(f"{'ok' if holds else 'NOT SO'}: {what}", flush=True)
    if not holds:
        sys.exit(1)


def gradients(block: torch.nn.Module, x: torch.Tensor, valid: torch.Tensor) -> list[torch.Tensor]:
    out = block(x, x, valid)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *block.parameters()], allow_unused=True)]


def main() -> None:
    require(Path(gcnet_ext.__file__).is_relative_to(sys.prefix), f"the package is installed: {gcnet_ext.__file__}")
    require(_load.compiled is not None, f"its library is loaded: {_load.load_error}")
    built = _load.compiled.build_info()
    require(built["torch"] != torch.__version__.split("+")[0], f"built on torch {built['torch']}, runs on {torch.__version__}")
    if built["cuda"]:
        told = _load.cuda_error or "the CUDA kernels are loaded"
        same = torch.version.cuda is not None and torch.version.cuda.split(".")[0] == built["cuda"].split(".")[0]
        require((_load.cuda_error is None) == same, f"built with CUDA {built['cuda']}: {told}")
    torch.manual_seed(0)
    block, x = gcnet_ext.GlobalContextBlock(32, 1 / 4, fusion_types=("channel_mul", "channel_add")), torch.randn(2, 32, 9, 7)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    given = block, x.requires_grad_(), torch.rand(2, 9, 7) > 0.3
    ours = gradients(*given)
    with gcnet_ext.plain():
        plain = gradients(*given)
    close = all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(ours, plain, strict=True) if b is not None)
    require(close, f"forward and backward are those of plain PyTorch; {_load.compiled.cpu_capability()} kernels")
    maps = Path("/proc/self/maps")
    if maps.exists():
        libraries = set(re.findall(r"\S+/lib[gi]?omp\S*", maps.read_text()))
        require(len(libraries) == 1, f"one OpenMP library is loaded: {', '.join(sorted(libraries))}")
    told = subprocess.run([sys.executable, "-m", "gcnet_ext", "--library"], capture_output=True, text=True, check=False)
    require(told.returncode == 0, f"the operator library is {(told.stdout or told.stderr).strip()}")
    files = told.stdout.splitlines()
    require(
        len(files) == (2 if "cuda" in _load.kernel_devices else 1), "there is that of the CUDA kernels where they are loaded"
    )
    require(all(Path(file).is_relative_to(sys.prefix) for file in files), "it is installed")
    require_works_alone(*files)
    print("ok: it works in a process that knows nothing else of the package", flush=True)
    report = subprocess.run([sys.executable, "-m", "gcnet_ext"], capture_output=True, text=True, check=False)
    require(report.returncode == 0, "python -m gcnet_ext reports")
    print(report.stdout)


if __name__ == "__main__":
    main()
