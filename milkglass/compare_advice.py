"""Which way of training fits a user's needs: rules, applied in a stated order, and what each of them dropped. Pure.

What a client must not show goes first, then the guarantee, then accuracy; of what is left the fastest is chosen. How
many clients there are is given, not chosen: there is one advice for each number. A need that was not stated is no rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from milkglass.compare import MODELLED, WAYS, Cell, Row
from milkglass.compare_section import CompareSection
from milkglass.figures import amount, duration, number
from milkglass.leakage.estimate import Estimate

MUCH_PEEK: Final = 0.2
"""From here on a choice that nobody limited is told to show much."""
EQUAL_TIME: Final = 0.10
"""Times that differ by less than this share of the least one count as equal."""
_SLACK: Final = 1e-9  # 0.97 - 0.95 is not 0.02 in floating point, and a row at a limit is within it


@final
@dataclass(frozen=True)
class Rule:
    """One rule, in words; how many rows it kept, and each that it dropped with the reason."""

    words: str
    kept: int
    dropped: tuple[tuple[Row, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """As in compare.json."""
        dropped = [_reference(row) | {"why": why} for row, why in self.dropped]
        return {"words": self.words, "kept": self.kept, "dropped": dropped}


@final
@dataclass(frozen=True)
class Advice:
    """For one number of clients: what follows from the needs, or nothing.

    headline: the needs, then the choice, in one line. why: a sentence or two on what decided. nearest: where nothing
    meets the needs, the row that missed the last rule by least. afterwards: encrypted inference that goes with the
    choice, once the network is trained.
    """

    clients: int
    headline: str
    why: str
    chosen: Row | None
    nearest: Row | None
    rules: tuple[Rule, ...]
    afterwards: tuple[Row, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As in compare.json: a row by its cell and words; its figures are under `rows`."""
        return {
            "clients": self.clients,
            "headline": self.headline,
            "why": self.why,
            "chosen": None if self.chosen is None else _reference(self.chosen),
            "nearest": None if self.nearest is None else _reference(self.nearest),
            "rules": [rule.to_dict() for rule in self.rules],
            "afterwards": [_reference(row) | {"costs": _per_answer(row)} for row in self.afterwards],
        }


def advise(rows: Sequence[Row], needs: CompareSection) -> tuple[Advice, ...]:
    """One advice for each number of clients that was asked for, and then for each other one that was measured."""
    trained = [row for row in rows if row.is_measured and not row.inference]
    asked = list(needs.clients)
    more = {row.cell.clients for row in trained if not any(belongs(row.cell, each, needs) for each in asked)}
    return tuple(_advise(rows, trained, clients, needs) for clients in [*asked, *sorted(more)])


def belongs(cell: Cell, clients: int, needs: CompareSection) -> bool:
    """Whether a cell is among the choices of so many clients.

    Training at one place is in every group, as the yardstick. Secure aggregation, which two clients cannot have, stands
    beside theirs where it was measured with more in their place; a rule drops it there.
    """
    if cell.training == "whole":
        return True
    if cell.protection == "secure_aggregation":
        return cell.clients == max(clients, needs.secure_clients)
    return cell.clients == clients


def seconds_of(row: Row, needs: CompareSection) -> float | None:
    """Of a training: computing on this machine and transfers, added. None where a part was not measured.

    Transfers are one client's, for all send at once; where clients take turns, all clients', one after the other.
    Without a stated rate a transfer takes no time.
    """
    parts = _seconds(row, needs)
    return None if parts is None else math.fsum(parts)


