"""Bad input by the raw operator, its shape function, the function, the reference and the module: the same words from all.

A message names the argument, what it must be and what it was. The words are in gcnet_ext/_checks.py; the rules of csrc/check.h,
which a call from C++ meets, name the operator and the argument. Every case of this file gives the words once more.
"""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from entry import OPTIONS, WEIGHTS, C, H, N
from entry import ones as t
from registry import IN_PLACE, OP_OF, OPERATORS, OPS
from schema import Flat
from torch.utils._pytree import tree_map_only

import gcnet_ext
from gcnet_ext import Branch, GlobalContextBlock
from gcnet_ext.ops._options import ACTIVATIONS, FINAL_ACTIVATIONS

GOOD = {name: operator.good for name, operator in OPERATORS.items()}
WITH_BRANCHES = [op for op, good in GOOD.items() if "scale_w1" in good]


def feature_map_cases():
    for op in GOOD:
        for x in (t(N, C), t(C), t()):
            shape = str(list(x.shape))
            yield op, {"x": x}, f"x must have at least 3 dimensions [N, C, *spatial], got shape {shape}"
        for dtype in (torch.int64, torch.int8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn):
            name = str(dtype).removeprefix("torch.")
            yield op, {"x": t(N, C, 4, 5, dtype=dtype)}, f"x must be float16, bfloat16, float32 or float64, got {name}"
        yield op, {"x": t(N, 0, 4, 5)}, "x must have at least one channel, got shape [2, 0, 4, 5]"
        if OP_OF[op].needs_positions:
            for x in (t(N, C, 0, 5), t(N, C, 4, 0), t(N, C, 0)):
                yield op, {"x": x}, f"x must have at least one position to pool over, got shape {list(x.shape)}"


def parameter_cases():
    """Each parameter: another device, another dtype, another size."""
    sizes = {
        "weight": [C],
        "mask_weight": [C],
        "bias": [1],
        "mask_bias": [1],
        "scale": [N, C],
        "shift": [N, C],
        "gamma": [C],
        "beta": [C],
    }
    sizes |= {name: list(tensor.shape) for name, tensor in WEIGHTS.items()}
    for op, good in GOOD.items():
        for name in good:
            if name not in sizes or good[name] is None:
                continue
            size = sizes[name]
            yield op, {name: t(*size, device="meta")}, f"{name} must be on x's device (cpu), got meta"
            for dtype in (torch.float64, torch.float16, torch.int64, torch.complex64):
                got = str(dtype).removeprefix("torch.")
                yield op, {name: t(*size, dtype=dtype)}, f"{name} must be float32 or x's dtype (float32), got {got}"
            wrong = [(*size[:-1], size[-1] + 1), (*size, 2)]
            if name not in ("scale_w1", "shift_w1"):  # their first size is the number of hidden units, whatever it is
                wrong.append((size[0] + 1, *size[1:]))
            if len(size) > 1:
                wrong.append((size[0],))
            for other in wrong:
                message = f"{name} must have shape {size}, trailing ones aside, got {list(other)}"
                yield op, {name: t(*other)}, message
    for op in (op for op, good in GOOD.items() if "weight" in good):
        yield op, {"weight": t(1, C + 1)}, f"weight must have shape [1, {C}], trailing ones aside, got [1, {C + 1}]"
        yield op, {"weight": t(1, C, 3, 3)}, f"weight must have shape [1, {C}], trailing ones aside, got [1, {C}, 3, 3]"
    # The first layer decides on the number of hidden units, and the rest of the branch must agree.
    for op in WITH_BRANCHES:
        yield op, {"scale_w1": t(H + 1, C)}, f"scale_b1 must have shape [{H + 1}], trailing ones aside, got [{H}]"
        yield op, {"shift_w1": t(0, C)}, f"shift_w1 must have at least one row, got shape [0, {C}]"
        yield op, {"shift_w1": t()}, "shift_w1 must have at least one row, got shape []"


def missing_cases():
    for op in (op for op, good in GOOD.items() if "weight" in good):
        yield op, {"weight": None}, "bias must come with a weight, got weight None"
    for op in WITH_BRANCHES:
        yield op, {"mask_weight": None}, "mask_bias must come with a mask_weight, got mask_weight None"
        yield op, dict.fromkeys(WEIGHTS), "scale_w1 or shift_w1 must be given, got None for both"
        for branch in ("scale", "shift"):
            names = [name for name in WEIGHTS if name.startswith(branch)]
            for present in names[1:]:
                change = {name: None for name in names if name != present}
                yield op, change, f"{present} must come with a {branch}_w1, got {branch}_w1 None"
            for present in (f"{branch}_norm_weight", f"{branch}_norm_bias", f"{branch}_b2"):
                change = {name: None for name in names if name not in (names[0], present)}
                yield op, change, f"{present} must come with a {branch}_w2, got {branch}_w2 None"
            change = {name: None for name in names if name != names[0]}
            yield op, change, f"{branch}_w1 must have shape [{C}, {C}], trailing ones aside, got [{H}, {C}]"


