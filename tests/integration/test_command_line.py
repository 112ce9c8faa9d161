"""``python -m gcnet_ext`` says what is true, with and without the compiled library."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from registry import OPERATORS

import gcnet_ext
from gcnet_ext import __main__ as command_line
from gcnet_ext import _info, _load

needs_library = pytest.mark.skipif(_load.compiled is None, reason="there is no compiled library")

WITHOUT_LIBRARY = """
import runpy, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "gcnet_ext._C":
            raise ImportError("undefined symbol: of_another_torch")
sys.meta_path.insert(0, Blocker())
runpy.run_module("gcnet_ext", run_name="__main__")
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs python in a process of its own that finds the package that is tested here."""
    search = [str(Path(gcnet_ext.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    inherited = {
        name: value for name, value in os.environ.items() if name not in (_info.CAPABILITY_VARIABLE, "OMP_NUM_THREADS")
    }
    return subprocess.run(
        [sys.executable, *arguments],
        env=inherited | {"PYTHONPATH": os.pathsep.join(filter(None, search))} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def report(*arguments: str, **environment: str) -> dict[str, str]:
    """The rows of the report of a process that must succeed."""
    done = run(*(arguments or ("-m", "gcnet_ext")), **environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return rows(done.stdout)


def rows(text: str) -> dict[str, str]:
    """Name and text of each row of a report; a row that goes on for several lines keeps its line breaks."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if row := re.match(r"  (\S.{11})(.*)", line):
            name = row[1].strip()
            found[name] = row[2]
        elif line.startswith(" " * 14):
            found[name] += "\n" + line.strip()
    return found


def library(monkeypatch: pytest.MonkeyPatch, capability: str = "avx2", **info: object) -> None:
    """Puts a library in place that says these things of itself."""
    told = {
        "version": gcnet_ext.__version__, "compiler": "GCC 13.3.0", "torch": "2.11.0", "abi_target": "2.11",
        "openmp": "201511", "capabilities": ["avx512", "avx2", "default"], "debug": False,
    }  # fmt: skip
    fake = SimpleNamespace(build_info=lambda: told | info, cpu_capability=lambda: capability)
    monkeypatch.setattr(_load, "compiled", fake)
    monkeypatch.setattr(_load, "library", Path("somewhere/libgcnet_ext.so"))
    monkeypatch.setattr(_load, "load_error", None)
    monkeypatch.setattr(_load, "kernel_devices", frozenset({"cpu", "meta"}))
    monkeypatch.delenv(_info.CAPABILITY_VARIABLE, raising=False)


# ---- the report --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told() -> dict[str, str]:
    """The report of this machine on one thread."""
    return report(OMP_NUM_THREADS="1")


def test_report_says_what_is_true(told):
    assert told["version"] == gcnet_ext.__version__
    assert told["torch"].endswith(f"running {torch.__version__}")
    assert told["threads"].startswith("1, ")
    if _load.compiled is None:
        assert told["library"] == _load.why_no_kernels("cpu")
        assert told["CPU"] == "plain PyTorch: no compiled library, see above"
        return
    info = _load.compiled.build_info()
    assert told["torch"].startswith(f"built with {info['torch']} for the stable ABI of {info['abi_target']} and later")
    assert Path(told["library"]).samefile(_load.library)
    assert told["compiler"] == info["compiler"]
    assert told["OpenMP"] == info["openmp"]
    assert told["optimised"].startswith("no" if info["debug"] else "yes")
    assert set(told["CPU code"].split(", ")) == set(info["capabilities"])
    cpu = next(line for line in told["operators"].splitlines() if line.startswith("CPU: "))
    assert set(cpu.removeprefix("CPU: ").split(", ")) == set(OPERATORS)
    assert "no kernel" not in told["operators"]


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built with CUDA")
def test_report_says_why_cuda_is_not_used(told):
    lines = told["CUDA"].splitlines()
    assert lines[0] == f"not used: torch {torch.__version__} is built without CUDA"
    assert lines[1] == f"and: {_info._why_not('cuda')}"


@needs_library
@pytest.mark.parametrize("name", ["default", "avx2", "avx512", "avx512_bf16"])
def test_report_says_which_kernels_are_forced(name):
    told = report(**{_info.CAPABILITY_VARIABLE: name})["CPU"]
    if name in _load.compiled.usable_capabilities():
        assert told == f"compiled kernels, {name}, forced by {_info.CAPABILITY_VARIABLE}"
    else:
        assert told.startswith("compiled kernels, but every call will fail: ")


def test_report_says_why_the_library_is_not_loaded():
    told = report("-c", WITHOUT_LIBRARY, GCNET_EXT_JIT="0")
    assert told["library"].startswith(
        "the compiled kernels could not be loaded (ImportError: undefined symbol: of_another_torch)"
    )
    assert _load.HOW_TO_BUILD in told["library"]
    assert told["CPU"] == "plain PyTorch: no compiled library, see above"
    assert "compiler" not in told
    assert "operators" not in told


def test_report_says_why_compiling_in_place_failed(tmp_path):
    pytest.importorskip("pybind11")
    (tmp_path / "file").touch()
    told = report(GCNET_EXT_JIT="1", GCNET_EXT_JIT_DIR=str(tmp_path / "file" / "build"))
    assert told["library"].startswith("the compiled kernels could not be loaded (")
    assert str(tmp_path) in told["library"] or "there are no sources" in told["library"]
    assert told["CPU"].startswith("plain PyTorch")


