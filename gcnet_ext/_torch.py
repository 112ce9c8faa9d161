"""The private names of torch that this package uses, each with public ones that do its work more slowly.

A private name may be gone in any later torch. Where one is missing, or where GCNET_EXT_PUBLIC_TORCH=1 is set before the import,
the public ones take its place. The results are the same.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from types import NoneType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils._pytree import tree_map_only

T = TypeVar("T")
_ONLY_PUBLIC = os.environ.get("GCNET_EXT_PUBLIC_TORCH", "0") == "1"


def _private(name: str, public: T) -> T:
    """What torch has under the private name, or what takes its place."""
    if _ONLY_PUBLIC:
        return public
    try:
        return attrgetter(name)(torch)
    except AttributeError:
        return public


# ---- calls of operators ------------------------------------------------------------------------------------------------------


def _kernel_in_inference_mode(overload: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel of an operator below autograd: inference mode has no autograd. Its results cannot be saved for a backward
    pass, but copies of them can."""

    def kernel(*args: Any) -> Any:
        with torch.inference_mode():
            results = overload(*args)
        return tree_map_only(Tensor, Tensor.clone, results)

    return kernel


below_autograd: Callable[[], contextlib.AbstractContextManager] = _private(
    "_C._AutoDispatchBelowAutograd", contextlib.nullcontext
)
"""In this context, what `kernel_of` returns does not go through the Autograd key of the dispatcher."""


def kernel_of(overload: Any) -> Callable[..., Any]:
    """What is called in the context `below_autograd`. The overload's own __call__ is one more frame of Python, which takes 3 to
    5 us when nothing of it is in a cache."""
    if below_autograd is contextlib.nullcontext:
        return _kernel_in_inference_mode(overload)
    return getattr(overload, "_op", overload)


def _any_requires_grad(*args: object) -> bool:
    return any(isinstance(value, Tensor) and value.requires_grad for value in args)


any_requires_grad: Callable[..., bool] = _private("_C._any_requires_grad", _any_requires_grad)
"""Whether one of the arguments is a tensor that requires a gradient. It does not look into a list that has a None."""


class _Probe(torch.autograd.Function):
    """A function without setup_context: torch refuses to call it inside a transform of torch.func."""

    @staticmethod
    def forward(_ctx: Any) -> None:
        return None


def _refuses_a_function() -> bool:
    try:
        _Probe.apply()
    except RuntimeError:
        return True
    return False


is_tracing: Callable[[], bool] = _private("_C._is_tracing", torch.jit.is_tracing)
"""Whether torch.jit.trace records the calls. torch.compile cannot look at it: see `is_traced`."""


def is_traced() -> bool:
    """Whether torch.jit.trace records the calls, where torch.compile may be capturing them."""
    return not is_compiling() and is_tracing()


inside_transform: Callable[[], bool] = _private("_C._are_functorch_transforms_active", _refuses_a_function)
"""Whether a transform of torch.func (grad, vmap, jvp) is running."""

_NUMBER = torch.zeros(())


