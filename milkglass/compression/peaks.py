"""Where a vector's large numbers are: the largest of every 32, noted in the one pass that also adds and squares.

A pass over a long vector costs what its memory costs, as long as nothing leaves the cache in between: the chunks here
are added to, squared and searched while they are there. Of a mask and `nonzero` over everything, the mask alone is two
more passes. The numbers above a threshold are in the blocks whose largest is: one in 32 is read to find those, and then
these blocks only. The threshold need not be known before the pass. For exact selection it comes from a sample of the
blocks' largest: if k numbers are above it, the k largest are among them; if not, they are in the k blocks with the
largest of their own.

`torch.compile` was not used: on a CPU it needs a C++ compiler where it runs, and a user may have none.

Legend: D numbers of a vector, B whole blocks of them, C numbers found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self, final

import torch
from torch import Tensor

from milkglass.compression.vector import add, squares

BLOCK: Final = 32  # 16 and fewer: slow reductions; 64 and more: too many numbers read for each that is found
_CHUNK: Final = 1 << 17  # for each thread: half a megabyte of float32, thrice, in the caches of its core
_SHORT: Final = 1 << 16  # below, two dozen small operations take longer than torch.topk
SHORT_EXACT: Final = 1 << 18  # and with a search among the blocks, below this
_SAMPLE: Final = 1 << 12
_SAMPLE_ABOVE: Final = 64
_MOST_BLOCKS: Final = 4  # for each number wanted
_WIDE: Final = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Found:
    """indexes_C: places, int64, each once. sizes_C: absolute values, none of them zero."""

    indexes_C: Tensor
    sizes_C: Tensor

    def largest(self, count: int) -> Self:
        """The largest `count` of them, or all."""
        sizes_C, chosen_C = self.sizes_C.topk(min(count, len(self.sizes_C)), sorted=False)
        return type(self)(self.indexes_C[chosen_C], sizes_C)


@final
class Peaks:
    """A vector u_D of 32 numbers or more, to which plus_D was added, and the largest absolute value of each block.

    before: the sum of its squares. As long as it is used, nobody may change `u_D`.
    """

    def __init__(self, u_D: Tensor, plus_D: Tensor | None = None) -> None:
        self._u_D = u_D
        whole = len(u_D) // BLOCK * BLOCK
        self._rows_BD, self._tail_D = u_D[:whole].view(-1, BLOCK), u_D[whole:]
        self._tops_B = u_D.new_empty(whole // BLOCK)
        self._smallest = torch.finfo(u_D.dtype).smallest_normal * torch.finfo(u_D.dtype).eps
        if u_D.dtype not in _WIDE:
            add(u_D, plus_D)
            self.before = squares(u_D)
            torch.amax(self._rows_BD.abs(), 1, out=self._tops_B)
            return
        self.before = self._pass(len(u_D) if u_D.is_cuda else _CHUNK * torch.get_num_threads(), plus_D)

    def _pass(self, chunk: int, plus_D: Tensor | None) -> float:
        """Add, square, and fill `_tops_B`; returns the sum of the squares."""
        sizes_D = self._u_D.new_empty(min(chunk, len(self._u_D)))
        added = [None] * -(-len(self._u_D) // chunk) if plus_D is None else torch.split(plus_D, chunk)
        sums = []
        for place, (part_D, plus) in enumerate(zip(torch.split(self._u_D, chunk), added, strict=True)):
            add(part_D, plus)
            sums.append(torch.dot(part_D, part_D))
            torch.abs(part_D, out=sizes_D[: len(part_D)])
            blocks, first = len(part_D) // BLOCK, place * chunk // BLOCK
            if blocks:
                rows_BD = sizes_D[: blocks * BLOCK].view(blocks, BLOCK)
                torch.amax(rows_BD, 1, out=self._tops_B[first : first + blocks])
        return float(torch.stack(sums).double().sum())

    def above(self, threshold: float, most: int) -> Found | None:
        """All numbers that are not zero and not smaller than `threshold`; None where they lie in over `most` blocks."""
        least = max(threshold, self._smallest)
        blocks = (self._tops_B >= least).nonzero().squeeze(1)
        if len(blocks) > most:
            return None
        return self._in(blocks, least)

    def largest(self, count: int) -> Found:
        """The `count` numbers farthest from zero; fewer where others are zero. Of equally large ones, torch chooses."""
        threshold = self._guess(count)
        found = self.above(threshold, _MOST_BLOCKS * count)
        if found is None or (len(found.sizes_C) < count and threshold > 0):
            blocks = self._tops_B.topk(min(count, len(self._tops_B)), sorted=False).indices.sort().values
            found = self._in(blocks, self._smallest)
        return found.largest(count)

    def _guess(self, count: int) -> float:
        """A threshold that about 3/2 as many blocks as `count` reach, from some of them at equal distances."""
        blocks = len(self._tops_B)
        stride = max(1, blocks // max(_SAMPLE, _SAMPLE_ABOVE * blocks // count))
        some = self._tops_B[::stride]
        return float(some.topk(min(len(some), -(-3 * count * len(some) // (2 * blocks))), sorted=False).values.min())

    def _in(self, blocks: Tensor, least: float) -> Found:
        """The numbers from `least` on in these blocks and in what is no whole block."""
        sizes_C = torch.cat([self._rows_BD.index_select(0, blocks).view(-1), self._tail_D]).abs_()
        hits = (sizes_C >= least).nonzero().squeeze(1)
        firsts = torch.nn.functional.pad(blocks, (0, 1), value=len(self._tops_B)) * BLOCK
        return Found(firsts[hits // BLOCK] + hits % BLOCK, sizes_C[hits])


def largest(u_D: Tensor, plus_D: Tensor | None, count: int) -> tuple[Tensor, float]:
    """Add `plus_D`; the places of the `count` numbers farthest from zero that are not zero, and the sum of squares."""
    if len(u_D) >= SHORT_EXACT and pays(u_D, count):
        peaks = Peaks(u_D, plus_D)
        return peaks.largest(count).indexes_C, peaks.before
    add(u_D, plus_D)
    most = u_D.abs().topk(count, sorted=False)
    return most.indices[most.values > 0], squares(u_D)


def pays(u_D: Tensor, count: int) -> bool:
    """Whether so few of so many are wanted that blocks help."""
    return len(u_D) >= _SHORT and count * BLOCK <= len(u_D)
