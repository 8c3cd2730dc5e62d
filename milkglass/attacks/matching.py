"""The matching game: which of N candidate records was sent? The likelihood of each, by who knows the client's weights.

Legend: T targets, N candidates, R releases of one record, D activation values.

By the Neyman and Pearson lemma (1933) no test between two candidates beats their likelihood ratio. For Gaussian noise
the likelihood is a squared distance in the space of the activations, and the mean of several releases holds all that
they tell. It needs no search, so unlike an inversion it cannot fail for want of a good optimizer: if it is at chance
among records the attacker can name, the activations do not tell these records apart.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from milkglass.attacks.base import Method, Tick, silent
from milkglass.attacks.features import flat
from milkglass.attacks.likelihood import sent_for
from milkglass.errors import AuditError
from milkglass.transcript import Known, View

CANDIDATES_AT_ONCE: Final = 256


@dataclass(frozen=True, eq=False)
class Matching:
    """scores_TN: log-likelihood of each target's activations under each candidate, in nats, up to a constant.

    Minus the squared distance where no noise is added. Higher = more likely. seconds: to compute them.
    """

    scores_TN: Tensor
    seconds: float

    def top1(self, row_of_T: Tensor) -> float:
        """Share (0..1) of targets whose most likely candidate is the right one, `row_of_T` (T,). Chance = 1 / N.

        A tie goes to the candidate that comes first.
        """
        if row_of_T.shape != self.scores_TN.shape[:1]:
            raise AuditError(
                f"matching: right rows of shape {tuple(row_of_T.shape)}; expected {tuple(self.scores_TN.shape[:1])}"
            )
        return (self.scores_TN.argmax(1) == row_of_T).to(torch.float64).mean().item()


@final
class MatchingGame(Method):
    """Which candidate was sent, by the likelihood of the activations under Gaussian noise.

    open_door and closed_door are shares of targets matched, over chance, among a hundred candidates or more: all of
    them where the record crosses as it is, none beyond chance on releases of other records.
    """

    name: ClassVar[str] = "matching game"
    knows: ClassVar[tuple[Known, ...]] = ("client weights",)
    paper: ClassVar[str] = "Neyman and Pearson 1933"

    def __repr__(self) -> str:
        return "MatchingGame()"

    def attack(self, view: View, candidates: Tensor, tick: Tick = silent) -> Matching:
        """Score `candidates` (N, ...), records as the known ones, for every target of the view.

        Memory is bounded by T x N scores and 256 candidates at a time. Raises AuditError for candidates of another
        shape, and MissingKnowledgeError without the client's weights.
        """
        start = time.perf_counter()
        self.check(view)
        shape = view.known.records.shape[1:]
        if not len(candidates) or candidates.shape[1:] != shape:
            raise AuditError(
                f"matching: candidates of shape {tuple(candidates.shape)}; expected (N, {', '.join(map(str, shape))})"
            )
        z_TD, releases = _mean_release(view)
        middle_D = z_TD.mean(0)
        z_TD = z_TD - middle_D  # large numbers that all have in common would cost digits
        squares_T1 = z_TD.square().sum(1, keepdim=True)
        parts, done = [], 0
        for part in torch.split(candidates, CANDIDATES_AT_ONCE):
            with torch.no_grad():
                sent_ND = sent_for(view, part, z_TD.shape[1]).to(torch.float64) - middle_D
            parts.append((squares_T1 + sent_ND.square().sum(1) - 2 * z_TD @ sent_ND.T).clamp_min_(0))
            tick(done := done + len(part), len(candidates))
        sigma = view.knowledge.noise_sigma
        factor = releases / (2 * sigma**2) if sigma > 0 else 1.0
        return Matching(-factor * torch.cat(parts, dim=1), time.perf_counter() - start)


def _mean_release(view: View) -> tuple[Tensor, int]:
    """The targets' activations (T, D) in float64, averaged over their releases, and how many there were."""
    repeats = view.target.repeats
    if repeats is None:
        return flat(view.target.activations), 1
    return flat(repeats.to(torch.float64).mean(0)), len(repeats)