def needs_in_words(needs: CompareSection) -> str:
    """What was stated, in one line; "no needs stated" where all is as by default."""
    told = []
    if needs.labels_stay:
        told.append("labels must stay")
    if needs.peek_at_most is not None:
        told.append(f"peek at most {needs.peek_at_most:g}")
    if needs.guarantee:
        told.append("a formal guarantee")
    if needs.uplink_mbit_per_second is not None:
        told.append(f"{needs.uplink_mbit_per_second:g} Mbit/s up")
    if needs.downlink_mbit_per_second is not None:
        told.append(f"{needs.downlink_mbit_per_second:g} Mbit/s down")
    if needs.accuracy_lost_at_most != CompareSection.model_fields["accuracy_lost_at_most"].default:
        told.append(f"at most {_points(needs.accuracy_lost_at_most)} of accuracy lost")
    return ", ".join(told) or "no needs stated"


@dataclass(frozen=True)
class _Miss:
    """Why a row does not pass, and by how much, in the rule's own unit; infinite where there is no such number."""

    why: str
    excess: float = math.inf
    over: str = ""


_Judge = Callable[[Row], _Miss | None]
_Step = tuple[str, str, _Judge]  # its name, its words, the judge


def _advise(rows: Sequence[Row], trained: Sequence[Row], clients: int, needs: CompareSection) -> Advice:
    left = [row for row in rows if belongs(row.cell, clients, needs)]
    stated = needs_in_words(needs)
    rules: list[Rule] = []
    for name, words, judge in _limits(trained, needs, clients):
        found = [(row, judge(row)) for row in left]
        missed = [(row, miss) for row, miss in found if miss is not None]
        left = [row for row, miss in found if miss is None]
        rules.append(Rule(words, len(left), tuple((row, miss.why) for row, miss in missed)))
        if not left:
            return _nothing(clients, stated, name, missed, rules)
    met = len(left)
    why = "It is the only one that meets the needs."
    if met > 1:
        left, more, decided = _fastest(left, needs)
        rules += more
        why = f"{met} meet the needs; {decided}."
        if len(left) > 1:
            why = f"{met} meet the needs, and {len(left)} of them are equal by every rule: the first is named."
    chosen = left[0]
    return Advice(
        clients,
        headline=f"{stated}: {chosen.cell.words}{_shows_much(chosen, needs)}",
        why=why,
        chosen=chosen,
        nearest=None,
        rules=tuple(rules),
        afterwards=_afterwards(rows, chosen),
    )


def _nothing(
    clients: int, stated: str, name: str, missed: Sequence[tuple[Row, _Miss]], rules: Sequence[Rule]
) -> Advice:
    """What is said where a rule dropped all that were left. A row that was not measured is not near to anything."""
    headline = f"{stated}: nothing fits, with {clients} client{'' if clients == 1 else 's'}"
    nearest = None
    last = "the last one" if len(missed) == 1 else f"the last {len(missed)}"
    why = f"{name[0].upper()}{name[1:]} dropped {last}." if missed else "There are no rows."
    if len(rules) > 2 and missed:  # not by what was not measured, nor the yardstick alone
        nearest, miss = min(missed, key=lambda pair: pair[1].excess)
        why += f" The nearest: {nearest.cell.words}, {miss.over or miss.why}."
        headline += f"; nearest: {nearest.cell.words}"
    return Advice(clients, headline, why, None, nearest, tuple(rules))


def _shows_much(chosen: Row, needs: CompareSection) -> str:
    """A warning where nobody asked for little peek, and there is much."""
    peek = _value(chosen.peek)
    if needs.peek_at_most is not None or peek is None or peek < MUCH_PEEK:
        return ""
    return f"; it shows much (peek {number(peek, 2)}), and no limit on peek was stated (compare.peek_at_most)"


