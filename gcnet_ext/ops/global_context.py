"""The whole Global Context block as one operator per direction."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _torch, _tuning
from . import _checks, _dispatch, _relu_bits, _shapes, _traced, _transform, attention_pool, channel_fuse
from ._autograd import before_relu, constant, in_plain_pytorch, needed, through_plain_pytorch
from ._global_context_arguments import Arguments, BackwardArguments, Gradients, Needs, NormedArguments, Saved, flat, in_lists
from ._options import FINAL_ACTIVATIONS, Choices, Options
from ._precision import accumulation_dtype, beside
from ._transform import Branch, Tensors


def global_context(
    x: Tensor,
    mask_weight: Tensor | None = None,
    mask_bias: Tensor | None = None,
    scale: Branch | None = None,
    shift: Branch | None = None,
    *,
    residual: Tensor | None = None,
    valid: Tensor | None = None,
    norm: bool = True,
    eps: float = 1e-5,
    activation: str = "relu",
    slope: float = 0.01,
    gate: str = "sigmoid",
    gate_alpha: float = 1 / 6,
    gate_beta: float = 0.5,
    final_activation: str = "none",
    inplace: bool = False,
) -> Tensor:
    """The whole Global Context block (the paper, equation 5) as one operator per direction.

    ``context = attention_pool(x)``, then per branch ``t = w2 act(norm(w1 context + b1)) + b2``, then
    ``out = final(x * gate(t_scale) + t_shift + residual)``: the multiplication first, both branches from the same context.
    Forward saves x and buffers of N*P, N*C and N*H values, and behind a final ReLU a bit for each element.

    Args:
        x: ``[N, C, *spatial]``, at least one position.
        mask_weight: ``[C]`` or ``[1, C, 1, ...]``; None for average pooling, as in squeeze-excitation.
        mask_bias: one element or None; its gradient is zero.
        scale: weights of the branch that multiplies, or None.
        shift: weights of the branch that adds, or None. At least one of the two is needed.
        residual: what is added to the result, of the shape and dtype of x, or None. It may be x itself. In another memory
            format than that of x it is copied first.
        valid: which positions count in the pool, as for `attention_pool`. The fusion applies to every position.
        norm: whether a LayerNorm over the H hidden units stands between the two layers.
        eps: epsilon of that LayerNorm.
        activation: between the two layers: ``"none"``, ``"relu"``, ``"silu"``, ``"gelu"``, ``"gelu_tanh"``, ``"hardswish"`` or
            ``"leaky_relu"``, as torch.nn.functional has them.
        slope: of ``"leaky_relu"`` below 0.
        gate: ``"sigmoid"``, or ``"hard_sigmoid"`` for ``clip(gate_alpha t + gate_beta, 0, 1)``.
        gate_alpha, gate_beta: slope and offset of the hard sigmoid; torch uses 1/6 and 1/2, ONNX 0.2 and 0.5.
        final_activation: of the result: ``"none"`` or ``"relu"``.
        inplace: overwrite x with the result and return it. For inference: nothing may require a gradient.

    Returns:
        Like x. Differentiable in x, the residual and every weight.

    Raises:
        RuntimeError: no branch is given; an argument has a wrong value, shape, dtype or device; or with ``inplace`` it requires
            a gradient, elements of x share memory, or the residual shares a part of x's. The message names it.
        TypeError: x is not a tensor, or a branch is not a `Branch`.
    """
    choices = Choices(norm, eps, activation, slope, gate, gate_alpha, gate_beta, final_activation)
    call = _call(x, [mask_weight, mask_bias], scale, shift, residual, valid, choices)
    if _torch.has_own_ways(*call.mask, *call.scale, *call.shift, residual, valid):
        return _in_plain_pytorch(call, inplace)
    return with_lists(x, (call.mask, call.scale, call.shift), residual, valid, call.options(), inplace=inplace)


def _call(
    x: Tensor,
    mask: Tensors,
    scale: Branch | None,
    shift: Branch | None,
    residual: Tensor | None,
    valid: Tensor | None,
    choices: Choices,
) -> Arguments:
    """Converts the arguments of the public function to the arguments of the operator."""
    options = choices.options("global_context")
    _transform.check_type("global_context", "scale", scale)
    _transform.check_type("global_context", "shift", shift)
    return Arguments.of_branches(x, mask, scale, shift, options, residual, valid)


def with_lists(
    x: Tensor,
    weights: Sequence[Tensors],
    residual: Tensor | None,
    valid: Tensor | None,
    options: Options,
    *,
    inplace: bool,
    norm: tuple[Tensor, Tensor] | None = None,
    way: int | None = None,
) -> Tensor:
    """`global_context` with the lists of the operator, each complete: of the mask, of the scale and of the shift.

    Only x may be of a class with ways of its own. If nothing requires a gradient, nothing is saved for backward. With a norm,
    x_scale and x_shift of csrc/ops.cpp, x is on the CPU and nothing may require a gradient. The way is
    what way_of(x) has returned, or None where the caller has not asked.
    """
    if _torch.any_autocast():
        weights = [beside(x, *tensors) for tensors in weights]
    args: tuple[Any, ...] = (x, *weights, residual, valid, *options)
    if way is None:
        way = _dispatch.way_of(x)
    if not way and not inplace:
        return block(Arguments(*args), norm)
    inference, overwriting = "global_context_inference", "global_context_"
    if norm is not None:
        inference, overwriting, args = "normed_global_context_inference", "normed_global_context_", (*args, *norm)
    if inplace:
        if _dispatch.may_overwrite(way):
            _dispatch.overwrite(way, overwriting, *args)
            return x
        _checks.no_gradient("global_context_", args)
        return x.copy_(with_lists(x, weights, residual, valid, options, inplace=False, norm=norm, way=way))
    if way == _dispatch.RECORDED:
        if not is_compiling():
            return _traced.global_context(*args)
        # Autograd puts the operator that saves what backward reads in its place, if there is a backward pass.
        return getattr(torch.ops.gcnet_ext, inference).default(*args)
    if norm is None and torch.is_grad_enabled() and _torch.any_requires_grad(*(by_themselves := flat(*args))):
        return _torch.apply(_GlobalContextOutput, *by_themselves)
    return _dispatch.below_autograd(inference, args)


def _in_plain_pytorch(call: Arguments, inplace: bool) -> Tensor:
    if inplace:
        _checks.no_gradient("global_context_", call)
    out = block(call)
    return call.x.copy_(out) if inplace else out


# ---- plain PyTorch -----------------------------------------------------------------------------------------------------------


def reference(
    x: Tensor,
    mask_weight: Tensor | None = None,
    mask_bias: Tensor | None = None,
    scale: Branch | None = None,
    shift: Branch | None = None,
    *,
    residual: Tensor | None = None,
    valid: Tensor | None = None,
    **choices: Any,
) -> Tensor:
    """`global_context` in plain PyTorch."""
    return block(_call(x, [mask_weight, mask_bias], scale, shift, residual, valid, Choices(**choices)))


def block(call: Arguments, norm: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """act(x * gate(t_scale) + t_shift + residual), the output of the operator alone; with a norm, of the x behind it."""
    return _steps(call, norm).out


def results(call: Arguments) -> tuple[Tensor, ...]:
    """The results of the operator in plain PyTorch: the output, and what backward reads."""
    steps = _steps(call)
    context, hard_gate = steps.context, call.hard_gate
    nothing = context[:, :0]
    return (
        steps.out,
        context,
        nothing if steps.attention is None else steps.attention,
        torch.cat(steps.hidden, 1),
        nothing if steps.t_scale is None else _transform.gate_values(steps.t_scale, hard_gate),
        _relu_bits.pack(steps.out, call.x, call.final_activation),
    )


class _Steps(NamedTuple):
    """What the block computes on its way, in plain PyTorch."""

    context: Tensor
    attention: Tensor | None
    hidden: list[Tensor]  # of the scale and of the shift, of those that are there
    t_scale: Tensor | None
    out: Tensor


def _steps(call: Arguments, norm: tuple[Tensor, Tensor] | None = None) -> _Steps:
    _check("global_context", call)
    x, options = call.x, call.options()
    mask_weight, mask_bias = call.mask
    scale, shift = call.branches()
    wide = x.to(accumulation_dtype(x))
    if norm is not None:
        wide = _normed(wide, *norm)
    valid = attention_pool.flat_valid(call.valid)
    context, attention = attention_pool.attend(wide.flatten(2), mask_weight, mask_bias, valid)
    of_scale, of_shift = (None if weights is None else _transform.first_layer(context, weights) for weights in (scale, shift))
    t_scale = None if scale is None or of_scale is None else _transform.second_layer(of_scale, scale, options)
    t_shift = None if shift is None or of_shift is None else _transform.second_layer(of_shift, shift, options)
    gate = None if t_scale is None else _transform.apply_gate(t_scale, options.hard_gate)
    out = channel_fuse.fuse(wide, gate, t_shift, call.residual, options.final_activation).to(x.dtype)
    return _Steps(context, attention, [hidden for hidden in (of_scale, of_shift) if hidden is not None], t_scale, out)


def _normed(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * scale + shift of each channel."""
    sizes = -1, *(1 for _ in x.shape[2:])
    return x * scale.reshape(sizes).to(x.dtype) + shift.reshape(sizes).to(x.dtype)


