"""Whether a record was trained on: from what the trained client sends for it, its label, and the attacker's records.

Legend: T candidates, N outsiders (the attacker's own records, never trained on), D values, K classes, B batch.

The game: the attacker gets the activations and the label of a candidate, and says how likely it was trained on. The
outsiders are scored as candidates are, so that a threshold can be set on them: where an attack is fitted on outsiders,
each of them is scored by a fit without it, and each candidate by one such fit too, never by an average of several.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.attacks.base import Method, Tick, silent
from milkglass.attacks.features import flat
from milkglass.errors import AuditError, MissingKnowledgeError
from milkglass.leakage.classification import check_classes
from milkglass.randomness import drawing_from, public_source
from milkglass.transcript import MINIMUM_PAIRS, Known, MembershipView, View

BATCH: Final = 64
SCORED_AT_ONCE: Final = 512
LEARNING_RATE: Final = 1e-3
FOLDS: Final = 5
SMALLEST_SQUARE: Final = 1e-12
ABSENT: Final = -1e9
"""The logit of a class that no outsider of a fit has."""


@dataclass(frozen=True)
class MembershipScores:
    """Of the candidates (T,) and the outsiders (N,), float64; higher = rather trained on. Only their order counts."""

    candidates_T: Tensor
    outsiders_N: Tensor
    seconds: float


class MembershipAttack(Method):
    """A score for each candidate. Subclasses are final.

    open_door: the least area under the ROC curve on a small network that knows by heart its members' labels, of which
    half could not be guessed. closed_door: the most that the low end of the area's interval may be on a network that
    never saw them.
    """

    open_door: ClassVar[float] = 0.6
    closed_door: ClassVar[float] = 0.5

    @abstractmethod
    def attack(self, view: MembershipView, tick: Tick = silent) -> MembershipScores:
        """Score the candidates and the outsiders.

        Raises MissingKnowledgeError where the view lacks what this attack must know, and AuditError for fewer than 8
        outsiders, for labels out of range, and for values that are not finite.
        """

    def _checked(self, view: MembershipView) -> tuple[Tensor, Tensor]:
        """The labels of the candidates (T,) and of the outsiders (N,)."""
        self.check(View(view.outsiders, view.outsiders, view.candidates, knowledge=view.knowledge))
        labels_T, labels_N = view.candidates.labels, view.outsiders.labels
        if labels_T is None or labels_N is None:
            raise MissingKnowledgeError(f"attack {self.name!r} needs labels; the view has none")
        if len(labels_N) < MINIMUM_PAIRS:
            raise AuditError(f"membership: {len(labels_N)} outsiders; expected at least {MINIMUM_PAIRS}")
        for what, part, labels in (
            ("candidates", view.candidates, labels_T),
            ("outsiders", view.outsiders, labels_N),
        ):
            check_classes(f"membership: labels of the {what}", labels)
            if not bool(torch.isfinite(part.activations).all()):
                raise AuditError(f"membership: activations of the {what}: not all values are finite (NaN or infinity)")
        return labels_T, labels_N


@final
class LossThreshold(MembershipAttack):
    """The cross-entropy of the server's answer, lower = rather a member: what was trained on is fitted better.

    Yeom et al. 2018 (arXiv 1709.01604), who set the threshold at the mean training loss; here the audit sets it. The
    score is a falling function of that loss: log(p / (1 - p)), which does not round to 0 where p is near 1.
    """

    name: ClassVar[str] = "loss threshold"
    paper: ClassVar[str] = "Yeom et al., CSF 2018"
    knows: ClassVar[tuple[Known, ...]] = ("pairs", "labels", "server weights")

    def __repr__(self) -> str:
        return "LossThreshold()"

    def attack(self, view: MembershipView, tick: Tick = silent) -> MembershipScores:
        """See MembershipAttack."""
        start = time.perf_counter()
        self._checked(view)
        scores_T, scores_N = _answers(view)
        tick(1, 1)
        return MembershipScores(scores_T, scores_N, time.perf_counter() - start)


@final
class ClassDistance(MembershipAttack):
    """On the shared activations alone, no server: how much nearer they lie to their own class than to the others.

    The log odds of the candidate's label under linear discriminant analysis: one Gaussian a class
    about its mean among the outsiders, one covariance for all, shrunk after Chen et al. 2010. A client that was
    fitted to its members draws them to their own class, outliers and wrong labels too. Five folds of the outsiders.
    Ours; the idea that distances to classes tell members is in the metric attacks that Song and Mittal 2021 (arXiv
    2003.10595) compare.
    """

    name: ClassVar[str] = "class distance"
    paper: ClassVar[str] = "after Song and Mittal, arXiv 2003.10595"
    knows: ClassVar[tuple[Known, ...]] = ("pairs", "labels")

    open_door: ClassVar[float] = 0.55

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def __repr__(self) -> str:
        return f"ClassDistance(seed={self._seed})"

    def attack(self, view: MembershipView, tick: Tick = silent) -> MembershipScores:
        """See MembershipAttack."""
        start = time.perf_counter()
        labels_T, labels_N = self._checked(view)
        z_TD, z_ND = flat(view.candidates.activations), flat(view.outsiders.activations)
        classes = 1 + int(max(labels_T.max(), labels_N.max()))
        source = public_source(self._seed).derive("class distance")
        fold_T, fold_N = (
            torch.randperm(len(labels), generator=source.generator(who)) % FOLDS
            for who, labels in (("candidates", labels_T), ("outsiders", labels_N))
        )
        scores_T, scores_N = torch.zeros(len(z_TD), dtype=torch.float64), torch.zeros(len(z_ND), dtype=torch.float64)
        for fold in range(FOLDS):
            fitted = fold_N != fold
            weights_DK, bias_K = _discriminant(z_ND[fitted], labels_N[fitted], classes)
            for scores, z, labels, of in ((scores_T, z_TD, labels_T, fold_T), (scores_N, z_ND, labels_N, fold_N)):
                here = of == fold
                scores[here] = _logit_confidence(z[here] @ weights_DK + bias_K, labels[here])
            tick(fold + 1, FOLDS)
        return MembershipScores(scores_T, scores_N, time.perf_counter() - start)


@final
class Lira(MembershipAttack):
    """Likelihood ratio, offline: how much surer of the label the server is than shadow networks that did not see it.

    Carlini et al. 2022 (arXiv 2112.03570). Each pair of shadow networks is trained on the two halves of a random
    division of the outsiders; an outsider is judged by the `shadows` / 2 of them that were not trained on it, and a
    candidate by as many, one drawn of each pair. Score: the logit-scaled confidence under the server, less what is
    expected of a non-member. In the paper that is the mean under these shadows; here it is the straight line of that
    mean which fits the outsiders best, since the network under attack had more records, and other settings, than its
    shadows. The Gaussian's spread is taken as one for all, as the paper does with few shadow models, and one spread
    does not change the order.

    Where the view holds the candidates' records, a shadow is both stages, trained on the outsiders' records, without
    defense. Where it does not, it is a server's stage trained on what the real client sends for the outsiders: the
    client's own memory of its members is then on both sides and cancels out in part.
    """

    name: ClassVar[str] = "lira"
    paper: ClassVar[str] = "Carlini et al., S&P 2022"
    knows: ClassVar[tuple[Known, ...]] = ("pairs", "labels", "architecture", "server weights")
    open_door: ClassVar[float] = 0.7

    def __init__(self, shadows: int = 16, epochs: int = 20, seed: int = 0) -> None:
        if shadows < 2 or shadows % 2 or epochs < 1:
            raise AuditError(f"lira: shadows = {shadows}, epochs = {epochs}; expected 2, 4, 6, ... and at least 1")
        self._shadows, self._epochs, self._seed = shadows, epochs, seed

    def __repr__(self) -> str:
        return f"Lira(shadows={self._shadows}, epochs={self._epochs}, seed={self._seed})"

    def attack(self, view: MembershipView, tick: Tick = silent) -> MembershipScores:
        """See MembershipAttack."""
        start = time.perf_counter()
        labels_T, labels_N = self._checked(view)
        x_T = view.candidates.activations if view.records is None else view.records
        x_N = view.outsiders.activations if view.records is None else view.outsiders.records
        found_T, found_N = _answers(view)
        mean_T, mean_N = torch.zeros_like(found_T), torch.zeros_like(found_N)
        source = public_source(self._seed).derive("lira")
        for shadow in range(self._shadows):
            draws = source.derive("division", shadow // 2)
            in_N = torch.randperm(len(labels_N), generator=draws.generator("outsiders")) % 2 == shadow % 2
            in_T = torch.randperm(len(labels_T), generator=draws.generator("candidates")) % 2 == shadow % 2
            network = self._trained(view, x_N[in_N], labels_N[in_N], source.generator("shadow", shadow))
            for mean, x, labels, inside in ((mean_T, x_T, labels_T, in_T), (mean_N, x_N, labels_N, in_N)):
                confidence = _logit_confidence(_logits(network, x[~inside]), labels[~inside])
                mean[~inside] += confidence / (self._shadows // 2)
            tick(shadow + 1, self._shadows)
        moved_N = mean_N - mean_N.mean()
        slope = (moved_N @ found_N / moved_N.square().sum().clamp_min(SMALLEST_SQUARE)).item()
        return MembershipScores(found_T - slope * mean_T, found_N - slope * mean_N, time.perf_counter() - start)

    def _trained(self, view: MembershipView, x_N: Tensor, labels_N: Tensor, generator: torch.Generator) -> nn.Module:
        architecture = view.knowledge.architecture
        assert architecture is not None  # _checked
        bottom, top = architecture(generator)
        network = (top if view.records is None else nn.Sequential(bottom, top)).train()
        optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
        with drawing_from(generator):  # dropout
            for _ in range(self._epochs):
                for rows_B in torch.split(torch.randperm(len(x_N)), BATCH):
                    if len(rows_B) == 1:  # BatchNorm needs two
                        continue
                    loss = F.cross_entropy(network(x_N[rows_B]), labels_N[rows_B])
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
        return network.eval()


def _answers(view: MembershipView) -> tuple[Tensor, Tensor]:
    """The server's log odds of the right label, for the candidates (T,) and the outsiders (N,)."""
    server, found = view.knowledge.server, []
    assert server is not None  # _checked
    for what, part in (("candidates", view.candidates), ("outsiders", view.outsiders)):
        logits_NK = _logits(server, part.activations)
        assert part.labels is not None  # _checked
        check_classes(f"membership: labels of the {what}", part.labels, logits_NK.shape[1])
        found.append(_logit_confidence(logits_NK, part.labels))
    return found[0], found[1]


