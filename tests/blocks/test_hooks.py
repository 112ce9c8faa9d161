"""Every hook that nn.Module knows, on blocks and on their submodules: called as often as in the block in eager, with the same.

The block in eager calls each of its submodules once. Hooks are put there before the first call or after it, and before or
after `replace_blocks` makes our block of the eager one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import eager
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules

from gcnet_ext import GlobalContextBlock, SimplifiedNonLocalBlock, SqueezeExcitation, replace_blocks
from gcnet_ext.models.peer import FusedPeer

BOTH = ("channel_add", "channel_mul")
# Ours, the one in eager, and the submodules to hook
BLOCKS = {
    "global context": (
        lambda: GlobalContextBlock(16, 1 / 4, fusion_types=BOTH),
        lambda: eager.ContextBlock(16, 1 / 4, fusion_types=BOTH),
        ("", "conv_mask", "channel_mul_conv", "channel_mul_conv.1", "channel_add_conv.2"),
    ),
    "squeeze-excitation": (
        lambda: SqueezeExcitation(16, planes=4),
        lambda: eager.SqueezeExcitation(16, 4),
        ("", "fc1", "activation", "fc2"),
    ),
    "simplified non-local": (
        lambda: SimplifiedNonLocalBlock(16),
        lambda: eager.SimplifiedNonLocal(16),
        ("", "conv_mask", "conv_out"),
    ),
}
KINDS = {
    "forward": ("register_forward_hook", {}),
    "forward pre": ("register_forward_pre_hook", {}),
    "backward": ("register_full_backward_hook", {}),
    "backward pre": ("register_full_backward_pre_hook", {}),
}
WITH_FLAGS = {
    "forward, first": ("register_forward_hook", {"prepend": True}),
    "forward, keywords": ("register_forward_hook", {"with_kwargs": True}),
    "forward, always": ("register_forward_hook", {"always_call": True}),
    "forward pre, first": ("register_forward_pre_hook", {"prepend": True}),
    "forward pre, keywords": ("register_forward_pre_hook", {"with_kwargs": True}),
    "backward, first": ("register_full_backward_hook", {"prepend": True}),
    "backward pre, first": ("register_full_backward_pre_hook", {"prepend": True}),
}
X = torch.randn(2, 16, 5, 6, generator=torch.Generator().manual_seed(3))
GRAD = torch.randn(2, 16, 5, 6, generator=torch.Generator().manual_seed(4))


def numbers(argument: Any) -> Any:
    """What a hook was given, whatever ones a shape has between its sizes."""
    if isinstance(argument, Tensor):
        return argument.detach().flatten()
    if isinstance(argument, tuple):
        return tuple(map(numbers, argument))
    return argument


class Log:
    """A hook that writes down what it is called with, but for the module."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __call__(self, _module: nn.Module, *arguments: Any) -> None:
        self.calls.append(numbers(arguments))


def assert_same(got: Any, want: Any) -> None:
    assert type(got) is type(want)
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        got, want = list(got.values()), list(want.values())
    if isinstance(want, (tuple, list)):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert_same(one, other)
    elif isinstance(want, Tensor):
        assert got.shape == want.shape
        assert torch.allclose(got, want, rtol=1e-3, atol=1e-4)
    else:
        assert got == want


