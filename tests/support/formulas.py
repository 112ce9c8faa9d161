"""The operators of csrc/ops.cpp in plain PyTorch, every output of them, for test_fuzz.py.

A formula takes the arguments by name, all in one dtype and dense, and returns the outputs in order, None for one that was
not asked for. Masks are numbers, too; `positive` is a mask of the shape of x here, and what an operator returns under that
name is looked at by fuzzing.assert_bits. The steps are small, down to those of the softmax and the norm, so that fuzzing.Noise
can make each of them inexact. gcnet_ext/reference.py has the forward formulas, and autograd its gradients, but no backward
pass of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import reference
import schema
import torch
from torch import Tensor

from gcnet_ext.ops._options import ACTIVATIONS

Arguments = dict[str, Any]
Outputs = tuple[Tensor | None, ...]
Pool = Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
PARAMETERS = ("w1", "b1", "norm_weight", "norm_bias", "w2", "b2")


def _positions(x: Tensor) -> Tensor:
    return x.flatten(2)


def _per_channel(tensor: Tensor, x: Tensor) -> Tensor:
    return tensor.reshape(*x.shape[:2], *(1 for _ in x.shape[2:]))


def _logits(positions: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """w . x_p + b, added in one order for all positions: those that are alike have one logit, however large its rounding is."""
    first, *others = (positions * weight.reshape(1, -1, 1)).unbind(1)
    return sum(others, start=first) + (0 if bias is None else bias.reshape(()))


def _counting(x: Tensor, valid: Tensor | None) -> Tensor | None:
    """Which positions count, [N, P]."""
    return None if valid is None else valid.flatten(1).expand(x.shape[0], -1) != 0


def _only(positions: Tensor, counting: Tensor | None) -> Tensor:
    return positions if counting is None else positions.where(counting.unsqueeze(1), 0)


def _pool(x: Tensor, weight: Tensor | None, bias: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    counting = _counting(x, valid)
    positions = _only(_positions(x), counting)
    if weight is None:
        nothing = x.new_empty(x.shape[0], 0)
        return positions.mean(2) if counting is None else positions.sum(2) / counting.sum(1, keepdim=True).clamp(min=1), nothing
    logits = _logits(positions, weight, bias)
    if counting is not None:
        logits = logits.masked_fill(~counting & counting.any(1, keepdim=True), -torch.inf)
    powers = (logits - logits.detach().amax(1, keepdim=True)).exp()
    attention = powers / powers.sum(1, keepdim=True)
    if counting is not None:
        attention = attention.where(counting, 0)
    return (positions * attention.unsqueeze(1)).sum(2), attention


def _pool_backward(
    grad_context: Tensor,
    x: Tensor,
    weight: Tensor | None,
    valid: Tensor | None,
    context: Tensor,
    attention: Tensor,
    *,
    in_parts: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Its gradients of x and weight, by the formulas of csrc/cpu/kernels/attention_pool.h.

    In parts: one of them may have no positions, as a thread beyond the last one; it takes context times zero off, which is NaN
    where the context is infinite.
    """
    counting = _counting(x, valid)
    positions = _only(_positions(x), counting)
    if weight is None:
        count = positions.shape[2] if counting is None else counting.sum(1, keepdim=True).clamp(min=1)
        return _only((grad_context / count).unsqueeze(2).expand_as(positions), counting).reshape(x.shape), None
    u = (positions * grad_context.unsqueeze(2)).sum(1)
    dl = attention * (u - (grad_context * context).sum(1, keepdim=True))
    if counting is not None:
        dl = dl.where(counting, 0)
    dx = grad_context.unsqueeze(2) * attention.unsqueeze(1) + weight.reshape(1, -1, 1) * dl.unsqueeze(1)
    dx = _only(dx, counting)
    dw = (positions * dl.unsqueeze(1)).sum(2) - context * dl.sum(1, keepdim=True)
    if in_parts:
        dw = dw - context * 0
    return dx.reshape(x.shape), dw.sum(0).reshape(weight.shape)


