"""What is changed in a replaced block later, anywhere below it: it computes what the block would have computed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from test_replace_keeps import MAKERS, X, model_of
from torch import nn

from gcnet_ext import replace_blocks

pytestmark = pytest.mark.usefixtures("libraries")


class Doubled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def put(block: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    block.get_submodule(parent).register_module(name, new)


def wrapped(block, path, part):
    put(block, path, Doubled(part))


def hooked(_block, _path, part):
    part.register_forward_hook(lambda _module, _arguments, out: 1.5 * out)


def hooked_before(_block, _path, part):
    part.register_forward_pre_hook(lambda _module, arguments: (1.5 * arguments[0],))


def forward_of_its_own(_block, _path, part):
    former = part.forward
    part.forward = lambda x: 1.25 * former(x)


def another_class(_block, _path, part):
    former = type(part)
    part.__class__ = type("Another", (former,), {"forward": lambda self, x: former.forward(self, x) + 0.5})


def weights_changed(_block, _path, part):
    for parameter in part.parameters(recurse=False):
        parameter.data.mul_(1.7)


def weights_exchanged(_block, _path, part):
    for name, parameter in list(part.named_parameters(recurse=False)):
        setattr(part, name, nn.Parameter(parameter.detach() + 1))


def to_float64(_block, _path, part):
    part.double()


def attribute(name: str, value: object) -> Callable[..., None]:
    def change(_block, _path, part):
        if not hasattr(part, name):
            raise AttributeError(name)
        setattr(part, name, value)

    return change


def exchanged(new: Callable[[], nn.Module], *kinds: str) -> Callable[..., None]:
    def change(block, path, part):
        if type(part).__name__ not in kinds:
            raise TypeError(path)
        put(block, path, new())

    return change


GATES = ("Sigmoid", "Hardsigmoid")
CHANGES: dict[str, Callable[..., None]] = {
    **{change.__name__: change for change in (wrapped, hooked, hooked_before, forward_of_its_own, another_class)},
    **{change.__name__: change for change in (weights_changed, weights_exchanged, to_float64)},
    "bias": attribute("bias", None),
    "eps": attribute("eps", 0.3),
    "p": attribute("p", 0.9),
    "padding": attribute("padding", (1, 1)),
    "dim": attribute("dim", 1),
    "output_size": attribute("output_size", 2),
    "GELU": exchanged(nn.GELU, "ReLU"),
    "Softplus": exchanged(nn.Softplus, "ReLU"),
    "SiLU": exchanged(nn.SiLU, "ReLU"),
    "Tanh": exchanged(nn.Tanh, *GATES),
    "Hardsigmoid": exchanged(nn.Hardsigmoid, *GATES),
    "BatchNorm": exchanged(lambda: nn.BatchNorm2d(4), "LayerNorm", "LayerNorm2d", "Identity"),
    "Identity": exchanged(nn.Identity, "LayerNorm", "LayerNorm2d", "ReLU"),
}


def outcome(call: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | Exception:
    torch.manual_seed(0)
    try:
        return call(X.clone())
    except Exception as error:
        return error


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", MAKERS)
def test_changed_later(name, change, training):
    """In each module below the block, before the first call and after it."""
    paths = [path for path, _ in model_of(name)[0].named_modules() if path]
    for path in paths:
        for ran_before in (False, True):
            model = model_of(name)
            replace_blocks(model)
            block = model[0].train(training)
            if ran_before:
                model(X)
            try:
                CHANGES[change](block, path, block.get_submodule(path))
            except (AttributeError, TypeError):
                continue  # not a module that has this
            block.train(training)
            state = copy.deepcopy(model.state_dict())
            want = outcome(block._as_before)
            for _ in range(2):
                model.load_state_dict(state)  # a BatchNorm has changed its own
                got = outcome(model)
                where = f"{path}, {'after' if ran_before else 'before'} the first call"
                if isinstance(want, Exception):
                    assert isinstance(got, Exception), where
                else:
                    assert isinstance(got, torch.Tensor), f"{where}: {got!r}"
                    assert torch.allclose(got, want, rtol=1e-3, atol=1e-4), where
