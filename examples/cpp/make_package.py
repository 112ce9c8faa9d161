"""Writes what run_package needs: a small model with blocks, compiled by AOTInductor, and an input with its output.

python examples/cpp/make_package.py DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

from gcnet_ext import GlobalContextBlock, SqueezeExcitation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        GlobalContextBlock(16, 1 / 4, fusion_types=("channel_mul", "channel_add")),
        nn.ReLU(),
        SqueezeExcitation(16, 1 / 4),
    ).eval()
    for parameter in model.parameters():  # a block's last layer starts with zeros, and would hide what is before it
        nn.init.normal_(parameter, std=0.3)
    sizes = {0: Dim("n", max=64), 2: Dim("h", min=2, max=512), 3: Dim("w", min=2, max=512)}
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 3, 24, 32),), dynamic_shapes=(sizes,))
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
        x = torch.randn(5, 3, 19, 27)  # other sizes than it was exported with
        torch.save([x, model(x)], folder / "example.pt")


if __name__ == "__main__":
    main()
