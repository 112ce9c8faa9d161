"""torchvision's residual blocks with a context block; their forward is that of torchvision 0.29."""

from __future__ import annotations

from torch import Tensor
from torchvision.models import resnet

from .tail import WithTail


class BasicBlock(resnet.BasicBlock):
    """With a submodule ``context_block``."""

    def _to_the_norm(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.conv2(out)

    def _to_the_block(self, x: Tensor) -> Tensor:
        return self.bn2(self._to_the_norm(x))

    def forward(self, x: Tensor) -> Tensor:
        out = self.context_block(self._to_the_block(x))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(resnet.Bottleneck):
    """With a submodule ``context_block``."""

    def _to_the_norm(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.conv3(out)

    def _to_the_block(self, x: Tensor) -> Tensor:
        return self.bn3(self._to_the_norm(x))

    def forward(self, x: Tensor) -> Tensor:
        out = self.context_block(self._to_the_block(x))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class BasicBlockWithTail(WithTail, BasicBlock):
    """`BasicBlock` in fewer sweeps."""

    _former = BasicBlock
    _before_the_block = ("bn2", "conv2")


class BottleneckWithTail(WithTail, Bottleneck):
    """`Bottleneck` in fewer sweeps."""

    _former = Bottleneck
    _before_the_block = ("bn3", "conv3")


WITH_CONTEXT_BLOCK = {resnet.BasicBlock: BasicBlock, resnet.Bottleneck: Bottleneck}
WITH_TAIL = {kind._former: kind for kind in (BasicBlockWithTail, BottleneckWithTail)}
