"""What crossed the cut (Transcript), and what one party makes of it (View).

Legend: N records, T targets, R releases of one record, D activation values a record, E entitled values a record;
trailing `...` is any shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol, final

import torch
from torch import Tensor, nn

from milkglass.errors import AuditError
from milkglass.messages import Direction, Message, Responder

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


@dataclass(frozen=True, eq=False)
class Pairs:
    """Activations (N, ...) with the records (N, ...) they were computed from and the entitled values (N, E).

    *Entitled* is what the receiver was meant to learn (class probabilities, labels); E may be 0. labels: (N,) int64.
    attributes: sensitive columns by name, (N,) int64 from 0. repeats: where each record was released R times, all of
    them, (R, N, ...); `activations` is then their mean.
    """

    activations: Tensor
    records: Tensor
    entitled: Tensor
    labels: Tensor | None = None
    attributes: Mapping[str, Tensor] = field(default_factory=dict)
    repeats: Tensor | None = None

    def __post_init__(self) -> None:
        _same_length("pairs", self.activations, self.records, self.entitled, *_optional(self))
        _same_length("attributes", self.records, *self.attributes.values())

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True, eq=False)
class Release:
    """Activations (T, ...) and entitled values (T, E) of records that the receiver does not hold; the rest as in Pairs.

    labels: None where the receiver is not given them.
    """

    activations: Tensor
    entitled: Tensor
    labels: Tensor | None = None
    repeats: Tensor | None = None

    def __post_init__(self) -> None:
        _same_length("release", self.activations, self.entitled, *_optional(self))

    def __len__(self) -> int:
        return len(self.activations)


class HonestServer(Responder, Protocol):
    """A server that does what was agreed; a passive attacker may hold one and look at its stage as it trains."""

    stage: nn.Module


@dataclass(frozen=True, eq=False)
class Driven:
    """What the real client sent for validation (N, ...) and target records (T, ...) after a training replayed for an
    attacker.

    steps: batches it trained. stopped: why the client ended the training early; None where it did not. by_guard:
    whether it did because its guard took the server for a hijacker.
    """

    validation: Tensor
    target: Tensor
    steps: int
    stopped: str | None = None
    by_guard: bool = False

    def note(self, noise_sigma: float) -> str:
        """That the training ended early, or left nothing to read but the client's noise; "" where it did not."""
        if self.stopped:
            rests = "; this result rests on its guard" if self.by_guard else ""
            return (
                f"the client stopped after {self.steps} batches, and what it would have sent then is attacked{rests}: "
                f"{self.stopped}"
            )
        same = bool((self.target == self.target[:1]).all())  # a spread of 0 may come out as rounding
        if same or (noise_sigma > 0 and float(self.target.flatten(1).std(0).max()) <= 1.5 * noise_sigma):
            return "the client ended up sending the same for every record: this training broke it, another may not"
        return ""


@dataclass(frozen=True, eq=False)
class Knowledge:
    """What an attacker knows or may do beyond its pairs. A part that is None is out of its reach.

    client: the client's trained stage, (N, ...) records -> (N, ...) activations before any noise, differentiable.
    noise_sigma: the standard deviation of the noise that a release adds to that. penalty: (records, what is sent for
    them) -> the scalar that the client's defense adds to its loss, None where it adds none. stride: how far the
    client's optimizer goes for a steady gradient of length 1, learning rate / (1 - momentum) of plain descent; None for
    one that goes as far whatever the length, such as Adam. architecture: generator -> a client's and a server's stage
    with untrained weights. server: the server's own stage, trained. train: replays the training of the real client from
    its first weights against a server of the attacker's, for so many batches, defenses and guards on. honest_server: a
    server with its first weights, to be held by a passive attacker. fingerprint: changes with anything above, so that
    results can be kept.
    """

    client: Callable[[Tensor], Tensor] | None = None
    noise_sigma: float = 0.0
    penalty: Callable[[Tensor, Tensor], Tensor | None] = lambda _, __: None
    stride: float | None = None
    architecture: Callable[[torch.Generator], tuple[nn.Module, nn.Module]] | None = None
    server: nn.Module | None = None
    train: Callable[[Responder, int], Driven] | None = None
    honest_server: Callable[[], HonestServer] | None = None
    fingerprint: str = ""


Known = Literal[
    "pairs",
    "records",
    "labels",
    "some labels",
    "fresh releases",
    "client weights",
    "architecture",
    "server weights",
    "training",
    "gradients",
]
"""
pairs           auxiliary records with what the client sends for them
records         auxiliary records, without
labels          the labels of its records and of the target
some labels     those of a few rows of a training
fresh releases  may have its own records released as often as it likes: it holds the client's stage, defense and all
client weights  the weights of the client's stage
architecture    the layers of both stages, not their weights
server weights  its own stage
training        sees (or forges) the messages of a training from the start
gradients       the gradients that one party shared
"""


