"""The layers of a block: which of them a fused operator can take the weights of, and how to call those that it cannot.

A submodule may be replaced, parametrized or hooked by its user. What is no longer the plain layer is called as a module.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .._torch import GLOBAL_HOOKS, HOOKS, has_own_ways, modules_can_be_read, parameters
from ..ops import _checks, _transform
from ..ops._options import ACTIVATIONS, Options
from ..ops._precision import accumulation_dtype
from ..ops.attention_pool import flat_valid, only, softmax, weighted_sum

Module = TypeVar("Module", bound=nn.Module)


class Gate(NamedTuple):
    """What the scale goes through: the sigmoid, or clip(alpha t + beta, 0, 1)."""

    kind: str = "sigmoid"
    alpha: float = 1 / 6
    beta: float = 0.5

    def __call__(self, t: Tensor) -> Tensor:
        return _transform.apply_gate(t, self.hard())

    def hard(self) -> list[float] | None:
        """[alpha, beta] of a hard sigmoid, as the operators take it."""
        return [self.alpha, self.beta] if self.kind == "hard_sigmoid" else None


def make_activation(name: str, slope: float) -> nn.Module:
    """Torch's module of that activation.

    Raises:
        ValueError: there is no such activation.
    """
    check_choice("activation", name, ACTIVATIONS)
    make: dict[str, Callable[[], nn.Module]] = {
        "none": nn.Identity,
        "relu": nn.ReLU,
        "silu": nn.SiLU,
        "gelu": nn.GELU,
        "gelu_tanh": partial(nn.GELU, "tanh"),
        "hardswish": nn.Hardswish,
        "leaky_relu": partial(nn.LeakyReLU, slope),
    }
    return make[name]()


def activation_of(module: nn.Module) -> tuple[str, float] | None:
    """The activation that a plain module of torch computes, by name, and the slope of a LeakyReLU; None for another module."""
    if is_plain(module, nn.LeakyReLU):
        return "leaky_relu", module.negative_slope
    if is_plain(module, nn.GELU):
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    else:
        names = {nn.Identity: "none", nn.ReLU: "relu", nn.SiLU: "silu", nn.Hardswish: "hardswish"}
        name = next((name for kind, name in names.items() if is_plain(module, kind)), None)
    return None if name is None else (name, Options().slope)


def check_choice(name: str, value: object, valid: Iterable[object]) -> None:
    """
    Raises:
        ValueError: the value is none of the valid ones, which the message lists.
    """
    if not isinstance(value, str | None) or value not in tuple(valid):  # an array compares element by element
        raise ValueError(f"{name} must be one of {tuple(valid)}, got {value!r}")


def check_count(name: str, value: object) -> None:
    """
    Raises:
        ValueError: the value is no whole number, less than one, or more than any memory holds.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if int(value) >= 2**31:
        raise ValueError(f"{name} must be less than 2**31, got a number of {int(value).bit_length()} bits")


def count_channels(inplanes: int | None, in_channels: int | None) -> int:
    """The channels of a block: its first argument, or what mmcv calls it.

    Raises:
        TypeError: both are given, or none.
        ValueError: it is no number of channels.
    """
    if inplanes is not None and in_channels is not None:
        raise TypeError(f"inplanes and in_channels are one argument with two names, got both: {inplanes!r} and {in_channels!r}")
    name, channels = ("inplanes", inplanes) if in_channels is None else ("in_channels", in_channels)
    if channels is None:
        raise TypeError("inplanes must be given: the number of channels of the input")
    check_count(name, channels)
    return channels


