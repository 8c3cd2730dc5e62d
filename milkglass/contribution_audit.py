"""What contributions to an open collaboration show of their records: a network and test records in, a verdict out.

Contributions of a few sizes are made of test records, at the first weights, which all know from the seed, and at the
last ones; each is attacked (`contributions.py`) and scored against the mean record. Pure: it talks to nobody.

Legend: T records of all contributions of one size, in the order of the test records; B of one contribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

import torch
from torch import Tensor

from milkglass.attacks.gradients import GradientInversion
from milkglass.attacks.suite import FAILURES, Strength, one_line
from milkglass.audit_work import Progress
from milkglass.contribution_controls import controls_of
from milkglass.contributions import Rebuilt, Subject, assigned, contribution, rebuild, trusted
from milkglass.controls import ControlResult
from milkglass.errors import AuditError
from milkglass.findings import BROKEN_BELOW
from milkglass.leakage.classification import clopper_pearson
from milkglass.leakage.estimate import Estimate
from milkglass.leakage.reconstruction import (
    match_top1,
    mean_interval,
    peek,
    psnr_db,
    squared_errors,
    ssim,
    ssim_each,
)
from milkglass.randomness import Source, public_source
from milkglass.verdict import Verdict, check_budget, judge

START: Final = "at the start"
END: Final = "at the end"
SHOWN: Final = 0.5
"""A record is shown if at most this share of the mean record's error is left."""
ENOUGH: Final = 8
"""With fewer records of a size there is no verdict."""
PICTURES: Final = 12
_RATE: Final = 0.3  # more than the attack's own: it has fewer steps


@final
@dataclass(frozen=True)
class Effort:
    """How hard is tried. sizes: records of a contribution. records: at least so many of each size, if there are.
    steps, starts: of the descent. most_own: the largest size that is attacked because the run's own are so large."""

    sizes: tuple[int, ...]
    records: int
    steps: int
    starts: int
    most_own: int

    @property
    def largest(self) -> int:
        """The largest contribution that is attacked at all."""
        return max(*self.sizes, self.most_own)


EFFORTS: Final[Mapping[Strength, Effort]] = {
    "quick": Effort((1, 8), 10, 300, 1, 0),
    "default": Effort((1, 2, 4, 8), 24, 600, 1, 16),
    "thorough": Effort((1, 2, 4, 8), 32, 2000, 2, 64),
}


@final
@dataclass(frozen=True)
class ContributionScore:
    """Contributions of one size at one moment. Higher PSNR, SSIM, peek, match, shown, labels_restored = more leaks.

    peek: over the mean record; its interval is over records, though those of one contribution stand or fall together.
    shown: share of records of which at most half of the mean record's error is left. others_peek, others_shown: the
    same of what was rebuilt, against records of another contribution: what luck and the assignment give.
    labels_restored: as in `Rebuilt`. trust: how far from the mean record towards what the descent found the attacker
    went, 0 to 1; 1 where it has no records to try itself out on. seconds: of all its attacks.
    """

    contribution_records: int
    moment: str
    records: int
    mse: float
    mean_record_mse: float
    psnr_db: float
    ssim: float | None
    peek: Estimate
    others_peek: float
    shown: float
    others_shown: float
    labels_restored: float | None
    match_top1: float
    seconds: float
    measures: Mapping[str, Estimate]
    trust: float = 1.0

    @property
    def exposure(self) -> str:
        """What was exposed, in words."""
        return exposure(self.contribution_records, self.moment)

    def to_dict(self) -> dict[str, Any]:
        """As in audit.json: `peek` is a number there, its interval stands in `peek_low` and `peek_high`."""
        names = (
            *("contribution_records", "moment", "exposure", "records", "mse", "mean_record_mse", "psnr_db", "ssim"),
            *("others_peek", "shown", "others_shown", "labels_restored", "match_top1", "trust", "seconds"),
        )
        return {
            "name": GradientInversion.name,
            "adversary": GradientInversion.adversary,
            "knows": ["gradients", "weights"],
            **{name: getattr(self, name) for name in names},
            "peek": self.peek.value,
            "peek_low": self.peek.low,
            "peek_high": self.peek.high,
        }