# ---- checks ------------------------------------------------------------------------------------------------------------------


def _check(op: str, call: Arguments) -> None:
    x = call.x
    for name, values, wanted in (("mask", call.mask, 2), ("scale", call.scale, 6), ("shift", call.shift, 6)):
        _checks.count(op, name, values, wanted)
    call.options().check(op)
    _checks.feature_map(op, x)
    weight, bias = call.mask
    _checks.mask(op, "mask_", weight, bias, x)
    if call.scale[0] is None and call.shift[0] is None:
        _checks.fail(op, "scale_w1 or shift_w1 must be given, got None for both")
    _transform.check_branch(op, "scale", call.scale, x)
    _transform.check_branch(op, "shift", call.shift, x)
    _checks.residual(op, call.residual, x)
    _checks.valid(op, call.valid, x)


def _check_normed(op: str, call: NormedArguments) -> None:
    x = call.x
    _check(op, call.block())
    _checks.parameter(op, "x_scale", call.x_scale, x, (x.shape[1],))
    _checks.parameter(op, "x_shift", call.x_shift, x, (x.shape[1],))
    if x.is_cuda:
        _checks.fail(op, f"x must be on the CPU where it has x_scale and x_shift, got {x.device}; apply the norm to x before")


def _check_in_place(op: str, call: Arguments) -> None:
    _check(op, call)
    _checks.in_place(op, call.x)


