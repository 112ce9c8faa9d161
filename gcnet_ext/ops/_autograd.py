"""What the gradients of several operators are made of.

A gradient that nobody asked for is not computed and is None. The gradient of the mask's bias is zero, not None, so that
DistributedDataParallel does not take the bias for an unused parameter.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _torch
from . import _relu_bits


def in_plain_pytorch(grad: Tensor) -> bool:
    """Whether a backward pass must be in plain PyTorch: its results will be differentiated again, or its gradient has a tangent
    of forward mode."""
    return torch.is_grad_enabled() or _torch.has_tangent(grad)


def needed(need: bool, gradient: Tensor | None) -> Tensor | None:
    """The gradient if it is needed. What a kernel returns for one that is not is an empty tensor."""
    return gradient if need else None


def through_plain_pytorch(
    function: Callable[..., Tensor], inputs: tuple, needs: tuple[bool, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients by way of plain PyTorch, which can be differentiated again; for create_graph=True, and for forward mode.

    They are taken with respect to aliases. In the caller's graph one input may depend on another or be given twice. Here
    backward must stop at each input; the path from one input to another belongs to the caller's graph.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [tensor.view_as(tensor) if need else tensor for tensor, need in zip(inputs, needs, strict=True)]
        wanted = [alias for alias, need in zip(aliases, needs, strict=True) if need]
        out = function(*aliases)
        # What the output does not depend on, as the parameters of a norm that is off, has a gradient of zeros.
        grads = (
            torch.autograd.grad(out, wanted, grad, create_graph=again, allow_unused=True, materialize_grads=True)
            if out.requires_grad
            else [torch.zeros_like(alias) for alias in wanted]
        )
    of_wanted = iter(grads)
    return tuple(next(of_wanted) if need else None for need in needs)


def constant(bias: Tensor | None) -> Tensor | None:
    """Detaches the bias of a mask. It cancels in the softmax, so its gradient must be exactly zero, not a rounding error."""
    return None if bias is None else bias.detach()


def before_relu(grad: Tensor, positive: Tensor, x: Tensor, final_activation: int) -> Tensor:
    """The gradient of the final ReLU's input, or grad itself if there is no final ReLU; it can be differentiated again."""
    return grad.where(_relu_bits.unpack(positive, x), 0) if final_activation else grad
