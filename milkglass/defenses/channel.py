"""A narrow noisy channel at the cut: projection to D coordinates, norm clipped to C, Gaussian noise sigma.

Legend: B records in a batch, N records, H values of an activation at the cut, D coordinates sent.

A clipped and noised cut is a Gaussian channel: whatever an attacker does, at most D/2 log2(1 + C^2 / (D sigma^2)) bits
about the record come through one release (Shannon 1949, for an average power of C^2). Trained with the noise in place,
as a variational information bottleneck is (Alemi et al. 2017, arXiv 1612.00410), the network spends these bits on the
task. Where we differ: power is bounded for every record, not on average, so the bound needs no trust in what was
learned; and which coordinates get how much of it is learned in the projection. `certificate.py` says what follows.

The noise is at work in training and in inference. It comes from the client's key through a cipher, and the sum is
rounded to a grid, so that last bits tell nothing (`noise.py`).

The projection is learned: `linear`; `mlp`, with a hidden layer in front; `conv`, for large maps, with a convolution
that halves them, and a pool to 4 x 4. It begins scaled so that norms are about the clip: with a weak signal the first
epochs learn nothing. Baselines: `random` (fixed orthonormal directions, Johnson and Lindenstrauss 1984) and `pca`
(the first principal components of the client's activations before training), each with the same clip and noise.
Do-nothing twin: a sigma of 0 and a clip that nothing reaches leave a plain bottleneck.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final, Literal, cast, final, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.defenses.base import Defense, NoiseSource, check_carried
from milkglass.defenses.clipping import clip_norm
from milkglass.defenses.noise import noisy
from milkglass.errors import RecipeError, nearest

Projection = Literal["linear", "mlp", "conv", "random", "pca"]
PROJECTIONS: Final = get_args(Projection)
HIDDEN: Final = 128
"""Width of the hidden layer of `mlp`."""
COARSE: Final = 4
"""Side of the maps that `conv` ends with, and that a server's end begins with where the cut's are twice as large."""


@final
class Channel(Defense):
    """Sends `width` coordinates of norm at most `clip` plus Gaussian noise of standard deviation `sigma` on each.

    clip: by default sqrt(width), so that a coordinate is about 1 large. sigma: 0 for no noise, and then no certificate.
    `around` puts its two ends around a cut by hand; a recipe does it for you.
    """

    def __init__(
        self, width: int = 8, sigma: float = 0.3, clip: float | None = None, projection: Projection = "mlp"
    ) -> None:
        if width < 1:
            raise RecipeError(f"channel: width is {width}; expected a whole number of 1 or more")
        if clip is not None:
            check_carried("channel: clip", clip)
        if sigma != 0:
            check_carried("channel: sigma", sigma)
        if projection not in PROJECTIONS:
            raise RecipeError(f"channel: projection {projection!r} is not known; {nearest(projection, PROJECTIONS)}")
        self.width = width
        self.sigma = sigma
        self.clip = math.sqrt(width) if clip is None else clip
        self.projection: Projection = projection
        self._end: ClientEnd | None = None

    def __repr__(self) -> str:
        return f"Channel(width={self.width}, sigma={self.sigma}, clip={self.clip}, projection={self.projection!r})"

    def describe(self) -> str:
        projection = "" if self.projection == "mlp" else f", {self.projection} projection"
        return f"channel, width {self.width}, clip {self.clip:g}, sigma {self.sigma:g}{projection}"

    @property
    def random(self) -> bool:
        return self.sigma > 0

    @property
    def noise_sigma(self) -> float:
        return self.sigma

    def client_end(self, cut_shape: tuple[int, ...]) -> nn.Module | None:
        values = math.prod(cut_shape)
        if self.width > values:
            raise RecipeError(
                f"channel: width is {self.width}, and the cut has {values} values a record; expected at most as many"
            )
        self._end = ClientEnd(cut_shape, self.width, self.projection)
        return self._end

    def server_end(self, cut_shape: tuple[int, ...]) -> nn.Module | None:
        scale = math.sqrt(self.clip**2 / self.width + self.sigma**2)
        return ServerEnd(self.width, cut_shape, scale, deep=self.projection == "conv")

    def around(
        self, bottom: nn.Module, top: nn.Module, cut_shape: tuple[int, ...]
    ) -> tuple[nn.Sequential, nn.Sequential]:
        """The two stages of a cut whose activations have `cut_shape` (without the batch), with the channel's ends.

        Then call `prepare(bottom(x))`, with the bottom as it was, for some records: training begins at the clip, and
        `pca` has no directions before.
        """
        ends = cast(nn.Module, self.client_end(cut_shape)), cast(nn.Module, self.server_end(cut_shape))
        return with_end(bottom, ends[0], "channel"), with_start(top, ends[1], "channel")

    def prepare(self, z: Tensor) -> None:
        if self._end is not None:
            self._end.fit(z, self.clip)

    def transform(self, z: Tensor) -> Tensor:
        return clip_norm(z, self.clip)

    def release(self, z: Tensor, noise: NoiseSource) -> Tensor:
        sent = self.transform(z)
        return sent if self.sigma == 0 else noisy(sent, self.sigma, "gaussian", noise, repr(self))


@final
class ClientEnd(nn.Module):
    """Projects activations (B, ...) of `cut_shape`, H values a record, to (B, D), before clip and noise.

    A fixed projection keeps its directions, and learns one gain for all.
    """

    def __init__(self, cut_shape: tuple[int, ...], width: int, projection: Projection) -> None:
        super().__init__()
        self._projection = projection
        self.before, values = _before(cut_shape, projection)
        self.linear: nn.Linear | None = None
        if projection in ("linear", "mlp", "conv"):
            self.linear = nn.Linear(values, width)
            return
        self.directions_DH: Tensor
        self.center_H: Tensor
        directions_HD = torch.zeros(values, width)  # principal components: none before they are fitted
        if projection == "random":
            nn.init.orthogonal_(directions_HD)
        self.register_buffer("directions_DH", directions_HD.T.contiguous())
        self.register_buffer("center_H", torch.zeros(values))
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, z: Tensor) -> Tensor:
        flat_BH = self.before(z)
        if self.linear is not None:
            return cast(Tensor, self.linear(flat_BH))
        return cast(Tensor, self.gain * ((flat_BH - self.center_H) @ self.directions_DH.T))

    @torch.no_grad()
    def fit(self, z: Tensor, clip: float) -> None:
        """Scale to activations (N, ...): the root mean square of their norms becomes the clip.

        A fixed projection is centered on them too. Raises RecipeError for too few of them.
        """
        if self._projection in ("random", "pca"):
            flat_NH: Tensor = self.before(z)
            self.center_H.copy_(flat_NH.mean(0))
            if self._projection == "pca":
                width = len(self.directions_DH)
                if len(z) <= width:
                    raise RecipeError(
                        f"channel: {len(z)} records for {width} principal components; expected more records"
                    )
                _, _, axes_HD = torch.linalg.svd(flat_NH - self.center_H, full_matrices=False)
                self.directions_DH.copy_(axes_HD[:width])
        factor = clip / self.forward(z).square().sum(1).mean().sqrt().clamp_min(1e-12)
        for parameter in [self.gain] if self.linear is None else self.linear.parameters():
            parameter.mul_(factor)


def _before(cut_shape: tuple[int, ...], projection: Projection) -> tuple[nn.Module, int]:
    """What comes before the projection itself, and how many values a record it gives."""
    values = math.prod(cut_shape)
    if projection == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(values, HIDDEN), nn.ReLU()), HIDDEN
    if projection != "conv":
        return nn.Flatten(), values
    if len(cut_shape) != 3 or min(cut_shape[1:]) < 2 * COARSE:
        raise RecipeError(
            f"channel: projection 'conv' is for maps of at least {2 * COARSE} x {2 * COARSE}, and a record's "
            f"activations have shape {cut_shape}; expected 'mlp'"
        )
    before, channels = cut_shape[0], 2 * cut_shape[0]  # twice as many maps of half the size, as in a residual network
    values = channels * COARSE**2
    return (
        nn.Sequential(
            nn.Conv2d(before, channels, 3, stride=2, padding=1, bias=False),
            nn.GroupNorm(math.gcd(channels, 8), channels),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(COARSE),
            nn.Flatten(),
            nn.LayerNorm(values),
        ),
        values,
    )


@final
class ServerEnd(nn.Module):
    """What came through a channel (B, D), rescaled to about unit size, back to activations (B, ...) of `cut_shape`.

    Large maps come of coarse ones, each value repeated. deep: with a hidden layer.
    """

    def __init__(self, width: int, cut_shape: tuple[int, ...], scale: float, *, deep: bool = False) -> None:
        super().__init__()
        is_large = len(cut_shape) == 3 and min(cut_shape[1:]) >= 2 * COARSE
        self._shape = (cut_shape[0], COARSE, COARSE) if is_large else cut_shape
        self._size = cut_shape[1:] if is_large else None
        self._scale = scale
        before = [nn.Linear(width, HIDDEN), nn.ReLU()] if deep else []
        self.expand = nn.Sequential(*before, nn.Linear(HIDDEN if deep else width, math.prod(self._shape)))

    def forward(self, z_BD: Tensor) -> Tensor:
        made = cast(Tensor, self.expand(z_BD / self._scale)).reshape(len(z_BD), *self._shape)
        return made if self._size is None else F.interpolate(made, size=self._size)


def with_end(stage: nn.Module, end: nn.Module, name: str) -> nn.Sequential:
    """The stage, and a layer of that name behind it."""
    return nn.Sequential(OrderedDict([("stage", stage), (name, end)]))


def with_start(stage: nn.Module, start: nn.Module, name: str) -> nn.Sequential:
    """A layer of that name, and the stage behind it."""
    return nn.Sequential(OrderedDict([(name, start), ("stage", stage)]))
