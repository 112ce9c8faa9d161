"""What a user or a library has put on a block is there after replace_blocks, and works as it did."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict

import eager
import imitations
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from gcnet_ext import GlobalContextBlock, SqueezeExcitation, replace_blocks

pytestmark = pytest.mark.usefixtures("libraries")


def pasted(**options):
    return eager.ContextBlock(16, 1 / 4, **options)


def mmcv_context():
    return imitations.library("mmcv.cnn").ContextBlock(16, 1 / 4, fusion_types=("channel_add", "channel_mul"))


def mmcv_non_local():
    return imitations.library("mmcv.cnn").NonLocal2d(16, reduction=1)


def timm_context():
    return imitations.library("timm.layers").GlobalContext(16, rd_ratio=1 / 4, fuse_add=True)


def timm_se(**options):
    return imitations.library("timm.layers").SEModule(16, rd_ratio=1 / 4, rd_divisor=1, **options)


def torchvision_se():
    return imitations.library("torchvision.ops").SqueezeExcitation(16, 4)


MAKERS = {make.__name__: make for make in (pasted, mmcv_context, mmcv_non_local, timm_context, timm_se, torchvision_se)}
FUSED = [name for name in MAKERS if name != "mmcv_non_local"]
OURS = {
    "GlobalContextBlock": lambda: GlobalContextBlock(16, 1 / 4, fusion_types=("channel_mul", "channel_add")),
    "SqueezeExcitation": lambda: SqueezeExcitation(16, 1 / 4),
}
X = torch.randn(2, 16, 5, 4, generator=torch.Generator().manual_seed(0))


def model_of(name: str, **options) -> nn.Sequential:
    return eager.randomise(nn.Sequential((MAKERS | OURS)[name](**options)))


def first_layer(block: nn.Module) -> nn.Conv2d:
    """The first layer of a branch: a convolution to the hidden units."""
    return next(part for part in block.modules() if isinstance(part, nn.Conv2d) and part.out_channels > 1)


def hidden_layers(block: nn.Module) -> list[tuple[nn.Conv2d, nn.LayerNorm | None, nn.Conv2d]]:
    """First layer, norm and last layer of each branch of four hidden units."""
    layers = [part for part in block.modules() if isinstance(part, (nn.Conv2d, nn.LayerNorm))]
    firsts = [i for i, part in enumerate(layers) if isinstance(part, nn.Conv2d) and part.out_channels == 4]
    with_norm = any(isinstance(part, nn.LayerNorm) for part in layers)
    return [(layers[i], layers[i + 1] if with_norm else None, layers[i + 1 + with_norm]) for i in firsts]


# ---- what is on the block ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_attributes_buffers_and_submodules(name):
    model = model_of(name)
    block = model[0]
    block.i, block.f, block.type, block.note = 3, [-1, 4], "GC", {"any": "thing"}  # as YOLO's parse_model
    block.register_buffer("step", torch.tensor([7]))
    block.register_buffer("scratch", torch.ones(2), persistent=False)
    kept = dict(vars(block))
    assert len(replace_blocks(model).replaced) == 1
    assert {key: value for key, value in vars(block).items() if key in kept} == kept
    assert list(model.state_dict()) == [*(f"0.{key}" for key in block.state_dict())]
    assert "0.step" in model.state_dict()
    assert "0.scratch" not in model.state_dict()
    if name in ("mmcv_context", "timm_se", "torchvision_se"):  # of a class that nobody vouches for it would be left
        other = model_of(name)
        other[0].probe = nn.Linear(2, 2)
        other[0].register_parameter("temperature", nn.Parameter(torch.ones(3)))
        assert len(replace_blocks(other).replaced) == 1
        assert {"0.probe.weight", "0.temperature"} <= set(other.state_dict())


def note(seen: list, word: str):
    return lambda *_: seen.append(word)


@pytest.mark.parametrize("name", MAKERS)
def test_hooks_of_every_kind_fire_as_before(name):
    """Of the block: those of forward and backward, of the state dict, with their options; and their handles remove them."""
    counts = []
    for replaced in (False, True):
        seen: list[str] = []
        model = model_of(name)
        block = model[0]
        handles = [
            block.register_forward_hook(note(seen, "forward")),
            block.register_forward_hook(lambda module, args, kwargs, out, seen=seen: seen.append("kwargs"), with_kwargs=True),
            block.register_forward_hook(note(seen, "always"), always_call=True),
            block.register_forward_pre_hook(note(seen, "before")),
            block.register_full_backward_hook(note(seen, "backward")),
            block.register_full_backward_pre_hook(note(seen, "before backward")),
            block.register_state_dict_pre_hook(note(seen, "before state")),
            block.register_state_dict_post_hook(note(seen, "state")),
            block.register_load_state_dict_pre_hook(note(seen, "before load")),
            block.register_load_state_dict_post_hook(note(seen, "load")),
        ]
        if replaced:
            assert len(replace_blocks(model).replaced) == 1
            assert seen == [], "a hook was called by replace_blocks"
        model(X.clone().requires_grad_()).sum().backward()
        model.load_state_dict(model.state_dict())
        with pytest.raises((RuntimeError, ValueError)):
            model(X[:, :3])  # a hook with always_call fires all the same
        counts.append(list(seen))
        for handle in handles:
            handle.remove()
        seen.clear()
        model(X).sum().backward()
        model.load_state_dict(model.state_dict())
        assert seen == []
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", MAKERS)
def test_hooks_below_the_block_fire_before_and_after(name):
    """Of every module that the block calls; and without them it is fused again."""
    for when in ("before", "after"):
        counts = []
        for replaced in (False, True):
            model = model_of(name)
            seen: dict[str, int] = {}
            handles = []

            def watch(model=model, seen=seen, handles=handles):
                for path, part in model[0].named_modules():
                    if path:
                        handles.append(
                            part.register_forward_hook(lambda *_, path=path: seen.update({path: seen.get(path, 0) + 1}))
                        )

            if when == "before":
                watch()
            if replaced:
                report = replace_blocks(model)
                assert not seen, "a probe was seen"
                if when == "before" and not report.replaced:
                    assert "must be called" in report.left["0"] or "not a plain" in report.left["0"]
                model(X)
                seen.clear()
            if when == "after":
                watch()
            want = model(X)
            counts.append(dict(seen))
            for handle in handles:
                handle.remove()
            assert torch.allclose(model(X), want, atol=1e-5)
            assert seen == counts[-1]
        assert counts[0] == counts[1]


# ---- parameters --------------------------------------------------------------------------------------------------------------


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, eps=1e-2),  # the mask's bias has a gradient of rounding
    "adamw, two groups": lambda parameters: torch.optim.AdamW(
        [{"params": parameters[::2]}, {"params": parameters[1::2], "weight_decay": 0.5}], lr=0.01, eps=1e-2
    ),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MAKERS)
def test_an_optimizer_goes_on(name, optimizer):
    """One made before, and one made after that loads the state from before."""
    model = model_of(name)
    before = OPTIMIZERS[optimizer](list(model.parameters()))
    step(model, before)
    ours = copy.deepcopy(model)
    kept = OPTIMIZERS[optimizer](list(ours.parameters()))
    kept.load_state_dict(copy.deepcopy(before.state_dict()))
    later = copy.deepcopy(model)
    replace_blocks(ours)
    replace_blocks(later)
    made_after = OPTIMIZERS[optimizer](list(later.parameters()))
    made_after.load_state_dict(copy.deepcopy(before.state_dict()))
    for _ in range(2):
        step(model, before)
        step(ours, kept)
        step(later, made_after)
    for want, *got in zip(*(m.parameters() for m in (model, ours, later)), strict=True):
        assert all(torch.allclose(each, want, atol=1e-4) for each in got)


@pytest.mark.parametrize("name", MAKERS)
def test_averages_by_name_and_by_order_go_on(name):
    """A copy that was made before is averaged by names (as ultralytics does) and by order (as timm does)."""
    model = model_of(name)
    by_name, by_order = copy.deepcopy(model), copy.deepcopy(model)
    replace_blocks(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        for key, value in by_name.state_dict().items():
            value.lerp_(model.state_dict()[key], 0.5)
        for mean, value in zip(by_order.state_dict().values(), model.state_dict().values(), strict=True):
            mean.lerp_(value, 0.5)
    assert all(torch.allclose(2 * value, 4 * model.state_dict()[key] / 3) for key, value in by_name.state_dict().items())
    assert all(torch.equal(value, by_order.state_dict()[key]) for key, value in by_name.state_dict().items())


@pytest.mark.parametrize("name", MAKERS)
def test_frozen_device_dtype_and_mode(name):
    model = model_of(name).double().eval()
    frozen = next(model.parameters()).requires_grad_(False)
    next(model[0].children()).train()
    modes = [part.training for part in model.modules()]
    replace_blocks(model)
    assert [part.training for part in model.modules()] == modes
    assert [p is frozen for p in model.parameters() if not p.requires_grad] == [True]
    assert {p.dtype for p in model.parameters()} == {torch.float64}


# ---- layers that are not the plain ones --------------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def spectral(block):
    parametrizations.spectral_norm(first_layer(block))


def weight_norm(block):
    parametrizations.weight_norm(first_layer(block))


def doubled(block):
    parametrize.register_parametrization(first_layer(block), "weight", Doubled())


def pruned(block):
    prune.l1_unstructured(first_layer(block), "weight", 0.5)


def old_weight_norm(block):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(first_layer(block))


def tied(block):
    """One weight in both layers of a branch, or in both branches."""
    convolutions = [part for part in block.modules() if isinstance(part, nn.Conv2d)]
    first = first_layer(block)
    for other in convolutions:
        if other is not first and other.weight.shape == first.weight.shape:
            other.weight = first.weight
    first.bias = next(part for part in convolutions if part is first).bias


def without_bias(block):
    for part in block.modules():
        if isinstance(part, nn.Conv2d):
            part.bias = None


def observed(block):
    block.qconfig = torch.ao.quantization.get_default_qconfig("onednn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.prepare(block, inplace=True)


LAYERS = {change.__name__: change for change in (
    spectral, weight_norm, doubled, pruned, old_weight_norm, tied, without_bias, observed,
)}  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", LAYERS)
@pytest.mark.parametrize("name", MAKERS)
def test_changed_layers(name, change, when):
    """Converted or left with a reason: output and gradients are those of the block that was not replaced."""
    results = []
    for replaced in (False, True):
        model = model_of(name).eval()
        if when == "after":
            if replaced:
                replace_blocks(model)
            model(X)
        torch.manual_seed(0)  # a spectral norm begins with random vectors
        LAYERS[change](model[0])
        if when == "before" and replaced:
            report = replace_blocks(model)
            assert len(report.replaced) + len(report.left) == 1
        x = X.clone().requires_grad_()
        out = model(x)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
        keys = list(model.state_dict())
        results.append(keys)
    assert results[1] == results[3]
    for want, got in zip(results[0], results[2], strict=True):
        assert torch.allclose(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MAKERS)
def test_on_the_meta_device(name):
    """Replaced before there are weights, as with large models; materialised later."""
    with torch.device("meta"):
        model = nn.Sequential(MAKERS[name]())
    assert len(replace_blocks(model).replaced) == 1
    truth = model_of(name)
    model.to_empty(device="cpu").load_state_dict(truth.state_dict())
    assert torch.allclose(model(X), truth(X), atol=1e-5)


@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("all_attributes", [False, True])
@pytest.mark.parametrize("name", [*FUSED, *OURS])
def test_structured_pruning_in_place(name, all_attributes, ran_before):
    """Hidden units are cut out of the layers: the weights count, whatever the attributes still say."""
    results = []
    for replaced in (False, True):
        model = model_of(name)
        if replaced:
            replace_blocks(model)
        if ran_before:
            model(X)
        keep = torch.tensor([0, 2, 3])
        for first, norm, last in hidden_layers(model[0]):
            first.weight, first.bias = (nn.Parameter(each.data[keep]) for each in (first.weight, first.bias))
            last.weight = nn.Parameter(last.weight.data[:, keep])
            if norm is not None:
                norm.weight, norm.bias = (nn.Parameter(each.data[keep]) for each in (norm.weight, norm.bias))
                if replaced is False or all_attributes:
                    norm.normalized_shape = (3, *norm.normalized_shape[1:])
            if all_attributes:
                first.out_channels, last.in_channels = 3, 3
        results.append(model(X))
        if replaced:
            assert model[0]._plain_layers() is not None
    assert torch.allclose(*results, atol=1e-5)


# ---- no trace ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_the_call_leaves_no_trace(name):
    """No random number is drawn, no version moves, no gradient appears, no forward of the user's block is called."""
    model = model_of(name)
    calls = []
    model[0].register_forward_pre_hook(lambda *_: calls.append("block"))
    first_layer(model[0]).register_forward_hook(lambda *_: calls.append("layer"))
    versions = [p._version for p in model.parameters()]
    values = [p.detach().clone() for p in model.parameters()]
    state = torch.random.get_rng_state()
    hooks = [OrderedDict(part._forward_hooks) for part in model.modules()]
    assert len(replace_blocks(model).replaced) == 1
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [p._version for p in model.parameters()] == versions
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), values, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert [part._forward_hooks for part in model.modules()] == hooks
    assert calls == []


