"""replace_blocks and state dicts, against the libraries whose blocks they are, or imitations of those (imitations.py).

What somebody has put on a block is in test_replace_keeps.py, what is replaced and what is left in test_replace_report.py.
"""

from __future__ import annotations

import copy
import io
import pickle

import eager
import imitations
import pytest
import torch
from torch import nn

import gcnet_ext
from gcnet_ext import (
    EffectiveSqueezeExcitation,
    EfficientChannelAttention,
    GlobalContextBlock,
    NonLocalBlock,
    SqueezeExcitation,
    replace_blocks,
    to_peer_state_dict,
)
from gcnet_ext.models.peer import Peer

pytestmark = pytest.mark.usefixtures("libraries")


def mmcv_context(**options):
    return imitations.library("mmcv.cnn").ContextBlock(16, 1 / 4, **options)


def mmcv_non_local(dims: int = 2, **options):
    return getattr(imitations.library("mmcv.cnn"), f"NonLocal{dims}d")(16, **options)


def timm_context(**options):
    return imitations.library("timm.layers").GlobalContext(16, **options)


def timm_se(**options):
    return imitations.library("timm.layers").SEModule(16, rd_ratio=1 / 4, rd_divisor=1, **options)


def timm_eca(**options):
    return imitations.library("timm.layers").EcaModule(16, **options)


def torchvision_se(**options):
    return imitations.library("torchvision.ops").SqueezeExcitation(16, 4, **options)


def timm_squeeze_excite(**options):
    return imitations.library("timm.models._efficientnet_blocks").SqueezeExcite(16, **options)


def timm_effective(**options):
    return imitations.library("timm.layers").EffectiveSEModule(16, **options)


def hgnet_effective():
    return imitations.library("timm.models.hgnet").EseModule(16)


