"""Residual blocks that compute their last block, the addition and the ReLU in one sweep: in test_insert.py's networks and in
timm's own."""

from __future__ import annotations

import contextlib
import copy
import pickle
import re

import imitations
import pytest
import torch
from networks import X, randomise, residual
from torch import nn
from torch._inductor.utils import run_and_get_code

import gcnet_ext
from gcnet_ext import GlobalContextBlock, insert_blocks, replace_blocks, to_plain
from gcnet_ext.models.tail import WithTail

pytestmark = pytest.mark.usefixtures("libraries")
INSERTED = {f"{kind} in {name}": (kind, name) for name in ("BasicBlock", "Bottleneck") for kind in ("gc", "se", "eca", "snl")}
ATTENTIONS, KINDS = ("se", "gc", "eca"), ("BasicBlock", "Bottleneck")
SENETS = ("SEBottleneck", "SEResNetBottleneck", "SEResNeXtBottleneck", "SEResNetBlock")
OWN = {
    **{f"timm {kind} with {attention}": (kind, attention) for kind in KINDS for attention in ATTENTIONS},
    **{f"timm {kind}": (kind, None) for kind in SENETS},
}


def inserted(kind: str = "gc", name: str = "Bottleneck", library: str = "torchvision", *, fuse_tail: bool = True, **options):
    """A stage of one residual block with an inserted block."""
    block = residual(library, name, **options)
    model = nn.ModuleDict({"layer1": nn.Sequential(block)})
    insert_blocks(model, (1,), 1 / 4, kind=kind, fuse_tail=fuse_tail)
    return randomise(block)


