"""The attack that does nothing: every record is guessed to be the mean of the known ones."""

from __future__ import annotations

import time
from typing import ClassVar, final

from milkglass.attacks.base import Attack, Reconstruction, Tick, silent
from milkglass.transcript import Known, View


@final
class MeanRecord(Attack):
    """Guess the mean of the known records, whatever was sent: what anyone can do who knows such records."""

    name: ClassVar[str] = "mean record"
    knows: ClassVar[tuple[Known, ...]] = ("records",)
    paper: ClassVar[str] = "none: the baseline of every other"
    open_door: ClassVar[float] = float("-inf")  # it looks at nothing

    def __repr__(self) -> str:
        return "MeanRecord()"

    def attack(self, view: View, tick: Tick = silent) -> Reconstruction:  # noqa: ARG002
        """The mean record for every validation and target row."""
        start = time.perf_counter()
        mean = view.known.records.mean(0)
        validation = mean.expand(len(view.validation), *mean.shape).clone()
        target = mean.expand(len(view.target), *mean.shape).clone()
        return Reconstruction(validation, target, time.perf_counter() - start)