def hidden_units(inplanes: int, ratio: float, planes: int | None) -> int:
    """The units of a bottleneck: ``planes``, or ``int(inplanes * ratio)``.

    Raises:
        ValueError: there would be none, or more than channels where nobody said ``planes``.
    """
    if planes is not None:
        check_count("planes", planes)
        return planes
    if isinstance(ratio, str):
        raise ValueError(
            f"ratio must be a number, got the string {ratio!r}; pass 1/16 without quotes, and in YAML, which has no fractions, "
            "0.0625"
        )
    if not isinstance(ratio, numbers.Real) or not -math.inf <= ratio <= math.inf:
        raise ValueError(f"ratio must be a number, got {ratio!r}")
    if ratio > 1:
        whole = int(ratio) if ratio < 2**31 else None
        advice = f"for {whole} hidden units pass planes={whole}, for a reduction by {whole} ratio=1/{whole}"
        raise ValueError(
            f"ratio must be at most 1: it is hidden units per channel, such as 1/16, got {ratio!r}; "
            + (advice if whole == ratio else "for more units than channels pass planes=")
        )
    planes = max(int(inplanes * ratio), 0) if ratio > -(2**31) else 0
    if planes < 1:
        raise ValueError(
            f"inplanes * ratio must be at least 1 (one hidden unit), got {inplanes} * {ratio} = {inplanes * ratio}"
        )
    return planes


def check_channels(x: Tensor, channels: int) -> None:
    """
    Raises:
        RuntimeError: x has another number of channels than the block is made for.
    """
    if x.dim() > 1 and x.size(1) != channels:
        hint = ""
        if x.dim() > 2 and x.size(-1) == channels:
            hint = "; if the channels are its last dimension, as with tokens and channels-last arrays, pass x.movedim(-1, 1)"
        elif x.size(0) == channels:
            hint = "; if its first dimension is the channels and there is no batch, pass x.unsqueeze(0)"
        raise RuntimeError(f"x must have {channels} channels (inplanes), got shape {list(x.shape)}{hint}")


def of_no_tensor(block: nn.Module, x: Any, **others: Any) -> Any:
    """Returns the result of a call whose x is not a tensor: for a Proxy of torch.fx, a graph node that calls the block.

    The node gets x and those of the other arguments that are not None.

    Raises:
        TypeError: x is nothing that stands for a tensor, or the block is all that is traced.
    """
    if not isinstance(x, torch.fx.Proxy):
        _checks.is_tensor(x)
    if x.tracer.root is block:
        raise TypeError(
            f"{type(block).__name__} is one node to torch.fx: trace a module that holds it, such as nn.Sequential, or "
            "gcnet_ext.to_plain(block)"
        )
    given = {name: value for name, value in others.items() if value is not None}
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(block), (x,), given)


def not_scriptable(block: nn.Module) -> NoReturn:
    """What a block says as its ``__prepare_scriptable__``, which torch.jit.script calls before it looks at anything else.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        f"torch.jit.script cannot compile a {type(block).__name__}, which chooses its kernels in Python: script "
        "gcnet_ext.to_plain(model) instead, a copy in plain PyTorch with the same parameters and keys"
    )


def _torchs_methods(kind: type[nn.Module], *names: str) -> dict[str, Any]:
    """The methods of torch's layer; for one replaced before this package was imported, a value that never matches."""
    found = {}
    for name in ("_call_impl", *names):
        owner = next(cls for cls in kind.__mro__ if name in vars(cls))
        method = vars(owner)[name]
        found[name] = method if getattr(method, "__globals__", None) is vars(sys.modules[owner.__module__]) else _torchs_methods
    return found


