"""The norm in front of a residual block's last block, which inference takes along, too: test_tail.py's residual blocks."""

from __future__ import annotations

import copy

import imitations
import pytest
import torch
from networks import X
from test_tail import INSERTED, OWN, assert_same, blocks_of, inserted, operators_of
from torch import nn

import gcnet_ext

pytestmark = pytest.mark.usefixtures("libraries")
WITH_NORM = [case for case in (*INSERTED, *OWN) if case != "timm SEResNetBlock"]  # behind whose norm is a ReLU


def norms_called(block: nn.Module, x: torch.Tensor = X) -> int:
    return operators_of(block, x).count("aten::batch_norm")


def last_norm(block: nn.Module) -> nn.Module:
    return block.bn3 if hasattr(block, "bn3") else block.bn2


@pytest.mark.parametrize("case", WITH_NORM)
def test_inference_calls_one_norm_less(kernels, case):
    before, after = (block.eval() for block in blocks_of(case))
    with torch.no_grad():
        assert norms_called(after) == norms_called(before) - 1
        assert_same([after(X)], [before(X)])
    assert norms_called(after) == norms_called(before), "a backward pass wants the output of the norm"
    with torch.no_grad():
        assert norms_called(after.train()) == norms_called(before)


@pytest.mark.parametrize("options", [{"affine": False}, {"eps": 0.3}], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("case", ["gc in Bottleneck", "se in BasicBlock", "eca in Bottleneck", "timm Bottleneck with gc"])
def test_other_norms_over_the_batch(kernels, case, layout, options):
    blocks = [block.eval() for block in blocks_of(case)]
    norm = nn.BatchNorm2d(16, **options).eval()
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.3, 3)
    x = X.contiguous(memory_format=layout)
    for block in blocks:
        setattr(block, "bn3" if hasattr(block, "bn3") else "bn2", copy.deepcopy(norm))
    with torch.no_grad():
        assert norms_called(blocks[1], x) == norms_called(blocks[0], x) - 1
        got, want = blocks[1](x), blocks[0](x)
    assert got.stride() == want.stride()
    assert_same([got], [want])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", ["gc in Bottleneck", "eca in BasicBlock", "timm Bottleneck with se"])
def test_dtypes(kernels, case, dtype):
    before, after = (block.eval().to(dtype) for block in blocks_of(case))
    with torch.no_grad():
        got, want = after(X.to(dtype)), before.double()(X.to(dtype).double())
    assert got.dtype == dtype
    assert_same([got.double()], [want], *((1e-9, 1e-9) if dtype == torch.float64 else (3e-2, 3e-2)))


def test_a_frozen_norm():
    """torchvision's, which has its statistics as buffers and is no norm of torch."""
    frozen = imitations.real("torchvision.ops.misc").FrozenBatchNorm2d(16)
    blocks = inserted(fuse_tail=False).eval(), inserted().eval()
    for name, buffer in frozen.named_buffers():
        (nn.init.uniform_ if name == "running_var" else nn.init.normal_)(buffer, *((0.3, 3) if name == "running_var" else ()))
    for block in blocks:
        block.bn3 = copy.deepcopy(frozen)
    seen = []
    with torch.no_grad():
        got, want = blocks[1](X), blocks[0](X)
        assert_same([got], [want])
        blocks[1].bn3.register_forward_hook(lambda *_: seen.append(True))
        assert_same([blocks[1](X)], [want])
    assert seen == [True], "with a hook it is called"


@pytest.mark.parametrize("case", ["gc in Bottleneck", "eca in BasicBlock", "timm Bottleneck with se"])
def test_a_captured_graph_has_one_norm_less(kernels, case, fresh_dynamo):
    """And notices that the norm is in training later."""
    before, after = (block.eval() for block in blocks_of(case))
    norms: list[int] = []

    def count(module: torch.fx.GraphModule, _inputs: list):
        norms.append(sum("batch_norm" in str(node.target) for node in module.graph.nodes))
        return module

    want, got = (torch.compile(block, backend=count, fullgraph=True) for block in (before, after))
    with torch.no_grad():
        assert_same([want(X)], [got(X)])
        without_tail, with_tail = norms
        assert with_tail == without_tail - 1
        for block in (before, after):
            last_norm(block).train()
        assert_same([got(X)], [want(X)])
        assert norms[-1] == norms[-2] == without_tail
    assert_same(list(after.buffers()), list(before.buffers()))


# ---- what keeps the norm from being taken along ------------------------------------------------------------------------------


