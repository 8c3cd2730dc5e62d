"""Formulas beside what a comparison measured, and rows for numbers of clients that were not measured. Pure.

Formulas are those of `costs.py`, overheads those of `costs_wire.py`; of federated averaging the bytes around a message
are taken from the measured row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Final, Literal, final

import torch
from torch import nn

from milkglass.charts import svg
from milkglass.compare import MODELLED, WAYS, Cell, Row, recipe_of
from milkglass.compare_section import CompareSection
from milkglass.costs import Scale, break_even_clients
from milkglass.costs_figure import formula_charts
from milkglass.costs_wire import Flows, Work, federated_bytes, ring_bytes, split_bytes
from milkglass.cuts import cut, flops_per_sample
from milkglass.data import Deal
from milkglass.errors import MilkglassError
from milkglass.networks import build
from milkglass.randomness import public_source
from milkglass.recipe import Recipe
from milkglass.survey import bandwidth_rows, compute_rows, verdicts

_CURVES: Final[Mapping[str, str]] = {
    "split": "split, weights handed on",
    "federated": "federated, a round an epoch",
    "large_batch": "large-batch",
}
"""Ways whose measured points go with a curve of `costs.WAYS`."""
_MODES: Final[Mapping[str, Literal["relay", "splitfed1"]]] = {
    "split": "relay",
    "u_shaped": "relay",
    "splitfed": "splitfed1",
}


@final
@dataclass(frozen=True)
class Halves:
    """The recipe's network in parts, for counting. head: U-shaped, what comes back to the client; else None."""

    whole: nn.Module
    bottom: nn.Module
    head: nn.Module | None
    cut: tuple[int, ...]
    features: tuple[int, ...] | None

    @property
    def parameters(self) -> int:
        """N."""
        return sum(each.numel() for each in self.whole.parameters())


def halves_of(recipe: Recipe, records: Deal, back_at: str | None = None) -> Halves:
    """The network cut where the recipe says, weights from its seed."""
    weights = public_source(recipe.seed).generator("weights")
    whole = build(recipe.network.name, records.record_shape, records.classes, recipe.network.settings, weights)
    bottom, rest = cut(whole, at=recipe.cut.at)
    with torch.no_grad():
        z_1 = bottom.eval()(records.test.x[:1])
        if back_at is None:
            return Halves(whole, bottom, None, tuple(z_1.shape[1:]), None)
        middle, head = cut(rest, at=back_at)
        features = tuple(middle.eval()(z_1).shape[1:])
    return Halves(whole, bottom, head, tuple(z_1.shape[1:]), features)


def expected_flows(recipe: Recipe, records: Deal, row: Row, back_at: str | None) -> tuple[Flows, ...] | None:
    """What the formulas, with stated overheads, say of each client of a row; None for a way that has none."""
    cell, train = row.cell, sum(map(len, records.train.values()))
    if cell.protection != "none" or cell.training in ("whole", "collaboration") or recipe.wire.compress != "none":
        return None
    if cell.training in _MODES:
        return split_bytes(_work(recipe, records, cell, back_at))
    parameters = halves_of(recipe, records).parameters
    if cell.training == "federated":
        rounds = recipe.training.epochs // recipe.federated.local_epochs
        framing = float(row.details.get("framing_bytes_per_message", 0.0))
        return (federated_bytes(4 * parameters, rounds, message_overhead_bytes=framing),)
    steps = train // (recipe.training.batch_size * cell.clients) * recipe.training.epochs
    dense = cell.training == "large_batch"
    exchanges = steps if dense else row.rounds or 0
    return (ring_bytes(parameters, cell.clients, exchanges, epochs=recipe.training.epochs, bucketed=dense),)


def formulas(recipe: Recipe, records: Deal, rows: Sequence[Row], back_at: str | None) -> dict[str, Any]:
    """As in compare.json: a row for each measured one that a formula is of; charts; where two ways are even."""
    table = []
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if not row.is_measured or row.bytes_up is None or row.bytes_down is None:
            continue
        flows = expected_flows(recipe, records, row, back_at)
        if flows is None:
            continue
        counted = row.bytes_up + row.bytes_down
        expected, formula = (sum(getattr(each, name) for each in flows) / len(flows) for name in ("total", "formula"))
        terms: dict[str, float] = {}
        for each in flows:
            for name, value in [*asdict(each.up).items(), *asdict(each.down).items()]:
                if name not in ("payload", "weights") and value:
                    terms[name] = terms.get(name, 0.0) + value / len(flows)
        table.append(
            {
                "training": row.cell.training,
                "clients": row.cell.clients,
                "formula_bytes": formula,
                "overheads": terms,
                "expected_bytes": expected,
                "counted_bytes": counted,
                "ratio": counted / expected if expected else None,
            }
        )
        if row.cell.training in _CURVES and counted and row.cell.clients > 1:
            place = (float(row.cell.clients), counted / recipe.training.epochs)
            points.setdefault(_CURVES[row.cell.training], []).append(place)
    scale = scale_of(recipe, records)
    even = break_even_clients(scale)
    charts = formula_charts(scale, points)
    return {
        "rows": table,
        "svg": [svg([chart], "Lines: formulas. Marks: counted.") for chart in charts],
        "break_even": "Split training without handing weights on and federated averaging with a round an epoch send "
        f"the same where NK = pq: here at {even:,.3g} clients; with more, split training sends less.",
        "scale": asdict(scale),
    }


