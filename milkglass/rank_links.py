"""How the processes that share a stage reach each other: process groups, and rows that are dealt out and gathered.

What they tell each other is neither encrypted nor authenticated. `sharding.py` says what they do with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from milkglass.errors import MilkglassError

_IDLE: Final = timedelta(days=3650)  # between two commands any time may pass
_BUSY: Final = timedelta(minutes=5)  # all take part in a pass; one that hangs so long is taken for gone


@dataclass(frozen=True)
class Links:
    """How the ranks reach each other: commands by the default group, shards and gradients by these."""

    rank: int
    ranks: int
    device: torch.device
    shards: Any
    gradients: Any


@contextmanager
def linked() -> Iterator[Links]:
    """Inside, this process is connected with the others that torchrun has started."""
    dist.init_process_group("gloo", timeout=_IDLE)
    try:
        shards = dist.new_group(backend="gloo", timeout=_BUSY)
        device, gradients = torch.device("cpu"), shards
        if torch.cuda.is_available():
            own, there = dist.get_node_local_rank(), torch.cuda.device_count()
            if own >= there:
                raise MilkglassError(f"process {own + 1} on a machine with {there} GPUs; expected one process for each")
            device = torch.device("cuda", own)
            torch.cuda.set_device(device)
            gradients = dist.new_group(backend="nccl", timeout=_BUSY)
        yield Links(dist.get_rank(), dist.get_world_size(), device, shards, gradients)
    finally:
        dist.destroy_process_group()


def shards_of(rows: Tensor, ranks: int, filling: Tensor) -> list[Tensor]:
    """Equally many rows for each rank, in order; where they do not suffice, `filling` (1, ...)."""
    each = -(-len(rows) // ranks)
    missing = each * ranks - len(rows)
    return list(torch.cat([rows, *[filling] * missing]).contiguous().chunk(ranks))


def dealt(links: Links, room: Tensor, shards: list[Tensor] | None = None) -> Tensor:
    """Own shard of what rank 0 deals; `room` is as large as one."""
    own = torch.empty_like(room)
    dist.scatter(own, shards, 0, links.shards)
    return own


def gathered(links: Links, own: Tensor) -> Tensor:
    """At rank 0 all rows, in order; elsewhere nothing of use."""
    parts = [torch.empty_like(own) for _ in range(links.ranks)] if links.rank == 0 else None
    dist.gather(own, parts, 0, links.shards)
    return own if parts is None else torch.cat(parts)
