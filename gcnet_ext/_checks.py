"""What the operators accept, in words. Every error names the argument, what it must be and what it was.

The reference and the shape functions call these, and so does whoever called a kernel that refused its arguments: the rules of
`csrc/check.h` name the argument and no more. `tests/properties/test_bad_input.py` compares the two.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _bits
from ._arguments import (
    ACTIVATIONS,
    FINAL_ACTIVATIONS,
    IN_LISTS,
    Arguments,
    BackwardArguments,
    Branch,
    Options,
    Saved,
    options_of,
    per_weight,
)

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
GATES = ("sigmoid", "hard_sigmoid")


def _name(dtype: torch.dtype | torch.layout) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(sizes: Sequence[int]) -> str:
    return "[" + ", ".join(str(size) for size in sizes) + "]"


def _fail(op: str, message: str) -> None:
    raise RuntimeError(f"gcnet_ext::{op}: {message}")


def is_tensor(x: object) -> None:
    """
    Raises:
        TypeError: x is not a tensor. Only x is checked here, because its device decides which operator runs.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")


def given(op: str, name: str, tensor: object) -> None:
    """What the schema of an operator calls a Tensor may still be None."""
    if tensor is None:
        _fail(op, f"{name} must be a tensor, got None")


def branch_type(op: str, name: str, weights: object) -> None:
    """
    Raises:
        TypeError: a branch of the whole block is neither its six weights nor None.
    """
    if weights is not None and not (isinstance(weights, tuple) and len(weights) == 6):
        raise TypeError(f"gcnet_ext::{op}: {name} must be a Branch or None, got {type(weights).__name__}")


def strided(op: str, name: str, tensor: object) -> None:
    """Sparse, MKL-DNN, quantized and nested tensors have no kernels."""
    if isinstance(tensor, Tensor) and (tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested):
        kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else _name(tensor.layout)
        _fail(op, f"{name} must be a strided tensor, got a {kind} one")


def _has_shape(tensor: Tensor, sizes: Sequence[int]) -> bool:
    """Whether the tensor has these sizes, followed by nothing but ones."""
    return (
        tensor.dim() >= len(sizes)
        and all(a == b for a, b in zip(tensor.shape, sizes, strict=False))
        and all(a == 1 for a in tensor.shape[len(sizes) :])
    )


def feature_map(op: str, x: Tensor, *, pooled: bool = True) -> None:
    """x must be a floating [N, C, *spatial]; a pooled one must have something to pool."""
    given(op, "x", x)
    if x.dim() < 3:
        _fail(op, f"x must have at least 3 dimensions [N, C, *spatial], got shape {_shape(x.shape)}")
    if x.dtype not in FLOATING:
        _fail(op, f"x must be float16, bfloat16, float32 or float64, got {_name(x.dtype)}")
    if x.shape[1] == 0:
        _fail(op, f"x must have at least one channel, got shape {_shape(x.shape)}")
    if pooled and any(size == 0 for size in x.shape[2:]):
        _fail(op, f"x must have at least one position to pool over, got shape {_shape(x.shape)}")


def added(op: str, tensor: Tensor | None, x: Tensor) -> None:
    """What is added to the result is like x in everything but its strides."""
    if tensor is not None:
        _like(op, "residual", tensor, x)


def valid_positions(op: str, tensor: Tensor | None, x: Tensor) -> None:
    """Which positions count in the pool: bool, [N or 1, *spatial]."""
    if tensor is None:
        return
    if tensor.device != x.device:
        _fail(op, f"valid must be on x's device ({x.device.type}), got {tensor.device.type}")
    if tensor.dtype != torch.bool:
        _fail(op, f"valid must be bool, got {_name(tensor.dtype)}")
    samples, spatial = x.shape[0], x.shape[2:]
    if tensor.dim() != x.dim() - 1 or tensor.shape[0] not in (1, samples) or tensor.shape[1:] != spatial:
        one_for_all = "" if samples == 1 else f" or {_shape((1, *spatial))}"
        _fail(op, f"valid must have shape {_shape((samples, *spatial))}{one_for_all}, got {_shape(tensor.shape)}")