def test_report_of_a_sound_library(monkeypatch):
    library(monkeypatch)
    told = rows(_info.describe())
    assert told["torch"] == f"built with 2.11.0 for the stable ABI of 2.11 and later, running {torch.__version__}"
    assert told["library"] == "somewhere/libgcnet_ext.so"
    assert told["CPU"] == "compiled kernels, avx2; not avx512, which this CPU does not support"
    assert told["CUDA"].endswith(_load.why_no_kernels("cuda"))


def test_report_of_an_unsound_library(monkeypatch):
    library(monkeypatch, version="0.0.1", openmp="", debug=True)
    told = rows(_info.describe())
    assert told["version"].startswith(f"{gcnet_ext.__version__}, but the compiled kernels are of version 0.0.1")
    assert told["OpenMP"].startswith("no: ")
    assert told["optimised"].startswith("no: a debug build")


def test_report_of_a_capability_that_is_not_to_be_had(monkeypatch):
    library(monkeypatch)

    def cpu_capability() -> str:
        raise RuntimeError("there is no avx9000")

    monkeypatch.setattr(_load.compiled, "cpu_capability", cpu_capability)
    assert rows(_info.describe())["CPU"] == "compiled kernels, but every call will fail: there is no avx9000"


def test_report_of_a_library_that_does_not_answer(monkeypatch):
    library(monkeypatch)
    monkeypatch.delattr(_load.compiled, "build_info")
    told = rows(_info.describe())
    assert told["compiler"].startswith("unknown (AttributeError: ")
    assert told["library"] == "somewhere/libgcnet_ext.so"
    assert told["threads"].startswith(f"{torch.get_num_threads()}, ")


def test_report_on_a_machine_with_cuda(monkeypatch):
    """A GPU that the kernels were not compiled for is named, with its architecture, theirs and the fix."""
    gpus = [("H100", (9, 0)), ("RTX 5090", (12, 0))]
    library(monkeypatch, cuda_architectures="8.0;9.0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: gpus[index][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index][1])
    assert rows(_info.describe())["CUDA"].startswith("not used: torch is built with CUDA 13.0 but finds no GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert rows(_info.describe())["CUDA"] == f"not used: {_load.why_no_kernels('cuda')}"
    monkeypatch.setattr(_load, "kernel_devices", frozenset({"cpu", "meta", "cuda"}))
    assert rows(_info.describe())["CUDA"].splitlines() == [
        "compiled kernels for 8.0;9.0, CUDA 13.0",
        "H100 (9.0)",
        "RTX 5090 (12.0): every call will fail; build again with TORCH_CUDA_ARCH_LIST=12.0",
    ]


def test_command(capsys):
    assert command_line.main([]) == 0
    assert capsys.readouterr().out == _info.describe() + "\n"
    with pytest.raises(SystemExit, match="2"):
        command_line.main(["no-such-command"])
    with pytest.raises(SystemExit, match="0"):
        command_line.main(["--help"])
    assert "what was built" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        command_line.main(["--version"])
    assert capsys.readouterr().out == f"gcnet_ext {gcnet_ext.__version__}\n"


# ---- what an issue report needs ----------------------------------------------------------------------------------------------


def facts(*arguments: str, **environment: str) -> dict:
    done = run(*(arguments or ("-m", "gcnet_ext", "--json")), **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_json_has_the_rows_of_the_report():
    """And what tells one machine from another."""
    found, told = facts(OMP_NUM_THREADS="1"), report(OMP_NUM_THREADS="1")
    assert {**found["built"], **found["machine"]} == told
    assert found["gcnet_ext"] == gcnet_ext.__version__
    assert found["torch"] == torch.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["system"].startswith("Linux")
    assert found["processor"]
    assert len(found["GPUs"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_json_names_what_the_environment_decides():
    found = facts(GCNET_EXT_PLAIN="1", GCNET_EXT_NO_SUCH_THING="2", OTHER="3")
    assert found["environment"].items() >= {"GCNET_EXT_PLAIN": "1", "GCNET_EXT_NO_SUCH_THING": "2"}.items()
    assert "OTHER" not in found["environment"]
    assert found["machine"]["switch"].startswith("plain PyTorch everywhere")


def test_json_of_a_broken_installation():
    found = facts("-c", "import sys; sys.argv.append('--json')" + WITHOUT_LIBRARY, GCNET_EXT_JIT="0")
    assert "undefined symbol: of_another_torch" in found["built"]["library"]
    assert found["machine"]["CPU"] == "plain PyTorch: no compiled library, see above"


def test_json_of_a_machine_with_gpus(monkeypatch, capsys):
    """One of which does not answer."""
    library(monkeypatch, cuda_architectures="9.0")

    def name_of(index: int) -> str:
        if index == 1:
            raise RuntimeError("the GPU has fallen off the bus")
        return "H100"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", name_of)
    assert command_line.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["GPUs"] == ["H100", "unknown (RuntimeError: the GPU has fallen off the bus)"]
    assert found["built"]["compiler"] == "GCC 13.3.0"