def own(kind: str, attention: str | None) -> nn.Module:
    """timm's residual block with a block of timm's."""
    if attention is None:
        senet = imitations.real("timm.models.senet")
        found = getattr(senet, kind)
        width = {"base_width": 64} if kind == "SEResNeXtBottleneck" else {}
        return randomise(found(16, 16 // found.expansion, groups=1, reduction=4, **width))
    return randomise(residual("timm", kind, attn_layer=attention))


def blocks_of(case: str) -> tuple[nn.Module, nn.Module]:
    """The residual block of that case without and with its tail."""
    if case in INSERTED:
        kind, name = INSERTED[case]
        return inserted(kind, name, fuse_tail=False), inserted(kind, name)
    before = own(*OWN[case])
    after = copy.deepcopy(before)
    assert replace_blocks(nn.Sequential(after)).replaced
    return before, after


def results(block: nn.Module, x: torch.Tensor = X) -> list[torch.Tensor]:
    """The output, and the gradients of x and of the parameters."""
    x = x.clone().requires_grad_()
    torch.manual_seed(0)
    out = block(x)
    grads = torch.autograd.grad(out, [x, *block.parameters()], out.detach().cos(), materialize_grads=True)
    return [out.detach(), *grads]


def assert_same(got, want, rtol=1e-4, atol=1e-5) -> None:
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.allclose(ours, theirs, rtol=rtol, atol=atol * max(1.0, float(theirs.abs().max())))


def operators_of(block: nn.Module, x: torch.Tensor = X) -> list[str]:
    """The operators that a call runs. The profiler sees them without a mode, which the block would notice."""
    with torch.profiler.profile() as profile:
        block(x)
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    return [event.name for event in events if "::" in event.name]


def behind_the_block(names: list[str]) -> list[str]:
    """The additions and activations behind the last operator of ours."""
    last = max(index for index, name in enumerate(names) if name.startswith("gcnet_ext::"))
    return [name for name in names[last:] if name.startswith(("aten::add", "aten::relu", "aten::clamp"))]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", [*INSERTED, *OWN])
def test_outputs_and_gradients_are_those_of_before(case, training):
    before, after = (block.double().train(training) for block in blocks_of(case))
    assert isinstance(after, WithTail)
    x = X.double()
    assert_same(results(after, x), results(before, x), rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        assert_same([after(x)], [before(x)], rtol=1e-9, atol=1e-10)
    assert_same(list(after.buffers()), list(before.buffers()))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("case", [*INSERTED, *OWN])
def test_nothing_is_computed_behind_the_block(case, grad):
    before, after = blocks_of(case)
    with torch.set_grad_enabled(grad):
        assert behind_the_block(operators_of(after)) == []
        if case in INSERTED:
            assert len(behind_the_block(operators_of(before))) >= 2


@pytest.mark.parametrize("case", ["gc in BasicBlock", "eca in Bottleneck", "timm Bottleneck with se", "timm SEResNetBlock"])
def test_a_captured_graph_ends_with_the_block(case):
    _, after = blocks_of(case)
    graphs = []
    captured = torch.compile(after, backend=lambda module, _: graphs.append(module.graph) or module, fullgraph=True)
    torch._dynamo.reset()
    assert torch.allclose(captured(X), after(X), rtol=1e-4, atol=1e-5)
    called = [str(node.target) for node in graphs[0].nodes if node.op == "call_function" and "getitem" not in str(node.target)]
    assert "gcnet_ext" in called[-1]


# ---- what keeps the tail from being taken ------------------------------------------------------------------------------------


class Doubled(nn.ReLU):
    def forward(self, x):
        return 2 * super().forward(x)


def with_own_activation(block):
    block.relu = Doubled()


def with_leaky(block):
    block.relu = nn.LeakyReLU(0.3)


def with_other_block(block):
    block.context_block = nn.Conv2d(16, 16, 1)


def with_final_activation(block):
    block.context_block = GlobalContextBlock(16, 1 / 4, final_activation="relu")


def with_a_derived_block(block):
    class Halved(GlobalContextBlock):
        def forward(self, x):
            return super().forward(x) / 2

    block.context_block = Halved(16, 1 / 4)


def with_a_hook_on_the_block(block):
    block.context_block.register_forward_hook(lambda _module, _input, output: output * 2)


def with_a_hook_before_the_block(block):
    block.context_block.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 2,))


def with_a_hook_on_the_activation(block):
    block.relu.register_forward_hook(lambda _module, _input, output: output + 1)


CHANGES = {
    name: change
    for name, change in list(globals().items())
    if name.startswith("with_") and callable(change)
}  # fmt: skip


@pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_somebody_has_changed_is_called(change, name):
    before, after = inserted(name=name, fuse_tail=False).eval(), inserted(name=name).eval()
    for block in (before, after):
        CHANGES[change](block)
        randomise(block, "context_block")
    assert_same(results(after), results(before))
    with torch.no_grad():
        assert_same([after(X)], [before(X)])
    assert not torch.allclose(after(X), inserted(name=name).eval()(X), rtol=1e-3), "the change does something"


@pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck"])
def test_hooks_on_an_activation_see_every_call(name):
    """torchvision calls one ReLU two or three times."""
    seen: dict[bool, list[torch.Tensor]] = {}
    for fuse_tail in (False, True):
        block = inserted(name=name, fuse_tail=fuse_tail).eval()
        kept = seen.setdefault(fuse_tail, [])
        block.relu.register_forward_hook(lambda _m, _i, out, kept=kept: kept.append(out.clone()))
        block(X)
    assert len(seen[True]) == len(seen[False]) == (3 if name == "Bottleneck" else 2)
    assert_same(seen[True], seen[False])


def test_hooks_of_every_module_see_every_call():
    seen: dict[bool, list[str]] = {}
    for fuse_tail in (False, True):
        block = inserted(fuse_tail=fuse_tail).eval()
        kept = seen.setdefault(fuse_tail, [])
        handle = nn.modules.module.register_module_forward_hook(lambda m, _i, _o, kept=kept: kept.append(type(m).__name__))
        block(X)
        handle.remove()
    assert [name.removesuffix("WithTail") for name in seen[True]] == seen[False]
    assert seen[True].count("ReLU") == 3 + 1, "the block has one, too"


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
def test_stochastic_depth(kind, rate):
    """An active DropPath is called, and drops what it dropped before; in evaluation it does nothing."""
    drop = imitations.real("timm.layers").DropPath
    before = randomise(residual("timm", kind, attn_layer="se", drop_path=drop(rate)))
    after = copy.deepcopy(before)
    replace_blocks(nn.Sequential(after))
    x = torch.randn(16, 16, 6, 7, generator=torch.Generator().manual_seed(1))
    for training in (True, False):
        assert_same(results(after.train(training), x), results(before.train(training), x))
        fused = behind_the_block(operators_of(copy.deepcopy(after), x)) == []
        assert fused == (not training or rate == 0)


def test_a_hook_on_stochastic_depth_is_called():
    drop = imitations.real("timm.layers").DropPath(0.4)
    block = randomise(residual("timm", "Bottleneck", attn_layer="se", drop_path=drop)).eval()
    replace_blocks(nn.Sequential(block))
    drop.register_forward_hook(lambda _m, _i, out: out * 0)
    assert torch.equal(block(X), X.relu())


class Broadcast(nn.Module):
    """A shortcut that has one value per channel."""

    def forward(self, x):
        return x.mean((2, 3), keepdim=True)


class Wider(nn.Module):
    def forward(self, x):
        return x.double()


@pytest.mark.parametrize("shortcut", [Broadcast, Wider])
@pytest.mark.parametrize("case", ["gc in Bottleneck", "timm BasicBlock with se", "timm SEResNetBottleneck"])
def test_shortcuts_that_torch_broadcasts_or_promotes(case, shortcut):
    before, after = blocks_of(case)
    for block in (before, after):
        block.downsample = shortcut()
    want, got = before.train()(X), after.train()(X)
    assert got.dtype == want.dtype
    assert_same([got.detach()], [want.detach()])
    assert_same(list(after.buffers()), list(before.buffers()))  # no norm has seen the batch twice


# ---- in place ----------------------------------------------------------------------------------------------------------------


class Frozen(nn.Module):
    """A norm of somebody's own, which keeps what it returns."""

    def forward(self, x):
        self.kept = x * 1.5
        return self.kept


class Scaled(nn.BatchNorm2d):
    """A class derived from a norm, which keeps what it returns."""

    def forward(self, x):
        self.kept = super().forward(x)
        return self.kept


def overwrites(block: nn.Module, x: torch.Tensor = X) -> bool:
    names = {f"gcnet_ext::{name}" for name in ("global_context_", "normed_global_context_", "channel_fuse_")}
    return not names.isdisjoint(operators_of(block, x))


@pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize("kind", ["gc", "se", "eca", "snl"])
def test_a_result_that_nobody_else_has_is_overwritten(kind, name):
    block = inserted(kind, name).eval()
    norm = "bn3" if name == "Bottleneck" else "bn2"
    with torch.no_grad():
        assert overwrites(block)
        setattr(block, norm, nn.Identity())
        assert overwrites(block), "behind a convolution, too"
        setattr(block, norm, nn.SyncBatchNorm(16).eval())
        assert overwrites(block)
    assert not overwrites(block), "a backward pass would need what was there"


@pytest.mark.parametrize("case", ["gc in BasicBlock", "eca in Bottleneck", "timm Bottleneck with se"])
def test_a_compiled_network_overwrites_it_too(kernels, case, fresh_dynamo):
    """There is no copy, because nobody reads it again; what a program that is exported gets knows no such operator."""
    before, after = (block.eval() for block in blocks_of(case))
    with torch.no_grad():
        want = before(X)
        compiled, codes = run_and_get_code(torch.compile(after, fullgraph=True), X.clone())
        assert torch.allclose(compiled, want, rtol=1e-4, atol=1e-5)
        program = torch.export.export(after, (X,))
        assert torch.allclose(program.module()(X), want, rtol=1e-4, atol=1e-5)
    overwriting = re.compile(r"(global_context|channel_fuse)_\.default")
    assert any(overwriting.search(code) for code in codes)
    assert not any("clone" in code for code in codes)
    assert not any(overwriting.search(str(node.target)) for node in program.graph.nodes)


NORMS = {"its own": Frozen, "derived": lambda: Scaled(16), "in a container": lambda: nn.Sequential(nn.BatchNorm2d(16))}


@pytest.mark.parametrize("norm", NORMS)
def test_what_others_may_have_kept_is_not_overwritten(norm):
    block = inserted().eval()
    block.bn3 = NORMS[norm]().eval()
    with torch.no_grad():
        out = block(X)
        assert not overwrites(block)
        if hasattr(block.bn3, "kept"):
            assert not torch.allclose(block.bn3.kept, out)


class Watching(torch.overrides.TorchFunctionMode):
    def __init__(self, keep) -> None:
        super().__init__()
        self.keep = keep

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.batch_norm:
            self.keep(None, (), out)
        return out


@pytest.mark.parametrize("watched", ["bn3", "conv3", "relu", "context_block", "every module", "mode"])
def test_activations_that_somebody_keeps_stay(watched):
    """Of those that were kept on the way through two residual blocks, no other is overwritten than without a tail."""
    changed = {}
    for fuse_tail in (False, True):
        model = nn.Sequential(inserted(fuse_tail=fuse_tail), inserted(fuse_tail=fuse_tail)).eval()
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []

        def keep(_module, inputs, output, kept=kept):
            kept.extend((tensor, tensor.clone()) for tensor in (*inputs, output))

        x = X.clone()
        handles = [getattr(block, watched).register_forward_hook(keep) for block in model if hasattr(block, watched)]
        if watched == "every module":
            handles.append(nn.modules.module.register_module_forward_hook(keep))
        with torch.no_grad(), Watching(keep) if watched == "mode" else contextlib.nullcontext():
            model(x)
        for handle in handles:
            handle.remove()
        assert torch.equal(x, X)
        changed[fuse_tail] = [not torch.equal(tensor, copied) for tensor, copied in kept]
    assert len(changed[True]) == len(changed[False]) > 1
    assert all(before or not after for before, after in zip(changed[False], changed[True], strict=True))


# ---- tools -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", ["gc in Bottleneck", "timm Bottleneck with se", "timm BasicBlock with gc", "timm SEResNetBlock"]
)
def test_copies_and_plain_modules(case):
    before, after = blocks_of(case)
    after.eval()
    want = before.eval()(X)
    for made in (copy.deepcopy(after), pickle.loads(pickle.dumps(after))):
        assert type(made) is type(after)
        assert_same([made(X)], [want])
    assert list(after.state_dict()) == list(before.state_dict())
    plain = to_plain(nn.Sequential(after))
    assert not any(isinstance(part, WithTail) for part in plain.modules())
    assert isinstance(after, WithTail)
    assert_same([plain(X), torch.jit.script(plain)(X), torch.fx.symbolic_trace(nn.Sequential(after))(X)], [want] * 3)


