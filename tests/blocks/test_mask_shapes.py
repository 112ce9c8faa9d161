"""The hooks of a mask see what those of a convolution for sequences, images or volumes would see."""

from __future__ import annotations

from typing import Any

import eager
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from gcnet_ext import GlobalContextBlock, SimplifiedNonLocalBlock

SHAPES = [(2, 8, 7), (2, 8, 3, 4), (2, 8, 2, 3, 2), (1, 8, 1), (3, 8, 2, 1, 1, 2)]
BLOCKS = {"global context": lambda: GlobalContextBlock(8, 1 / 2), "simplified": lambda: SimplifiedNonLocalBlock(8)}


def block_and_x(name: str, shape: tuple[int, ...]) -> tuple[Any, torch.Tensor]:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return eager.randomise(BLOCKS[name]().double()), x.requires_grad_()


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_of_every_kind_of_hook(name, shape, used):
    block, x = block_and_x(name, shape)
    if used:
        block(x)
    mask, logits, seen = block.conv_mask, (shape[0], 1, *shape[2:]), []

    def look(module: nn.Module, *arguments: Any) -> None:
        seen.append((module is mask, *(part[0].shape if isinstance(part, tuple) else part.shape for part in arguments)))

    handles = [
        mask.register_forward_pre_hook(look),
        mask.register_forward_hook(look),
        mask.register_full_backward_pre_hook(look),
        mask.register_full_backward_hook(look),
    ]
    out = block(x)
    assert block.attention_map(x.detach()).shape == (shape[0], *shape[2:])
    del seen[2:]
    out.sum().backward()
    assert seen == [(True, shape), (True, shape, logits), (True, logits), (True, shape, logits)]
    assert "forward" not in vars(mask)
    for handle in handles:
        handle.remove()
    assert torch.allclose(block(x), out, rtol=1e-12, atol=1e-12)
    assert len(seen) == 4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_of_a_hook_of_all_modules(shape):
    block, x = block_and_x("global context", shape)
    seen = {}
    handle = register_module_forward_hook(lambda module, given, out: seen.update({module: (given[0].shape, out.shape)}))
    try:
        block(x)
    finally:
        handle.remove()
    assert seen[block.conv_mask] == (shape, (shape[0], 1, *shape[2:]))


def test_a_hook_that_fails_leaves_no_trace():
    block, x = block_and_x("global context", (2, 8, 7))
    want = block(x)

    def fail(*_: Any) -> None:
        raise ValueError("no")

    handle = block.conv_mask.register_forward_hook(fail)
    with pytest.raises(ValueError, match="no"):
        block(x)
    handle.remove()
    assert "forward" not in vars(block.conv_mask)
    assert torch.equal(block(x), want)
