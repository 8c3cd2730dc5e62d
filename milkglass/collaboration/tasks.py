"""What a volunteer trains: a network, its records in random order, their loss, and a test that all volunteers share.

All volunteers of a recipe begin with the same weights, hold the same records and test on the same ones, for these
follow from the public seed; in which order each one takes its records is its own, private affair. So a network whose
forward in training moves anything but gradients is refused: averaged gradients keep the volunteers' weights equal, and
nothing keeps their running statistics equal.

Legend: B records in a batch, n record numbers, K classes; a trailing `...` is any shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.cuts import couples_records
from milkglass.errors import RecipeError, first_line
from milkglass.networks import build
from milkglass.randomness import drawing_from, public_source
from milkglass.recipe import Recipe
from milkglass.training.shares import deal_records
from milkglass.training.split import digest_of

ALBERT: Final = "albert"
"""The name of the network that reads a text."""
TEXT_SUFFIX: Final = ".txt"
TEST_BATCH: Final = 256


@final
@dataclass(frozen=True)
class Batch:
    """Records to train on. inputs (B, ...): what the network is given; targets (B, ...): what it should answer."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def split(self, size: int) -> Iterator[Batch]:
        """The same records in batches of `size`; the last one may have fewer."""
        for inputs, targets in zip(torch.split(self.inputs, size), torch.split(self.targets, size), strict=True):
            yield Batch(inputs, targets)


class Task(ABC):
    """What a volunteer trains. network: float32, drawn from the public seed. records: how many it trains on.

    digest: of the records, which stays here. agreement: what of its data all volunteers must have in common, in words.
    """

    network: nn.Module
    records: int
    digest: str
    agreement: str

    @abstractmethod
    def draw(self, generator: torch.Generator, size: int) -> Batch:
        """The next `size` records in a random order; every record once before any comes again.

        generator: the volunteer's private one. Call it outside of `drawing_from` of the same generator, which at its
        end would put back what was drawn here: every batch would be masked alike.
        """

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The mean loss of a batch's records, a scalar with its graph.

        Means of batches, weighted by their records, come to the mean of all. What the network itself draws (dropout)
        comes from torch's global generator: call it inside `drawing_from`.
        """

    @abstractmethod
    def test(self) -> dict[str, float]:
        """Measures by name on the fixed test records, `loss` and `accuracy` (0 to 1) among them; network unchanged."""


@final
class Passes:
    """Record numbers in random order, pass after pass: every one of `count` comes once before any comes again."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._left_n = torch.empty(0, dtype=torch.int64)

    def next(self, generator: torch.Generator, size: int) -> Tensor:
        """The next `size` record numbers (n,) int64; where a pass ends, `generator` draws the order of another."""
        while len(self._left_n) < size:
            self._left_n = torch.cat([self._left_n, torch.randperm(self._count, generator=generator)])
        taken_n, self._left_n = self._left_n[:size], self._left_n[size:]
        return taken_n


@final
class Classification(Task):
    """Pictures or rows of a table, and their classes: cross-entropy of any network that `networks.build` knows.

    Measures: `loss`, `accuracy`. Raises RecipeError for a network that volunteers cannot agree on, DataError for its
    records.
    """

    def __init__(self, recipe: Recipe) -> None:
        records, name = deal_records(recipe), recipe.network.name
        parts = records.train.values()
        self._train = Batch(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))
        self._test = Batch(records.test.x, records.test.y)
        self.records = len(self._train)
        self.digest = digest_of(records)
        self.agreement = f"records of shape {list(records.record_shape)}, {records.classes} classes"
        weights = public_source(recipe.seed).generator("weights")
        self.network = build(name, records.record_shape, records.classes, recipe.network.settings, weights)
        _check_volunteers_agree(name, self.network, self._train.inputs[:2])
        self._passes = Passes(self.records)

    def draw(self, generator: torch.Generator, size: int) -> Batch:
        numbers = self._passes.next(generator, size)
        return Batch(self._train.inputs[numbers], self._train.targets[numbers])

    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.network(batch.inputs), batch.targets)

    def test(self) -> dict[str, float]:
        loss_sum, right = 0.0, 0
        with evaluating(self.network):
            for batch in self._test.split(TEST_BATCH):
                logits_BK = self.network(batch.inputs)
                loss_sum += float(F.cross_entropy(logits_BK, batch.targets, reduction="sum"))
                right += int((logits_BK.argmax(dim=1) == batch.targets).sum())
        return {"loss": loss_sum / len(self._test), "accuracy": right / len(self._test)}


def task_of(recipe: Recipe) -> Task:
    """The task of a recipe: a text is for the network `albert`, and all other records are classified.

    Raises RecipeError, DataError; MissingExtraError where a text needs `milkglass[collab]`.
    """
    text = recipe.data.path if recipe.data.path and Path(recipe.data.path).suffix.lower() == TEXT_SUFFIX else None
    if recipe.network.name == ALBERT:
        from milkglass.collaboration.masked_language import MaskedLanguage  # it stands on this file

        if text is None:
            given = recipe.data.path or recipe.data.name or recipe.data.hub or "none"
            raise RecipeError(f"network {ALBERT!r} reads a text; data is {given}; expected data.path to end with .txt")
        return MaskedLanguage(recipe)
    if text is not None:
        raise RecipeError(f"data.path {text} is a text; network is {recipe.network.name!r}, expected {ALBERT!r}")
    return Classification(recipe)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Inside, the network evaluates and no graph is kept; afterwards every layer is in the mode it was in."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _check_volunteers_agree(name: str, network: nn.Module, x: Tensor) -> None:
    """Raise RecipeError for a network that volunteers who average gradients would not keep in common.

    x: two records (2, ...), on which it is tried out in training.
    """
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise RecipeError(f"network {name!r} has nothing to learn")
    other = next((key for key, value in network.named_parameters() if value.dtype != torch.float32), None)
    if other is not None:
        raise RecipeError(f"network {name!r}: {other} is {network.get_parameter(other).dtype}; expected torch.float32")
    if coupled := couples_records(network):
        raise RecipeError(
            f"network {name!r}: BatchNorm ({coupled[0]}) takes its statistics from each volunteer's own records, and "
            "volunteers would not agree on them; use nn.GroupNorm"
        )
    if moved := _moved_buffer(name, network, x):
        raise RecipeError(
            f"network {name!r}: training changes {moved}, which no gradient carries, and volunteers would not agree on "
            "it; use layers without running statistics, such as nn.GroupNorm"
        )


def _moved_buffer(name: str, network: nn.Module, x: Tensor) -> str | None:
    """The first floating-point buffer that a forward in training changes, by name; all are put back."""
    before = {key: buffer.clone() for key, buffer in network.named_buffers()}
    try:
        with torch.no_grad(), drawing_from(torch.Generator()):
            network(x)
    except Exception as error:  # anything at all can go wrong in a user's forward
        raise RecipeError(
            f"network {name!r} fails in training on records of shape {tuple(x.shape[1:])}: {first_line(error)}"
        ) from error
    now = dict(network.named_buffers())
    moved = [key for key, was in before.items() if was.is_floating_point() and not torch.equal(was, now[key])]
    for key, was in before.items():
        now[key].copy_(was)
    return next(iter(moved), None)