def train(block: nn.Module) -> None:
    block(X.clone().requires_grad_()).backward(GRAD)


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Ours and the one in eager, with the same random parameters."""
    ours, theirs = BLOCKS[name][0](), eager.randomise(BLOCKS[name][1]())
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


PLACES = [(name, path) for name, (_, _, paths) in BLOCKS.items() for path in paths]
FLAGGED = [("", kind) for kind in WITH_FLAGS] + [("channel_mul_conv.1", kind) for kind in WITH_FLAGS]
CASES = [(*place, kind) for place in PLACES for kind in KINDS] + [("global context", *flagged) for flagged in FLAGGED]


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize(("name", "path", "kind"), CASES)
def test_of_a_module(name, path, kind, used):
    register, options = (KINDS | WITH_FLAGS)[kind]
    logs = []
    for block in pair(name):
        if used:
            train(block)
        logs.append(Log())
        handle = getattr(block.get_submodule(path), register)(logs[-1], **options)
        train(block)
        train(block)
        handle.remove()
        train(block)
    ours, theirs = logs
    assert len(theirs.calls) == 2
    assert_same(ours.calls, theirs.calls)


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
@pytest.mark.parametrize(("name", "path"), PLACES)
def test_the_deprecated_backward_hook(name, path):
    """It gets the gradients of whatever the last operation was, so that only its calls can be compared."""
    counts = []
    for block in pair(name):
        log = Log()
        block.get_submodule(path).register_backward_hook(log)
        train(block)
        counts.append(len(log.calls))
    assert counts == [1, 1]


@pytest.mark.parametrize("prepend", [False, True])
@pytest.mark.parametrize(("name", "path"), PLACES)
def test_in_their_order(name, path, prepend):
    """What one hook returns is what the next one gets."""
    results = []
    for block in pair(name):
        hooked = block.get_submodule(path)
        hooked.register_forward_hook(lambda _module, _arguments, output: output * 2)
        hooked.register_forward_hook(lambda _module, _arguments, output: output + 1, prepend=prepend)
        hooked.register_forward_pre_hook(lambda _module, arguments: (arguments[0] * 3,))
        hooked.register_forward_pre_hook(lambda _module, arguments: (arguments[0] - 1,), prepend=prepend)
        results.append(block(X))
    assert torch.allclose(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize(("name", "path"), PLACES)
def test_always_called_also_when_it_fails(name, path, used):
    def fail(_module: nn.Module, _arguments: Any) -> None:
        raise ValueError("no")

    for block in pair(name):
        if used:
            block(X)
        hooked = block.get_submodule(path)
        always, otherwise = Log(), Log()
        hooked.register_forward_hook(always, always_call=True)
        hooked.register_forward_hook(otherwise)
        hooked.register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="no"):
            block(X)
        assert (len(always.calls), len(otherwise.calls)) == (1, 0)


# ---- state dicts -------------------------------------------------------------------------------------------------------------


def log_state_dicts(module: nn.Module) -> list[str]:
    """Puts a hook of each kind on the module; each writes down its kind."""
    log: list[str] = []
    module.register_state_dict_pre_hook(lambda *_: log.append("state dict, before"))
    module.register_state_dict_post_hook(lambda *_: log.append("state dict"))
    module.register_load_state_dict_pre_hook(lambda *_: log.append("load, before"))
    module.register_load_state_dict_post_hook(lambda *_: log.append("load"))
    return log


@pytest.mark.parametrize(("name", "path"), PLACES)
def test_of_state_dicts(name, path):
    """Ours load by a hook that has a look at the state dict itself, which no hook of a user may see more of than in eager."""
    logs = []
    for block in pair(name):
        state = block.state_dict()
        logs.append(log_state_dicts(block.get_submodule(path)))
        block.state_dict()
        assert logs[-1] == ["state dict, before", "state dict"]
        logs[-1].clear()
        block.load_state_dict(state)
    ours, theirs = ([entry for entry in log if entry.startswith("load")] for log in logs)
    assert ours == theirs == ["load, before", "load"]


# ---- replace_blocks ----------------------------------------------------------------------------------------------------------

GC_PATHS = BLOCKS["global context"][2]


def models() -> tuple[nn.Sequential, nn.Sequential]:
    """A model in eager that is to be changed, and one that stays."""
    return tuple(nn.Sequential(nn.Identity(), pair("global context")[1]) for _ in range(2))


def changed(model: nn.Sequential) -> nn.Sequential:
    assert list(replace_blocks(model).replaced) == ["1"]
    assert isinstance(model[1], FusedPeer)
    return model


@pytest.mark.parametrize("order", ["before", "after", "after the first call"])
@pytest.mark.parametrize(("path", "kind"), [*((path, kind) for path in GC_PATHS for kind in KINDS), *FLAGGED])
def test_around_replace_blocks(path, kind, order):
    register, options = (KINDS | WITH_FLAGS)[kind]
    logs = [Log(), Log()]
    to_change, stays = models()
    for model, log in zip((to_change, stays), logs, strict=True):
        if order != "before" and model is to_change:
            changed(model)
        if order == "after the first call":
            train(model)
        getattr(model[1].get_submodule(path), register)(log, **options)
        if order == "before" and model is to_change:
            changed(model)
        train(model)
    ours, theirs = logs
    assert len(theirs.calls) == 1
    assert_same(ours.calls, theirs.calls)


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
@pytest.mark.parametrize("path", GC_PATHS)
def test_the_deprecated_backward_hook_around_replace_blocks(path):
    model, _ = models()
    log = Log()
    model[1].get_submodule(path).register_backward_hook(log)
    train(changed(model))
    assert len(log.calls) == 1


def test_replacing_a_block_calls_none_of_its_hooks():
    """The random input on which the two are compared is no affair of the user's."""
    model, _ = models()
    for path in GC_PATHS:
        model[1].get_submodule(path).register_forward_hook(fail_if_called)
    changed(model)


