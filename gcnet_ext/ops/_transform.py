"""The transform of the GC block: its branches and the gate, in plain PyTorch, and the checks and FLOPs of their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .. import _torch
from . import _checks
from ._options import ACTIVATIONS, Options
from ._precision import product

Tensors = Sequence[Tensor | None]


class Branch(NamedTuple):
    """The weights of one branch of the transform, ``t = w2 act(norm(w1 context + b1)) + b2``.

    There are C channels and H hidden units. Each tensor has the dtype of x or float32.

    Attributes:
        w1: ``[H, C]``, the first 1x1 convolution. All may have trailing dimensions of size 1: ``[H, C, 1, 1]``.
        b1: ``[H]`` or None.
        norm_weight, norm_bias: ``[H]`` or None, the affine part of the LayerNorm.
        w2: ``[C, H]``, the second 1x1 convolution. None: the branch is ``t = w1 context + b1`` with w1 ``[C, C]``.
        b2: ``[C]`` or None.
    """

    w1: Tensor
    b1: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    w2: Tensor | None = None
    b2: Tensor | None = None


NO_BRANCH: Tensors = (None,) * len(Branch._fields)
_DEFAULTS = Options()


def by_name(weights: Sequence[Any]) -> Any:
    """What belongs to each weight of a branch, by the name of the weight: tensors, shapes or flags."""
    return Branch(*weights)


# ---- plain PyTorch -----------------------------------------------------------------------------------------------------------


def branch(context: Tensor, weights: Branch, options: Options = _DEFAULTS) -> Tensor:
    """t = w2 act(norm(w1 context + b1)) + b2 of context [N, C] -> [N, C], in the dtype of the context."""
    return second_layer(first_layer(context, weights), weights, options)


def first_layer(context: Tensor, weights: Branch) -> Tensor:
    """w1 context + b1 of context [N, C] -> [N, H]: what the operators save as hidden."""
    return _linear(context, _matrix(weights.w1, context), weights.b1)


def second_layer(hidden: Tensor, weights: Branch, options: Options) -> Tensor:
    """w2 act(norm(hidden)) + b2 of hidden [N, H] -> [N, C]; hidden itself without a w2."""
    w2, b2 = weights.w2, weights.b2
    if w2 is None:
        return hidden
    if options.norm_eps is not None:
        hidden = _layer_norm(hidden, weights, options.norm_eps)
    if options.activation == ACTIVATIONS["leaky_relu"]:
        hidden = F.leaky_relu(hidden, options.slope)
    else:
        hidden = _ACTIVATED[options.activation](hidden)
    return _linear(hidden, _matrix(w2, hidden), b2)


def _silu(z: Tensor) -> Tensor:
    """In forward mode written out: the backward pass of torch's own has no tangent."""
    return F.silu(z) if _torch.forward_level() < 0 else z * z.sigmoid()