def _check_normed_in_place(op: str, call: NormedArguments) -> None:
    _check_normed(op, call)
    _checks.in_place(op, call.x)


def _check_backward(op: str, call: BackwardArguments) -> None:
    _checks.count(op, "needs", call.needs, len(Needs._fields))
    _checks.count(op, "saved", call.saved, len(Saved._fields))
    forward, saved = call.forward(), Saved(*call.saved)
    _check(op, forward)
    _checks.gradient(op, call.grad, call.x)
    for name, sizes in _saved_sizes(forward).items():
        _checks.saved(op, name, getattr(saved, name), call.x, sizes)
    _checks.positive(op, saved.positive, call.x, call.final_activation)


# ---- shapes and FLOPs --------------------------------------------------------------------------------------------------------


def _saved_sizes(call: Arguments) -> dict[str, tuple[int, int]]:
    """The sizes of what is saved in the accumulation dtype."""
    samples, channels = call.x.shape[:2]
    return {
        "context": (samples, channels),
        "attention": (samples, attention_pool.attended(call.x, call.mask[0])),
        "hidden": (samples, _transform.hidden_units(call.scale) + _transform.hidden_units(call.shift)),
        "gate_values": (samples, 0 if call.scale[0] is None else channels),
    }


def _result_shapes(call: Arguments) -> tuple[Tensor, ...]:
    sums = (_shapes.accumulated(call.x, *sizes) for sizes in _saved_sizes(call).values())
    return _shapes.like_map(call.x), *sums, _shapes.bits(call.x, call.final_activation)


def _gradient_shapes(call: BackwardArguments) -> tuple[Any, ...]:
    x, needs, (mask_weight, mask_bias) = call.x, Needs(*call.needs), call.mask
    return tuple(
        Gradients(
            x=_shapes.map_gradient(needs.x, x),
            mask=[_shapes.gradient(needs.mask_weight, mask_weight, x), _shapes.gradient(needs.mask_bias, mask_bias, x)],
            scale=_shapes.gradients(needs.scale, call.scale, x),
            shift=_shapes.gradients(needs.shift, call.shift, x),
            residual=_shapes.map_gradient(needs.residual and call.final_activation, x),
        )
    )


def _flops(call: Arguments) -> int:
    branches = sum(_transform.flops(call.x[0], weights) for weights in (call.scale, call.shift))
    return attention_pool.flops(call.x, call.mask[0]) + branches


def _backward_flops(call: BackwardArguments) -> int:
    weight, needs = call.mask[0], Needs(*call.needs)
    need_context = needs.x or (needs.mask_weight and weight is not None)
    return (
        attention_pool.backward_flops(call.x, weight, needs.x, needs.mask_weight)
        + _transform.backward_flops(call.x[0], call.scale, need_context, needs.scale)
        + _transform.backward_flops(call.x[0], call.shift, need_context, needs.shift)
    )


# ---- gradients ---------------------------------------------------------------------------------------------------------------


def _block_to_differentiate(options: Options, *tensors: Any) -> Tensor:
    """The block without its residual: the gradient of a residual is simply the gradient before the final ReLU."""
    call = Arguments(*in_lists(tensors), *options)
    weight, bias = call.mask
    return block(call._replace(mask=(weight, constant(bias))))


