"""What crossed the cut (Transcript), and what one party makes of it (View).

Legend: N records, T targets, D activation values a record, E entitled values a record; trailing `...` is any shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal, final

import torch
from torch import Tensor

from milkglass.errors import AuditError
from milkglass.messages import Direction, Message

Exposure = Literal["fresh", "repeated", "trained-on"]


@dataclass(frozen=True)
class Crossing:
    """One message on its way: which way it went, what it was, and how many bytes it took on the wire."""

    direction: Direction
    message: Message
    wire_bytes: int


@final
class Transcript:
    """All that crossed, in order."""

    def __init__(self) -> None:
        self._crossings: list[Crossing] = []

    def __len__(self) -> int:
        return len(self._crossings)

    def __iter__(self) -> Iterator[Crossing]:
        return iter(self._crossings)

    def append(self, crossing: Crossing) -> None:
        """Add what crossed last."""
        self._crossings.append(crossing)

    def kinds(self) -> list[tuple[Direction, str]]:
        """(direction, kind) of every message, in order."""
        return [(crossing.direction, crossing.message.kind) for crossing in self._crossings]


@dataclass(frozen=True)
class Pairs:
    """Activations (N, ...) with the records (N, ...) they were computed from and the entitled values (N, E).

    *Entitled* is what the receiver was meant to learn (class probabilities, labels); E may be 0.
    """

    activations: Tensor
    records: Tensor
    entitled: Tensor

    def __post_init__(self) -> None:
        _same_length("pairs", self.activations, self.records, self.entitled)

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True)
class Release:
    """Activations (T, ...) and entitled values (T, E) of records that the receiver does not hold."""

    activations: Tensor
    entitled: Tensor

    def __post_init__(self) -> None:
        _same_length("release", self.activations, self.entitled)

    def __len__(self) -> int:
        return len(self.activations)


@dataclass(frozen=True)
class View:
    """What one party saw, knows, and may ask for: all that an attack is given.

    known: the attacker's own pairs, to fit on. validation: more of them, to choose settings on. target: what the
    attack is to rebuild. release: fresh releases of the attacker's own records, (N, ...) -> (N, ...), or None.
    """

    known: Pairs
    validation: Pairs
    target: Release
    exposure: Exposure = "fresh"
    release: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Trial:
    """A view, and the records (T, ...) behind its target. The audit alone reads `truth`; an attack gets the view."""

    view: View
    truth: Tensor

    def __post_init__(self) -> None:
        _same_length("trial", self.view.target.activations, self.truth)


MINIMUM_PAIRS: Final = 8


def check_view(view: View) -> None:
    """Refuse a view that no attack could be judged on: too few pairs, or values that are not finite."""
    for name, pairs in (("known", view.known), ("validation", view.validation)):
        if len(pairs) < MINIMUM_PAIRS:
            raise AuditError(f"the view has {len(pairs)} {name} pairs; an audit needs at least {MINIMUM_PAIRS}")
    for name, tensor in (
        ("known activations", view.known.activations),
        ("known records", view.known.records),
        ("validation activations", view.validation.activations),
        ("target activations", view.target.activations),
    ):
        if not torch.isfinite(tensor).all():
            raise AuditError(f"{name}: not all values are finite (NaN or infinity)")


def _same_length(what: str, *tensors: Tensor) -> None:
    lengths = [len(tensor) for tensor in tensors]
    if len(set(lengths)) > 1:
        raise AuditError(f"{what} do not match row by row: {', '.join(map(str, lengths))} rows")