def _bytes_of(x: Tensor) -> tuple[int, int, bool]:
    """The first byte of x and the one behind the last, and whether none between them belongs to anybody else."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    begin = x.data_ptr()
    return begin, begin + elements * x.element_size(), elements == x.numel()


def apart(op: str, tensor: Tensor | None, x: Tensor) -> None:
    """A residual where x is overwritten: it is x itself, or lies elsewhere. Where they are interleaved it is copied."""
    if tensor is None or x.numel() == 0:
        return
    (begin, end, dense), (x_begin, x_end, x_dense) = _bytes_of(tensor), _bytes_of(x)
    alike = all(size == 1 or a == b for size, a, b in zip(x.shape, tensor.stride(), x.stride(), strict=True))
    if end > x_begin and x_end > begin and not (begin == x_begin and alike) and dense and x_dense:
        _fail(
            op, "residual must be x itself or have memory of its own where x is overwritten, got one that shares a part of x's"
        )


def in_place(op: str, x: Tensor) -> None:
    """An x that the operator writes to: no two elements may share memory."""
    if x.numel() == 0:
        return
    reach = 0  # of the dimensions with smaller strides, together
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride <= reach:
            _fail(
                op,
                "x must not have elements that share memory when it is overwritten, got shape "
                f"{_shape(x.shape)} with strides {_shape(x.stride())}",
            )
        reach += stride * (size - 1)


def _requires_gradient(args: Sequence[object]) -> bool:
    opened = [part for value in args for part in (value if isinstance(value, list | tuple) else [value])]
    return torch._C._any_requires_grad(*opened)


def no_gradient(op: str, args: Sequence[object]) -> None:
    """What overwrites x leaves autograd without it."""
    if torch.is_grad_enabled() and _requires_gradient(args):
        _fail(
            op,
            "x must not be overwritten (inplace=True) where autograd needs it, got an argument that requires a gradient; "
            "use torch.no_grad(), or inplace=False to train",
        )


def not_differentiated(op: str, args: Sequence[object]) -> None:
    """The operators of the backward pass have no derivative of their own."""
    if torch.is_grad_enabled() and _requires_gradient(args):
        _fail(
            op,
            "its arguments must not require a gradient, got one that does; for second derivatives differentiate "
            f"{op.removesuffix('_backward')} with create_graph=True",
        )


def _like(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """A tensor on x's device, of its dtype and sizes."""
    if tensor.device != x.device:
        _fail(op, f"{name} must be on x's device ({x.device.type}), got {tensor.device.type}")
    if tensor.dtype != x.dtype:
        _fail(op, f"{name} must be x's dtype ({_name(x.dtype)}), got {_name(tensor.dtype)}")
    if tensor.shape != x.shape:
        _fail(op, f"{name} must have shape {_shape(x.shape)}, got {_shape(tensor.shape)}")


def gradient(op: str, grad: Tensor, x: Tensor) -> None:
    """The gradient of an output that is shaped like x."""
    given(op, "grad", grad)
    _like(op, "grad", grad, x)


def _exactly(op: str, name: str, tensor: Tensor, x: Tensor, dtype: torch.dtype, sizes: Sequence[int]) -> None:
    """A tensor on x's device, of this dtype and of these sizes (trailing ones are free)."""
    given(op, name, tensor)
    if tensor.device != x.device:
        _fail(op, f"{name} must be on x's device ({x.device.type}), got {tensor.device.type}")
    if tensor.dtype != dtype:
        _fail(op, f"{name} must be {_name(dtype)}, got {_name(tensor.dtype)}")
    if not _has_shape(tensor, sizes):
        _fail(op, f"{name} must have shape {_shape(sizes)}, got {_shape(tensor.shape)}")


def saved(op: str, name: str, tensor: Tensor, x: Tensor, sizes: Sequence[int]) -> None:
    """A tensor of the accumulation dtype that the forward op returned and the backward op takes."""
    _exactly(op, name, tensor, x, torch.float64 if x.dtype == torch.float64 else torch.float32, sizes)


def bits(op: str, tensor: Tensor, x: Tensor, final_activation: int) -> None:
    """Those of the final ReLU, of which there are none without it."""
    _exactly(op, "positive", tensor, x, torch.uint8, (x.shape[0], _bits.bytes_of(x) if final_activation else 0))


def positions(x: Tensor) -> int:
    """P, the product of the spatial sizes."""
    product = 1
    for size in x.shape[2:]:
        product = product * size
    return product


def hidden_units(w1: Tensor | None) -> int:
    return 0 if w1 is None else w1.shape[0]


def parameter(op: str, name: str, tensor: Tensor | None, x: Tensor, sizes: Sequence[int]) -> None:
    """A parameter: on x's device, of x's dtype or float32, of these sizes (trailing ones are free)."""
    if tensor is None:
        return
    if tensor.device != x.device:
        _fail(op, f"{name} must be on x's device ({x.device.type}), got {tensor.device.type}")
    if tensor.dtype not in (torch.float32, x.dtype):
        _fail(op, f"{name} must be float32 or x's dtype ({_name(x.dtype)}), got {_name(tensor.dtype)}")
    if not _has_shape(tensor, sizes):
        _fail(op, f"{name} must have shape {_shape(sizes)}, trailing ones aside, got {_shape(tensor.shape)}")


