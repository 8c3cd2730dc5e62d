"""The pieces of work of an audit: counted for a progress bar, and done only if their results are not kept already.

Whatever an attack ends with, the others go on, and what was left out is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

from milkglass.attacks.base import Attack, Method, Reconstruction
from milkglass.attacks.suite import FAILURES, Runner, one_line
from milkglass.errors import MissingKnowledgeError
from milkglass.inference import InferenceScore, Skipped
from milkglass.transcript import MembershipTrial, Trial, View


class Progress(Protocol):
    """Who watches an audit: pieces of work of the whole, and steps of the one at work."""

    def piece(self, done: int, total: int, what: str) -> None:
        """`done` of `total` pieces, of about equal rank but not of equal length, are done; `what` comes now."""

    def step(self, done: int, total: int) -> None:
        """The piece at work has done so many of its steps."""


class Keeps(Protocol):
    """Where results are kept, see kept.py."""

    def reconstruction(self, view: View, attack: Method) -> Reconstruction | None:
        """What the attack gave on this view, if that is kept."""

    def keep_reconstruction(self, view: View, attack: Method, made: Reconstruction) -> None:
        """Keep it."""

    def json(self, view: View | Trial | MembershipTrial, what: str) -> Any:
        """What was found on this view, if that is kept."""

    def keep_json(self, view: View | Trial | MembershipTrial, what: str, content: Any) -> None:
        """Keep it."""


@dataclass(frozen=True)
class Left:
    """An attack that was left out on one exposure, and why."""

    attack: str
    exposure: str
    why: str


@final
class Work:
    """Counts pieces of work for a progress bar, and runs each attack only if its result is not kept already."""

    def __init__(self, progress: Progress | None, kept: Keeps | None, seed: int, total: int) -> None:
        self._progress, self._kept, self._done, self._total = progress, kept, 0, total
        self._seed = seed
        self.left: list[Left] = []
        self.failed: set[str] = set()

    def now(self, what: str) -> None:
        """Say what comes now; it is one piece of work."""
        if self._progress is not None:
            self._progress.piece(min(self._done, self._total), self._total, what)
        self._done += 1

    def tick(self, done: int, total: int) -> None:
        """How far the piece at work has come."""
        if self._progress is not None:
            self._progress.step(done, total)

    def runner(self, on: str) -> Runner:
        """What runs an attack; each is a piece of work."""

        def announced(attack: Attack, view: View) -> Reconstruction:
            self.now(f"{on}: {attack.name}")
            return self.run(attack, view)

        return announced

    def run(self, attack: Attack, view: View) -> Reconstruction:
        """Run an attack, as a part of a piece of work, or bring back what it gave."""
        attack.check(view)
        if self._kept is None:
            return attack.attack(view, self.tick)
        made = self._kept.reconstruction(view, attack)
        if made is None:
            made = attack.attack(view, self.tick)
            self._kept.keep_reconstruction(view, attack, made)
        return made

    def remember(self, what: str, view: View, compute: Callable[[], float]) -> float:
        """The number, computed or brought back; a piece of work."""
        self.now(what.split(" control")[0] + " control")
        if self._kept is None:
            return compute()
        value: object = self._kept.json(view, what)
        if not isinstance(value, float):
            value = compute()
            self._kept.keep_json(view, what, value)
        return value

    def rows(
        self,
        what: str,
        exposure: str,
        trial: Trial | MembershipTrial,
        compute: Callable[[Skipped], Sequence[InferenceScore]],
        measures: Sequence[str],
        settings: object = "",
    ) -> Sequence[InferenceScore]:
        """Scored rows, computed or brought back; what could not be done, and why, is remembered.

        compute: is given whom to tell of an attack that was left out. measures: of which nothing can be said if one
        broke. settings: what else the rows depend on; its `repr` must show all of it.
        """
        key = f"{what}, {settings!r}, seed {self._seed}"
        kept = None if self._kept is None else self._kept.json(trial, key)
        if isinstance(kept, dict):
            self.left += [Left(attack, exposure, why) for attack, why in kept["left"]]
            return [InferenceScore(**{**row, "knows": tuple(row["knows"])}) for row in kept["rows"]]
        left: list[Left] = []
        broke: list[str] = []

        def skipped(attack: str, error: Exception) -> None:
            left.append(Left(attack, exposure, one_line(error)))
            if not isinstance(error, MissingKnowledgeError):
                broke.append(attack)

        made: Sequence[InferenceScore] = []
        try:
            made = compute(skipped)
        except FAILURES as error:
            skipped(what, error)
        self.left += left
        if broke:
            self.failed.update(measures)
        elif self._kept is not None and made:
            content = {"rows": [row.to_dict() for row in made], "left": [(each.attack, each.why) for each in left]}
            self._kept.keep_json(trial, key, content)
        return made

    def close(self) -> None:
        """Say that all is done."""
        if self._progress is not None:
            self._progress.piece(self._total, self._total, "done")
