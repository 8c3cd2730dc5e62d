"""What a run folder says of a training: a line per epoch, and what goes into summary.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from milkglass.client import Client
from milkglass.cuts import Caution, couples_records, flops_per_sample, forward_flops
from milkglass.defenses.certificate import Certificate, certify
from milkglass.errors import AuditError
from milkglass.randomness import public_source
from milkglass.recipe import Recipe
from milkglass.tracing import in_mode
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
    if recipe.parties.is_vertical:
        raise AuditError("no certificate: in vertical training every owner sends a message of its own for a record")
    sent = crossing_shapes(recipe, shape, classes).cut[client.name]
    return certify(client.defenses, sent, couples_records(client.stage))


def certificate_summary(recipe: Recipe, client: Client, share: Share, classes: int) -> dict[str, Any] | None:
    """The certificate, with what the messages of a whole training came to; None where there is none."""
    try:
        found = certificate_of(recipe, client, share.train.x.shape[1:], classes)
    except AuditError:
        return None
    if recipe.training.at_home:
        words = "trained at home: no release left in training"
        return {**found.to_dict(), "training": {"releases": 0, "joint_bits": 0.0, "words": words}}
    size, training, train = recipe.training.batch_size, recipe.training, len(share.train)
    releases = (train // size * size if training.drop_last_batch else train) * training.epochs
    tests = len(share.test) * training.epochs
    if client.keeps_releases and not any(parameter.requires_grad for parameter in client.stage.parameters()):
        releases, tests = min(releases, train), len(share.test)
    bits = (releases + tests) * found.bits_per_release
    words = (
        f"in training {releases:,} releases, and {tests:,} of test records: at most {bits:,.0f} bits about all records "
        f"of {client.name} together; they do not add up per record, unless no weight of the client's stage was learned "
        "from it or fitted to it"
    )
    return {**found.to_dict(), "training": {"releases": releases + tests, "joint_bits": bits, "words": words}}


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
