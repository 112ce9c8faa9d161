"""Loads the compiled libraries and tells PyTorch what it must know of their operators: shapes (_shapes.py) and gradients.

The only file that knows torch.library. A failed load is kept, not swallowed: `load_error` holds it, `python -m gcnet_ext`
prints it, and the first call that has to do without kernels warns with it.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import _build, _checks, _flops, _shapes, reference

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
    an export to ONNX, which has standard operators only.
    """
    if not isinstance(x, Tensor):
        _checks.is_tensor(x)
    if torch._C._are_functorch_transforms_active():
        return False
    if (is_compiling() or torch._C._is_tracing()) and torch.onnx.is_in_onnx_export():
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
# A gradient that nobody asked for is not computed and is None. The bias of the mask shifts every logit of a softmax alike: its
# gradient is zero, and a zero, not None, so that DistributedDataParallel does not take it for an unused parameter.


def below_autograd(name: str, args: tuple) -> Any:
    """The kernel itself, without a second look at the autograd key."""
    with torch._C._AutoDispatchBelowAutograd():
        return _operators[name](*args)


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


def _reference_context(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """attention_pool as the operator returns it, in the accumulation dtype, to be differentiated."""
    return reference.attention_pool(x, weight, constant(bias)).to(reference.accumulation_dtype(x))


def reference_block(x, mask_weight, mask_bias, *rest) -> Tensor:
    """global_context with the arguments of the operator."""
    branches = (rest[i : i + 6] for i in (0, 6))
    scale, shift = (reference.Transform(*branch) if any(w is not None for w in branch) else None for branch in branches)
    norm, eps, silu, hard_sigmoid, gate_alpha, gate_beta = rest[12:]
    activation, gate = "silu" if silu else "relu", "hard_sigmoid" if hard_sigmoid else "sigmoid"
    return reference.global_context(
        x, mask_weight, mask_bias, scale, shift,
        norm=norm, eps=eps, activation=activation, gate=gate, gate_alpha=gate_alpha, gate_beta=gate_beta,
    )  # fmt: skip


class _AttentionPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        context, attention = below_autograd("attention_pool", args)
        ctx.mark_non_differentiable(attention)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args, context, attention)
        return context, attention

    @staticmethod
    def backward(ctx, grad_context, _grad_attention):
        if grad_context is None:
            return None, None, None
        x, weight, bias, context, attention = ctx.saved_tensors
        if torch.is_grad_enabled():
            return through_reference(_reference_context, (x, weight, bias), ctx.needs_input_grad, grad_context)
        need_x, need_weight, need_bias = ctx.needs_input_grad
        args = grad_context, x, weight, context, attention, need_x, need_weight
        grad_x, grad_weight = below_autograd("attention_pool_backward", args)
        return _needed(need_x, grad_x), _needed(need_weight, grad_weight), torch.zeros_like(bias) if need_bias else None


class _ChannelFuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        ctx.save_for_backward(*args)
        return below_autograd("channel_fuse", args)

    @staticmethod
    def backward(ctx, grad):
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return through_reference(reference.channel_fuse, ctx.saved_tensors, needs, grad)
        return tuple(map(_needed, needs, below_autograd("channel_fuse_backward", (grad, *ctx.saved_tensors, *needs))))


class _GlobalContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        outputs = below_autograd("global_context", args)
        side = outputs[1:]
        ctx.mark_non_differentiable(*side)
        ctx.set_materialize_grads(False)
        ctx.options = args[15:]
        ctx.save_for_backward(*args[:15], *side)
        return outputs

    @staticmethod
    def backward(ctx, grad, *_grad_side):
        needs = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(needs)
        x, mask_weight, mask_bias, *rest = ctx.saved_tensors
        parameters, side = rest[:12], rest[12:]
        if torch.is_grad_enabled():
            inputs = (x, mask_weight, mask_bias, *parameters, *ctx.options)
            return through_reference(lambda x, w, b, *rest: reference_block(x, w, constant(b), *rest), inputs, needs, grad)
        wanted = needs[0], needs[1], any(needs[3:9]), any(needs[9:15])
        args = grad, x, mask_weight, *parameters, *ctx.options, *side, *wanted
        grads = below_autograd("global_context_backward", args)
        grad_mask_bias = torch.zeros_like(mask_bias) if needs[2] else None
        return (
            _needed(needs[0], grads[0]),
            _needed(needs[1], grads[1]),
            grad_mask_bias,
            *map(_needed, needs[3:15], grads[2:]),
            *(None for _ in ctx.options),
        )


_FUNCTIONS = {"attention_pool": _AttentionPool, "channel_fuse": _ChannelFuse, "global_context": _GlobalContext}


def _differentiable(name: str, args: tuple) -> Any:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return _FUNCTIONS[name].apply(*args)
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
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return _GlobalContext.apply(*args)[0]
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

    Does what torch.library.register_autograd does, which takes 0.2 ms a call for an operator of 21 arguments: it looks up the
    defaults of every argument, each time. For the same reason the functions have no setup_context, which binds the signature
    anew in each call; torch.func needs it, and gets plain PyTorch instead (has_kernels).
    """
    _implementations.impl(name, lambda *args: _differentiable(name, args), "Autograd")


def _without_second_derivative(name: str, args: tuple) -> Any:
    """An operator of the backward pass. Autograd calls it where nobody asked for a graph of the gradients."""
    _checks.not_differentiated(name, args)
    return below_autograd(name, args)


# Of tensors that are not strided; without a kernel for them torch would say so, but not which argument it was.
_REFUSED = (
    *("MkldnnCPU", "QuantizedCPU", "QuantizedCUDA"),
    *(f"{kind}{device}" for kind in ("Sparse", "SparseCsr", "NestedTensor") for device in ("CPU", "CUDA", "Meta")),
)


def _refuse(name: str, args: tuple) -> None:
    schema = getattr(torch.ops.gcnet_ext, name).default._schema
    _checks.strided(name.removesuffix("_inference"), [argument.name for argument in schema.arguments], args)


def _register() -> frozenset[str]:
    """Attaches shapes and gradients to the operators of the loaded library; returns the devices that have kernels."""
    for shapes in _shapes.OPERATORS:
        name = shapes.__name__
        torch.library.register_fake(f"gcnet_ext::{name}", shapes)
        # What the overload calls: its own __call__ is one more frame of Python, 3 to 5 us when nothing of it is in a cache.
        _operators[name] = getattr(torch.ops.gcnet_ext, name).default._op
        for key in _REFUSED:
            _implementations.impl(name, lambda *args, name=name: _refuse(name, args), key)
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
