"""What the attacks find on one trial: every one scored on the test records, against the answer alone.

Legend: T test records, of which an attack may have rebuilt only the first t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from milkglass.attacks.base import Attack
from milkglass.attacks.curves import pair_counts, subview
from milkglass.attacks.features import answer_alone
from milkglass.attacks.ridge import Ridge
from milkglass.attacks.suite import (
    Run,
    Runner,
    Skipped,
    best,
    best_of_the_first_rows,
    from_pairs,
    run_suite,
    try_attack,
)
from milkglass.errors import AuditError
from milkglass.leakage.classification import clopper_pearson
from milkglass.leakage.estimate import Estimate
from milkglass.leakage.reconstruction import (
    MATCH_AMONG,
    match_top1,
    mean_interval,
    peek,
    psnr_db,
    squared_errors,
    ssim,
    ssim_each,
)
from milkglass.randomness import Source
from milkglass.transcript import Trial

BROKEN_BELOW: Final = -0.02
"""A peek whose whole interval lies below this comes from broken attacks: the entitled-only decoders are among them."""
ENOUGH_TARGETS: Final = 30
"""With fewer target records their interval is not to be trusted, and there is no verdict."""


@dataclass(frozen=True)
class AttackScore:
    """One attack on one exposure, scored on test records. Higher PSNR, SSIM, peek and matching = more leaks.

    mse: mean squared error, of records as they are. psnr_db: decibels. match_top1: 0..1. seconds: to fit and rebuild.
    records: how many test records it rebuilt. undertrained: learned, and worse than ridge regression on validation
    records.
    """

    name: str
    adversary: str
    knows: tuple[str, ...]
    exposure: str
    mse: float
    psnr_db: float
    ssim: float | None
    peek: Estimate
    match_top1: float
    seconds: float
    records: int
    undertrained: bool

    def to_dict(self) -> dict[str, Any]:
        """As in audit.json: `peek` is a number there, its interval stands in `peek_low` and `peek_high`."""
        interval = {"peek": self.peek.value, "peek_low": self.peek.low, "peek_high": self.peek.high}
        return {**asdict(self), "knows": list(self.knows), **interval}


@dataclass(frozen=True)
class Curve:
    """How an attack does with fewer pairs, by number of known pairs: on test records, mean squared error per value
    (lower = leaks more) and peek (higher = leaks more). A number of pairs at which it failed is left out."""

    attack: str
    exposure: str
    pairs: tuple[int, ...]
    mse: tuple[float, ...]
    peek: tuple[float, ...]


@dataclass(frozen=True)
class Finding:
    """All that was found on one trial."""

    trial: Trial
    entitled: list[Run]
    runs: list[Run]
    skipped: list[Skipped]
    errors_entitled_T: Tensor
    scores: list[AttackScore]
    measures: Mapping[str, Estimate]

    @property
    def exposure(self) -> str:
        """Which exposure it is."""
        return self.trial.view.exposure

    best_attack: str

    @property
    def peek(self) -> Estimate:
        """Of the attack chosen on validation records."""
        return self.measures["peek"]

    @property
    def left_out(self) -> list[str]:
        """The names of the attacks that gave values that are not finite, here or from the answer alone."""
        return list(dict.fromkeys(run.name for run in (*self.runs, *self.entitled) if not run.usable))

    @property
    def is_sound(self) -> bool:
        """Whether a verdict may rest on it."""
        return (
            len(self.trial.truth) >= ENOUGH_TARGETS
            and not self.left_out
            and not any(skip.broke for skip in self.skipped)
            and all(score.peek.is_finite for score in self.scores)
            and not self.peek.high < BROKEN_BELOW
        )

    def notes(self) -> list[str]:
        """What a reader has to know beside the numbers."""
        notes = [
            f"{self.exposure}: {score.name} is undertrained, it lost to ridge regression on validation records"
            for score in self.scores
            if score.undertrained
        ]
        notes += [
            f"{self.exposure}: {skip.attack} broke, so there is no verdict" for skip in self.skipped if skip.broke
        ]
        notes += [
            f"{self.exposure}: {run.name}: {run.reconstruction.note}" for run in self.runs if run.reconstruction.note
        ]
        for name in self.left_out:
            notes.append(f"{self.exposure}: {name} is left out, its reconstruction has values that are not finite")
        if len(self.trial.truth) < ENOUGH_TARGETS:
            notes.append(
                f"{self.exposure}: {len(self.trial.truth)} target records are too few for a verdict; it takes "
                f"{ENOUGH_TARGETS}"
            )
        if not self.peek.is_finite:
            notes.append(f"{self.exposure}: the peek is not a finite number, so it says nothing")
        if self.peek.high < BROKEN_BELOW:
            notes.append(
                f"{self.exposure}: the best attack does clearly worse than the answer alone: attacks are broken"
            )
        if not any(isinstance(run.attack, Ridge) for run in self.runs):
            notes.append(
                f"{self.exposure}: no ridge regression in the suite, so nothing tells whether it is undertrained"
            )
        return notes


def find(trial: Trial, suite: Sequence[Attack], source: Source, runner: Callable[[str], Runner]) -> Finding:
    """Run the suite on the answer alone, then on the trial, and score it. runner: by what the attacks are run on."""
    view, exposure = trial.view, trial.view.exposure
    entitled, broken = run_suite(answer_alone(view), from_pairs(suite), runner(f"{exposure}, from the answer alone"))
    entitled = [run for run in with_finite_errors(entitled, trial) if run.complete]  # a baseline for every record
    once = [attack for attack in suite if exposure == "fresh" or "training" not in attack.knows]  # a training is one
    runs, skipped = run_suite(view, once, runner(exposure), members=entitled)
    skipped = [*(skip for skip in broken if skip.broke), *skipped]
    runs = with_finite_errors(runs, trial)
    errors_entitled_T = squared_errors(best(entitled).reconstruction.target, trial.truth)
    ridge_errors_N = next((run.errors_n for run in runs if isinstance(run.attack, Ridge)), None)
    scores = [
        _score(run, trial, errors_entitled_T, ridge_errors_N, source.generator("bootstrap", exposure))
        for run in runs
        if run.usable
    ]
    first = best_of_the_first_rows(runs, ENOUGH_TARGETS)
    chosen = [best(runs)] if first is None else [best(runs), first]
    draws = source.generator("bootstrap of measures", exposure)
    by_run = {run.name: _measures(run, trial, runs, scores, draws) for run in chosen}
    measures = {name: max((each[name] for each in by_run.values()), key=worse) for name in by_run[best(runs).name]}
    leader = max(by_run, key=lambda name: worse(by_run[name]["peek"]))
    return Finding(trial, entitled, runs, skipped, errors_entitled_T, scores, measures, leader)


def worse(measure: Estimate) -> float:
    """What measures are ordered by: the upper end; what is not a number is worst."""
    return measure.high if measure.is_finite else math.inf


def _score(
    run: Run, trial: Trial, errors_entitled_T: Tensor, ridge_errors_N: Tensor | None, generator: torch.Generator
) -> AttackScore:
    rebuilt = run.reconstruction.target
    count = len(rebuilt)
    truth = trial.truth[:count]
    errors_t = squared_errors(rebuilt, truth)
    mse = errors_t.mean().item()
    lost = ridge_errors_N is not None and run.validation_error > ridge_errors_N[: len(run.errors_n)].mean().item()
    return AttackScore(
        name=run.name,
        adversary=run.attack.adversary,
        knows=run.knows,
        exposure=trial.view.exposure,
        mse=mse,
        psnr_db=psnr_db(mse, _value_range(trial.truth)),
        ssim=ssim(rebuilt, truth),
        peek=peek(errors_t, errors_entitled_T[:count], generator),
        match_top1=match_top1(rebuilt, trial.truth),
        seconds=run.reconstruction.seconds,
        records=count,
        undertrained=run.attack.learned and lost,
    )


def _measures(
    run: Run, trial: Trial, runs: Sequence[Run], scores: Sequence[AttackScore], generator: torch.Generator
) -> dict[str, Estimate]:
    """Peek and PSNR of the attack chosen; match, and for pictures SSIM, of whichever attack does best at that.

    The least squared error shrinks towards the mean, which costs likeness and matching: another attack may be better at
    these. It is chosen on the test records, so the measure errs upwards, if at all.
    """
    score = next(score for score in scores if score.name == run.name)
    mse = mean_interval(squared_errors(run.reconstruction.target, trial.truth[: score.records]), generator)
    span = _value_range(trial.truth)
    enough = [score for score in scores if score.records >= min(ENOUGH_TARGETS, len(trial.truth))]
    matcher = max(enough, key=lambda score: score.match_top1)
    matched = min(matcher.records, MATCH_AMONG)
    measures = {
        "peek": score.peek,
        "match": clopper_pearson(round(matcher.match_top1 * matched), matched),
        "psnr_db": Estimate(*(psnr_db(value, span) for value in (mse.value, mse.high, mse.low))),
    }
    if score.ssim is not None:
        likest = max(enough, key=lambda score: score.ssim or -1.0)
        rebuilt = next(run for run in runs if run.name == likest.name).reconstruction.target
        measures["ssim"] = mean_interval(ssim_each(rebuilt, trial.truth[: len(rebuilt)]), generator)
    return measures


def attack_curve(finding: Finding, attack: Attack, runner: Runner) -> Curve:
    """An attack with 50 known pairs, with more, and with all; the entitled baseline keeps all its pairs."""
    view, truth, error_entitled = finding.trial.view, finding.trial.truth, finding.errors_entitled_T.mean().item()
    points = []
    for pairs in pair_counts(len(view.known)):
        with_all = (
            next((run for run in finding.runs if run.attack is attack), None) if pairs == len(view.known) else None
        )
        run = with_all or try_attack(attack, subview(view, pairs), runner)
        if isinstance(run, Run) and run.usable and run.complete:
            mse = squared_errors(run.reconstruction.target, truth).mean().item()
            points.append((pairs, mse, 1 - mse / error_entitled))
    counts, errors, peeks = zip(*points, strict=True) if points else ((), (), ())
    return Curve(attack.name, finding.exposure, counts, errors, peeks)


def with_finite_errors(runs: Sequence[Run], trial: Trial) -> list[Run]:
    """The runs; one whose values are so large that their squares overflow is not usable any more."""

    def is_finite(run: Run) -> bool:
        target = run.reconstruction.target
        return run.usable and bool(squared_errors(target, trial.truth[: len(target)]).isfinite().all())

    judged = [run if is_finite(run) else replace(run, errors_n=torch.full_like(run.errors_n, math.inf)) for run in runs]
    if not any(run.usable for run in judged):
        raise AuditError(f"{trial.view.exposure} trial: no attack has errors that are finite; expected saner records")
    return judged


def _value_range(records: Tensor) -> float:
    """1 for pictures, the range of all values for flat records."""
    return 1.0 if records.ndim == 4 else (records.max() - records.min()).item() or 1.0
