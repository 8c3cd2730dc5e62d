"""A sweep on disk: every cell is a run folder, trained and audited on fresh records; what `milkglass frontier` does.

cells/channel-0.3-seed0/      a run as `train` and `audit` leave it; the undefended one is the reference of all
finalists/channel-0.3-seed1/  the chosen setting on other seeds, each beside an undefended run of its own
frontier.json                 what is known so far: written anew after every cell
frontier.svg, frontier.html   the picture, and a page with it
recipe.toml                   with a budget: the recipe to use

A sweep that was stopped goes on: at the next cell, and inside a cell at the next epoch, or attack.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

from milkglass.attacks.suite import Strength
from milkglass.audit_files import Plan, Watching, accuracy_of, audit_run
from milkglass.errors import AuditError, DataError, MilkglassError, MissingExtraError, RunError
from milkglass.frontier import (
    UNDEFENDED,
    Failure,
    Finalist,
    Row,
    Setting,
    choose,
    cut_by_budget,
    cut_widest,
    front,
    means_of,
    misses,
    nearest_row,
    recipe_of,
    settings_of,
    verdict_of,
)
from milkglass.frontier_figure import page, picture
from milkglass.leakage.estimate import Estimate
from milkglass.recipe import Recipe, first_difference, parse_recipe
from milkglass.replay import find_reference
from milkglass.runs import RunFolder, write_beside
from milkglass.sections import FrontierSection
from milkglass.training.shares import deal_records
from milkglass.training.split import digest_of, train
from milkglass.training.summary import certificate_ahead
from milkglass.verdict import BITS, MATCHING, MEMBERSHIP_MEASURES, RECONSTRUCTION_MEASURES, Verdict, check_budget

SEEDS_OF_FINALISTS: Final = (1, 2, 3)
"""Added to the recipe's: other deals of the records than the sweep's, which chose the setting."""
FATAL: Final = (RunError, DataError, MissingExtraError)
"""What ends a sweep; another error of milkglass ends a cell."""
OWN: Final = ("cells", "finalists", "frontier.json", "frontier.svg", "frontier.html", "recipe.toml")


@final
@dataclass
class Frontier:
    """What a sweep has found so far. chosen: the setting for the budget; nearest: where nothing meets it."""

    recipe: Recipe
    strength: Strength
    budget: Mapping[str, float] | None
    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    chosen: Row | None = None
    nearest: Row | None = None
    finalists: list[Finalist] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def reference(self) -> Row | None:
        """The undefended cell; None before it is made."""
        return next((row for row in self.rows if row.setting == UNDEFENDED), None)

    @property
    def held(self) -> Verdict | None:
        """Whether the finalists hold the budget on fresh records; None without any."""
        return verdict_of(self.finalists) if self.finalists else None

    def to_dict(self) -> dict[str, Any]:
        """What frontier.json holds."""
        on_front = front(self.rows)
        reference, chosen, near = self.reference, self.chosen, self.nearest
        return {
            "recipe_digest": self.recipe.digest(),
            "recipe": self.recipe.model_dump(mode="json", exclude_none=True),
            "strength": self.strength,
            "seed": self.recipe.seed,
            "budget": None if self.budget is None else dict(self.budget),
            "reference": None if reference is None else {**reference.accuracy.to_dict(), "run": reference.run},
            "rows": [row.to_dict(self.budget, on_front=on) for row, on in zip(self.rows, on_front, strict=True)],
            "failed": [failure.to_dict() for failure in self.failures],
            "chosen": None if chosen is None else _named(chosen),
            "nearest": None if near is None else {**_named(near), "misses": misses(near, self.budget or {})},
            "finalists": [finalist.to_dict() for finalist in self.finalists],
            "finalists_verdict": self.held,
            "finalists_means": means_of(self.finalists) or None,
            "notes": self.notes,
        }


def _named(row: Row) -> dict[str, Any]:
    setting = row.setting
    return {"family": setting.family, "strength": setting.strength, "defense": row.defense, "run": row.run}


def sweep(
    recipe: Recipe, out: Path, *, strength: Strength, budget: Mapping[str, float] | None, watching: Watching
) -> Frontier:
    """Make every cell that is not made yet, choose by the budget, and retrain the choice on three other seeds.

    Raises MilkglassError, one line, before any work where the recipe or the budget cannot be swept, or `out` holds
    another recipe's sweep.
    """
    settings, notes = settings_of(recipe)
    # a run that cannot be replayed is told before the first training; nothing is read or written
    find_reference(RunFolder(out, recipe_of(recipe, UNDEFENDED)))
    if budget is not None:
        notes += _check_budget(recipe, settings, budget, strength)
    found = Frontier(recipe, strength, budget, notes=notes)
    earlier = _earlier(out, recipe)
    work = _Sweep(found, out, watching, len(settings))
    work.write()
    for setting in settings:
        work.visit(setting)
    for _ in range((recipe.frontier or FrontierSection()).bisections):
        families = dict.fromkeys(setting.family for setting in settings if setting.strength is not None)
        cuts = (
            [cut_widest(found.rows, work.tried)]
            if budget is None
            else [cut_by_budget(found.rows, family, budget, work.tried) for family in families]
        )
        for cut in cuts:
            if cut is not None:
                work.visit(cut)
    for setting in earlier:
        work.visit(setting)
    doubtful = sum(not row.sound for row in found.rows)
    if doubtful:
        found.notes.append(f"{doubtful} of {len(found.rows)} audits are inconclusive; none of those settings is chosen")
    if budget is not None:
        found.chosen = choose(found.rows, budget)
        found.nearest = nearest_row(found.rows, budget) if found.chosen is None else None
    if found.chosen is not None:
        work.make_finalists(found.chosen)
    work.write()
    return found


@final
class _Sweep:
    """The cells of one sweep, in its folder `out`; so many of them are in the grid, and others follow from those."""

    def __init__(self, found: Frontier, out: Path, watching: Watching, grid: int) -> None:
        self._found = found
        self._out = out
        self._watching = watching
        self._grid = grid
        self.tried: set[Setting] = set()
        self._digests: dict[int, str] = {}

    def visit(self, setting: Setting) -> None:
        """Make the cell, or read what was made, and write down what is known now."""
        if setting in self.tried:
            return
        self.tried.add(setting)
        found, seed = self._found, self._found.recipe.seed
        run = f"cells/{setting.name}-seed{seed}"
        count = f"cell {len(self.tried)}" + (f" of {self._grid}" if len(self.tried) <= self._grid else "")
        try:
            row = self._cell(setting, seed, run)
        except FATAL:
            raise
        except MilkglassError as error:
            if setting == UNDEFENDED:
                raise  # nothing can be measured without it
            found.failures.append(Failure(setting, seed, str(error), run))
            self._watching.tell(f"{count}: {setting.words}: failed: {error}")
        else:
            found.rows.append(row)
            self._watching.tell(f"{count}: {_line(row)}")
        self.write()

    def make_finalists(self, chosen: Row) -> None:
        """Train and audit the chosen setting on other seeds, in all exposures, and write the recipe to use."""
        found = self._found
        self.write()
        for further in SEEDS_OF_FINALISTS:
            seed = found.recipe.seed + further
            run = f"finalists/{chosen.setting.name}-seed{seed}"
            try:
                finalist = self._finalist(chosen.setting, seed, run)
            except FATAL:
                raise
            except MilkglassError as error:
                finalist = Finalist(seed, run, failed=str(error))
            found.finalists.append(finalist)
            self._watching.tell(_line_of(finalist))
            self.write()
        found.notes.append(
            "finalists have other training records, pairs and first weights; their test records are drawn from the "
            "same records as those that the choice was made on"
        )
        if found.recipe.network.start is not None:
            found.notes.append(
                "finalists begin with one and the same run, network.start, which was trained on another seed's deal: "
                "some of their test records may have taught it"
            )
        others = [name for name in found.budget or {} if name not in ("peek", BITS)]
        if others:
            found.notes.append(f"finalists: {', '.join(others)} of the worst exposure, not of fresh records alone")
        limits = ", ".join(f"{name}<={limit:g}" for name, limit in (found.budget or {}).items())
        head = f"# chosen by milkglass frontier for {limits}: {chosen.defense}; its finalists: {found.held}\n"
        text = recipe_of(found.recipe, chosen.setting).to_toml()
        write_beside(self._out / "recipe.toml", (head + text).encode())

    def write(self) -> None:
        """Write down what is known: the figures, the picture, the page."""
        content = self._found.to_dict()
        write_beside(self._out / "frontier.json", (json.dumps(content, indent=2) + "\n").encode())
        drawn = picture(content)
        write_beside(self._out / "frontier.svg", drawn.encode())
        write_beside(self._out / "frontier.html", page(content, drawn).encode())

    def _cell(self, setting: Setting, seed: int, run: str) -> Row:
        recipe = recipe_of(self._found.recipe, setting, seed)
        summary = self._trained(recipe, run)
        reference = None if setting == UNDEFENDED else f"cells/{UNDEFENDED.name}-seed{seed}"
        content = self._audited(run, reference, fresh_only=True)
        share = float(summary["client_flops_share"])
        measures = _fresh(content)
        sound = content["verdict"] != "inconclusive"
        return Row(setting, seed, str(summary["defense"]), accuracy_of(summary), measures, sound, share, run)

    def _finalist(self, setting: Setting, seed: int, run: str) -> Finalist:
        reference = f"finalists/{UNDEFENDED.name}-seed{seed}"
        undefended = self._trained(recipe_of(self._found.recipe, UNDEFENDED, seed), reference)
        summary = self._trained(recipe_of(self._found.recipe, setting, seed), run)
        content = self._audited(run, reference, fresh_only=False)
        accuracy, measures = accuracy_of(summary), _fresh(content)
        row = Row(setting, seed, "", accuracy, measures, content["verdict"] != "inconclusive", 0.0, run)
        exposures = {name: Estimate(**value) for name, value in content["exposures"].items()}
        lost_from = float(undefended["accuracy"])
        return Finalist(seed, run, accuracy, lost_from, exposures, measures, row.verdict(self._found.budget))

    def _trained(self, recipe: Recipe, run: str) -> dict[str, Any]:
        """The summary of a cell's training, which is made if it is not."""
        path = self._out / run
        if not (path / "summary.json").is_file():
            with self._watching.training(recipe.training.epochs, run) as progress:
                return train(recipe, path, resume=True, progress=progress)
        folder = RunFolder.open_finished(path)
        difference = first_difference(recipe, folder.recipe)
        if difference is not None:
            raise RunError(f"run folder {path}: belongs to another recipe: {difference}")
        folder.check_records(self._records_digest(recipe))
        return folder.read_json("summary.json")

    def _records_digest(self, recipe: Recipe) -> str:
        """Of the records that are there now, dealt by a recipe's seed: paths are no part of what a recipe agrees on."""
        if recipe.seed not in self._digests:
            self._digests[recipe.seed] = digest_of(deal_records(recipe))
        return self._digests[recipe.seed]

    def _audited(self, run: str, reference: str | None, *, fresh_only: bool) -> dict[str, Any]:
        """What audit.json holds of a cell; a budget is no part of it, so that another one needs no new audit.

        A sweep may be quick; what it chose is attacked with all that is usual.
        """
        strength: Strength = self._found.strength
        if not fresh_only and strength == "quick":
            strength = "default"
        path, plan = self._out / run, Plan(strength, fresh_only=fresh_only)
        if (path / "audit.json").is_file():
            content = RunFolder.open_finished(path).read_json("audit.json")
            made = (content.get("strength"), content.get("fresh_only"), content.get("attacks_asked_for"))
            if made == (plan.strength, plan.fresh_only, None):
                return content
        _, content = audit_run(
            path,
            plan,
            reference=None if reference is None else self._out / reference,
            training=self._watching.training,
            watching=self._watching.audit,
        )
        return content