@torch.no_grad()
def _logits(network: nn.Module, x_N: Tensor) -> Tensor:
    return torch.cat([network(part) for part in torch.split(x_N, SCORED_AT_ONCE)]).to(torch.float64)


def _logit_confidence(logits_NK: Tensor, labels_N: Tensor) -> Tensor:
    """log(p / (1 - p)) of the label's probability p, which is about bell-shaped over shadow networks: (N,)."""
    is_label_NK = F.one_hot(labels_N, logits_NK.shape[1]).bool()
    others_N = logits_NK.masked_fill(is_label_NK, -torch.inf).logsumexp(1)
    return logits_NK[is_label_NK] - others_N


def _discriminant(z_ND: Tensor, labels_N: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Linear discriminant analysis: (D, K) and (K,), activations -> logits. A class that is not there gets ABSENT."""
    present_P, of_N, count_P = torch.unique(labels_N, return_inverse=True, return_counts=True)
    mean_PD = torch.zeros(len(present_P), z_ND.shape[1], dtype=torch.float64).index_add_(0, of_N, z_ND)
    mean_PD /= count_P[:, None]
    weights_DP = _solved_by_shrunk_covariance(z_ND - mean_PD[of_N], mean_PD.T)
    weights_DK = torch.zeros(z_ND.shape[1], classes, dtype=torch.float64)
    bias_K = torch.full((classes,), ABSENT, dtype=torch.float64)
    weights_DK[:, present_P] = weights_DP
    bias_K[present_P] = (count_P / len(z_ND)).log() - 0.5 * (mean_PD * weights_DP.T).sum(1)
    return weights_DK, bias_K


def _solved_by_shrunk_covariance(centered_ND: Tensor, means_DP: Tensor) -> Tensor:
    """The covariance's inverse times `means_DP`, (D, P); the covariance is shrunk towards a multiple of the identity.

    Oracle approximating shrinkage; scikit-learn has it, at several times the cost of the one product that it takes. By
    the smaller of the two products, (D, D) or (N, N) and the Woodbury identity: D may be in the hundred thousands.
    """
    count, width = centered_ND.shape
    wide = width > count
    product = centered_ND @ centered_ND.T if wide else centered_ND.T @ centered_ND
    mean, square = product.trace().item() / count / width, product.square().sum().item() / (count * width) ** 2
    over = (count + 1) * (square - mean**2 / width)
    share = min(1.0, (square + mean**2) / over) if over > 0 else 1.0
    within, floor = (1 - share) / count, share * mean + 1e-9 * mean or 1.0  # no spread at all: any multiple will do
    factor = torch.linalg.cholesky(within * product + floor * torch.eye(len(product), dtype=product.dtype))
    if not wide:
        return torch.cholesky_solve(means_DP, factor)
    inner_NP = torch.cholesky_solve(centered_ND @ means_DP, factor)
    solved_DP: Tensor = (means_DP - within * centered_ND.T @ inner_NP) / floor
    return solved_DP
