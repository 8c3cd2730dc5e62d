"""What a finished network proves about its members, and what a certificate rules out: bounds, in words.

*Lower* bounds come from the generalization gap (Del Grosso et al. 2021, arXiv 2105.03875; `leakage/information.py`):
what some attacker surely can do, so a small one certifies nothing. *Upper* bounds come from a certificate's bits
(`defenses/certificate.py`): what nobody can do, for the game that their words name.

The membership game: a fair coin says whether the attacker is asked about a record that was trained on, any of them
alike, or about another one; success is the share of coins it tells, .5 = guessing. Balanced accuracy measures just
that, however many there are of either kind.

Where we differ from the paper: its inequality for |loss| <= R stands beside the one for 0 <= loss <= R, which proves
twice as much from the same gap; and beside both stands the clipped cross-entropy, with a limit that holds for certain
as far as its confidence says, not just as measured. The gap is an expectation over training sets, as in the paper: ten
members of one network say little, whatever it learned, and a network that learned nothing proves nothing.

Pure: losses in, figures out. Legend: N records, K classes, M members, O others, T both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, final

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor
from torch.nn import functional as F

from milkglass.defenses.certificate import Certificate
from milkglass.errors import AuditError
from milkglass.leakage.classification import balanced_accuracy_over_prior
from milkglass.leakage.estimate import Estimate
from milkglass.leakage.information import (
    ClippedBound,
    bounded_gap_bound,
    clipped_gap_bound,
    exact_fano_upper_bound,
    gaussian_capacity_bits,
    is_vacuous,
    pinsker_upper_bound,
)
from milkglass.leakage.membership import auc
from milkglass.randomness import public_source
from milkglass.transcript import MembershipTrial

LARGEST_BRIER: Final = 2.0
"""The most that the Brier score of one record can be; the R of the published network rows."""
SURE: Final = 0.8
"""The published attack: a member is what the network is surer of than this."""
FEWEST: Final = 8
"""With fewer members or others nothing is said."""
AT_ONCE: Final = 512


@final
@dataclass(frozen=True)
class Bound:
    """A bound on the success of any attack of its kind, 0..1; higher = leaks more.

    measure: "membership", share of fair coins told; "matching", share of records named right; "attribute", share of
    fair yes-or-no facts told. kind: "lower", some attacker does at least so well; "upper", nobody does better. low: of
    a lower one, what holds with 95 % confidence; value is what was measured. exposure: of the attacks beside it.
    """

    measure: str
    kind: Literal["lower", "upper"]
    name: str
    value: float
    low: float | None
    exposure: str
    words: str

    def to_dict(self) -> dict[str, Any]:
        """As in audit.json and bounds.json."""
        return asdict(self)


@final
@dataclass(frozen=True)
class Losses:
    """Of N records: Brier score (0..2), cross-entropy (from 0), the largest probability, and whether that is right.

    All float64, (N,).
    """

    brier: Tensor
    cross_entropy: Tensor
    surest: Tensor
    right: Tensor

    def __len__(self) -> int:
        return len(self.brier)

    @property
    def accuracy(self) -> float:
        """Share of records classified right, 0..1."""
        return self.right.mean().item()


@final
@dataclass(frozen=True)
class Gap:
    """E[loss | other] - E[loss | member], with its 95 % interval. limit: the loss is from 0 to this."""

    loss: str
    limit: float
    value: float
    low: float
    high: float


@final
@dataclass(frozen=True)
class Success:
    """What an attack reached, with its 95 % interval; .5 = guessing. measure: "balanced accuracy" or "auc"."""

    attack: str
    measure: str
    value: float
    low: float
    high: float


@final
@dataclass(frozen=True)
class Proof:
    """A network's gap, what it proves of its members, and what attacks on them reached."""

    members: int
    others: int
    accuracy_on_members: float
    accuracy_on_others: float
    gaps: tuple[Gap, ...]
    bounds: tuple[Bound, ...]
    attacks: tuple[Success, ...]

    def to_dict(self) -> dict[str, Any]:
        """As in bounds.json."""
        return asdict(self)


def losses_of(logits_NK: Tensor, labels_N: Tensor) -> Losses:
    """The losses of answers `logits_NK` to records with these labels. Raises AuditError where they do not fit."""
    if logits_NK.ndim != 2 or len(logits_NK) != len(labels_N) or not bool(torch.isfinite(logits_NK).all()):
        raise AuditError(
            f"losses: logits of shape {tuple(logits_NK.shape)} for {len(labels_N)} labels; expected a finite row each"
        )
    logits_NK = logits_NK.detach().double()
    is_label_NK = F.one_hot(labels_N, logits_NK.shape[1])
    probability_NK = logits_NK.softmax(1)
    others_N = logits_NK.masked_fill(is_label_NK.bool(), -torch.inf).logsumexp(1)
    odds_N = logits_NK[is_label_NK.bool()] - others_N
    return Losses(
        brier=(probability_NK - is_label_NK).square().sum(1),
        cross_entropy=torch.logaddexp(torch.zeros_like(odds_N), -odds_N),  # does not round to 0 where odds are high
        surest=probability_NK.max(1).values,
        right=(logits_NK.argmax(1) == labels_N).double(),
    )


