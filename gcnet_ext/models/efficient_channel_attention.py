"""timm's block of efficient channel attention with a forward of ours."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor

from ..blocks import _layers
from ..blocks._fused import Tail
from ..blocks.efficient_channel_attention import fusion
from ..ops import attention_pool
from ..ops.channel_fuse import channel_fuse
from .peer import Peer, Record, become
from .readers import eca_of
from .skeleton import Left, gate_of, is_original, kind_of_gate
from .watch import fingerprint


class EcaPeer(Peer):
    """timm's EcaModule: the convolution is called, pooling and fusion are compiled."""

    def _computed(self, x: Tensor, tail: Tail | None) -> Any:
        block: Any = self
        residual, inplace, norm = (None, False, None) if tail is None else tail
        final = "none" if tail is None else "relu"
        found = gate_of(block.gate)
        context = None
        if self._is_what_it_was() and block.conv2 is None and found is not None and found.kind == "sigmoid":
            with contextlib.suppress(RuntimeError):  # the former forward says in its own words what is wrong
                context = attention_pool.unrounded(x)
        if context is None:
            return self._former_with_tail(x, tail)
        scale, shift = fusion(block.conv, context, x, norm)
        return channel_fuse(x, scale, shift, residual=residual, final_activation=final, inplace=inplace)


def replace_eca(block: Any) -> None:
    """Gives the block our forward.

    Raises:
        Left: it stays as it is.
    """
    kind = eca_of(block)
    if kind is None or type(block) is not kind or not is_original(kind):
        raise Left("it is not exactly timm's EcaModule")
    if block.conv2 is not None:
        raise Left("it has two convolutions (use_mlp)")
    found = kind_of_gate(block.gate)
    if found is None or found.kind != "sigmoid":
        raise Left(f"its gate is {type(block.gate).__name__}, not a sigmoid")
    if not isinstance(block.conv, _layers.CONVOLUTIONS[1]):
        raise Left(f"its layer {type(block.conv).__name__} is not a convolution of torch")
    become(block, EcaPeer, Record("", 2, ("conv",), {}, all_fields=False, idle=(), code=fingerprint(type(block))))
