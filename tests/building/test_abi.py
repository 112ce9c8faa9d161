"""What the compiled libraries use and offer: of torch nothing but its stable ABI, and Python only in the module."""

import re
import shutil
from pathlib import Path

import pytest
from checkout import ROOT
from libraries import needed, require_no_python, symbols

from gcnet_ext import _build, _libraries, _load

# C functions, which torch's stable ABI consists of (aoti_torch_*, torch_*), and C++'s own library.
STABLE = re.compile(r"^(?!THP)(\w+|std::.*|operator .*|(typeinfo|vtable|VTT) for (std|__cxxabiv1)::.*)$")
pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("nm", "readelf", "ldd"))), reason="one of nm, readelf and ldd is not on the PATH"
)


@pytest.fixture(scope="module")
def operators() -> list[Path]:
    """The operator library, and that of the CUDA kernels where there is one."""
    if _load.library is None:
        pytest.skip(f"no compiled library: {_load.load_error}")
    with_cuda = _load.compiled is not None and _load.compiled.build_info()["cuda"]
    return [_load.library, *([_libraries.find(_build.CUDA_LIBRARY)] if with_cuda else [])]


@pytest.fixture(scope="module")
def module() -> Path:
    if _load.compiled is None:
        pytest.skip(f"no compiled module: {_load.load_error}")
    return Path(_load.compiled.__file__)


def test_only_stable_symbols(operators, module):
    for library in (*operators, module):
        assert [symbol for symbol in symbols(library, "undefined") if not STABLE.match(symbol)] == [], library.name
    for library in operators:
        uses_torch = any(symbol.startswith("aoti_torch_") for symbol in symbols(library, "undefined"))
        assert uses_torch, f"{library.name} does not use torch at all?"


def test_the_operator_libraries_know_nothing_of_python(operators):
    for library in operators:
        require_no_python(library)
        assert [name for name in needed(library) if re.search("python", name)] == []


def test_the_cpu_library_needs_no_cuda(operators):
    assert [name for name in needed(operators[0]) if re.search("cuda|cudart", name)] == []


def test_the_module_has_no_kernel(module):
    """A kernel could neither register itself nor read a tensor without torch, of which the module uses nothing."""
    libraries = needed(module)
    assert "libgcnet_ext.so" in libraries
    assert [name for name in libraries if re.search("torch|c10|cuda|gomp|omp", name)] == []
    asked = symbols(module, "undefined")
    assert "PyModule_Create2" in asked or any(name.startswith("PyModuleDef") for name in asked), "it is one of Python"
    assert [name for name in asked if re.match("aoti_|torch|GOMP_|omp_|at::|c10::", name)] == []


def test_the_library_exports_what_its_header_says_and_the_module_asks_for_it(operators, module):
    if not (ROOT / "csrc").is_dir():
        pytest.skip("there are no sources")
    declared = set(re.findall(r"\b(gcnet_ext_\w+)\(", (ROOT / "csrc" / "exports.h").read_text()))
    assert len(declared) > 5
    assert {name for name in symbols(operators[0], "defined") if re.fullmatch(r"[A-Za-z]\w*", name)} == declared
    assert {name for name in symbols(module, "undefined") if name.startswith("gcnet_ext")} == declared