def _run(ctx: Any, options: tuple, tensors: tuple) -> tuple[Tensor, ...]:
    """The results of global_context; what backward needs is saved."""
    outputs = _dispatch.below_autograd("global_context", (*in_lists(tensors), *options))
    ctx.set_materialize_grads(False)
    ctx.options, ctx.tuning = options, _tuning.decided()
    *others, _residual, valid = tensors  # no gradient depends on the residual
    ctx.save_for_backward(*others, None, valid, *outputs[1:])
    return outputs


class _GlobalContext(torch.autograd.Function):
    """Takes the options and then each tensor as a separate argument, because autograd does not look for tensors in a list."""

    @staticmethod
    def forward(ctx, options, *tensors):
        outputs = _run(ctx, options, tensors)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx, grad, *_grad_kept):
        needs = ctx.needs_input_grad[1:]
        if grad is None:
            return (None, *(None for _ in needs))
        saved, options = ctx.saved_tensors, Options(*ctx.options)
        tensors, kept = saved[: len(needs)], saved[len(needs) :]
        x, mask, scale, shift, _, valid = in_lists(tensors)
        need_x, need_mask, need_scale, need_shift, need_residual, _ = in_lists(needs)
        if in_plain_pytorch(grad):
            grad = before_relu(grad, Saved(*kept).positive, x, options.final_activation)
            function = partial(_block_to_differentiate, options._replace(final_activation=FINAL_ACTIVATIONS["none"]))
            gradients = through_plain_pytorch(function, tensors, (*needs[:-2], False, False), grad)
            return None, *gradients[:-2], needed(need_residual, grad), None
        wanted = need_x, *need_mask, any(need_scale), any(need_shift), need_residual
        args = grad, x, mask, scale, shift, valid, *options, kept, wanted
        *gradients, grad_residual = _dispatch.backward(ctx.tuning, "global_context_backward", args)
        of_tensors = flat(*gradients, grad_residual if options.final_activation else grad, None)
        return None, *map(needed, needs, of_tensors[1:])


class _GlobalContextOutput(_GlobalContext):
    """Returns the output alone: to wrap the other results for autograd would take 4 us."""

    @staticmethod
    def forward(ctx, options, *tensors):
        return _run(ctx, options, tensors)[0]


def _differentiable(*args: Any) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and _torch.any_requires_grad(*(by_themselves := flat(*args))):
        return _GlobalContext.apply(*by_themselves)
    return _dispatch.below_autograd("global_context", args)


def _differentiable_output(*args: Any) -> Tensor:
    if torch.is_grad_enabled() and _torch.any_requires_grad(*(by_themselves := flat(*args))):
        return _torch.apply(_GlobalContextOutput, *by_themselves)
    return _dispatch.below_autograd("global_context_inference", args)


def _differentiable_normed_output(*args: Any) -> Tensor:
    call = NormedArguments(*args)
    block = call.block()
    if torch.is_grad_enabled() and _torch.any_requires_grad(*call.norm(), *flat(*block)):
        _check_normed("global_context", call)
        x = _normed(call.x, *call.norm()).to(call.x.dtype)
        return _torch.apply(_GlobalContextOutput, *flat(*block._replace(x=x)))
    return _dispatch.below_autograd("normed_global_context_inference", args)


_dispatch.register(
    "global_context",
    Arguments,
    check=_check,
    shapes=_result_shapes,
    flops=_flops,
    differentiable=_differentiable,
    plain=results,
)
_dispatch.register(
    "global_context_inference",
    Arguments,
    check=_check,
    shapes=lambda call: _result_shapes(call)[0],
    flops=_flops,
    differentiable=_differentiable_output,
    plain=block,
    any_layout=True,
)
_dispatch.register("global_context_", Arguments, check=_check_in_place, shapes=lambda _: None, flops=_flops, any_layout=True)
_dispatch.register(
    "normed_global_context_inference",
    NormedArguments,
    check=_check_normed,
    shapes=lambda call: _result_shapes(call.block())[0],
    flops=lambda call: _flops(call.block()),
    differentiable=_differentiable_normed_output,
    plain=lambda call: block(call.block(), call.norm()),
    any_layout=True,
)
_dispatch.register(
    "normed_global_context_",
    NormedArguments,
    check=_check_normed_in_place,
    shapes=lambda _: None,
    flops=lambda call: _flops(call.block()),
    any_layout=True,
)
_dispatch.register(
    "global_context_backward", BackwardArguments, check=_check_backward, shapes=_gradient_shapes, flops=_backward_flops
)
