"""Replaces the blocks of existing models, and exports state dicts with the original names.

No peer library is imported: a block is recognised by its class if that library is loaded, or by its submodules.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .blocks import GlobalContextBlock, NonLocalBlock, SqueezeExcitation, _state_dict
from .blocks._layers import HOOKS as CALLED_HOOKS
from .blocks._layers import Gate

PEERS = ("mmcv", "timm", "torchvision")
HOOKS = (
    *CALLED_HOOKS,
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class Report(NamedTuple):
    """What `replace_blocks` did.

    Attributes:
        model: the model, or its replacement if the model itself is a block.
        replaced: name of each module that was exchanged, and its former class.
        left: name of each module that looks like a block and was left as it is, and why.
    """

    model: nn.Module
    replaced: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} replaced, {len(self.left)} left"]
        lines += [f"  replaced  {name or '(the model)'}: {kind}" for name, kind in self.replaced.items()]
        lines += [f"  left      {name or '(the model)'}: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


class _Left(Exception):  # noqa: N818
    """Why a block stays as it is."""


def replace_blocks(model: nn.Module) -> Report:
    """Replace, in place, every block of the GC family in the model by this package's block with the same weights.

    It replaces mmcv's ``ContextBlock`` and ``NonLocal1d``, ``2d`` and ``3d``, timm's ``GlobalContext`` and ``SEModule``,
    torchvision's ``SqueezeExcitation``, and any class with the submodules of the GC block (``conv_mask``, ``channel_add_conv``,
    ``channel_mul_conv``) that computes on a random input what ours computes.

    Names of modules, parameters (the same objects, or views of them where the shape has to change), ``requires_grad``, device,
    dtype, train or eval mode and hooks survive. Create the optimizer after this call. The keys of the state dict below a block
    may change; ours load the former ones, and `to_peer_state_dict` gives them back.

    Args:
        model: any module.

    Returns:
        A `Report`, which prints itself as a list.
    """
    replaced: dict[str, str] = {}
    left: dict[str, str] = {}
    new_of: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules()):
        convert = _converter(module)
        if convert is None:
            continue
        try:
            new_of[module] = _converted(module, convert)
            replaced[name] = f"{type(module).__module__}.{type(module).__qualname__}"
        except _Left as reason:
            left[name] = str(reason)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new_of:
                parent._modules[name] = new_of[child]
    return Report(new_of.get(model, model), replaced, left)


def to_peer_state_dict(model: nn.Module, peer: str, *, spatial_dims: int = 2) -> dict[str, Tensor]:
    """The state dict of the model; every block of this package gets the peer's names and shapes.

    Args:
        model: any module, or a block.
        peer: ``"mmcv"``, ``"timm"`` or ``"torchvision"``.
        spatial_dims: number of spatial dimensions of the exported convolution weights, 1 to 3: mmcv's ``NonLocal3d`` has 3.

    Raises:
        ValueError: the peer is not one of the three, or spatial_dims is not 1, 2 or 3.
    """
    if peer not in PEERS:
        raise ValueError(f"peer must be one of {PEERS}, got {peer!r}")
    if spatial_dims not in (1, 2, 3):
        raise ValueError(f"spatial_dims must be 1, 2 or 3, got {spatial_dims}")
    names_below = {
        f"{path}." if path else "": names
        for path, block in model.named_modules()
        if (names := _names_of_peer(block, peer)) is not None
    }

    def shaped(name: str, value: Tensor) -> Tensor:
        if value.dim() == 4 and not name.startswith("concat_project"):  # that one is a Conv2d in mmcv's NonLocal1d and 3d, too
            return value.reshape(value.shape[:2] + (1,) * spatial_dims)
        return value.flatten() if peer == "timm" and ".norm." in name else value

    state = {}
    for key, value in model.state_dict().items():
        prefix = next((prefix for prefix in names_below if key.startswith(prefix)), None)
        if prefix is None:
            state[key] = value
        else:
            name = _state_dict.renamed(key.removeprefix(prefix), names_below[prefix])
            state[prefix + name] = shaped(name, value)
    return state


def _names_of_peer(block: nn.Module, peer: str) -> dict[str, str] | None:
    """Ours -> theirs for a block of ours, None for any other module."""
    if isinstance(block, GlobalContextBlock):
        return {ours: theirs for theirs, ours in _state_dict.GLOBAL_CONTEXT.items()} if peer == "timm" else {}
    if isinstance(block, NonLocalBlock):
        return {ours: theirs for theirs, ours in _state_dict.NON_LOCAL.items()} if block.sub_sample else {}
    return {} if isinstance(block, SqueezeExcitation) else None


# ---- which block, and how it is converted ------------------------------------------------------------------------------------


def _is_of(module: nn.Module, library: str, *names: str) -> bool:
    """Whether the module is of one of these classes of a library that is loaded; not of a subclass, which may do otherwise."""
    found = sys.modules.get(library)
    return found is not None and any(type(module) is getattr(found, name, None) for name in names)


def _converter(module: nn.Module) -> Callable[[Any], nn.Module] | None:
    if isinstance(module, (GlobalContextBlock, NonLocalBlock, SqueezeExcitation)):
        return None
    if _is_of(module, "mmcv.cnn", "ContextBlock"):
        return _from_context_block
    if _is_of(module, "mmcv.cnn", "NonLocal1d", "NonLocal2d", "NonLocal3d"):
        return _from_mmcv_non_local
    if _is_of(module, "timm.layers", "GlobalContext"):
        return _from_timm_global_context
    if _is_of(module, "timm.layers", "SEModule"):
        return _from_timm_se
    if _is_of(module, "torchvision.ops", "SqueezeExcitation") or _is_of(module, "torchvision.ops.misc", "SqueezeExcitation"):
        return _from_torchvision_se
    if hasattr(module, "channel_add_conv") and hasattr(module, "channel_mul_conv"):
        return _from_snippet
    return None


def _converted(old: nn.Module, convert: Callable[[Any], nn.Module]) -> nn.Module:
    new = convert(old)
    kept = set(new.modules())
    for name, module in old.named_modules():
        if module is not old and module not in kept and any(module.__dict__.get(hooks) for hooks in HOOKS):
            raise _Left(f"a hook of submodule {name} would be lost")
    _take_hooks(new, old)
    for module in new.modules():
        if module not in set(old.modules()):
            module.training = old.training
    return new


def _take_hooks(new: nn.Module, old: nn.Module) -> None:
    """The dictionaries of the old module themselves, so that the handles of its hooks still remove them."""
    for hooks in HOOKS:
        theirs, own = old.__dict__[hooks], new.__dict__[hooks]
        theirs.update(own)  # ours give a state dict our names, after the hooks of the user have seen it
        new.__dict__[hooks] = theirs
    new.__dict__["_is_full_backward_hook"] = old.__dict__["_is_full_backward_hook"]
    for hook in new.__dict__["_load_state_dict_pre_hooks"].values():
        if getattr(hook, "with_module", False):  # it holds a weak reference to the old one, which will be gone
            hook.module = weakref.ref(new)


@contextlib.contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """While this lasts, a call of the module calls no hook."""
    saved = [(part.__dict__, hooks, part.__dict__[hooks]) for part in module.modules() for hooks in CALLED_HOOKS]
    for fields, hooks, _ in saved:
        fields[hooks] = OrderedDict()
    try:
        yield
    finally:
        for fields, hooks, former in saved:
            fields[hooks] = former


def _conv2d(old: nn.Module) -> nn.Conv2d:
    """A 1x1 convolution of any dimension as a Conv2d: itself if it is one, otherwise one with views of its parameters."""
    plain = type(old).__module__.startswith(("torch.nn.", "mmcv."))  # mmcv's Conv2d and Conv3d take empty inputs, too
    if not plain or not isinstance(old, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or set(old.kernel_size) != {1} or old.groups != 1:
        raise _Left(f"its {type(old).__name__} is not a plain 1x1 convolution")
    if type(old) is nn.Conv2d:
        return old
    new = nn.Conv2d(old.in_channels, old.out_channels, 1, bias=old.bias is not None, device="meta")
    new.weight, new.bias = _view(old.weight, (*old.weight.shape[:2], 1, 1)), old.bias
    return new


def _view(parameter: Any, shape: tuple[int, ...]) -> nn.Parameter:
    """The parameter itself, or one of this shape on the same memory."""
    if parameter.shape == shape:
        return parameter
    return nn.Parameter(parameter.detach().view(shape), requires_grad=parameter.requires_grad)


def _gate(module: nn.Module) -> Gate:
    kind = type(module)
    if kind.__module__.startswith(("torch.nn.", "timm.layers.")):
        if kind.__name__ == "Sigmoid":
            return Gate()
        if kind.__name__ in ("Hardsigmoid", "HardSigmoid", "HardSigmoidJit", "HardSigmoidMe"):
            return Gate("hard_sigmoid", 1 / 6, 0.5)
    raise _Left(f"its gate is {kind.__name__}, not a sigmoid or a hard sigmoid")


def _global_context(mask: Any, add: Any, mul: Any, gate: Gate) -> GlobalContextBlock:
    branch = add if add is not None else mul
    fusions = tuple(name for name, given in (("channel_mul", mul), ("channel_add", add)) if given is not None)
    if branch is None:
        raise _Left("it has neither of the fusions")
    inplanes, planes = branch[0].in_channels, branch[0].out_channels
    new = GlobalContextBlock(
        inplanes, planes / inplanes, "avg" if mask is None else "att", fusions, planes=planes, device="meta"
    )
    new.conv_mask, new.channel_add_conv, new.channel_mul_conv, new.gate = mask, add, mul, gate
    return new


def _layer_norm(norm: nn.LayerNorm) -> nn.LayerNorm:
    """timm's LayerNorm over channels as one over [P, 1, 1]."""
    shape = (norm.normalized_shape[0], 1, 1)
    new = nn.LayerNorm(shape, norm.eps, norm.elementwise_affine, device="meta")
    if norm.elementwise_affine:
        new.weight, new.bias = _view(norm.weight, shape), _view(norm.bias, shape)
    return new