def scale_of(recipe: Recipe, records: Deal, clients: int = 2) -> Scale:
    """The user's K, N, p, q, eta."""
    parts = halves_of(recipe, records)
    held = sum(each.numel() for each in parts.bottom.parameters())
    return Scale(
        clients=clients,
        parameters=parts.parameters,
        records=sum(map(len, records.train.values())),
        cut_values=torch.Size(parts.cut).numel(),
        client_share=held / parts.parameters,
        batch_size=recipe.training.batch_size,
    )


def modelled_rows(
    recipe: Recipe, section: CompareSection, records: Deal, rows: Sequence[Row], back_at: str | None
) -> list[Row]:
    """A row for each way that was measured undefended, and each of the numbers of clients that costs are computed for.

    What they cost a client, by formula and the measured overheads; accuracy, time and leaks are not modelled.
    """
    found = []
    for training in WAYS:
        like = [row for row in rows if row.cell.training == training and row.is_measured]
        like = [row for row in like if row.cell.protection == "none" and row.client_flops is not None]
        if not like or training in ("whole", "collaboration"):
            continue
        for clients in section.formula_clients:
            cell = Cell(training, "none", clients)
            try:
                found.append(_modelled(recipe, records, cell, like[-1], back_at))
            except MilkglassError as error:
                found.append(Row(cell, str(error)))
    return found


def _modelled(recipe: Recipe, records: Deal, cell: Cell, like: Row, back_at: str | None) -> Row:
    train = sum(map(len, records.train.values()))
    if train < cell.clients:
        raise MilkglassError(f"{train} training records are fewer than {cell.clients} clients; nothing to compute")
    share, parts = train / cell.clients, halves_of(recipe, records, back_at if cell.training == "u_shaped" else None)
    small = recipe.model_copy(
        update={
            "training": recipe.training.model_copy(
                update={"batch_size": min(recipe.training.batch_size, int(share)), "drop_last_batch": False}
            )
        }
    )
    rounds = None
    if cell.training in _MODES:
        flows = split_bytes(_work(small, records, cell, back_at))
        client: nn.Module = parts.bottom
    else:
        steps = max(1, round(train / (small.training.batch_size * cell.clients))) * recipe.training.epochs
        if cell.training == "adaptive" and like.rounds is not None:  # as seldom as was measured
            before = train // (recipe.training.batch_size * like.cell.clients) * recipe.training.epochs
            steps = max(1, round(steps * like.rounds / max(1, before)))
        rounds = steps if cell.training != "federated" else like.rounds
        bare = Row(cell, MODELLED, rounds=rounds, details=like.details)
        flows = expected_flows(small, records, bare, back_at) or ()
        if cell.training in ("large_batch", "adaptive"):
            dense = cell.training == "large_batch"
            epochs = recipe.training.epochs
            flows = (ring_bytes(parts.parameters, cell.clients, steps, epochs=epochs, bucketed=dense, tested=False),)
        client = parts.whole
    flops = flops_per_sample(client, records.test.x[:1])
    if parts.head is not None and parts.features is not None:
        flops += flops_per_sample(parts.head, torch.zeros(1, *parts.features))
    return Row(
        cell,
        MODELLED,
        client_flops=flops * share * recipe.training.epochs,
        bytes_up=sum(each.up.total for each in flows) / len(flows),
        bytes_down=sum(each.down.total for each in flows) / len(flows),
        rounds=rounds,
        notes=("by formula; accuracy, time and leaks were not measured with so many clients",),
    )


def _work(recipe: Recipe, records: Deal, cell: Cell, back_at: str | None) -> Work:
    """A split cell in numbers."""
    train = sum(map(len, records.train.values()))
    parts = halves_of(recipe, records, back_at if cell.training == "u_shaped" else None)
    held = [*parts.bottom.parameters(), *(() if parts.head is None else parts.head.parameters())]
    names = tuple(f"client-{number}" for number in range(1, cell.clients + 1))
    if cell.clients <= 64:
        names = recipe_of(recipe, cell, train_records=train, back_at=back_at).parties.clients
    named = [("stage", parts.bottom), *(() if parts.head is None else (("head", parts.head),))]
    stage = [
        (f"{prefix}.{name}", tuple(tensor.shape))
        for prefix, part in named
        for name, tensor in part.state_dict().items()
    ]
    buffers = len(stage) - len(held)
    return Work(
        clients=names,
        cut=parts.cut,
        classes=records.classes,
        records=train,
        test_records=len(records.test),
        client_parameters=sum(each.numel() for each in held),
        client_tensors=len(held) + buffers,
        epochs=recipe.training.epochs,
        batch_size=recipe.training.batch_size,
        features=parts.features,
        mode=_MODES[cell.training],
        optimizer=recipe.training.optimizer,
        momentum=recipe.training.momentum,
        drop_last_batch=recipe.training.drop_last_batch,
        server=recipe.parties.server,
        stage=None if buffers else tuple(stage),
    )


@cache
def survey() -> tuple[dict[str, Any], ...]:
    """The survey's published tables, recomputed, as in compare.json; it takes seconds, once."""
    computed = (*compute_rows(), *bandwidth_rows())
    told = [
        {
            "table": row.table,
            "entry": f"{row.way}, {row.clients} clients, {row.unit}",
            "published": row.published,
            "ours": row.ours,
            "ratio": row.published / row.ours,
            "implied": f"{row.implied:.3g} {row.per}s ({row.low:.3g} to {row.high:.3g})",
            "words": row.assumption,
        }
        for row in computed
    ]
    return (*told, *({"table": each.table, "entry": "verdict", "words": each.words} for each in verdicts(computed)))
