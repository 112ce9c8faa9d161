"""The compiled libraries use nothing of torch but its stable ABI."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gcnet_ext import _load

# C functions, which torch's stable ABI consists of (aoti_torch_*, torch_*), and C++'s own library.
STABLE = re.compile(r"^(?!THP)(\w+|std::.*|operator .*|(typeinfo|vtable|VTT) for (std|__cxxabiv1)::.*)$")


def libraries() -> list[Path]:
    if _load.compiled is None:
        pytest.skip(f"no compiled library: {_load.load_error}")
    return sorted(Path(_load.compiled.__file__).parent.glob("**/_C*.so"))


def undefined_symbols(library: Path) -> list[str]:
    command = ["nm", "--dynamic", "--undefined-only", "--demangle", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"@.*$", "", line.split(maxsplit=1)[1]) for line in lines]


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not on the PATH")
def test_only_stable_symbols():
    for library in libraries():
        symbols = undefined_symbols(library)
        assert any(symbol.startswith("aoti_torch_") for symbol in symbols), f"{library.name} does not use torch at all?"
        assert [symbol for symbol in symbols if not STABLE.match(symbol)] == [], library.name


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not on the PATH")
def test_the_cpu_library_needs_no_cuda_and_the_other_no_python():
    for library in libraries():
        dynamic = subprocess.run(["readelf", "--dynamic", str(library)], capture_output=True, text=True, check=True).stdout
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
        forbidden = "libtorch_python|libpython" if library.name.startswith("_C_cuda") else "libtorch_python|cuda|cudart"
        assert [name for name in needed if re.search(forbidden, name)] == [], needed