def gap_of(name: str, limit: float, member_M: Tensor, other_O: Tensor) -> Gap:
    """The gap of losses from 0 to `limit`, with Welch's interval: both sides are samples, the members of the trainings.

    Members of one network are not quite independent, for they shaped it together; they are taken as if they were.
    """
    value = (other_O.mean() - member_M.mean()).item()
    of_members, of_others = (loss_N.var().item() / len(loss_N) for loss_N in (member_M, other_O))
    half, error = 0.0, of_members + of_others
    if error > 0:
        freedom = error**2 / (of_members**2 / (len(member_M) - 1) + of_others**2 / (len(other_O) - 1))
        half = float(student.ppf(0.975, freedom)) * math.sqrt(error)
    return Gap(name, limit, value, max(value - half, -limit), min(value + half, limit))


def prove(member: Losses, other: Losses, seed: int = 0) -> Proof:
    """What the losses of all members of one network, and of other records of the same source, prove; and attacks.

    seed: of the halves on which the threshold of the loss is chosen. Raises AuditError for fewer than 8 of either.
    """
    if min(len(member), len(other)) < FEWEST:
        raise AuditError(
            f"bounds: {len(member)} members and {len(other)} other records; expected at least {FEWEST} of each"
        )
    clipped = clipped_gap_bound(member.cross_entropy, other.cross_entropy)
    most = max(member.cross_entropy.max().item(), other.cross_entropy.max().item())
    radius = clipped.radius if math.isfinite(clipped.radius) else most
    brier = gap_of("Brier score", LARGEST_BRIER, member.brier, other.brier)
    entropy = gap_of(
        "clipped cross-entropy", radius, member.cross_entropy.clamp(max=radius), other.cross_entropy.clamp(max=radius)
    )
    return Proof(
        members=len(member),
        others=len(other),
        accuracy_on_members=member.accuracy,
        accuracy_on_others=other.accuracy,
        gaps=(brier, entropy),
        bounds=(*_brier_bounds(brier), _clipped(clipped)),
        attacks=successes(member, other, seed),
    )


def successes(member: Losses, other: Losses, seed: int = 0) -> tuple[Success, ...]:
    """The published attack at its threshold of .8; the loss at the threshold that is best on the other half; areas."""
    is_member_T = torch.cat([torch.ones(len(member)), torch.zeros(len(other))]).bool()
    surest_T = torch.cat([member.surest, other.surest])
    loss_T = torch.cat([member.cross_entropy, other.cross_entropy])
    sure, best = f"largest probability > {SURE:g}", "loss below the best threshold of the other half"
    return (
        _told(sure, surest_T > SURE, is_member_T),
        _told(best, _below_best(loss_T, is_member_T, seed), is_member_T),
        Success("largest probability", "auc", **auc(surest_T, is_member_T).to_dict()),
        Success("loss", "auc", **auc(-loss_T, is_member_T).to_dict()),
    )


def best_threshold(member_M: Tensor, other_O: Tensor) -> float:
    """The loss at or below which "member" is right most often, halfway to the next loss; -inf where none helps."""
    member, other = member_M.double().sort().values.numpy(), other_O.double().sort().values.numpy()
    loss = np.unique(np.concatenate([member, other]))
    ahead = np.searchsorted(member, loss, "right") / len(member) - np.searchsorted(other, loss, "right") / len(other)
    at = int(ahead.argmax())
    if ahead[at] <= 0:
        return -math.inf
    return float(loss[at] if at + 1 == len(loss) else (loss[at] + loss[at + 1]) / 2)


def membership_bound(trial: MembershipTrial) -> Bound | None:
    """The lower bound from the losses of an audit's candidates; None where the view cannot compute finite ones.

    The attacker's own records count as others beside the candidates that are.
    """
    view = trial.view
    server, labels_T, labels_N = view.knowledge.server, view.candidates.labels, view.outsiders.labels
    if server is None or labels_T is None or labels_N is None:
        return None
    z, labels = torch.cat([view.candidates.activations, view.outsiders.activations]), torch.cat([labels_T, labels_N])
    with torch.no_grad():
        logits = torch.cat([server(part) for part in torch.split(z, AT_ONCE)])
    if not bool(torch.isfinite(logits).all()):
        return None
    loss = losses_of(logits, labels).cross_entropy
    is_member = torch.cat([trial.member, torch.zeros(len(labels_N), dtype=torch.bool)])
    return _clipped(clipped_gap_bound(loss[is_member], loss[~is_member]))


