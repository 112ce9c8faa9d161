"""The blocks on inputs of any strides and values: the reference's result, from a new block and from one that was used before.

And with anything as argument of the constructor or as input: an output like the input, or an error that names the argument.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import eager
import fuzzing
import grid
import numpy as np
import pytest
import torch
from fuzzing import Arguments, Drawn, compare, examples, outcome, refused
from hypothesis import given
from hypothesis import strategies as st
from registry import OPERATORS, OPS
from torch import Tensor, nn

from gcnet_ext import GlobalContextBlock, NonLocalBlock, SimplifiedNonLocalBlock, SqueezeExcitation
from gcnet_ext.ops._options import ACTIVATIONS, FINAL_ACTIVATIONS

BOTTLENECK = {
    "planes": (None, 1, 4),
    "activation": ("relu", *ACTIVATIONS),
    "slope": (0.01, 0.5),
    "gate": ("sigmoid", "hard_sigmoid"),
    "gate_alpha": (1 / 6, 0.2),
    "gate_beta": (0.5,),
}
FINAL = {"final_activation": tuple(FINAL_ACTIVATIONS)}
MODULES: dict[type[nn.Module], dict[str, tuple[Any, ...]]] = {
    GlobalContextBlock: {
        "inplanes": (6, 1),
        "ratio": (1.0,),
        "pooling_type": ("att", "avg"),
        "fusion_types": ("channel_add", ["channel_mul"], ("channel_mul", "channel_add")),
        "norm": (True, False),
        "eps": (1e-5, 1e-3),
        **BOTTLENECK,
        **FINAL,
        "inplace": (False,),
    },
    SqueezeExcitation: {"inplanes": (6, 1), "ratio": (1.0,), **BOTTLENECK, "bias": (True, False), **FINAL, "inplace": (False,)},
    SimplifiedNonLocalBlock: {"inplanes": (6, 1), **FINAL, "inplace": (False,)},
    NonLocalBlock: {
        "inplanes": (6, 1),
        "reduction": (1, 2),
        "mode": ("gaussian", "embedded_gaussian", "dot_product", "concatenation"),
        "sub_sample": (False, True),
        "use_scale": (True, False),
        "norm": (None,),
    },
}
# What x or a parameter is called in a message
NAMES = (*OPERATORS["global_context"].arguments, "weight", "scale")
FLAGS = ("norm", "bias", "inplace", "sub_sample", "use_scale")


@st.composite
def feature_maps(draw: st.DrawFn, channels: int) -> Drawn:
    spatial = draw(st.lists(st.integers(0, 5) | st.just(2), min_size=1, max_size=4))
    return draw(fuzzing.tensors((draw(st.integers(0, 3)), channels, *spatial), draw(st.sampled_from(grid.FLOATING))))


OF_THE_CALL = ("x", "residual", "valid")


def called(module: nn.Module) -> Callable[[Arguments], Tensor]:
    def call(a: Arguments) -> Tensor:
        parameters = {name: value for name, value in a.items() if name not in OF_THE_CALL}
        return torch.func.functional_call(module, parameters, tuple(a[name] for name in OF_THE_CALL if name in a))

    return call


@st.composite
def arguments_beside(draw: st.DrawFn, x: Drawn) -> Arguments:
    """A residual and which positions count, each in some calls; if it is not there it is None."""
    residual = draw(st.none() | fuzzing.tensors(x.sizes, x.dtype))
    samples, _, *spatial = x.sizes
    valid = draw(st.none() | fuzzing.tensors((draw(st.sampled_from((samples, 1))), *spatial), torch.bool))
    return {"residual": residual, "valid": valid}


LAYERS = {  # what the operator calls the parameters of a layer
    "conv_mask": ("mask_weight", "mask_bias"),
    "conv_out": ("shift_w1", "shift_b1"),
    "fc1": ("scale_w1", "scale_b1"),
    "fc2": ("scale_w2", "scale_b2"),
    **{
        f"channel_{fusion}_conv.{index}": (f"{branch}_{weight}", f"{branch}_{bias}")
        for fusion, branch in (("mul", "scale"), ("add", "shift"))
        for index, weight, bias in ((0, "w1", "b1"), (1, "norm_weight", "norm_bias"), (3, "w2", "b2"))
    },
}


def truth(
    module: nn.Module,
    options: Arguments,
    block: Callable[[Arguments], Tensor] = lambda a: OPERATORS["global_context"].formula(a)[0],
) -> Callable[[Arguments], Tensor]:
    """What the block computes of x and its parameters, both by name."""
    if isinstance(module, NonLocalBlock):
        names = ("reduction", "mode", "sub_sample", "use_scale")
        theirs = eager.NonLocal(module.inplanes, **{name: options[name] for name in names})
        return lambda a: called(theirs)({name.replace(".conv.", "."): value for name, value in a.items()})

    def call(a: Arguments) -> Tensor:
        arguments = dict.fromkeys(OPERATORS["global_context"].arguments)
        for name, value in a.items():
            layer, _, parameter = name.rpartition(".")
            arguments[LAYERS[layer][parameter == "bias"] if layer else name] = value
        normed = isinstance(module, GlobalContextBlock) and options.get("norm", False)
        hard_gate = [options["gate_alpha"], options["gate_beta"]] if options.get("gate") == "hard_sigmoid" else None
        activation = ACTIVATIONS[options.get("activation", "relu")]
        norm_eps = options.get("eps", 1e-5) if normed else None
        chosen = {"norm_eps": norm_eps, "activation": activation, "hard_gate": hard_gate, "slope": options.get("slope")}
        return block({**arguments, **chosen, "final_activation": FINAL_ACTIVATIONS[options["final_activation"]]})

    return call


def run_module(call: Callable[[Arguments], Tensor], a: Arguments) -> list[Tensor]:
    """The output and the gradients of x, of a residual and of every parameter from a gradient of ones."""
    leaves = {name: value.detach().requires_grad_() for name, value in a.items() if torch.is_tensor(value) and name != "valid"}
    out = call({**a, **leaves})
    grads = dict(zip(leaves, torch.autograd.grad(out.sum(dtype=torch.float64), list(leaves.values())), strict=True))
    if "conv_mask.bias" in grads:  # it cancels: its gradient is zero whatever the rest is
        grads["conv_mask.bias"] = torch.zeros_like(grads["conv_mask.bias"])
    return [out.detach(), *grads.values()]


def valid(kind: type[nn.Module], module: nn.Module, x: Drawn) -> bool:
    spatial = x.sizes[2:]
    if kind is not NonLocalBlock:
        return 0 not in spatial
    pooled = spatial if len(spatial) < 3 else spatial[1:]
    return 0 not in spatial and len(spatial) <= 3 and not (module.sub_sample and min(pooled) < 2)


@pytest.mark.parametrize("kind", MODULES)
@given(data=st.data())
@examples(60)
def test_modules(backend, kind, data):
    options = {name: data.draw(st.sampled_from(values)) for name, values in MODULES[kind].items()}
    module = eager.randomise(kind(**options), data.draw(st.integers(0, 99)))
    x = data.draw(feature_maps(options["inplanes"]))
    if kind is NonLocalBlock:  # torch's attention has its own ways with infinities
        x = x._replace(std=min(x.std, 30.0), special=tuple(value for value in x.special if abs(value) < 1))
    if data.draw(st.booleans()):
        module = module.to(x.dtype)
    module = module.to(backend.device)
    beside = {} if kind is NonLocalBlock else fuzzing.made(data.draw(arguments_beside(x)), backend.to)
    arguments = {"x": x.make(backend.to), **beside, **dict(module.named_parameters())}
    found = outcome(lambda: tuple(run_module(called(module), arguments)))
    again = outcome(lambda: tuple(run_module(called(module), arguments)))
    if isinstance(found, Exception):
        assert str(again) == str(found)
    if not refused(found, NAMES, sound=valid(kind, module, x)):
        assert all(torch.equal(*map(fuzzing.bits, pair)) for pair in zip(found, again, strict=True))
        # The matrix products of the non-local block are torch's, in the dtype of its parameters; the last sum is in that of x.
        acc = max((next(module.parameters()).dtype, x.dtype), key=lambda dtype: torch.finfo(dtype).eps)
        blocks = (truth(module, options), truth(module, options, OPS["global_context"].model))
        formula, model = (functools.partial(run_module, block) for block in blocks)
        compare(found, formula, arguments, model, acc if kind is NonLocalBlock else None)


@pytest.mark.parametrize("kind", MODULES)
@given(data=st.data())
@examples(60)
def test_modules_with_anything(backend, kind, data):
    """One argument of the constructor is anything, or the input is."""
    options = {name: data.draw(st.sampled_from(values)) for name, values in MODULES[kind].items()}
    name = data.draw(st.sampled_from(("x", *options)))
    if name != "x":
        options[name] = data.draw(fuzzing.WITH_A_TRUTH_VALUE if name in FLAGS else fuzzing.NO_TENSOR).make()
    x = data.draw(fuzzing.ANYTHING if name == "x" else feature_maps(6)).make(backend.to)
    found = outcome(lambda: kind(**options).to(backend.device)(x))
    if not refused(found, (*NAMES, *options), sound=False):
        assert found[0].shape == x.shape
        assert found[0].dtype == x.dtype


# ---- what it has found -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_the_non_local_block_takes_floats_alone(dtype):
    """It once computed in float32 and cut the result down to the dtype of x."""
    with pytest.raises(RuntimeError, match="x must be float16, bfloat16, float32 or float64"):
        NonLocalBlock(6)(torch.ones(2, 6, 3, 3, dtype=dtype))


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((2, 6, 0, 3), {}, "x must have at least one position"),
        ((2, 6, 1, 1), {"sub_sample": True}, "x must have at least 2 positions wherever sub_sample pools them"),
        ((2, 6, 3, 1), {"sub_sample": True}, "x must have at least 2 positions wherever sub_sample pools them"),
        ((2, 6, 3, 3), {"device": "meta"}, r"x must be on the device of the parameters \(meta\), got cpu"),
    ],
)
def test_the_non_local_block_names_x(sizes, options, message):
    with pytest.raises(RuntimeError, match=message):
        NonLocalBlock(6, **options)(torch.ones(sizes))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            GlobalContextBlock,
            {"ratio": float("inf")},
            "ratio must be at most 1: .*, got inf; for more units than channels pass",
        ),
        (GlobalContextBlock, {"ratio": 10**400}, "ratio must be at most 1: "),
        (GlobalContextBlock, {"ratio": float("-inf")}, r"inplanes \* ratio must be at least 1"),
        (GlobalContextBlock, {"ratio": float("nan")}, "ratio must be a number, got nan"),
        (GlobalContextBlock, {"ratio": None}, "ratio must be a number, got None"),
        (SqueezeExcitation, {"ratio": "1/16"}, r"ratio must be a number, got the string '1/16'; .* YAML.*, 0\.0625"),
        (GlobalContextBlock, {"inplanes": "6", "ratio": 1.0}, "inplanes must be a whole number, got '6'"),
        (SimplifiedNonLocalBlock, {"inplanes": 6.0}, "inplanes must be a whole number, got 6.0"),
        (SimplifiedNonLocalBlock, {"inplanes": True}, "inplanes must be a whole number, got True"),
        (NonLocalBlock, {"inplanes": -1}, "inplanes must be at least 1, got -1"),
        (GlobalContextBlock, {"inplanes": None, "in_channels": "6"}, "in_channels must be a whole number, got '6'"),
        (SimplifiedNonLocalBlock, {"inplanes": 0}, "inplanes must be at least 1, got 0"),
        (NonLocalBlock, {"reduction": 0}, "reduction must be at least 1, got 0"),
        (SqueezeExcitation, {"planes": 0}, "planes must be at least 1, got 0"),
        (NonLocalBlock, {"reduction": 0.5}, "reduction must be a whole number, got 0.5"),
        (GlobalContextBlock, {"ratio": 1.0, "fusion_types": None}, "fusion_types must be one or more of"),
        (GlobalContextBlock, {"ratio": 1.0, "fusion_types": [[]]}, "fusion_types must be one or more of"),
        (SqueezeExcitation, {"gate": np.ones(2)}, "gate must be one of"),
    ],
)
def test_constructors_name_what_is_wrong(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**{"inplanes": 6, **options})


@pytest.mark.parametrize("kind", [GlobalContextBlock, SqueezeExcitation])
@pytest.mark.parametrize("number", [16, 16.0, 2])
def test_a_ratio_is_no_reduction_and_no_number_of_units(kind, number):
    """As the second argument others have either of them; with a ratio of 16 there would be 1024 hidden units."""
    n = int(number)
    message = (
        f"^ratio must be at most 1: it is hidden units per channel, such as 1/16, got {number}; for {n} hidden units pass "
        f"planes={n}, for a reduction by {n} ratio=1/{n}$"
    )
    with pytest.raises(ValueError, match=message):
        kind(64, number)
    assert kind(64, number, planes=80).planes == 80
    assert kind(64, 1).planes == 64


BLOCKS = [GlobalContextBlock, SqueezeExcitation, SimplifiedNonLocalBlock, NonLocalBlock]


@pytest.mark.parametrize("kind", BLOCKS)
def test_in_channels_is_inplanes(kind):
    """mmcv's builders pass it by that name."""
    torch.manual_seed(0)
    block = kind(in_channels=32)
    torch.manual_seed(0)
    same = kind(32)
    assert block.inplanes == 32
    assert repr(block) == repr(same)
    for (name, ours), theirs in zip(block.state_dict().items(), same.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    with pytest.raises(TypeError, match=r"^inplanes and in_channels are one argument with two names, got both: 32 and 16$"):
        kind(32, in_channels=16)
    with pytest.raises(TypeError, match=r"^inplanes must be given: the number of channels of the input$"):
        kind()


def test_what_the_blocks_start_as():
    """As their docstrings have it."""
    x = torch.randn(2, 32, 4, 4)
    assert torch.equal(GlobalContextBlock(32, 1 / 4)(x), x / 2)
    assert torch.equal(GlobalContextBlock(32, 1 / 4, fusion_types="channel_add")(x), x)
    assert ((SqueezeExcitation(32)(x) / x - 0.5).abs() < 0.25).all()


LAST = "; if the channels are its last dimension, as with tokens and channels-last arrays, pass x.movedim(-1, 1)"
FIRST = "; if its first dimension is the channels and there is no batch, pass x.unsqueeze(0)"


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(
    ("sizes", "hint"),
    [
        ((2, 196, 64), LAST),
        ((2, 7, 5, 64), LAST),
        ((2, 3, 7, 5, 64), LAST),
        ((64, 7, 5), FIRST),
        ((64, 196), FIRST),
        ((64, 3, 64), LAST),
        ((2, 3, 7, 5), ""),
        ((64, 3), FIRST),
    ],
    ids=str,
)
def test_shapes_with_the_channels_elsewhere_get_a_hint(kind, sizes, hint):
    x = torch.ones(sizes)
    block = kind(64)
    with pytest.raises(RuntimeError) as caught:
        block(x)
    assert str(caught.value) == f"x must have 64 channels (inplanes), got shape {list(sizes)}{hint}"
    if hint:
        block(x.movedim(-1, 1) if hint == LAST else x.unsqueeze(0))


@pytest.mark.parametrize("kind", MODULES)
def test_an_input_that_is_no_tensor(kind):
    with pytest.raises(TypeError, match=r"^x must be a Tensor, got list$"):
        kind(**{name: values[0] for name, values in MODULES[kind].items()})([1.0])
