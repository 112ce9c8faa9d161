"""How a call reaches its kernel, and what PyTorch is told of each operator. The only file that knows torch.library."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils.flop_counter import register_flop_formula

from .. import _load, _torch, _tuning
from . import _checks, _switch

kernels: dict[str, Callable[..., Any]] = {}
in_plain_pytorch: dict[Any, Callable[..., Any]] = {}
_rules: dict[str, tuple[Callable[..., Any], Callable[[str, Any], None]]] = {}
_warned: set[str] = set()
_implementations = torch.library.Library("gcnet_ext", "IMPL")

PLAIN, DIRECT, RECORDED = range(3)
"""The ways of a call: plain PyTorch; the kernels, called directly; the operator, for a graph that records it."""


# ---- the way of a call -------------------------------------------------------------------------------------------------------


def way_of(x: Tensor, *others: Tensor | None) -> int:
    """The way of a call with x and the other tensors. Warns once per device if CPU or CUDA kernels are missing.

    Inside torch.func transforms (grad, vmap, jvp) and in forward mode it is plain PyTorch, which is differentiable and batched
    in every way. It is that, too, for a subclass of Tensor with a __torch_function__ or __torch_dispatch__ of its own, as the
    kernels would read past those; and, unless a user wants it otherwise, in an export to ONNX, which has standard operators
    only, and under torch.jit.trace, whose file would load only where our operators are.
    """
    usual = type(x) is Tensor
    if not usual and not isinstance(x, Tensor):
        _checks.is_tensor(x)
    compiling = is_compiling()
    plain = _switch.latest if compiling or not _switch.was_turned else _switch.choice.get()
    if plain or _torch.inside_transform():
        return PLAIN
    recorded = compiling or _torch.is_tracing()
    if recorded and plain is None and (not compiling or torch.onnx.is_in_onnx_export()):
        return PLAIN
    if not compiling:
        if _torch.forward_level() >= 0:
            return PLAIN
        for other in others:  # in half the time that a set of their classes takes
            if other is not None and type(other) is not Tensor and type(other) not in _torch.PLAIN_TENSORS:
                usual = False
        if not usual and _torch.has_own_ways(x, *others):
            return PLAIN
    device = "cpu" if x.is_cpu else x.device.type  # a torch.device and its name cost 20 us when they are not in a cache
    if device in _load.kernel_devices:
        return RECORDED if recorded else DIRECT
    if device in ("cpu", "cuda") and not compiling and device not in _warned:
        _warned.add(device)
        why = _load.why_no_kernels(device)
        warnings.warn(f"gcnet_ext uses plain PyTorch on {device}: {why}", RuntimeWarning, stacklevel=4)
    return PLAIN


def call(way: int, name: str, differentiable: Callable[..., Any], *args: Any) -> Any:
    """Calls the operator. A graph that records it gets it as one node. Otherwise this calls the function that the dispatcher
    would call, because the dispatcher converts every argument to C++ and back."""
    if way == RECORDED:
        return getattr(torch.ops.gcnet_ext, name).default(*args)
    return differentiable(*args)


def overwrite(way: int, name: str, *args: Any) -> None:
    """Calls an operator that overwrites x, as `call` calls the others."""
    call(way, name, partial(_without_gradient, name), *args)


def may_overwrite(way: int) -> bool:
    """Whether the operator that overwrites x is called. Tools that read a graph of torch.export or torch.jit.trace often do not
    know it: for them, as in plain PyTorch, the result is computed and then copied to x."""
    return way == DIRECT or (way == RECORDED and is_compiling() and not torch.compiler.is_exporting())


def differentiable(function: type[torch.autograd.Function], name: str, *args: Any) -> Any:
    """The results of the operator, with the gradients of the function where one is asked for."""
    if torch.is_grad_enabled() and _torch.any_requires_grad(*args):
        return function.apply(*args)
    return below_autograd(name, args)


def _without_gradient(name: str, x: Tensor, *args: Any) -> None:
    """An operator that overwrites x: autograd would need what was there."""
    _checks.no_gradient(name, (x, *args))
    _checks.no_tangent(name, (x, *args))
    if isinstance(x, Tensor) and x.is_neg():  # a lazy minus sign, as the imaginary part of a conjugate has
        positive = x.resolve_neg()
        below_autograd(name, (positive, *args))
        x.copy_(positive)
        return
    below_autograd(name, (x, *args))
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)  # a graph that saved x must not use it any more


def _without_second_derivative(name: str, *args: Any) -> Any:
    """An operator of the backward pass. Autograd calls it where nobody asked for a graph of the gradients."""
    _checks.not_differentiated(name, args)
    _checks.no_tangent(name, args)
    return below_autograd(name, args)


def below_autograd(name: str, args: tuple) -> Any:
    """Calls the kernel without going through the Autograd key. If it refuses an argument, the error says why in words."""
    try:
        with _torch.below_autograd():
            return kernels[name](*args)
    except RuntimeError as error:
        # The dispatcher says NotImplementedError of a sparse tensor, and the rules of csrc/check.h begin with the operator.
        if isinstance(error, NotImplementedError) or str(error).startswith(f"gcnet_ext::{_checks.public(name)}: "):
            try:
                _explain(name, args)
            except RuntimeError as words:
                raise words from None
        raise


def backward(tuning: _tuning.CudaTuning, name: str, args: tuple) -> Any:
    """The kernel of a backward pass, under the decisions of its forward pass."""
    if tuning is _tuning.decided():
        return below_autograd(name, args)
    with _tuning.cuda_tuning(tuning):
        return below_autograd(name, args)


def _explain(name: str, args: Sequence[Any]) -> None:
    """Says in words what a kernel or the dispatcher refused; returns where the checks find nothing."""
    named, check = _rules[name]
    op, arguments = _checks.public(name), named(*args)
    check(op, arguments)
    if name.endswith("_"):
        _checks.not_overlapping(op, arguments.residual, arguments.x)


# ---- what PyTorch is told ----------------------------------------------------------------------------------------------------


def register(
    name: str,
    named: Callable[..., Any],
    *,
    check: Callable[[str, Any], None],
    shapes: Callable[[Any], Any],
    flops: Callable[[Any], int] = lambda _: 0,
    differentiable: Callable[..., Any] | None = None,
    plain: Callable[[Any], Any] | None = None,
    any_layout: bool = False,
) -> None:
    """Tells PyTorch what it must know of one operator of csrc/ops.cpp.

    Args:
        name: as in the schema. One that ends with an underscore overwrites x; the gradient of one that ends with ``_backward``
            is refused.
        named: a NamedTuple of the arguments, by the names that the schema has.
        check: called with the operator's name and the named arguments; raises an error in words.
        shapes: returns tensors like those that the kernels return, without computing them. The arguments are checked before.
        flops: of shapes in the place of tensors, two for each multiply-add of a product, as PyTorch counts.
        differentiable: the operator with its gradient. It does what torch.library.register_autograd does, which takes 0.2 ms a
            call for the block, because it looks up the defaults of every argument, each time.
        plain: all results of the operator in plain PyTorch, of named arguments: for graphs without operators of ours, and for
            arguments with a tangent.
        any_layout: whether torch.compile may give maps in another memory format than they have in eager code. Its convolutions
            are channels_last on a CPU, and a copy before and after the operator takes longer than the operator. One that
            saves bits for a backward pass cannot allow it, because their order is that of x in memory.
    """
    _rules[name] = named, check
    if _load.compiled is None:
        return
    overload = getattr(torch.ops.gcnet_ext, name).default

    def fake(*args: Any) -> Any:
        arguments = named(*args)
        check(_checks.public(name), arguments)
        return shapes(arguments)

    if any_layout:
        overload.tags.append(torch.Tag.flexible_layout)
    torch.library.register_fake(f"gcnet_ext::{name}", fake)
    register_flop_formula(overload.overloadpacket)(lambda *args, **_: flops(named(*args)))
    if differentiable is None:
        differentiable = partial(_without_gradient if name.endswith("_") else _without_second_derivative, name)
    if plain is not None:
        in_plain_pytorch[overload] = decomposition = _of_arguments(named, plain)
        differentiable = _unless_plain(name, decomposition, differentiable)
    _implementations.impl(name, differentiable, "Autograd")
    kernels[name] = _torch.kernel_of(overload)


# ---- operators in plain PyTorch ----------------------------------------------------------------------------------------------


def _of_arguments(named: Callable[..., Any], plain: Callable[[Any], Any]) -> Callable[..., Any]:
    def decomposition(*args: Any) -> Any:
        return plain(named(*args))

    return decomposition


def _unless_plain(name: str, decomposition: Callable[..., Any], differentiable: Callable[..., Any]) -> Callable[..., Any]:
    """What the dispatcher calls for an operator of a graph that was captured before, or that a user has called by its name.

    `run_decompositions` and torch.onnx.export call every operator of an exported program again. Of arguments with a tangent,
    the first result gets one; it is the only one that has a derivative.
    """

    def chosen(*args: Any) -> Any:
        plain = _switch.choice.get()
        if plain or (plain is None and torch.onnx.is_in_onnx_export()):
            return decomposition(*args)
        if not _torch.has_tangent(*args):
            return differentiable(*args)
        found = decomposition(*args)
        return found if isinstance(found, Tensor) else (found[0], *below_autograd(name, args)[1:])

    return chosen


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The operators of the forward pass in PyTorch's own, as a table for ``ExportedProgram.run_decompositions``.

    ``program.run_decompositions(gcnet_ext.decompositions())`` leaves operators of ``aten`` only, for tools that know no others.
    It decomposes nothing else; for core ATen in one step, put it into torch's table:
    ``table = torch.export.default_decompositions(); table.update(gcnet_ext.decompositions())``.

    Returns:
        A new dictionary from operator to function. It is empty where the compiled library is missing, because no graph has our
        operators there.
    """
    return dict(in_plain_pytorch)