class _Pool(torch.autograd.Function):
    """The pool with the kernels' backward pass, which loses more than autograd's where a saturated softmax lets nothing pass:
    u_p is not what dctx . ctx is made of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        context, attention = _pool(x, weight, bias, valid)
        ctx.save_for_backward(x, weight, bias, valid, context, attention)
        ctx.mark_non_differentiable(attention)
        return context, attention

    @staticmethod
    def backward(ctx: Any, grad_context: Tensor, _grad_attention: Tensor) -> Outputs:
        x, weight, bias, valid, context, attention = ctx.saved_tensors
        grads = _pool_backward(grad_context, x, weight, valid, context, attention, in_parts=True)
        return *grads, None if bias is None else torch.zeros_like(bias), None


def attention_pool(a: Arguments, pool: Pool = _pool) -> Outputs:
    return pool(a["x"], a["weight"], a["bias"], a["valid"])


def attention_pool_backward(a: Arguments, *, in_parts: bool = False) -> Outputs:
    context, attention = a["context"].flatten(1), a["attention"].flatten(1)
    dx, dw = _pool_backward(a["grad_context"], a["x"], a["weight"], a["valid"], context, attention, in_parts=in_parts)
    return dx if a["need_x"] else None, dw if a["need_weight"] else None, _zeros(a["need_bias"], a["bias"])


def _zeros(needed: bool, bias: Tensor | None) -> Tensor | None:
    """The gradient of a bias that cancels in the softmax."""
    return torch.zeros_like(bias) if needed and bias is not None else None


def _finish(a: Arguments, out: Tensor) -> Tensor:
    out = out if a["residual"] is None else out + a["residual"]
    return out.relu() if a["final_activation"] else out


def _before_relu(a: Arguments) -> Tensor:
    return a["grad"].where(a["positive"] != 0, 0) if a["final_activation"] else a["grad"]


def channel_fuse(a: Arguments) -> Outputs:
    return _finish(a, reference.channel_fuse(a["x"], a["scale"], a["shift"])), schema.no_bits(a["x"])


def channel_fuse_backward(a: Arguments) -> Outputs:
    grad, x, scale, shift = _before_relu(a), a["x"], a["scale"], a["shift"]
    sums = [_positions(product).sum(2) for product in (grad * x, grad)]
    return (
        (grad if scale is None else grad * _per_channel(scale, x)) if a["need_x"] else None,
        sums[0].reshape(scale.shape) if a["need_scale"] and scale is not None else None,
        sums[1].reshape(shift.shape) if a["need_shift"] and shift is not None else None,
        grad if a["need_residual"] and a["final_activation"] else None,
    )


def _branch(a: Arguments, name: str) -> list[Tensor | None]:
    return [a[f"{name}_{parameter}"] for parameter in PARAMETERS]


def _gate(a: Arguments, t: Tensor) -> Tensor:
    """The values of the gate: those of a hard sigmoid are not clipped yet."""
    if a["hard_gate"] is None:
        return t.sigmoid()
    alpha, beta = a["hard_gate"]
    return alpha * t + beta


def _scale(a: Arguments, gate: Tensor) -> Tensor:
    return gate if a["hard_gate"] is None else gate.clamp(0, 1)


def _first(context: Tensor, w1: Tensor, b1: Tensor | None) -> Tensor:
    """w1 context + b1, the hidden units before the norm."""
    products = context.unsqueeze(1) * w1.reshape(1, -1, context.shape[1])
    return products.sum(2) + (0 if b1 is None else b1.reshape(1, -1))


def _second(a: Arguments, hidden: Tensor, norm_weight, norm_bias, w2, b2) -> Tensor:
    if w2 is None:
        return hidden
    units = hidden.shape[1]
    if a["norm_eps"] is not None:
        centred = hidden - hidden.mean(1, keepdim=True)
        hidden = centred * ((centred * centred).mean(1, keepdim=True) + a["norm_eps"]).rsqrt()
        if norm_weight is not None:
            hidden = hidden * norm_weight.reshape(1, -1)
        if norm_bias is not None:
            hidden = hidden + norm_bias.reshape(1, -1)
    return _first(ACTIVATED[a["activation"]](a, hidden), w2.reshape(-1, units), b2)


def _gelu_tanh(_a: Arguments, z: Tensor) -> Tensor:
    """z sigmoid(2 u), which is z (1 + tanh(u)) / 2; beyond 16 that is 0 or z, and z^3 could be infinite."""
    near = z.clamp(-16, 16)
    return z * (2 * math.sqrt(2 / math.pi) * near * (1 + 0.044715 * near * near)).sigmoid()


def _hardswish(_a: Arguments, z: Tensor) -> Tensor:
    """Torch's, whose gradient is a choice and no product. Of NaN torch's gradient depends on how many elements there are; the
    kernels' is NaN."""
    nan = z.isnan()
    only_nan = z.where(nan, 0)
    return torch.where(nan, only_nan * only_nan, torch.nn.functional.hardswish(z))


# In small steps, so that noise makes the result as inexact as rounding can.
ACTIVATED: dict[int, Callable[[Arguments, Tensor], Tensor]] = {
    ACTIVATIONS["none"]: lambda _a, z: z,
    ACTIVATIONS["relu"]: lambda _a, z: z.relu(),
    ACTIVATIONS["silu"]: lambda _a, z: torch.nn.functional.silu(z),
    ACTIVATIONS["gelu"]: lambda _a, z: z * (0.5 * (1 + torch.erf(z * math.sqrt(0.5)))),
    ACTIVATIONS["gelu_tanh"]: _gelu_tanh,
    ACTIVATIONS["hardswish"]: _hardswish,
    ACTIVATIONS["leaky_relu"]: lambda a, z: z.where(z > 0, z * a["slope"]),
}


