"""Which sensitive attribute a record has: probes on what crossed, fitted on the attacker's own records.

Legend: N known or validation pairs, T targets, F features, G values of the attribute, B batch.

Song and Shmatikov 2020, "Overlearning reveals sensitive attributes" (arXiv 1905.11742): a network trained for one task
sends what tells another. They fit one network to activations; here a linear probe (Alain and Bengio 2016, arXiv
1610.01644) and a small perceptron, both with every value of the attribute weighing the same, so that a rare one
counts. They see the entitled values as well (attacks/features.py, both scalings); `answer_alone(view)` gives what these
tell without any activation.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.attacks.base import Method, Tick, silent
from milkglass.attacks.features import features
from milkglass.errors import AuditError, nearest
from milkglass.leakage.classification import balanced_accuracy, check_classes
from milkglass.randomness import drawing_from, public_source
from milkglass.transcript import View

INVERSE_PENALTIES: Final = tuple(10.0**power for power in range(-5, 1))
"""What the linear probe tries, strongest penalty first, each from the weights of the one before, until two in a row do
no better than the best."""
ITERATIONS: Final = 50
BATCH: Final = 64
LEARNING_RATE: Final = 2e-3
PATIENCE: Final = 8
"""The perceptron's training ends when this many epochs in a row were no better than the best."""


@dataclass(frozen=True)
class AttributeGuess:
    """The attribute's guessed values of the validation records (N,) and of the target's (T,), int64; note as in
    Reconstruction."""

    validation_N: Tensor
    target_T: Tensor
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class _Rows:
    """Features (N, F), (N, F), (T, F), float32 with coordinates of spread 1 on average, and attributes (N,), (N,)."""

    known_NF: Tensor
    validation_NF: Tensor
    target_TF: Tensor
    known_N: Tensor
    validation_N: Tensor

    def accuracy(self, guess_N: Tensor) -> float:
        """Of a guess of the validation records' attribute: what settings are chosen by."""
        return balanced_accuracy(guess_N, self.validation_N)


class AttributeProbe(Method):
    """A classifier from what crossed to a named attribute. Subclasses are final.

    open_door, closed_door: the least balanced accuracy over its prior where the record crosses, for an attribute that
    it tells of, and what the low end of its interval may be at most on releases of other records.
    """

    paper: ClassVar[str] = "Song and Shmatikov, ICLR 2020"
    open_door: ClassVar[float] = 0.3
    closed_door: ClassVar[float] = 0.0

    @abstractmethod
    def attack(self, view: View, attribute: str, tick: Tick = silent) -> AttributeGuess:
        """Guess the attribute of the validation and the target records from `view.known.attributes[attribute]`.

        Raises AuditError where the view's pairs do not have it, or only one value of it.
        """


@final
class LinearProbe(AttributeProbe):
    """Multinomial logistic regression; scaling and penalty do best on validation records by balanced accuracy."""

    name: ClassVar[str] = "linear probe"

    def __repr__(self) -> str:
        return "LinearProbe()"

    def attack(self, view: View, attribute: str, tick: Tick = silent) -> AttributeGuess:
        """See AttributeProbe."""

        def fit(rows: _Rows, done: Callable[[], None]) -> tuple[float, Callable[[Tensor], Tensor]]:
            model = LogisticRegression(class_weight="balanced", warm_start=True, max_iter=ITERATIONS)
            best, worse = (-1.0, model), 0
            for inverse in INVERSE_PENALTIES:
                model.set_params(C=inverse)
                with warnings.catch_warnings():  # weights that have not settled are a probe all the same
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    model.fit(rows.known_NF.numpy(), rows.known_N.numpy())
                here = rows.accuracy(torch.from_numpy(model.predict(rows.validation_NF.numpy())))
                done()
                if here > best[0]:
                    best, worse = (here, copy.deepcopy(model)), 0
                    continue
                worse += 1
                if worse == 2:
                    break
            accuracy, chosen = best
            return accuracy, lambda x_NF: torch.from_numpy(chosen.predict(x_NF.numpy()))

        return _best_of_scalings(view, attribute, fit, _counter(tick, 2 * len(INVERSE_PENALTIES)))


