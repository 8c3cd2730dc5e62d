"""Trials in, scored rows out: what was guessed of the records, their attributes, their labels, who was trained on.

Legend: T records, K classes.

Pure, as the audit is: an attack is handed the view; what is true stays here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final, final

import torch
from torch import Tensor

from milkglass.attacks.attributes import AttributeGuess, AttributeProbe, LinearProbe, MlpProbe
from milkglass.attacks.base import Method, Tick, silent
from milkglass.attacks.features import answer_alone
from milkglass.attacks.labels import GradientDirection, GradientNorm, LabelAttack, ModelCompletion
from milkglass.attacks.matching import MatchingGame
from milkglass.attacks.membership import ClassDistance, LossThreshold, MembershipAttack
from milkglass.attacks.suite import FAILURES
from milkglass.errors import AuditError, MissingKnowledgeError
from milkglass.leakage.classification import (
    balanced_accuracy,
    balanced_accuracy_over_prior,
    check_classes,
    clopper_pearson,
)
from milkglass.leakage.estimate import Estimate
from milkglass.leakage.membership import auc, leak_auc, true_positive_rate
from milkglass.leakage.reconstruction import MATCH_AMONG
from milkglass.randomness import public_source
from milkglass.transcript import LabelTrial, MembershipTrial, Release, Trial

MINIMUM_OF_A_KIND: Final = 8
"""With fewer members or non-members, or fewer records of unknown label or attribute, nothing is said."""
RATES: Final = (("tpr@1%", 0.01, 99), ("tpr@0.1%", 0.001, 10_000))
"""Measure, false positive rate, and how many outsiders must be there to set its threshold."""

Skipped = Callable[[str, Exception], None]
"""(attack, what it ended with): it was left out, as the view lacks something that it must know, or as it broke."""


def unheard(attack: str, error: Exception) -> None:
    """Nobody is told."""


@final
@dataclass(frozen=True)
class InferenceScore:
    """One measure of one attack, with its 95 % interval, over `n` records; higher = leaks more.

    measure and value: "attribute.NAME" and "label.accuracy", balanced accuracy over its prior (0 = nothing learned);
    "membership.auc" and "label.auc", the area under the ROC curve (.5 = chance); "tpr@1%" and "tpr@0.1%", the share of
    members found at that share of false alarms (that share = chance); "matching", the share of records named right.
    details: by measure, see the audits below.
    """

    measure: str
    name: str
    adversary: str
    knows: tuple[str, ...]
    exposure: str
    value: float
    low: float
    high: float
    n: int
    seconds: float
    details: Mapping[str, float]
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As in audit.json."""
        return {**vars(self), "knows": list(self.knows), "details": dict(self.details)}


def audit_attributes(
    trial: Trial,
    probes: Sequence[AttributeProbe] = (LinearProbe(), MlpProbe()),
    tick: Tick = silent,
    skipped: Skipped = unheard,
) -> tuple[InferenceScore, ...]:
    """Rows of "attribute.NAME" for every attribute of the trial: each probe, and the best one on the answer alone.

    details: `chosen` is 1 for the row that does best on validation records, which comes first, else 0;
    `balanced_accuracy` and `prior` (0..1), whose difference is the value; `validation`, balanced accuracy there.

    A probe that fails is left out. Raises AuditError where an attribute of the target has one value only, or is not
    whole numbers from 0 on.
    """
    view = trial.view
    alone = [probe for probe in probes if set(probe.knows) <= {"pairs"}]
    runs = [("", view, probes), (", answer alone", answer_alone(view), alone)]
    steps = _steps(tick, len(trial.attributes) * (len(probes) + len(alone)))
    rows: list[InferenceScore] = []
    for attribute, true_T in trial.attributes.items():
        what = f"attribute {attribute!r} of the target"
        _check_facts(what, true_T)
        made: list[tuple[AttributeProbe, str, AttributeGuess, float]] = []
        for where, seen, tries in runs:
            tried = []
            for probe in tries:
                try:
                    guess = probe.attack(seen, attribute, next(steps))
                except FAILURES as error:
                    skipped(probe.name, error)
                    continue
                validation = balanced_accuracy(guess.validation_N, view.validation.attributes[attribute])
                tried.append((probe, where, guess, validation))
            made += tried if seen is view else [max(tried, key=lambda run: run[3])] if tried else []
        best_first = sorted(made, key=lambda run: -run[3])
        classes = 1 + max(int(values.max()) for values in (true_T, *(run[2].target_T for run in made)))
        for probe, where, guess, validation in best_first:
            measured = balanced_accuracy_over_prior(guess.target_T, true_T, classes)
            details = {
                "chosen": float(guess is best_first[0][2]),
                "validation": validation,
                **_over_prior(measured, true_T),
            }
            measure, exposure = f"attribute.{attribute}", view.exposure
            row = _row(measure, probe, measured, exposure, len(true_T), guess.seconds, details, where)
            rows.append(replace(row, note=guess.note))
    return tuple(rows)


def audit_matching(
    trial: Trial, seed: int = 0, tick: Tick = silent, skipped: Skipped = unheard
) -> tuple[InferenceScore, ...]:
    """The row of "matching": which of the test records was sent, told by who has the client's weights and all of them.

    Among at most 1,000; none where the view lacks the weights. details: `candidates`, and `chance`, one over that.
    """
    game, view = MatchingGame(), trial.view
    try:
        game.check(view)
    except MissingKnowledgeError as error:
        skipped(game.name, error)
        return ()
    count = min(MATCH_AMONG, len(trial.truth))
    order_N = torch.randperm(count, generator=public_source(seed).derive("inference").generator("matching"))
    target = Release(
        view.target.activations[:count],
        view.target.entitled[:count],
        repeats=None if view.target.repeats is None else view.target.repeats[:, :count],
    )
    made = game.attack(replace(view, target=target), trial.truth[order_N], tick)
    right = clopper_pearson(round(made.top1(order_N.argsort()) * count), count)
    details = {"candidates": float(count), "chance": 1 / count}
    return (_row("matching", game, right, view.exposure, count, made.seconds, details),)


