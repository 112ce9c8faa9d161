"""Loads the compiled libraries and tells PyTorch what it must know of their operators: shapes (_shapes.py) and gradients.

The only file that knows torch.library. A failed load is kept, not swallowed: `load_error` holds it, `python -m gcnet_ext`
prints it, and the first call that has to do without kernels warns with it.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from . import _bits, _build, _checks, _flops, _shapes, _tuning, reference
from ._arguments import FINAL_ACTIVATIONS, Arguments, Options, Saved, flat, in_lists

HOW_TO_BUILD = "build them with `pip install --no-build-isolation .` in a checkout (see Install in README.md)"

_kernel_devices: frozenset[str] = frozenset()
_operators: dict[str, Callable[..., Any]] = {}
_warned: set[str] = set()


def _load() -> tuple[ModuleType | None, Exception | None]:
    try:
        if os.environ.get("GCNET_EXT_JIT", "0") == "1":
            from . import _jit

            return _jit.load(), None
        return importlib.import_module("gcnet_ext._C"), None
    except Exception as error:
        return None, error


compiled, load_error = _load()
"""The module ``gcnet_ext._C`` and None, or None and the error that loading it raised."""


def _load_cuda() -> str | None:
    """Loads the CUDA implementations beside the compiled module; returns why not, or None when they are there."""
    if compiled is None:
        return None
    built = compiled.build_info()
    if not built["cuda"]:
        return f"this build has no CUDA kernels: {built['without_cuda']}, and {HOW_TO_BUILD}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    if built["cuda"].split(".")[0] != torch.version.cuda.split(".")[0]:
        return (
            f"the CUDA kernels are built with CUDA {built['cuda']} and torch {torch.__version__} with CUDA "
            f"{torch.version.cuda}: the major versions must agree; {HOW_TO_BUILD}, which uses the installed torch"
        )
    try:
        (library,) = Path(str(compiled.__file__)).parent.glob("**/_C_cuda*.so")
        torch.ops.load_library(str(library))
        _tuning.library = ctypes.CDLL(str(library))
    except Exception as error:
        return (
            f"the CUDA kernels, built with CUDA {built['cuda']} for torch {built['torch']}, could not be loaded into "
            f"torch {torch.__version__} with CUDA {torch.version.cuda} ({type(error).__name__}: {error}); {HOW_TO_BUILD}"
        )
    return None


cuda_error = _load_cuda()
"""Why there are no CUDA kernels, or None."""


def kernel_devices() -> frozenset[str]:
    """The types of the devices that have compiled kernels; "meta" stands for their shapes."""
    return _kernel_devices


def has_kernels(x: Tensor) -> bool:
    """Whether x goes to compiled kernels. Warns once per device if CPU or CUDA kernels are missing.

    Inside torch.func transforms (grad, vmap, jvp) it does not: plain PyTorch is differentiable and batched in every way. Nor in
    an export to ONNX, which has standard operators only, nor under torch.jit.trace, which knows no list of optional tensors.
    """
    if not isinstance(x, Tensor):
        _checks.is_tensor(x)
    if torch._C._are_functorch_transforms_active():
        return False
    if torch.onnx.is_in_onnx_export() if is_compiling() else torch._C._is_tracing():
        return False
    device = "cpu" if x.is_cpu else x.device.type  # a torch.device and its name cost 20 us when they are not in a cache
    if device in _kernel_devices:
        return True
    if device in ("cpu", "cuda") and not is_compiling() and device not in _warned:
        _warned.add(device)
        warnings.warn(f"gcnet_ext uses plain PyTorch on {device}: {why_no_kernels(device)}", RuntimeWarning, stacklevel=4)
    return False


def why_no_kernels(device: str) -> str:
    """One sentence: why tensors on this device do without compiled kernels, and what to do about it."""
    if load_error is not None:
        told = f"the compiled kernels could not be loaded ({type(load_error).__name__}: {load_error}); {HOW_TO_BUILD}"
        if isinstance(load_error, ModuleNotFoundError) and _build.CSRC.is_dir():
            told += f". If you have installed gcnet_ext, run in another folder: here Python imports the checkout {_build.ROOT}"
        return told
    if device == "cuda" and cuda_error is not None:
        return cuda_error
    return f"there are no kernels for {device}"


# ---- gradients ---------------------------------------------------------------------------------------------------------------
# A gradient that nobody asked for is not computed and is None. That of the mask's bias is a zero, not None, so that
# DistributedDataParallel does not take it for an unused parameter.


def below_autograd(name: str, args: tuple) -> Any:
    """The kernel itself, without a second look at the autograd key; what it refuses is said in words."""
    try:
        with torch._C._AutoDispatchBelowAutograd():
            return _operators[name](*args)
    except RuntimeError as error:
        # The dispatcher says NotImplementedError of a sparse tensor, and the rules of csrc/check.h begin with the operator.
        operator = name.removesuffix("_inference")
        if isinstance(error, NotImplementedError) or str(error).startswith(f"gcnet_ext::{operator}: "):
            schema = getattr(torch.ops.gcnet_ext, name).default._schema
            try:
                _checks.explain(name, [argument.name for argument in schema.arguments], args)
            except RuntimeError as words:
                raise words from None
        raise


def _backward(tuning: _tuning.CudaTuning, name: str, args: tuple) -> Any:
    """The kernel of a backward pass, under the decisions of its forward pass."""
    if tuning is _tuning.decided():
        return below_autograd(name, args)
    with _tuning.cuda_tuning(tuning):
        return below_autograd(name, args)


def _needed(needed: bool, like: Tensor | None) -> Tensor | None:
    return like if needed else None


def through_reference(function: Callable[..., Tensor], inputs: tuple, needs: tuple[bool, ...], grad: Tensor) -> tuple:
    """The gradients by way of plain PyTorch, which can be differentiated again; for create_graph=True.

    They are taken with respect to aliases. In the caller's graph one input may depend on another or be given twice. Here
    backward must stop at each input; the path from one input to another belongs to the caller's graph.
    """
    with torch.enable_grad():
        aliases = [tensor.view_as(tensor) if need else tensor for tensor, need in zip(inputs, needs, strict=True)]
        wanted = [alias for alias, need in zip(aliases, needs, strict=True) if need]
        out = function(*aliases)
        # What the output does not depend on, as the parameters of a norm that is off, has a gradient of zeros.
        grads = (
            torch.autograd.grad(out, wanted, grad, create_graph=True, allow_unused=True, materialize_grads=True)
            if out.requires_grad
            else [torch.zeros_like(alias) for alias in wanted]
        )
    of_wanted = iter(grads)
    return tuple(next(of_wanted) if need else None for need in needs)


def constant(bias: Tensor | None) -> Tensor | None:
    """The bias of a mask, as nothing depends on it: the gradient is exactly zero, not what rounding leaves of it."""
    return None if bias is None else bias.detach()


def _before_relu(grad: Tensor, positive: Tensor, x: Tensor, final_activation: int) -> Tensor:
    """The gradient on the other side of the final ReLU, if there is one; it can be differentiated again."""
    return grad.where(_bits.unpack(positive, x), 0) if final_activation else grad


def _reference_block(options: Options, *tensors: Any) -> Tensor:
    """global_context without a residual, to be differentiated."""
    call = Arguments(*in_lists(tensors), *options)
    weight, bias = call.mask
    return reference.block(call._replace(mask=(weight, constant(bias))))


def _reference_context(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, valid: Tensor | None) -> Tensor:
    """attention_pool as the operator returns it, in the accumulation dtype, to be differentiated."""
    return reference.attention_pool(x, weight, constant(bias), valid=valid).to(reference.accumulation_dtype(x))


class _AttentionPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        context, attention = below_autograd("attention_pool", args)
        ctx.tuning = _tuning.decided()
        ctx.mark_non_differentiable(attention)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args, context, attention)
        return context, attention

    @staticmethod
    def backward(ctx, grad_context, _grad_attention):
        if grad_context is None:
            return None, None, None, None
        x, weight, bias, valid, context, attention = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            return *through_reference(partial(_reference_context, valid=valid), (x, weight, bias), needs, grad_context), None
        args = grad_context, x, weight, bias, valid, context, attention, needs
        return *map(_needed, needs, _backward(ctx.tuning, "attention_pool_backward", args)), None


class _ChannelFuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, shift, residual, final_activation):
        out, positive = below_autograd("channel_fuse", (x, scale, shift, residual, final_activation))
        ctx.mark_non_differentiable(positive)
        ctx.set_materialize_grads(False)
        ctx.final_activation, ctx.tuning = final_activation, _tuning.decided()
        ctx.save_for_backward(x, scale, shift, positive)
        return out, positive

    @staticmethod
    def backward(ctx, grad, _grad_positive):
        needs = ctx.needs_input_grad[:4]
        if grad is None:
            return (None,) * 5
        x, scale, shift, positive = ctx.saved_tensors
        final = ctx.final_activation
        if torch.is_grad_enabled():
            grad = _before_relu(grad, positive, x, final)
            gradients = through_reference(reference.channel_fuse, (x, scale, shift), needs[:3], grad)
            return *gradients, _needed(needs[3], grad), None
        args = grad, x, scale, shift, final, positive, list(needs)
        *gradients, grad_residual = _backward(ctx.tuning, "channel_fuse_backward", args)
        return *map(_needed, needs, (*gradients, grad_residual if final else grad)), None


def _block(ctx: Any, options: tuple, tensors: tuple) -> tuple[Tensor, ...]:
    """The results of global_context; what backward needs is saved."""
    outputs = below_autograd("global_context", (*in_lists(tensors), *options))
    ctx.set_materialize_grads(False)
    ctx.options, ctx.tuning = options, _tuning.decided()
    *others, _residual, valid = tensors  # no gradient depends on the residual
    ctx.save_for_backward(*others, None, valid, *outputs[1:])
    return outputs


class _GlobalContext(torch.autograd.Function):
    """Of the options and of each tensor by itself: autograd finds none in a list."""

    @staticmethod
    def forward(ctx, options, *tensors):
        outputs = _block(ctx, options, tensors)
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
        if torch.is_grad_enabled():
            grad = _before_relu(grad, Saved(*kept).positive, x, options.final_activation)
            linear = options._replace(final_activation=FINAL_ACTIVATIONS["none"])
            gradients = through_reference(partial(_reference_block, linear), tensors, (*needs[:-2], False, False), grad)
            return None, *gradients[:-2], _needed(need_residual, grad), None
        wanted = need_x, *need_mask, any(need_scale), any(need_shift), need_residual
        args = grad, x, mask, scale, shift, valid, *options, kept, wanted
        *gradients, grad_residual = _backward(ctx.tuning, "global_context_backward", args)
        of_tensors = flat(*gradients, grad_residual if options.final_activation else grad, None)
        return None, *map(_needed, needs, of_tensors[1:])


class _GlobalContextOutput(_GlobalContext):
    """The output alone: autograd need not know of the other results, which takes 4 us."""

    @staticmethod
    def forward(ctx, options, *tensors):
        return _block(ctx, options, tensors)[0]


_PARAMETER = {nn.Parameter, NoneType}


def _apply(function: type[torch.autograd.Function], options: Any, x: Tensor, *weights: Tensor | None) -> Any:
    """``function.apply``, which first looks at each argument for a wrapper that a transform of torch.func has left behind. That
    takes 2 us, and a parameter is none."""
    if torch._C._functorch.is_functorch_wrapped_tensor(x) or not _PARAMETER.issuperset(map(type, weights)):
        return function.apply(options, x, *weights)
    return super(torch.autograd.Function, function).apply(options, x, *weights)  # type: ignore[misc]


_FUNCTIONS = {
    "attention_pool": _AttentionPool,
    "channel_fuse": _ChannelFuse,
    "global_context": _GlobalContext,
}


def _differentiable(name: str, args: tuple) -> Any:
    if torch.is_grad_enabled():
        by_themselves = flat(*args) if name == "global_context" else args
        if torch._C._any_requires_grad(*by_themselves):  # it does not look into a list that has a None
            return _FUNCTIONS[name].apply(*by_themselves)
    return below_autograd(name, args)


def call(name: str, *args: Any) -> Any:
    """The operator. A graph that is being captured gets it as one node; otherwise it starts where the dispatcher would lead to,
    without converting every argument to C++ and back on the way."""
    if is_compiling():
        return getattr(torch.ops.gcnet_ext, name).default(*args)
    return _differentiable(name, args)


def global_context(*args: Any) -> Tensor:
    """The output alone. If nothing requires a gradient, nothing is saved for backward, except in a captured graph."""
    if is_compiling():
        return torch.ops.gcnet_ext.global_context.default(*args)[0]
    if torch.is_grad_enabled():
        by_themselves = flat(*args)
        if torch._C._any_requires_grad(*by_themselves):
            return _apply(_GlobalContextOutput, *by_themselves)
    return below_autograd("global_context_inference", args)


def _without_gradient(name: str, args: tuple) -> None:
    """An operator that overwrites x: autograd would need what was there."""
    _checks.no_gradient(name, args)
    x = args[0]
    if isinstance(x, Tensor) and x.is_neg():  # a lazy minus sign, as the imaginary part of a conjugate has
        positive = x.resolve_neg()
        below_autograd(name, (positive, *args[1:]))
        x.copy_(positive)
        return
    below_autograd(name, args)
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)  # a graph that saved x must not use it any more


def call_in_place(name: str, *args: Any) -> None:
    """Calls the in-place operator in the same way as `call`."""
    if is_compiling():
        getattr(torch.ops.gcnet_ext, name).default(*args)
    else:
        _without_gradient(name, args)


_implementations = torch.library.Library("gcnet_ext", "IMPL")


def _register_autograd(name: str) -> None:
    """Makes the operator differentiable.

    Does what torch.library.register_autograd does, which takes 0.2 ms a call for the block: it looks up the defaults of every
    argument, each time. For the same reason the functions have no setup_context, which binds the signature anew in each call;
    torch.func needs it, and gets plain PyTorch instead (has_kernels).
    """
    _implementations.impl(name, lambda *args: _differentiable(name, args), "Autograd")


def _without_second_derivative(name: str, args: tuple) -> Any:
    """An operator of the backward pass. Autograd calls it where nobody asked for a graph of the gradients."""
    _checks.not_differentiated(name, args)
    return below_autograd(name, args)


def _register() -> frozenset[str]:
    """Attaches shapes and gradients to the operators of the loaded library; returns the devices that have kernels."""
    for shapes in _shapes.OPERATORS:
        name = shapes.__name__
        torch.library.register_fake(f"gcnet_ext::{name}", shapes)
        # What the overload calls: its own __call__ is one more frame of Python, 3 to 5 us when nothing of it is in a cache.
        _operators[name] = getattr(torch.ops.gcnet_ext, name).default._op
    for name in _FUNCTIONS:
        _register_autograd(name)
    _implementations.impl("global_context_inference", global_context, "Autograd")
    for name in ("channel_fuse_", "global_context_"):
        _implementations.impl(name, lambda *args, name=name: _without_gradient(name, args), "Autograd")
    for name in _FUNCTIONS:
        backward = f"{name}_backward"
        _implementations.impl(backward, lambda *args, name=backward: _without_second_derivative(name, args), "Autograd")
    _flops.register()
    return frozenset({"cpu", "meta"} if cuda_error is not None else {"cpu", "cuda", "meta"})


if compiled is not None:
    _kernel_devices = _register()
