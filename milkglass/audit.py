"""Trials in, Audit out: every attack on every exposure, the entitled baseline, the controls, and a verdict.

Pure: it runs attacks on views and talks to nobody. An attack is handed the view; `truth` stays here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Final, final

import torch
from torch import Tensor

from milkglass.attacks.base import Attack
from milkglass.attacks.matching import MatchingGame
from milkglass.attacks.stack import Stack
from milkglass.attacks.suite import (
    Strength,
    attacks_of,
    attribute_probes,
    best,
    from_pairs,
    membership_attacks,
)
from milkglass.audit_work import Keeps, Left, Progress, Work
from milkglass.bounds import Bound, certified_bounds, membership_bound
from milkglass.controls import ControlResult
from milkglass.defenses.certificate import Certificate, ReleaseCheck
from milkglass.errors import AuditError
from milkglass.findings import AttackScore, Curve, Finding, attack_curve, find, worse
from milkglass.inference import InferenceScore, audit_attributes, audit_matching, audit_membership
from milkglass.leakage.estimate import Estimate
from milkglass.randomness import public_source
from milkglass.self_test import MADE_FROM_A_TRIAL, try_on_gaussian, try_on_trial
from milkglass.transcript import MembershipTrial, Trial, View, check_view
from milkglass.verdict import BITS, MATCHING, MEMBERSHIP_MEASURES, RECONSTRUCTION_MEASURES, Verdict, check_budget, judge

MINIMUM_TARGETS: Final = 8
"""With fewer target records nothing is said."""
PICTURES: Final = 12


@final
@dataclass(frozen=True)
class Audit:
    """What an attacker rebuilt or guessed. `error_entitled`, `best_attack`: of the worst exposure.

    measures: each with its 95 % interval, the worst over exposures; "peek" is one of them. exposures: the peek of each.
    pictures: the first records of the target, "records", as rebuilt from the "entitled" values alone, and by attack; of
    `pictures_of`, the worst exposure of new records. bounds: what is proved of the attacks beside `inferences`.
    """

    measures: Mapping[str, Estimate]
    exposures: Mapping[str, Estimate]
    verdict: Verdict
    budget: Mapping[str, float] | None
    strength: Strength
    best_attack: str
    error_entitled: float
    controls: Mapping[str, ControlResult]
    certificate: Certificate | None
    check: ReleaseCheck | None
    attacks: tuple[AttackScore, ...]
    inferences: tuple[InferenceScore, ...]
    bounds: tuple[Bound, ...]
    curves: tuple[Curve, ...]
    skipped: tuple[Left, ...]
    notes: tuple[str, ...]
    pictures: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    pictures_of: str = "fresh"

    @property
    def peek(self) -> Estimate:
        """Of the worst exposure: 1 = the raw record, 0 = nothing beyond the answer."""
        return self.measures["peek"]

    def to_dict(self) -> dict[str, Any]:
        """What audit.json holds; the pictures are not in it."""
        return {
            "peek": self.peek.to_dict(),
            "measures": {name: value.to_dict() for name, value in self.measures.items()},
            "exposures": {name: value.to_dict() for name, value in self.exposures.items()},
            "verdict": self.verdict,
            "budget": None if self.budget is None else dict(self.budget),
            "strength": self.strength,
            "best_attack": self.best_attack,
            "pictures_of": self.pictures_of,
            "error_entitled": self.error_entitled,
            "controls": {name: result.to_dict() for name, result in self.controls.items()},
            "certificate": self._certificate(),
            "attacks": [score.to_dict() for score in self.attacks],
            "inferences": [score.to_dict() for score in self.inferences],
            "bounds": [bound.to_dict() for bound in self.bounds],
            "curves": [asdict(curve) for curve in self.curves],
            "skipped": [asdict(left) for left in self.skipped],
            "notes": list(self.notes),
        }

    def _certificate(self) -> dict[str, Any] | None:
        if self.certificate is None:
            return None
        check = None if self.check is None else {**asdict(self.check), "agrees": self.check.agrees}
        return {**self.certificate.to_dict(), "check": check}


def measurable(trials: Sequence[Trial], membership: MembershipTrial | None, strength: Strength) -> list[str]:
    """The measures that an audit of these trials gives, and a budget may be set on."""
    first = trials[0]
    pictures = first.truth.ndim == 4 and min(first.truth.shape[2:]) >= 8
    names = [name for name in RECONSTRUCTION_MEASURES if pictures or name != "ssim"]
    names += [f"attribute.{name}" for name in first.attributes]
    if strength != "quick" and any(not trial.view.lacks("client weights") for trial in trials):
        names.append(MATCHING)
    return names if membership is None else [*names, *MEMBERSHIP_MEASURES]


def audit(
    trials: Trial | Sequence[Trial],
    *,
    attacks: Sequence[Attack] | None = None,
    strength: Strength = "default",
    membership: MembershipTrial | None = None,
    budget: Mapping[str, float] | None = None,
    seed: int = 0,
    certificate: Certificate | None = None,
    check: ReleaseCheck | None = None,
    progress: Progress | None = None,
    kept: Keeps | None = None,
    notes: Sequence[str] = (),
) -> Audit:
    """Attack the trials, one per exposure, and judge the worst of them against the budget.

    The best attack is chosen on validation records and scored on test records. attacks: instead of those of `strength`.
    certificate, check: of the defenses, and whether releases made anew agree with it; if not there is no verdict.
    kept: where results are kept, so that an interrupted audit goes on. notes: what else a reader has to know. Raises
    AuditError for a trial that no attack can be judged on. See docs/concepts.md for the words.
    """
    if isinstance(trials, View):
        raise AuditError(
            "a view alone cannot be scored; expected Trial(view, truth), with the records behind its target"
        )
    trials = [trials] if isinstance(trials, Trial) else list(trials)
    suite = tuple(attacks) if attacks is not None else attacks_of(strength, seed)
    _check(trials, suite)
    if budget is not None:
        check_budget(budget, [*measurable(trials, membership, strength), *([] if certificate is None else [BITS])])
    source = public_source(seed).derive("audit")
    curved = _curved(suite, strength)
    by_trial = len(from_pairs(suite)) + len(suite)
    guessed = sum(len(trial.attributes) for trial in trials) + (membership is not None)
    work = Work(progress, kept, seed, total=len(trials) * by_trial + MADE_FROM_A_TRIAL + 1 + len(curved) + guessed)

    findings = [find(trial, suite, source, work.runner) for trial in trials]
    results = try_on_trial(findings[0], suite, source, work.remember)
    results["gaussian"] = try_on_gaussian(suite, source, work.remember)
    curves = _curves(findings[0], curved, work)
    inferences = _inferences(findings, membership, strength, seed, work)
    work.close()

    measures = _worst_measures(findings, inferences)
    if certificate is not None:
        measures[BITS] = Estimate(*[certificate.bits_per_release] * 3)
    shown = max(findings, key=lambda finding: worse(finding.peek))
    # pictures are passed on: never the private training records
    pictured = max(findings, key=lambda finding: (finding.exposure != "trained-on", worse(finding.peek)))
    return Audit(
        measures=MappingProxyType(measures),
        exposures=MappingProxyType({finding.exposure: finding.measures["peek"] for finding in findings}),
        verdict=judge(
            measures,
            budget,
            failed=work.failed,
            sound=all(finding.is_sound for finding in findings)
            and all(result.passed for result in results.values())
            and (check is None or check.agrees),
        ),
        budget=budget,
        strength=strength,
        best_attack=shown.best_attack,
        error_entitled=shown.errors_entitled_T.mean().item(),
        controls=MappingProxyType(results),
        certificate=certificate,
        check=check,
        attacks=tuple(score for finding in findings for score in finding.scores),
        inferences=tuple(inferences),
        bounds=_bounds(trials, membership, inferences, certificate, check),
        curves=tuple(curves),
        skipped=(*_skipped(findings), *work.left),
        notes=(
            *notes,
            *_disagreement(check),
            *_notes(findings, results, notes),
            *_told(inferences),
            *_unmeasured(measures, budget),
        ),
        pictures=_pictures(pictured),
        pictures_of=pictured.exposure,
    )


def _curved(suite: Sequence[Attack], strength: Strength) -> list[Attack]:
    """Those whose error is drawn against the number of pairs: the quick ones by default, all when thorough."""
    if strength == "quick":
        return []
    return [a for a in from_pairs(suite) if "pairs" in a.knows and (not a.learned or strength == "thorough")]


def _curves(finding: Finding, attacks: Sequence[Attack], work: Work) -> list[Curve]:
    curves = []
    for attack in attacks:
        work.now(f"{finding.exposure}, fewer pairs: {attack.name}")
        curves.append(attack_curve(finding, attack, work.run))
    return curves


def _inferences(
    findings: Sequence[Finding], membership: MembershipTrial | None, strength: Strength, seed: int, work: Work
) -> list[InferenceScore]:
    """What was guessed of the records: their sensitive columns on every exposure, and who was trained on."""
    rows: list[InferenceScore] = []
    for finding in findings:
        trial, exposure = finding.trial, finding.exposure
        for name, values in trial.attributes.items():
            work.now(f"{exposure}: attribute {name}")
            alone = replace(trial, attributes={name: values})
            probes = [  # a training is one, whatever the exposure
                probe
                for probe in attribute_probes(strength, seed)
                if exposure == "fresh" or "training" not in probe.knows
            ]
            guess = partial(audit_attributes, alone, probes, work.tick)
            rows += work.rows(f"attribute {name}", exposure, alone, guess, [f"attribute.{name}"], probes)
        if strength != "quick":
            game = partial(audit_matching, trial, seed, work.tick)
            rows += work.rows(MatchingGame.name, exposure, trial, game, [MATCHING])
    if membership is not None:
        work.now("membership")
        for attack in membership_attacks(strength, seed):
            compute = partial(audit_membership, membership, [attack], seed, work.tick)
            rows += work.rows(attack.name, "fresh", membership, compute, MEMBERSHIP_MEASURES, attack)
    return rows


def _bounds(
    trials: Sequence[Trial],
    membership: MembershipTrial | None,
    inferences: Sequence[InferenceScore],
    certificate: Certificate | None,
    check: ReleaseCheck | None,
) -> tuple[Bound, ...]:
    """From below by the gap, where who was trained on was guessed; from above by a certificate that is not void."""
    measured = any(row.measure in MEMBERSHIP_MEASURES for row in inferences)
    below = membership_bound(membership) if membership is not None and measured else None
    above: tuple[Bound, ...] = ()
    if certificate is not None and (check is None or check.agrees):
        candidates = {row.exposure: int(row.details["candidates"]) for row in inferences if row.measure == MATCHING}
        seen = [trial.view for trial in trials if trial.view.exposure != "trained-on"]  # weights must be fixed
        releases: dict[str, int] = {
            view.exposure: 1 if view.target.repeats is None else len(view.target.repeats) for view in seen
        }
        above = certified_bounds(certificate, candidates, releases)
    return (() if below is None else (below,)) + above


def _skipped(findings: Sequence[Finding]) -> list[Left]:
    return [Left(skip.attack, finding.exposure, skip.why) for finding in findings for skip in finding.skipped]


def _worst_measures(findings: Sequence[Finding], inferences: Sequence[InferenceScore]) -> dict[str, Estimate]:
    """Of each measure the one with the highest upper end, over exposures and over ways of guessing."""
    found: dict[str, Estimate] = {}
    rows = [item for finding in findings for item in finding.measures.items()]
    rows += [
        (row.measure, Estimate(row.value, row.low, row.high))
        for row in inferences
        if row.details.get("chosen", 1.0)  # of the ways to guess an attribute, the one chosen on validation records
    ]
    for name, interval in rows:
        if name not in found or worse(interval) > worse(found[name]):
            found[name] = interval
    return found


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
    if not from_pairs(suite):
        raise AuditError(
            f"attacks {', '.join(names)}: expected one at least that needs nothing but pairs, such as ridge"
        )
    for trial in trials:
        check_view(trial.view)
        if len(trial.truth) < MINIMUM_TARGETS or not bool(torch.isfinite(trial.truth).all()):
            raise AuditError(
                f"{trial.view.exposure} trial: {len(trial.truth)} target records; expected at least {MINIMUM_TARGETS}, "
                "all values finite"
            )


def _pictures(finding: Finding) -> dict[str, Tensor]:
    rebuilt = {run.name: run.reconstruction.target[:PICTURES] for run in finding.runs if run.usable}
    entitled = best(finding.entitled).reconstruction.target[:PICTURES]
    return {"records": finding.trial.truth[:PICTURES], "entitled": entitled, **rebuilt}


def _told(inferences: Sequence[InferenceScore]) -> list[str]:
    return list(dict.fromkeys(f"{row.exposure}: {row.name}: {row.note}" for row in inferences if row.note))


def _unmeasured(measures: Mapping[str, Estimate], budget: Mapping[str, float] | None) -> list[str]:
    return [
        f"{name} is in the budget and could not be measured, so there is no verdict; for tpr@1% it takes 99 records of "
        "the attacker's own, for tpr@0.1% 10,000"
        for name in budget or ()
        if name not in measures
    ]


def _disagreement(check: ReleaseCheck | None) -> list[str]:
    if check is None or check.agrees:
        return []
    return [
        "releases that the audit made anew with the run's own client speak against the certificate: noise of sigma "
        f"{check.sigma:.4g}, of one record {check.least:.4g}, mean releases up to {check.longest:.4g} long; it is void"
    ]


def _notes(findings: Sequence[Finding], results: Mapping[str, ControlResult], known: Sequence[str]) -> list[str]:
    """What a reader has to know beside the numbers, and the notes that are known."""
    notes = []
    for name, result in results.items():
        if not result.passed:
            notes.append(f"control {name} failed: {result.value:.3f}, limit {result.limit:.2f}")
    for finding in findings:
        notes += finding.notes()
    told = any(finding.exposure == "trained-on" for finding in findings)
    if not told and not any(note.startswith("trained-on") for note in known):
        notes.append("trained-on: not covered; what the server saw of training records over all epochs is not attacked")
    return notes
