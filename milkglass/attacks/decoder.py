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
from typing import ClassVar, Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.attacks.base import Attack, Reconstruction, Tick, silent
from milkglass.attacks.features import Features, as_records
from milkglass.attacks.ridge import RidgeFit, best_ridge
from milkglass.errors import AuditError
from milkglass.leakage.reconstruction import squared_errors
from milkglass.randomness import drawing_from, public_source
from milkglass.transcript import View

BATCH: Final = 64
LEARNING_RATE: Final = 3e-3
CHECKS: Final = 20
"""How often, over all steps, the validation error is looked at; the best network seen is kept."""
PATIENCE: Final = 6
"""Training ends when this many checks in a row were no better than the best."""
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

    def __init__(self, steps: int = 500, width: int = 32, seed: int = 0) -> None:
        if steps < 1 or width < 1:
            raise AuditError(f"decoder: steps = {steps}, width = {width}; expected at least 1 of each")
        self._steps, self._width, self._seed = steps, width, seed

    def __repr__(self) -> str:
        return f"Decoder(steps={self._steps}, width={self._width}, seed={self._seed})"

    def attack(self, view: View, tick: Tick = silent) -> Reconstruction:
        """Train on the known pairs, stop by the validation pairs, rebuild the target."""
        start = time.perf_counter()
        inputs, fit = best_ridge(view)
        source = public_source(self._seed).derive("decoder")
        known, validation, target = _rows(view, inputs, fit)
        with drawing_from(source.generator("weights")):
            network = _network(view, side=known[1].shape[1], width=self._width)
        best = _train(network, view, known, validation, self._steps, source.generator("batches"), tick)
        return Reconstruction(
            validation=_rebuild(best, *validation, view),
            target=_rebuild(best, *target, view),
            seconds=time.perf_counter() - start,
        )


Rows = tuple[Tensor, Tensor]
"""Ridge images (N, ...) in the records' shape, and what the correction sees beside them: (N, C, H, W) or (N, F)."""


def _rows(view: View, inputs: Features, fit: RidgeFit) -> list[Rows]:
    shape = view.known.records.shape[1:]
    seen = view.known.activations.shape[1:]
    rows = []
    for image_NP, row_NF in (
        (fit.left_out_NP, inputs.known_NF),
        (fit.validation_NP, inputs.validation_NF),
        (fit.target_TP, inputs.target_TF),
    ):
        side = row_NF.float()
        if len(shape) == 3:
            width = seen.numel() if len(seen) == 3 else 0
            maps = seen if len(seen) == 3 else torch.Size((0, *shape[1:]))
            side = (side[:, :width] * math.sqrt(max(width, 1))).reshape(len(side), *maps)
        else:
            side = side * math.sqrt(side.shape[1])  # from unit norm to about unit spread
        rows.append((image_NP.float().reshape(len(image_NP), *shape), side))
    return rows


def _network(view: View, side: int, width: int) -> nn.Module:
    shape = view.known.records.shape[1:]
    if len(shape) == 3:
        fold = 2 if min(shape[1:]) >= SIDE_TO_FOLD and shape[1] % 2 == 0 and shape[2] % 2 == 0 else 1
        return _PictureCorrection(shape[0], side, width, fold)
    return _FlatCorrection(side, 8 * width, shape)


def _train(
    network: nn.Module,
    view: View,
    known: Rows,
    validation: Rows,
    steps: int,
    generator: torch.Generator,
    tick: Tick,
) -> nn.Module:
    """Adam with a warm-up and a cosine decay; returns the network of the best check, the untrained one included."""
    records = view.known.records.float()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    every = max(1, steps // CHECKS)

    def error() -> float:
        return squared_errors(_rebuild(network, *validation, view), view.validation.records).mean().item()

    best, best_error, worse = copy.deepcopy(network), error(), 0
    for step in range(1, steps + 1):
        rows_B = torch.randint(len(records), (BATCH,), generator=generator)
        loss = F.mse_loss(network(known[0][rows_B], known[1][rows_B]), records[rows_B])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % every and step != steps:
            continue
        tick(step, steps)
        here = error()
        if here < best_error:
            best, best_error, worse = copy.deepcopy(network), here, 0
        else:
            worse += 1
            if worse == PATIENCE:
                break
    return best


@torch.no_grad()
def _rebuild(network: nn.Module, image_N: Tensor, side_N: Tensor, view: View) -> Tensor:
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
