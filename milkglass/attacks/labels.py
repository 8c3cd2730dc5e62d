"""Which label a record has, for a party that must not know: from the gradients it is sent, or from its own activations.

Legend: T rows of a training, k of them with a known label, D values a row, K classes.

Li et al. 2021, "Label leakage and protection in two-party split learning" (arXiv 2102.08504), two classes: the gradient
of a record is (p - y) times a vector that hardly differs between records, so its norm tells the rarer label and its
direction, against that of one record whose label is known, tells both. Here for K classes: the nearest known direction.
Fu et al. 2022, "Label inference attacks against vertical federated learning" (USENIX Security): a head on the party's
own, trained stage, fitted to a few labels.
"""

from __future__ import annotations

import time
import warnings
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from milkglass.attacks.base import Method, Tick, silent
from milkglass.attacks.features import flat
from milkglass.errors import AuditError, MissingKnowledgeError
from milkglass.transcript import Known, LabelView

SMALLEST_NORM: Final = 1e-30
"""Gradient norms are held above this before the logarithm."""
SURE_AT: Final = 0.9
"""The least probability of a guessed label that model completion takes for true in its next round."""


@dataclass(frozen=True)
class LabelScores:
    """A score (T, K) for every row and class, the guess being the highest; all finite, higher = more likely."""

    scores_TK: Tensor
    seconds: float


class LabelAttack(Method):
    """A guess of the labels of a training's rows, the known ones too, which an audit leaves out. Subclasses are final.

    open_door, closed_door: the least area under the ROC curve where the gradient is that of the logits, and what the
    low end of its interval may be at most where the rows are others'.
    """

    knows: ClassVar[tuple[Known, ...]] = ("gradients", "some labels")
    open_door: ClassVar[float] = 0.9
    closed_door: ClassVar[float] = 0.5

    def attack(self, view: LabelView, tick: Tick = silent) -> LabelScores:
        """Score every class for every row.

        Raises MissingKnowledgeError where the view has too few known labels for this attack, and AuditError for values
        that are not finite.
        """
        start = time.perf_counter()
        for what, tensor in (("gradients", view.gradients), ("activations", view.activations)):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise AuditError(f"label view: {what}: not all values are finite (NaN or infinity)")
        scores_TK = self._scores(view)
        tick(1, 1)
        return LabelScores(scores_TK, time.perf_counter() - start)

    @abstractmethod
    def _scores(self, view: LabelView) -> Tensor: ...

    def _needs(self, view: LabelView, classes: range) -> None:
        """Raise MissingKnowledgeError unless each of the classes has a known row."""
        missing = sorted(set(classes) - set(view.known_labels.tolist()))
        if missing:
            raise MissingKnowledgeError(
                f"attack {self.name!r} needs a row of known label for class {', '.join(map(str, missing))}; "
                "the view has none"
            )


@final
class GradientNorm(LabelAttack):
    """How near the logarithm of a row's gradient norm lies to the mean of each class's known rows.

    For two classes that ranks rows by their norm, as Li et al. do. With no known row of both, class 1 is taken for the
    rarer one, whose gradients are the larger, and the median norm for the border.
    """

    name: ClassVar[str] = "gradient norm"
    paper: ClassVar[str] = "Li et al., arXiv 2102.08504"
    open_door: ClassVar[float] = 0.5  # of ten balanced classes a norm tells little; for two see its tests

    def __repr__(self) -> str:
        return "GradientNorm()"

    def _scores(self, view: LabelView) -> Tensor:
        log_T = flat(view.gradients).norm(dim=1).clamp_min(SMALLEST_NORM).log()
        if view.classes == 2 and len(set(view.known_labels.tolist())) < 2:
            above_T = log_T - log_T.median()
            return torch.stack([-above_T, above_T], dim=1)
        self._needs(view, range(view.classes))
        mean_K = torch.stack([log_T[view.known_rows[view.known_labels == k]].mean() for k in range(view.classes)])
        distance_TK: Tensor = (log_T[:, None] - mean_K).square()
        return -distance_TK


@final
class GradientDirection(LabelAttack):
    """The cosine of a row's gradient with the nearest known one of each class.

    For two classes a known row of class 1 is enough: the score of class 0 is then minus that of class 1.
    """

    name: ClassVar[str] = "gradient direction"
    paper: ClassVar[str] = "Li et al., arXiv 2102.08504"

    def __repr__(self) -> str:
        return "GradientDirection()"

    def _scores(self, view: LabelView) -> Tensor:
        unit_TD = F.normalize(flat(view.gradients), dim=1, eps=SMALLEST_NORM)

        def nearest_one(label: int) -> Tensor:
            """The largest cosine of each row with a known one of that label: (T,)."""
            return (unit_TD @ unit_TD[view.known_rows[view.known_labels == label]].T).amax(1)

        if view.classes == 2 and 0 not in view.known_labels:
            self._needs(view, range(1, 2))
            return torch.stack([-nearest_one(1), nearest_one(1)], dim=1)
        self._needs(view, range(view.classes))
        return torch.stack([nearest_one(label) for label in range(view.classes)], dim=1)


@final
class ModelCompletion(LabelAttack):
    """Logistic regression from the party's own activations to the label, completed with its own sure guesses.

    rounds: how often the rows whose label is guessed with a probability of at least .9 join the known ones; 0 = the few
    known labels alone. Fu et al. train a perceptron with MixMatch instead; their malicious optimizer is not here.
    """

    name: ClassVar[str] = "model completion"
    paper: ClassVar[str] = "Fu et al., USENIX Security 2022"
    knows: ClassVar[tuple[Known, ...]] = ("records", "some labels")

    def __init__(self, rounds: int = 3) -> None:
        if rounds < 0:
            raise AuditError(f"model completion: rounds = {rounds}; expected 0 or more")
        self._rounds = rounds

    def __repr__(self) -> str:
        return f"ModelCompletion(rounds={self._rounds})"

    def _scores(self, view: LabelView) -> Tensor:
        if view.activations is None:
            raise MissingKnowledgeError(f"attack {self.name!r} needs the party's own activations; the view has none")
        self._needs(view, range(view.classes))
        x_TD = flat(view.activations)
        x_TD = F.normalize(x_TD - x_TD.mean(0), dim=1, eps=SMALLEST_NORM) * x_TD.shape[1] ** 0.5
        rows_k, labels_k = view.known_rows, view.known_labels
        for _ in range(self._rounds):
            sure_T, guess_T = _log_probabilities(x_TD, rows_k, labels_k).exp().max(1)
            sure_T[view.known_rows] = 0.0  # what is known is known
            more_k = (sure_T >= SURE_AT).nonzero()[:, 0]
            rows_k = torch.cat([view.known_rows, more_k])
            labels_k = torch.cat([view.known_labels, guess_T[more_k]])
        return _log_probabilities(x_TD, rows_k, labels_k)


def _log_probabilities(x_TD: Tensor, rows_k: Tensor, labels_k: Tensor) -> Tensor:
    """(T, K) of a class-balanced logistic regression fitted on these rows."""
    model = LogisticRegression(class_weight="balanced")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x_TD[rows_k].numpy(), labels_k.numpy())
    scores = torch.from_numpy(model.decision_function(x_TD.numpy()))
    if scores.ndim == 1:
        scores = torch.stack([torch.zeros_like(scores), scores], dim=1)
    return scores.log_softmax(1)
