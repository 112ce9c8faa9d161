"""timm's global response norm with a forward of ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..blocks._fused import Tail
from ..ops.global_response_norm import global_response_norm
from .peer import Peer, Record, become
from .readers import grn_of
from .skeleton import Left, is_original
from .watch import fingerprint, frozen

FIELDS = ("eps", "spatial_dim", "channel_dim", "wb_shape")
PLACES = {((1, 2), -1, (1, 1, 1, -1)): True, ((2, 3), 1, (1, -1, 1, 1)): False}
"""What timm's constructor sets these fields but eps to, and whether the channels are the last dimension then."""


class GrnPeer(Peer):
    """timm's GlobalResponseNorm, for images with the channels in the second or in the last place."""

    def _takes_tail(self) -> bool:
        return False

    def _computed(self, x: Tensor, tail: Tail | None) -> Any:
        block: Any = self
        if not self._is_what_it_was():
            return self._as_before(x)
        last = _is_channels_last(block)
        try:
            out = global_response_norm(x.movedim(-1, 1) if last else x, block.weight, block.bias, block.eps)
        except RuntimeError:  # the former forward says in its own words what is wrong
            return self._as_before(x)
        return out.movedim(1, -1) if last else out


def _is_channels_last(block: Any) -> bool | None:
    return PLACES.get((tuple(block.spatial_dim), block.channel_dim, tuple(block.wb_shape)))


def replace_grn(block: Any) -> None:
    """Gives the block our forward.

    Raises:
        Left: it stays as it is.
    """
    kind = grn_of(block)
    if kind is None or type(block) is not kind or not is_original(kind):
        raise Left("it is not exactly timm's GlobalResponseNorm")
    if _is_channels_last(block) is None:
        raise Left("its dimensions are not those that timm's constructor sets")
    fields = {name: frozen(name, vars(block)[name]) for name in FIELDS}
    become(block, GrnPeer, Record("", 2, (), fields, all_fields=False, idle=(), code=fingerprint(type(block))))
