"""replace_blocks and state dicts, against the libraries whose blocks they are, or imitations of those (imitations.py)."""

from __future__ import annotations

import copy
import io
import pickle
import sys

import eager
import imitations
import pytest
import torch
from torch import nn

import gcnet_ext
from gcnet_ext import GlobalContextBlock, NonLocalBlock, SqueezeExcitation, replace_blocks, to_peer_state_dict

MISSING = imitations.missing()


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """An imitation in the place of every library that is not installed."""
    for name, module in MISSING.items():
        monkeypatch.setitem(sys.modules, name, module)


def mmcv_context(**options):
    return imitations.library("mmcv.cnn").ContextBlock(16, 1 / 4, **options)


def mmcv_non_local(dims: int = 2, **options):
    return getattr(imitations.library("mmcv.cnn"), f"NonLocal{dims}d")(16, **options)


def timm_context(**options):
    return imitations.library("timm.layers").GlobalContext(16, **options)


def timm_se(**options):
    return imitations.library("timm.layers").SEModule(16, rd_ratio=1 / 4, rd_divisor=1, **options)


def torchvision_se(**options):
    return imitations.library("torchvision.ops").SqueezeExcitation(16, 4, **options)


NON_LOCAL_MODES = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
# name: what makes the block, the peer, the class that it becomes, spatial dimensions
BLOCKS = {
    "mmcv add": (mmcv_context, "mmcv", GlobalContextBlock, 2),
    "mmcv mul, avg": (
        lambda: mmcv_context(pooling_type="avg", fusion_types=("channel_mul",)), "mmcv", GlobalContextBlock, 2,
    ),
    "mmcv both": (lambda: mmcv_context(fusion_types=("channel_add", "channel_mul")), "mmcv", GlobalContextBlock, 2),
    "timm scale": (timm_context, "timm", GlobalContextBlock, 2),
    "timm add": (lambda: timm_context(fuse_add=True, fuse_scale=False), "timm", GlobalContextBlock, 2),
    "timm both, avg": (lambda: timm_context(fuse_add=True, use_attn=False), "timm", GlobalContextBlock, 2),
    "timm silu": (lambda: timm_context(act_layer=nn.SiLU), "timm", GlobalContextBlock, 2),
    "timm hard sigmoid": (lambda: timm_context(gate_layer="hard_sigmoid"), "timm", GlobalContextBlock, 2),
    "timm gelu": (lambda: timm_context(act_layer=nn.GELU), "timm", GlobalContextBlock, 2),
    "timm se": (timm_se, "timm", SqueezeExcitation, 2),
    "timm se silu, hard sigmoid": (lambda: timm_se(act_layer=nn.SiLU, gate_layer="hard_sigmoid"), "timm", SqueezeExcitation, 2),
    "timm se without bias": (lambda: timm_se(bias=False), "timm", SqueezeExcitation, 2),
    "torchvision se": (torchvision_se, "torchvision", SqueezeExcitation, 2),
    "torchvision se hard": (
        lambda: torchvision_se(scale_activation=nn.Hardsigmoid), "torchvision", SqueezeExcitation, 2,
    ),
    **{
        f"mmcv non-local {dims}d {mode}{' sub-sampled' if sub_sample else ''}": (
            lambda dims=dims, mode=mode, sub_sample=sub_sample: mmcv_non_local(dims, mode=mode, sub_sample=sub_sample),
            "mmcv", NonLocalBlock, dims,
        )
        for dims in (1, 2, 3)
        for mode in NON_LOCAL_MODES
        for sub_sample in (False, True)
    },
    "mmcv non-local with a norm": (lambda: mmcv_non_local(norm_cfg={"type": "BN"}), "mmcv", NonLocalBlock, 2),
}  # fmt: skip


