"""State dicts with the names that other libraries give to the parameters of a block."""

from __future__ import annotations

from torch import Tensor, nn

from ..blocks import EffectiveSqueezeExcitation, GlobalContextBlock, NonLocalBlock, SqueezeExcitation
from ..blocks._state_dict import GLOBAL_CONTEXT, NON_LOCAL, renamed
from .peer import FusedPeer
from .readers import READERS

PEERS = ("mmcv", "timm", "torchvision")


def to_peer_state_dict(model: nn.Module, peer: str | None = None, *, spatial_dims: int = 2) -> dict[str, Tensor]:
    """The state dict of the model; every block of this package gets the names and shapes that a library has for it.

    `EfficientChannelAttention`, `GlobalResponseNorm` and `SimplifiedNonLocalBlock` keep their names.

    Args:
        model: any module, or a block.
        peer: the library, ``"mmcv"``, ``"timm"`` or ``"torchvision"``; None for the names that each replaced block had, which
            it still has.
        spatial_dims: number of spatial dimensions of the exported convolution weights, 1 to 3: mmcv's ``NonLocal3d`` has 3. A
            replaced block that has that library's names already keeps its shapes, too.

    Returns:
        A new dictionary. Its tensors share memory with the model.

    Raises:
        ValueError: the peer is not one of the three, or spatial_dims is not 1, 2 or 3.
    """
    if peer not in (None, *PEERS):
        raise ValueError(f"peer must be one of {PEERS} or None, got {peer!r}")
    if spatial_dims not in (1, 2, 3):
        raise ValueError(f"spatial_dims must be 1, 2 or 3, got {spatial_dims}")
    state: dict[str, Tensor] = model.state_dict()
    if peer is None:
        return dict(state)
    names_below = {
        f"{path}." if path else "": names
        for path, block in model.named_modules(remove_duplicate=False)  # a block may have two names
        if (names := _names_of_peer(block, peer)) is not None
    }

    def shaped(name: str, value: Tensor) -> Tensor:
        if ".norm." in name:  # timm's
            return value.flatten()
        if name.startswith("channel_") and ".1." in name:
            return value.reshape(-1, 1, 1)
        # concat_project is a Conv2d in mmcv's NonLocal1d and 3d, too.
        pointwise = name.endswith(".weight") and value.dim() > 2 and value.shape[2:].numel() == 1
        if pointwise and not name.startswith("concat_project"):
            return value.reshape(value.shape[:2] + (1,) * spatial_dims)
        return value

    found = {}
    for key, value in state.items():
        prefix = next((prefix for prefix in names_below if key.startswith(prefix)), None)
        if prefix is None:
            found[key] = value
        else:
            name = renamed(key.removeprefix(prefix), names_below[prefix])
            found[prefix + name] = shaped(name, value)
    return found


def _names_of_peer(block: nn.Module, peer: str) -> dict[str, str] | None:
    """The names in its state dict -> theirs for a block whose names are not the peer's, None for any other module."""
    to_timm = {ours: theirs for theirs, ours in GLOBAL_CONTEXT.items()}
    if isinstance(block, GlobalContextBlock):
        return to_timm if peer == "timm" else {}
    if isinstance(block, NonLocalBlock):
        return {ours: theirs for theirs, ours in NON_LOCAL.items()} if block.sub_sample else {}
    if isinstance(block, FusedPeer) and block._record is not None:
        keys = READERS[block._record.kind].keys
        is_context = any(hasattr(block, name) for name in ("channel_add_conv", "conv_attn"))
        if keys == peer or not is_context:
            return None
        return to_timm if peer == "timm" else (GLOBAL_CONTEXT if keys == "timm" else None)
    return {} if isinstance(block, SqueezeExcitation | EffectiveSqueezeExcitation) else None
