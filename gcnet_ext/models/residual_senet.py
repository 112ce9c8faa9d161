"""The residual blocks of timm's SENets; their forward is that of timm 1.0."""

from __future__ import annotations

from typing import Any

from timm.models import senet
from torch import Tensor

from .tail import WithTail


class _Bottle(WithTail):
    _block = "se_module"
    _before_the_block = ("bn3", "conv3")
    _adds_in_place = False

    def _to_the_norm(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.conv3(out)

    def _to_the_block(self, x: Tensor) -> Tensor:
        return self.bn3(self._to_the_norm(x))


class SEBottleneckWithTail(_Bottle, senet.SEBottleneck):
    _former = senet.SEBottleneck


class SEResNetBottleneckWithTail(_Bottle, senet.SEResNetBottleneck):
    _former = senet.SEResNetBottleneck


class SEResNeXtBottleneckWithTail(_Bottle, senet.SEResNeXtBottleneck):
    _former = senet.SEResNeXtBottleneck


class SEResNetBlockWithTail(WithTail, senet.SEResNetBlock):
    _former = senet.SEResNetBlock
    _block = "se_module"
    _before_the_block = ("relu", "bn2", "conv2")
    _adds_in_place = False

    def _to_the_block(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)))


WITH_CONTEXT_BLOCK: dict[type[Any], type[Any]] = {}
WITH_TAIL = {
    kind._former: kind
    for kind in (SEBottleneckWithTail, SEResNetBottleneckWithTail, SEResNeXtBottleneckWithTail, SEResNetBlockWithTail)
}