def _from_timm_global_context(old: Any) -> GlobalContextBlock:
    def branch(mlp: Any) -> nn.Sequential | None:
        if mlp is None:
            return None
        if mlp.drop.p != 0 or not isinstance(mlp.norm, nn.LayerNorm):
            raise _Left("its ConvMlp has a dropout or a norm that is not a LayerNorm")
        return nn.Sequential(mlp.fc1, _layer_norm(mlp.norm), mlp.act, mlp.fc2)

    return _global_context(old.conv_attn, branch(old.mlp_add), branch(old.mlp_scale), _gate(old.gate))


def _from_context_block(old: Any) -> GlobalContextBlock:
    mask = old.conv_mask if old.pooling_type == "att" else None
    return _global_context(mask, old.channel_add_conv, old.channel_mul_conv, Gate())


def _from_snippet(old: Any) -> GlobalContextBlock:
    """Any class with the submodules of the GC block; it must then compute the same on a random input."""
    mask = getattr(old, "conv_mask", None)
    convolutions: list[Any] = []
    for branch in (old.channel_add_conv, old.channel_mul_conv):
        if branch is None:
            continue
        if type(branch) is not nn.Sequential or len(branch) != 4 or not isinstance(branch[1], nn.LayerNorm):
            raise _Left("its channel_add_conv or channel_mul_conv is not conv, LayerNorm, activation, conv")
        convolutions += [branch[0], branch[3]]
    if not all(type(layer) is nn.Conv2d for layer in ([mask] if mask is not None else []) + convolutions):
        raise _Left("its layers are not 2-D convolutions")
    new = _global_context(mask, old.channel_add_conv, old.channel_mul_conv, Gate())
    weight = convolutions[0].weight
    x = torch.randn(2, weight.shape[1], 3, 5, device=weight.device, dtype=weight.dtype)
    # A last layer of zeros hides everything before it, so both are compared with what a mask alone decides, too.
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _without_hooks(old):
        saved = [(layer.weight.clone(), layer.bias.clone()) for layer in convolutions[1::2]]
        for layer in convolutions[1::2]:
            layer.weight.normal_()
            layer.bias.normal_()
        try:
            same = torch.allclose(new(x).double(), old(x).double(), rtol=2e-2, atol=2e-2)
        except Exception as error:
            raise _Left(f"it does not take a 2-D feature map: {type(error).__name__}: {error}") from error
        finally:
            for layer, (weight, bias) in zip(convolutions[1::2], saved, strict=True):
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)
    if not same:
        raise _Left("it has the submodules of a GC block, and computes something else")
    return new


