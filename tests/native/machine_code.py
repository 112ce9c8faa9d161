"""What is inside the compiled CUDA library, by cuobjdump: architectures, registers, stack frames and instructions.

    python tests/native/machine_code.py LIBRARY            prints registers and stack frames
    python tests/native/machine_code.py LIBRARY --record   writes them to tests/native/register_budget.json

The budget is what test_cuda_machine_code.py holds later builds to. Record it from a build for all architectures (make
test-cuda-build), with the compiler that CI uses; another compiler allocates registers in another way.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

BUDGET = Path(__file__).resolve().parent / "register_budget.json"


class Resources(NamedTuple):
    """Of one kernel on one architecture."""

    registers: int
    stack: int


def find_cuobjdump() -> str | None:
    """The tool of the CUDA toolkit, or the one that triton ships (and torch with CUDA depends on triton)."""
    if path := shutil.which("cuobjdump"):
        return path
    spec = importlib.util.find_spec("triton")
    for folder in spec.submodule_search_locations if spec and spec.submodule_search_locations else ():
        path = Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump"
        if path.exists():
            return str(path)
    return None


@functools.cache
def dump(library: Path, *options: str) -> str:
    tool = find_cuobjdump()
    if tool is None:
        raise RuntimeError("there is no cuobjdump: it is in the CUDA toolkit and in the triton wheel")
    return subprocess.run([tool, *options, str(library)], capture_output=True, text=True, check=True).stdout


def demangle(text: str) -> str:
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def short(name: str) -> str:
    """attention_pool_rows<Half, RowShape<8, 4, 16, 512>>, without namespaces, result and parameters."""
    name = re.sub(r"gcnet_ext::cuda::|c10::|^void ", "", name.strip())
    return name.partition("(")[0].replace("> >", ">>")


def architectures(library: Path) -> set[str]:
    """The architectures that there is machine code for."""
    return set(re.findall(r"\.(sm_\d+\w?)\.cubin", dump(library, "-lelf")))


def ptx(library: Path) -> set[str]:
    """The architectures that there is PTX for; the driver compiles it on newer GPUs."""
    return set(re.findall(r"\.(sm_\d+\w?)\.ptx", dump(library, "-lptx")))


def resources(library: Path) -> dict[str, dict[str, Resources]]:
    """Of every kernel, by architecture."""
    found: dict[str, dict[str, Resources]] = defaultdict(dict)
    architecture = kernel = ""
    for line in demangle(dump(library, "-res-usage")).splitlines():
        if line.startswith("arch = "):
            architecture = line.removeprefix("arch = ").strip()
        elif match := re.match(r"\s*Function (.*):$", line):
            kernel = short(match.group(1))
        elif match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            found[kernel][architecture] = Resources(int(match.group(1)), int(match.group(2)))
    return dict(found)


def instructions(library: Path, architecture: str) -> dict[str, Counter[str]]:
    """How often every instruction, with its modifiers, stands in each kernel."""
    parts = re.split(r"^\s*Function : (.*)$", dump(library, "-sass", "-arch", architecture), flags=re.MULTILINE)[1:]
    names = map(short, demangle("\n".join(parts[::2])).splitlines())
    instruction = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
    return {name: Counter(instruction.findall(body)) for name, body in zip(names, parts[1::2], strict=True)}


def compiler() -> str:
    """The version of nvcc on this machine, such as 13.0; empty without one."""
    path = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(path).exists():
        return ""
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return match.group(1) if match else ""


def record(library: Path) -> None:
    """Writes the budget: registers and stack of every kernel on every architecture."""
    kernels = {name: {arch: list(used) for arch, used in sorted(of.items())} for name, of in sorted(resources(library).items())}
    lines = ",\n".join(f'  "{name}": {json.dumps(of)}' for name, of in kernels.items())
    BUDGET.write_text(f'{{\n "nvcc": "{compiler()}",\n "kernels": {{\n{lines}\n }}\n}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path, help="gcnet_ext/libgcnet_ext_cuda.so")
    parser.add_argument("--record", action="store_true", help=f"write {BUDGET.name}")
    arguments = parser.parse_args()
    if arguments.record:
        record(arguments.library)
        return
    for name, of in sorted(resources(arguments.library).items()):
        text = "  ".join(
            f"{arch} {used.registers}" + (f"+{used.stack}" if used.stack else "") for arch, used in sorted(of.items())
        )
        print(f"{name:75} {text}")


if __name__ == "__main__":
    main()