def _limits(trained: Sequence[Row], needs: CompareSection, clients: int) -> Iterator[_Step]:
    """The rules that a row passes or not by itself, in their order."""
    yield "the rule on measurements", "Only what was measured, of trainings whose audit passed its controls.", _measured
    yield "the rule on records", "Raw records stay with the clients: training at one place is the yardstick.", _records
    if any(_clients(row, clients) for row in trained if belongs(row.cell, clients, needs)):
        words = f"There are {clients} clients, no more."
        yield "the number of clients", words, lambda row: _clients(row, clients)
    if needs.labels_stay:
        yield "the need that labels stay", "Labels stay with the clients.", _labels
    if needs.peek_at_most is not None:
        limit = needs.peek_at_most
        words = f"The upper end of the interval of peek is at most {limit:g}. What was not measured is not within it."
        yield "the limit on peek", words, lambda row: _peek(row, limit)
    if needs.guarantee:
        words = (
            "There is a formal guarantee about a record, for all of it that the way shares, not a measurement alone."
        )
        yield "the need of a guarantee", words, _guarantee
    best = max((row for row in trained if _value(row.accuracy) is not None), key=_accuracy, default=None)
    lost = needs.accuracy_lost_at_most
    most = "" if best is None else f", {_percent(_accuracy(best))} ({best.cell.words})"
    words = f"Accuracy is at most {_points(lost)} below the best of all measured trainings{most}."
    yield "the limit on lost accuracy", words, lambda row: _lost(row, 0.0 if best is None else _accuracy(best), lost)


def _measured(row: Row) -> _Miss | None:
    if row.status == MODELLED:
        return _Miss("modelled, not measured")
    if not row.is_measured:
        return _Miss(f"not run: {row.status}")
    if row.inference:
        return _Miss("protects answers afterwards, not a training")
    return None if row.sound else _Miss("its audit failed its controls, so its peek says nothing")


def _clients(row: Row, clients: int) -> _Miss | None:
    needed = row.cell.clients
    return _Miss(f"needs {needed} clients") if needed > clients and row.cell.training != "whole" else None


def _records(row: Row) -> _Miss | None:
    return _Miss("all records go to one place") if WAYS[row.cell.training].records_leave else None


def _labels(row: Row) -> _Miss | None:
    way = WAYS[row.cell.training]
    return _Miss(f"labels leave a client: it shows {way.shares}") if way.labels_leave else None


def _peek(row: Row, limit: float) -> _Miss | None:
    if row.peek is None or not row.peek.is_finite:
        return _Miss("no peek was measured")
    excess = row.peek.high - limit
    if excess <= _SLACK:
        return None
    return _Miss(f"peek up to {_decimals(row.peek.high)}", excess, f"over by {_decimals(excess)} in peek")


def _guarantee(row: Row) -> _Miss | None:
    if row.guarantee_covers:
        return None
    return _Miss(
        "its guarantee does not cover all that is shared of a record" if row.guarantee else "no formal guarantee"
    )


def _lost(row: Row, best: float, limit: float) -> _Miss | None:
    accuracy = _value(row.accuracy)
    if accuracy is None:
        return _Miss("no accuracy was measured")
    lost = best - accuracy
    if lost <= limit + _SLACK:
        return None
    why = f"{_percent(accuracy)}, {_points(lost)} below the best"
    return _Miss(why, lost - limit, f"over by {_points(lost - limit)} of accuracy lost")


def _fastest(left: list[Row], needs: CompareSection) -> tuple[list[Row], list[Rule], str]:
    """The rules that compare rows with each other, each among what the one before left; and what decided, in words."""
    times = ["seconds on this machine"]
    for name, rate in (("send", needs.uplink_mbit_per_second), ("receive", needs.downlink_mbit_per_second)):
        times += [] if rate is None else [f"what clients {name} at {rate:g} Mbit/s, all at once or in turn"]
    added = " (computing and transfer are added)" if len(times) > 1 else ""
    rules: list[Rule] = []
    decided = ""
    for words, reason, figure, slack, told in (
        (
            f"The least time: {' + '.join(times)}{added}. Less than {100 * EQUAL_TIME:g} % apart counts as equal.",
            "this one takes the least time",
            lambda row: seconds_of(row, needs),
            EQUAL_TIME,
            lambda row: _time_in_words(row, needs),
        ),
        (
            "Then the lower peek.",
            "of those that are as fast, this one has the lowest peek",
            lambda row: _value(row.peek),
            0.0,
            lambda row: f"peek {_decimals(_value(row.peek))}",
        ),
        (
            "Then fewer FLOPs of a client.",
            "of those that are as fast and show as little, this one asks least of a client",
            lambda row: row.client_flops,
            0.0,
            lambda row: amount(row.client_flops, "FLOP"),
        ),
    ):
        if len(left) > 1:
            left, dropped = _least(left, figure, slack, told)
            rules.append(Rule(words, len(left), dropped))
            decided = reason if dropped else decided
    return left, rules, decided