@final
@dataclass(frozen=True, eq=False)
class ContributionAudit:
    """What was found. measures: the highest value and the highest ends over all sizes and moments. pictures: of the
    exposure with the highest peek."""

    scores: tuple[ContributionScore, ...]
    measures: Mapping[str, Estimate]
    controls: Mapping[str, ControlResult]
    verdict: Verdict
    budget: Mapping[str, float] | None
    strength: Strength
    notes: tuple[str, ...]
    pictures: Mapping[str, Tensor]

    @property
    def peek(self) -> Estimate:
        """The highest: 1 = the raw record, 0 = the mean record."""
        return self.measures["peek"]

    def to_dict(self) -> dict[str, Any]:
        """What audit.json holds; the pictures are not in it."""
        worst = _worst(self.scores)
        return {
            "peek": self.peek.to_dict(),
            "measures": {name: value.to_dict() for name, value in self.measures.items()},
            "exposures": {score.exposure: score.peek.to_dict() for score in self.scores},
            "verdict": self.verdict,
            "budget": None if self.budget is None else dict(self.budget),
            "strength": self.strength,
            "best_attack": GradientInversion.name,
            "pictures_of": worst.exposure,
            "error_entitled": worst.mean_record_mse,
            "controls": {name: result.to_dict() for name, result in self.controls.items()},
            "certificate": None,
            "contributions": sorted({score.contribution_records for score in self.scores}),
            "attacks": [score.to_dict() for score in self.scores],
            "notes": list(self.notes),
        }


def exposure(size: int, moment: str) -> str:
    """Contributions of that size at that moment, in words."""
    return f"contributions of {size} record{'' if size == 1 else 's'} {moment}"


def audit_contributions(
    subject: Subject,
    strength: Strength = "default",
    *,
    own_size: int | None = None,
    sizes: Sequence[int] = (),
    moments: Sequence[str] = (START, END),
    budget: Mapping[str, float] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    notes: Sequence[str] = (),
) -> ContributionAudit:
    """Attack contributions of each size at both moments, and judge the worst against the budget.

    own_size: records of the run's own contributions, attacked as well up to a size. sizes: these alone, whatever the
    strength says. moments: at which weights. notes: what else a reader has to know. Raises AuditError for a budget on
    what is not measured, and where the attack breaks.
    """
    if budget is not None:
        check_budget(budget, subject.measures)
    effort = EFFORTS[strength]
    attack = GradientInversion(effort.steps, effort.starts, rate=_RATE, seed=seed)
    source = public_source(seed).derive("audit of contributions")
    tried = set(sizes) or {*effort.sizes, min(own_size or 0, effort.most_own)} - {0}
    work = [(moment, size) for moment in moments for size in sorted(tried) if 2 * size <= len(subject.x)]
    watch = _Watch(progress, len(work) + 1)
    scores: list[ContributionScore] = []
    rebuilt: dict[str, Tensor] = {}
    try:
        for moment, size in work:
            watch.now(what := exposure(size, moment))
            parts, trust = _attack(subject, moment, size, effort, attack, source, watch)
            rebuilt[what] = torch.cat([part.records for part in parts])
            scores.append(_score(subject, moment, size, parts, trust, source))
        watch.now(what := "controls")
        controls = controls_of(subject, GradientInversion(effort.steps, effort.starts, rate=_RATE))
    except FAILURES as error:
        raise AuditError(f"{attack.name} broke, {what}: {one_line(error)}") from None
    watch.now("done")
    measures = {name: _highest([score.measures[name] for score in scores]) for name in subject.measures}
    return ContributionAudit(
        scores=tuple(scores),
        measures=measures,
        controls=controls,
        verdict=judge(measures, budget, sound=_is_sound(scores, controls)),
        budget=budget,
        strength=strength,
        notes=(*notes, *_notes(scores, controls)),
        pictures=_pictures(subject, rebuilt[_worst(scores).exposure][:PICTURES]),
    )


