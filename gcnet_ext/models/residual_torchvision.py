"""torchvision's residual blocks with a context block; their forward is that of torchvision 0.29."""

from __future__ import annotations

from torch import Tensor
from torchvision.models import resnet


class BasicBlock(resnet.BasicBlock):
    """With a submodule ``context_block``."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = self.context_block(out)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(resnet.Bottleneck):
    """With a submodule ``context_block``."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out = self.context_block(out)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)