def global_context(a: Arguments, pool: Pool = _pool) -> Outputs:
    x = a["x"]
    context, attention = pool(x, a["mask_weight"], a["mask_bias"], a["valid"])
    out, hidden, gate = x, [x.new_empty(x.shape[0], 0)], x.new_empty(x.shape[0], 0)
    for name in ("scale", "shift"):
        w1, b1, *rest = _branch(a, name)
        if w1 is not None:
            hidden.append(_first(context, w1, b1))
            t = _second(a, hidden[-1], *rest)
            if name == "scale":
                gate = _gate(a, t)
            out = out * _per_channel(_scale(a, gate), x) if name == "scale" else out + _per_channel(t, x)
    return _finish(a, out), context, attention, torch.cat(hidden, 1), gate, schema.no_bits(x)


def _branch_backward(a: Arguments, name: str, grad_t: Tensor, hidden: Tensor, context: Tensor) -> tuple[Tensor, Outputs]:
    """The gradients of the context and of the six parameters; autograd does what stands behind the hidden units."""
    w1, b1, *rest = _branch(a, name)
    leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in (hidden, *rest)]
    given = [leaf for leaf in leaves if leaf is not None]
    found = torch.autograd.grad(_second(a, *leaves), given, grad_t, allow_unused=True)
    each = iter(found)
    grads = [None if leaf is None else next(each) for leaf in leaves]
    # without a norm nothing depends on its weights
    grads = [
        torch.zeros_like(leaf) if grad is None and leaf is not None else grad for grad, leaf in zip(grads, leaves, strict=True)
    ]
    grad_hidden = grads[0]
    grad_w1 = (grad_hidden.unsqueeze(2) * context.unsqueeze(1)).sum(0).reshape(w1.shape)
    grad_b1 = None if b1 is None else grad_hidden.sum(0).reshape(b1.shape)
    grad_context = (grad_hidden.unsqueeze(2) * w1.reshape(1, *grad_hidden.shape[1:], -1)).sum(1)
    return grad_context, (grad_w1, grad_b1, *grads[1:])


def global_context_backward(a: Arguments, *, in_parts: bool = False) -> Outputs:
    grad, x, mask_weight = _before_relu(a), a["x"], a["mask_weight"]
    context, attention, hidden, s = (a[name].flatten(1) for name in ("context", "attention", "hidden", "gate_values"))
    grad_context = torch.zeros_like(context)
    found: list[Sequence[Tensor | None]] = []
    for name in ("scale", "shift"):
        w1 = a[f"{name}_w1"]
        if w1 is None:
            found.append((None,) * 6)
            continue
        grad_t = _positions(grad * x if name == "scale" else grad).sum(2)
        if name == "scale":
            if a["hard_gate"] is None:
                grad_t = grad_t * (s * (1 - s))
            else:
                grad_t = torch.where((s >= 0) & (s <= 1), grad_t * a["hard_gate"][0], torch.zeros_like(s))
        units = w1.shape[0]
        own = hidden[:, :units] if name == "scale" else hidden[:, -units:]
        more, grads = _branch_backward(a, name, grad_t, own, context)
        grad_context = grad_context + more
        found.append(grads)
    dx, dw = _pool_backward(grad_context, x, mask_weight, a["valid"], context, attention, in_parts=in_parts)
    dx = dx + (grad if a["scale_w1"] is None else grad * _per_channel(_scale(a, s), x))
    return (
        dx if a["need_x"] else None,
        dw if a["need_mask_weight"] else None,
        _zeros(a["need_mask_bias"], a["mask_bias"]),
        *(found[0] if a["need_scale"] else (None,) * 6),
        *(found[1] if a["need_shift"] else (None,) * 6),
        grad if a["need_residual"] and a["final_activation"] else None,
    )


OPS = {
    "attention_pool": attention_pool,
    "attention_pool_backward": attention_pool_backward,
    "channel_fuse": channel_fuse,
    "channel_fuse_": lambda a: channel_fuse(a)[:1],
    "channel_fuse_backward": channel_fuse_backward,
    "global_context": global_context,
    "global_context_inference": lambda a: global_context(a)[:1],
    "global_context_": lambda a: global_context(a)[:1],
    "global_context_backward": global_context_backward,
}

IN_PARTS = {
    "attention_pool_backward": partial(attention_pool_backward, in_parts=True),
    "global_context_backward": partial(global_context_backward, in_parts=True),
}

DIFFERENTIATED_BY_THE_KERNELS = {
    "attention_pool": lambda a: attention_pool(a, _Pool.apply)[0],
    "channel_fuse": lambda a: channel_fuse(a)[0],
    "global_context": lambda a: global_context(a, _Pool.apply)[0],
}