NON_LOCAL_MODES = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
GC, SE, ESE, NL = GlobalContextBlock, SqueezeExcitation, EffectiveSqueezeExcitation, NonLocalBlock
BOTH = ("channel_add", "channel_mul")
# name: what makes the block, the library whose keys it has, spatial dimensions, and a block of ours with the same layers
BLOCKS = {
    "mmcv add": (mmcv_context, "mmcv", 2, lambda: GC(16, 1 / 4, fusion_types="channel_add")),
    "mmcv mul, avg": (
        lambda: mmcv_context(pooling_type="avg", fusion_types=("channel_mul",)), "mmcv", 2, lambda: GC(16, 1 / 4, "avg"),
    ),
    "mmcv both": (lambda: mmcv_context(fusion_types=BOTH), "mmcv", 2, lambda: GC(16, 1 / 4, fusion_types=BOTH)),
    "timm scale": (timm_context, "timm", 2, lambda: GC(16, 1 / 8, eps=1e-6)),
    "timm add": (
        lambda: timm_context(fuse_add=True, fuse_scale=False), "timm", 2,
        lambda: GC(16, 1 / 8, fusion_types="channel_add", eps=1e-6),
    ),
    "timm both, avg": (
        lambda: timm_context(fuse_add=True, use_attn=False), "timm", 2,
        lambda: GC(16, 1 / 8, "avg", fusion_types=BOTH, eps=1e-6),
    ),
    "timm silu": (lambda: timm_context(act_layer=nn.SiLU), "timm", 2, lambda: GC(16, 1 / 8, activation="silu", eps=1e-6)),
    "timm hard sigmoid": (
        lambda: timm_context(gate_layer="hard_sigmoid"), "timm", 2, lambda: GC(16, 1 / 8, gate="hard_sigmoid", eps=1e-6),
    ),
    "timm gelu": (lambda: timm_context(act_layer=nn.GELU), "timm", 2, lambda: GC(16, 1 / 8, activation="gelu", eps=1e-6)),
    "timm tanh": (lambda: timm_context(act_layer=nn.Tanh), "timm", 2, None),
    "timm se": (timm_se, "timm", 2, lambda: SE(16, 1 / 4)),
    "timm se silu, hard sigmoid": (
        lambda: timm_se(act_layer=nn.SiLU, gate_layer="hard_sigmoid"), "timm", 2,
        lambda: SE(16, 1 / 4, activation="silu", gate="hard_sigmoid"),
    ),
    "timm se without bias": (lambda: timm_se(bias=False), "timm", 2, lambda: SE(16, 1 / 4, bias=False)),
    "timm se hardswish": (
        lambda: timm_se(act_layer=nn.Hardswish), "timm", 2, lambda: SE(16, 1 / 4, activation="hardswish"),
    ),
    "timm se tanh": (lambda: timm_se(act_layer=nn.Tanh), "timm", 2, None),
    "timm se gelu": (lambda: timm_se(act_layer=nn.GELU), "timm", 2, lambda: SE(16, 1 / 4, activation="gelu")),
    "timm se with a BatchNorm": (lambda: timm_se(norm_layer=nn.BatchNorm2d), "timm", 2, None),
    "timm SqueezeExcite": (timm_squeeze_excite, "timm", 2, None),
    "timm SqueezeExcite silu": (lambda: timm_squeeze_excite(act_layer=nn.SiLU), "timm", 2, None),
    "timm SqueezeExcite hard": (
        lambda: timm_squeeze_excite(act_layer=nn.Hardswish, gate_layer=nn.Hardsigmoid), "timm", 2, None,
    ),
    "timm ese hard": (timm_effective, "timm", 2, lambda: ESE(16)),
    "timm ese sigmoid": (lambda: timm_effective(gate_layer="sigmoid"), "timm", 2, lambda: ESE(16, "sigmoid")),
    "timm hgnet ese": (hgnet_effective, "timm", 2, None),
    "timm eca": (timm_eca, "timm", 2, lambda: EfficientChannelAttention(16)),
    "torchvision se": (torchvision_se, "torchvision", 2, lambda: SE(16, 1 / 4)),
    "torchvision se hard": (
        lambda: torchvision_se(scale_activation=nn.Hardsigmoid), "torchvision", 2, lambda: SE(16, 1 / 4, gate="hard_sigmoid"),
    ),
    **{
        f"mmcv non-local {dims}d {mode}{' sub-sampled' if sub_sample else ''}": (
            lambda dims=dims, mode=mode, sub_sample=sub_sample: mmcv_non_local(dims, mode=mode, sub_sample=sub_sample),
            "mmcv", dims, lambda mode=mode, sub_sample=sub_sample: NL(16, mode=mode, sub_sample=sub_sample),
        )
        for dims in (1, 2, 3)
        for mode in NON_LOCAL_MODES
        for sub_sample in (False, True)
    },
    "mmcv non-local with a norm": (lambda: mmcv_non_local(norm_cfg={"type": "BN"}), "mmcv", 2, lambda: NL(16, norm="batch")),
    "mmcv non-local with another norm": (lambda: mmcv_non_local(norm_cfg={"type": "GN", "num_groups": 2}), "mmcv", 2, None),
}  # fmt: skip
CALLED = ("timm tanh", "timm se tanh", "timm se with a BatchNorm")
"""They have a layer that the operator does not compute; a BatchNorm is one in training."""
OURS = [name for name, (*_, ours) in BLOCKS.items() if ours is not None]


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


def wrapped(name: str, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return eager.randomise(nn.Sequential(nn.Identity(), BLOCKS[name][0]())).to(dtype)


@pytest.mark.parametrize("name", BLOCKS)
def test_outputs_and_gradients_stay(name):
    """And so do the object, its class, the parameters with their order, the keys of the state dict, and what it takes."""
    model = wrapped(name)
    block, former = model[1], type(model[1])
    x = feature_map(BLOCKS[name][2])
    want = results(model, x)
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    named, keys = [*model.named_parameters()], list(model.state_dict())
    report = replace_blocks(model)
    assert list(report.replaced) == ["1"]
    assert report.left == {}
    assert report.model is model
    assert model[1] is block
    assert isinstance(block, former)
    assert type(block) is not former
    assert list(report.called) == (["1"] if name in CALLED else [])
    assert all(a is b and name == other for (name, a), (other, b) in zip(named, model.named_parameters(), strict=True))
    assert list(model.state_dict()) == keys
    assert list(to_peer_state_dict(model)) == keys
    tolerance = 1e-6 if "hard" in name else 1e-8  # torch's hard sigmoid has 1/6 in single precision
    for got, expected in zip(results(model, x), want, strict=True):
        assert torch.allclose(got, expected, rtol=tolerance, atol=tolerance)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        zeros = torch.zeros_like(parameter)
        found, expected = (zeros if each is None else each for each in (parameter.grad, gradient))
        assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [name for name in BLOCKS if "non-local" not in name])
