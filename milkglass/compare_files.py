"""A comparison on disk: what `milkglass compare` does. Every cell is a folder; what was made is not made again.

cells/TRAINING-PROTECTION-CLIENTS/   see `compare_cells.py`
compare.json                         what is known so far: written anew after every cell
compare.html                         a page with it

A cell that cannot be run is a row that says why: a part that is not installed, a network that a protection cannot take.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, final

import torch

from milkglass.attacks.suite import Strength
from milkglass.audit_files import Watching
from milkglass.compare import (
    MEASURED,
    PROTECTIONS,
    WAYS,
    Cell,
    Row,
    cells_of,
    check_comparable,
    extras_of,
    read_row,
    recipe_of,
    section_of,
)
from milkglass.compare_advice import advise
from milkglass.compare_cells import MAKERS
from milkglass.compare_inference import inference_row
from milkglass.compare_model import formulas, modelled_rows, scale_of, survey
from milkglass.compare_page import page
from milkglass.compare_place import Place
from milkglass.compare_section import CompareSection
from milkglass.cuts import legal_cuts
from milkglass.data import Deal
from milkglass.errors import CutError, MilkglassError, MissingExtraError, RunError, first_line
from milkglass.networks import build
from milkglass.randomness import public_source
from milkglass.recipe import Recipe, first_difference, parse_recipe
from milkglass.runs import write_beside
from milkglass.training.shares import deal_records
from milkglass.training.split import digest_of

OWN: Final = ("cells", "compare.json", "compare.html")
_MODULES: Final = {"federated": "flwr", "dp": "opacus", "he": "tenseal", "collab": "hivemind"}


@final
@dataclass
class Comparison:
    """What is known so far. rows: in the order in which they were made. earlier: what an earlier call left, of rows
    that this one was not asked for, or has not come to yet. finished: all rows are made; then follow the modelled ones.
    """

    recipe: Recipe
    section: CompareSection
    records: Deal
    back_at: str | None
    earlier: Mapping[Cell, Row] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    finished: bool = False

    @property
    def train_records(self) -> int:
        """Of all clients together."""
        return sum(map(len, self.records.train.values()))

    @property
    def known(self) -> list[Row]:
        """This call's rows, and then the earlier ones."""
        made = {row.cell for row in self.rows}
        return [*self.rows, *(row for cell, row in self.earlier.items() if cell not in made)]

    def to_dict(self) -> dict[str, Any]:
        """What compare.json holds."""
        known = self.known
        rows, drawn = [*known], {}
        if self.finished:  # it takes a second, which a row now and then does not
            rows += modelled_rows(self.recipe, self.section, self.records, known, self.back_at)
            drawn = {"formulas": formulas(self.recipe, self.records, known, self.back_at), "survey": survey()}
        scale = scale_of(self.recipe, self.records)
        return {
            "recipe_digest": self.recipe.digest(),
            "recipe": self.recipe.model_dump(mode="json", exclude_none=True),
            "records_digest": digest_of(self.records),
            "seed": self.recipe.seed,
            "strength": self.section.attacks,
            "sort": self.section.sort,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, torch {torch.__version__}",
            "parameters": scale.parameters,
            "cut_values": scale.cut_values,
            "client_share": scale.client_share,
            "train_records": self.train_records,
            "test_records": len(self.records.test),
            "needs": self.section.model_dump(mode="json"),
            "rows": [row.to_dict() for row in rows],
            "advice": [each.to_dict() for each in advise(known, self.section)],
            "notes": self.notes,
            **drawn,
        }


def compare(
    recipe: Recipe,
    out: Path,
    watching: Watching,
    *,
    only: Sequence[str] | None = None,
    clients: Sequence[int] | None = None,
) -> Comparison:
    """Make every row that is not made yet, and write down what is known after each.

    only: ways of training, over the recipe's. clients: numbers of them, over the recipe's. Raises MilkglassError, one
    line, before any work where the recipe cannot be compared, or `out` holds another recipe's comparison.
    """
    check_comparable(recipe)
    section = section_of(recipe, only, clients)
    cells = cells_of(section)
    if not cells:
        raise MilkglassError("compare: none of these protections goes with any of these ways of training")
    records = deal_records(recipe)
    earlier = _earlier(out, recipe, section, digest_of(records))
    found = Comparison(recipe, section, records, _back_at(recipe, records), earlier, notes=_notes(recipe))
    _write(out, found)
    for number, cell in enumerate(cells, start=1):
        row = _row(found, out, cell, watching)
        found.rows.append(row)
        found.finished = number == len(cells)
        watching.tell(f"row {number} of {len(cells)}: {_line(row)}")
        _write(out, found)
    return found