def feature_map(dims: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 16, *(4, 6, 2)[:dims], generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def results(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradient of x."""
    x = x.clone().requires_grad_()
    out = model(x)
    if getattr(model[1], "mode", None) == "concatenation":  # mmcv 2.2's has no backward: it divides a ReLU's output in place
        return [out.detach()]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(x.dtype)
    out.backward(grad)
    return [out.detach(), x.grad]


def gradients_by_memory(model: nn.Module) -> dict[int, torch.Tensor]:
    """By the address of the parameter: the same before and after, whatever its name and shape."""
    return {
        parameter.data_ptr(): torch.zeros(0) if parameter.grad is None else parameter.grad.flatten()
        for parameter in model.parameters()
    }


def wrapped(name: str) -> nn.Sequential:
    return eager.randomise(nn.Sequential(nn.Identity(), BLOCKS[name][0]())).double()


@pytest.mark.parametrize("name", BLOCKS)
def test_outputs_and_gradients_stay(name):
    model = wrapped(name)
    x = feature_map(BLOCKS[name][3])
    want = results(model, x)
    gradients = gradients_by_memory(model)
    model.zero_grad()
    report = replace_blocks(model)
    assert list(report.replaced) == ["1"]
    assert report.left == {}
    assert report.model is model
    assert type(model[1]) is BLOCKS[name][2]
    tolerance = 1e-6 if "hard" in name else 1e-8  # torch's hard sigmoid has 1/6 in single precision
    for got, expected in zip(results(model, x), want, strict=True):
        assert torch.allclose(got, expected, rtol=tolerance, atol=tolerance)
    found = gradients_by_memory(model)
    assert found.keys() == gradients.keys()
    for address, gradient in found.items():
        assert torch.allclose(gradient, gradients[address], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", BLOCKS)
def test_state_dicts_both_ways(name):
    """The peer's state dict into our block with strict=True, and back into the peer's."""
    make, peer, _, dims = BLOCKS[name]
    theirs, ours = wrapped(name), wrapped(name)
    replace_blocks(ours)
    for parameter in ours.parameters():
        parameter.data.zero_()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    back = to_peer_state_dict(ours, peer, spatial_dims=dims)
    assert {key: tuple(value.shape) for key, value in back.items()} == {
        key: tuple(value.shape) for key, value in theirs.state_dict().items()
    }
    assert all(torch.equal(back[key], value) for key, value in theirs.state_dict().items())
    fresh = nn.Sequential(nn.Identity(), make()).double()
    fresh.load_state_dict(back, strict=True)
    x = feature_map(dims)
    assert torch.allclose(fresh.eval()(x), ours.eval()(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in BLOCKS if "non-local" not in name or "2d embedded" in name])
def test_what_survives(name):
    """Mode, dtype, requires_grad, hooks, deepcopy, pickle, torch.save, half precision, replicas."""
    model = wrapped(name).float().eval()
    next(model.parameters()).requires_grad_(False)
    calls = []
    model[1].register_forward_hook(lambda module, args, out: calls.append(type(module)))
    replace_blocks(model)
    block = model[1]
    assert not block.training
    assert all(not module.training for module in block.modules())
    assert sum(not p.requires_grad for p in model.parameters()) == 1
    x = feature_map(BLOCKS[name][3], torch.float32)
    want = model(x)
    assert calls == [BLOCKS[name][2]]
    block._forward_hooks.clear()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(other(x), want)
        other.load_state_dict(model.state_dict(), strict=True)
        assert {p.data_ptr() for p in other.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())
    assert torch.allclose(model.bfloat16()(x.bfloat16()).float(), want, rtol=0.1, atol=0.1)


def replica(module: nn.Module) -> nn.Module:
    """As torch.nn.parallel.replicate makes it for DataParallel: parameters are plain attributes, not leaves."""
    copied = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        copied._modules[name] = None if child is None else replica(child)
    for name, parameter in module._parameters.items():
        if parameter is None:
            copied._parameters[name] = None
        else:
            setattr(copied, name, parameter * 1.0)
    return copied


@pytest.mark.parametrize(
    "block",
    [
        GlobalContextBlock(16, 1 / 4, fusion_types=("channel_add", "channel_mul")),
        SqueezeExcitation(16, 1 / 4),
        gcnet_ext.SimplifiedNonLocalBlock(16),
        NonLocalBlock(16),
    ],
    ids=lambda block: type(block).__name__,
)
def test_data_parallel_replicas(block):
    """A replica computes the same, and its gradients reach the parameters of the original."""
    eager.randomise(block)
    x = feature_map(2, torch.float32)
    assert torch.equal(replica(block)(x), block(x))
    block(x).sum().backward()
    want = [parameter.grad.clone() for parameter in block.parameters()]
    block.zero_grad()
    replica(block)(x).sum().backward()
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(block.parameters(), want, strict=True))


def test_snippet_wherever_it_is_defined():
    """The class that many projects copied, under any name; one that computes something else is left, and says why."""

    class Copied(eager.ContextBlock):
        pass

    class Another(eager.ContextBlock):
        def forward(self, x):
            return super().forward(x) + 1

    model = eager.randomise(
        nn.ModuleDict({"copied": Copied(16, 1 / 4, "att", ("channel_mul",)), "another": Another(16, 1 / 4)})
    )
    x = feature_map(2, torch.float32)
    want, state = model["copied"](x), {key: value.clone() for key, value in model.state_dict().items()}
    report = replace_blocks(model)
    assert list(report.replaced) == ["copied"]
    assert report.left == {"another": "it has the submodules of a GC block, and computes something else"}
    assert "1 replaced, 1 left" in str(report)
    assert torch.allclose(model["copied"](x), want, atol=1e-5)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert replace_blocks(model).replaced == {}, "a second time there is nothing to do"


def test_the_model_itself_and_shared_modules():
    block = eager.randomise(eager.ContextBlock(16, 1 / 4))
    x = feature_map(2, torch.float32)
    want = block(x)
    assert torch.allclose(nn.Sequential(block, block)(x), block(want))
    report = replace_blocks(block)
    assert type(report.model) is GlobalContextBlock
    assert torch.allclose(report.model(x), want, atol=1e-5)
    shared = nn.Sequential(block, block)
    replace_blocks(shared)
    assert shared[0] is shared[1]
    assert type(shared[0]) is GlobalContextBlock


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: timm_se(add_maxpool=True), "it adds a max-pooling"),
        (lambda: timm_se(norm_layer=nn.BatchNorm2d), "it has a BatchNorm2d between its layers"),
        (lambda: timm_se(gate_layer=nn.Tanh), "its gate is Tanh"),
        (lambda: mmcv_non_local(norm_cfg={"type": "GN", "num_groups": 2}), "its norm is GroupNorm"),
    ],
)
def test_left(make, why):
    model = nn.Sequential(make())
    kind = type(model[0])
    report = replace_blocks(model)
    assert report.replaced == {}
    assert report.left["0"].startswith(why)
    assert type(model[0]) is kind


@pytest.mark.parametrize("make", [timm_context, timm_se, torchvision_se, mmcv_context], ids=lambda make: make.__name__)
def test_a_subclass_may_compute_something_else(make):
    kind = type(make())
    model = nn.Sequential(make())
    model[0].__class__ = type("Another", (kind,), {"forward": lambda self, x: kind.forward(self, x) + 1})
    report = replace_blocks(model)
    assert report.replaced == {}
    assert type(model[0]).__name__ == "Another"


@pytest.mark.parametrize("name", BLOCKS)
def test_frozen_parameters_stay_frozen(name):
    """Those of another shape, too, which are new ones on the same memory."""
    model = wrapped(name).requires_grad_(False)
    replace_blocks(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_hook_that_would_go():
    block = timm_context()
    block.mlp_scale.register_forward_hook(lambda *_: None)
    assert replace_blocks(nn.Sequential(block)).left == {"0": "a hook of submodule mlp_scale would be lost"}


MODELS = {
    "gcresnet33ts": 10,
    "gcresnet50t": 16,
    "gcresnext26ts": 8,
    "gcresnext50ts": 16,
    "gc_efficientnetv2_rw_t": 29,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_timm_models(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=10).eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(x)
        report = replace_blocks(model)
        assert len(report.replaced) == MODELS[name], str(report)
        assert report.left == {}
        assert torch.allclose(model(x), want, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_torchvision_mobilenet():
    models = pytest.importorskip("torchvision.models")
    model = models.mobilenet_v3_small().eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(x)
        report = replace_blocks(model)
        assert len(report.replaced) == 9
        assert torch.allclose(model(x), want, rtol=1e-3, atol=1e-4)


def test_original_senet_keys():
    """Two Linear layers in a Sequential, without biases."""
    block = SqueezeExcitation(16, planes=4, bias=False)
    weights = torch.randn(4, 16), torch.randn(16, 4)
    block.load_state_dict({"fc.0.weight": weights[0], "fc.2.weight": weights[1]}, strict=True)
    assert torch.equal(block.fc1.weight.flatten(1), weights[0])
    assert torch.equal(block.fc2.weight.flatten(1), weights[1])


def test_weights_of_three_dimensional_forks():
    truth = eager.randomise(eager.ContextBlock(16, 1 / 4))
    state = {key: value.unsqueeze(-1) if value.dim() == 4 else value for key, value in truth.state_dict().items()}
    block = GlobalContextBlock(16, 1 / 4, fusion_types="channel_add")
    block.load_state_dict(state, strict=True)
    back = to_peer_state_dict(block, "mmcv", spatial_dims=3)
    assert all(torch.equal(back[key], value) for key, value in state.items())


def test_unknown_keys_and_wrong_shapes_are_still_errors():
    block = GlobalContextBlock(16, 1 / 4)
    state = block.state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*conv_typo\.weight"):
        block.load_state_dict({**state, "conv_typo.weight": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"size mismatch for channel_mul_conv\.0\.weight"):
        block.load_state_dict({**state, "channel_mul_conv.0.weight": torch.ones(5, 16, 1, 1)})
    with pytest.raises(RuntimeError, match=r"size mismatch for channel_mul_conv\.0\.weight"):  # as many elements
        block.load_state_dict({**state, "channel_mul_conv.0.weight": torch.ones(16, 4, 1, 1)})


@pytest.mark.parametrize(
    ("options", "message"),
    [(("keras",), "peer must be one of .*'mmcv'.* got 'keras'"), (("mmcv", 4), "spatial_dims must be 1, 2 or 3, got 4")],
)
def test_bad_arguments(options, message):
    peer, *dims = options
    with pytest.raises(ValueError, match=message):
        gcnet_ext.to_peer_state_dict(nn.Identity(), peer, **({"spatial_dims": dims[0]} if dims else {}))