def test_the_operator_computes_it(name, monkeypatch):
    """Not the former class: that is called for nothing that the operator takes."""
    model = wrapped(name)
    replace_blocks(model)

    def unwanted(*_args, **_options):
        raise AssertionError("the former forward was called")

    monkeypatch.setattr(Peer, "_as_before", unwanted)
    assert model(feature_map(2)).isfinite().all()
    if name not in CALLED and "eca" not in name:
        assert model[1]._plain_layers() is not None


@pytest.mark.parametrize("name", OURS)
def test_state_dicts_of_our_blocks_both_ways(name):
    """The peer's state dict into a block of ours with strict=True, and back into the peer's."""
    make, peer, dims, ours = BLOCKS[name]
    theirs, block = wrapped(name), nn.Sequential(nn.Identity(), ours()).double()
    block.load_state_dict(theirs.state_dict(), strict=True)
    back = to_peer_state_dict(block, peer, spatial_dims=dims)
    assert {key: tuple(value.shape) for key, value in back.items()} == {
        key: tuple(value.shape) for key, value in theirs.state_dict().items()
    }
    assert all(torch.equal(back[key], value) for key, value in theirs.state_dict().items())
    fresh = nn.Sequential(nn.Identity(), make()).double()
    fresh.load_state_dict(back, strict=True)
    x = feature_map(dims)
    assert torch.allclose(fresh.eval()(x), block.eval()(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("peer", ["mmcv", "timm", "torchvision"])
@pytest.mark.parametrize("name", OURS)
def test_a_replaced_block_has_the_keys_of_any_peer(name, peer):
    """Those that a block of ours with the same weights has for that peer; without a peer its own."""
    _, own, dims, ours = BLOCKS[name]
    theirs, block = wrapped(name), nn.Sequential(nn.Identity(), ours()).double()
    block.load_state_dict(theirs.state_dict(), strict=True)
    replace_blocks(theirs)
    got, want = (to_peer_state_dict(model, peer, spatial_dims=dims) for model in (theirs, block))
    assert set(got) == set(want)
    assert all(torch.equal(got[key], value) for key, value in want.items() if own == peer or "non-local" not in name)
    assert all(value.data_ptr() == theirs.state_dict()[key].data_ptr() for key, value in to_peer_state_dict(theirs).items())


def test_a_block_with_two_names_has_the_peers_keys_twice():
    for block in (GlobalContextBlock(16, 1 / 4), mmcv_context()):
        model = nn.ModuleDict({"a": block, "b": block})
        replace_blocks(model)
        keys = to_peer_state_dict(model, "timm")
        assert {key.removeprefix("a.") for key in keys if key.startswith("a.")} == {
            key.removeprefix("b.") for key in keys if key.startswith("b.")
        }
        assert "b.conv_attn.weight" in keys


@pytest.mark.parametrize("name", [name for name in BLOCKS if "non-local" not in name or "2d embedded" in name])
def test_copies(name):
    """deepcopy, pickle, torch.save, half precision."""
    model = wrapped(name, torch.float32).eval()
    replace_blocks(model)
    kind = type(model[1])
    x = feature_map(BLOCKS[name][2], torch.float32)
    want = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(other[1]) is kind
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
    assert report.left == {"another": "it has the submodules of a known block, and computes something else"}
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
    assert report.model is block
    assert list(report.replaced) == [""]
    assert torch.allclose(block(x), want, atol=1e-5)
    shared = eager.randomise(nn.Sequential(*[eager.ContextBlock(16, 1 / 4)] * 2))
    want = shared(x)
    assert list(replace_blocks(shared).replaced) == ["0"]
    assert shared[0] is shared[1]
    assert torch.allclose(shared(x), want, atol=1e-4)


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
    timm = imitations.real("timm")
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
    models = imitations.real("torchvision.models")
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


@pytest.mark.parametrize(
    ("theirs", "block"),
    [
        (lambda: timm_squeeze_excite(act_layer=nn.SiLU), lambda: SE(16, 1 / 4, activation="silu")),
        (hgnet_effective, lambda: ESE(16, "sigmoid")),
    ],
    ids=["timm SqueezeExcite", "timm hgnet ese"],
)
def test_keys_that_load_and_are_not_given_back(theirs, block):
    """timm has several names for these layers; to_peer_state_dict writes those of SEModule and EffectiveSEModule."""
    theirs, block = eager.randomise(theirs()), block()
    block.load_state_dict(theirs.state_dict(), strict=True)
    x = feature_map(2, torch.float32)
    assert torch.allclose(block(x), theirs(x), atol=1e-6)


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
