"""A decoder that knows the defense: it may have its own records released as often as it likes, and trains on that.

Legend: N pairs, B batch, R releases of one record, F features, D activation values a record, P values a record, C H W
picture.

After He, Zhang and Lee (ACSAC 2019), whose attacker may query the client; that an attack has to know the defense
comes from Athalye, Carlini and Wagner, "Obfuscated gradients give a false sense of security" (ICML 2018). As in
`decoder.py`, a network corrects the ridge image. What differs: no batch is seen twice. Each is a fresh release of its
records, so that noise is averaged out and not learned by heart, and half of its pictures may be moved about first: new
pairs at no cost, even where nothing is random. So training never stops early. Where the view shows each record several
times, a batch does too: their mean is what a fit sees, their spread is shown beside it.

The ridge image of a known record is always by the fit without that record, so it is as blurred as that of a new one.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import ClassVar, Final, Literal, final

import torch
from torch import Tensor, nn

from milkglass.attacks.base import Attack, Reconstruction, Tick, silent
from milkglass.attacks.decoder import (
    BATCH,
    WIDTH,
    Batch,
    Rows,
    beside,
    correction,
    correction_error,
    decoder_rows,
    rebuild,
    train_correction,
)
from milkglass.attacks.ridge import RidgeFit, best_ridge
from milkglass.errors import AuditError
from milkglass.randomness import Source, drawing_from, public_source
from milkglass.transcript import Known, Pairs, Release, View

Moves = Literal["none", "shifts", "shifts and flips"]
MOVES: Final[tuple[Moves, ...]] = ("none", "shifts", "shifts and flips")
TRIAL_SHARE: Final = 5
"""Each way of moving pictures is tried for one in so many of the steps; the rest follows from the best of them."""
SIDE_TO_SHIFT_BY_TWO: Final = 16
"""Pictures are shifted by up to two pixels if they are at least this wide and high, else by one."""


@final
class DefenseAware(Attack):
    """Ridge image plus a correction learned on fresh releases of the attacker's own records, moved about.

    steps: at most this many batches of 64 records, trials of ways to move pictures not counted. width: channels, or 8 x
    hidden units, of the network.
    """

    name: ClassVar[str] = "defense-aware decoder"
    knows: ClassVar[tuple[Known, ...]] = ("pairs", "fresh releases")
    paper: ClassVar[str] = "He, Zhang and Lee, ACSAC 2019; Athalye, Carlini and Wagner, ICML 2018"
    learned: ClassVar[bool] = True

    def __init__(self, steps: int = 500, width: int = WIDTH, seed: int = 0) -> None:
        if steps < 1 or width < 1:
            raise AuditError(f"defense-aware decoder: steps = {steps}, width = {width}; expected at least 1 of each")
        self._steps, self._width, self._seed = steps, width, seed
        if width != WIDTH:  # a suite may hold several, under different names; vars: the class's own name is not touched
            vars(self)["name"] = f"{DefenseAware.name} of width {width}"

    def __repr__(self) -> str:
        return f"DefenseAware(steps={self._steps}, width={self._width}, seed={self._seed})"

    def attack(self, view: View, tick: Tick = silent) -> Reconstruction:
        """Train on fresh releases, stop by the validation pairs, rebuild the target."""
        self.check(view)
        start = time.perf_counter()
        releases = _Releases(view, best_ridge(view))
        _, validation, target = releases.rows()
        best = self._train(view, releases, validation, public_source(self._seed).derive("defense-aware"), tick)
        return Reconstruction(
            validation=rebuild(best, *validation, view),
            target=rebuild(best, *target, view),
            seconds=time.perf_counter() - start,
        )

    def _train(self, view: View, releases: _Releases, validation: Rows, source: Source, tick: Tick) -> nn.Module:
        """A short trial of each way to move pictures, from the same weights; then on from the best of them."""
        with drawing_from(source.generator("weights")):
            untrained = correction(view, side=validation[1].shape[1], width=self._width)
        candidates = MOVES if view.known.records.ndim == 4 else MOVES[:1]
        trial = max(1, self._steps // TRIAL_SHARE)
        total = trial * len(candidates) + self._steps

        def run(network: nn.Module, moves: Moves, steps: int, done: int) -> nn.Module:
            def follow(step: int, _: int) -> None:
                tick(done + step, total)

            generator = source.generator("batches", moves, steps)
            draw = releases.draw(moves)
            return train_correction(network, view, draw, validation, steps, generator, follow, patience=steps)

        tried = [
            (run(copy.deepcopy(untrained), moves, trial, trial * index), moves)
            for index, moves in enumerate(candidates)
        ]
        best, moves = min(tried, key=lambda each: correction_error(each[0], view, validation))
        return run(best, moves, self._steps, total - self._steps)


@final
class _Releases:
    """What the attacker has released: its own records, as they are or moved about, as often as the view shows each."""

    def __init__(self, view: View, fit: RidgeFit) -> None:
        self._view, self._fit = view, fit
        repeats = (view.known.repeats, view.validation.repeats, view.target.repeats)
        self._times = 1 if view.known.repeats is None else len(view.known.repeats)
        self._spread = all(each is not None and len(each) > 1 for each in repeats)

    def rows(self) -> list[Rows]:
        """Ridge images of the known, validation and target records, and what is seen beside them."""
        plain = decoder_rows(self._view, self._fit)
        parts: tuple[Pairs | Release, ...] = (self._view.known, self._view.validation, self._view.target)
        return [
            (image, self._with_spread(side, part.repeats)) for (image, side), part in zip(plain, parts, strict=True)
        ]

    def draw(self, moves: Moves) -> Callable[[torch.Generator], Batch]:
        """What draws a batch: records, half of them moved about, released anew."""
        view, fit = self._view, self._fit
        release = view.release
        if release is None:
            raise AuditError("defense-aware decoder: the view cannot release records")

        def batch(generator: torch.Generator) -> Batch:
            rows_B = torch.randint(len(view.known), (BATCH,), generator=generator)
            records = view.known.records[rows_B]
            if moves != "none":
                half = BATCH // 2
                moved = shifted(records[:half], generator, flips=moves == "shifts and flips")
                records = torch.cat([moved, records[half:]])
            sent = release(torch.cat([records] * self._times))
            repeats = sent.reshape(self._times, BATCH, *sent.shape[1:])
            seen_BF = fit.inputs.scaling.rows(repeats.mean(0), view.known.entitled[rows_B])
            image = fit.left_out_again(rows_B, seen_BF).float().reshape(records.shape)
            return image, self._with_spread(beside(view, seen_BF), repeats), records.float()

        return batch

    def _with_spread(self, side: Tensor, repeats: Tensor | None) -> Tensor:
        """`side` with the spread of each activation over the releases (R, B, ...) as further maps, or features."""
        if not self._spread or repeats is None or not (side.ndim == 2 or side.shape[1]):
            return side
        spread_BD = repeats.std(dim=0).flatten(1)
        width = spread_BD.shape[1]
        scaled_BD = spread_BD / self._fit.inputs.scaling.scale_F[:width]
        spread = (scaled_BD * self._fit.inputs.known_NF.shape[1] ** 0.5).float()
        return torch.cat([side, spread.reshape(len(side), -1, *side.shape[2:])], dim=1)


def shifted(x_BCHW: Tensor, generator: torch.Generator, flips: bool) -> Tensor:
    """Each picture shifted by a few pixels at random, edges repeated; half of them flipped left to right, if asked."""
    count, _, height, width = x_BCHW.shape
    device = x_BCHW.device
    most = 2 if min(height, width) >= SIDE_TO_SHIFT_BY_TWO else 1

    def places(size: int) -> Tensor:
        by_B = torch.randint(-most, most + 1, (count, 1), generator=generator, device=device)
        return (torch.arange(size, device=device) + by_B).clamp_(0, size - 1)

    rows_BH, columns_BW = places(height), places(width)
    if flips:
        turned_B = torch.rand(count, generator=generator, device=device) < 0.5
        columns_BW = torch.where(turned_B[:, None], columns_BW.flip(1), columns_BW)
    moved_BHWC = x_BCHW.permute(0, 2, 3, 1)[
        torch.arange(count, device=device)[:, None, None], rows_BH[:, :, None], columns_BW[:, None]
    ]
    return moved_BHWC.permute(0, 3, 1, 2).contiguous()
