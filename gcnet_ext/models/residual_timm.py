"""timm's residual blocks with a context block, or with a block of timm's own; their forward is that of timm 1.0."""

from __future__ import annotations

from timm.models import resnet
from torch import Tensor

from .tail import WithTail


class _Basic(resnet.BasicBlock):
    def _to_the_norm(self, x: Tensor) -> Tensor:
        out = self.drop_block(self.bn1(self.conv1(x)))
        out = self.aa(self.act1(out))
        return self.conv2(out)

    def _behind_the_norm(self, x: Tensor) -> Tensor:
        return self.bn2(self._to_the_norm(x))


class _Bottle(resnet.Bottleneck):
    def _to_the_norm(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.drop_block(self.bn2(self.conv2(out)))
        out = self.aa(self.act2(out))
        return self.conv3(out)

    def _behind_the_norm(self, x: Tensor) -> Tensor:
        return self.bn3(self._to_the_norm(x))


class BasicBlock(_Basic):
    """With a submodule ``context_block``."""

    def _to_the_block(self, x: Tensor) -> Tensor:
        out = self._behind_the_norm(x)
        return out if self.se is None else self.se(out)

    def forward(self, x: Tensor) -> Tensor:
        out = self.context_block(self._to_the_block(x))
        if self.drop_path is not None:
            out = self.drop_path(out)
        out += x if self.downsample is None else self.downsample(x)
        return self.act2(out)


class Bottleneck(_Bottle):
    """With a submodule ``context_block``."""

    def _to_the_block(self, x: Tensor) -> Tensor:
        out = self._behind_the_norm(x)
        return out if self.se is None else self.se(out)

    def forward(self, x: Tensor) -> Tensor:
        out = self.context_block(self._to_the_block(x))
        if self.drop_path is not None:
            out = self.drop_path(out)
        out += x if self.downsample is None else self.downsample(x)
        return self.act3(out)


class BasicBlockWithTail(WithTail, BasicBlock):
    """`BasicBlock` in fewer sweeps."""

    _former = BasicBlock
    _before_the_block = ("se", "bn2", "conv2")
    _activation = "act2"


class BottleneckWithTail(WithTail, Bottleneck):
    """`Bottleneck` in fewer sweeps."""

    _former = Bottleneck
    _before_the_block = ("se", "bn3", "conv3")
    _activation = "act3"


class SeBasicBlockWithTail(WithTail, _Basic):
    """timm's own, with a block of ours as its ``se``."""

    _former = resnet.BasicBlock
    _block = "se"
    _before_the_block = ("bn2", "conv2")
    _activation = "act2"
    _to_the_block = _Basic._behind_the_norm


class SeBottleneckWithTail(WithTail, _Bottle):
    """timm's own, with a block of ours as its ``se``."""

    _former = resnet.Bottleneck
    _block = "se"
    _before_the_block = ("bn3", "conv3")
    _activation = "act3"
    _to_the_block = _Bottle._behind_the_norm


WITH_CONTEXT_BLOCK = {resnet.BasicBlock: BasicBlock, resnet.Bottleneck: Bottleneck}
WITH_TAIL = {
    kind._former: kind for kind in (BasicBlockWithTail, BottleneckWithTail, SeBasicBlockWithTail, SeBottleneckWithTail)
}