def audit_membership(
    trial: MembershipTrial,
    attacks: Sequence[MembershipAttack] | None = None,
    seed: int = 0,
    tick: Tick = silent,
    skipped: Skipped = unheard,
) -> tuple[InferenceScore, ...]:
    """Rows of "membership.auc", "tpr@1%" and "tpr@0.1%" for every attack (without LiRA if none are named).

    A rate is left out where there are not enough outsiders to set its threshold: 99, and 10,000. details of a rate:
    `false_positive_rate`, reached on the candidates that are no members, with `_low` and `_high`; and the `threshold`.

    Raises AuditError for fewer than 8 members, or non-members, or outsiders, and for values that are not finite.
    """
    attacks = (ClassDistance(seed), LossThreshold()) if attacks is None else attacks
    member_T = trial.member
    members = int(member_T.sum())
    if member_T.dtype != torch.bool or min(members, len(member_T) - members) < MINIMUM_OF_A_KIND:
        raise AuditError(
            f"membership: {members} members and {len(member_T) - members} others ({member_T.dtype}); "
            f"expected at least {MINIMUM_OF_A_KIND} of each (torch.bool)"
        )
    rows = []
    for attack, step in zip(attacks, _steps(tick, len(attacks)), strict=False):
        try:
            scores = attack.attack(trial.view, step)
        except MissingKnowledgeError as error:
            skipped(attack.name, error)
            continue
        scores_T, seconds = scores.candidates_T, scores.seconds
        area = auc(scores_T, member_T)
        rows.append(_row("membership.auc", attack, area, "fresh", len(member_T), seconds, {}))
        for measure, rate, needed in RATES:
            if len(scores.outsiders_N) < needed:
                continue
            found = true_positive_rate(scores_T[member_T], scores_T[~member_T], scores.outsiders_N, rate)
            details = {
                "false_positive_rate": found.false.value,
                "false_positive_rate_low": found.false.low,
                "false_positive_rate_high": found.false.high,
                "threshold": found.threshold,
            }
            rows.append(_row(measure, attack, found.true, "fresh", members, seconds, details))
    return tuple(rows)


def audit_labels(
    trial: LabelTrial,
    attacks: Sequence[LabelAttack] = (GradientNorm(), GradientDirection(), ModelCompletion()),
    tick: Tick = silent,
    skipped: Skipped = unheard,
) -> tuple[InferenceScore, ...]:
    """Rows of "label.auc" and "label.accuracy" for every attack (all there are, if none are named).

    Over the rows whose label the attacker does not know. details of the accuracy: `balanced_accuracy` and `prior`.

    Raises AuditError where these are of one class only or fewer than 8, and for values that are not finite.
    """
    view, labels_T = trial.view, trial.labels
    check_classes("labels", labels_T, view.classes)
    if not torch.equal(labels_T[view.known_rows], view.known_labels):
        raise AuditError("labels: the known labels are not those of the known rows")
    unknown_T = torch.ones(len(labels_T), dtype=torch.bool)
    unknown_T[view.known_rows] = False
    true_T = labels_T[unknown_T]
    _check_facts("unknown labels", true_T)
    rows = []
    for attack, step in zip(attacks, _steps(tick, len(attacks)), strict=False):
        try:
            made = attack.attack(view, step)
        except MissingKnowledgeError as error:
            skipped(attack.name, error)
            continue
        scores_TK = made.scores_TK[unknown_T]
        area = leak_auc(scores_TK, true_T)
        right = balanced_accuracy_over_prior(scores_TK.argmax(1), true_T, view.classes)
        for measure, measured, details in (
            ("label.auc", area, {}),
            ("label.accuracy", right, _over_prior(right, true_T)),
        ):
            rows.append(_row(measure, attack, measured, "trained-on", len(true_T), made.seconds, details))
    return tuple(rows)


def _row(
    measure: str,
    attack: Method,
    measured: Estimate,
    exposure: str,
    n: int,
    seconds: float,
    details: Mapping[str, float],
    where: str = "",
) -> InferenceScore:
    return InferenceScore(
        measure=measure,
        name=attack.name + where,
        adversary=attack.adversary,
        knows=attack.knows,
        exposure=exposure,
        value=measured.value,
        low=measured.low,
        high=measured.high,
        n=n,
        seconds=seconds,
        details=MappingProxyType(dict(details)),
    )


def _check_facts(what: str, true_T: Tensor) -> None:
    check_classes(what, true_T)
    if len(true_T) < MINIMUM_OF_A_KIND or len(set(true_T.tolist())) < 2:
        raise AuditError(
            f"{what}: {len(true_T)} records, {len(set(true_T.tolist()))} different values; expected at least "
            f"{MINIMUM_OF_A_KIND} records and two values"
        )


def _over_prior(measured: Estimate, true_T: Tensor) -> dict[str, float]:
    prior = 1 / len(set(true_T.tolist()))
    return {"balanced_accuracy": measured.value + prior, "prior": prior}


def _steps(tick: Tick, pieces: int) -> Iterator[Tick]:
    """For each piece of work a tick of its own, which tells `tick` how far the whole has come, a piece being 1,000."""

    def within(piece: int) -> Tick:
        return lambda done, total: tick(1000 * piece + 1000 * done // total, 1000 * pieces)

    return (within(piece) for piece in range(pieces))