@final
class MlpProbe(AttributeProbe):
    """Perceptron with one hidden layer; scaling and epoch do best on validation records by balanced accuracy."""

    name: ClassVar[str] = "mlp probe"

    def __init__(self, width: int = 64, epochs: int = 30, seed: int = 0) -> None:
        if width < 1 or epochs < 1:
            raise AuditError(f"mlp probe: width = {width}, epochs = {epochs}; expected at least 1 of each")
        self._width, self._epochs, self._seed = width, epochs, seed

    def __repr__(self) -> str:
        return f"MlpProbe(width={self._width}, epochs={self._epochs}, seed={self._seed})"

    def attack(self, view: View, attribute: str, tick: Tick = silent) -> AttributeGuess:
        """See AttributeProbe."""

        def fit(rows: _Rows, done: Callable[[], None]) -> tuple[float, Callable[[Tensor], Tensor]]:
            return _train(rows, self._width, self._epochs, self._seed, done)

        return _best_of_scalings(view, attribute, fit, _counter(tick, 2 * self._epochs))


Fit = Callable[[_Rows, Callable[[], None]], tuple[float, Callable[[Tensor], Tensor]]]
"""(rows, called after each step) -> balanced accuracy on validation records, and features (N, F) -> guesses (N,)."""


def _best_of_scalings(view: View, attribute: str, fit: Fit, done: Callable[[], None]) -> AttributeGuess:
    start = time.perf_counter()
    known_N, validation_N = _attribute(view, attribute)
    best: tuple[float, Tensor, Tensor] | None = None
    for by_coordinate in (False, True):
        seen = features(view, by_coordinate)
        unit = math.sqrt(seen.known_NF.shape[1])
        rows = _Rows(
            known_NF=(unit * seen.known_NF).float(),
            validation_NF=(unit * seen.validation_NF).float(),
            target_TF=(unit * seen.target_TF).float(),
            known_N=known_N,
            validation_N=validation_N,
        )
        accuracy, guess = fit(rows, done)
        if best is None or accuracy > best[0]:
            best = accuracy, guess(rows.validation_NF), guess(rows.target_TF)
    assert best is not None
    return AttributeGuess(best[1], best[2], time.perf_counter() - start)


def _attribute(view: View, attribute: str) -> tuple[Tensor, Tensor]:
    """Its values of the known and the validation records."""
    values = []
    for name, pairs in (("known", view.known), ("validation", view.validation)):
        if attribute not in pairs.attributes:
            hint = nearest(attribute, pairs.attributes)
            raise AuditError(f"attribute {attribute!r}: the {name} pairs do not have it; {hint or 'they have none'}")
        check_classes(f"attribute {attribute!r} of the {name} pairs", pairs.attributes[attribute])
        values.append(pairs.attributes[attribute].long())
    if len(set(values[0].tolist())) < 2:
        raise AuditError(f"attribute {attribute!r}: the known pairs have one value of it only; expected at least two")
    return values[0], values[1]


def _train(
    rows: _Rows, width: int, epochs: int, seed: int, done: Callable[[], None]
) -> tuple[float, Callable[[Tensor], Tensor]]:
    source = public_source(seed).derive("mlp probe")
    value_G, of_N, count_G = torch.unique(rows.known_N, return_inverse=True, return_counts=True)
    weight_G = len(of_N) / (len(count_G) * count_G.float())
    with drawing_from(source.generator("weights")):
        network = nn.Sequential(nn.Linear(rows.known_NF.shape[1], width), nn.GELU(), nn.Linear(width, len(value_G)))
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    order = source.generator("batches")

    def guess_by(network: nn.Module) -> Callable[[Tensor], Tensor]:
        @torch.no_grad()
        def guess(x_NF: Tensor) -> Tensor:
            guess_N: Tensor = value_G[network(x_NF).argmax(1)]
            return guess_N

        return guess

    best, best_accuracy, worse = copy.deepcopy(network), rows.accuracy(guess_by(network)(rows.validation_NF)), 0
    for _ in range(epochs):
        for rows_B in torch.split(torch.randperm(len(of_N), generator=order), BATCH):
            loss = F.cross_entropy(network(rows.known_NF[rows_B]), of_N[rows_B], weight=weight_G)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        done()
        here = rows.accuracy(guess_by(network)(rows.validation_NF))
        if here > best_accuracy:
            best, best_accuracy, worse = copy.deepcopy(network), here, 0
        else:
            worse += 1
            if worse == PATIENCE:
                break
    return best_accuracy, guess_by(best)


def _counter(tick: Tick, total: int) -> Callable[[], None]:
    """Calls `tick` with one step more each time."""
    steps = iter(range(1, total + 1))
    return lambda: tick(next(steps), total)
