"""A learned decoder on known pairs: the ridge image first, a network that corrects it on top.

Legend: N pairs, F features, P values a record, B batch, C channels, H height, W width of a record.

After He, Zhang and Lee, "Model inversion attacks against collaborative inference" (ACSAC 2019), who train a
deconvolution network from activations to records. Here the network adds to ridge regression's image instead, starting
from zero: it begins where a deconvolution from scratch takes thousands of steps to arrive. It is trained on
leave-one-out ridge images, which are as blurred as those of new records. Activations that are maps (N, C, H, W) come
in as further channels, so that what lies where is used. Flat records get a small perceptron on the features.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import ClassVar, Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.attacks.base import Attack, Reconstruction, Tick, silent
from milkglass.attacks.features import as_records
from milkglass.attacks.ridge import RidgeFit, best_ridge
from milkglass.errors import AuditError
from milkglass.leakage.reconstruction import squared_errors
from milkglass.randomness import drawing_from, public_source
from milkglass.transcript import View

BATCH: Final = 64
LEARNING_RATE: Final = 3e-3
WIDTH: Final = 32
CHECKS: Final = 20
"""How often, over all steps, the validation error is looked at; the best network seen is kept."""
CHECKED: Final = 400
"""On so many validation pairs; whether the best one is better than none at all is then asked of all pairs."""
PATIENCE: Final = 6
"""Training ends when this many checks in a row were no better than the best."""
PAIRS_A_MAP: Final = 4
"""With fewer known pairs for each map, the correction does without the maps."""
SIDE_TO_FOLD: Final = 16
"""Pictures at least this wide and high, and even, are worked on at half size, with four times the channels."""


@final
class Decoder(Attack):
    """Ridge image plus learned correction: convolutions for pictures (C, H, W), a perceptron for flat records.

    steps: at most this many batches of 64 pairs. width: channels, or 8 x hidden units, of the network.
    """

    name: ClassVar[str] = "decoder"
    paper: ClassVar[str] = "He, Zhang and Lee, ACSAC 2019"
    learned: ClassVar[bool] = True

    def __init__(self, steps: int = 500, width: int = WIDTH, seed: int = 0) -> None:
        if steps < 1 or width < 1:
            raise AuditError(f"decoder: steps = {steps}, width = {width}; expected at least 1 of each")
        self._steps, self._width, self._seed = steps, width, seed
        if width != WIDTH:  # a suite may hold several, under different names; vars: the class's own name is not touched
            vars(self)["name"] = f"{Decoder.name} of width {width}"

    def __repr__(self) -> str:
        return f"Decoder(steps={self._steps}, width={self._width}, seed={self._seed})"

    def attack(self, view: View, tick: Tick = silent) -> Reconstruction:
        """Train on the known pairs, stop by the validation pairs, rebuild the target."""
        start = time.perf_counter()
        fit = best_ridge(view)
        source = public_source(self._seed).derive("decoder")
        records = view.known.records.float()
        known, validation, target = decoder_rows(view, fit)

        def draw(generator: torch.Generator) -> Batch:
            rows_B = torch.randint(len(records), (BATCH,), generator=generator)
            return known[0][rows_B], known[1][rows_B], records[rows_B]

        with drawing_from(source.generator("weights")):
            network = correction(view, side=known[1].shape[1], width=self._width)
        best = train_correction(network, view, draw, validation, self._steps, source.generator("batches"), tick)
        return Reconstruction(
            validation=rebuild(best, *validation, view),
            target=rebuild(best, *target, view),
            seconds=time.perf_counter() - start,
        )


Rows = tuple[Tensor, Tensor]
"""Ridge images (N, ...) in the records' shape, and what the correction sees beside them: (N, C, H, W) or (N, F)."""
Batch = tuple[Tensor, Tensor, Tensor]
"""The same of a batch, and the records (B, ...) to be rebuilt."""


def decoder_rows(view: View, fit: RidgeFit) -> list[Rows]:
    """Those of the known, the validation and the target records."""
    shape, inputs = view.known.records.shape[1:], fit.inputs
    images = (fit.left_out_NP, fit.validation_NP, fit.target_TP)
    features = (inputs.known_NF, inputs.validation_NF, inputs.target_TF)
    return [
        (image_NP.float().reshape(len(image_NP), *shape), beside(view, row_NF))
        for image_NP, row_NF in zip(images, features, strict=True)
    ]


