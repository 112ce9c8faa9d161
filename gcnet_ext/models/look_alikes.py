"""Blocks with the layers of the family under any names, as thousands of repositories hold them.

What is read here is a guess: `same.check` compares what the block computes with the formula.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._torch import children, parameters
from ..blocks._layers import AVERAGE_POOLS, CONVOLUTIONS
from .skeleton import Bottleneck, Left, Skeleton, is_batch_norm, kind_of_gate

WORDS = frozenset(
    (
        *("se", "ese", "squeeze", "excite", "excitation", "eca", "ceca", "cbam", "bam", "grn", "gct", "srm", "sk"),
        *("attention", "attn", "att", "nonlocal", "context"),
    )
)
PHRASES = (
    *("nonlocal", "globalcontext", "gcmodule", "gcblock", "globalresponsenorm", "selectivekernel", "splitattn", "mhsa"),
    *("focalmodulation", "gatherexcite", "channelgate", "spatialgate", "pammodule", "cammodule", "emau"),
)
OF_SQUEEZE_EXCITATION = {"se", "ese", "squeeze", "excite", "excitation", "channel"}
MOST_PARTS = 12
"""A module with more than so many below it is no single block of the family."""
RELU = nn.ReLU()
"""What stands for a ReLU that a forward calls as a function."""
IDLE = (nn.Identity, nn.Dropout, nn.Flatten, nn.Unflatten, nn.Sequential, *AVERAGE_POOLS.values())
"""Modules that do nothing, or nothing but what the operator does in their place."""
OF_ACTIVATIONS = ("torch.nn.modules.activation", "timm.layers.activations", "timm.layers.activations_me")


def words_of(module: nn.Module) -> set[str]:
    """The words in the name of the module's class, in lower case: SEModule has "se" and "module"."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", type(module).__name__)}


def is_named_so(module: nn.Module) -> bool:
    """Whether the name of its class says that it weighs channels or positions."""
    name = type(module).__name__.lower().replace("_", "")
    return bool(words_of(module) & WORDS) or any(phrase in name for phrase in PHRASES)


def kind_of(module: nn.Module) -> str | None:
    """The reader for a module that has the layers of the global context block or of squeeze-excitation; None for another."""
    below = children(module)
    if not below or parameters(module):
        return None
    if below.get("conv_attn") is not None and ("mlp_scale" in below or "mlp_add" in below):
        return "global context"
    parts = list(itertools.islice(module.modules(), 1, MOST_PARTS + 2))
    # A Sequential only calls its parts, so it is no block itself. What holds a container of another class may hold a block.
    if len(parts) > MOST_PARTS or any(type(part) is not nn.Sequential for part in parts if children(part)):
        return None
    if type(module) is nn.Sequential:
        return None
    sizes = [sizes_of(part) for part in parts if _is_layer(part)]
    inner = sizes[0][0] if sizes and len(sizes) == len([part for part in parts if _has_matrix(part)]) else 0
    leads_back = inner > 0 and (sizes == [(inner, inner)] or sizes == [(inner, sizes[0][1]), (sizes[0][1], inner)])
    pooled = any(isinstance(part, tuple(AVERAGE_POOLS.values())) for part in parts)
    gated = any(_is_gate(part) for part in parts)
    evident = bool(words_of(module) & OF_SQUEEZE_EXCITATION) or (gated and (pooled or len(sizes) == 2))
    return "squeeze-excitation" if leads_back and evident else None


def _is_layer(part: nn.Module) -> bool:
    return isinstance(part, (nn.Linear, *CONVOLUTIONS.values()))


def _has_matrix(part: nn.Module) -> bool:
    """Whether the module has a parameter with more than one dimension of its own."""
    return any(tensor is not None and not is_lazy(tensor) and tensor.dim() > 1 for tensor in parameters(part).values())


def sizes_of(layer: nn.Module) -> tuple[int, int]:
    """The outputs and the inputs of a 1x1 layer; zeros for another one."""
    weight: Tensor | None = parameters(layer).get("weight")
    weight = getattr(layer, "weight", None) if weight is None else weight  # a parametrized one
    if not isinstance(weight, Tensor) or is_lazy(weight) or weight.dim() < 2 or weight.shape[2:].numel() != 1:
        return (0, 0)
    return (weight.shape[0], weight.shape[1])


def _is_gate(part: nn.Module) -> bool:
    return kind_of_gate(part) is not None


def _bottleneck(parts: list[nn.Module], called: tuple[nn.Module, ...] = ()) -> Bottleneck:
    """The branch whose layers, in the order of their registration, are among these modules; they are called one by one, unless
    there is something that calls them."""
    layers = [part for part in parts if _is_layer(part)]
    if len(layers) not in (1, 2):
        raise Left(f"it has {len(layers)} layers, not one or two")
    first = layers[0]
    if len(layers) == 1:
        return Bottleneck(called or (first,), first)
    norm = next((part for part in parts if is_batch_norm(part) or "LayerNorm" in type(part).__name__), None)
    activation = next((part for part in parts if type(part).__module__ in OF_ACTIVATIONS and not _is_gate(part)), RELU)
    last = layers[1]
    idle = tuple(part for part in parts if type(part) is nn.Dropout) if called else ()
    between = tuple(part for part in (norm, activation) if part is not None)
    return Bottleneck(called or (first, *between, last), first, norm, activation, last, idle)


def squeeze_excitation(block: Any) -> Skeleton:
    """Average pooling, one or two layers, a gate."""
    parts: list[nn.Module] = list(block.modules())[1:]
    gates = [part for part in parts if _is_gate(part)]
    branch = _bottleneck(parts)
    idle = tuple(part for part in parts if isinstance(part, IDLE) and not any(part is layer for layer in branch.called))
    known = [dims for dims, kind in AVERAGE_POOLS.items() if any(isinstance(part, kind) for part in parts)]
    known += [dims for dims, kind in CONVOLUTIONS.items() if isinstance(branch.first, kind)]
    linear = isinstance(branch.first, nn.Linear)
    return Skeleton(known[-1] if known else 0, None, branch, None, gates[0] if gates else None, idle, linear)


def global_context(block: Any) -> Skeleton:
    """timm's GlobalContext, pasted: its mask is `conv_attn`, its branches are `mlp_scale` and `mlp_add`."""
    below = children(block)

    def branch(name: str) -> Bottleneck | None:
        container = below.get(name)
        return None if container is None else _bottleneck(list(container.modules())[1:], (container,))

    scale, shift = branch("mlp_scale"), branch("mlp_add")
    mask: Any = below["conv_attn"]
    dims = next((dims for dims, kind in CONVOLUTIONS.items() if isinstance(mask, kind)), 0)
    if scale is None and shift is None:
        raise Left("it has neither of the fusions")
    others = [part for name, part in below.items() if name not in ("conv_attn", "mlp_scale", "mlp_add") and part is not None]
    gates = [part for part in others if _is_gate(part)]
    idle = tuple(part for part in others if part not in gates)
    linear = any(isinstance(branch.first, nn.Linear) for branch in (scale, shift) if branch is not None)
    return Skeleton(dims, mask, scale, shift, gates[0] if gates else None, idle, linear)
