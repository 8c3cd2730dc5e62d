"""The server's side of a federated training, whatever carries the messages: rounds, who was missing, checkpoints.

A line of metrics.jsonl is a round. Its accuracy is that of the weights after it, which the clients tell with their
answers of the next round, or of the closing test.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

from torch import Tensor

from milkglass.errors import LinkError, MilkglassError
from milkglass.messages import Direction
from milkglass.recipe import Recipe
from milkglass.runs import Checkpoint, RunFolder, damaged
from milkglass.training.split import Progress
from milkglass.training.summary import total_traffic, traffic_summary
from milkglass.transports.base import Flow, Traffic

_SERVER: Final = "server"
KEPT: Final = "what was trained before is kept, and --resume goes on from there"


@final
@dataclass(frozen=True)
class Greeted:
    """What a client says of itself before the first round. privacy: its `dp` mechanism, as a table; None without."""

    records: int
    privacy: dict[str, Any] | None = None


@final
@dataclass(frozen=True)
class RoundResult:
    """What a round came to. accuracy: of the weights that the clients received, on test records; None without any.

    missing: the clients that did not finish it, each with the reason.
    """

    weights: Mapping[str, Tensor]
    loss: float
    train_accuracy: float
    accuracy: float | None
    missing: Mapping[str, str]
    seconds: float


@final
@dataclass
class Sent:
    """All that one client sent and received, in bytes on the wire; `payload`: the part that is numbers of arrays."""

    traffic: Traffic = field(default_factory=Traffic)
    payload: Traffic = field(default_factory=Traffic)

    def count(self, direction: Direction, kind: str, wire_bytes: int, payload_bytes: int) -> None:
        """Add a message."""
        self.traffic.count(direction, kind, wire_bytes)
        self.payload.count(direction, kind, payload_bytes)

    def state(self) -> list[list[Any]]:
        """For a checkpoint."""
        return [
            [*key, flow.messages, flow.wire_bytes, self.payload.flows[key].wire_bytes]
            for key, flow in self.traffic.flows.items()
        ]

    @classmethod
    def from_state(cls, state: list[list[Any]]) -> Sent:
        """Where `state` was taken."""
        sent = cls()
        for direction, kind, messages, wire_bytes, payload_bytes in state:
            sent.traffic.flows[direction, kind] = Flow(messages, wire_bytes)
            sent.payload.flows[direction, kind] = Flow(messages, payload_bytes)
        return sent


@final
class Rounds:
    """What the server has: the weights, the lines so far, and the folder where they are kept after every round.

    weights: the first ones, if the folder has no checkpoint. Raises RunError for a damaged one.
    """

    def __init__(self, recipe: Recipe, weights: Mapping[str, Tensor], folder: RunFolder, progress: Progress) -> None:
        self.recipe = recipe
        self.weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
        self.lines: list[dict[str, Any]] = []
        self.sent = {name: Sent() for name in recipe.parties.clients}
        self.greeted: dict[str, Greeted] = {}
        self._folder = folder
        self._progress = progress
        checkpoint = folder.load_checkpoint()
        if checkpoint is not None:
            self._restore(checkpoint)

    @property
    def all(self) -> int:
        """How many rounds the training has."""
        return self.recipe.training.epochs // self.recipe.federated.local_epochs

    @property
    def next(self) -> int:
        """The number of the next round, from 1; behind `all` where only the closing test is left."""
        return len(self.lines) + 1

    @property
    def least(self) -> int:
        """How many clients must finish a round."""
        return self.recipe.federated.least_clients or len(self.recipe.parties.clients)

    def first_epoch(self, round_: int) -> int:
        """The number of the first epoch of a round, from 1."""
        return (round_ - 1) * self.recipe.federated.local_epochs + 1

    def check_enough(self, what: str, missing: Mapping[str, str]) -> None:
        """Raise LinkError, which names the missing and their reasons, where too few clients are left."""
        left = len(self.recipe.parties.clients) - len(missing)
        if missing and left < self.least:
            words = "; ".join(f"{name} ({reason})" for name, reason in missing.items())
            raise LinkError(
                f"{what}: without {words}; {left} of {len(self.recipe.parties.clients)} clients are left, and "
                f"federated.least_clients is {self.least}; {KEPT}"
            )

    def done(self, result: RoundResult) -> None:
        """A round is over: take its weights, and keep all that the next one needs."""
        round_ = self.next
        if not math.isfinite(result.loss):
            raise MilkglassError(
                f"round {round_}: the loss is not finite; training has diverged: lower the learning rate"
            )
        self._tell_accuracy(result.accuracy)
        self.weights = dict(result.weights)
        self.lines.append(
            {
                "epoch": round_ * self.recipe.federated.local_epochs,
                "loss": result.loss,
                "train_accuracy": result.train_accuracy,
                "accuracy": None,
                "distance_correlation": None,
                "seconds": result.seconds,
                "clients": len(self.recipe.parties.clients) - len(result.missing),
                "missing": dict(result.missing),
            }
        )
        self._folder.write_metrics(self.lines)
        traffic = {name: sent.state() for name, sent in self.sent.items()}
        self._folder.save_checkpoint(
            Checkpoint(round_, {_SERVER: self.weights}, {"metrics": self.lines, "traffic": traffic})
        )

    def closed(self, accuracy: float | None) -> None:
        """The last weights were tested: the training is over."""
        self._tell_accuracy(accuracy)
        self._folder.write_metrics(self.lines)

    def summary(self) -> dict[str, Any]:
        """What summary.json says of a finished training, as far as the server knows it."""
        traffic = traffic_summary(total_traffic([sent.traffic for sent in self.sent.values()]))
        payload = total_traffic([sent.payload for sent in self.sent.values()])
        for flow in traffic["wire"]:
            flow["payload_bytes"] = payload.flows[flow["direction"], flow["kind"]].wire_bytes
        seconds = sum(line["seconds"] for line in self.lines)
        privacy = {name: self.greeted[name].privacy for name in self.sent if name in self.greeted}
        return {
            "accuracy": self.lines[-1]["accuracy"],
            "distance_correlation": None,
            "defense": "none",
            "rounds": len(self.lines),
            "clients": len(self.recipe.parties.clients),
            **traffic,
            "bytes_by_client": {
                name: [sent.traffic.wire_bytes("to server"), sent.traffic.wire_bytes("to client")]
                for name, sent in self.sent.items()
            },
            "parameters": sum(tensor.numel() for tensor in self.weights.values()),
            "secure_aggregation": self.recipe.federated.secure_aggregation is not None,
            "privacy": None if self.recipe.dp is None else privacy,
            "seconds": seconds,
            "seconds_per_epoch": seconds / self.recipe.training.epochs,
            "certificate": None,
            "seed": self.recipe.seed,
            "cautions": [],
            "recipe_digest": self.recipe.digest(),
        }

    def _tell_accuracy(self, accuracy: float | None) -> None:
        """Of the newest line, which is whole now."""
        if self.lines:
            self.lines[-1]["accuracy"] = accuracy
            self._progress.epoch(self.lines[-1])

    def _restore(self, checkpoint: Checkpoint) -> None:
        try:
            weights = checkpoint.parties[_SERVER]
            if {name: t.shape for name, t in weights.items()} != {name: t.shape for name, t in self.weights.items()}:
                raise ValueError("its weights are another network's")
            lines = checkpoint.progress["metrics"]
            sent = {name: Sent.from_state(checkpoint.progress["traffic"][name]) for name in self.sent}
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(checkpoint, error) from None
        self.weights = {name: weights[name] for name in self.weights}  # files sort names; secure sums go by place
        self.lines, self.sent = lines, sent


def told_privacy(text: str) -> dict[str, Any] | None:
    """A client's mechanism as it came in its greeting. Raises LinkError for anything but a small table."""
    try:
        content = json.loads(text) if text else None
    except (ValueError, RecursionError):
        content = text
    if content is not None and not isinstance(content, dict):
        raise LinkError("a client's words about its privacy are no table")
    return content