def beside(view: View, features_NF: Tensor) -> Tensor:
    """What the correction sees beside the ridge image: for pictures the activations, where these are maps, else none.

    Nor where there are too many maps for so few pairs, as after a training of many epochs: it would learn these by
    heart. For flat records all features. In about unit spread.
    """
    shape, seen = view.known.records.shape[1:], view.known.activations.shape[1:]
    side = features_NF.float()
    if len(shape) == 3:
        are_maps = len(seen) == 3 and seen[0] * PAIRS_A_MAP <= len(view.known)
        width = seen.numel() if are_maps else 0
        maps = seen if are_maps else torch.Size((0, *shape[1:]))
        return (side[:, :width] * math.sqrt(max(width, 1))).reshape(len(side), *maps)
    return side * math.sqrt(side.shape[1])


def correction(view: View, side: int, width: int) -> nn.Module:
    """An untrained network that corrects nothing yet; `side`: channels or features beside the ridge image."""
    shape = view.known.records.shape[1:]
    if len(shape) == 3:
        fold = 2 if min(shape[1:]) >= SIDE_TO_FOLD and shape[1] % 2 == 0 and shape[2] % 2 == 0 else 1
        return _PictureCorrection(shape[0], side, width, fold)
    return _FlatCorrection(side, 8 * width, shape)


def train_correction(
    network: nn.Module,
    view: View,
    draw: Callable[[torch.Generator], Batch],
    validation: Rows,
    steps: int,
    generator: torch.Generator,
    tick: Tick,
    patience: int = PATIENCE,
) -> nn.Module:
    """Adam with a warm-up and a cosine decay; returns the network of the best check, the first one included."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    every = max(1, steps // CHECKS)
    first = copy.deepcopy(network)
    best, best_error, worse = first, correction_error(network, view, validation, CHECKED), 0
    for step in range(1, steps + 1):
        image, side, records = draw(generator)
        loss = F.mse_loss(network(image, side), records)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % every and step != steps:
            continue
        tick(step, steps)
        here = correction_error(network, view, validation, CHECKED)
        if here < best_error:
            best, best_error, worse = copy.deepcopy(network), here, 0
        else:
            worse += 1
            if worse == patience:
                break
    return min((first, best), key=lambda each: correction_error(each, view, validation))


def correction_error(network: nn.Module, view: View, validation: Rows, count: int | None = None) -> float:
    """Mean squared error on the first `count` validation records."""
    made = rebuild(network, validation[0][:count], validation[1][:count], view)
    return squared_errors(made, view.validation.records[:count]).mean().item()


@torch.no_grad()
def rebuild(network: nn.Module, image_N: Tensor, side_N: Tensor, view: View) -> Tensor:
    """Records (N, ...) from their ridge images and what is seen beside them."""
    batches = zip(torch.split(image_N, 8 * BATCH), torch.split(side_N, 8 * BATCH), strict=True)
    return as_records(torch.cat([network(image, side) for image, side in batches]).flatten(1), view)


@final
class _PictureCorrection(nn.Module):
    """(B, C, H, W) ridge image and (B, A, h, w) maps -> the picture; zero correction at the start."""

    def __init__(self, channels: int, maps: int, width: int, fold: int) -> None:
        super().__init__()
        folded = channels * fold * fold
        self.fold = fold
        self.first = nn.Conv2d(folded + maps, width, 3, padding=1)
        self.middle = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.last = nn.Conv2d(width, folded, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        if self.last.bias is not None:
            nn.init.zeros_(self.last.bias)

    def forward(self, image_BCHW: Tensor, maps_BAhw: Tensor) -> Tensor:
        folded = F.pixel_unshuffle(image_BCHW, self.fold)
        if maps_BAhw.shape[1]:
            folded = torch.cat([folded, F.interpolate(maps_BAhw, size=folded.shape[2:])], dim=1)
        hidden = self.first(folded)
        for layer in self.middle:
            hidden = hidden + layer(F.gelu(hidden))
        return image_BCHW + F.pixel_shuffle(self.last(F.gelu(hidden)), self.fold)


@final
class _FlatCorrection(nn.Module):
    """(B, ...) ridge prediction and (B, F) features -> the record; zero correction at the start."""

    def __init__(self, features: int, hidden: int, shape: torch.Size) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(features, hidden), nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, shape.numel())
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, image: Tensor, features_BF: Tensor) -> Tensor:
        hidden = F.gelu(self.second(F.gelu(self.first(features_BF))))
        correction: Tensor = self.last(hidden)
        return image + correction.reshape(image.shape)