@dataclass(frozen=True, eq=False)
class View:
    """What one party saw, knows, and may ask for: all that an attack is given.

    known: the attacker's own pairs, to fit on. validation: more of them, to choose settings on. target: what the
    attack is to rebuild. release: one fresh release of each of the attacker's own records, (N, ...) -> (N, ...), or
    None. knowledge: what it knows beyond.
    """

    known: Pairs
    validation: Pairs
    target: Release
    exposure: Exposure = "fresh"
    release: Callable[[Tensor], Tensor] | None = None
    knowledge: Knowledge = Knowledge()

    def lacks(self, needed: Known) -> bool:
        """Whether this view does not hold what is `needed`."""
        knows = self.knowledge
        return {
            "labels": self.known.labels is None or self.target.labels is None,
            "fresh releases": self.release is None,
            "client weights": knows.client is None,
            "architecture": knows.architecture is None,
            "server weights": knows.server is None,
            "training": knows.train is None or knows.honest_server is None,
            "gradients": True,
        }.get(needed, False)


@dataclass(frozen=True, eq=False)
class Trial:
    """A view, and the records (T, ...) behind its target. The audit alone reads `truth`; an attack gets the view.

    attributes: the sensitive columns of the target's records by name, (T,) int64.
    """

    view: View
    truth: Tensor
    attributes: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _same_length("trial", self.view.target.activations, self.truth, *self.attributes.values())


@dataclass(frozen=True, eq=False)
class LabelView:
    """What a party that must not know the labels saw of a training: the gradients that it was sent, (T, ...).

    activations: what it sent for these records, (T, ...), or None. known_rows, known_labels: (k,) int64, the few rows
    whose labels it has got to know all the same; k may be 0. classes: of the labels, 0 .. classes - 1.
    """

    gradients: Tensor
    activations: Tensor | None
    known_rows: Tensor
    known_labels: Tensor
    classes: int

    def __post_init__(self) -> None:
        _same_length("label view", self.gradients, *([] if self.activations is None else [self.activations]))
        _same_length("known labels", self.known_rows, self.known_labels)
        for what, values, end in (
            ("known rows", self.known_rows, len(self.gradients)),
            ("known labels", self.known_labels, self.classes),
        ):
            if not bool(((values >= 0) & (values < end)).all()):
                raise AuditError(f"label view: {what} are out of range; expected 0 to {end - 1}")

    def __len__(self) -> int:
        return len(self.gradients)


@dataclass(frozen=True, eq=False)
class LabelTrial:
    """A label view, and the labels (T,) int64 of its rows. The audit alone reads these, and not at the known rows."""

    view: LabelView
    labels: Tensor

    def __post_init__(self) -> None:
        _same_length("label trial", self.view.gradients, self.labels)


@dataclass(frozen=True, eq=False)
class MembershipView:
    """Candidates of which some were trained on, with their labels, and the attacker's own records, which were not.

    candidates: as the trained client releases them. outsiders: the same of the attacker's own records. records: those
    of the candidates, (T, ...), where the attacker holds the very record that it asks about; None where it has only
    what crossed.
    """

    candidates: Release
    outsiders: Pairs
    knowledge: Knowledge = Knowledge()
    records: Tensor | None = None

    def __post_init__(self) -> None:
        _same_length("candidates", self.candidates.activations, *([] if self.records is None else [self.records]))


@dataclass(frozen=True, eq=False)
class MembershipTrial:
    """A membership view, and whether each candidate was trained on, (T,) bool. The audit alone reads `member`."""

    view: MembershipView
    member: Tensor

    def __post_init__(self) -> None:
        _same_length("membership trial", self.view.candidates.activations, self.member)


MINIMUM_PAIRS: Final = 8


def check_view(view: View) -> None:
    """Refuse a view that no attack could be judged on: too few pairs, or values that are not finite."""
    for name, pairs in (("known", view.known), ("validation", view.validation)):
        if len(pairs) < MINIMUM_PAIRS:
            raise AuditError(f"the view has {len(pairs)} {name} pairs; an audit needs at least {MINIMUM_PAIRS}")
    for part in ("known", "validation", "target"):
        rows = getattr(view, part)
        for what in ("activations", "records", "entitled", "repeats"):
            tensor = getattr(rows, what, None)  # of its target an attacker has no records
            if tensor is not None and not torch.isfinite(tensor).all():
                raise AuditError(f"{part} {what}: not all values are finite (NaN or infinity)")


def _optional(rows: Pairs | Release) -> list[Tensor]:
    labels = [] if rows.labels is None else [rows.labels]
    return labels if rows.repeats is None else [*labels, rows.repeats.movedim(1, 0)]


def _same_length(what: str, *tensors: Tensor) -> None:
    lengths = [len(tensor) for tensor in tensors]
    if len(set(lengths)) > 1:
        raise AuditError(f"{what} do not match row by row: {', '.join(map(str, lengths))} rows")
