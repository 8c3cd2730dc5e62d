"""A client's test for a hostile server: do its gradients depend on the labels?

After SplitGuard (Erdogan, Kupcu and Cicek, arXiv 2108.09052); where we differ stands at `hijack_value`.

Legend: B records in a batch, D values of an activation, K classes; `...` is any shape.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self, final

import torch
from torch import Tensor

from milkglass.errors import HijackError
from milkglass.randomness import Source

SCORES_JUDGED: Final = 3
"""The guard judges the mean of so many last scores: one batch alone accuses nobody."""
_STEEPNESS: Final = 2.5
_BATCHES_REMEMBERED: Final = 4.0  # of the mislabeled ones: gradients change as a network learns, so old ones fade
_GROUPS: Final = ("fake", "first", "second")


@dataclass(frozen=True)
class Gathered:
    """The gradients of several batches, older ones counting less.

    sum_KD: a batch's mean gradient, split by the records' *true* class, summed over batches. weight: how many they are.
    """

    sum_KD: Tensor
    weight: float

    @classmethod
    def of(cls, dz: Tensor, y_B: Tensor, classes: int) -> Self:
        """One batch: its gradients (B, ...), as a loss averaged over the batch gives them, and its true labels."""
        dz_BD = dz.flatten(1)
        return cls(dz_BD.new_zeros(classes, dz_BD.shape[1]).index_add_(0, y_B, dz_BD), 1.0)

    def distance(self, other: Gathered) -> float:
        """The Euclidean distance of the means over batches."""
        return float((self.sum_KD / self.weight - other.sum_KD / other.weight).norm())

    def faded(self, factor: float) -> Gathered:
        """The same, each batch counting `factor` of what it did."""
        return Gathered(self.sum_KD * factor, self.weight * factor)

    def with_(self, other: Gathered) -> Gathered:
        """Both together."""
        return Gathered(self.sum_KD + other.sum_KD, self.weight + other.weight)


def angle(a: Tensor, b: Tensor) -> float:
    """The angle between two tensors of one shape, as vectors, in radians, 0 to pi; 0 where one of them is all zeros."""
    a, b = a.flatten().double(), b.flatten().double()
    norms = a.norm() * b.norm()
    return 0.0 if norms == 0 else math.acos(max(-1.0, min(1.0, float(a @ b / norms))))


def hijack_value(fake: Gathered, first: Gathered, second: Gathered) -> float:
    """How much more gradients on mislabeled batches differ from honest ones than honest ones among themselves, radians.

    After Erdogan, Kupcu and Cicek (SplitGuard, arXiv 2108.09052): F are the gradients on mislabeled batches, R those on
    honest ones, R1 and R2 a random split of these, theta(A, B) the angle between sums:

        (theta(F, R) d(F, R) - theta(R1, R2) d(R1, R2)) / (d(F, R) + d(R1, R2))

    Towards pi: labels decide, as with an honest server. About 0: they do not matter. We differ in two ways, so that a
    server that has not learned anything yet is not accused. Gradients are summed by true class: an honest server's turn
    round on a mislabeled batch from the first step on, where sums over a batch of many classes tell little. And d is
    the distance of the means, not the difference of mean lengths, which are alike before a network has learned.
    """
    regular = first.with_(second)
    d_fake, d_regular = fake.distance(regular), first.distance(second)
    if d_fake + d_regular == 0:
        return 0.0
    theta_fake = angle(fake.sum_KD, regular.sum_KD)
    theta_regular = angle(first.sum_KD, second.sum_KD)
    return (theta_fake * d_fake - theta_regular * d_regular) / (d_fake + d_regular)


def hijack_score(value: float) -> float:
    """`hijack_value` between 0 and 1 (a logistic curve, as in the paper, with a steepness of ours). Higher = honest."""
    return 1 / (1 + math.exp(-_STEEPNESS * value))


@final
class HijackGuard:
    """Sends some batches with wrong labels, and stops where the gradients do not tell them from honest ones.

    The client never learns from such a batch. Which ones they are, and their labels, follow from `source`, which must
    be private: a server that knew could behave on them. Gradients alone count; what else a server says is not used.
    It judges early, for a hijacker is told the labels and can let its gradients follow them: one with a critic for each
    class stayed below 0.9 for some two hundred batches only. And it does not see through a server that trains an honest
    network beside its own and answers with that one's gradients wherever labels look wrong (SplitSpy, arXiv
    2310.10483).

    classes: K. fake_share: of all batches after the first `warm_up` ones. threshold: for the mean of the last 3 scores.
    """

    def __init__(
        self, source: Source, classes: int, *, fake_share: float = 0.1, warm_up: int = 20, threshold: float = 0.9
    ) -> None:
        self._source = source
        self._classes = classes
        self._period = round(1 / fake_share)
        self._warm_up = warm_up
        self._threshold = threshold
        self._fading = math.exp(-1 / (_BATCHES_REMEMBERED * self._period))
        self._gathered: dict[str, Gathered] = {}
        self._scores: deque[float] = deque(maxlen=SCORES_JUDGED)
        self._alarm: str | None = None

    @property
    def score(self) -> float | None:
        """What is judged: the mean of the last 3 scores, 0 to 1, higher = honest; None until there are 3."""
        return sum(self._scores) / SCORES_JUDGED if len(self._scores) == SCORES_JUDGED else None

    @property
    def steps_to_judge(self) -> int:
        """After at most so many batches the server is judged for the first time (where `warm_up` is 2 or more)."""
        return self._warm_up + SCORES_JUDGED * self._period

    def mislabels(self, step: int) -> bool:
        """Whether the batch of this step goes out with wrong labels: one in each period, never two in a row."""
        block, position = divmod(step - self._warm_up, self._period)
        if block < 0:
            return False
        drawn = int.from_bytes(self._source.derive("which").read(8, block), "little")
        return position == 1 + drawn % (self._period - 1)

    def wrong_labels(self, step: int, y_B: Tensor) -> Tensor:
        """For each true label (B,) another class, drawn evenly."""
        generator = self._source.generator("labels", step)
        return (y_B + torch.randint(1, self._classes, y_B.shape, generator=generator)) % self._classes

    def observe(self, step: int, dz: Tensor, y_B: Tensor) -> None:
        """Take in what the server answered: gradients (B, ...) for records with the *true* labels (B,).

        Raises HijackError, once and for all, when the server no longer looks honest.
        """
        fake = self.mislabels(step)
        # of two honest batches in a row, one goes to each half, drawn: soon both hold some, and of the same time
        half = (step + self._source.derive("split").read(1, step // 2)[0]) % 2
        group = "fake" if fake else _GROUPS[1 + half]
        self._gathered = {name: gathered.faded(self._fading) for name, gathered in self._gathered.items()}
        batch = Gathered.of(dz, y_B, self._classes)
        self._gathered[group] = self._gathered[group].with_(batch) if group in self._gathered else batch
        if fake and len(self._gathered) == len(_GROUPS):
            self._scores.append(hijack_score(hijack_value(*(self._gathered[name] for name in _GROUPS))))
        if self.score is not None and self.score < self._threshold:
            self._alarm = (
                f"step {step}: the server's gradients hardly depend on the labels: score {self.score:.3f} over the "
                f"last {SCORES_JUDGED} mislabeled batches, expected at least {self._threshold:g}; it may be after the "
                "records, so nothing more is sent; ask who runs it before you go on from the last checkpoint"
            )
            self.check()

    def check(self) -> None:
        """Raise HijackError if the alarm was given: from then on nothing leaves, whoever caught the first error."""
        if self._alarm is not None:
            raise HijackError(self._alarm)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep: flat, named tensors."""
        state = {"scores": torch.tensor(list(self._scores), dtype=torch.float64)}
        for name, gathered in self._gathered.items():
            state[f"{name}.sum"] = gathered.sum_KD
            state[f"{name}.weight"] = torch.tensor(gathered.weight, dtype=torch.float64)
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken; an empty one, of a run that had no guard yet, begins anew."""
        self._scores = deque(state["scores"].tolist() if state else (), maxlen=SCORES_JUDGED)
        self._gathered = {
            name: Gathered(state[f"{name}.sum"].clone(), state[f"{name}.weight"].item())
            for name in _GROUPS
            if f"{name}.sum" in state
        }
