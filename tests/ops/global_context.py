"""global_context: what the tests must know of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from entry import OPTIONS, PARAMETERS, Arguments, Function, Op, Operator, Outputs, no_bits
from formulas import KernelPool, Pool, before_relu, finish, per_channel, pool_backward, pool_forward, positions_of, zero_bias
from grid import GLOBAL_CONTEXT_INPUTS, flat
from torch import Tensor

from gcnet_ext import Branch
from gcnet_ext.ops._options import ACTIVATIONS, FINAL_ACTIVATIONS
from gcnet_ext.ops.global_context import reference


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


def global_context(a: Arguments, pool: Pool = pool_forward) -> Outputs:
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
            out = out * per_channel(_scale(a, gate), x) if name == "scale" else out + per_channel(t, x)
    return finish(a, out), context, attention, torch.cat(hidden, 1), gate, no_bits(x)


def _inference(a: Arguments) -> Outputs:
    return global_context(a)[:1]


def _normed_inference(a: Arguments) -> Outputs:
    """Of the x behind the norm that stands in front of the block."""
    scale, shift = (a[name].reshape(-1, *(1 for _ in a["x"].shape[2:])) for name in ("x_scale", "x_shift"))
    return _inference({**a, "x": a["x"] * scale + shift})


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
    grad, x, mask_weight = before_relu(a), a["x"], a["mask_weight"]
    context, attention, hidden, s = (a[name].flatten(1) for name in ("context", "attention", "hidden", "gate_values"))
    grad_context = torch.zeros_like(context)
    found: list[Sequence[Tensor | None]] = []
    for name in ("scale", "shift"):
        w1 = a[f"{name}_w1"]
        if w1 is None:
            found.append((None,) * 6)
            continue
        grad_t = positions_of(grad * x if name == "scale" else grad).sum(2)
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
    dx, dw = pool_backward(grad_context, x, mask_weight, a["valid"], context, attention, in_parts=in_parts)
    dx = dx + (grad if a["scale_w1"] is None else grad * per_channel(_scale(a, s), x))
    return (
        dx if a["need_x"] else None,
        dw if a["need_mask_weight"] else None,
        zero_bias(a["need_mask_bias"], a["mask_bias"]),
        *(found[0] if a["need_scale"] else (None,) * 6),
        *(found[1] if a["need_shift"] else (None,) * 6),
        grad if a["need_residual"] and a["final_activation"] else None,
    )


def call(function: Function, a: Arguments, **options: Any) -> Any:
    """The function with the arguments of the operator: two branches, words for numbers, and no norm for no epsilon."""
    branches = {
        branch: Branch(*weights) if any(weight is not None for weight in weights) else None
        for branch in ("scale", "shift")
        for weights in [_branch(a, branch)]
    }
    named = {name: a[name] for name in ("x", "mask_weight", "mask_bias", "residual", "valid")}
    chosen: dict[str, Any] = {
        "activation": tuple(ACTIVATIONS)[a["activation"]],
        "slope": a["slope"],
        "norm": a["norm_eps"] is not None,
        "final_activation": tuple(FINAL_ACTIVATIONS)[a["final_activation"]],
    }
    if a["norm_eps"] is not None:
        chosen["eps"] = a["norm_eps"]
    if a["hard_gate"] is not None:
        chosen |= {"gate": "hard_sigmoid", "gate_alpha": a["hard_gate"][0], "gate_beta": a["hard_gate"][1]}
    return function(**{**named, **branches, **chosen, **options})


ARGUMENTS = (*GLOBAL_CONTEXT_INPUTS, "residual", "valid", *OPTIONS)
SAVED = {
    "context": lambda sizes: (sizes.n, sizes.c),
    "attention": lambda sizes: (sizes.n, sizes.positions if sizes.attended else 0),
    "hidden": lambda sizes: (sizes.n, sizes.hidden),
    "gate_values": lambda sizes: (sizes.n, sizes.c if sizes.gated else 0),
}
NEEDS = ("need_x", "need_mask_weight", "need_mask_bias", "need_scale", "need_shift", "need_residual")
OP = Op(
    operators=(
        Operator("global_context", ARGUMENTS, global_context),
        Operator("global_context_inference", ARGUMENTS, _inference),
        Operator("global_context_", ARGUMENTS, _inference),
        Operator("normed_global_context_inference", (*ARGUMENTS, "x_scale", "x_shift"), _normed_inference),
        Operator("normed_global_context_", (*ARGUMENTS, "x_scale", "x_shift"), _normed_inference),
        Operator(
            "global_context_backward",
            ("grad", *GLOBAL_CONTEXT_INPUTS, "valid", *OPTIONS, *SAVED, "positive", *NEEDS),
            global_context_backward,
            saved=SAVED,
            in_parts=partial(global_context_backward, in_parts=True),
        ),
    ),
    reference=reference,
    inputs=GLOBAL_CONTEXT_INPUTS,
    draw=lambda case, to, seed: case.inputs(to, seed),
    flat=flat,
    call=call,
    differentiated=lambda a: global_context(a, KernelPool.apply)[0],
    options=("scale", "shift", "norm", "eps", "activation", "gate", "gate_alpha", "gate_beta", "inplace"),
    vanishing=lambda case: case.vanishing,
    flops=lambda case: 4 * math.prod(case.shape) + 8 * math.prod(case.shape[:2]) * case.hidden,
)
