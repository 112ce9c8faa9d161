"""Look-alikes of a block: what they do elsewhere than in an output, and what changes in them later."""

from __future__ import annotations

import copy
import random

import eager
import pytest
import torch
from look_alikes import Pasted, X
from numpy.random.mtrand import _rand as numpys  # the generator of the functions in numpy.random, which forwards use
from torch import nn

from gcnet_ext import replace_blocks

pytestmark = pytest.mark.usefixtures("libraries")


class Detached(Pasted):
    """The output alone is the same."""

    def forward(self, x):
        mask = self.conv_mask(x).flatten(2).softmax(2)
        context = (x.detach().flatten(2) * mask).sum(2)[:, :, None, None]
        return x * self.channel_mul_conv(context).sigmoid() + self.channel_add_conv(context)


class Decorated(Pasted):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Rarely(Pasted):
    """Stochastic depth that the first random numbers do not meet."""

    def forward(self, x):
        return x if self.training and torch.rand(()) < 1e-6 else super().forward(x)


class RarelyByPython(Pasted):
    def forward(self, x):
        return x if self.training and random.random() < 1e-6 else super().forward(x)


class RarelyByNumpy(Pasted):
    def forward(self, x):
        return x if self.training and numpys.rand() < 1e-6 else super().forward(x)


class Leaves(Pasted):
    """What it has computed, for a loss."""

    def forward(self, x):
        out = super().forward(x)
        self.aux = out.mean().item()
        return out


class Counts(Pasted):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Clamped(Pasted):
    def forward(self, x):
        return super().forward(x).clamp(-100, 100)


class Sized(Pasted):
    """One thing for single images, another for large ones."""

    def forward(self, x):
        return super().forward(x) * (1 + (len(x) == 1) + (x.shape[2] > 16))


class InPlace(Pasted):
    def forward(self, x):
        return x.copy_(super().forward(x))


class Shares(Pasted):
    """A copy of which is the block itself."""

    def __deepcopy__(self, memo):
        return self


class Holds(Pasted):
    """A tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = torch.ones(())

    def forward(self, x):
        return super().forward(x) * self.temperature


SIDES = (Detached, Decorated, Rarely, RarelyByPython, RarelyByNumpy, Leaves, Counts, Clamped, Sized, InPlace, Shares, Holds)


@pytest.mark.parametrize("kind", SIDES)
def test_those_that_differ_elsewhere_are_left(kind):
    """In gradients, at random, in what they leave behind, for other inputs; and their weights stay what they are."""
    model = eager.randomise(nn.Sequential(kind()))
    values = [value.clone() for value in model.state_dict().values()]
    python, torchs, of_numpy = random.getstate(), torch.random.get_rng_state(), str(numpys.get_state())
    report = replace_blocks(model)
    assert list(report.left) == ["0"]
    assert random.getstate() == python
    assert str(numpys.get_state()) == of_numpy
    assert torch.equal(torch.random.get_rng_state(), torchs)
    assert all(torch.equal(value, kept) for value, kept in zip(model.state_dict().values(), values, strict=True))


class Knobs(Pasted):
    """What may change in other ways than by setting a number."""

    level = 1.0

    def __init__(self) -> None:
        super().__init__()
        self._hidden, self.function = 1.0, torch.sigmoid

    def helper(self, x):
        return x

    def forward(self, x):
        factor = self._hidden * self.level * 2 * self.function(torch.zeros((), dtype=x.dtype))
        return super().forward(self.helper(x)) * factor


class Contents(Knobs):
    """Objects that change and stay the same objects."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.several = {"a": 1.0}, [1.0, 2.0]

    def forward(self, x):
        return super().forward(x) * (self.table["a"] * self.several[0])


CHANGES = {
    "a hidden number": lambda block, _patch: setattr(block, "_hidden", 0.5),
    "an attribute of the class": lambda _block, patch: patch.setattr(Knobs, "level", 0.5),
    "one in front of it": lambda block, _patch: setattr(block, "level", 0.5),
    "an entry of a dictionary": lambda block, _patch: block.table.update(a=0.5),
    "an element of a list": lambda block, _patch: block.several.__setitem__(0, 0.5),
    "a function": lambda block, _patch: setattr(block, "function", torch.cos),
    "a method": lambda _block, patch: patch.setattr(Knobs, "helper", lambda _self, x: 2 * x),
    "a method of the block itself": lambda block, _patch: setattr(block, "helper", lambda x: 2 * x),
    "a method of a base": lambda _block, patch: patch.setattr(eager.ContextBlock, "forward", lambda _self, x: x),
}


OF_CONTENTS = ("an entry of a dictionary", "an element of a list")


@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize(
    ("kind", "change"),
    [*((Knobs, change) for change in CHANGES if change not in OF_CONTENTS), *((Contents, change) for change in CHANGES)],
)
def test_whatever_changes_later_counts(monkeypatch, kind, change, ran_before):
    model = eager.randomise(nn.Sequential(kind()))
    assert list(replace_blocks(model).replaced) == ["0"]
    before = model[0]._as_before(X)
    assert torch.allclose(model(X), before, atol=1e-5)
    if not ran_before:
        model[0]._seen = None
    CHANGES[change](model[0], monkeypatch)
    want = model[0]._as_before(X)
    assert not torch.allclose(want, before, rtol=1e-2)
    assert torch.allclose(model(X), want, atol=1e-5)


def test_an_instance_that_the_class_makes():
    """It has not been looked at, and computes what its class did."""
    block = eager.randomise(Pasted())
    replace_blocks(block)
    other = type(block)()
    assert torch.equal(other(X), other._as_before(X))


class Chosen(Pasted):
    """A set of constants has another order in every process."""

    def forward(self, x):
        return super().forward(x) if str(x.device.type) in {"cpu", "cuda", "meta", "xpu", "mps"} else x


LOADED = """
import torch, test_replace_look_alikes as tests
{change}
block = torch.load({path!r}, weights_only=False)
want = block._as_before(tests.X)
assert torch.allclose(block(tests.X), want, atol=1e-5)
print(block._record is not None)
"""


@pytest.mark.parametrize(("change", "fused"), [("", True), ("tests.Chosen.forward = lambda self, x: 3 * x", False)])
def test_saved_and_loaded_in_another_process(python, tmp_path, change, fused):
    """Where the code of its class is another one, it computes what that computes."""
    block = eager.randomise(Chosen())
    assert len(replace_blocks(block).replaced) == 1
    torch.save(block, tmp_path / "block.pt")
    for seed in ("1", "2"):
        done = python(LOADED.format(path=str(tmp_path / "block.pt"), change=change), PYTHONHASHSEED=seed)
        assert done.stdout.strip() == str(fused), done.stderr


def test_a_class_on_top_of_ours():
    block = eager.randomise(Pasted())
    replace_blocks(block)
    block.__class__ = type("OnTop", (type(block),), {"forward": lambda self, x: super(type(self), self).forward(x) + 1})
    assert torch.equal(copy.deepcopy(block)(X), block(X))
