"""A compressor of messages on a whole vector: half precision or 8-bit integers for gradients, and what they round away
is left.

The vector is cut into records of `width` numbers; the last one may be shorter, and is compressed on its own, so nothing
is padded. Int8 has a scale for each record: 4 bytes for 2,048.

Legend: D numbers of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from milkglass.compression.base import Compressor, Part
from milkglass.compression.vector import Taken, VectorCompressor, add, squares
from milkglass.errors import MessageError, RecipeError


@final
class Rounding(VectorCompressor):
    """Sends every number as `compressor` makes it, in records of `width` numbers."""

    def __init__(self, compressor: Compressor, width: int = 2048) -> None:
        if width < 1:
            raise RecipeError(f"rounding: width is {width}; expected 1 or more")
        self.compressor = compressor
        self.width = width

    def __repr__(self) -> str:
        return f"Rounding({self.compressor!r}, width={self.width})"

    def describe(self) -> str:
        return f"{self.compressor.describe()}; {self.width} numbers a record"

    def dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        parts = self.compressor.layout((1, self.width), dtype)
        order = sorted(parts, key=lambda name: (-parts[name].dtype.itemsize, name))
        return {name: parts[name].dtype for name in order}

    def _take(self, u_D: Tensor, plus_D: Tensor | None, hint: float | None) -> Taken:  # noqa: ARG002
        add(u_D, plus_D)
        before, pieces = squares(u_D), []
        for records in self._records(u_D):
            parts = self.compressor.compress(records)
            pieces.append({name: part.flatten().clone() for name, part in parts.items()})  # they may share memory
            records.sub_(self.compressor.decompress(parts, records.shape, records.dtype))
        sent = {name: torch.cat([piece[name] for piece in pieces]) for name in self.dtypes(u_D.dtype)}
        return Taken(sent, before, squares(u_D))

    def _add_to(self, sum_D: Tensor, parts: Mapping[str, Tensor]) -> None:
        layouts = [self.compressor.layout(records.shape, sum_D.dtype) for records in self._records(sum_D)]
        for name, part in parts.items():
            length = sum(math.prod(layout[name].shape) for layout in layouts)
            if len(part) != length:
                expected = Part((length,), part.dtype)
                raise MessageError(f"{self.describe()}: {name} {Part.of(part)} arrived; expected {expected}")
        starts = dict.fromkeys(parts, 0)
        for records, layout in zip(self._records(sum_D), layouts, strict=True):
            own = {}
            for name, told in layout.items():
                end = starts[name] + math.prod(told.shape)
                own[name] = parts[name][starts[name] : end].view(told.shape)
                starts[name] = end
            records.add_(self.compressor.decompress(own, records.shape, sum_D.dtype))

    def _records(self, u_D: Tensor) -> list[Tensor]:
        """Views of the whole records, and of what is less than one."""
        whole = len(u_D) // self.width * self.width
        views = [u_D[:whole].view(-1, self.width), u_D[whole:].view(1, -1)]
        return [records for records in views if records.numel()]
