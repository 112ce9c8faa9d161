"""A few calls of every operator on a GPU, forward and backward, against the reference: what compute-sanitizer can afford."""

from __future__ import annotations

import itertools

import reference
import torch
from torch import nn

import gcnet_ext
from gcnet_ext import Branch
from gcnet_ext._tuning import CudaTuning, cuda_tuning

SHAPES = ((2, 16, 9, 9), (1, 64, 28, 28), (2, 300, 5, 7), (1, 2048, 7, 7))


def main() -> None:
    torch.manual_seed(0)
    worst = 0.0
    for shape, dtype, engine in itertools.product(SHAPES, (torch.float32, torch.float16), ("v1", "v2", "tickets")):
        for layout in (torch.contiguous_format, torch.channels_last):
            with cuda_tuning(CudaTuning(engine=engine)):
                x = torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=layout).requires_grad_()
                block = gcnet_ext.GlobalContextBlock(shape[1], ratio=1 / 8, fusion_types=("channel_mul", "channel_add"))
                for parameter in block.parameters():
                    nn.init.normal_(parameter, std=0.1)
                block = block.to("cuda", dtype)
                out = block(x)
                out.backward(torch.randn_like(out))
                mask = block.conv_mask.weight, block.conv_mask.bias
                branches = [
                    Branch(conv.weight, conv.bias, norm.weight, norm.bias, last.weight, last.bias)
                    for conv, norm, _, last in (block.channel_mul_conv, block.channel_add_conv)
                ]
                expected = reference.global_context(x, *mask, *branches)
                worst = max(worst, ((out - expected).norm() / expected.norm()).item())
                pooled = gcnet_ext.attention_pool(x, *mask)
                gcnet_ext.channel_fuse(x, pooled, pooled).sum().backward()
    torch.cuda.synchronize()
    print(f"largest relative error {worst:.1e}")
    assert worst < 5e-3


if __name__ == "__main__":
    main()
