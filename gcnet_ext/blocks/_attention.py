"""Attention whose values are narrower than its keys, on a CPU: y_p = sum_q softmax_q(theta_p . phi_q) g_q.

torch's scaled_dot_product_attention forms no matrix of all pairs only where values are as wide as keys, and to pad the values
is to multiply with the padding, too. Here the weights of a run of neighbouring positions at a time are formed and used. The
backward pass forms them once more, unless there is one run only.

Symbols: N samples; P positions that attend, and Q that are attended to; theta [N, D, P] and phi [N, D, Q] of D channels, g
[N, E, Q] of E; w [N, P, Q] are the weights. dw is the gradient of w, and so on.

    forward    w = softmax(theta^T phi)   y = g w^T
    backward   dg = dy w   dw = dy^T g   ds = w (dw - y . dy)   dtheta = phi ds^T   dphi = theta ds
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import _torch
from ..ops._autograd import in_plain_pytorch, through_plain_pytorch
from ..ops._precision import accumulation_dtype, product, without_autocast

LEAST_POSITIONS = 32
"""Products with fewer rows are slow."""


def suits(theta: Tensor, phi: Tensor, g: Tensor) -> bool:
    """Whether these tensors, [N, channels, *positions], are what this file is for."""
    tensors = theta, phi, g
    return (
        g.shape[1] < phi.shape[1]
        and all(tensor.is_cpu and tensor.dtype == theta.dtype for tensor in tensors)
        and theta.dtype in (torch.float32, torch.float64)  # weights in 16 bits would be too coarse
        and not _torch.any_autocast()
    )


def attention(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    """y [N, E, P], differentiable in all three."""
    y: Tensor = _Attention.apply(theta, phi, g)
    return y


def _runs(theta: Tensor) -> Iterator[slice]:
    """Runs of max(D, LEAST_POSITIONS) neighbouring positions. Where D is the larger, the weights of a run take no more memory
    than phi."""
    step = max(theta.shape[1], LEAST_POSITIONS)
    for first in range(0, theta.shape[2], step):
        yield slice(first, first + step)


def _weights(theta: Tensor, phi: Tensor) -> Tensor:
    return torch.bmm(theta.mT, phi).softmax(2)


def with_all_weights(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """What scaled_dot_product_attention computes, by way of the weights of all pairs of positions."""
    of_sums = accumulation_dtype(query)
    weights = (product(query.to(of_sums), key.to(of_sums).mT) * scale).softmax(-1)
    return product(weights, value.to(of_sums)).to(query.dtype)


def _by_all_weights(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    return with_all_weights(theta.mT, phi.mT, g.mT, 1.0).mT


def _gradients(
    needs: tuple[bool, bool, bool], dy: Tensor, theta: Tensor, phi: Tensor, g: Tensor, y: Tensor, kept: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of theta, phi and g that are needed; kept are the weights of the only block."""
    need_theta, need_phi, need_g = needs
    dtheta = torch.empty_like(theta) if need_theta else None
    dphi = torch.zeros_like(phi) if need_phi else None
    dg = torch.zeros_like(g) if need_g else None
    for p in _runs(theta):
        w = _weights(theta[:, :, p], phi) if kept is None else kept
        dy_part = dy[:, :, p]
        if dg is not None:
            dg.baddbmm_(dy_part, w)
        if dtheta is None and dphi is None:
            continue
        ds = torch.bmm(dy_part.mT, g)  # dw, of which the next line makes ds
        ds.sub_((y[:, :, p] * dy_part).sum(1).unsqueeze(2)).mul_(w)
        if dtheta is not None:
            dtheta[:, :, p] = torch.bmm(phi, ds.mT)
        if dphi is not None:
            dphi.baddbmm_(theta[:, :, p], ds)
    return dtheta, dphi, dg


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        y = g.new_empty(*g.shape[:2], theta.shape[2])
        runs = list(_runs(theta))
        for p in runs:
            w = _weights(theta[:, :, p], phi)
            y[:, :, p] = torch.bmm(g, w.mT)
        ctx.save_for_backward(theta, phi, g, y, w if len(runs) == 1 else None)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        theta, phi, g, y, kept = ctx.saved_tensors
        if in_plain_pytorch(dy):
            return through_plain_pytorch(_by_all_weights, (theta, phi, g), ctx.needs_input_grad, dy)
        with without_autocast(dy):  # a backward pass may run where it is on
            return _gradients(ctx.needs_input_grad, dy, theta, phi, g, y, kept)