def fail_if_called(*_: Any) -> None:
    raise AssertionError("a hook was called")


@pytest.mark.parametrize("path", ["", "channel_mul_conv"])
def test_of_state_dicts_around_replace_blocks(path):
    model, _ = models()
    log = log_state_dicts(model[1].get_submodule(path))
    changed(model)
    log.clear()
    state = model.state_dict()
    assert log == ["state dict, before", "state dict"]
    log.clear()
    model.load_state_dict(state)
    assert [entry for entry in log if entry.startswith("load")] == ["load, before", "load"]


# ---- of all modules ----------------------------------------------------------------------------------------------------------

GLOBAL = {
    "forward": (of_all_modules.register_module_forward_hook, {}),
    "forward, keywords": (of_all_modules.register_module_forward_hook, {"with_kwargs": True}),
    "forward, always": (of_all_modules.register_module_forward_hook, {"always_call": True}),
    "forward pre": (of_all_modules.register_module_forward_pre_hook, {}),
    "backward": (of_all_modules.register_module_full_backward_hook, {}),
    "backward pre": (of_all_modules.register_module_full_backward_pre_hook, {}),
}


def calls_by_name(block: nn.Module, register: Callable[..., Any], options: dict[str, Any]) -> dict[str, list[Any]]:
    """What a hook of all modules gets of each module of the block, by the name of the module in it."""
    names = {module: name for name, module in block.named_modules()}
    calls: dict[str, list[Any]] = {name: [] for name in names.values()}

    def log(module: nn.Module, *arguments: Any) -> None:
        calls[names[module]].append(numbers(arguments))

    handle = register(log, **options)
    try:
        train(block)
    finally:
        handle.remove()
    return calls


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("kind", GLOBAL)
@pytest.mark.parametrize("name", BLOCKS)
def test_of_all_modules(name, kind, used):
    """torch's global hooks, as tools that profile or trace a model set them; without them the block is fused again."""
    ours, theirs = pair(name)
    if used:
        train(ours)
    before = ours(X)
    got, want = calls_by_name(ours, *GLOBAL[kind]), calls_by_name(theirs, *GLOBAL[kind])
    assert all(len(calls) == 1 for calls in want.values())
    assert_same(got, {path: want[path] for path in got})  # a gate is a module in eager alone
    assert torch.equal(ours(X), before)


@pytest.mark.parametrize("kind", GLOBAL)
def test_of_all_modules_after_replace_blocks(kind):
    to_change, stays = models()
    got, want = calls_by_name(changed(to_change), *GLOBAL[kind]), calls_by_name(stays, *GLOBAL[kind])
    assert_same(got, want)
