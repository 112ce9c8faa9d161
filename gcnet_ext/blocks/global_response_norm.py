"""The global response norm: channels compete by their norms over the positions."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn

from ..ops.global_response_norm import global_response_norm
from . import _layers, _state_dict


class GlobalResponseNorm(nn.Module):
    """The norm of ConvNeXt V2 on compiled kernels: ``out = x + bias + weight * x * R``, ``R_c = G_c / (mean_c G + eps)``.

    G is the L2 norm of a channel over the positions. Source: S. Woo et al., "ConvNeXt V2: Co-designing and Scaling ConvNets
    with Masked Autoencoders", 2023, https://arxiv.org/abs/2301.00808, section 3.2 and algorithm 1. Parameter names and shapes
    are those of timm; the original's ``gamma`` and ``beta``, ``[1, 1, 1, C]``, load.

    Args:
        channels: C, the channels of the input and of the output.
        eps: what is added to the mean of the norms.
        channels_last: whether the channels are the last dimension of x, and not the second. (A map ``[N, C, H, W]`` may lie in
            memory in either order whatever this is.)
        device, dtype: of the parameters, as in every nn.Module.

    Shapes:
        Input ``[N, C, *spatial]``, or with channels_last ``[N, *spatial, C]``; the output is like it, in its dtype and memory
        format.

    Raises:
        ValueError: an argument of the constructor is not valid. The message says what is valid.
        RuntimeError: the input has a wrong rank, dtype, device, number of channels, or no positions. The message says what.

    The weight and the bias start as zeros, so the block starts as the identity. x is read twice and written once; backward
    reads x and the gradient twice each.
    """

    if TYPE_CHECKING:  # nn.Module.__call__ takes and returns Any

        def __call__(self, x: Tensor) -> Tensor: ...

    def __init__(
        self,
        channels: int,
        eps: float = 1e-6,
        *,
        channels_last: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _layers.check_count("channels", channels)
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not math.isfinite(eps):
            raise ValueError(f"eps must be a finite number, got {eps!r}")
        self.inplanes = channels
        self.eps = eps
        self.channels_last = channels_last
        self.weight = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        self.register_load_state_dict_pre_hook(partial(_state_dict.accept, _state_dict.GLOBAL_RESPONSE_NORM))

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            of_graph: Tensor = _layers.of_no_tensor(self, x)
            return of_graph
        by_channels = x.movedim(-1, 1) if self.channels_last and x.dim() > 2 else x
        _layers.check_channels(by_channels, self.inplanes)
        out = global_response_norm(by_channels, self.weight, self.bias, self.eps)
        return out.movedim(1, -1) if self.channels_last else out

    def __prepare_scriptable__(self) -> NoReturn:
        _layers.not_scriptable(self)

    def extra_repr(self) -> str:
        return f"{self.inplanes}, eps={self.eps}{', channels_last=True' if self.channels_last else ''}"
