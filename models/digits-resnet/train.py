"""Make this folder: trains the network, exports it and writes its data files."""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn
from training import make


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut, a strided 1x1 one where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Branch plus shortcut, rectified."""
        inner = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


def network() -> nn.Module:
    """A stem, a block that keeps the shape, one that halves it, mean over the image, ten logits."""
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            stem=nn.Conv2d(1, 16, 3, padding=1, bias=False),
            norm=nn.BatchNorm2d(16),
            relu=nn.ReLU(),
            block1=Residual(16, 16, stride=1),
            block2=Residual(16, 32, stride=2),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classify=nn.Linear(32, 10),
        )
    )


if __name__ == "__main__":
    make(Path(__file__).resolve().parent, network, keep_batchnorm=False)
