"""One cell of a comparison on disk: trained, attacked, and told as a row. `compare_files.py` goes through all of them.

cells/split-channel-2/          a run folder, as `train` leaves it, with what the audit found: audit.json
cells/federated-none-10/        of a whole network's training; what was found of its updates is update_audit.json
cells/collaboration-none-2/     volunteer-1/, volunteer-2/, ...
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from milkglass.audit_files import Plan, accuracy_of, audit_run
from milkglass.codec import encode
from milkglass.compare import MEASURED, Cell, Row
from milkglass.compare_place import Place, batches_of_client, covers, guarantee, record_gradients, slots
from milkglass.compare_processes import finished, run_ranks, run_volunteers, volunteers
from milkglass.compare_updates import federated_share, moved_share, update_row
from milkglass.contributions import Share, gradients_of
from milkglass.errors import DataError, RunError
from milkglass.leakage.estimate import Estimate
from milkglass.messages import Message
from milkglass.recipe import Recipe
from milkglass.replay import load_parties
from milkglass.runs import RunFolder
from milkglass.training.client_memory import training_bytes
from milkglass.training.shares import deal_records
from milkglass.training.split import train
from milkglass.update_audit import mean_of

_PENALTY: Final = "FLOPs and memory are without those of NoPeek's penalty"


def split_row(cell: Cell, recipe: Recipe, place: Place) -> Row:
    """A split training, all parties in this process, attacked as `milkglass audit` does."""
    with place.watching.training(recipe.training.epochs, place.name) as progress:
        summary = train(recipe, place.run, resume=True, progress=progress)
    content = _audited(place)
    setup = load_parties(RunFolder.open_finished(place.run))
    client, x_B = setup.client, setup.seats[0].share.train.x[: recipe.training.batch_size]
    held: list[tuple[nn.Module, Tensor]] = [(client.stage, x_B)]
    if client.head is not None:
        with torch.no_grad():
            held.append((client.head, setup.server.stage.eval()(client.stage.eval()(x_B))))
    learned = sum(each.numel() for stage, _ in held for each in stage.parameters())
    try:
        measures = {name: Estimate(**value) for name, value in content["measures"].items()}
        told = {name: content[name] for name in ("exposures", "best_attack", "peek", "verdict")}
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{place.run / 'audit.json'}: damaged: {error!r}; remove it to attack once more") from None
    attributes = [value for name, value in measures.items() if name.startswith("attribute.")]
    batches = batches_of_client(recipe, summary)
    return Row(
        cell,
        MEASURED,
        accuracy=accuracy_of(summary),
        client_flops=float(summary["client_flops_per_sample"]) * batches * recipe.training.batch_size,
        client_memory=training_bytes(held, slots(recipe)) + record_gradients(recipe, learned),
        bytes_up=summary["bytes_sent"] / cell.clients,
        bytes_down=summary["bytes_received"] / cell.clients,
        rounds=round(batches),
        seconds=float(summary["seconds"]),
        peek=Estimate(**told["peek"]),
        membership=measures.get("membership.auc"),
        attribute=max(attributes, key=lambda each: each.high, default=None),
        sound=told["verdict"] != "inconclusive",
        guarantee=guarantee(summary),
        guarantee_covers=covers(cell, summary),
        notes=(*summary["cautions"], *([_PENALTY] if recipe.defense.nopeek is not None else [])),
        run=place.name,
        details={**told, "wire": summary["wire"]},
    )


def whole_row(cell: Cell, recipe: Recipe, place: Place) -> Row:
    """Training at one place: the records themselves are handed over, once. Their bytes are those of one message."""
    from milkglass.training.large_batch import train as train_alone

    with place.watching.training(recipe.training.epochs, place.name) as progress:
        summary = train_alone(recipe, place.run, resume=True, progress=progress)
    assert summary is not None  # there is one rank
    records = deal_records(recipe)
    x, y = (torch.cat([getattr(part, name) for part in records.train.values()]) for name in ("x", "y"))
    sent = len(_frame(x, y))
    return Row(
        cell,
        MEASURED,
        accuracy=accuracy_of(summary),
        client_flops=0.0,
        client_memory=x.nbytes + y.nbytes,
        bytes_up=float(sent),
        bytes_down=0.0,
        rounds=1,
        seconds=float(summary["seconds"]),
        peek=Estimate(1.0, 1.0, 1.0),
        membership=Estimate(1.0, 1.0, 1.0),
        notes=("who computes holds the records: all is known by definition, and nothing was attacked",),
        run=place.name,
    )


def federated_row(cell: Cell, recipe: Recipe, place: Place) -> Row:
    """Federated averaging on Flower's simulation; attacked is what is seen: one client's updates, or the sum of all."""
    from milkglass.training.federated import train as train_federated

    with place.watching.training(recipe.training.epochs, place.name) as progress:
        summary = train_federated(recipe, place.run, resume=True, progress=progress)
    secure = recipe.federated.secure_aggregation is not None
    by_client = list(summary["bytes_by_client"].values())
    own = round(sum(summary["records"]["train"].values()) / cell.clients)
    share, notes = federated_share(recipe, own), ["an update is what a client's weights moved in one round"]
    if secure:
        own, share = own * cell.clients, mean_of(share, cell.clients)
        notes = ["attacked is the clients' mean update, which is all that secure aggregation opens"]
    row = update_row(cell, recipe, place, summary, share, own, notes)
    words, rounds = guarantee(summary), int(summary["rounds"])
    framing = sum(flow["bytes"] - flow["payload_bytes"] for flow in summary["wire"]) / (2 * cell.clients * (rounds + 1))
    if secure:
        from milkglass.private.secure_aggregation import GUARANTEE

        words = GUARANTEE
    return replace(
        row,
        bytes_up=sum(sent for sent, _ in by_client) / len(by_client),
        bytes_down=sum(received for _, received in by_client) / len(by_client),
        rounds=rounds,
        details={**row.details, "framing_bytes_per_message": framing},
        guarantee=words,
        guarantee_covers=covers(cell, summary),
    )


def parallel_row(cell: Cell, recipe: Recipe, place: Place) -> Row:
    """Large-batch SGD, or adaptive periodic averaging, by ranks under torchrun; bytes are counted at their sockets."""
    train, size = sum(map(len, deal_records(recipe).train.values())), recipe.training.batch_size
    if train < size * cell.clients:  # told before so many processes are started
        raise DataError(f"{train} training records make no batch of {size} for each of {cell.clients} ranks")
    summary = finished(recipe, place.run) or run_ranks(recipe, place.run, cell.clients)
    adaptive = cell.training == "adaptive"
    share: Share = gradients_of
    notes = ["attacked is one client's whole gradient; a ring hands its neighbors parts of sums"]
    if adaptive:
        share = moved_share(recipe)
        notes = ["attacked is what a client's weights moved in one step, as is averaged in the first epochs"]
    row = update_row(cell, recipe, place, summary, share, recipe.training.batch_size, notes)
    by_rank = summary["bytes_by_rank"]
    rounds = int(summary["steps"])
    if adaptive:
        rounds = len((place.run / "exchange.jsonl").read_text().splitlines()) + 1  # and once at the end
    return replace(
        row,
        bytes_up=None if by_rank is None else sum(sent for sent, _ in by_rank) / cell.clients,
        bytes_down=None if by_rank is None else sum(received for _, received in by_rank) / cell.clients,
        rounds=rounds,
    )


def collaboration_row(cell: Cell, recipe: Recipe, place: Place) -> Row:
    """Volunteers of an open collaboration, each a process."""
    folders = [place.run / name for name in volunteers(cell.clients)]
    there = [finished(recipe, folder) if folder.exists() else None for folder in folders]
    summaries = [each for each in there if each is not None]
    if len(summaries) < len(folders):
        for folder in folders:  # those who have finished would wait for nobody, and the others have nobody to meet
            shutil.rmtree(folder, ignore_errors=True)
        summaries = run_volunteers(recipe, place.run, cell.clients)
    first, epochs = summaries[0], recipe.collaboration.epochs
    samples = sum(summary["samples"] for summary in summaries) / cell.clients
    records = deal_records(recipe)
    told = dict(first) | {
        "records": {"train": sum(map(len, records.train.values())), "test": len(records.test)},
        "seconds": max(float(summary["seconds"]) for summary in summaries),
        "client_samples": samples,
    }
    notes = ["records of a contribution: as many as a batch; volunteers compute on while they wait for each other"]
    row = update_row(cell, recipe, place, told, gradients_of, recipe.training.batch_size, notes, "volunteer-1")
    return replace(
        row,
        bytes_up=sum(summary["bytes_sent"] for summary in summaries) / cell.clients,
        bytes_down=sum(summary["bytes_received"] for summary in summaries) / cell.clients,
        rounds=epochs,
    )


def _audited(place: Place) -> dict[str, Any]:
    """What audit.json holds of a split cell, which is attacked unless it was, as hard."""
    plan = Plan(place.strength, fresh_only=place.strength == "quick")
    if (place.run / "audit.json").is_file():
        content = RunFolder.open_finished(place.run).read_json("audit.json")
        if (content.get("strength"), content.get("fresh_only")) == (plan.strength, plan.fresh_only):
            return content
    _, content = audit_run(
        place.run,
        plan,
        reference=place.reference,
        training=place.watching.training,
        watching=place.watching.audit,
    )
    return content


def _frame(x: Tensor, y: Tensor) -> bytes:
    return bytes(encode(Message("activations", "client", 0, {"activations": x, "labels": y})))


MAKERS: Final[Mapping[str, Callable[[Cell, Recipe, Place], Row]]] = {
    **dict.fromkeys(("split", "u_shaped", "splitfed"), split_row),
    "whole": whole_row,
    "federated": federated_row,
    **dict.fromkeys(("large_batch", "adaptive"), parallel_row),
    "collaboration": collaboration_row,
}
"""Who makes the row of a training, by the way's name."""
