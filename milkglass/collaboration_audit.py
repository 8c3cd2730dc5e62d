"""From a volunteer's run folder to `audit.json` and `pictures.safetensors`: `milkglass audit` of a collaboration."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from milkglass.audit_files import Plan, Watched
from milkglass.collaboration.tasks import ALBERT
from milkglass.contribution_audit import EFFORTS, ContributionAudit, audit_contributions
from milkglass.contributions import Subject
from milkglass.errors import AuditError, RunError, first_line
from milkglass.networks import build
from milkglass.randomness import public_source
from milkglass.recipe import Recipe, load_recipe
from milkglass.runs import RunFolder, tensors_as_bytes, write_beside
from milkglass.training.shares import deal_records
from milkglass.training.split import computing_with, digest_of
from milkglass.verdict import RECONSTRUCTION_MEASURES, check_budget

PRIVATE: Final = "gradients are shared with strangers: private data do not belong in an open collaboration"
NETWORK: Final = "network.safetensors"
FINISHED: Final = (NETWORK, "metrics.jsonl", "summary.json")


def is_collaboration(run: Path) -> bool:
    """Whether the folder is a run of an open collaboration. Raises RecipeError for a bad recipe."""
    recipe = run / "recipe.toml"
    return recipe.is_file() and load_recipe(recipe).parties.is_collaboration


def audit_collaboration(
    run: Path, plan: Plan, *, out: Path | None = None, watching: Callable[[], Watched]
) -> tuple[ContributionAudit, dict[str, Any]]:
    """Audit a volunteer's finished run; returns what was found, and what audit.json holds. watching: who watches.

    Raises RunError for a folder that is no such run, AuditError for a text, a budget on what is not measured, and
    attacks by name: there is one.
    """
    folder = _open(run)
    recipe = folder.recipe
    if recipe.network.name == ALBERT:
        raise AuditError(
            f"{run}: it trains on a text, and gradient inversion here is for pictures and tables; the text is not "
            f"thereby safe: {PRIVATE}"
        )
    if plan.attacks is not None:
        raise AuditError(f"{run}: contributions have one attack, gradient inversion; expected no attacks by name")
    if plan.budget is not None:  # told before the work
        check_budget(plan.budget, RECONSTRUCTION_MEASURES)
    accuracy, own = folder.accuracy, _own_contributions(folder)
    target = out or run
    write_beside(target / "audit.json.partial", b"")
    (target / "audit.json.partial").unlink()
    with computing_with(recipe.threads), watching() as watch:
        found = audit_contributions(
            _subject(folder),
            plan.strength,
            own_size=round(sum(own) / len(own)) if own else None,
            budget=plan.budget,
            seed=recipe.seed,
            progress=watch,
            notes=_notes(recipe, own, EFFORTS[plan.strength].largest),
        )
    content = found.to_dict() | {
        "defense": "none",
        "accuracy": accuracy,
        "own_contributions": {"count": len(own), "mean": sum(own) / len(own), "least": min(own)} if own else None,
    }
    write_beside(target / "pictures.safetensors", tensors_as_bytes(found.pictures))
    write_beside(target / "audit.json", (json.dumps(content, indent=2) + "\n").encode())
    return found, content


def _open(run: Path) -> RunFolder:
    if not (run / "recipe.toml").is_file():
        raise RunError(f"run folder {run}: not a run, or half-written: recipe.toml is missing")
    folder = RunFolder(run, load_recipe(run / "recipe.toml"))
    if not folder.recipe.parties.is_collaboration:
        raise RunError(f"run folder {run}: parties.mode is {folder.recipe.parties.mode}; expected collaboration")
    missing = [name for name in FINISHED if not (run / name).is_file()]
    if missing:
        raise RunError(f"run folder {run}: half-written, {missing[0]} is missing; finish the run first")
    return folder


def _subject(folder: RunFolder) -> Subject:
    """The network at both ends of the run, and the recipe's test records."""
    recipe, section = folder.recipe, folder.recipe.collaboration
    records = deal_records(recipe)
    folder.check_records(digest_of(records))
    weights = public_source(recipe.seed).generator("weights")
    first = build(recipe.network.name, records.record_shape, records.classes, recipe.network.settings, weights)
    last = copy.deepcopy(first)
    try:
        last.load_state_dict(folder.read_tensors(NETWORK))
    except RuntimeError as error:
        raise RunError(f"{folder.path / NETWORK}: not the recipe's network: {first_line(error)}") from None
    return Subject(
        first,
        last,
        records.test.x,
        records.test.y,
        mean=torch.cat([part.x for part in records.train.values()]).mean(0),
        density=section.density if section.compress == "gaussian_k" else None,
    )


def _own_contributions(folder: RunFolder) -> list[int]:
    """How many records each of the run's own contributions was made of. A step made alone was sent to nobody."""
    path = folder.path / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        return [int(line["samples"]) for line in lines if line["samples"] and line["peers"] > 1]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise RunError(f"{path}: damaged, expected samples and peers in each line: {first_line(error)}") from None


def _notes(recipe: Recipe, own: list[int], largest: int) -> list[str]:
    """What a reader has to know of what was attacked."""
    notes = ["the attacker has a whole contribution; a single reducer of a plain averaging is sent a part of one"]
    if own:
        notes.append(
            f"this volunteer's own {len(own)} contributions were of {sum(own) / len(own):.0f} records on average, "
            f"{min(own)} the smallest; sizes up to {largest} were attacked, and the verdict takes the worst of them"
        )
    compress = recipe.collaboration.compress
    if compress == "gaussian_k":
        notes.append("Gaussian-k was applied to what is attacked, without what earlier contributions left over")
    elif compress != "none":
        notes.append(f"contributions are attacked before {compress} rounds them, which hides next to nothing")
    return notes