def gradient_cases():
    """The gradient of the output, and what forward left for backward."""
    for op in (op for op, good in GOOD.items() if "grad" in good):
        yield op, {"grad": t(N, C, 4, 5, device="meta")}, "grad must be on x's device (cpu), got meta"
        yield op, {"grad": t(N, C, 4, 5, dtype=torch.float64)}, "grad must be x's dtype (float32), got float64"
        yield op, {"grad": t(N, C, 4, 5, dtype=torch.int32)}, "grad must be x's dtype (float32), got int32"
        for grad in (t(N, C, 4, 4), t(N, C, 20), t(N, C, 5, 4), t(1, C, 4, 5), t(N, C, 4, 5, 1), t()):
            yield op, {"grad": grad}, f"grad must have shape [2, 8, 4, 5], got {list(grad.shape)}"
    for op, operator in OPERATORS.items():
        for name in operator.saved:
            size = list(GOOD[op][name].shape)
            yield op, {name: t(*size, device="meta")}, f"{name} must be on x's device (cpu), got meta"
            yield op, {name: t(*size, dtype=torch.bfloat16)}, f"{name} must be float32, got bfloat16"
            for other in ((size[0], size[1] + 1), (size[0] + 1, size[1]), (size[0], 0), (size[0],)):
                yield op, {name: t(*other)}, f"{name} must have shape {size}, got {list(other)}"
            x64 = {"x": GOOD[op]["x"].double()} | ({"grad": GOOD[op]["grad"].double()} if "grad" in GOOD[op] else {})
            yield op, x64, f"{next(iter(operator.saved))} must be float64, got float32"
        if "weight" in operator.arguments and "attention" in operator.saved:
            yield op, {"weight": None, "bias": None}, "attention must have shape [2, 0], got [2, 20]"
    for op in (op for op, good in GOOD.items() if "positive" in good):
        yield op, {"positive": t(N, 0, device="meta", dtype=torch.uint8)}, "positive must be on x's device (cpu), got meta"
        yield op, {"positive": t(N, 0)}, "positive must be uint8, got float32"
        yield op, {"positive": t(N, 20, dtype=torch.uint8)}, "positive must have shape [2, 0], got [2, 20]"
        yield op, {"final_activation": 1}, "positive must have shape [2, 24], got [2, 0]"
        channels_last = {"x": t(N, 4, 5, C).movedim(-1, 1), "final_activation": 1}
        yield op, channels_last, "positive must have shape [2, 20], got [2, 0]"


def map_cases():
    """What is added to the result, and which positions count."""
    for op, good in GOOD.items():
        if "residual" in good:
            yield op, {"residual": t(N, C, 4, 5, device="meta")}, "residual must be on x's device (cpu), got meta"
            yield op, {"residual": t(N, C, 4, 5, dtype=torch.float64)}, "residual must be x's dtype (float32), got float64"
            for other in (t(N, C, 4, 4), t(N, C, 20), t(1, C, 4, 5), t(N, 1, 4, 5), t(N, C, 4, 5, 1), t()):
                yield op, {"residual": other}, f"residual must have shape [2, 8, 4, 5], got {list(other.shape)}"
        if "valid" in good:
            yield op, {"valid": t(N, 4, 5, dtype=torch.bool, device="meta")}, "valid must be on x's device (cpu), got meta"
            for dtype in (torch.float32, torch.uint8):
                got = str(dtype).removeprefix("torch.")
                yield op, {"valid": t(N, 4, 5, dtype=dtype)}, f"valid must be bool, got {got}"
            for sizes in ((N, 20), (4, 5), (N, C, 4, 5), (N, 1, 4, 5), (3, 4, 5), (N, 5, 4), (N, 4, 1)):
                message = f"valid must have shape [2, 4, 5] or [1, 4, 5], got {list(sizes)}"
                yield op, {"valid": t(*sizes, dtype=torch.bool)}, message


def choice_cases():
    """Numbers that are none of a choice."""
    for op, good in GOOD.items():
        if "activation" in good:
            for number in (-1, 7):
                yield op, {"activation": number}, f"activation must be one of {ACTIVATIONS}, got {number}"
            for gate in ([], [0.2], [0.2, 0.5, 1.0]):
                yield op, {"hard_gate": gate}, f"hard_gate must have 2 elements, got {len(gate)}"
        if "final_activation" in good:
            for number in (-1, 2):
                yield op, {"final_activation": number}, f"final_activation must be one of {FINAL_ACTIVATIONS}, got {number}"