def test_fuse_tail_is_a_choice():
    assert not isinstance(inserted(fuse_tail=False), WithTail)
    block = residual("timm", "Bottleneck", attn_layer="se")
    kind = type(block)
    report = replace_blocks(nn.Sequential(block), fuse_tail=False)
    assert type(block) is kind
    assert report.replaced
    assert not report.tails
    assert replace_blocks(nn.Sequential(block)).tails == {"0.se": ""}
    assert isinstance(block, WithTail)


def test_a_block_behind_another_one():
    """insert_blocks finds timm's residual block after replace_blocks has changed it; the inserted block is the last one."""
    model = nn.ModuleDict({"layer1": nn.Sequential(randomise(residual("timm", "Bottleneck", attn_layer="se")))}).eval()
    before = copy.deepcopy(model)
    replace_blocks(model)
    for each, fuse_tail in ((model, True), (before, False)):
        insert_blocks(each, (1,), 1 / 4, fuse_tail=fuse_tail)
        randomise(each, "context_block")
    got, want = model["layer1"][0], before["layer1"][0]
    assert isinstance(got, WithTail)
    assert_same(results(got), results(want))
    assert replace_blocks(model).tails == {
        "layer1.0.se": "no residual block that is known ends with it",
        "layer1.0.context_block": "",
    }
    with torch.no_grad():
        assert not overwrites(got), "its input is the output of another block"


