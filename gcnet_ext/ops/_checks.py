"""The rules that several operators check, in words. Every error names the argument, what it must be and what it was.

Plain PyTorch and the shapes of results call these, and so does a call whose kernel refused its arguments: the rules of
`csrc/check.h` name the argument and no more. A test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _torch
from . import _relu_bits
from ._precision import accumulation_dtype

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _name(dtype: torch.dtype | torch.layout) -> str:
    return str(dtype).removeprefix("torch.")


def shape(sizes: Sequence[int]) -> str:
    return "[" + ", ".join(str(size) for size in sizes) + "]"


def fail(op: str, message: str) -> None:
    raise RuntimeError(f"gcnet_ext::{op}: {message}")


def public(name: str) -> str:
    """The name of an operator in errors. A caller of global_context does not know that global_context_inference ran."""
    return name.removeprefix("normed_").removesuffix("_inference")


def is_tensor(x: object) -> None:
    """
    Raises:
        TypeError: x is not a tensor. Only x is checked here, because its device decides which operator runs.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")


def not_none(op: str, name: str, tensor: object) -> None:
    """Refuses None for an argument that the schema of an operator declares as a Tensor."""
    if tensor is None:
        fail(op, f"{name} must be a tensor, got None")


def _strided(op: str, name: str, tensor: Tensor) -> None:
    """Sparse, MKL-DNN, quantized and nested tensors have no kernels."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else _name(tensor.layout)
        fail(op, f"{name} must be a strided tensor, got a {kind} one")


def _beside(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """Refuses a tensor that is not strided or is not on x's device."""
    _strided(op, name, tensor)
    if tensor.device != x.device:
        fail(op, f"{name} must be on x's device ({x.device.type}), got {tensor.device.type}")


def _has_shape(tensor: Tensor, sizes: Sequence[int]) -> bool:
    """Whether the tensor has these sizes, followed by nothing but ones."""
    return (
        tensor.dim() >= len(sizes)
        and all(a == b for a, b in zip(tensor.shape, sizes, strict=False))
        and all(a == 1 for a in tensor.shape[len(sizes) :])
    )


def feature_map(op: str, x: Tensor, *, pooled: bool = True) -> None:
    """x must be a floating [N, C, *spatial]; a pooled one must have something to pool."""
    not_none(op, "x", x)
    _strided(op, "x", x)
    if x.dim() < 3:
        fail(op, f"x must have at least 3 dimensions [N, C, *spatial], got shape {shape(x.shape)}")
    if x.dtype not in FLOATING:
        fail(op, f"x must be float16, bfloat16, float32 or float64, got {_name(x.dtype)}")
    if x.shape[1] == 0:
        fail(op, f"x must have at least one channel, got shape {shape(x.shape)}")
    if pooled and any(size == 0 for size in x.shape[2:]):
        fail(op, f"x must have at least one position to pool over, got shape {shape(x.shape)}")


def residual(op: str, tensor: Tensor | None, x: Tensor) -> None:
    """What is added to the result is like x in everything but its strides."""
    if tensor is not None:
        _like(op, "residual", tensor, x)


def valid(op: str, tensor: Tensor | None, x: Tensor) -> None:
    """Which positions count in the pool: bool, [N or 1, *spatial]."""
    if tensor is None:
        return
    _beside(op, "valid", tensor, x)
    if tensor.dtype != torch.bool:
        fail(op, f"valid must be bool, got {_name(tensor.dtype)}")
    samples, spatial = x.shape[0], x.shape[2:]
    if tensor.dim() != x.dim() - 1 or tensor.shape[0] not in (1, samples) or tensor.shape[1:] != spatial:
        one_for_all = "" if samples == 1 else f" or {shape((1, *spatial))}"
        fail(op, f"valid must have shape {shape((samples, *spatial))}{one_for_all}, got {shape(tensor.shape)}")