CALL = nn.Module.__call__
CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
"""The convolutions of torch by their number of spatial dimensions."""
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
AVERAGE_POOLS: dict[int, type[nn.Module]] = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
"""The adaptive average pools of torch by their number of spatial dimensions."""
# The methods that run when a layer of a class is called, up to the function of torch.nn.functional that computes the result.
METHODS: dict[type[nn.Module], dict[str, Any]] = {
    **{kind: _torchs_methods(kind, "forward", "_conv_forward") for kind in CONVOLUTIONS.values()},
    nn.Sequential: _torchs_methods(nn.Sequential, "forward", "__iter__"),
    **{
        kind: _torchs_methods(kind, "forward")
        for kind in (
            *(nn.LayerNorm, nn.ReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.Identity, nn.Sigmoid, nn.Hardsigmoid),
            *(nn.Softmax, nn.Dropout, nn.Linear, nn.Flatten, nn.Unflatten),
            *BATCH_NORMS,
            *AVERAGE_POOLS.values(),
        )
    },
}
# The attributes that decide what a layer of a class, or of one of its subclasses, computes.
SETTINGS: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys(CONVOLUTIONS.values(), ("kernel_size", "stride", "padding", "groups")),
    nn.LayerNorm: ("eps", "normalized_shape"),
    nn.GELU: ("approximate",),
    nn.LeakyReLU: ("negative_slope",),
    nn.Softmax: ("dim",),
    nn.Dropout: ("p",),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Unflatten: ("dim", "unflattened_size"),
    **dict.fromkeys(AVERAGE_POOLS.values(), ("output_size",)),
}


def settings_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the fields that make the module what it is."""
    return tuple(name for kind, names in SETTINGS.items() if isinstance(module, kind) for name in names)


def is_plain(module: nn.Module, kind: type[Module]) -> TypeGuard[Module]:
    """Whether calling the module does what torch's layer of this kind does, and nothing else: no override, no hook, no weight
    of a class with ways of its own.

    The methods are also looked up as a call would do it, so that torch.compile, which traces this, notices a later change where
    it would have noticed it in the call: it watches what is read, and not whether a name is in a dictionary.
    """
    cls = type(module)
    if not isinstance(module, kind) or not is_untouched(module):
        return False
    for name, method in METHODS[kind].items():
        if getattr(cls, name) is not method or name in module.__dict__:
            return False
        if getattr(getattr(module, name), "__code__", None) is not method.__code__:
            return False
    if has_own_ways(*parameters(module).values()):
        return False
    return not any(hasattr(cls, name) for name in SETTINGS.get(kind, ()))


def is_untouched(module: nn.Module) -> bool:
    """Whether calling the module runs the forward of its class, and nothing else: no hook, nothing in place of it."""
    cls = type(module)
    if not modules_can_be_read:
        return False
    if cls.__getattribute__ is not object.__getattribute__ or "forward" in module.__dict__:
        return False
    if cls.__call__ is not nn.Module.__call__ or cls.__getattr__ is not nn.Module.__getattr__:
        return False
    if cls.__call__ is not CALL and not is_compiling():  # torch.export puts its own in the place of nn.Module's
        return False
    return not (
        module._compiled_call_impl is not None
        or any(getattr(module, name) for name in HOOKS)
        or (not _LOOKING.past_global_hooks and any(getattr(torch.nn.modules.module, name) for name in GLOBAL_HOOKS))
    )


_LOOKING = SimpleNamespace(past_global_hooks=False)


@contextlib.contextmanager
def ignoring_global_hooks() -> Iterator[None]:
    """While this lasts, a module counts as plain although torch has hooks for every module: what is made of it now looks for
    them in every call."""
    _LOOKING.past_global_hooks = True
    try:
        yield
    finally:
        _LOOKING.past_global_hooks = False


def is_pointwise(module: nn.Module, dims: int = 2) -> bool:
    """Whether the module is a 1x1 convolution of this many spatial dimensions, whatever its weights are computed from."""
    return bool(
        is_plain(module, CONVOLUTIONS[dims])
        and module.kernel_size == (1,) * dims
        and module.stride == (1,) * dims
        and module.padding == (0,) * dims
        and module.groups == 1
    )


def is_pooled_with(mask: nn.Module, x: Tensor) -> bool:
    """Whether the operator takes the weights of the mask. Otherwise the mask is called: it is not plain, or x is of a class
    with ways of its own, which is to see what the mask does."""
    return is_pointwise(mask) and not has_own_ways(x)


def input_dtype(module: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """The dtype to which a tensor of this dtype is cast for a module: this one, or a wider one of its parameters.

    So x may have half precision and the parameters float32, as in the fused operator. The dtype never becomes narrower:
    parameters may be stored in fewer bits than the module computes in. Parameters of integers are ignored.
    """
    for parameter in module.parameters():
        if parameter.dtype in _checks.FLOATING:
            dtype = torch.promote_types(dtype, parameter.dtype)
    return dtype


def call(module: nn.Module, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Calls the module on the tensor, cast to this dtype or to a wider dtype of the module's parameters."""
    return module(tensor.to(input_dtype(module, dtype)))