CASES = [
    pytest.param(op, change, f"gcnet_ext::{OPERATORS[op].public}: {message}", id=f"{op}-{message}")
    for cases in (feature_map_cases, parameter_cases, missing_cases, gradient_cases, map_cases, choice_cases)
    for op, change, message in cases()
]
FORWARD_CASES = [case for case in CASES if case.values[0] in OPS and not set(case.values[1]) & set(OPTIONS)]


def message_of(call) -> str:
    with pytest.raises(RuntimeError) as caught:
        call()
    return str(caught.value)


def raw(op, arguments):
    return Flat(op)(**arguments)


@pytest.mark.parametrize("op", GOOD)
def test_good_arguments(kernels, op):
    """Else every case below could pass for a wrong reason."""
    raw(op, GOOD[op])


@pytest.mark.parametrize("op", GOOD)
def test_names_of_the_arguments(kernels, op):
    """The tests below take the names of this file for those of the schema."""
    assert Flat(op).names == list(GOOD[op])


@pytest.mark.parametrize(("op", "change", "message"), CASES)
def test_raw(kernels, op, change, message):
    arguments = {**GOOD[op], **change}
    assert message_of(lambda: raw(op, arguments)) == message


@pytest.mark.parametrize(("op", "change", "message"), CASES)
def test_without_python(kernels, op, change, message):
    """As a call from C++ meets it, past the autograd key: the operator and the argument, and no more."""
    arguments = {**GOOD[op], **change}
    with torch.inference_mode():
        found = message_of(lambda: raw(op, arguments))
    operator, argument, *_ = message.split(": ", 1)[0], *message.split(": ", 1)[1].split()
    if not message.endswith("got meta"):  # a mixture goes to the shape function, which is Python
        assert found == f"{operator}: {argument} is not valid"


@pytest.mark.parametrize("op", WITH_BRANCHES)
def test_lists_of_a_wrong_length(kernels, op):
    flat = Flat(op)
    lists = [name for name, names in flat.lists.items() if names]
    assert lists
    for name in lists:
        for change in (lambda elements: elements[:-1], lambda elements: [*elements, elements[-1]], lambda _: []):
            nested = dict(zip(flat.lists, flat.nested(**GOOD[op]), strict=True))
            wanted, nested[name] = len(nested[name]), change(nested[name])
            for named in (nested, {key: on_meta(value) for key, value in nested.items()}):
                found = message_of(lambda named=named: flat.op(**named))
                expected = f"{name} must have {wanted} elements, got {len(nested[name])}"
                assert found == f"gcnet_ext::{OPERATORS[op].public}: {expected}"


def on_meta(value):
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), value)


@pytest.mark.parametrize(("op", "change", "message"), CASES)
def test_raw_on_meta(kernels, op, change, message):
    """The shape function, with all tensors on the meta device; the odd one of a mixture is then the one on the CPU."""
    mixed = message.endswith("got meta")
    arguments = {
        name: torch.empty_like(value, device="cpu" if mixed and name in change else "meta") if torch.is_tensor(value) else value
        for name, value in {**GOOD[op], **change}.items()
    }
    if mixed:
        message = message.replace("(cpu), got meta", "(meta), got cpu")
    assert message_of(lambda: raw(op, arguments)) == message


@pytest.mark.parametrize(("op", "change", "message"), FORWARD_CASES)
def test_function_and_reference(op, change, message):
    arguments = {**GOOD[op], **change}
    for function in (OPS[op].function, OPS[op].reference):
        assert message_of(lambda function=function: OPS[op].call(function, arguments)) == message


@pytest.mark.parametrize(
    ("choice", "message"),
    [({"activation": name}, f"activation must be one of {', '.join(ACTIVATIONS)}, got {name}") for name in ("tanh", "", "ReLU")]
    + [({"gate": name}, f"gate must be one of sigmoid, hard_sigmoid, got {name}") for name in ("tanh", "", "hard-sigmoid")]
    + [({"final_activation": value}, f"final_activation must be one of none, relu, got {value}") for value in ("silu", None, 1)]
    + [({"norm": value}, f"norm must be True or False, got {type(value).__name__}") for value in (None, 1, "yes", np.ones(3))]
    + [
        ({name: value}, f"{name} must be a number, got {type(value).__name__}")
        for name in ("eps", "slope", "gate_alpha", "gate_beta")
        for value in (None, True, "1e-5", [1e-5], np.ones(3))
    ]
    + [({"eps": 10**400}, "eps must be a number that a float can hold, got one beyond 1.8e\\+308")],
)
def test_unknown_choice(choice, message):
    """None is no epsilon: the operators take it for no norm."""
    for module in (gcnet_ext, reference):
        with pytest.raises(RuntimeError, match=f"^gcnet_ext::global_context: {message}$"):
            module.global_context(t(N, C, 4, 5), scale=Branch(t(C, C)), **choice)