@final
class _Watch:
    """Tells a progress bar how far the audit is."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def now(self, what: str) -> None:
        """A piece of work comes."""
        if self._progress is not None:
            self._progress.piece(self._done, self._total, what)
        self._done += 1

    def step(self, done: int, total: int) -> None:
        """The piece at work has come so far."""
        if self._progress is not None:
            self._progress.step(done, total)


def _attack(
    subject: Subject,
    moment: str,
    size: int,
    effort: Effort,
    attack: GradientInversion,
    source: Source,
    watch: _Watch,
) -> tuple[list[Rebuilt], float]:
    """Contributions of one size, of the first test records, attacked one by one; and how far the attacker trusts it."""
    draws = source.derive("dropout", moment, size)
    trust, own_x, own_y = 1.0, subject.own_x, subject.own_y
    if own_x is not None and own_y is not None and len(own_x) >= size:
        tried = replace(subject, x=own_x, y=own_y)
        parts = _rebuilt(tried, moment, size, effort, attack, draws.derive("own"), watch)
        found = torch.cat([part.records for part in parts])
        trust = trusted(found, own_x[: len(found)], subject.mean)
    parts = _rebuilt(subject, moment, size, effort, attack, draws, watch)
    if trust < 1:
        parts = [replace(part, records=torch.lerp(subject.mean, part.records, trust)) for part in parts]
    return parts, trust


def _rebuilt(
    subject: Subject,
    moment: str,
    size: int,
    effort: Effort,
    attack: GradientInversion,
    draws: Source,
    watch: _Watch,
) -> list[Rebuilt]:
    network = subject.first if moment == START else subject.last
    count = max(1, min(-(-effort.records // size), len(subject.x) // size))
    parts = []
    for number in range(count):
        x_B, y_B = (each[number * size : (number + 1) * size] for each in (subject.x, subject.y))
        view = contribution(
            network,
            x_B,
            y_B,
            draws.generator(number),
            shared=subject.shared,
            density=subject.density,
            value_range=subject.value_range,
        )
        parts.append(rebuild(view, attack, x_B, y_B, sparse=subject.density is not None))
        watch.step(number + 1, count)
    return parts


def _score(
    subject: Subject, moment: str, size: int, parts: Sequence[Rebuilt], trust: float, source: Source
) -> ContributionScore:
    rebuilt = torch.cat([part.records for part in parts])
    truth = subject.x[: len(rebuilt)]
    errors_T, mean_T = squared_errors(rebuilt, truth), subject.mean_errors(truth)
    others = subject.x.roll(-size, 0)[: len(rebuilt)]  # of the next contribution, or the first one
    again = [assigned(part.records, other) for part, other in zip(parts, torch.split(others, size), strict=True)]
    others_T, others_mean_T = squared_errors(torch.cat(again), others), subject.mean_errors(others)
    draws = source.generator("bootstrap", moment, size)
    spread = 1.0 if subject.is_pictures else (subject.x.max() - subject.x.min()).item() or 1.0
    labels = [part.labels_restored for part in parts if part.labels_restored is not None]
    match, found = match_top1(rebuilt, subject.x), peek(errors_T, mean_T, draws)
    mse = mean_interval(errors_T, draws)
    measures = {
        "peek": found,
        "match": clopper_pearson(round(match * len(rebuilt)), len(rebuilt)),
        "psnr_db": Estimate(*(psnr_db(value, spread) for value in (mse.value, mse.high, mse.low))),
    }
    if "ssim" in subject.measures:
        measures["ssim"] = mean_interval(ssim_each(rebuilt, truth), draws)
    return ContributionScore(
        contribution_records=size,
        moment=moment,
        records=len(rebuilt),
        mse=mse.value,
        mean_record_mse=mean_T.mean().item(),
        psnr_db=measures["psnr_db"].value,
        ssim=ssim(rebuilt, truth),
        peek=found,
        others_peek=1 - (others_T.mean() / others_mean_T.mean()).item(),
        shown=_shown(errors_T, mean_T),
        others_shown=_shown(others_T, others_mean_T),
        labels_restored=sum(labels) / len(labels) if labels else None,
        match_top1=match,
        seconds=sum(part.seconds for part in parts),
        measures=measures,
        trust=trust,
    )


def _shown(errors_T: Tensor, mean_T: Tensor) -> float:
    return (errors_T <= SHOWN * mean_T).double().mean().item()


def _worst(scores: Sequence[ContributionScore]) -> ContributionScore:
    return max(scores, key=lambda score: score.peek.value)


def _highest(found: Sequence[Estimate]) -> Estimate:
    """Of sizes and moments with few records each, the one with the widest interval need not be the worst."""
    return Estimate(*(max(getattr(each, name) for each in found) for name in ("value", "low", "high")))


def _is_sound(scores: Sequence[ContributionScore], controls: Mapping[str, ControlResult]) -> bool:
    """Whether a verdict may rest on it."""
    enough = all(score.records >= ENOUGH and score.peek.is_finite for score in scores)
    return enough and all(result.passed for result in controls.values()) and not _is_broken(scores)


def _is_broken(scores: Sequence[ContributionScore]) -> bool:
    return max(score.peek.high for score in scores) < BROKEN_BELOW


def _pictures(subject: Subject, rebuilt: Tensor) -> dict[str, Tensor]:
    mean = subject.mean.expand_as(rebuilt)
    return {"records": subject.x[: len(rebuilt)], "entitled": mean, GradientInversion.name: rebuilt}


def _notes(scores: Sequence[ContributionScore], controls: Mapping[str, ControlResult]) -> list[str]:
    notes = []
    if any(score.labels_restored is None for score in scores):
        notes.append("labels could not be read from the network's last layer, and were given to the attacker")
    if (few := min(score.records for score in scores)) < ENOUGH:
        notes.append(f"{few} test records of a size are too few for a verdict; it takes {ENOUGH}")
    for name, result in controls.items():
        if not result.passed:
            notes.append(f"control {name} failed: {result.value:.3f}, limit {result.limit:g}")
    if _is_broken(scores):
        notes.append("the attack does clearly worse than the mean record at every size: it is broken here")
    return notes
