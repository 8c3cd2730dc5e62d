"""What every defense is: up to four hooks at the client's end of the cut. A hook not overridden does nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

from torch import Tensor

from milkglass.randomness import Source


@final
class NoiseStream:
    """A client's private noise. `block` counts the draws so far; with the source it is the whole state."""

    def __init__(self, source: Source, block: int = 0) -> None:
        self._source = source
        self.block = block

    def gaussian_like(self, z: Tensor) -> Tensor:
        """Fresh standard normal numbers in the shape and dtype of `z`."""
        drawn = self._source.gaussian(z.shape, self.block, z.dtype)
        self.block += 1
        return drawn


class Defense(ABC):
    """Changes what a client sends, or what it learns to send. Subclasses are final; settings in the constructor."""

    @abstractmethod
    def describe(self) -> str:
        """The defense and its settings in a few words, for summaries and reports."""

    @property
    def random(self) -> bool:
        """Whether two releases of one record differ."""
        return False

    def release(self, z: Tensor, noise: NoiseStream) -> Tensor:  # noqa: ARG002
        """What is sent in place of the activations `z` (B, ...), inside the graph."""
        return z

    def penalty(self, x: Tensor, z: Tensor) -> Tensor | None:  # noqa: ARG002
        """The weighted penalty on records `x` (B, ...) and exactly what will be sent, `z`: a scalar, or None."""
        return None

    def returned(self, dz: Tensor) -> Tensor:
        """What the client makes of the gradient (B, ...) that the server returned."""
        return dz
