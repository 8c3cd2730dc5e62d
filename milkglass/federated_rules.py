"""What federated training and differential privacy go with in a recipe: `recipe.py` asks, ValueError says what not."""

from __future__ import annotations

from typing import Final

from milkglass.defense_sections import Defense
from milkglass.federated_section import Federated
from milkglass.sections import Guard, Parties, Training

SMALLEST_SECURE_ROUND: Final = 3
"""Of two clients each knows the other's weights from the sum."""


def check_federated(federated: Federated, parties: Parties, training: Training) -> None:
    """Rounds that come out even, and enough clients for them."""
    clients = len(parties.clients)
    if not parties.is_federated:
        if federated != Federated():
            raise ValueError(f"federated goes with parties.mode federated; it is {parties.mode}")
        return
    if training.epochs % federated.local_epochs:
        raise ValueError(
            f"training.epochs is {training.epochs}; expected a multiple of federated.local_epochs, "
            f"{federated.local_epochs}"
        )
    if federated.least_clients is not None and federated.least_clients > clients:
        raise ValueError(f"federated.least_clients is {federated.least_clients}, and there are {clients} clients")
    secure = federated.secure_aggregation
    needed = 0 if secure is None else max(SMALLEST_SECURE_ROUND, secure.shares or 0, secure.threshold or 0)
    if clients < needed:
        raise ValueError(f"federated.secure_aggregation needs {needed} clients or more; there are {clients}")


def check_private(defense: Defense, guard: Guard, parties: Parties, training: Training) -> None:
    """What the proof of DP-SGD needs: every record's gradient depends on that record, and on nothing else."""
    if parties.mode in ("vertical", "data_parallel", "collaboration") or parties.hops:
        raise ValueError(
            f"dp goes with parties.mode relay, splitfed1, splitfed2 and federated, without hops; it is {parties.mode}"
            + (" with hops" if parties.hops else "")
        )
    for name in ("nopeek", "entropy", "adversary", "learned_noise"):
        if getattr(defense, name) is not None:
            raise ValueError(
                f"dp does not go with defense.{name}: its penalty couples the records of a batch, so that a record's "
                "gradient depends on the others, and the proof of DP-SGD breaks; expected channel, clipping or noise"
            )
    if defense.channel is not None and defense.channel.projection in ("pca", "random"):
        raise ValueError(
            f"dp does not go with defense.channel.projection {defense.channel.projection}: fixed directions are fitted "
            "to records, or centered on them, without noise; expected linear, mlp or conv"
        )
    if training.micro_batches > 1 or training.at_home or not training.drop_last_batch:
        raise ValueError(
            "dp draws every batch by chance, of no certain size; it does not go with training.micro_batches, "
            "training.at_home or training.drop_last_batch = false"
        )
    if guard.hijack is not None:
        raise ValueError("dp does not go with guard.hijack, whose false batches the accountant does not know")
