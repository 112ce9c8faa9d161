"""Blocks that do not look at their layers in every call, for a model that is only used from now on."""

from __future__ import annotations

from torch import nn

from ..blocks._fused import FusedBlock


def freeze(model: nn.Module) -> list[str]:
    """Tell the blocks in the model that their layers will stay what they are, for inference with small maps.

    A block checks in every call that no layer of it has been replaced, hooked, patched or given another setting, because then
    it would call its layers. A frozen one does not. The check is a part of what a small call costs, and of the guards of a
    graph that torch.compile makes. Parameters are still read in every call, so `load_state_dict`, ``.to()``, an optimizer,
    ``.data`` and parameters that are assigned anew have the effect that they always have.

    What a frozen block does not notice: another layer in the place of one of its own; hooks on a layer; methods that are set
    on a layer or its class; settings such as the eps of a norm, or ``inplace`` of the block. Call `freeze` again behind such a
    change. ``train()``, of the model or of the block, ends it. Copies of a block, in memory and in files, are not frozen.

    Args:
        model: any module, in evaluation mode. It may be a block.

    Returns:
        The names of the blocks that are frozen now, in the order of ``model.named_modules()``; ``""`` is the model itself.
        These are the blocks that one operator computes. Not among them are blocks whose layers are not the plain ones or whose
        parameters are computed (parametrizations); `NonLocalBlock`, `EfficientChannelAttention` and `GlobalResponseNorm`, which
        have hardly any layers to look at; and all blocks where there are no compiled kernels.

    Raises:
        TypeError: the model is no nn.Module.
        ValueError: the model is in training mode.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if model.training:
        raise ValueError("model must be in evaluation mode, got one in training mode; call model.eval() first")
    return [name for name, module in model.named_modules() if isinstance(module, FusedBlock) and module._freeze()]
