"""What every compressor of a whole vector is: it moves what is sent out of the vector, and what is left stays there.

Messages of single records are compressed by `base.py`, without memory. This is for gradients and differences of
models, which are sums over many records: what one step leaves over may go out with the next (`error_feedback.py`).

Legend: D numbers of a vector, K of them sent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from milkglass.compression.base import FLOATS, Part
from milkglass.errors import MessageError, RecipeError

MOST_NUMBERS: Final = 2**31 - 1
"""An index must fit in an int32."""


@dataclass(frozen=True)
class Taken:
    """What was moved out of a vector.

    parts: one-dimensional tensors by name, whose lengths may follow from the values. before: the sum of the vector's
    squares before. left: that of what is left; left / before is what compression costs, 0 = nothing. hint: what the
    same compressor may be told at the next, similar vector; it makes that one faster, not different in kind.
    """

    parts: Mapping[str, Tensor]
    before: float
    left: float
    hint: float | None = None


class VectorCompressor(ABC):
    """Subclasses are final; settings in the constructor, the same at every rank."""

    @abstractmethod
    def describe(self) -> str:
        """The compressor and its settings in a few words."""

    @abstractmethod
    def dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """By name the dtype of each part of a vector of `dtype`, those of four bytes and more first."""

    @abstractmethod
    def _take(self, u_D: Tensor, plus_D: Tensor | None, hint: float | None) -> Taken:
        """As `take`, of vectors that were checked. `plus_D` is still to be added."""

    @abstractmethod
    def _add_to(self, sum_D: Tensor, parts: Mapping[str, Tensor]) -> None:
        """As `add_to`, of parts that have the right names and dtypes."""

    @final
    def take(self, u_D: Tensor, plus_D: Tensor | None = None, hint: float | None = None) -> Taken:
        """Add `plus_D` to `u_D`, then move what is sent out of it: what is left stays, and sent + left is the sum.

        u_D: contiguous floats, finite; it is changed. plus_D: as long, any float dtype. hint: that of the `Taken`
        before, or None. Raises MessageError.
        """
        _check(u_D)
        if plus_D is not None:
            _check(plus_D)
            if plus_D.shape != u_D.shape:
                raise MessageError(f"cannot add {len(plus_D)} numbers to a vector of {len(u_D)}")
        return self._take(u_D, plus_D, hint)

    @final
    def add_to(self, sum_D: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Add what another rank's parts stand for to `sum_D`, in place. Raises MessageError where they do not fit."""
        found = {name: tensor.dtype for name, tensor in parts.items()}
        flat = all(tensor.dim() == 1 for tensor in parts.values())
        if found != self.dtypes(sum_D.dtype) or not flat:
            told = ", ".join(f"{name} {Part.of(tensor)}" for name, tensor in parts.items())
            raise MessageError(f"{self.describe()}: parts of another kind arrived: {told or 'none'}")
        self._add_to(sum_D, parts)


@dataclass(frozen=True)
class Selected:
    """indexes_K: places, int64, each once. before: the sum of the vector's squares. hint: as in `Taken`."""

    indexes_K: Tensor
    before: float
    hint: float | None = None


class Selector(VectorCompressor):
    """Sends some of the numbers as they are, and where they stand. What is left of those is zero, exactly."""

    @abstractmethod
    def _select(self, u_D: Tensor, plus_D: Tensor | None, hint: float | None) -> Selected:
        """Add `plus_D` to `u_D`, and say which of its numbers are sent."""

    @final
    def dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        return {"indexes": torch.int32, "values": dtype}

    @final
    def _take(self, u_D: Tensor, plus_D: Tensor | None, hint: float | None) -> Taken:
        chosen = self._select(u_D, plus_D, hint)
        values_K = u_D[chosen.indexes_K]
        u_D[chosen.indexes_K] = 0
        left = chosen.before - squares(values_K)
        if not left > _ROUNDED * chosen.before:  # what a difference says is mostly rounding
            left = squares(u_D)
        parts = {"indexes": chosen.indexes_K.to(torch.int32), "values": values_K}
        return Taken(parts, chosen.before, left, chosen.hint)

    @final
    def _add_to(self, sum_D: Tensor, parts: Mapping[str, Tensor]) -> None:
        indexes_K, values_K = parts["indexes"], parts["values"]
        if len(indexes_K) != len(values_K):
            raise MessageError(f"{self.describe()}: {len(values_K)} values arrived with {len(indexes_K)} indexes")
        if len(indexes_K) and not 0 <= int(indexes_K.min()) <= int(indexes_K.max()) < len(sum_D):
            raise MessageError(f"{self.describe()}: an index that arrived is not from 0 to {len(sum_D) - 1}")
        sum_D.index_add_(0, indexes_K, values_K)


@final
class Dense(VectorCompressor):
    """Sends everything, as it is: nothing is left."""

    def __repr__(self) -> str:
        return "Dense()"

    def describe(self) -> str:
        return "no compression"

    def dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        return {"values": dtype}

    def _take(self, u_D: Tensor, plus_D: Tensor | None, hint: float | None) -> Taken:  # noqa: ARG002
        add(u_D, plus_D)
        sent = Taken({"values": u_D.clone()}, squares(u_D), 0.0)
        u_D.zero_()
        return sent

    def _add_to(self, sum_D: Tensor, parts: Mapping[str, Tensor]) -> None:
        if parts["values"].shape != sum_D.shape:
            raise MessageError(f"{self.describe()}: {len(parts['values'])} values arrived; expected {len(sum_D)}")
        sum_D.add_(parts["values"])


def add(u_D: Tensor, plus_D: Tensor | None) -> None:
    """Add, in place, what there is to add."""
    if plus_D is not None:
        u_D.add_(plus_D)


def squares(u_D: Tensor) -> float:
    """The sum of a vector's squares; in float32 at least, in chunks whose sums are added in float64."""
    if u_D.is_cuda or u_D.dtype not in (torch.float32, torch.float64):
        return float(torch.linalg.vector_norm(u_D, dtype=torch.float64).square())
    sums = [torch.dot(chunk, chunk) for chunk in torch.split(u_D, _CHUNK)]
    return float(torch.stack(sums).double().sum())


def count_of(density: float, length: int) -> int:
    """How many of so many numbers a density asks for: at least one."""
    return min(length, max(1, int(density * length)))


def bounds(count: int, length: int) -> tuple[float, float]:
    """What exact top-k leaves at most of a vector's sum of squares: (1 - k/d)^2, and the old 1 - k/d.

    The first holds for bell-shaped vectors (Shi et al. 2019), not for all: of equal numbers, 1 - k/d is left.
    """
    share = 1 - count / length
    return share**2, share


def check_density(density: float) -> float:
    """The density itself. Raises RecipeError unless it is above 0 and at most 1."""
    if not 0 < density <= 1:
        raise RecipeError(f"density is {density}; expected a number above 0, at most 1")
    return density


_CHUNK: Final = 1 << 17
_ROUNDED: Final = 1e-2


def _check(u_D: Tensor) -> None:
    if u_D.requires_grad:
        raise MessageError("a compressor stands outside the graph, where it has no gradient; detach the vector first")
    if u_D.dim() != 1 or u_D.dtype not in FLOATS or not u_D.is_contiguous() or not 1 <= len(u_D) <= MOST_NUMBERS:
        raise MessageError(
            f"cannot compress {Part.of(u_D)}; expected a contiguous vector of 1 to {MOST_NUMBERS} floats"
        )
