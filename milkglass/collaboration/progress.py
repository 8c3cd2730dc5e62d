"""Where a run stands, from what volunteers say of themselves: nobody's word alone moves it.

In DeDLOC (Diskin et al. 2021, arXiv 2106.10207) the epoch is the largest that any peer claims, so that one liar makes
all others throw their work away; and a claim of records counts for what it says. Here

- the epoch is what more than half of the others have reached, and no faster than the speed that they claim;
- no claim of records, or of speed, counts for more than `cap` times the (lower) median of all who train. Who has none
  yet counts in that median: else one who claims a full batch, just after a step, had it full by his word alone.

Whoever owns more than half of the volunteers can still lie about both: admission is against that. So can each of two
who are alone: an epoch, as fast as the speed allows, and `cap` times the other's records.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, final

from milkglass.errors import MessageError

STALE_SECONDS: Final = 30.0
"""What was said longer ago is not believed any more: whoever said it is gone."""
KEPT_STATES: Final = 4
_FASTER: Final = 4.0  # the speed of a run may grow by so much between two looks at it
_EPOCHS_AT_ONCE: Final = 2
_MOST_RECORDS: Final = 1 << 40  # claims of more are no claims, nor are speeds and epochs of more
_LONGEST_HASH: Final = 64
_CATCHING_UP: Final = 2  # so far behind is who steps just now, or takes over the state of the others


@final
@dataclass(frozen=True)
class Report:
    """What a volunteer says of itself. samples: records added up since the last step. rate: records per second.

    history: what steps have led to its weights. states: (epoch, SHA-256 of weights and optimizer), of the last few.
    trains: it is no auxiliary. recipe: digest of what all agreed on. loss: mean over this epoch's records, or None.
    """

    epoch: int
    samples: int
    rate: float
    time: float
    reachable: bool
    trains: bool
    recipe: bytes
    history: bytes
    states: tuple[tuple[int, bytes], ...]
    loss: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For the DHT."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        return content | {"states": [list(each) for each in self.states]}


def read_report(content: object, now: float) -> Report | None:
    """The report in an entry of the DHT; None where it is none, or of another time."""
    if not isinstance(content, dict) or set(content) != {field.name for field in fields(Report)}:
        return None
    kinds: dict[str, tuple[type, ...]] = {
        **{"epoch": (int,), "samples": (int,), "rate": (float,), "time": (float,), "reachable": (bool,)},
        **{"trains": (bool,), "recipe": (bytes,), "history": (bytes,), "states": (list,), "loss": (float, type(None))},
    }
    if not all(type(content[name]) in kind for name, kind in kinds.items()):  # True is no number here
        return None
    if max(len(content["recipe"]), len(content["history"])) > _LONGEST_HASH:
        return None
    if len(content["states"]) > KEPT_STATES or not all(map(_is_state, content["states"])):
        return None
    report = Report(**(content | {"states": tuple((epoch, state) for epoch, state in content["states"])}))
    numbers = (report.rate, report.time, *(() if report.loss is None else (report.loss,)))
    if not all(map(math.isfinite, numbers)) or not all(
        0 <= each < _MOST_RECORDS for each in (report.epoch, report.samples, report.rate)
    ):
        return None
    return report if -STALE_SECONDS <= now - report.time <= STALE_SECONDS else None


@final
@dataclass(frozen=True)
class Progress:
    """Where the run stands.

    epoch: steps that it has made. samples: records towards the next, as far as claims are believed. rate: of all,
    records per second. peers: who is there, this one too. here: of those, who is at that epoch or a little
    behind, and so may come to a group. history: that of most at that epoch.
    """

    epoch: int
    samples: float
    rate: float
    peers: int
    here: int
    history: bytes
    target: int

    @property
    def ready(self) -> bool:
        """Whether the batch is full."""
        return self.samples >= self.target

    @property
    def seconds_left(self) -> float:
        """Until it is, at the present speed."""
        if self.ready:
            return 0.0
        return math.inf if self.rate <= 0 else (self.target - self.samples) / self.rate


@final
class Pace:
    """How fast a run can be, from what was seen of it. None was seen at first: then all is believed."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._epoch: int | None = None
        self._rate = self._time = 0.0

    def believable(self, epoch: int, now: float) -> int:
        """The claimed epoch, or the last one that can have been reached by now."""
        if self._epoch is None:
            return epoch
        possible = self._rate * _FASTER * (now - self._time) / self._target + _EPOCHS_AT_ONCE
        return min(epoch, self._epoch + int(possible))

    def seen(self, epoch: int, rate: float, now: float) -> None:
        """A look at the run: its epoch, and the speed of all."""
        if self._epoch is None or epoch > self._epoch or rate > self._rate:
            self._epoch, self._rate, self._time = epoch, rate, now


