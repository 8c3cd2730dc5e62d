"""From a finished run to `bounds.json`, and over training-set sizes to `bounds.svg`: what `milkglass bounds` does.

bounds.json has `run`, `records` (training records, of all clients), `epochs`, `batch_size`, all that `bounds.Proof`
has (`members`, `others`, `accuracy_on_members`, `accuracy_on_others`, `gaps`, `bounds`, `attacks`), `audit`, the
membership rows of the run's audit.json as they stand there, or null, and `notes`, what a reader has to know. With sizes
it has `sizes` as well: for each size, the smallest first, an object of the same keys.

size-200/     a run of the same recipe with 200 training records, as `train` leaves it: one that was stopped goes on
bounds.json   written anew after every size
bounds.svg    gap, bounds and attacks against the size
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from pydantic import TypeAdapter, ValidationError

from milkglass.bounds import FEWEST, Losses, Proof, losses_of, prove
from milkglass.bounds_figure import picture
from milkglass.data import Records
from milkglass.errors import AuditError, RunError
from milkglass.recipe import Recipe, parse_recipe
from milkglass.replay import check_replayable, load_parties
from milkglass.results import Inference
from milkglass.runs import RunFolder, write_beside
from milkglass.training.evaluate import BATCH
from milkglass.training.shares import deal_records
from milkglass.training.split import Progress, Setup, computing_with, train
from milkglass.verdict import MEMBERSHIP_MEASURES

FILE: Final = "bounds.json"
FIGURE: Final = "bounds.svg"


@final
@dataclass(frozen=True)
class Measured:
    """What one run proves. records: training records of all clients; audit: membership rows of its audit.json."""

    run: Path
    records: int
    epochs: int
    batch_size: int
    proof: Proof
    audit: tuple[Inference, ...] | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As in bounds.json."""
        return {
            "run": str(self.run),
            "records": self.records,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            **self.proof.to_dict(),
            "audit": None if self.audit is None else [row.model_dump(mode="json") for row in self.audit],
            "notes": list(self.notes),
        }


def bounds_of_run(run: Path, out: Path | None = None) -> Measured:
    """Measure a finished run and write bounds.json, in `out` or beside it.

    Raises AuditError, one line, for a run whose server cannot be asked for a loss, or that set no records aside.
    """
    found = _measure(RunFolder.open_finished(run))
    _write(out or run, found, None)
    return found


def bounds_over_sizes(
    run: Path,
    sizes: Sequence[int],
    out: Path | None = None,
    *,
    training: Callable[[int, str], AbstractContextManager[Progress]],
    tell: Callable[[str], None],
) -> tuple[Measured, tuple[Measured, ...]]:
    """Measure the run, train its recipe with each number of records, measure these, and draw it all.

    training: who watches a training of so many epochs, by its name. tell: who is told, in a line, how one is made.
    Raises AuditError before any work for sizes that the data do not have.
    """
    folder = RunFolder.open_finished(run)
    whole = _measure(folder)
    _check_sizes(folder.recipe, sizes)
    recipes = [_sized(folder.recipe, size, whole.records) for size in sorted(set(sizes))]
    target = out or run
    made: list[Measured] = []
    for recipe in recipes:
        size = _records(recipe)
        path = target / f"size-{size}"
        if recipe.digest() == folder.recipe.digest():
            tell(f"{size:,} records: this is {run} itself")
            made.append(whole)
        else:
            tell(f"{size:,} records: {path}, {recipe.training.epochs:,} epochs, {_batch_words(folder.recipe, recipe)}")
            with training(recipe.training.epochs, f"{size:,} records") as progress:
                train(recipe, path, resume=True, progress=progress)
            made.append(_measure(RunFolder.open_finished(path)))
        _write(target, whole, made)
    write_beside(target / FIGURE, picture([each.to_dict() for each in made]).encode())
    return whole, tuple(made)


def parse_sizes(text: str) -> tuple[int, ...]:
    """The training-set sizes in "10,200,1000", in order, each once. Raises AuditError."""
    sizes = []
    for part in text.split(","):
        if not part.strip().isdecimal() or int(part) < FEWEST:
            raise AuditError(
                f"--sizes {text!r}: {part.strip()!r} is no size; expected whole numbers of {FEWEST} or more, with "
                "commas between"
            )
        sizes.append(int(part))
    return tuple(sorted(set(sizes)))


