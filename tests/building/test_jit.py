"""GCNET_EXT_JIT=1 compiles the sources of the checkout, and they are found there; a second import finds nothing to do."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from checkout import ROOT, quick_compiler
from libraries import require_found
from torch.utils import cpp_extension

from gcnet_ext import _build, _jit, _libraries

SCRIPT = """
import torch, gcnet_ext
from gcnet_ext import _load
import reference
assert _load.load_error is None, _load.load_error
x = torch.randn(2, 6, 4, 5)
assert torch.allclose(gcnet_ext.attention_pool(x, x[0, :, 0, 0]), reference.attention_pool(x, x[0, :, 0, 0]), atol=1e-5)
print(_load.library, _load.compiled.__file__)
"""


@pytest.mark.slow
def test_second_import_compiles_nothing(python, tmp_path):
    """The compiled module is the one in the folder that was asked for, and no object file changes afterwards."""
    if shutil.which("ninja") is None and not os.access(os.path.join(os.path.dirname(os.sys.executable), "ninja"), os.X_OK):
        pytest.skip("ninja is not installed")
    environment = {
        "GCNET_EXT_JIT": "1",
        "GCNET_EXT_JIT_DIR": str(tmp_path),
        "CXX": quick_compiler(tmp_path),
        "TORCH_CUDA_ARCH_LIST": "9.0",  # for a CUDA build of torch: one is enough here
        "PATH": os.pathsep.join([os.path.dirname(os.sys.executable), os.environ["PATH"]]),
    }

    def built() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.suffix in (".o", ".so")}

    first = python(SCRIPT, **environment).stdout.strip()
    compiled = built()
    library, module = first.split()
    assert library == str(tmp_path / "libgcnet_ext.so")
    assert module.startswith(str(tmp_path))
    assert len(compiled) > len(list((ROOT / "csrc" / "cpu").glob("*.cpp")))
    assert python(SCRIPT, **environment).stdout.strip() == first
    require_found(tmp_path / "libgcnet_ext.so", ROOT, {**os.environ, **environment})
    assert built() == compiled


def test_the_library_of_the_cuda_kernels_is_found_where_it_is_compiled(monkeypatch, tmp_path):
    """Without a compiler for it. Each library has a folder of its own, and comes before the module that is linked with one."""
    compiled = {}

    def load(*, name: str, build_directory: str, is_python_module: bool = True, extra_ldflags: list[str], **_: object) -> None:
        folder = Path(build_directory)
        folder.joinpath(f"{name}.so").touch()
        assert folder not in compiled.values()
        assert extra_ldflags[0] == "-Wl,--as-needed", "torch would link it with libtorch_python"
        assert all((folder / flag).is_file() for flag in extra_ldflags if flag.endswith(f"/{_build.LIBRARY}.so"))
        assert is_python_module == (name == _build.MODULE)
        compiled[name] = folder

    monkeypatch.setattr(cpp_extension, "load", load)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/cuda")
    monkeypatch.setattr(_build, "decide_cuda", lambda: _build.CudaDecision(True, "", "9.0", "13.0"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    monkeypatch.setenv("GCNET_EXT_JIT", "1")
    monkeypatch.setenv("GCNET_EXT_JIT_DIR", str(tmp_path / "jit"))
    monkeypatch.setenv("PATH", os.environ["PATH"])
    _jit.load()
    assert list(compiled) == [_build.LIBRARY, _build.CUDA_LIBRARY, _build.MODULE]
    for name in (_build.LIBRARY, _build.CUDA_LIBRARY):
        assert _libraries.find(name) == compiled[name] / f"{name}.so"


def test_without_a_checkout(python, tmp_path):
    """An installed package has no sources: the load error says so, and the package works."""
    shutil.copytree(ROOT / "gcnet_ext", tmp_path / "gcnet_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    script = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import gcnet_ext
from gcnet_ext import _load
assert _load.__file__.startswith({str(tmp_path)!r})
print(_load.why_no_kernels("cpu"))
"""
    told = python(script, GCNET_EXT_JIT="1").stdout
    assert "GCNET_EXT_JIT=1 needs a checkout" in told
    assert str(tmp_path / "csrc") in told