def judge(
    own: Report, others: Mapping[bytes, Report], *, target: int, cap: float, pace: Pace | None = None
) -> Progress:
    """Where the run stands. others: by peer id, those of the same recipe, none of a newcomer (see `Board`)."""
    epoch = max(own.epoch, _reached(list(others.values()), own.time, pace))
    everyone = [own, *others.values()]
    there = [report for report in everyone if report.epoch == epoch]
    claims = _capped(there, [float(report.samples) for report in there], cap)
    rates = _capped(everyone, [report.rate for report in everyone], cap)
    if own.epoch == epoch:  # what it has itself it need not believe
        claims[0] = float(own.samples)
    progress = Progress(
        epoch=epoch,
        samples=sum(claims),
        rate=sum(rates),
        peers=len(everyone),
        here=sum(report.epoch >= epoch - _CATCHING_UP for report in everyone),
        history=_commonest([report.history for report in there] or [own.history]),
        target=target,
    )
    if pace is not None:
        pace.seen(epoch, progress.rate, own.time)
    return progress


def agreed_state(reports: Iterable[Report], epoch: int) -> bytes | None:
    """What more than half of those who were at that epoch, two at least, say that the state there hashes to.

    None where they differ. Raises MessageError where fewer than half of all say anything of it: nobody can make
    others take over a state of an epoch that the run has not reached.
    """
    states = [dict(report.states) for report in reports]  # one word of each, whatever he repeats
    said = [each[epoch] for each in states if epoch in each]
    if 2 * len(said) < len(states):
        raise MessageError(f"a state of epoch {epoch}, of which {len(said)} of {len(states)} volunteers know")
    return _majority(said) if len(said) > 1 else None


def _is_state(entry: object) -> bool:
    if not isinstance(entry, list) or len(entry) != 2 or type(entry[0]) is not int:
        return False
    return isinstance(entry[1], bytes) and len(entry[1]) <= _LONGEST_HASH


def _capped(reports: list[Report], claims: list[float], cap: float) -> list[float]:
    """Claims, none above `cap` times the lower median of those who train; of an auxiliary none counts."""
    training = [claim for report, claim in zip(reports, claims, strict=True) if report.trains]
    most = cap * statistics.median_low(training) if training else 0.0
    return [min(claim, most) if report.trains else 0.0 for report, claim in zip(reports, claims, strict=True)]


def _reached(others: list[Report], now: float, pace: Pace | None) -> int:
    """The epoch that more than half of the others have reached; 0 where there are none."""
    if not others:
        return 0
    epochs = sorted((report.epoch for report in others), reverse=True)
    epoch = epochs[len(others) // 2]
    return epoch if pace is None else pace.believable(epoch, now)


def _commonest(values: list[bytes]) -> bytes:
    """The value that most have; of several the smallest, so that all who see the same choose the same."""
    counted = Counter(values)
    return min(counted, key=lambda value: (-counted[value], value))


def _majority(values: list[bytes]) -> bytes | None:
    """The value that more than half have."""
    ((value, count),) = Counter(values).most_common(1) or [(b"", 0)]
    return value if 2 * count > len(values) else None
