"""The networks of a feature-space hijacker (fsha.py): decoder, classifier and critic for activations of any shape.

Legend: B batch, A channels, h, w height and width of activation maps, C, H, W of a picture, G values of an attribute.

Their layers are ours: the paper's are deeper, for ten thousand batches on a GPU.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Final, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PLACE_MAPS: Final = 4


def decoder(sent: torch.Size, mean: Tensor, width: int) -> nn.Module:
    """(B, *sent) activations -> records (B, ...), starting from the mean record."""
    if len(sent) == 3 and mean.ndim == 3:
        return _PictureDecoder(sent, mean, width)
    return _FlatDecoder(sent, mean, 8 * width)


def classifier(sent: torch.Size, values: int, width: int) -> nn.Module:
    """(B, *sent) activations -> logits (B, G)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(sent.numel(), 8 * width), nn.GELU(), nn.Linear(8 * width, values))


def critic_of(sent: torch.Size, width: int) -> nn.Module:
    """(B, *sent) activations -> opinions; the first is on the whole, (B, 1)."""
    return _MapCritic(sent, width) if len(sent) == 3 else _FlatCritic(sent, 8 * width)


@final
class _PictureDecoder(nn.Module):
    """(B, A, h, w) activations -> (B, C, H, W): all the work is done at the maps' size."""

    def __init__(self, sent: torch.Size, mean: Tensor, width: int) -> None:
        super().__init__()
        channels, height, side = mean.shape
        self.fold = max(math.ceil(height / sent[1]), math.ceil(side / sent[2]))
        self.first = nn.Conv2d(sent[0], width, 3, padding=1)
        self.middle = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.last = nn.Conv2d(width, channels * self.fold**2, 3, padding=1)
        self.mean = nn.Buffer(mean)

    def forward(self, z_BAhw: Tensor) -> Tensor:
        h = self.first(z_BAhw)
        for layer in self.middle:
            h = h + layer(F.gelu(h))
        added = F.pixel_shuffle(self.last(F.gelu(h)), self.fold)
        size = self.mean.shape[1:]
        return self.mean + (added if added.shape[2:] == size else F.interpolate(added, size=size))


@final
class _FlatDecoder(nn.Module):
    """(B, ...) activations -> (B, ...) records."""

    def __init__(self, sent: torch.Size, mean: Tensor, hidden: int) -> None:
        super().__init__()
        widths = sent.numel(), hidden, hidden
        layers = [nn.Sequential(nn.Linear(*pair), nn.GELU()) for pair in pairwise(widths)]
        last = nn.Linear(hidden, mean.numel()), nn.Unflatten(1, tuple(mean.shape))
        self.layers = nn.Sequential(nn.Flatten(), *layers, *last)
        self.mean = nn.Buffer(mean)

    def forward(self, z_B: Tensor) -> Tensor:
        return cast(Tensor, self.mean + self.layers(z_B))


@final
class _MapCritic(nn.Module):
    """(B, A, h, w) -> opinions on the whole (B, 1) and on each place (B, places). It knows which place it looks at."""

    def __init__(self, sent: torch.Size, width: int) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(1, PLACE_MAPS, *sent[1:]) / 2)
        self.first = nn.Conv2d(sent[0] + PLACE_MAPS, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.third = nn.Conv2d(width, width, 3, padding=1)
        self.each = nn.Conv2d(width, 1, 1)
        places = math.ceil(sent[1] / 2) * math.ceil(sent[2] / 2)
        self.whole = nn.Sequential(
            nn.Flatten(), nn.Linear(width * places, 2 * width), nn.LeakyReLU(0.2), nn.Linear(2 * width, 1)
        )

    def forward(self, z_BAhw: Tensor) -> list[Tensor]:
        placed = torch.cat([z_BAhw, self.place.expand(len(z_BAhw), -1, -1, -1)], dim=1)
        h = F.leaky_relu(self.second(F.leaky_relu(self.first(placed), 0.2)), 0.2)
        h = F.leaky_relu(h + self.third(h), 0.2)
        return [self.whole(h), self.each(h).flatten(1)]


@final
class _FlatCritic(nn.Module):
    """(B, ...) -> one opinion (B, 1)."""

    def __init__(self, sent: torch.Size, hidden: int) -> None:
        super().__init__()
        widths = sent.numel(), hidden, hidden
        layers = [nn.Sequential(nn.Linear(*pair), nn.LeakyReLU(0.2)) for pair in pairwise(widths)]
        self.layers = nn.Sequential(nn.Flatten(), *layers, nn.Linear(hidden, 1))

    def forward(self, z_B: Tensor) -> list[Tensor]:
        return [self.layers(z_B)]