# ---- what it takes and refuses -----------------------------------------------------------------------------------------------


INPUTS = {
    "unbatched": X[0],
    "one dimension": X.flatten(2),
    "three dimensions": X.unsqueeze(2),
    "too few channels": X[:, :3],
    "no image": X[:0],
    "no position": X[:, :, :0],
    "another dtype": X.double(),
    "whole numbers": X.to(torch.int64),
    "no tensor": "x",
    "nothing": None,
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", MAKERS)
def test_takes_and_refuses_what_it_did(name, kind):
    """The same output, or an error of the same class."""
    model = model_of(name)
    found = []
    for replaced in (False, True):
        if replaced:
            replace_blocks(model)
            model(X)
        try:
            found.append(model(INPUTS[kind]))
        except Exception as error:
            found.append(error)
    want, got = found
    if isinstance(want, Exception):
        if kind in ("no image", "no position") and isinstance(got, torch.Tensor):
            return  # an empty output instead of an error of a layer
        assert isinstance(got, (type(want), TypeError)), f"{want!r} and {got!r}"
    else:
        assert isinstance(got, torch.Tensor), repr(got)
        assert torch.allclose(got, want, atol=1e-5, equal_nan=True)


def test_a_keyword():
    model = model_of("torchvision_se")
    block = model[0]
    want = block(X)
    replace_blocks(model)
    assert torch.allclose(block(input=X), want, atol=1e-6)
