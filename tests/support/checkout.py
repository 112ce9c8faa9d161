"""Where the checkout is, and how tests compile it."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def quick_compiler(folder: Path, level: str = "-O0") -> str:
    """A compiler for CXX that does not optimise: how fast the kernels are makes no difference where a build is tested."""
    path = folder / "quick-c++"
    path.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX") or "c++"} "$@" {level}\n')
    path.chmod(0o755)
    return str(path)