def _check_budget(
    recipe: Recipe, settings: list[Setting], budget: Mapping[str, float], strength: Strength
) -> list[str]:
    """Refuse a budget that no setting could be judged by; a note on those that have no certificate it asks for."""
    measured = [*RECONSTRUCTION_MEASURES, *(f"attribute.{name}" for name in recipe.data.sensitive), BITS]
    measured += [] if strength == "quick" else [MATCHING]
    measured += [] if recipe.cut.back_at is not None else MEMBERSHIP_MEASURES
    check_budget(budget, measured)
    if BITS not in budget:
        return []
    records, without, why = deal_records(recipe), [], ""
    for setting in settings:
        try:
            certificate_ahead(recipe_of(recipe, setting), records.record_shape, records.classes)
        except MilkglassError as error:  # a setting that cannot be trained has none either; it fails in its own cell
            without.append(setting)
            why = str(error)
    names = ", ".join(dict.fromkeys(setting.family for setting in without))
    if len(without) == len(settings):
        raise AuditError(f"budget on bits: a certificate asked of defenses that have none ({names}): {why}")
    return [f"without a certificate, so outside any budget on bits: {names}"] if without else []


def _earlier(out: Path, recipe: Recipe) -> list[Setting]:
    """The settings that an earlier sweep of the same recipe has made in this folder. Raises RunError for another's."""
    if not out.exists():
        return []
    if not out.is_dir():
        raise RunError(f"{out}: a file of that name exists; choose another --out")
    if not (out / "frontier.json").exists():
        strange = [file.name for file in out.iterdir() if file.name not in OWN and not file.name.endswith(".partial")]
        if strange:
            raise RunError(f"{out}: holds other files, such as {min(strange)}; choose another --out")
        return []
    try:
        content = json.loads((out / "frontier.json").read_bytes())
        swept = parse_recipe(content["recipe"])
        settings = [Setting(row["family"], row["strength"]) for row in content["rows"]]
    except (OSError, ValueError, KeyError, TypeError, MilkglassError) as error:
        raise RunError(f"{out / 'frontier.json'}: damaged: {error!r}; remove it to go on from the cells") from None
    if recipe.digest() != swept.digest():
        raise RunError(
            f"{out}: holds a sweep of another recipe: {first_difference(recipe, swept)}; choose another --out"
        )
    return settings


def _fresh(content: Mapping[str, Any]) -> dict[str, Estimate]:
    """The measures that an audit holds, the peek of fresh records; the others are of the worst exposure it covers."""
    measures = {name: Estimate(**value) for name, value in content["measures"].items()}
    return {**measures, "peek": Estimate(**content["exposures"]["fresh"])}


def _line(row: Row) -> str:
    bits = "" if row.bits is None else f", {row.bits:.1f} bits"
    doubt = "" if row.sound else "; inconclusive"
    return (
        f"{row.setting.words}: accuracy {row.accuracy.value:.3f}, peek {row.peek.value:.3f} "
        f"({row.peek.low:.3f} to {row.peek.high:.3f}){bits}{doubt}"
    )


def _line_of(finalist: Finalist) -> str:
    if finalist.accuracy is None:
        return f"finalist, seed {finalist.seed}: failed: {finalist.failed}"
    peeks = ", ".join(f"{name} {value.value:.3f}" for name, value in finalist.exposures.items())
    return (
        f"finalist, seed {finalist.seed}: accuracy {finalist.accuracy.value:.3f}, undefended "
        f"{finalist.reference_accuracy:.3f}; peek: {peeks}; {finalist.verdict} on fresh records"
    )
