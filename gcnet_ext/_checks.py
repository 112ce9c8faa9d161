"""What the operators accept, in words.

The reference and the shape functions call these; `csrc/check.cpp` says the same words in C++, and
`tests/test_bad_input.py` holds the two to each other. Every error names the argument, what it must be and what it was.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ACTIVATIONS = ("relu", "silu")
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


def strided(op: str, names: Sequence[str], args: Sequence[object]) -> None:
    """For an operator that the dispatcher found no kernel for: sparse, MKL-DNN, quantized and nested tensors have none."""
    for name, tensor in zip(names, args, strict=True):
        if isinstance(tensor, Tensor) and (tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested):
            kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else _name(tensor.layout)
            _fail(op, f"{name} must be a strided tensor, got a {kind} one")


def transform(op: str, name: str, weights: object) -> None:
    """A branch of the whole block: its six weights, or none."""
    if weights is not None and not (isinstance(weights, tuple) and len(weights) == 6):
        raise TypeError(f"gcnet_ext::{op}: {name} must be a Transform or None, got {type(weights).__name__}")


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


def no_gradient(op: str, args: Sequence[object]) -> None:
    """What overwrites x leaves autograd without it."""
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        _fail(
            op,
            "x must not be overwritten (inplace=True) where autograd needs it, got an argument that requires a gradient; "
            "use torch.no_grad(), or inplace=False to train",
        )


def not_differentiated(op: str, args: Sequence[object]) -> None:
    """The operators of the backward pass have no derivative of their own."""
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        _fail(
            op,
            "its arguments must not require a gradient, got one that does; for second derivatives differentiate "
            f"{op.removesuffix('_backward')} with create_graph=True",
        )


def gradient(op: str, grad: Tensor, x: Tensor) -> None:
    """The gradient of an output that is shaped like x."""
    given(op, "grad", grad)
    if grad.device != x.device:
        _fail(op, f"grad must be on x's device ({x.device.type}), got {grad.device.type}")
    if grad.dtype != x.dtype:
        _fail(op, f"grad must be x's dtype ({_name(x.dtype)}), got {_name(grad.dtype)}")
    if grad.shape != x.shape:
        _fail(op, f"grad must have shape {_shape(x.shape)}, got {_shape(grad.shape)}")


def side(op: str, name: str, tensor: Tensor, x: Tensor, sizes: Sequence[int]) -> None:
    """A tensor of the accumulation dtype that the forward op returned and the backward op takes."""
    given(op, name, tensor)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if tensor.device != x.device:
        _fail(op, f"{name} must be on x's device ({x.device.type}), got {tensor.device.type}")
    if tensor.dtype != dtype:
        _fail(op, f"{name} must be {_name(dtype)}, got {_name(tensor.dtype)}")
    if not _has_shape(tensor, sizes):
        _fail(op, f"{name} must have shape {_shape(sizes)}, got {_shape(tensor.shape)}")


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


def branch(op: str, prefix: str, params: Sequence[Tensor | None], x: Tensor) -> None:
    """One branch of the transform: w1 [H, C], b1 [H], norm [H], w2 [C, H], b2 [C]; without w2: w1 [C, C], b1 [C]."""
    w1, b1, norm_weight, norm_bias, w2, b2 = params
    channels = x.shape[1]
    if w1 is None:
        for name, tensor in zip(("b1", "norm_weight", "norm_bias", "w2", "b2"), params[1:], strict=True):
            if tensor is not None:
                _fail(op, f"{prefix}_{name} must come with a {prefix}_w1, got {prefix}_w1 None")
        return
    if w2 is None:
        for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias), ("b2", b2)):
            if tensor is not None:
                _fail(op, f"{prefix}_{name} must come with a {prefix}_w2, got {prefix}_w2 None")
        hidden = channels
    else:
        hidden = w1.shape[0] if w1.dim() > 0 else 0
        if hidden == 0:
            _fail(op, f"{prefix}_w1 must have at least one row, got shape {_shape(w1.shape)}")
    parameter(op, f"{prefix}_w1", w1, x, (hidden, channels))
    parameter(op, f"{prefix}_b1", b1, x, (hidden,))
    parameter(op, f"{prefix}_norm_weight", norm_weight, x, (hidden,))
    parameter(op, f"{prefix}_norm_bias", norm_bias, x, (hidden,))
    parameter(op, f"{prefix}_w2", w2, x, (channels, hidden))
    parameter(op, f"{prefix}_b2", b2, x, (channels,))


def branches(op: str, scale: Sequence[Tensor | None], shift: Sequence[Tensor | None], x: Tensor) -> None:
    """At least one branch, and each of them sound."""
    if scale[0] is None and shift[0] is None:
        _fail(op, "scale_w1 or shift_w1 must be given, got None for both")
    branch(op, "scale", scale, x)
    branch(op, "shift", shift, x)


def choices(op: str, activation: str, gate: str) -> None:
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        _fail(op, f"activation must be relu or silu, got {activation}")
    if not isinstance(gate, str) or gate not in GATES:
        _fail(op, f"gate must be sigmoid or hard_sigmoid, got {gate}")
