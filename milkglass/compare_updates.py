"""Rows of trainings in which clients share updates of a whole network: what an update is in each way, and its audit."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from milkglass.attacks.gradients import gradients_from_step
from milkglass.audit_files import accuracy_of
from milkglass.compare import MEASURED, Cell, Row
from milkglass.compare_place import Place, batches_of_client, record_gradients, slots
from milkglass.contributions import Share, Subject, gradients_of
from milkglass.cuts import flops_per_sample
from milkglass.data import Deal
from milkglass.errors import AuditError, RunError, first_line
from milkglass.leakage.estimate import Estimate
from milkglass.networks import build
from milkglass.randomness import public_source
from milkglass.recipe import Recipe
from milkglass.runs import RunFolder, tensors_as_bytes, write_beside
from milkglass.training.client_memory import training_bytes
from milkglass.training.setup import optimizer
from milkglass.training.shares import deal_records
from milkglass.training.split import computing_with
from milkglass.update_audit import audit_updates

NETWORK: Final = "network.safetensors"
AUDIT: Final = "update_audit.json"
"""Of another form than audit.json, which tells of what crossed a cut."""


_ADAM: Final = "with Adam what weights moved is no gradient, so this attack is weaker than one that knows that might be"


def _moves_by_adam(cell: Cell, recipe: Recipe) -> bool:
    return recipe.training.optimizer == "adam" and cell.training in ("federated", "adaptive")


def update_row(
    cell: Cell,
    recipe: Recipe,
    place: Place,
    summary: Mapping[str, Any],
    share: Share,
    own_size: int,
    notes: list[str],
    inside: str = ".",
) -> Row:
    """What all trainings of a whole network have in common."""
    records = deal_records(recipe)
    first, last = _networks(recipe, records, place.run / inside / NETWORK)
    content = _audited_or_why(
        recipe,
        records,
        place,
        Subject(
            first,
            last,
            records.test.x,
            records.test.y,
            mean=torch.cat([part.x for part in records.train.values()]).mean(0),
            shared=share,
        ),
        own_size,
        notes,
    )
    batch = next(iter(records.train.values())).x[: recipe.training.batch_size]
    flops, learned = flops_per_sample(first, batch[:1]), sum(each.numel() for each in first.parameters())
    batches = (
        summary["client_samples"] / len(batch) if "client_samples" in summary else batches_of_client(recipe, summary)
    )
    try:
        measures = {name: Estimate(**value) for name, value in content["measures"].items()}
        notes = [*map(str, content["notes"])]
        sound, sizes = content["verdict"] != "inconclusive", content["contributions"]
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{place.run / AUDIT}: damaged: {error!r}; remove it to attack once more") from None
    return Row(
        cell,
        MEASURED,
        accuracy=accuracy_of(summary),
        client_flops=flops * batches * recipe.training.batch_size,
        client_memory=training_bytes([(first, batch)], slots(recipe)) + record_gradients(recipe, learned),
        seconds=float(summary["seconds"]),
        peek=measures.get("peek"),
        gradient_inversion=measures.get("peek"),
        membership=measures.get("membership.auc"),
        sound=sound,
        notes=(*notes, *([_ADAM] if _moves_by_adam(cell, recipe) else [])),
        run=place.name,
        details={"update_records": sizes},
    )


def federated_share(recipe: Recipe, records: int) -> Share:
    """What the weights of a client of so many records moved in a round from given ones, as mean gradients.

    An update that is attacked may be of fewer records: noise then hides each as well as it does in the run.
    """
    from milkglass.training.federated import local_update, mechanism

    private = mechanism(recipe, records)

    def shared(network: nn.Module, x_B: Tensor, y_B: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        size = min(recipe.training.batch_size, len(x_B))
        small = recipe.model_copy(update={"training": recipe.training.model_copy(update={"batch_size": size})})
        drawn = int(torch.randint(2**31, (), generator=generator))
        of_batch = None if private is None else replace(private, batch_size=size)
        source = public_source(drawn)
        after = local_update(network, x_B, y_B, small, source=source, epoch=1, private=of_batch)
        steps = recipe.federated.local_epochs * (len(x_B) // size)
        return _moved(network, after, recipe.training.learning_rate * steps)

    return shared


def moved_share(recipe: Recipe) -> Share:
    """What a client's weights moved in one step of the recipe's optimizer."""

    def shared(network: nn.Module, x_B: Tensor, y_B: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        own = copy.deepcopy(network).train()
        learning = optimizer(recipe, own)
        assert learning is not None  # a network without weights is refused before it is trained
        for parameter, gradient in zip(own.parameters(), gradients_of(network, x_B, y_B, generator), strict=True):
            parameter.grad = gradient
        learning.step()
        return _moved(network, own.state_dict(), recipe.training.learning_rate)

    return shared


def _moved(network: nn.Module, after: Mapping[str, Tensor], scale: float) -> tuple[Tensor, ...]:
    named = dict(network.named_parameters())
    return gradients_from_step(list(named.values()), [after[name] for name in named], scale)


def _audited_or_why(*of: Any) -> dict[str, Any]:
    """Of a network that the attack breaks on, why: then a row has no peek, and no verdict may rest on it."""
    try:
        return _audited_updates(*of)
    except AuditError as error:
        why = f"updates were not attacked: {error}"
        return {"measures": {}, "notes": [why], "verdict": "inconclusive", "contributions": []}


def _audited_updates(
    recipe: Recipe, records: Deal, place: Place, subject: Subject, own_size: int, notes: list[str]
) -> dict[str, Any]:
    path = place.run / AUDIT
    if path.is_file():
        try:
            content: dict[str, Any] = json.loads(path.read_bytes())
        except ValueError as error:
            raise RunError(f"{path}: damaged: {first_line(error)}; remove it to attack once more") from None
        if isinstance(content, dict) and content.get("strength") == place.strength:
            return content
    name = next(iter(records.train))
    with computing_with(recipe.threads), place.watching.audit() as watch:
        found = audit_updates(
            subject,
            own_size,
            records.candidates(name),
            place.strength,
            seed=recipe.seed,
            progress=watch,
            notes=notes,
        )
    write_beside(place.run / "pictures.safetensors", tensors_as_bytes(found.contributions.pictures))
    write_beside(path, (json.dumps(found.to_dict(), indent=2) + "\n").encode())
    return found.to_dict()


def _networks(recipe: Recipe, records: Deal, file: Path) -> tuple[nn.Module, nn.Module]:
    """The network with its first weights, which all know from the seed, and with the last ones."""
    made = []
    for _ in range(2):
        weights = public_source(recipe.seed).generator("weights")
        settings = recipe.network.settings
        made.append(build(recipe.network.name, records.record_shape, records.classes, settings, weights))
    try:
        made[1].load_state_dict(RunFolder(file.parent, recipe).read_tensors(file.name))
    except RuntimeError as error:
        raise RunError(f"{file}: not the recipe's network any more: {first_line(error)}; remove its folder") from None
    return made[0], made[1]