def _bytes_of(x: Tensor) -> tuple[int, int, bool]:
    """The addresses of the first byte of x and of the end of its last one, and whether x has all elements between the two."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    begin = x.data_ptr()
    return begin, begin + elements * x.element_size(), elements == x.numel()


def not_overlapping(op: str, tensor: Tensor | None, x: Tensor) -> None:
    """A residual where x is overwritten: it is x itself, or lies elsewhere. Where they are interleaved it is copied."""
    if tensor is None or x.numel() == 0:
        return
    (begin, end, dense), (x_begin, x_end, x_dense) = _bytes_of(tensor), _bytes_of(x)
    alike = all(size == 1 or a == b for size, a, b in zip(x.shape, tensor.stride(), x.stride(), strict=True))
    if end > x_begin and x_end > begin and not (begin == x_begin and alike) and dense and x_dense:
        fail(
            op, "residual must be x itself or have memory of its own where x is overwritten, got one that shares a part of x's"
        )


def in_place(op: str, x: Tensor) -> None:
    """An x that the operator writes to: no two elements may share memory."""
    if x.numel() == 0:
        return
    reach = 0  # how far the dimensions with smaller strides reach together
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride <= reach:
            fail(
                op,
                "x must not have elements that share memory when it is overwritten, got shape "
                f"{shape(x.shape)} with strides {shape(x.stride())}",
            )
        reach += stride * (size - 1)


def _requires_gradient(args: Sequence[object]) -> bool:
    opened = [part for value in args for part in (value if isinstance(value, list | tuple) else [value])]
    if is_compiling():  # torch.compile does not know what is below
        return any(isinstance(value, Tensor) and value.requires_grad for value in opened)
    return _torch.any_requires_grad(*opened)


def no_gradient(op: str, args: Sequence[object]) -> None:
    """Refuses to overwrite x if an argument requires a gradient, because autograd would need the old x."""
    if torch.is_grad_enabled() and _requires_gradient(args):
        fail(
            op,
            "x must not be overwritten (inplace=True) where autograd needs it, got an argument that requires a gradient; "
            "use torch.no_grad(), or inplace=False to train",
        )


def no_tangent(op: str, args: Sequence[object]) -> None:
    """Refuses arguments of forward-mode AD in an operator that cannot pass their tangents on: the result would have none."""
    if _torch.has_tangent(*args):
        fail(
            op,
            "its arguments must not have a tangent of forward-mode AD, got one that does; the functions of gcnet_ext compute "
            "the derivative in plain PyTorch",
        )


def not_differentiated(op: str, args: Sequence[object]) -> None:
    """Refuses arguments that require a gradient, because an operator of the backward pass cannot be differentiated."""
    if torch.is_grad_enabled() and _requires_gradient(args):
        fail(
            op,
            "its arguments must not require a gradient, got one that does; for second derivatives differentiate "
            f"{op.removesuffix('_backward')} with create_graph=True",
        )


def _like(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """A tensor on x's device, of its dtype and sizes."""
    _beside(op, name, tensor, x)
    if tensor.dtype != x.dtype:
        fail(op, f"{name} must be x's dtype ({_name(x.dtype)}), got {_name(tensor.dtype)}")
    if tensor.shape != x.shape:
        fail(op, f"{name} must have shape {shape(x.shape)}, got {shape(tensor.shape)}")


def gradient(op: str, grad: Tensor, x: Tensor) -> None:
    """The gradient of an output that is shaped like x."""
    not_none(op, "grad", grad)
    _like(op, "grad", grad, x)


def _exactly(op: str, name: str, tensor: Tensor, x: Tensor, dtype: torch.dtype, sizes: Sequence[int]) -> None:
    """A tensor on x's device, of this dtype and of these sizes (trailing ones are free)."""
    not_none(op, name, tensor)
    _beside(op, name, tensor, x)
    if tensor.dtype != dtype:
        fail(op, f"{name} must be {_name(dtype)}, got {_name(tensor.dtype)}")
    if not _has_shape(tensor, sizes):
        fail(op, f"{name} must have shape {shape(sizes)}, got {shape(tensor.shape)}")


def saved(op: str, name: str, tensor: Tensor, x: Tensor, sizes: Sequence[int]) -> None:
    """A tensor of the accumulation dtype that the forward op returned and the backward op takes."""
    _exactly(op, name, tensor, x, accumulation_dtype(x), sizes)


def positive(op: str, tensor: Tensor, x: Tensor, final_activation: int) -> None:
    """Checks the bits of the final ReLU: uint8 [N, bytes of a sample's bits], or [N, 0] if there is no final ReLU.

    The bytes depend on the memory format of x. torch.compile may keep x in another one until backward, and gives the operator
    the strides that it had in forward only where it runs: what stands for x before may have other strides.
    """
    bytes_of_sample = tensor.shape[-1] if _torch.is_fake(x) else _relu_bits.bytes_of(x)
    _exactly(op, "positive", tensor, x, torch.uint8, (x.shape[0], bytes_of_sample if final_activation else 0))


def positions(x: Tensor) -> int:
    """P, the product of the spatial sizes."""
    product = 1
    for size in x.shape[2:]:
        product = product * size
    return product


def parameter(op: str, name: str, tensor: Tensor | None, x: Tensor, sizes: Sequence[int]) -> None:
    """A parameter: on x's device, of x's dtype or float32, of these sizes (trailing ones are free)."""
    if tensor is None:
        return
    _beside(op, name, tensor, x)
    if tensor.dtype not in (torch.float32, x.dtype):
        fail(op, f"{name} must be float32 or x's dtype ({_name(x.dtype)}), got {_name(tensor.dtype)}")
    if not _has_shape(tensor, sizes):
        fail(op, f"{name} must have shape {shape(sizes)}, trailing ones aside, got {shape(tensor.shape)}")


def mask(op: str, prefix: str, weight: Tensor | None, bias: Tensor | None, x: Tensor) -> None:
    """The 1x1 convolution of the attention pool: weight [C] or [1, C], bias [1]; neither for average pooling."""
    channels = x.shape[1]
    if weight is None:
        if bias is not None:
            fail(op, f"{prefix}bias must come with a {prefix}weight, got {prefix}weight None")
        return
    leading = channels != 1 and weight.dim() > 1 and weight.shape[0] == 1
    parameter(op, f"{prefix}weight", weight, x, (1, channels) if leading else (channels,))
    parameter(op, f"{prefix}bias", bias, x, (1,))


def attended(op: str, weight: object) -> None:
    """Refuses to return an attention map without a weight, because average pooling has no attention."""
    if weight is None:
        fail(op, "weight must be given for an attention map, got None")


def count(op: str, name: str, values: Sequence[object], wanted: int) -> None:
    """A list of the schema has as many elements as it must."""
    if len(values) != wanted:
        fail(op, f"{name} must have {wanted} elements, got {len(values)}")
