"""Make this folder: trains the network, exports it and writes its data files."""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from torch import nn
from training import make


def convolution(inputs: int, outputs: int, size: int, stride: int, groups: int) -> nn.Module:
    """Convolution, BatchNorm, hard-swish."""
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            conv=nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False),
            norm=nn.BatchNorm2d(outputs),
            act=nn.Hardswish(),
        )
    )


def separable(inputs: int, outputs: int, stride: int) -> nn.Module:
    """A 3x3 convolution per channel, then a 1x1 convolution across channels."""
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            depthwise=convolution(inputs, inputs, 3, stride, groups=inputs),
            pointwise=convolution(inputs, outputs, 1, 1, groups=1),
        )
    )


def network() -> nn.Module:
    """A stem, four separable blocks of which one halves the image, its mean, ten logits."""
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            stem=convolution(1, 16, 3, 1, groups=1),
            block1=separable(16, 32, stride=1),
            block2=separable(32, 48, stride=2),
            block3=separable(48, 64, stride=1),
            block4=separable(64, 64, stride=1),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classify=nn.Linear(64, 10),
        )
    )


if __name__ == "__main__":
    make(Path(__file__).resolve().parent, network, keep_batchnorm=True)
