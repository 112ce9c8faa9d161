"""The gradient of a parameter has the strides of the parameter, down to those of sizes of one: DistributedDataParallel warns
of others."""

from __future__ import annotations

import eager
import grid
import pytest
import schema
import torch
from grid import GLOBAL_CONTEXT_INPUTS, Case, Random

from gcnet_ext import GlobalContextBlock

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def as_convolutions(inputs, memory_format: torch.memory_format) -> list:
    """The weights of the mask and of the layers as [H, C, 1, 1], those of the norm and the biases as [H]."""
    mask = GLOBAL_CONTEXT_INPUTS.index("mask_weight")
    weights = [tensor if tensor is None or tensor.dim() > 1 or i != mask else tensor[None] for i, tensor in enumerate(inputs)]
    return [
        tensor if i == 0 or tensor is None or tensor.dim() != 2 else tensor[:, :, None, None].to(memory_format=memory_format)
        for i, tensor in enumerate(weights)
    ]


@pytest.mark.parametrize("fusion", grid.FUSIONS)
@pytest.mark.parametrize("pooling", grid.POOLINGS)
@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_of_the_whole_block(backend, memory_format, layout, pooling, fusion):
    case = Case((2, 8, 4, 5), layout=layout, pooling=pooling, fusion=fusion)
    inputs = as_convolutions(case.inputs(backend.to), memory_format)
    got = grid.run(grid.flat(backend.global_context), inputs, inputs[0])
    plain = grid.run(grid.flat(backend.global_context), case.inputs(backend.to), inputs[0])
    for tensor, ours, theirs in zip(inputs[1:], got.grads[1:], plain.grads[1:], strict=True):
        if tensor is not None:
            assert ours.stride() == tensor.stride()
            assert torch.equal(ours.flatten(), theirs.flatten())


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_of_pool_and_fusion(backend, memory_format):
    x = Random(0, backend.to).feature_map((2, 8, 4, 5), torch.float32)
    scale, shift = (Random(seed, backend.to).normal(2, 8, 1, 1).to(memory_format=memory_format) for seed in (1, 2))
    weight = scale[:1]
    pooled = grid.run(backend.attention_pool, (x, weight, None), scale.flatten(1))
    fused = grid.run(backend.channel_fuse, (x, scale, shift), x)
    for gradient, tensor in zip((pooled.grads[1], *fused.grads[1:]), (weight, scale, shift), strict=True):
        assert gradient.stride() == tensor.stride()


def test_of_a_parameter_in_another_order(backend):
    """A transposed weight has a contiguous gradient: its numbers are where they belong all the same."""
    inputs = list(Case((2, 8, 4, 5)).inputs(backend.to))
    plain = grid.run(grid.flat(backend.global_context), inputs, inputs[0])
    w1 = GLOBAL_CONTEXT_INPUTS.index("scale_w1")
    inputs[w1] = inputs[w1].t().contiguous().t()
    got = grid.run(grid.flat(backend.global_context), inputs, inputs[0])
    assert got.grads[w1].is_contiguous() or not backend.has_kernels
    assert torch.equal(got.grads[w1], plain.grads[w1])


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_the_shape_functions_tell_them(backend, memory_format):
    """torch.library.opcheck compares what they say with what the operators return, strides included."""
    ops = backend.ops
    inputs = as_convolutions(Case((2, 8, 4, 5)).inputs(backend.to), memory_format)
    backward = ops.global_context_backward
    arguments = schema.backward(inputs[0], inputs, ops.global_context(*inputs)[1:], (True,) * 4)
    assert set(torch.library.opcheck(backward.op, backward.nested(**arguments)).values()) == {"SUCCESS"}
    assert backward(**arguments)[1].stride() == inputs[1].stride()


@pytest.mark.parametrize("layout", grid.LAYOUTS)
def test_as_in_the_block_in_eager(backend, layout):
    """Where block and images are in one format: else a convolution's gradient has the strides of the images' format."""
    memory_format = FORMATS[layout]
    fusions = ("channel_mul", "channel_add")
    theirs = eager.ContextBlock(16, 1 / 4, fusion_types=fusions).to(memory_format=memory_format)
    ours = GlobalContextBlock(16, 1 / 4, fusion_types=fusions, device=backend.device).to(memory_format=memory_format)
    ours.load_state_dict(theirs.state_dict())
    x = Random(0, backend.to).feature_map((2, 16, 5, 7), torch.float32, layout)
    for block, images in ((ours, x), (theirs, x.cpu())):
        block(images).square().sum().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert a.stride() == b.stride() == a.grad.stride() == b.grad.stride(), name