def _least(
    left: list[Row], figure: Callable[[Row], float | None], slack: float, told: Callable[[Row], str]
) -> tuple[list[Row], tuple[tuple[Row, str], ...]]:
    """Those with the least figure, and those nearer to it than the share `slack`; all, where none has that figure."""
    values = [value if (value := figure(row)) is not None and math.isfinite(value) else math.inf for row in left]
    least = min(values)
    if math.isinf(least):
        return left, ()
    limit = least + slack * abs(least) * (1 - _SLACK)
    within = [value == least or value < limit for value in values]
    best = told(left[values.index(least)])
    dropped = tuple(
        (row, f"{told(row)}; the least is {best}" if math.isfinite(value) else "it was not measured")
        for row, value, good in zip(left, values, within, strict=True)
        if not good
    )
    return [row for row, good in zip(left, within, strict=True) if good], dropped


def _seconds(row: Row, needs: CompareSection) -> list[float] | None:
    """Computing, then sending and receiving where a rate is stated: all clients' where they take turns, else one's."""
    if row.seconds is None:
        return None
    parts, turns = [row.seconds], row.cell.clients if WAYS[row.cell.training].in_turn else 1
    for sent, rate in (
        (row.bytes_up, needs.uplink_mbit_per_second),
        (row.bytes_down, needs.downlink_mbit_per_second),
    ):
        if rate is not None:
            if sent is None:
                return None
            parts.append(turns * sent * 8 / (rate * 1e6))
    return parts


def _time_in_words(row: Row, needs: CompareSection) -> str:
    parts = _seconds(row, needs) or []
    summed = f" ({' + '.join(duration(part) for part in parts)})" if len(parts) > 1 else ""
    return duration(math.fsum(parts)) + summed


def _afterwards(rows: Sequence[Row], chosen: Row) -> tuple[Row, ...]:
    """Of each protection of answers one that was measured: on the chosen way, else on another way of splitting.

    Who trains a whole network holds it in the end, and need not ask anybody.
    """
    if WAYS[chosen.cell.training].kind != "split":
        return ()
    found: dict[str, Row] = {}
    offered = [row for row in rows if row.is_measured and row.inference]
    for row in sorted(offered, key=lambda row: row.cell.training != chosen.cell.training):
        found.setdefault(row.cell.protection, row)
    return tuple(found.values())


def _per_answer(row: Row) -> str:
    """What one encrypted answer costs, as far as it was measured."""
    if not row.records:
        return ""
    parts = []
    if row.bytes_up is not None and row.bytes_down is not None:
        parts.append(amount((row.bytes_up + row.bytes_down) / row.records, "B"))
    if row.seconds is not None:
        parts.append(duration(row.seconds / row.records))
    return f"{' and '.join(parts)} an answer" if parts else ""


def _reference(row: Row) -> dict[str, Any]:
    cell = row.cell
    names = {"training": cell.training, "protection": cell.protection, "clients": cell.clients}
    return names | {"words": cell.words}


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None or not math.isfinite(estimate.value) else estimate.value


def _accuracy(row: Row) -> float:
    value = _value(row.accuracy)
    return -math.inf if value is None else value


def _decimals(value: float | None) -> str:
    return "–" if value is None else number(value, 3)


def _percent(share: float) -> str:
    return f"{number(100 * share, 1)} %"


def _points(share: float) -> str:
    """A difference of two shares, in percentage points."""
    told = f"{round(100 * share, 2):g}"
    return f"{told} point{'' if told == '1' else 's'}"