def test_the_report_says_which_tails_are_taken():
    silu = residual("timm", "Bottleneck", attn_layer="se", act_layer=nn.SiLU)
    model = nn.Sequential(residual("timm", "Bottleneck", attn_layer="se"), silu, nn.Sequential(GlobalContextBlock(16, 1 / 4)))
    report = replace_blocks(model)
    assert report.tails == {
        "0.se": "",
        "1.se": "SiLU and not ReLU stands behind the addition",
        "2.0": "no residual block that is known ends with it",
    }
    assert "fused with the addition and the ReLU behind it: 0.se" in str(report)
    assert "fused, alone, because SiLU and not ReLU stands behind the addition: 1.se" in str(report)


def test_a_forward_of_its_own():
    block = residual("timm", "Bottleneck", attn_layer="se")
    block.forward = lambda x: x
    assert replace_blocks(nn.Sequential(block)).tails == {"0.se": "the residual block has a forward of its own"}


def test_a_forward_that_is_exchanged_later(monkeypatch):
    block = randomise(residual("timm", "Bottleneck", attn_layer="se"))
    kind = type(block)
    replace_blocks(nn.Sequential(block))
    monkeypatch.setattr(kind, "forward", lambda _self, x: 3 * x)
    assert torch.equal(block(X), 3 * X)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["gc in Bottleneck", "timm Bottleneck with se", "timm Bottleneck with eca"])
def test_autocast(case, dtype):
    before, after = blocks_of(case)
    for grad in (True, False):
        with torch.autocast("cpu", dtype), torch.set_grad_enabled(grad):
            want, got = before.eval()(X), after.eval()(X)
        assert got.dtype == want.dtype
        assert_same([got.float()], [want.float()], rtol=2e-2, atol=2e-2)


def test_under_plain():
    before, after = blocks_of("gc in Bottleneck")
    with gcnet_ext.plain(), torch.no_grad():
        assert not any(name.startswith("gcnet_ext::") for name in operators_of(after.eval()))
        assert_same([after(X)], [before.eval()(X)])
