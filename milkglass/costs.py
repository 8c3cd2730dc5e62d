"""What crosses the wire, and what a client computes, by formula: split, federated, large-batch and averaging.

Communication: Singh, Vepakomma, Gupta, Raskar 2019 (arXiv 1909.09145); client compute: the survey of Vepakomma et al.
2018 (arXiv 1812.03288). Their full texts were not at hand: the formulas are as recalled, and the laws in the tests are
what they are held to. What a formula leaves out, and what really crosses here, is in `costs_wire.py`.

Legend: K clients, N parameters of the whole network, p training records of all clients together, q numbers at the cut
for one record, eta the client's share of N, B records in a client's batch.

Where we say more than the papers: they give sums, and we say which way it goes. Their eta N of handing weights on is
counted once, at the client that sends it. Large-batch gradients meet in a ring (Patarasuk and Yuan 2009).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, final

from milkglass.errors import RecipeError

BYTES_PER_SCALAR: Final = 4
"""Of float32."""
PERIOD: Final = 8
"""Steps between two averagings, where nothing else is said: the constant period of Jiang and Agrawal 2020."""


@final
@dataclass(frozen=True)
class Scale:
    """How large a training is. Raises RecipeError for a number that cannot be.

    clients: K. parameters: N. records: p, of all clients. cut_values: q, a record. client_share: eta, 0 to 1.
    batch_size: B, of each client; only ways that meet at every step, or every few, ask for it.
    """

    clients: float
    parameters: float
    records: float
    cut_values: float
    client_share: float = 0.0
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("clients", "batch_size"):
            if not 1 <= getattr(self, name) < math.inf:
                raise RecipeError(f"scale: {name} is {getattr(self, name)}; expected a number from 1")
        for name in ("parameters", "records", "cut_values"):
            if not 0 < getattr(self, name) < math.inf:
                raise RecipeError(f"scale: {name} is {getattr(self, name)}; expected a number above 0")
        if not 0 <= self.client_share <= 1:
            raise RecipeError(f"scale: client_share is {self.client_share}; expected a share of the network, 0 to 1")

    @property
    def records_per_client(self) -> float:
        """p / K."""
        return self.records / self.clients

    @property
    def steps(self) -> float:
        """Of a client in an epoch, p / (K B); not rounded, so that a formula stays one."""
        return self.records_per_client / self.batch_size


@final
@dataclass(frozen=True)
class Scalars:
    """Numbers that one client sends (up) and receives (down)."""

    up: float
    down: float

    @property
    def total(self) -> float:
        """Both ways: what the papers' formulas give."""
        return self.up + self.down

    @property
    def total_bytes(self) -> float:
        """As float32, and nothing around them."""
        return BYTES_PER_SCALAR * self.total


def split(scale: Scale, *, weight_sharing: bool = True) -> Scalars:
    """Split learning, a client and epoch: 2pq/K + eta N; without weight sharing 2pq/K.

    Activations pq/K up, their gradients pq/K down. weight_sharing: the client's stage is handed on, eta N up.
    """
    crossing = scale.records_per_client * scale.cut_values
    return Scalars(crossing + (scale.client_share * scale.parameters if weight_sharing else 0.0), crossing)


def federated(scale: Scale, rounds: float = 1.0) -> Scalars:
    """Federated averaging, a client: 2N a round, N down and N up. rounds: in what is counted; 1 an epoch by default."""
    return Scalars(rounds * scale.parameters, rounds * scale.parameters)


def ring(scale: Scale, exchanges: float) -> Scalars:
    """So many dense all-reduces in a ring, a client: each sends 2N(K-1)/K and receives as much."""
    each = 2 * scale.parameters * (scale.clients - 1) / scale.clients
    return Scalars(exchanges * each, exchanges * each)


def synchronous(scale: Scale) -> Scalars:
    """Large-batch synchronous SGD, a client and epoch: an all-reduce of all gradients at each of p/(KB) steps."""
    return ring(scale, scale.steps)


def averaging(scale: Scale, period: float = PERIOD) -> Scalars:
    """Periodic or adaptive parameter averaging, a client and epoch: an all-reduce of all weights every `period` steps.

    period: of adaptive averaging, the mean one. Raises RecipeError for a period that is not above 0.
    """
    if not period > 0:
        raise RecipeError(f"averaging: period is {period}; expected a number of steps above 0")
    return ring(scale, scale.steps / period)


WAYS: Final[Mapping[str, Callable[[Scale], Scalars]]] = {
    "split, weights handed on": split,
    "split, weights kept": lambda scale: split(scale, weight_sharing=False),
    "federated, a round an epoch": federated,
    "large-batch": synchronous,
    "averaging every 8 steps": averaging,
}
"""Each way's scalars of a client and epoch, by its name."""


def break_even_clients(scale: Scale, *, weight_sharing: bool = False) -> float:
    """K* where split training and a federated round send the same: pq/N; above it split sends less.

    weight_sharing: with eta N for handing weights on, K* = 2pq / ((2 - eta) N).
    """
    share = scale.client_share if weight_sharing else 0.0
    return 2 * scale.records * scale.cut_values / ((2 - share) * scale.parameters)


def client_flops(scale: Scale, flops_per_record: float) -> float:
    """FLOPs of one client in an epoch: those of training on a record, times p/K.

    flops_per_record: of the whole network in federated and large-batch training; of the client's stage in split.
    """
    return flops_per_record * scale.records_per_client
