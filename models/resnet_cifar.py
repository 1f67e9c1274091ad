"""The residual networks for 32×32 images of He et al., arXiv 1512.03385, section 4.2: 6n+2 layers, three widths."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class CifarBlock(nn.Module):
    """Two 3×3 convolutions and a parameter-free shortcut (option A: subsample, then pad the channels with zeros)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.padding = width - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.padding:
            before = self.padding // 2
            x = functional.pad(x, (0, 0, 0, 0, before, self.padding - before))
        return functional.relu(out + x)


class CifarResNet(nn.Module):
    """The trunk of a 6n+2-layer ResNet: images B×3×H×W to features B×C×H/4×W/4.

    Args:
        depth: 6n+2; 32 is the one that the long-tail literature uses.
        first: channels of the first stage; the next ones have twice and four times as many (C).

    Raises:
        ValueError: if depth is not 6n+2.
    """

    def __init__(self, depth: int, first: int = 16) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n+2, got {depth}")
        self.width = 4 * first
        self.conv1 = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        blocks: list[nn.Module] = []
        inputs = first
        for width in (first, 2 * first, 4 * first):
            for _ in range((depth - 2) // 6):
                blocks.append(CifarBlock(inputs, width, stride=1 if width == inputs else 2))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """The last block's map, B×C×H/4×W/4."""
        features: Tensor = self.blocks(torch.relu(self.bn1(self.conv1(images_BCHW))))
        return features