def certified_bounds(
    certificate: Certificate, candidates: Mapping[str, int], releases: Mapping[str, int]
) -> tuple[Bound, ...]:
    """What a certificate rules out, an exposure at a time: naming a record, where that was tried; telling a fair fact.

    candidates: by exposure, among how many records the matching game named one. releases: by exposure, how many of a
    record the attacker sees. Their mean holds all that they tell: a channel with so much less noise.
    """
    bounds = []
    for exposure, times in releases.items():
        bits = gaussian_capacity_bits(certificate.dimensions, certificate.clip, certificate.sigma / math.sqrt(times))
        seen = "one release" if times == 1 else f"{times} releases"
        told = f"{seen} of a record tell{'s' if times == 1 else ''} at most {bits:.2f} bits"
        if exposure in candidates:
            count = candidates[exposure]
            value = exact_fano_upper_bound(bits, count)
            words = (
                f"vacuous: {told}, enough to name one of {count:,}"
                if is_vacuous(value)
                else f"nobody names the right one of {count:,} equally likely records from {seen} more often than "
                f"{value:.3f} of the time, whatever the attack; {told}, for fixed weights of the client's stage"
            )
            bounds.append(Bound("matching", "upper", "Fano", value, None, exposure, words))
        value, pinsker = exact_fano_upper_bound(bits, 2), pinsker_upper_bound(bits * math.log(2))
        beside = "vacuous" if is_vacuous(pinsker) else f"{pinsker:.3f}"
        words = (
            f"vacuous: {told}, enough to tell any yes-or-no fact"
            if is_vacuous(value)
            else f"nobody tells a yes-or-no fact that is a fair coin from {seen} more often than {value:.3f} of the "
            f"time (Fano; Pinsker's inequality: {beside}), whatever the attack; it says nothing of facts that can be "
            "guessed without a release"
        )
        bounds.append(Bound("attribute", "upper", "Fano", value, None, exposure, words))
    return tuple(bounds)


def _brier_bounds(gap: Gap) -> tuple[Bound, ...]:
    """As published, for |loss| <= 2, and for 0 <= loss <= 2."""
    surely = 0.0 if gap.low <= 0 <= gap.high else min(abs(gap.low), abs(gap.high))
    bounds = []
    for name, nonnegative, beside in (
        (
            "Brier gap, |loss| <= 2",
            False,
            "as published: made for losses of either sign, it proves half of what this gap can",
        ),
        ("Brier gap, 0 <= loss <= 2", True, "reached by an attacker who draws the threshold of the loss at random"),
    ):
        value, low = (bounded_gap_bound(each, gap.limit, nonnegative=nonnegative).value for each in (gap.value, surely))
        bounds.append(Bound("membership", "lower", name, value, low, "fresh", f"{_at_least(value, low)}; {beside}"))
    return tuple(bounds)


def _clipped(found: ClippedBound) -> Bound:
    words = f"{_at_least(found.value, found.low)}; {CERTIFIES_NOTHING}"
    return Bound("membership", "lower", "clipped cross-entropy", found.value, found.low, "fresh", words)


CERTIFIES_NOTHING: Final = "a small gap does not certify privacy, for attacks that use more than the loss may do better"


def _at_least(value: float, low: float) -> str:
    if low <= 0.5:
        return f"this gap proves nothing (measured {value:.3f}, and a coin toss gets .5)"
    return (
        "an attacker who can compute the loss tells members from others at least "
        f"{low:.3f} of the time, with 95 % confidence (measured {value:.3f}; a coin toss gets .5)"
    )


def _told(attack: str, guess_T: Tensor, is_member_T: Tensor) -> Success:
    found = balanced_accuracy_over_prior(guess_T.long(), is_member_T.long(), 2)
    shifted = Estimate(found.value + 0.5, found.low + 0.5, found.high + 0.5)
    return Success(attack, "balanced accuracy", **shifted.to_dict())


def _below_best(loss_T: Tensor, is_member_T: Tensor, seed: int) -> Tensor:
    """Guesses of the members: each half is judged by the threshold that is best on the other one."""
    generator = public_source(seed).derive("bounds").generator("halves")
    half_T = torch.zeros(len(loss_T), dtype=torch.bool)
    for kind_T in (is_member_T, ~is_member_T):
        rows = kind_T.nonzero()[:, 0]
        half_T[rows[torch.randperm(len(rows), generator=generator)[: len(rows) // 2]]] = True
    guess_T = torch.zeros(len(loss_T), dtype=torch.bool)
    for judged_T in (half_T, ~half_T):
        chosen_on = loss_T[~judged_T & is_member_T], loss_T[~judged_T & ~is_member_T]
        guess_T[judged_T] = loss_T[judged_T] <= best_threshold(*chosen_on)
    return guess_T
