"""One part of the vector at the volunteer who reduces it: contributions come in, for each block one average goes out.

Everyone who is sent an average is sent the same bytes, so that all who follow hold the same numbers. A contributor that
stays away or breaks off is left out of the blocks that it did not deliver.

Legend: N contributors, D numbers of a block.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor

from milkglass.collaboration.centered_clipping import centered_clip
from milkglass.collaboration.engine import runtime_pb2
from milkglass.collaboration.weights import cap_weights
from milkglass.collaboration.wire_vector import VectorCodec, pieces
from milkglass.errors import MessageError

MOST_SAMPLES: Final = 1 << 40


@final
@dataclass(frozen=True)
class Share:
    """What a contributor says of its part. samples: records behind it; 0: it only listens.

    digest: of the packed pieces. sealed: the same, signed by it.
    """

    samples: int
    loss: float
    digest: str
    sealed: bytes


@final
@dataclass(frozen=True, eq=False)
class Contribution:
    """A share, and the numbers of its block; packed: as they came, where somebody may ask to see them."""

    share: Share
    row_D: Tensor
    packed: tuple[runtime_pb2.Tensor, ...] = ()


class Included(NamedTuple):
    """A contributor of an average. member: its index. samples, loss, digest: of its share.

    heard: the share of its weight that counted, 0 to 1; in robust mode less than 1 for who is far from the others.
    """

    member: int
    samples: int
    loss: float
    digest: str
    heard: float


@final
@dataclass(frozen=True, eq=False)
class Average:
    """What goes out for a block: the numbers as all read them, the packed pieces, and of whom they are made."""

    value_D: Tensor
    packed: tuple[runtime_pb2.Tensor, ...]
    included: tuple[Included, ...]

    @property
    def samples(self) -> int:
        """Records behind it, as claimed."""
        return sum(each.samples for each in self.included)

    @property
    def loss(self) -> float:
        """Mean over those records, as claimed."""
        return sum(each.samples * each.loss for each in self.included) / max(self.samples, 1)


@final
@dataclass(frozen=True, eq=False)
class Averaging:
    """How a block's contributions become one. center_D: the whole last average, robust mode alone."""

    codec: VectorCodec
    cap: float
    robust: bool
    center_D: Tensor | None = None

    def of(self, contributions: Mapping[int, Contribution], start: int, stop: int) -> Average:
        """The average of a block, a function of the contributions alone. Raises MessageError where there is none."""
        order = sorted(contributions)
        shares = [contributions[index].share for index in order]
        weights = cap_weights([float(share.samples) for share in shares], self.cap)
        rows = [contributions[index].row_D for index in order]
        if not rows or not sum(weights):
            raise MessageError("nobody contributed")
        heard = [1.0] * len(order)
        if self.robust:
            center_D = None if self.center_D is None else self.center_D[start:stop]
            found = centered_clip(torch.stack(rows), torch.tensor(weights), center_D)
            mean_D, heard = found.value_D, [round(each, 3) for each in found.heard_N.tolist()]
        else:
            mean_D = torch.zeros(stop - start)
            for weight, row_D in zip(weights, rows, strict=True):  # in this order everywhere: the same bits
                mean_D.add_(row_D, alpha=weight / sum(weights))
        packed = tuple(self.pack(mean_D))
        included = tuple(
            Included(index, share.samples, share.loss, share.digest, part)
            for index, share, part in zip(order, shares, heard, strict=True)
        )
        return Average(self.read(packed, start, stop), packed, included)

    def pack(self, block_D: Tensor) -> list[runtime_pb2.Tensor]:
        """The pieces that carry a block."""
        return [self.codec.pack(block_D[begin:end]) for begin, end in pieces(0, len(block_D))]

    def read(self, packed: Sequence[runtime_pb2.Tensor], start: int, stop: int) -> Tensor:
        """The block in those pieces. Raises MessageError."""
        spans = pieces(0, stop - start)
        if len(packed) != len(spans):
            raise MessageError(f"{len(packed)} pieces; expected {len(spans)}")
        parts = [self.codec.unpack(each, end - begin) for each, (begin, end) in zip(packed, spans, strict=True)]
        block_D = torch.cat(parts) if parts else torch.zeros(0)
        if not bool(torch.isfinite(block_D).all()):
            raise MessageError("numbers that are not finite")
        return block_D


def digest_of(packed: Sequence[runtime_pb2.Tensor]) -> str:
    """SHA-256 of packed pieces, hexadecimal."""
    found = hashlib.sha256()
    for each in packed:
        found.update(each.SerializeToString(deterministic=True))
    return found.hexdigest()


def share_from(content: Mapping[str, Any], sealed: bytes) -> Share:
    """A share from what its contributor signed. Raises MessageError."""
    try:
        samples, loss, digest = content["samples"], float(content["loss"]), str(content["digest"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise MessageError("a contribution that does not say how much it is") from None
    if not isinstance(samples, int) or not 0 <= samples < MOST_SAMPLES or not math.isfinite(loss):
        raise MessageError(f"a contribution of {samples!r} records with a loss of {loss}")
    return Share(samples, loss, digest, sealed)


@final
class Duty:
    """A part that this volunteer reduces. blocks: (start, stop) of each. expected: who may contribute, by index.

    Its methods are called in the event loop alone.
    """

    def __init__(self, averaging: Averaging, blocks: Sequence[tuple[int, int]], expected: Sequence[int]) -> None:
        self.averaging, self.blocks = averaging, tuple(blocks)
        self.contributions: list[dict[int, Contribution]] = [{} for _ in self.blocks]
        loop = asyncio.get_running_loop()
        self.answers: list[asyncio.Future[Average]] = [loop.create_future() for _ in self.blocks]
        self._waiting = [set(expected) for _ in self.blocks]
        self._begun = [False for _ in self.blocks]
        self._tasks: set[asyncio.Task[None]] = set()

    def put(self, block: int, index: int, contribution: Contribution) -> None:
        """A contributor delivers a block; what comes too late, or twice, is not used."""
        if index in self._waiting[block] and not self._begun[block]:
            self.contributions[block][index] = contribution
            self._arrived(block, index)

    def lose(self, index: int) -> None:
        """A contributor delivers nothing more."""
        for block in range(len(self.blocks)):
            self._arrived(block, index)

    def give_up_waiting(self, arrived: set[int]) -> None:
        """Those who have not so much as begun are left out."""
        for index in set().union(*self._waiting) - arrived:
            self.lose(index)

    def close(self) -> None:
        """Nobody waits for an answer any more."""
        for answer in self.answers:
            answer.cancel()

    def _arrived(self, block: int, index: int) -> None:
        self._waiting[block].discard(index)
        if not self._waiting[block] and not self._begun[block]:
            self._begun[block] = True
            task = asyncio.create_task(self._average(block))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _average(self, block: int) -> None:
        start, stop = self.blocks[block]
        of, contributions = self.averaging.of, self.contributions[block]
        try:
            average = await asyncio.get_running_loop().run_in_executor(None, of, contributions, start, stop)
        except Exception as error:  # told to those who wait
            if not self.answers[block].done():
                self.answers[block].set_exception(error)
                self.answers[block].exception()  # where nobody waits, nobody is told
            return
        if not self.averaging.robust:  # nobody will ask for them
            contributions.clear()
        if not self.answers[block].done():
            self.answers[block].set_result(average)
