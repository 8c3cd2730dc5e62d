"""The two networks of the survey's tables, for counting: their weights are never drawn (torch's meta device).

VGG-16 (Simonyan and Zisserman 2015, arXiv 1409.1556, configuration D) in its CIFAR form: pictures of 32 x 32, so five
poolings leave 512 x 1 x 1. ResNet-50 (He et al. 2016, arXiv 1512.03385) for 32 x 32, with either stem. Both with
BatchNorm after convolutions, as published code for CIFAR has it; norms, activations and pooling count no FLOPs.

Each is an `nn.Sequential` of named layers, so that `cuts.py` can cut it. Not for training.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, Literal, final

import torch
from torch import Tensor, nn

from milkglass.errors import RecipeError, nearest

RECORD: Final = (3, 32, 32)
_VGG_16: Final = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_RESNET_50: Final = ((64, 3), (128, 4), (256, 6), (512, 3))
_EXPANSION: Final = 4
Stem = Literal["cifar", "imagenet"]


def vgg16(classes: int = 10, hidden: Sequence[int] = ()) -> nn.Sequential:
    """`conv1` ... `conv13` (a pooling belongs to the layer before it), `classifier`, on the meta device.

    hidden: widths of fully connected layers; () is the usual CIFAR form, (4096, 4096) keeps those of the paper.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    with torch.device("meta"):
        before = RECORD[0]
        for block in _VGG_16:
            for place, width in enumerate(block, start=1):
                parts: list[nn.Module] = [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                if place == len(block):
                    parts.append(nn.MaxPool2d(2))
                layers[f"conv{len(layers) + 1}"] = nn.Sequential(*parts)
                before = width
        dense: list[nn.Module] = [nn.Flatten()]
        for width in hidden:
            dense += [nn.Linear(before, width), nn.ReLU()]
            before = width
        layers["classifier"] = nn.Sequential(*dense, nn.Linear(before, classes))
    return nn.Sequential(layers)


def resnet50(classes: int = 100, stem: Stem = "cifar") -> nn.Sequential:
    """`conv1`, `pool1`, `stage1` ... `stage4`, `classifier`, on the meta device.

    stem: "cifar", a 3 x 3 convolution of stride 1 and no pooling (64 x 32 x 32); or "imagenet", the paper's 7 x 7 of
    stride 2 (64 x 16 x 16), then a pooling (64 x 8 x 8). Raises RecipeError for another one.
    """
    if stem not in ("cifar", "imagenet"):
        raise RecipeError(f"stem {stem!r} is not known; {nearest(stem, ('cifar', 'imagenet'))}")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    with torch.device("meta"):
        first = _conv(RECORD[0], 64, 3) if stem == "cifar" else _conv(RECORD[0], 64, 7, 2)
        layers["conv1"] = nn.Sequential(first, nn.ReLU())
        layers["pool1"] = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, 2, padding=1)
        before = 64
        for number, (width, blocks) in enumerate(_RESNET_50, start=1):
            stage: list[nn.Module] = []
            for place in range(blocks):
                stage.append(_Bottleneck(before, width, stride=2 if number > 1 and place == 0 else 1))
                before = _EXPANSION * width
            layers[f"stage{number}"] = nn.Sequential(*stage)
        layers["classifier"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))
    return nn.Sequential(layers)


def records(count: int = 1) -> Tensor:
    """Pictures (count, 3, 32, 32) without values."""
    return torch.zeros(count, *RECORD, device="meta")


@final
class _Bottleneck(nn.Module):
    """relu(shortcut(x) + f(x)), f 1 x 1, 3 x 3, 1 x 1: (B, C, H, W) -> (B, 4 width, H/stride, W/stride)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = _EXPANSION * width
        self.body = nn.Sequential(
            _conv(before, width, 1), nn.ReLU(), _conv(width, width, 3, stride), nn.ReLU(), _conv(width, after, 1)
        )
        self.shortcut: nn.Module = nn.Identity() if before == after else _conv(before, after, 1, stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x_BCHW) + self.body(x_BCHW))


def _conv(before: int, after: int, size: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after))
