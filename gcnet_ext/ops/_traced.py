"""The operator of the whole block in TorchScript, for traces that keep it.

A trace cannot hold a call with a list of optional tensors, but it can hold a function of TorchScript that makes the lists.
TorchScript reads the annotations as they stand here, so that this file does without `from __future__ import annotations`.
"""

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ._global_context_arguments import flat


def _global_context(
    x: Tensor,
    mask_weight: Tensor | None,
    mask_bias: Tensor | None,
    scale_w1: Tensor | None,
    scale_b1: Tensor | None,
    scale_norm_weight: Tensor | None,
    scale_norm_bias: Tensor | None,
    scale_w2: Tensor | None,
    scale_b2: Tensor | None,
    shift_w1: Tensor | None,
    shift_b1: Tensor | None,
    shift_norm_weight: Tensor | None,
    shift_norm_bias: Tensor | None,
    shift_w2: Tensor | None,
    shift_b2: Tensor | None,
    residual: Tensor | None,
    valid: Tensor | None,
    norm_eps: float | None,
    activation: int,
    slope: float,
    hard_gate: list[float] | None,
    final_activation: int,
) -> Tensor:
    return torch.ops.gcnet_ext.global_context_inference(
        x,
        [mask_weight, mask_bias],
        [scale_w1, scale_b1, scale_norm_weight, scale_norm_bias, scale_w2, scale_b2],
        [shift_w1, shift_b1, shift_norm_weight, shift_norm_bias, shift_w2, shift_b2],
        residual,
        valid,
        norm_eps,
        activation,
        slope,
        hard_gate,
        final_activation,
    )


@cache
def _scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; whoever traces has been told
        return torch.jit.script(_global_context)


def global_context(*args: Any) -> Tensor:
    """The output of the operator, as one node of the trace that is being recorded."""
    options, *tensors = flat(*args)
    norm_eps, activation, slope, hard_gate, final_activation = options
    gate = None if hard_gate is None else [float(number) for number in hard_gate]
    result: Tensor = _scripted()(*tensors, norm_eps, activation, slope, gate, final_activation)
    return result
