"""Trials in, Audit out: every attack on every exposure, the entitled baseline, the controls, and a verdict.

Legend: T test records.

Pure: it runs attacks on views and talks to nobody. An attack is handed the view; `truth` stays here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final, Literal, final

import torch
from torch import Tensor

from milkglass import controls
from milkglass.attacks.base import Attack
from milkglass.attacks.features import answer_alone
from milkglass.attacks.ridge import Ridge
from milkglass.attacks.stack import Stack
from milkglass.attacks.suite import Run, best, default_attacks, run_suite, until
from milkglass.controls import ControlResult
from milkglass.errors import AuditError
from milkglass.leakage.reconstruction import Peek, match_top1, peek, psnr_db, squared_errors, ssim
from milkglass.randomness import Source, public_source
from milkglass.transcript import Trial, check_view

Verdict = Literal["within budget", "over budget", "inconclusive", "no budget set"]
Progress = Callable[[int, int, str], None]
"""(done, total, what comes now): pieces of work, of about equal rank but not of equal length."""

BROKEN_BELOW: Final = -0.02
"""A peek whose whole interval lies below this comes from broken attacks: the entitled-only decoders are among them."""
MINIMUM_TARGETS: Final = 8
"""With fewer target records nothing is said."""
ENOUGH_TARGETS: Final = 30
"""With fewer target records their interval is not to be trusted, and there is no verdict."""
PICTURES: Final = 12


@dataclass(frozen=True)
class AttackScore:
    """One attack on one exposure, scored on test records. Higher PSNR, SSIM, peek and matching = more leaks.

    mse: mean squared error, of records as they are. psnr_db: decibels. match_top1: 0..1. seconds: to fit and rebuild.
    undertrained: learned, and worse than ridge regression on validation records.
    """

    name: str
    adversary: str
    knows: tuple[str, ...]
    exposure: str
    mse: float
    psnr_db: float
    ssim: float | None
    peek: Peek
    match_top1: float
    seconds: float
    undertrained: bool

    def to_dict(self) -> dict[str, Any]:
        """As in audit.json: `peek` is a number there, its interval stands in `peek_low` and `peek_high`."""
        interval = {"peek": self.peek.value, "peek_low": self.peek.low, "peek_high": self.peek.high}
        return {**asdict(self), "knows": list(self.knows), **interval}


@final
@dataclass(frozen=True)
class Audit:
    """What an attacker rebuilt. `peek`, `error_entitled`, `best_attack`, `pictures`: of the worst exposure.

    pictures: the first records of the target, "records", as rebuilt from the "entitled" values alone, and by attack.
    """

    peek: Peek
    exposures: Mapping[str, Peek]
    verdict: Verdict
    budget: float | None
    best_attack: str
    error_entitled: float
    controls: Mapping[str, ControlResult]
    certificate: Mapping[str, Any] | None
    attacks: tuple[AttackScore, ...]
    notes: tuple[str, ...]
    pictures: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """What audit.json holds; the pictures are not in it."""
        return {
            "peek": self.peek.to_dict(),
            "exposures": {name: value.to_dict() for name, value in self.exposures.items()},
            "verdict": self.verdict,
            "budget": self.budget,
            "best_attack": self.best_attack,
            "error_entitled": self.error_entitled,
            "controls": {name: result.to_dict() for name, result in self.controls.items()},
            "certificate": dict(self.certificate) if self.certificate is not None else None,
            "attacks": [score.to_dict() for score in self.attacks],
            "notes": list(self.notes),
        }


def parse_budget(text: str) -> float:
    """The number in "peek<=0.3": the most peek that is allowed."""
    match = re.fullmatch(r"\s*peek\s*<=\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*", text)
    if match is None:
        raise AuditError(f"budget {text!r} is not understood; expected 'peek<=NUMBER', such as 'peek<=0.3'")
    limit = float(match[1])
    if not 0.0 <= limit <= 1.0:
        raise AuditError(f"budget {text!r}: {limit:g} is out of range; a peek is allowed from 0 to 1")
    return limit


def audit(
    trials: Sequence[Trial],
    *,
    attacks: Sequence[Attack] | None = None,
    budget: float | None = None,
    seed: int = 0,
    certificate: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Attack the trials, one per exposure, and judge the worst of them against the budget.

    The best attack is chosen on validation records and scored on test records. Raises AuditError for a trial that no
    attack can be judged on. See design.md, "What is measured", for the words.
    """
    suite = tuple(attacks) if attacks is not None else default_attacks(seed)
    _check(trials, suite)
    ticker = _Ticker(progress, total=len(trials) * (3 * len(suite) + 3) + 1)
    source = public_source(seed).derive("audit")
    findings = [_find(trial, suite, source, ticker) for trial in trials]
    results = _worst_controls([_run_controls(finding, suite, source, ticker) for finding in findings])
    results["gaussian"] = _gaussian(suite, source, ticker)
    ticker.close()

    worst = max(findings, key=lambda finding: finding.peek.high if _is_finite(finding.peek) else math.inf)
    shown = {run.name: run.reconstruction.target[:PICTURES] for run in worst.runs if run.usable}
    return Audit(
        peek=worst.peek,
        exposures=MappingProxyType({finding.trial.view.exposure: finding.peek for finding in findings}),
        verdict=_verdict(findings, results, budget),
        budget=budget,
        best_attack=worst.best.name,
        error_entitled=worst.errors_entitled_T.mean().item(),
        controls=MappingProxyType(results),
        certificate=certificate,
        attacks=tuple(score for finding in findings for score in finding.scores),
        notes=tuple(_notes(findings, results)),
        pictures={
            "records": worst.trial.truth[:PICTURES],
            "entitled": best(worst.entitled).reconstruction.target[:PICTURES],
            **shown,
        },
    )