def _row(found: Comparison, out: Path, cell: Cell, watching: Watching) -> Row:
    """The row of a cell, or one that says why there is none."""
    try:
        for extra in extras_of(cell):
            if find_spec(_MODULES[extra]) is None:
                raise MissingExtraError(
                    PROTECTIONS[cell.protection].words
                    if extra != WAYS[cell.training].extra
                    else WAYS[cell.training].words,
                    extra,
                )
        there = found.earlier.get(cell)
        if PROTECTIONS[cell.protection].inference:
            if there is not None and there.is_measured and there.records == found.section.records:
                return there
            _make(found, out, cell.undefended, watching)
            return inference_row(
                cell, _place(out, cell.undefended, found.section.attacks, watching), found.section.records
            )
        return _make(found, out, cell, watching)
    except MilkglassError as error:
        return Row(cell, str(error))


def _make(found: Comparison, out: Path, cell: Cell, watching: Watching) -> Row:
    """Train and audit a cell, unless it was made. Raises MilkglassError."""
    made = next((row for row in found.rows if row.cell == cell and row.is_measured), None)
    if made is not None:
        return made
    if cell.training == "u_shaped" and found.back_at is None:
        raise CutError(
            f"no layer lies between cut.at, {found.recipe.cut.at}, and the network's last one, to come back at; cut "
            "earlier, or name cut.back_at"
        )
    recipe = recipe_of(found.recipe, cell, train_records=found.train_records, back_at=found.back_at)
    reference = None
    if WAYS[cell.training].kind == "split" and cell != cell.undefended:
        _make(found, out, cell.undefended, watching)
        reference = out / "cells" / cell.undefended.name
    return MAKERS[cell.training](cell, recipe, _place(out, cell, found.section.attacks, watching, reference))


def _place(out: Path, cell: Cell, strength: Strength, watching: Watching, reference: Path | None = None) -> Place:
    return Place(out / "cells" / cell.name, cell.name, strength, watching, reference)


def _back_at(recipe: Recipe, records: Deal) -> str | None:
    """Where a U-shaped network comes back: as the recipe says, else as late as can be."""
    if recipe.cut.back_at is not None:
        return recipe.cut.back_at
    weights = public_source(recipe.seed).generator("weights")
    network = build(recipe.network.name, records.record_shape, records.classes, recipe.network.settings, weights)
    names = legal_cuts(network, records.test.x[:2])
    behind = names[names.index(recipe.cut.at) + 1 :] if recipe.cut.at in names else []
    return behind[-1] if behind else None


def _notes(recipe: Recipe) -> list[str]:
    """What of the recipe is not compared."""
    others = [name for name in type(recipe.defense).model_fields if name not in ("nopeek", "channel", "certified")]
    left = [name for name in others if getattr(recipe.defense, name) is not None]
    left = [name for name in left if name != "entropy" or recipe.defense.channel is None]
    return [f"defense.{name} is in the recipe, and in no row: it is not among what is compared" for name in left]


def _earlier(out: Path, recipe: Recipe, section: CompareSection, digest: str) -> dict[Cell, Row]:
    """What an earlier call left that was attacked as hard. Raises RunError where `out` is neither free nor that."""
    if not out.exists():
        return {}
    if not out.is_dir():
        raise RunError(f"{out}: a file of that name exists; choose another --out")
    file = out / "compare.json"
    if not file.exists():
        strange = [each.name for each in out.iterdir() if each.name not in OWN and not each.name.endswith(".partial")]
        if strange:
            raise RunError(f"{out}: holds other files, such as {min(strange)}; choose another --out")
        return {}
    try:
        content = json.loads(file.read_bytes())
        earlier, records = parse_recipe(content["recipe"]), content["records_digest"]
        rows = [read_row(row) for row in content["rows"] if row["status"] == MEASURED]
        as_hard = content["strength"] == section.attacks
    except (OSError, ValueError, KeyError, TypeError, MilkglassError) as error:
        raise RunError(f"{file}: damaged: {first_line(error)}; remove it to go on from the cells") from None
    if earlier.digest() != recipe.digest():
        difference = first_difference(recipe, earlier)
        raise RunError(f"{out}: holds a comparison of another recipe: {difference}; choose another --out")
    if records != digest:
        raise RunError(f"{out}: holds a comparison of other records than are there now; choose another --out")
    return {row.cell: row for row in rows} if as_hard else {}


def _write(out: Path, found: Comparison) -> None:
    content = found.to_dict()
    write_beside(out / "compare.json", (json.dumps(content, indent=2) + "\n").encode())
    write_beside(out / "compare.html", page(content).encode())


def _line(row: Row) -> str:
    if not row.is_measured:
        return f"{row.cell.words}: {row.status}"
    told = [f"{row.cell.words}:"]
    if row.accuracy is not None:
        told.append(f"accuracy {row.accuracy.value:.3f},")
    if row.peek is not None:
        told.append(f"peek {row.peek.value:.3f},")
    told.append(f"{row.bytes_up or 0:,.0f} bytes up, {row.bytes_down or 0:,.0f} down, {row.seconds or 0:.1f} s")
    return " ".join(told) + ("" if row.sound else "; its audit is inconclusive")