def as_image(context: Tensor) -> Tensor:
    """The context [N, C] as a layer gets it, [N, C, 1, 1]. A copy: a layer may overwrite it, which autograd has saved."""
    return context[:, :, None, None].clone()


def call_on_context(module: nn.Module, image: Tensor, x: Tensor) -> Tensor:
    """What the module makes of the context of x, [N, C, 1, 1] -> [N, C], in the accumulation dtype."""
    return call(module, image, x.dtype).flatten(1).to(accumulation_dtype(x))


def is_for_images(mask: nn.Module) -> bool:
    """Whether a mask, maybe wrapped, is a 2-D convolution: its first weight of 4 or 5 dimensions has 4."""
    return next((parameter.dim() for parameter in mask.parameters() if parameter.dim() in (4, 5)), None) == 4


def _column(x: Tensor) -> Tensor:
    return x.flatten(2).unsqueeze(3)


@contextlib.contextmanager
def _of_any_rank(mask: nn.Module) -> Iterator[None]:
    """While this lasts, a convolution for images takes [N, C, *spatial] and gives [N, 1, *spatial]. It is still the object that
    its hooks know, and they see these shapes."""
    of_images = mask.forward

    def forward(x: Tensor) -> Tensor:
        return of_images(_column(x)).reshape(x.shape[0], -1, *x.shape[2:])

    mask.__dict__["forward"] = forward
    try:
        yield
    finally:
        mask.__dict__.pop("forward", None)


def called_attention(mask: nn.Module, x: Tensor, valid: Tensor | None = None) -> Tensor:
    """The softmax over the positions that count [N, P] of what the mask, called as the module it is, makes of x.

    A mask for images gets the positions of any other x in a column, [N, C, P, 1]. The hooks of one that is a bare convolution
    see x as it is, and logits [N, 1, *spatial].

    Raises:
        RuntimeError: the mask gives anything but one logit per position.
    """
    _checks.feature_map("attention_pool", x)
    _checks.valid("attention_pool", valid, x)
    if x.dim() == 4 or not is_for_images(mask):
        found = call(mask, x, x.dtype)
    elif type(mask) is nn.Conv2d and "forward" not in mask.__dict__ and not is_compiling():
        with _of_any_rank(mask):
            found = call(mask, x, x.dtype)
    else:
        found = call(mask, _column(x), x.dtype)
    samples, positions = x.shape[0], math.prod(x.shape[2:])
    if found.numel() != samples * positions:
        raise RuntimeError(
            f"conv_mask must give one logit per position of x, {samples} * {positions}, got shape {list(found.shape)}"
        )
    return softmax(found.reshape(samples, positions).to(accumulation_dtype(x)), flat_valid(valid))


def called_context(mask: nn.Module, x: Tensor, valid: Tensor | None = None) -> Tensor:
    """The context [N, C] of x under a mask that is called as the module it is, in the accumulation dtype."""
    x = x.view_as(x)  # the two gradients that it gets here are added before they meet the larger one of the fusion
    attention = called_attention(mask, x, valid)  # before x is read: the mask may begin with a layer that overwrites it
    positions = only(x.flatten(2).to(accumulation_dtype(x)), flat_valid(valid))
    return weighted_sum(positions, attention)