@final
class _Ticker:
    """Counts pieces of work for a progress bar."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, total

    def now(self, what: str) -> None:
        """Say what comes now; it is one piece of work."""
        if self._progress is not None:
            self._progress(self._done, self._total, what)
        self._done += 1

    def for_each(self, what: str) -> Callable[[str], None]:
        """What a suite calls with the name of each attack that it starts; each is one piece of work."""
        return lambda name: self.now(f"{what}: {name}")

    def close(self) -> None:
        """Say that all is done."""
        if self._progress is not None:
            self._progress(self._total, self._total, "done")


@dataclass(frozen=True)
class _Finding:
    """All that was found on one trial."""

    trial: Trial
    entitled: list[Run]
    runs: list[Run]
    errors_entitled_T: Tensor
    scores: list[AttackScore]
    peek: Peek

    @property
    def best(self) -> Run:
        return best(self.runs)

    @property
    def left_out(self) -> list[str]:
        """The names of the attacks that failed, here or from the answer alone."""
        return list(dict.fromkeys(run.name for run in (*self.runs, *self.entitled) if not run.usable))

    @property
    def is_sound(self) -> bool:
        """Whether a verdict may rest on it."""
        return (
            len(self.trial.truth) >= ENOUGH_TARGETS
            and not self.left_out
            and all(map(_is_finite, (self.peek, *(score.peek for score in self.scores))))
            and not self.peek.high < BROKEN_BELOW
        )


def _is_finite(value: Peek) -> bool:
    return all(map(math.isfinite, (value.value, value.low, value.high)))


def _check(trials: Sequence[Trial], suite: Sequence[Attack]) -> None:
    if not trials:
        raise AuditError("no trials; expected one per exposure")
    if not suite:
        raise AuditError("no attacks; expected at least one")
    exposures = [trial.view.exposure for trial in trials]
    if len(set(exposures)) < len(exposures):
        raise AuditError(f"several trials of one exposure: {', '.join(exposures)}; expected one per exposure")
    names = [attack.name for attack in suite]
    if len(set(names)) < len(names) or Stack.name in names:
        raise AuditError(f"attacks {', '.join(names)}: expected different names; the audit itself adds the stack")
    for trial in trials:
        check_view(trial.view)
        if len(trial.truth) < MINIMUM_TARGETS or not bool(torch.isfinite(trial.truth).all()):
            raise AuditError(
                f"{trial.view.exposure} trial: {len(trial.truth)} target records; expected at least {MINIMUM_TARGETS}, "
                "all values finite"
            )


def _find(trial: Trial, suite: Sequence[Attack], source: Source, ticker: _Ticker) -> _Finding:
    view, exposure = trial.view, trial.view.exposure
    entitled = run_suite(answer_alone(view), suite, ticker.for_each(f"{exposure}, from the answer alone"))
    entitled = _with_finite_errors(entitled, trial)
    runs = _with_finite_errors(run_suite(view, suite, ticker.for_each(exposure), members=entitled), trial)
    errors_entitled_T = squared_errors(best(entitled).reconstruction.target, trial.truth)
    ridge_error = next((run.validation_error for run in runs if isinstance(run.attack, Ridge)), float("inf"))
    scores = []
    for run in runs:
        if not run.usable:
            continue
        rebuilt = run.reconstruction.target
        errors_T = squared_errors(rebuilt, trial.truth)
        mse = errors_T.mean().item()
        scores.append(
            AttackScore(
                name=run.name,
                adversary=run.attack.adversary,
                knows=run.attack.knows,
                exposure=exposure,
                mse=mse,
                psnr_db=psnr_db(mse, _value_range(trial.truth)),
                ssim=ssim(rebuilt, trial.truth),
                peek=peek(errors_T, errors_entitled_T, source.generator("bootstrap", exposure)),
                match_top1=match_top1(rebuilt, trial.truth),
                seconds=run.reconstruction.seconds,
                undertrained=run.attack.learned and run.validation_error > ridge_error,
            )
        )
    chosen = next(score.peek for score in scores if score.name == best(runs).name)
    return _Finding(trial, entitled, runs, errors_entitled_T, scores, chosen)


def _with_finite_errors(runs: Sequence[Run], trial: Trial) -> list[Run]:
    """The runs; one whose values are so large that their squares overflow is not usable any more."""

    def is_finite(run: Run) -> bool:
        return run.usable and bool(squared_errors(run.reconstruction.target, trial.truth).isfinite().all())

    judged = [run if is_finite(run) else replace(run, validation_error=math.inf) for run in runs]
    if not any(run.usable for run in judged):
        raise AuditError(f"{trial.view.exposure} trial: no attack has errors that are finite; expected saner records")
    return judged


def _value_range(records: Tensor) -> float:
    """1 for pictures, the range of all values for flat records."""
    return 1.0 if records.ndim == 4 else (records.max() - records.min()).item() or 1.0


def _run_controls(
    finding: _Finding, suite: Sequence[Attack], source: Source, ticker: _Ticker
) -> dict[str, ControlResult]:
    """The controls that are made from a trial. They share its records and entitled values, so its baseline too."""
    trial, exposure = finding.trial, finding.trial.view.exposure
    error_entitled = finding.errors_entitled_T.mean().item()

    def peek_of(run: Run) -> float:
        return 1 - squared_errors(run.reconstruction.target, trial.truth).mean().item() / error_entitled

    def open_door(what: str, door: Trial) -> ControlResult:
        ticker.now(f"{exposure}, {what} control")
        value = until(suite, door.view, peek_of, lambda value: value >= controls.IDENTITY_AT_LEAST)
        return ControlResult(value, controls.IDENTITY_AT_LEAST, value >= controls.IDENTITY_AT_LEAST)

    closed = controls.independent(trial, source.generator("independent", exposure))
    starting = ticker.for_each(f"{exposure}, independent control")
    value = peek_of(best(_with_finite_errors(run_suite(closed.view, suite, starting, finding.entitled), closed)))
    rotated = controls.identity_rotated(trial, source.generator("rotation", exposure))
    faint = controls.faint(trial, source.generator("faint", exposure))
    return {
        "identity": open_door("identity", controls.identity(trial)),
        "identity_rotated": open_door("rotated identity", rotated),
        "faint": open_door("faint", faint),
        "independent": ControlResult(value, controls.INDEPENDENT_AT_MOST, value <= controls.INDEPENDENT_AT_MOST),
    }


def _worst_controls(by_trial: Sequence[dict[str, ControlResult]]) -> dict[str, ControlResult]:
    """Of each control the result furthest on the wrong side."""
    doors = ("identity", "identity_rotated", "faint")
    worst = {name: min((each[name] for each in by_trial), key=lambda result: result.value) for name in doors}
    return {**worst, "independent": max((each["independent"] for each in by_trial), key=lambda result: result.value)}


def _gaussian(suite: Sequence[Attack], source: Source, ticker: _Ticker) -> ControlResult:
    """The error over the least possible one: near 1, and below it only by the luck of the test records."""
    ticker.now("gaussian control")
    trial, least_error = controls.gaussian(source.generator("gaussian"))

    def ratio_of(run: Run) -> float:
        return squared_errors(run.reconstruction.target, trial.truth).mean().item() / least_error

    def is_near(value: float) -> bool:
        return abs(value - 1) <= controls.GAUSSIAN_WITHIN

    value = until(suite, trial.view, ratio_of, is_near)
    return ControlResult(value, 1 + controls.GAUSSIAN_WITHIN, is_near(value))


def _verdict(findings: Sequence[_Finding], results: Mapping[str, ControlResult], budget: float | None) -> Verdict:
    sound = all(finding.is_sound for finding in findings)
    if not sound or not all(result.passed for result in results.values()):
        return "inconclusive"
    if budget is None:
        return "no budget set"
    return "within budget" if max(finding.peek.high for finding in findings) <= budget else "over budget"


def _notes(findings: Sequence[_Finding], results: Mapping[str, ControlResult]) -> list[str]:
    """What a reader has to know beside the numbers."""
    notes = []
    for name, result in results.items():
        if not result.passed:
            notes.append(f"control {name} failed: {result.value:.3f}, limit {result.limit:.2f}")
    for finding in findings:
        exposure = finding.trial.view.exposure
        for score in finding.scores:
            if score.undertrained:
                notes.append(
                    f"{exposure}: {score.name} is undertrained, it lost to ridge regression on validation records"
                )
        for name in finding.left_out:
            notes.append(f"{exposure}: {name} is left out, its reconstruction has values that are not finite")
        if len(finding.trial.truth) < ENOUGH_TARGETS:
            notes.append(
                f"{exposure}: {len(finding.trial.truth)} target records are too few for a verdict; it takes "
                f"{ENOUGH_TARGETS}"
            )
        if not _is_finite(finding.peek):
            notes.append(f"{exposure}: the peek is not a finite number, so it says nothing")
        if finding.peek.high < BROKEN_BELOW:
            notes.append(f"{exposure}: the best attack does clearly worse than the answer alone: attacks are broken")
        if not any(isinstance(run.attack, Ridge) for run in finding.runs):
            notes.append(f"{exposure}: no ridge regression in the suite, so nothing tells whether it is undertrained")
    if all(finding.trial.view.exposure != "trained-on" for finding in findings):
        notes.append("trained-on: not covered; what the server saw of training records over all epochs is not attacked")
    return notes