class Derived(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


class DerivedConvolution(nn.Conv2d):
    """It keeps what it returns."""

    def forward(self, x):
        self.kept = super().forward(x)
        return self.kept


def with_a_hook_on_the_norm(block):
    block.bn3.register_forward_hook(lambda _module, _inputs, output: output * 2)


def with_a_hook_before_the_norm(block):
    block.bn3.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 2,))


def with_a_hook_on_the_convolution(block):
    block.conv3.register_forward_hook(lambda _module, _inputs, output: output * 2)


def with_a_derived_norm(block):
    block.bn3 = Derived(16)


def with_a_norm_of_the_batch(block):
    block.bn3 = nn.BatchNorm2d(16, track_running_stats=False)


def with_another_norm(block):
    block.bn3 = nn.GroupNorm(4, 16)


def with_a_norm_in_training(block):
    block.bn3.train()


def with_a_computed_weight(block):
    torch.nn.utils.parametrize.register_parametrization(block.bn3, "weight", nn.Softplus())


def with_a_forward_of_its_own(block):
    block.bn3.forward = lambda x: x * 3


CHANGES = {name: change for name, change in list(globals().items()) if name.startswith("with_") and callable(change)}


@pytest.mark.parametrize("change", CHANGES)
def test_what_somebody_has_changed_is_called(change):
    before, after = inserted(fuse_tail=False).eval(), inserted().eval()
    for block in (before, after):
        torch.manual_seed(0)
        CHANGES[change](block)
    with torch.no_grad():
        got = after(X)
        assert_same([got], [before(X)])
        assert not torch.allclose(got, inserted().eval()(X), rtol=1e-3), "the change does something"
    assert_same(list(after.buffers()), list(before.buffers()))


def test_what_a_convolution_keeps_is_not_overwritten(kernels):
    block = inserted().eval()
    derived = DerivedConvolution(block.conv3.in_channels, 16, 1, bias=False)
    derived.load_state_dict(block.conv3.state_dict())
    block.conv3 = derived
    with torch.no_grad():
        out = block(X)
        assert norms_called(block) == 3
        want = nn.functional.conv2d(block.relu(block.bn2(block.conv2(block.relu(block.bn1(block.conv1(X)))))), derived.weight)
    assert_same([derived.kept], [want])
    assert not torch.equal(derived.kept, out)


def under_autocast(block):
    with torch.autocast("cpu", torch.bfloat16):
        return norms_called(block)


def under_a_mode(block):
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Mode():
        return norms_called(block)


def in_plain_pytorch(block):
    with gcnet_ext.plain():
        return norms_called(block)


def in_a_trace(block):
    with gcnet_ext.plain(False):
        traced = torch.jit.trace(block, X, check_trace=False)
    return sum(node.kind() == "aten::batch_norm" for node in traced.inlined_graph.nodes())


@pytest.mark.parametrize("how", [under_autocast, under_a_mode, in_plain_pytorch, in_a_trace])
def test_where_the_norm_is_called(how):
    block = inserted().eval()
    with torch.no_grad():
        assert how(block) == 3


def test_a_block_whose_layers_are_called_gets_what_the_norm_returns():
    """The norm is called once, before them."""
    before, after = inserted(fuse_tail=False).eval(), inserted().eval()
    for block in (before, after):
        block.context_block.channel_add_conv[3].register_forward_hook(lambda _module, _inputs, output: output * 2)
    with torch.no_grad():
        assert_same([after(X)], [before(X)])
        assert norms_called(after) == 3


@pytest.mark.parametrize("kind", ["gc", "eca"])
def test_an_error_says_what_it_said(kind):
    words = []
    for fuse_tail in (False, True):
        block = inserted(kind, fuse_tail=fuse_tail).eval()
        block.conv3, block.bn3 = nn.Conv2d(block.conv3.in_channels, 20, 1), nn.BatchNorm2d(20).eval()
        block.downsample = nn.Conv2d(16, 20, 1)
        with torch.no_grad(), pytest.raises(RuntimeError) as error:
            block(X)
        words.append(str(error.value))
    assert words[0] == words[1]


def test_an_inserted_block_behind_one_of_timms():
    """Between the norm and the inserted block stands timm's own."""
    case = "timm Bottleneck with se"
    models = [nn.ModuleDict({"layer1": nn.Sequential(copy.deepcopy(blocks_of(case)[0]))}).eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, fuse_tail in zip(models, (False, True), strict=True):
        torch.manual_seed(0)
        gcnet_ext.insert_blocks(model, (1,), 1 / 4, fuse_tail=fuse_tail)
    models[1].load_state_dict(models[0].state_dict())
    before, after = (model["layer1"][0] for model in models)
    with torch.no_grad():
        assert norms_called(after) == norms_called(before) == 3
        assert_same([after(X)], [before(X)])