def _forward_level() -> int:
    """torch refuses to make a dual tensor where no level is open."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it loads a module of torch that TorchScript compiles, which is deprecated
        try:
            forward_ad.make_dual(_NUMBER, _NUMBER)
        except RuntimeError:
            return -1
    return 0


_has_level = not _ONLY_PUBLIC and hasattr(forward_ad, "_current_level")
forward_level: Callable[[], int] = partial(getattr, forward_ad, "_current_level") if _has_level else _forward_level
"""The level of forward-mode AD that is open, also by torch.func.jvp: -1 where no tensor can have a tangent."""

_transforms = _private("_functorch.eager_transforms", None)


def forward_mode_is_nested() -> bool:
    """Whether one torch.func.jvp may run inside another. There the derivatives of a torch.autograd.Function are wrong without
    an error (torch 2.13)."""
    return forward_level() >= 0 and inside_transform() and getattr(_transforms, "JVP_NESTING", 2) > 1


def has_tangent(*values: object) -> bool:
    """Whether one of the values, or of those in a list among them, is a tensor with a tangent at the open level."""
    if forward_level() < 0:
        return False
    return any(
        forward_ad.unpack_dual(part).tangent is not None
        for value in values
        for part in (value if isinstance(value, list | tuple) else (value,))
        if isinstance(part, Tensor)
    )


any_autocast: Callable[[], bool] = _private("_C._is_any_autocast_enabled", lambda: True)
"""Whether autocast may be on for some device."""


def modes_are_active() -> bool:
    """Whether somebody watches every function or operator of torch, by a TorchFunctionMode or a TorchDispatchMode."""
    return bool(_functions_watched() or _operators_watched())


_functions_watched: Callable[[], int] = _private("_C._len_torch_function_stack", lambda: 1)
_operators_watched: Callable[[], int] = _private("_C._len_torch_dispatch_stack", lambda: 1)

_may_be_wrapper: Callable[[Tensor], bool] = _private("_C._functorch.is_functorch_wrapped_tensor", lambda _tensor: True)
_PARAMETER = {nn.Parameter, NoneType}


def apply(function: type[torch.autograd.Function], options: Any, x: Tensor, *weights: Tensor | None) -> Any:
    """``function.apply``, but without its search for wrappers that a transform of torch.func has left behind, if all weights
    are parameters or None, which are no wrappers, and x is no wrapper. The search takes 2 us."""
    if _may_be_wrapper(x) or not _PARAMETER.issuperset(map(type, weights)):
        return function.apply(options, x, *weights)
    return apply_to_results(function, options, x, *weights)


def apply_to_results(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply`` outside of transforms, for tensors that are known to be no wrappers: results of operators are none."""
    if _ONLY_PUBLIC:
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


_FAKE: Any = _private("_subclasses.fake_tensor.FakeTensor", None)


def is_fake(tensor: Tensor) -> bool:
    """Whether the tensor stands for another one where a graph is captured or compiled."""
    return _FAKE is not None and isinstance(tensor, _FAKE)


PLAIN_TENSORS: frozenset[type] = frozenset(
    {
        *(Tensor, nn.Parameter, NoneType),
        Tensor if _FAKE is None else _FAKE,
        _private("_subclasses.functional_tensor.FunctionalTensor", Tensor),
    }
)
"""The classes of what the kernels take: torch's own, of which the last two stand for tensors where a graph is captured."""
_WAYS = (Tensor.__torch_function__.__func__, Tensor.__torch_dispatch__)  # type: ignore[attr-defined]


def has_own_ways(*values: object) -> bool:
    """Whether one of the values is a tensor of a subclass that decides itself what a function or an operator does with it, as
    one with data of its own must. The kernels would read past that data."""
    if PLAIN_TENSORS.issuperset(map(type, values)):
        return False
    return any(
        isinstance(value, Tensor)
        and type(value) not in PLAIN_TENSORS
        and (
            getattr(type(value).__torch_function__, "__func__", _WAYS[0]) is not _WAYS[0]
            or type(value).__torch_dispatch__ is not _WAYS[1]
        )
        for value in values
    )


# ---- modules -----------------------------------------------------------------------------------------------------------------

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""The fields of a module that hold its hooks."""
GLOBAL_HOOKS = tuple(f"_global{name}" for name in HOOKS)
"""The variables of torch.nn.modules.module that hold the hooks of every module."""


def _has_fields() -> bool:
    fields = (*HOOKS, "_parameters", "_modules", "_compiled_call_impl")
    return all(hasattr(nn.Module(), name) for name in fields) and all(hasattr(nn.modules.module, name) for name in GLOBAL_HOOKS)


modules_can_be_read: bool = not _ONLY_PUBLIC and _has_fields()
"""Whether the fields of a module tell what a call of it does. If not, a block calls its layers one by one."""


def children(module: nn.Module) -> Mapping[str, Any]:
    """The direct submodules by name, in their order."""
    return module._modules if modules_can_be_read else dict(module.named_children())


def parameters(module: nn.Module) -> Mapping[str, Any]:
    """The module's own parameters by name, in their order."""
    return module._parameters if modules_can_be_read else dict(module.named_parameters(recurse=False))


# ---- what a report says ------------------------------------------------------------------------------------------------------

has_kernel_for_key: Callable[[str, str], bool] = _private(
    "_C._dispatch_has_kernel_for_dispatch_key", lambda _operator, _key: True
)
"""Whether an operator of the library has a kernel for the dispatch key; where torch does not tell, each has."""