def overlapping(*sizes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two dense maps, the second of which begins one row behind the first."""
    memory = torch.randn(sizes[0] * sizes[1] * sizes[2] * sizes[3] + sizes[3])
    return memory[: -sizes[3]].view(sizes), memory[sizes[3] :].view(sizes)


@pytest.mark.parametrize("op", [name for name in IN_PLACE if "residual" in GOOD[name]])
def test_residual_that_is_overwritten_before_it_is_read(kernels, op):
    x, residual = overlapping(N, C, 4, 5)
    words = "residual must be x itself or have memory of its own where x is overwritten, got one that shares a part of x's"
    arguments = {**GOOD[op], "x": x, "residual": residual}
    before = x.clone()
    assert message_of(lambda: raw(op, arguments)) == f"gcnet_ext::{op}: {words}"
    with torch.inference_mode():
        assert message_of(lambda: raw(op, arguments)) == f"gcnet_ext::{op}: residual is not valid"
    assert torch.equal(x, before)
    of = IN_PLACE[op]
    assert message_of(lambda: of.call(of.function, arguments, inplace=True)) == f"gcnet_ext::{op}: {words}"


# ---- the module --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replaced", [False, True], ids=["fused", "with a replaced submodule"])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (t(N, 9, 4, 5), "x must have 8 channels (inplanes), got shape [2, 9, 4, 5]"),
        (t(C, 4, 5), "x must have 8 channels (inplanes), got shape [8, 4, 5]"),
        (t(N, C), "x must have at least 3 dimensions [N, C, *spatial], got shape [2, 8]"),
        (t(C), "x must have at least 3 dimensions [N, C, *spatial], got shape [8]"),
        (t(), "x must have at least 3 dimensions [N, C, *spatial], got shape []"),
        (t(N, C, 4, 5, dtype=torch.int64), "x must be float16, bfloat16, float32 or float64, got int64"),
        (t(N, C, 4, 5, dtype=torch.complex64), "x must be float16, bfloat16, float32 or float64, got complex64"),
        (t(N, C, 0, 5), "x must have at least one position to pool over, got shape [2, 8, 0, 5]"),
        (t(N, C, 4, 5, device="meta"), "weight must be on x's device (meta), got cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_block(x, message, replaced):
    block = GlobalContextBlock(C, 0.5)
    if replaced:
        block.channel_mul_conv[2] = torch.nn.Tanh()
    assert message in message_of(lambda: block(x))


def test_block_of_another_dtype():
    block = GlobalContextBlock(C, 0.5, dtype=torch.bfloat16)
    assert "mask_weight must be float32 or x's dtype (float32), got bfloat16" in message_of(lambda: block(t(N, C, 4, 5)))


@pytest.mark.parametrize(
    "fusion_types", ["channel", "mul", "", (), [], ("channel_mul", "add"), ("channel_mul", None), "channel_concat"]
)
def test_unknown_fusion(fusion_types):
    """A substring of a name is no name: 'channel' once built an identity without a word."""
    with pytest.raises(ValueError, match=r"fusion_types must be .*'channel_add'.*'channel_mul'.*got") as caught:
        GlobalContextBlock(C, 0.5, fusion_types=fusion_types)
    assert repr((fusion_types,) if isinstance(fusion_types, str) else tuple(fusion_types)) in str(caught.value)


@pytest.mark.parametrize("pooling_type", ["max", "", None, "attention", "at"])
def test_unknown_pooling(pooling_type):
    with pytest.raises(ValueError, match=r"pooling_type must be .*'att'.*'avg'.*got") as caught:
        GlobalContextBlock(C, 0.5, pooling_type)
    assert repr(pooling_type) in str(caught.value)


@pytest.mark.parametrize(("channels", "ratio"), [(8, 1 / 16), (15, 1 / 16), (8, 0), (8, -1), (1, 0.99)])
def test_ratio_without_hidden_units(channels, ratio):
    with pytest.raises(ValueError, match=r"inplanes \* ratio must be at least 1") as caught:
        GlobalContextBlock(channels, ratio)
    assert f"got {channels} * {ratio}" in str(caught.value)
