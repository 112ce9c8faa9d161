"""The global response norm of ConvNeXt V2: channels compete by their norms over the positions."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _torch, _tuning
from . import _checks, _dispatch, _shapes
from ._autograd import in_plain_pytorch, needed, through_plain_pytorch
from ._options import number
from ._precision import accumulation_dtype, beside


def global_response_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-6) -> Tensor:
    """The global response norm: ``out_cp = x_cp + beta_c + gamma_c x_cp R_c``.

    ``R_c = G_c / (mean_c G + eps)`` with ``G_c = sqrt(sum_p x_cp^2)``. Source: S. Woo et al., "ConvNeXt V2", 2023,
    https://arxiv.org/abs/2301.00808, section 3.2 and algorithm 1.

    Args:
        x: ``[N, C, *spatial]``, at least one position.
        gamma, beta: ``[C]``; trailing dimensions of size 1 are allowed.
        eps: what is added to the mean of the norms.

    Returns:
        Like x. Differentiable in x, gamma and beta; where ``G_c`` is 0, it has no part in the gradient of x. The squares are
        summed in float32, or in float64 for float64, and the result is rounded once.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device, or eps is no number. The message names it.
        TypeError: x is no tensor.
    """
    number("global_response_norm", "eps", eps)
    if _torch.any_autocast():
        widened: Any = beside(x, gamma, beta)
        gamma, beta = widened
    if way := _dispatch.way_of(x, gamma, beta):
        out: Tensor = _dispatch.call(way, "global_response_norm", _differentiable, x, gamma, beta, float(eps))[0]
        return out
    return reference(x, gamma, beta, eps)


# ---- plain PyTorch -----------------------------------------------------------------------------------------------------------


def reference(x: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-6) -> Tensor:
    """`global_response_norm` in plain PyTorch."""
    return results(Arguments(x, gamma, beta, eps))[0]


def results(call: Arguments) -> tuple[Tensor, Tensor]:
    """The results of the operator in plain PyTorch: the output and the norms G."""
    _check("global_response_norm", call)
    x, gamma, beta, eps = call
    acc = accumulation_dtype(x)
    wide = x.to(acc)
    squares = wide.flatten(2).square().sum(2)
    norms = torch.where(squares == 0, 1, squares).sqrt().where(squares != 0, 0)  # the root of 0 has no derivative
    scale = 1 + gamma.reshape(-1).to(acc) * (norms / (norms.mean(1, keepdim=True) + eps))
    spatial = (1,) * (x.dim() - 2)
    out = wide * scale.reshape(*norms.shape, *spatial) + beta.to(acc).reshape(-1, *spatial)
    return out.to(x.dtype), norms


# ---- arguments ---------------------------------------------------------------------------------------------------------------


class Arguments(NamedTuple):
    x: Any
    gamma: Any
    beta: Any
    eps: Any


class BackwardArguments(NamedTuple):
    grad: Any
    x: Any
    gamma: Any
    beta: Any
    eps: Any
    norms: Any
    needs: Any  # of x, the gamma and the beta


def _check(op: str, call: Arguments | BackwardArguments) -> None:
    _checks.feature_map(op, call.x)
    for name, tensor in (("gamma", call.gamma), ("beta", call.beta)):
        _checks.not_none(op, name, tensor)
        _checks.parameter(op, name, tensor, call.x, call.x.shape[1:2])


def _check_backward(op: str, call: BackwardArguments) -> None:
    _check(op, call)
    _checks.gradient(op, call.grad, call.x)
    _checks.saved(op, "norms", call.norms, call.x, call.x.shape[:2])
    _checks.count(op, "needs", call.needs, 3)


# ---- shapes ------------------------------------------------------------------------------------------------------------------


def _result_shapes(call: Arguments) -> tuple[Tensor, Tensor]:
    return _shapes.like_map(call.x), _shapes.accumulated(call.x, *call.x.shape[:2])


def _gradient_shapes(call: BackwardArguments) -> tuple[Tensor, ...]:
    need_x, need_gamma, need_beta = call.needs
    return (
        _shapes.map_gradient(need_x, call.x),
        _shapes.gradient(need_gamma, call.gamma, call.x),
        _shapes.gradient(need_beta, call.beta, call.x),
    )


# ---- gradients ---------------------------------------------------------------------------------------------------------------


class _GlobalResponseNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma, beta, eps):
        out, norms = _dispatch.below_autograd("global_response_norm", (x, gamma, beta, eps))
        ctx.mark_non_differentiable(norms)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.tuning = eps, _tuning.decided()
        ctx.save_for_backward(x, gamma, beta, norms)
        return out, norms

    @staticmethod
    def backward(ctx, grad, _grad_norms):
        needs = ctx.needs_input_grad[:3]
        if grad is None:
            return (None,) * 4
        x, gamma, beta, norms = ctx.saved_tensors
        if in_plain_pytorch(grad):
            return *through_plain_pytorch(partial(reference, eps=ctx.eps), (x, gamma, beta), needs, grad), None
        args = grad, x, gamma, beta, ctx.eps, norms, list(needs)
        gradients = _dispatch.backward(ctx.tuning, "global_response_norm_backward", args)
        return *map(needed, needs, gradients), None


_differentiable = partial(_dispatch.differentiable, _GlobalResponseNorm, "global_response_norm")
_dispatch.register(
    "global_response_norm", Arguments, check=_check, shapes=_result_shapes, differentiable=_differentiable, plain=results
)
_dispatch.register("global_response_norm_backward", BackwardArguments, check=_check_backward, shapes=_gradient_shapes)
