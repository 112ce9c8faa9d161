"""timm's residual blocks with a context block; their forward is that of timm 1.0."""

from __future__ import annotations

from timm.models import resnet
from torch import Tensor

from .residual import tail


class BasicBlock(resnet.BasicBlock):
    """With a submodule ``context_block``."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.drop_block(self.bn1(self.conv1(x)))
        out = self.aa(self.act1(out))
        out = self.bn2(self.conv2(out))
        if self.se is not None:
            out = self.se(out)
        return tail(self, out, x, self.act2, self.drop_path)


class Bottleneck(resnet.Bottleneck):
    """With a submodule ``context_block``."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.drop_block(self.bn2(self.conv2(out)))
        out = self.aa(self.act2(out))
        out = self.bn3(self.conv3(out))
        if self.se is not None:
            out = self.se(out)
        return tail(self, out, x, self.act3, self.drop_path)