def mask(op: str, prefix: str, weight: Tensor | None, bias: Tensor | None, x: Tensor) -> None:
    """The 1x1 convolution of the attention pool: weight [C] or [1, C], bias [1]; neither for average pooling."""
    channels = x.shape[1]
    if weight is None:
        if bias is not None:
            _fail(op, f"{prefix}bias must come with a {prefix}weight, got {prefix}weight None")
        return
    leading = channels != 1 and weight.dim() > 1 and weight.shape[0] == 1
    parameter(op, f"{prefix}weight", weight, x, (1, channels) if leading else (channels,))
    parameter(op, f"{prefix}bias", bias, x, (1,))


def attended(op: str, weight: object) -> None:
    """A map of the attention needs one: average pooling has none."""
    if weight is None:
        _fail(op, "weight must be given for an attention map, got None")


def branch(op: str, prefix: str, weights: Sequence[Tensor | None], x: Tensor) -> None:
    """One branch of the transform: w1 [H, C], b1 [H], norm [H], w2 [C, H], b2 [C]; without w2: w1 [C, C], b1 [C]."""
    given = per_weight(weights)
    channels = x.shape[1]

    def come_with(needed: str, *names: str) -> None:
        for name in names:
            if getattr(given, name) is not None:
                _fail(op, f"{prefix}_{name} must come with a {prefix}_{needed}, got {prefix}_{needed} None")

    if given.w1 is None:
        return come_with("w1", *Branch._fields[1:])
    if given.w2 is None:
        come_with("w2", "norm_weight", "norm_bias", "b2")
        hidden = channels
    else:
        hidden = given.w1.shape[0] if given.w1.dim() > 0 else 0
        if hidden == 0:
            _fail(op, f"{prefix}_w1 must have at least one row, got shape {_shape(given.w1.shape)}")
    sizes = [(hidden, channels), (hidden,), (hidden,), (hidden,), (channels, hidden), (channels,)]
    for name, tensor, size in zip(Branch._fields, given, sizes, strict=True):
        parameter(op, f"{prefix}_{name}", tensor, x, size)
    return None


def count(op: str, name: str, values: Sequence[object], wanted: int) -> None:
    """A list of the schema has as many elements as it must."""
    if len(values) != wanted:
        _fail(op, f"{name} must have {wanted} elements, got {len(values)}")


def final(op: str, number: int) -> None:
    if number not in FINAL_ACTIVATIONS.values():
        _fail(op, f"final_activation must be one of {FINAL_ACTIVATIONS}, got {number}")


# ---- each operator -----------------------------------------------------------------------------------------------------------


def attention_pool(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, valid: Tensor | None = None) -> None:
    feature_map(op, x)
    mask(op, "", weight, bias, x)
    valid_positions(op, valid, x)


def attention_pool_backward(
    op: str,
    grad_context: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    valid: Tensor | None,
    context: Tensor,
    attention: Tensor,
    needs: Sequence[bool],
) -> None:
    attention_pool(op, x, weight, bias, valid)
    samples, channels = x.shape[:2]
    saved(op, "grad_context", grad_context, x, (samples, channels))
    saved(op, "context", context, x, (samples, channels))
    saved(op, "attention", attention, x, (samples, 0 if weight is None else positions(x)))
    count(op, "needs", needs, 3)


def channel_fuse(
    op: str, x: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None = None, final_activation: int = 0
) -> None:
    feature_map(op, x, pooled=False)
    parameter(op, "scale", scale, x, x.shape[:2])
    parameter(op, "shift", shift, x, x.shape[:2])
    added(op, residual, x)
    final(op, final_activation)


def channel_fuse_(op: str, x: Tensor, *rest: Any) -> None:
    channel_fuse(op, x, *rest)
    in_place(op, x)


def channel_fuse_backward(
    op: str,
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    final_activation: int,
    positive: Tensor,
    needs: Sequence[bool],
) -> None:
    channel_fuse(op, x, scale, shift, None, final_activation)
    gradient(op, grad, x)
    bits(op, positive, x, final_activation)
    count(op, "needs", needs, 4)


def global_context(op: str, call: Arguments) -> None:
    x = call.x
    for name, values, wanted in (("mask", call.mask, 2), ("scale", call.scale, 6), ("shift", call.shift, 6)):
        count(op, name, values, wanted)
    options(op, call)
    feature_map(op, x)
    weight, bias = call.mask
    mask(op, "mask_", weight, bias, x)
    if call.scale[0] is None and call.shift[0] is None:
        _fail(op, "scale_w1 or shift_w1 must be given, got None for both")
    branch(op, "scale", call.scale, x)
    branch(op, "shift", call.shift, x)
    added(op, call.residual, x)
    valid_positions(op, call.valid, x)


