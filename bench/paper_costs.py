"""The cost columns of the GCNet paper: parameters and multiply-adds of ResNet-50 and Mask R-CNN with the blocks of the family.

    python bench/paper_costs.py

Nothing is timed or trained: the models are built on the meta device, their parameters counted, and their multiply-adds counted
by torch.utils.flop_counter through this package's FLOP formulas, plus one per element for the fusion, which PyTorch counts as
nothing and the paper as a multiply-add. Published: Y. Cao et al., "GCNet", 2019, https://arxiv.org/abs/1904.11492.

Mask R-CNN is torchvision's with 81 classes, whose parameters are those of the paper's baseline. Its multiply-adds depend on how
the heads are counted, so those of the blocks are added to the published figure of the baseline. Without torchvision, the
parameters are those of its backbone alone. ImageNet's ResNet-50 strides in the first convolution of a block, as the paper's.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import frames
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gcnet_ext import NonLocalBlock, SimplifiedNonLocalBlock, insert_blocks

LAST_OF_C4 = "layer3.5"
DETECTION_BASELINE = 279.4  # GFLOPs of Mask R-CNN R50-FPN at 1280x800, as published


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * planes
        self.conv1, self.bn1 = nn.Conv2d(inputs, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = nn.Identity()
        if inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (self.bn3(self.conv3(out.relu())) + self.downsample(x)).relu()


class ResNet50(nn.Module):
    """With the stride in the first convolution, and torchvision's names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = 64
        for stage, (planes, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
            layers = []
            for index in range(blocks):
                layers.append(Bottleneck(inputs, planes, 2 if stage > 1 and index == 0 else 1))
                inputs = 4 * planes
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.fc = nn.Linear(inputs, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        for stage in (1, 2, 3, 4):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


class Row(NamedTuple):
    """A line of a table. `millions` and `giga` are the published figures; None where the paper has none."""

    name: str
    insert: Callable[[nn.Module], object]
    millions: str
    giga: str | None
    note: str = ""


# The paper puts a block before the addition, after a norm. Behind the residual block it costs as much.
insert_everywhere = partial(insert_blocks, position="after_add")


def without_bottleneck(model: nn.Module) -> None:
    insert_everywhere(model, kind="snl")


ONE_NL = Row(
    "+1 NL",
    partial(insert_blocks, kind="nl", modules=[LAST_OF_C4], sub_sample=True),
    "",
    None,
    "the paper pools before phi and g; mmcv, and so NonLocalBlock, after them: that is the difference",
)
ONE_SNL = Row("+1 SNL", partial(insert_blocks, kind="snl", modules=[LAST_OF_C4]), "", None)
ONE_GC = Row("+1 GC, r 1/16", partial(insert_blocks, modules=[LAST_OF_C4]), "", None)
ALL_GC = Row("+all GC, r 1/16", insert_everywhere, "", None)

IMAGENET = [
    Row("ResNet-50", lambda model: None, "25.56", "3.86"),
    ONE_NL._replace(millions="27.66", giga="4.11"),
    ONE_SNL._replace(millions="26.61", giga="3.86"),
    ONE_GC._replace(millions="25.69", giga="3.86"),
    ALL_GC._replace(millions="28.08", giga="3.87"),
]
DETECTION = [
    Row("Mask R-CNN R50-FPN", lambda model: None, "44.4", "279.4"),
    ONE_NL._replace(millions="46.5", giga="288.7"),
    ONE_SNL._replace(millions="45.4", giga="279.4", note="45,451,318 parameters: the paper cuts the digits off"),
    ONE_GC._replace(millions="44.5", giga="279.4"),
    ALL_GC._replace(millions="46.9", giga="279.6"),
    *(
        Row(f"+all GC, r 1/{part}", partial(insert_everywhere, ratio=1 / part), millions, None)
        for part, millions in ((4, "54.4"), (8, "49.4"), (32, "45.7"))
    ),
    Row("+all GC without bottleneck", without_bottleneck, "64.4", None),
]


def non_local_multiply_adds(channels: int, positions: int, attended: int, pooled_before: bool) -> int:
    """Of a non-local block with reduction 2: theta and the last layer, phi and g, and the two products of all pairs."""
    planes = channels // 2
    embedded = attended if pooled_before else positions
    return 2 * channels * planes * positions + 2 * channels * planes * embedded + 2 * positions * attended * planes


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def fusions(model: nn.Module, x: Tensor) -> Iterator[int]:
    """Elements of the feature map times fusions, for every block that ran on x."""
    found: list[int] = []

    def count(_module: nn.Module, _arguments: object, out: Tensor) -> None:
        found.append(out.numel())

    blocks = [
        m for m in model.modules() if hasattr(m, "fusion_types") or isinstance(m, SimplifiedNonLocalBlock | NonLocalBlock)
    ]
    hooks = [block.register_forward_hook(count) for block in blocks]
    model(x)
    for hook in hooks:
        hook.remove()
    yield from found


def multiply_adds(model: nn.Module, height: int, width: int) -> float:
    """In units of 10^9, products and fusions."""
    x = torch.empty(1, 3, height, width, device="meta")
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(x)
        return (counter.get_total_flops() / 2 + sum(fusions(model, x))) / 1e9


def built(row: Row) -> nn.Module:
    """The ResNet-50 of a row, on the meta device, in eval mode."""
    with torch.device("meta"):
        model = ResNet50().eval()
        row.insert(model)
    return model


def detector_head() -> int | None:
    """Parameters of Mask R-CNN besides its ResNet-50 and that one's classifier; None without torchvision."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    with torch.device("meta"):
        detector = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=81)
    # torchvision freezes nothing without weights; its norms are BatchNorms, counted as the paper counts them.
    return parameters(detector) - parameters(detector.backbone.body)


def imagenet() -> list[tuple[Row, int, float]]:
    """Row, parameters, GFLOPs."""
    return [(row, parameters(model := built(row)), multiply_adds(model, 224, 224)) for row in IMAGENET]


def detection() -> list[tuple[Row, int, float]]:
    """Row, parameters (of the backbone alone without torchvision), GFLOPs that the blocks add to the published baseline."""
    head, results = detector_head(), []
    with_classifier = [(row, built(row)) for row in DETECTION]
    plain = multiply_adds(with_classifier[0][1], 800, 1280)
    for row, model in with_classifier:
        count = parameters(model) - parameters(model.fc) + (head or 0)
        results.append((row, count, DETECTION_BASELINE + multiply_adds(model, 800, 1280) - plain))
    return results


def table(title: str, results: list[tuple[Row, int, float]]) -> str:
    cells = [
        [row.name, f"{count:,}", f"{row.millions}M", f"{giga:.3f}", str(row.giga or ""), row.note]
        for row, count, giga in results
    ]
    header = ["", "parameters", "published", "GFLOPs", "published GFLOPs", ""]
    return f"## {title}\n\n{frames.markdown(header, cells)}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(table("ImageNet, 224x224", imagenet()))
    alone = "" if detector_head() else " (parameters of the backbone alone: torchvision is not installed)"
    print()
    print(table(f"Mask R-CNN R50-FPN, 1280x800{alone}", detection()))
    before = [non_local_multiply_adds(1024, *positions, pooled_before=True) / 1e9 for positions in ((196, 49), (4000, 1000))]
    print("\nWith 2x2 pooling before phi and g, as published, a non-local block adds", end=" ")
    print(f"{before[0]:.3f} GFLOPs on ImageNet and {before[1]:.2f} in Mask R-CNN.")


if __name__ == "__main__":
    main()
