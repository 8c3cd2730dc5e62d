"""The survey's two tables, recomputed from formulas: what do they imply, and do they agree with themselves?

"No Peek: A Survey of private distributed deep learning" (Vepakomma et al. 2018, arXiv 1812.03288). Its full text was
not at hand: the figures come from study notes, second-hand, to be compared with and not to be quoted as the paper's.
They do not say how many epochs, rounds or steps a figure is of. So a row has our amount of one epoch (round, step), and
the number of them that the figure implies; where a formula holds, two rows that should share that number do.

Published figures are rounded, so an implied number is an interval. FLOPs count two for a multiply-add of convolutions
and matrix products. 50,000 training records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import Final, Literal, final

from milkglass.costs import Scale, client_flops, federated, ring, split
from milkglass.cuts import CutCost, cut, cut_costs, flops_per_sample, forward_flops
from milkglass.survey_networks import Stem, records, resnet50, vgg16

Table = Literal["compute", "bandwidth"]
Per = Literal["epoch", "round", "step"]

RECORDS: Final = 50_000
CLIENTS: Final = (100, 500)
COMPUTE: Final[Mapping[str, tuple[str, str]]] = {
    "large-batch": ("29.4", "5.89"),
    "federated": ("29.4", "5.89"),
    "split": (".1548", ".03"),
}
"""CIFAR-10, VGG: TFlops of a client, of 100 and of 500; second-hand."""
BANDWIDTH: Final[Mapping[str, tuple[str, str]]] = {
    "large-batch": ("13", "14"),
    "federated": ("3", "2.4"),
    "split": ("6", "1.2"),
}
"""CIFAR-100, ResNet-50: GB of a client, of 100 and of 500; second-hand."""
HEADS: Final[Mapping[str, tuple[int, ...]]] = {"10": (), "4096-4096-10": (4096, 4096)}
"""Fully connected layers of VGG-16: the usual CIFAR form, and the paper's."""
_TFLOP, _GB = 1e12, 1e9
_TRAINING_OVER_FORWARD: Final = 3  # forward, gradient of weights, gradient of inputs
_TOLERANCE: Final = 0.02
_CUTS_TRIED: Final = 4
Counting: Final = ("three times forward", "as counted")
"""`as counted`: a first layer computes no gradient of the records, so it costs two forward passes and not three."""


@final
@dataclass(frozen=True)
class Row:
    """One figure of a table beside ours. Amounts are of one client, in `unit`.

    published: second-hand. ours: of one `per` (epoch, round or step). implied: how many of those the figure is of; low,
    high: what its rounding leaves open. ratio: implied over that of the row that it should equal (`beside`); 1 = the
    formula explains both.
    """

    table: Table
    way: str
    clients: int
    unit: Literal["TFlop", "GB"]
    published: float
    ours: float
    per: Per
    implied: float
    low: float
    high: float
    ratio: float
    beside: str
    assumption: str


@final
@dataclass(frozen=True)
class CutFit:
    """How well a cut of VGG-16 explains the split column: the client's share of training FLOPs, 0 to 1, by one count.

    off: share / published share - 1; nearest to 0 fits best. within_rounding: whether rounding explains the rest.
    """

    head: str
    cut: str
    counting: str
    share: float
    published_share: float
    off: float
    within_rounding: bool


@final
@dataclass(frozen=True)
class Verdict:
    """Whether two figures follow from one formula with one number of epochs. off: how far the second is, relative."""

    table: str
    rows: tuple[str, str]
    off: float
    consistent: bool
    words: str


@cache
def cut_fits() -> tuple[CutFit, ...]:
    """Each early cut of VGG-16, either head, either count, beside .1548 / 29.4; the best first."""
    whole, part = (_rounded(COMPUTE[way][0]) for way in ("federated", "split"))
    low, high, published = part[1] / whole[2], part[2] / whole[1], part[0] / whole[0]
    fits = []
    for head, hidden in HEADS.items():
        model, x_1 = vgg16(10, hidden), records()
        for counting in Counting:
            count = flops_per_sample if counting == "as counted" else forward_flops
            everything = count(model, x_1)
            for number in range(1, _CUTS_TRIED + 1):
                share = count(cut(model, at := f"conv{number}").bottom, x_1) / everything
                off = share / published - 1
                fits.append(CutFit(head, at, counting, share, published, off, within_rounding=low <= share <= high))
    return tuple(sorted(fits, key=lambda fit: abs(fit.off)))


