"""What every defense is: up to four hooks at the client's end of the cut. A hook not overridden does nothing."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from milkglass.randomness import Source


@final
class NoiseStream:
    """A client's private noise. `block` counts the draws so far; with the source it is the whole state.

    Noise is bound to what it hides, as a synthetic nonce is (SIV, RFC 5297): it follows from the key, the block and
    the values themselves. Else a client that resumes, or runs twice under one key, could add the same numbers to two
    different activations, and whoever saw both would subtract. Equal values in an equal place get equal noise: the same
    message again.
    """

    def __init__(self, source: Source, block: int = 0) -> None:
        self._source = source
        self.block = block

    def gaussian_like(self, z: Tensor, purpose: str) -> Tensor:
        """Fresh standard normal numbers in the shape and dtype of `z`; `purpose` names what they are for."""
        content = hashlib.sha256(
            z.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().data
        ).hexdigest()
        bound = self._source.derive(self.block, purpose, z.dtype, tuple(z.shape), content)
        self.block += 1
        return bound.gaussian(z.shape, 0, z.dtype)


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