def global_context_(op: str, call: Arguments) -> None:
    global_context(op, call)
    in_place(op, call.x)


def options(op: str, call: Arguments | BackwardArguments) -> None:
    if call.activation not in ACTIVATIONS.values():
        _fail(op, f"activation must be one of {ACTIVATIONS}, got {call.activation}")
    if call.hard_gate is not None:
        count(op, "hard_gate", call.hard_gate, 2)
    final(op, call.final_activation)


def global_context_backward(op: str, call: BackwardArguments) -> None:
    count(op, "needs", call.needs, 6)
    count(op, "saved", call.saved, 5)
    global_context(op, call.forward())
    x, kept = call.x, Saved(*call.saved)
    samples, channels = x.shape[:2]
    gradient(op, call.grad, x)
    units = sum(hidden_units(w1) for w1 in (call.scale[0], call.shift[0]))
    saved(op, "context", kept.context, x, (samples, channels))
    saved(op, "attention", kept.attention, x, (samples, 0 if call.mask[0] is None else positions(x)))
    saved(op, "hidden", kept.hidden, x, (samples, units))
    saved(op, "gate_values", kept.gate_values, x, (samples, 0 if call.scale[0] is None else channels))
    bits(op, kept.positive, x, call.final_activation)


OPERATORS: dict[str, Callable[..., None]] = {
    "attention_pool": attention_pool,
    "attention_pool_backward": attention_pool_backward,
    "channel_fuse": channel_fuse,
    "channel_fuse_": channel_fuse_,
    "channel_fuse_backward": channel_fuse_backward,
    "global_context": lambda op, *args: global_context(op, Arguments(*args)),
    "global_context_inference": lambda op, *args: global_context(op, Arguments(*args)),
    "global_context_": lambda op, *args: global_context_(op, Arguments(*args)),
    "global_context_backward": lambda op, *args: global_context_backward(op, BackwardArguments(*args)),
}


def operator(name: str, args: Sequence[Any]) -> None:
    """All checks of that operator, as it is called."""
    OPERATORS[name](name.removesuffix("_inference"), *args)


def explain(name: str, names: Sequence[str], args: Sequence[Any]) -> None:
    """Says in words what a kernel or the dispatcher refused; returns where it was nothing of these."""
    for argument, value in zip(names, args, strict=True):
        listed = isinstance(value, list | tuple) and argument in IN_LISTS
        for own, tensor in zip(IN_LISTS[argument], value, strict=False) if listed else ((argument, value),):
            strided(name.removesuffix("_inference"), own, tensor)
    operator(name, args)
    if name in ("channel_fuse_", "global_context_"):
        apart(name, args[names.index("residual")], args[0])


# ---- the functions -----------------------------------------------------------------------------------------------------------


def _number(op: str, name: str, value: object) -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        _fail(op, f"{name} must be a number, got {type(value).__name__}")
    try:
        float(value)  # type: ignore[arg-type]
    except OverflowError:
        _fail(op, f"{name} must be a number that a float can hold, got more")


def _one_of(op: str, name: str, value: object, names: Collection[str]) -> None:
    if not isinstance(value, str) or value not in names:
        _fail(op, f"{name} must be one of {', '.join(names)}, got {value}")


def chosen_final(op: str, final_activation: Any) -> int:
    """The final activation, as the operators take it."""
    _one_of(op, "final_activation", final_activation, FINAL_ACTIVATIONS)
    return FINAL_ACTIVATIONS[final_activation]


def chosen(
    op: str,
    norm: Any,
    eps: Any,
    activation: Any,
    slope: Any,
    gate: Any,
    gate_alpha: Any,
    gate_beta: Any,
    final_activation: Any,
) -> Options:
    """What a caller of the block chooses, as the operators take it: no None may pass for an eps, as that means no norm."""
    if not isinstance(norm, bool):
        _fail(op, f"norm must be True or False, got {type(norm).__name__}")
    _one_of(op, "activation", activation, ACTIVATIONS)
    _one_of(op, "gate", gate, GATES)
    _one_of(op, "final_activation", final_activation, FINAL_ACTIVATIONS)
    for name, value in (("eps", eps), ("slope", slope), ("gate_alpha", gate_alpha), ("gate_beta", gate_beta)):
        _number(op, name, value)
    return options_of(norm, eps, activation, slope, gate, gate_alpha, gate_beta, final_activation)