def _measure(run: RunFolder) -> Measured:
    recipe = run.recipe
    _check(recipe)
    with computing_with(recipe.threads):
        setup = load_parties(run)
        members = setup.records.train[setup.client.name]
        outside = [setup.records.auxiliary, setup.records.validation]
        if not setup.records.test_is_separate:  # else two sources would be told apart, not members
            outside.append(setup.records.test)
        proof = prove(
            _losses(setup, [members]), _losses(setup, [part for part in outside if len(part)]), seed=recipe.seed
        )
    return Measured(
        run=run.path,
        records=sum(len(part) for part in setup.records.train.values()),
        epochs=recipe.training.epochs,
        batch_size=recipe.training.batch_size,
        proof=proof,
        audit=_audited(run),
        notes=_notes(recipe, proof),
    )


def _losses(setup: Setup, parts: Sequence[Records]) -> Losses:
    """What the server answers to one release of each record, defenses on."""
    x, y_N = torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts])
    logits_NK = torch.cat([setup.client.predict(part)[0] for part in torch.split(x, BATCH)])
    return losses_of(logits_NK, y_N)


def _audited(run: RunFolder) -> tuple[Inference, ...] | None:
    """The membership rows of the run's audit; None where it has none."""
    if not (run.path / "audit.json").exists():
        return None
    rows = run.read_json("audit.json").get("inferences", [])
    try:
        found = TypeAdapter(tuple[Inference, ...]).validate_python(rows)
    except ValidationError as error:
        raise RunError(f"{run.path / 'audit.json'}: damaged: inferences: {error.errors()[0]['msg']}") from None
    return tuple(row for row in found if row.measure in MEMBERSHIP_MEASURES) or None


def _notes(recipe: Recipe, proof: Proof) -> tuple[str, ...]:
    notes = []
    if proof.others < proof.members:
        notes.append(
            f"only {proof.others:,} records are no members, fewer than there are members ({proof.members:,}): the "
            "intervals are theirs"
        )
    if len(recipe.parties.clients) > 1:
        notes.append(f"members are the records of {recipe.parties.clients[0]}; other clients' records are neither")
    if recipe.network.start is not None:
        notes.append(
            "the network began with another run's weights; whether that was trained on what counts as no member here "
            "is not known"
        )
    return tuple(notes)


def _check(recipe: Recipe) -> None:
    check_replayable(recipe)
    if recipe.cut.back_at is not None:
        raise AuditError(
            "bounds: in a U-shaped run the server has neither labels nor the network's last part, so it cannot compute "
            "a loss; expected a run whose server does"
        )


def _records(recipe: Recipe) -> int:
    assert recipe.data.train_records is not None  # _sized
    return recipe.data.train_records


def _sized(recipe: Recipe, size: int, own: int) -> Recipe:
    """The same recipe with so many training records in place of its own number, trained as long by either yardstick.

    That is as many epochs as the recipe has or more, and as many batches as it came to or more. Batches are as large as
    before, or as the records allow.
    """
    training, clients = recipe.training, len(recipe.parties.clients)
    tables = recipe.model_dump(mode="json", exclude_none=True)
    tables["data"]["train_records"] = size
    batch = min(training.batch_size, size // clients)
    if batch < training.batch_size:
        tables["training"] |= {"batch_size": batch, "micro_batches": 1}
    if size < own:
        batches = training.epochs * _batches(recipe, own // clients, training.batch_size)
        epochs = math.ceil(batches / _batches(recipe, size // clients, batch))
        tables["training"]["epochs"] = max(training.epochs, epochs)
    return parse_recipe(tables, where=f"--sizes: {size} training records")


def _batches(recipe: Recipe, records: int, size: int) -> int:
    return max(1, records // size if recipe.training.drop_last_batch else math.ceil(records / size))


def _batch_words(before: Recipe, after: Recipe) -> str:
    size, own = after.training.batch_size, before.training.batch_size
    return f"batches of {size}" + (f" (lowered from {own}: there are no more records)" if size < own else "")


def _check_sizes(recipe: Recipe, sizes: Sequence[int]) -> None:
    """Raise AuditError for sizes too small for every client to have some records, and for more than there are."""
    clients, largest = len(recipe.parties.clients), max(sizes)
    if min(sizes) < FEWEST * clients:
        raise AuditError(f"--sizes: {min(sizes)} records for {clients} clients; expected {FEWEST} or more for each")
    data = recipe.data.model_copy(update={"train_records": largest})
    there = sum(len(part) for part in deal_records(recipe.model_copy(update={"data": data})).train.values())
    if there < largest:
        raise AuditError(
            f"--sizes: {largest:,} training records; the data have {there:,} beside those that are set aside for tests "
            "and, as no members, by attacker.auxiliary_share and attacker.validation_share"
        )


def _write(target: Path, whole: Measured, sizes: Sequence[Measured] | None) -> None:
    content = whole.to_dict() | ({} if sizes is None else {"sizes": [each.to_dict() for each in sizes]})
    write_beside(target / FILE, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
