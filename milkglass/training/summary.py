"""What a run folder says of a training: a line per epoch, and what goes into summary.json."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from milkglass.cuts import Caution, flops_per_sample
from milkglass.training.rounds import EpochResult, Seat
from milkglass.training.setup import crossing_shapes
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