def compute_rows(fit: CutFit | None = None) -> tuple[Row, ...]:
    """The table of client compute, CIFAR-10 and VGG-16, for a cut and a count: the best fit by default."""
    fit = cut_fits()[0] if fit is None else fit
    model, x_1 = vgg16(10, HEADS[fit.head]), records()
    flops = (
        flops_per_sample(model, x_1)
        if fit.counting == "as counted"
        else _TRAINING_OVER_FORWARD * forward_flops(model, x_1)
    )
    told = f"VGG-16, fully connected {fit.head}; training {fit.counting}"
    rows: list[Row] = []
    first: dict[str, Row] = {}
    for way in ("federated", "large-batch", "split"):
        for clients, published in zip(CLIENTS, COMPUTE[way], strict=True):
            scale = Scale(clients, 1, RECORDS, 1)
            each = flops * fit.share if way == "split" else flops
            of_what = f"cut after {fit.cut}: the client's stage x p/K" if way == "split" else "whole network x p/K"
            row = _row(
                "compute",
                way,
                clients,
                published,
                client_flops(scale, each) / _TFLOP,
                "epoch",
                first.get("federated"),
                f"{told}; {of_what}",
            )
            first.setdefault(way, row)
            rows.append(row)
    return tuple(rows)


def bandwidth_rows(stem: Stem = "cifar", at: str = "conv1") -> tuple[Row, ...]:
    """The table of bandwidth, CIFAR-100 and ResNet-50, cut after `at`: each way beside itself with 100 clients.

    Split: 2pq/K + eta N an epoch. Federated: 2N a round. Large-batch: 4N(K-1)/K a step, a ring, both ways; that steps
    are as many with 100 clients as with 500 means one global batch, parted among them. Raises CutError for an unknown
    cut.
    """
    model, x_1 = resnet50(100, stem), records()
    cut(model, at)
    cost = next(cost for cost in cut_costs(model, x_1) if cost.name == at)
    rows: list[Row] = []
    counted_in: dict[str, Per] = {"large-batch": "step", "federated": "round", "split": "epoch"}
    for way, per in counted_in.items():
        first: Row | None = None
        for clients, published in zip(CLIENTS, BANDWIDTH[way], strict=True):
            ours, told = _bandwidth(way, clients, cost, stem)
            row = _row("bandwidth", way, clients, published, ours / _GB, per, first, told)
            first = first or row
            rows.append(row)
    return tuple(rows)


def verdicts(rows: Sequence[Row]) -> tuple[Verdict, ...]:
    """Each row beside the one that it should equal: consistent within rounding, or within 2 %."""
    named = {(row.table, _name(row)): row for row in rows}
    found = []
    for row in rows:
        if row.beside == _name(row):
            continue
        other = named[row.table, row.beside]
        off = row.ratio - 1
        overlap = row.low <= other.high and other.low <= row.high
        fine = overlap or abs(off) <= _TOLERANCE
        how = "within rounding" if overlap else f"{100 * off:+.1f} %"
        numbers = f"{other.implied:.1f} and {row.implied:.1f} {row.per}s"
        words = f"{row.table}, {row.beside} and {_name(row)}: {numbers}, {how}: " + (
            "one formula explains both" if fine else "no one number of them explains both"
        )
        found.append(Verdict(row.table, (row.beside, _name(row)), off, fine, words))
    return tuple(found)


def _bandwidth(way: str, clients: int, cost: CutCost, stem: Stem) -> tuple[float, str]:
    """Bytes of a client in one epoch, round or step, and the assumption in words."""
    parameters = cost.client_parameters / cost.client_parameters_share
    values = cost.bytes_per_record / 4
    scale = Scale(clients, parameters, RECORDS, values, cost.client_parameters_share)
    network = f"ResNet-50, {stem} stem, {parameters / 1e6:.2f} M numbers"
    if way == "split":
        return split(scale).total_bytes, f"{network}; cut after {cost.name}, q = {values:,.0f}; 2pq/K + eta N"
    if way == "federated":
        return federated(scale).total_bytes, f"{network}; 2N"
    return ring(scale, 1).total_bytes, f"{network}; 4N(K-1)/K in a ring, sent and received"


def _row(
    table: Table,
    way: str,
    clients: int,
    published: str,
    ours: float,
    per: Per,
    beside: Row | None,
    assumption: str,
) -> Row:
    value, low, high = _rounded(published)
    implied = value / ours
    return Row(
        table=table,
        way=way,
        clients=clients,
        unit="TFlop" if table == "compute" else "GB",
        published=value,
        ours=ours,
        per=per,
        implied=implied,
        low=low / ours,
        high=high / ours,
        ratio=1.0 if beside is None else implied / beside.implied,
        beside=f"{way}, {clients} clients" if beside is None else _name(beside),
        assumption=assumption,
    )


def _name(row: Row) -> str:
    return f"{row.way}, {row.clients} clients"


def _rounded(published: str) -> tuple[float, float, float]:
    """A figure, and the ends of what rounds to it."""
    exact = Decimal(published)
    exponent = exact.as_tuple().exponent
    assert isinstance(exponent, int)
    half = Decimal(5).scaleb(exponent - 1)
    return float(exact), float(exact - half), float(exact + half)