def _layer_norm(hidden: Tensor, weights: Branch, eps: float) -> Tensor:
    """The LayerNorm over hidden units [N, H]. In forward mode it is written out: the derivatives of the tangent that torch's
    own gives are wrong without an error (torch 2.13)."""
    weight, bias = (_vector(vector, hidden) for vector in (weights.norm_weight, weights.norm_bias))
    if _torch.forward_level() < 0:
        # layer_norm of ONNX wants a number, and a traced shape is a tensor.
        units = len(weights.w1.unbind()) if _torch.is_traced() else hidden.shape[1]
        return F.layer_norm(hidden, (units,), weight, bias, eps)
    centred = hidden - hidden.mean(1, keepdim=True)
    normalised = centred * (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    scaled = normalised if weight is None else normalised * weight
    return scaled if bias is None else scaled + bias


_ACTIVATED: dict[int, Callable[[Tensor], Tensor]] = {
    ACTIVATIONS["none"]: lambda z: z,
    ACTIVATIONS["relu"]: F.relu,
    ACTIVATIONS["silu"]: _silu,
    ACTIVATIONS["gelu"]: F.gelu,
    ACTIVATIONS["gelu_tanh"]: partial(F.gelu, approximate="tanh"),
    ACTIVATIONS["hardswish"]: F.hardswish,
}


def apply_gate(t: Tensor, hard_gate: Sequence[float] | None = None) -> Tensor:
    """sigmoid(t), or with [alpha, beta] clip(alpha t + beta, 0, 1), which passes the gradient at its corners."""
    if hard_gate is None:
        return t.sigmoid()
    line = gate_values(t, hard_gate)
    # The gradient of torch.clamp at its corners depends on the version of torch: it passes up to 2.13 and stops in 2.14.
    return line.where((line >= 0) & (line <= 1), line.detach().clamp(0, 1))


def gate_values(t: Tensor, hard_gate: Sequence[float] | None) -> Tensor:
    """What the operators save of the gate: sigmoid(t), or alpha t + beta before it is clipped."""
    if hard_gate is None:
        return t.sigmoid()
    alpha, beta = hard_gate
    return alpha * t + beta


def _matrix(weight: Tensor, like: Tensor) -> Tensor:
    """The weight of a 1x1 convolution without its trailing dimensions."""
    return weight.to(like.dtype).flatten(1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, K] -> x w^T + b [N, M], of w [M, K], in the dtype of x."""
    y = product(x, weight.transpose(0, 1))  # ONNX knows no mT
    bias = _vector(bias, x)
    return y if bias is None else y + bias


def _vector(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like.dtype).reshape(-1)


# ---- checks ------------------------------------------------------------------------------------------------------------------


def check_type(op: str, name: str, weights: object) -> None:
    """
    Raises:
        TypeError: a branch of the whole block is neither its six weights nor None.
    """
    if weights is not None and not (isinstance(weights, tuple) and len(weights) == len(Branch._fields)):
        raise TypeError(f"gcnet_ext::{op}: {name} must be a Branch or None, got {type(weights).__name__}")


def check_branch(op: str, prefix: str, weights: Tensors, x: Tensor) -> None:
    """One branch of the transform: w1 [H, C], b1 [H], norm [H], w2 [C, H], b2 [C]; without w2: w1 [C, C], b1 [C]."""
    named = by_name(weights)
    channels = x.shape[1]

    def come_with(needed: str, *names: str) -> None:
        for name in names:
            if getattr(named, name) is not None:
                _checks.fail(op, f"{prefix}_{name} must come with a {prefix}_{needed}, got {prefix}_{needed} None")

    if named.w1 is None:
        return come_with("w1", *Branch._fields[1:])
    if named.w2 is None:
        come_with("w2", "norm_weight", "norm_bias", "b2")
        hidden = channels
    else:
        hidden = named.w1.shape[0] if named.w1.dim() > 0 else 0
        if hidden == 0:
            _checks.fail(op, f"{prefix}_w1 must have at least one row, got shape {_checks.shape(named.w1.shape)}")
    sizes = [(hidden, channels), (hidden,), (hidden,), (hidden,), (channels, hidden), (channels,)]
    for name, tensor, size in zip(Branch._fields, named, sizes, strict=True):
        _checks.parameter(op, f"{prefix}_{name}", tensor, x, size)
    return None


def hidden_units(weights: Tensors) -> int:
    """H of a branch, 0 where there is none."""
    w1 = by_name(weights).w1
    return 0 if w1 is None else w1.shape[0]


# ---- FLOPs, of shapes in the place of tensors --------------------------------------------------------------------------------


def flops(samples: int, weights: Sequence[Any]) -> int:
    named = by_name(weights)
    return 2 * samples * sum(prod(weight) for weight in (named.w1, named.w2) if weight is not None)


def backward_flops(samples: int, weights: Sequence[Any], need_context: bool, need_weights: bool) -> int:
    named = by_name(weights)
    if named.w1 is None:
        return 0
    gradients = 2 * samples * prod(named.w1) * (need_context + need_weights)
    if named.w2 is not None:
        gradients += 2 * samples * prod(named.w2) * ((need_context or need_weights) + need_weights)
    return gradients
