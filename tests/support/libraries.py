"""The compiled libraries as files: what they need, what they offer, and that the operator library does without Python."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ALONE = """
import sys, torch
for library in sys.argv[1:]:
    torch.ops.load_library(library)
x, scale = torch.randn(2, 6, 4, 5), torch.rand(2, 6)
out, _ = torch.ops.gcnet_ext.channel_fuse(x, scale, None, None, 0)
assert torch.allclose(out, x * scale[:, :, None, None])
context, _ = torch.ops.gcnet_ext.attention_pool(x, None, None, None)
assert torch.allclose(context, x.mean((2, 3)), atol=1e-6)
assert not [name for name in sys.modules if name.startswith("gcnet_ext")]
"""


def needed(library: Path) -> list[str]:
    """The libraries that the loader looks for when it loads this one."""
    dynamic = subprocess.run(["readelf", "--dynamic", str(library)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)


def symbols(library: Path, kind: str) -> list[str]:
    """The dynamic symbols, demangled and without versions; kind: "undefined" or "defined"."""
    command = ["nm", "--dynamic", f"--{kind}-only", "--demangle", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"^[0-9a-f]* *\w |@.*$", "", line.strip()) for line in lines]


def require_no_python(library: Path) -> None:
    """Neither the library nor what it needs, in turn, is for Python."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(Path(torch.__path__[0]) / "lib")}
    loaded = subprocess.run(["ldd", str(library)], env=environment, capture_output=True, text=True, check=True).stdout
    assert re.search(r"libtorch_cpu\.so => /", loaded), loaded
    assert "python" not in re.sub(r"=> .*", "", loaded), loaded
    both = [*symbols(library, "undefined"), *symbols(library, "defined")]
    assert [name for name in both if re.match("_?Py|THP", name)] == []


def require_works_alone(*libraries: str | Path, python: str | Path = sys.executable) -> None:
    """A process that loads them, and knows of nothing else of this package, has the operators."""
    done = subprocess.run([str(python), "-c", ALONE, *map(str, libraries)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def require_found(expected: Path, cwd: Path, environment: dict[str, str], python: str | Path = sys.executable) -> None:
    """The package that this python imports there finds that operator library, which works alone."""
    command = [str(python), "-m", "gcnet_ext", "--library"]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = Path(done.stdout.splitlines()[0])
    assert found.is_absolute()
    assert found.samefile(expected), (found, expected)
    assert found.name == "libgcnet_ext.so"
    require_no_python(found)
    require_works_alone(found, python=python)
