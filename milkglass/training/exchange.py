"""The mean of all ranks' vectors, compressed: what one synchronous step of data-parallel training sends.

Each rank moves what it sends out of its vector; first all tell each other how much that is, then the parts travel, with
32-bit indexes, and every rank adds up the same numbers in the same order: all end with the same bits. As in the code of
Shi et al. (2019, arXiv 1911.08772) parts are gathered, not reduced: two ranks seldom send the same numbers.

Where we differ: counts may differ from rank to rank, so the longest decides how long all are on the wire; where a ring
all-reduce of everything would be cheaper than the parts, everything is summed instead; and a rank whose vector is not
finite says so in place of its sizes, so that no NaN gets into what is left over, here or elsewhere.

Legend: D numbers of a vector, P ranks, W bytes of one rank's parts, filled up to the longest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch
import torch.distributed as dist
from torch import Tensor

from milkglass.compression.base import Part, saturating
from milkglass.compression.error_feedback import ErrorFeedback
from milkglass.compression.vector import Taken
from milkglass.errors import MessageError

_BROKEN: Final = -1  # in place of a size: this rank's vector is not finite
_ALIGNED: Final = 8  # bytes; so that each rank's parts begin where any dtype may


@dataclass(frozen=True)
class Exchanged:
    """What became of one vector. numbers: D. sent: how many of them this rank sent. before, left: as in `Taken`.

    dense: everything was summed, as that was cheaper. broken: the ranks whose vectors were not finite; then the mean is
    NaN everywhere, and nothing was taken from what is left over.
    """

    numbers: int
    sent: int
    before: float
    left: float
    dense: bool = False
    broken: tuple[int, ...] = ()


@final
class Exchange:
    """One vector on its way: `start`, `send` and `finish`, each once, by all ranks in the same order.

    Between two of them the rank may do other work. group: whose ranks take part; None: all.
    """

    def __init__(self, feedback: ErrorFeedback, g_D: Tensor, group: Any = None) -> None:
        self._feedback, self._g_D, self._group = feedback, g_D, group
        self._ranks = dist.get_world_size(group)
        self._taken: Taken | None = None
        self._raw = torch.empty(0, dtype=torch.uint8)
        self._sizes_P: list[Tensor] = []
        self._rows_PW: list[Tensor] = []
        self._working: Any = None
        self._done: Exchanged | None = None

    def start(self) -> None:
        """Take this rank's part out of `g_D` and what was left before, and tell the others how large it is."""
        if self._ranks == 1:  # nobody to send to, and nothing is lost
            length, alone = len(self._g_D), () if finite(self._g_D) else (self._name(0),)
            if not alone:
                self._feedback.flush(self._g_D)
            self._done = Exchanged(length, length, 0.0, 0.0, dense=not alone, broken=alone)
            return
        names = self._feedback.compressor.dtypes(self._feedback.left_D.dtype)
        sizes = [_BROKEN] * len(names)
        if finite(self._g_D):
            self._taken = self._feedback.take(self._g_D)
            sizes = [len(self._taken.parts[name]) for name in names]
        own = torch.tensor(sizes, dtype=torch.int64, device=self._g_D.device)
        self._sizes_P = list(torch.empty(self._ranks, len(sizes), dtype=torch.int64, device=own.device))
        self._working = dist.all_gather(self._sizes_P, own, group=self._group, async_op=True)

    def send(self) -> None:
        """Once all have told their sizes, let the parts travel, or everything where that is cheaper."""
        if self._done is not None:
            return
        self._working.wait()
        sizes = torch.stack(self._sizes_P)
        broken = tuple(self._name(rank) for rank in (sizes[:, 0] == _BROKEN).nonzero().flatten().tolist())
        if broken:
            if self._taken is not None:
                self._feedback.put_back(self._taken)
            self._g_D.fill_(math.nan)
            self._done = Exchanged(len(self._g_D), 0, math.nan, math.nan, broken=broken)
            return
        assert self._taken is not None
        dtypes = self._feedback.compressor.dtypes(self._feedback.left_D.dtype)
        width = torch.tensor([dtype.itemsize for dtype in dtypes.values()], device=sizes.device)
        longest = max(1, -(-int((sizes * width).sum(dim=1).max()) // _ALIGNED)) * _ALIGNED
        if longest >= dense_bytes(self._g_D, self._ranks):
            self._send_all()
            return
        self._raw = packed(self._taken.parts, longest)
        self._rows_PW = list(torch.empty(self._ranks, longest, dtype=torch.uint8, device=self._raw.device))
        self._working = dist.all_gather(self._rows_PW, self._raw, group=self._group, async_op=True)

    def finish(self) -> Exchanged:
        """Once all has arrived, write the mean into `g_D`."""
        if self._done is not None:
            return self._done
        self._working.wait()
        taken = self._taken
        assert taken is not None
        sum_D = self._g_D if self._g_D.dtype == self._feedback.left_D.dtype else torch.empty_like(self._feedback.left_D)
        if not self._rows_PW:
            if not self._early:
                self._g_D.div_(self._ranks)
            return Exchanged(len(self._g_D), len(self._g_D), taken.before, 0.0, dense=True)
        compressor = self._feedback.compressor
        dtypes = compressor.dtypes(sum_D.dtype)
        sum_D.zero_()
        for row_W, sizes in zip(self._rows_PW, self._sizes_P, strict=True):
            compressor.add_to(sum_D, unpacked(row_W, dtypes, sizes.tolist()))
        sum_D.div_(self._ranks)
        if sum_D is not self._g_D:
            self._g_D.copy_(saturating(sum_D, self._g_D.dtype))
        return Exchanged(len(self._g_D), len(taken.parts["values"]), taken.before, taken.left)

    def _send_all(self) -> None:
        assert self._taken is not None
        self._feedback.put_back(self._taken)
        left_D = self._feedback.left_D
        share = self._ranks if self._early else 1
        self._g_D.copy_(saturating(left_D / share, self._g_D.dtype))
        left_D.sub_(self._g_D, alpha=share)  # zero, but for what half precision has rounded off
        self._working = dist.all_reduce(self._g_D, group=self._group, async_op=True)

    @property
    def _early(self) -> bool:
        """Whether the mean's division comes before the sum, which half precision might not hold."""
        return self._g_D.dtype in (torch.float16, torch.bfloat16)

    def _name(self, rank: int) -> int:
        """The number by which all know a rank of the group."""
        return rank if self._group is None else dist.get_global_rank(self._group, rank)


def average(feedback: ErrorFeedback, g_D: Tensor, group: Any = None) -> Exchanged:
    """Write the mean of all ranks' vectors into `g_D` (D,), as far as the compressor lets it through.

    What it does not let through stays in `feedback`. All ranks call it, with vectors of the same length and dtype.
    """
    exchange = Exchange(feedback, g_D, group)
    exchange.start()
    exchange.send()
    return exchange.finish()


def dense_bytes(g_D: Tensor, ranks: int) -> float:
    """As many bytes of parts a rank cost as much on the wire as an all-reduce of everything in a ring.

    P - 1 others' parts arrive at a rank, or 2 (P - 1) / P times the vector.
    """
    return 2 * len(g_D) * g_D.dtype.itemsize / ranks


def finite(g_D: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    return bool(torch.isfinite(torch.linalg.vector_norm(g_D))) or bool(torch.isfinite(g_D).all())


def packed(parts: Mapping[str, Tensor], length: int) -> Tensor:
    """The parts as bytes (W,), one behind the other, and zeros up to `length`."""
    raw_W = torch.zeros(length, dtype=torch.uint8, device=next(iter(parts.values())).device)
    at = 0
    for tensor in parts.values():
        size = len(tensor) * tensor.dtype.itemsize
        raw_W[at : at + size] = tensor.contiguous().view(torch.uint8)
        at += size
    return raw_W


def unpacked(raw_W: Tensor, dtypes: Mapping[str, torch.dtype], sizes: list[int]) -> dict[str, Tensor]:
    """The parts in those bytes (W,): so many numbers of each. Raises MessageError where they cannot lie there."""
    parts, at = {}, 0
    for (name, dtype), size in zip(dtypes.items(), sizes, strict=True):
        if size < 0 or at + size * dtype.itemsize > len(raw_W):
            raise MessageError(f"{size} {Part((), dtype)} of {name} cannot lie in the {len(raw_W)} bytes that arrived")
        parts[name] = raw_W[at : at + size * dtype.itemsize].view(dtype)
        at += size * dtype.itemsize
    return parts
