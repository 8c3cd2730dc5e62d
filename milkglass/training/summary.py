"""What a run folder says of a training: a line per epoch, and what goes into summary.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from milkglass.client import Client
from milkglass.cuts import Caution, couples_records, flops_per_sample, forward_flops
from milkglass.defenses.base import Defense
from milkglass.defenses.certificate import Certificate, JointTotal, certify
from milkglass.errors import AuditError
from milkglass.private.dp import SPLIT_COVERS
from milkglass.randomness import public_source
from milkglass.recipe import Recipe
from milkglass.tracing import in_mode
from milkglass.training.defended import defenses
from milkglass.training.rounds import EpochResult, Seat
from milkglass.training.setup import crossing_shapes, network_parts
from milkglass.training.shares import Share, owner_shapes
from milkglass.transports.base import Traffic


def metrics_line(epoch: int, result: EpochResult) -> dict[str, Any]:
    """What metrics.jsonl says of an epoch."""
    found = result.evaluation
    return {
        "epoch": epoch,
        "loss": result.loss if result.told else None,
        "train_accuracy": result.accuracy if result.told else None,
        "accuracy": None if found is None or not result.told else found.accuracy,
        "distance_correlation": None if found is None else asdict(found.dependence),
        "seconds": result.seconds,
    }


def traffic_summary(traffic: Traffic) -> dict[str, Any]:
    """The bytes and messages of a summary."""
    return {
        "bytes_sent": traffic.wire_bytes("to server"),
        "bytes_received": traffic.wire_bytes("to client"),
        "messages": traffic.messages,
        "wire": [
            {"direction": direction, "kind": kind, "messages": flow.messages, "bytes": flow.wire_bytes}
            for (direction, kind), flow in traffic.flows.items()
        ],
    }


def client_flops(seat: Seat) -> int:
    """FLOPs of training a client's part of the network on one record."""
    client, x_1 = seat.client, seat.share.train.x[:1]
    flops = flops_per_sample(client.stage, x_1)
    if client.head is not None:
        features = crossing_shapes(seat.recipe, x_1.shape[1:], int(seat.share.train.y.max()) + 1).features
        flops += flops_per_sample(client.head, torch.zeros(1, *features))
    return flops


def certificate_of(recipe: Recipe, client: Client, shape: Sequence[int], classes: int) -> Certificate:
    """What one release of the client tells at most, for its weights as they are, of a record of `shape`.

    Raises AuditError where its defenses have no certificate.
    """
    return _certificate(recipe, client.defenses, client.stage, client.name, shape, classes)


def certificate_ahead(recipe: Recipe, shape: Sequence[int], classes: int) -> Certificate:
    """What `certificate_of` will say of a client of the recipe, before there is one. Raises AuditError as it does."""
    chosen = defenses(recipe)
    parts = network_parts(recipe, shape, classes, public_source(recipe.seed), chosen=chosen)
    return _certificate(recipe, chosen, parts.bottom, recipe.parties.clients[0], shape, classes)


def _certificate(
    recipe: Recipe, chosen: Sequence[Defense], stage: nn.Module, name: str, shape: Sequence[int], classes: int
) -> Certificate:
    if recipe.parties.is_vertical:
        raise AuditError("no certificate: in vertical training every owner sends a message of its own for a record")
    return certify(chosen, crossing_shapes(recipe, shape, classes).cut[name], couples_records(stage))


def certificate_summary(recipe: Recipe, client: Client, share: Share, classes: int) -> dict[str, Any] | None:
    """The certificate, with what the messages of a whole training came to; None where there is none."""
    try:
        found = certificate_of(recipe, client, share.train.x.shape[1:], classes)
    except AuditError:
        return None
    return replace(found, training=_joint_total(recipe, client, share, found.bits_per_release)).to_dict()


def privacy_summary(recipe: Recipe, clients: Sequence[Client]) -> dict[str, Any] | None:
    """By client: what its DP-SGD spends, and in `words` what that covers and what not; None where there is none."""
    found = {client.name: getattr(client.optimizer, "mechanism", None) for client in clients}
    start = "" if recipe.network.start is None else ", nor what the weights of network.start may have of its records"
    told = {
        name: mechanism.to_dict() | {"words": f"{mechanism.words}; {SPLIT_COVERS}{start}"}
        for name, mechanism in found.items()
        if mechanism is not None
    }
    return told or None


def _joint_total(recipe: Recipe, client: Client, share: Share, bits_per_release: float) -> JointTotal:
    if recipe.training.at_home:
        return JointTotal(0, 0.0, "trained at home: no release left in training")
    size, training, train = recipe.training.batch_size, recipe.training, len(share.train)
    releases = (train // size * size if training.drop_last_batch else train) * training.epochs
    if recipe.dp is not None:  # drawn by chance: those that were
        seat = Seat(recipe, client, share, client.source)
        releases = sum(len(rows) for epoch in range(1, training.epochs + 1) for rows in seat.batches(epoch))
    tests = len(share.test) * training.epochs
    if client.keeps_releases and not any(parameter.requires_grad for parameter in client.stage.parameters()):
        releases, tests = min(releases, train), len(share.test)
    bits = (releases + tests) * bits_per_release
    words = (
        f"in training {releases:,} releases, and {tests:,} of test records: at most {bits:,.0f} bits about all records "
        f"of {client.name} together; they do not add up per record, unless no weight of the client's stage was learned "
        "from it or fitted to it"
    )
    return JointTotal(releases + tests, bits, words)


def client_flops_share(recipe: Recipe, shape: Sequence[int], classes: int) -> float:
    """The client's share (0..1) of the FLOPs of a forward pass, defenses included, of the first owner's in vertical."""
    first = owner_shapes(recipe, shape)[recipe.parties.clients[0]]
    parts = network_parts(recipe, first, classes, public_source(recipe.seed), owner=recipe.parties.is_vertical)
    whole = network_parts(recipe, shape, classes, public_source(recipe.seed))
    client = forward_flops(parts.bottom, torch.zeros(1, *first))
    everyone, x_1 = 0, torch.zeros(1, *shape)
    for stage in (whole.bottom, *whole.hops, whole.middle, *(() if whole.head is None else (whole.head,))):
        everyone += forward_flops(stage, x_1)
        with in_mode(stage, training=False), torch.no_grad():
            x_1 = stage(x_1)
    return client / everyone if everyone else 0.0


def cautions_in_words(cautions: tuple[Caution, ...]) -> list[str]:
    """A line for each."""
    return [f"{caution.layer}: {caution.reason}; {caution.way_out}" for caution in cautions]


def total_traffic(parts: list[Traffic]) -> Traffic:
    """Of several clients together."""
    total = Traffic()
    for part in parts:
        for (direction, kind), flow in part.flows.items():
            total.count(direction, kind, flow.wire_bytes, flow.messages)
    return total
