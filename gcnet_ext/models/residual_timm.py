"""timm's residual blocks with a context block; their forward is that of timm 1.0."""

from __future__ import annotations

from timm.models import resnet
from torch import Tensor


class BasicBlock(resnet.BasicBlock):
    """With a submodule ``context_block``."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.drop_block(self.bn1(self.conv1(x)))
        out = self.aa(self.act1(out))
        out = self.bn2(self.conv2(out))
        if self.se is not None:
            out = self.se(out)
        out = self.context_block(out)
        if self.drop_path is not None:
            out = self.drop_path(out)
        out += x if self.downsample is None else self.downsample(x)
        return self.act2(out)


class Bottleneck(resnet.Bottleneck):
    """With a submodule ``context_block``."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.drop_block(self.bn2(self.conv2(out)))
        out = self.aa(self.act2(out))
        out = self.bn3(self.conv3(out))
        if self.se is not None:
            out = self.se(out)
        out = self.context_block(out)
        if self.drop_path is not None:
            out = self.drop_path(out)
        out += x if self.downsample is None else self.downsample(x)
        return self.act3(out)