def _squeeze_excitation(fc1: nn.Module, activation: nn.Module, fc2: nn.Module, gate: nn.Module) -> SqueezeExcitation:
    fc1, fc2 = _conv2d(fc1), _conv2d(fc2)
    new = SqueezeExcitation(fc1.in_channels, planes=fc1.out_channels, device="meta")
    new.fc1, new.activation, new.fc2, new.gate = fc1, activation, fc2, _gate(gate)
    return new


def _from_timm_se(old: Any) -> SqueezeExcitation:
    if old.add_maxpool:
        raise _Left("it adds a max-pooling to the average")
    if type(old.bn) is not nn.Identity:
        raise _Left(f"it has a {type(old.bn).__name__} between its layers")
    return _squeeze_excitation(old.fc1, old.act, old.fc2, old.gate)


def _from_torchvision_se(old: Any) -> SqueezeExcitation:
    return _squeeze_excitation(old.fc1, old.activation, old.fc2, old.scale_activation)


def _from_mmcv_non_local(old: Any) -> NonLocalBlock:
    norm = getattr(old.conv_out, "norm", None)
    if norm is not None and type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        raise _Left(f"its norm is {type(norm).__name__}, not a BatchNorm")
    new = NonLocalBlock(
        old.in_channels, old.reduction, old.mode, old.sub_sample, old.use_scale, "batch" if norm else None, device="meta"
    )
    for name, theirs in _mmcv_layers(old):
        getattr(new, name).conv = _conv2d(theirs.conv)
    if norm is not None:
        bn = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta")
        bn._parameters, bn._buffers = norm._parameters, norm._buffers
        new.conv_out.bn = bn
    return new


def _mmcv_layers(old: Any) -> Iterator[tuple[str, Any]]:
    """The convolutions of an mmcv NonLocal; with sub_sample, g and phi are in a Sequential with their max-pooling."""
    for name in ("g", "theta", "phi", "concat_project", "conv_out"):
        layer = getattr(old, name, None)
        layer = layer[0] if isinstance(layer, nn.Sequential) else layer
        if hasattr(layer, "conv"):
            yield name, layer
