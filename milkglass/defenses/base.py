"""What every defense is: a few hooks at the client's end of the cut. A hook not overridden does nothing.

In the order of a batch: the client's end of the stage, `release` of each defense in the recipe's order, `penalty` on
what will be sent; after the step `learn`. `protect` is for gradients that tell of labels.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Final, Protocol, final

import torch
from torch import Tensor, nn

from milkglass.errors import RecipeError
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

    def gaussian_like(self, z: Tensor, purpose: str, dtype: torch.dtype | None = None) -> Tensor:
        """Fresh standard normal numbers in the shape of `z`, and its dtype or another; `purpose` names what for."""
        return self._bound(z, purpose).gaussian(z.shape, 0, dtype or z.dtype)

    def laplace_like(self, z: Tensor, purpose: str, dtype: torch.dtype | None = None) -> Tensor:
        """The same, Laplace's, of variance 1."""
        return self._bound(z, purpose).laplace(z.shape, 0, dtype or z.dtype)

    def _bound(self, z: Tensor, purpose: str) -> Source:
        content = content_digest(z)
        bound = self._source.derive(self.block, purpose, z.dtype, tuple(z.shape), content)
        self.block += 1
        return bound


def content_digest(values: Tensor) -> str:
    """SHA-256 of a tensor's bytes, in hexadecimal."""
    raw = values.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()


CARRIED: Final = (1e-6, 1e6)
"""Smaller and larger lengths and sigmas are none that a float32 can carry beside others."""


def check_carried(what: str, value: float) -> None:
    """Raise RecipeError, which begins with `what`, for a length or a sigma out of range, or not a number."""
    if not CARRIED[0] <= value <= CARRIED[1]:
        raise RecipeError(f"{what} is {value}; expected a number from {CARRIED[0]:g} to {CARRIED[1]:g}")


class NoiseSource(Protocol):
    """Where a defense draws its private noise; each draw is bound to the values it hides."""

    def gaussian_like(self, z: Tensor, purpose: str, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal numbers in the shape of `z` (B, ...)."""

    def laplace_like(self, z: Tensor, purpose: str, dtype: torch.dtype | None = None) -> Tensor:
        """Laplace numbers of variance 1 in the shape of `z` (B, ...)."""


class Defense(ABC):
    """Changes what a client sends, or what it learns to send. Subclasses are final; settings in the constructor.

    What it must learn lies in the stages, where optimizer, checkpoint and run folder find it (`client_end`,
    `server_end`); what it learns for itself alone is in its own `state`.
    """

    @abstractmethod
    def describe(self) -> str:
        """The defense and its settings in a few words, for summaries and reports."""

    @property
    def random(self) -> bool:
        """Whether two releases of one record differ."""
        return False

    @property
    def noise_sigma(self) -> float:
        """Standard deviation of the noise that a release adds to a coordinate at inference; 0 = none."""
        return 0.0

    def client_end(self, cut_shape: tuple[int, ...]) -> nn.Module | None:  # noqa: ARG002
        """A layer for the end of the client's stage, where activations have `cut_shape`; drawn as torch draws."""
        return None

    def server_end(self, cut_shape: tuple[int, ...]) -> nn.Module | None:  # noqa: ARG002
        """A layer for the start of the server's stage: what the client's end gives -> activations of `cut_shape`."""
        return None

    def prepare(self, z: Tensor) -> None:  # noqa: B027
        """Before a training: fit its client's end to the activations `z` (N, ...) of some of the client's records."""

    def begin(self, x: Tensor, z: Tensor, source: Source) -> None:  # noqa: B027
        """Before the first batch: records `x` (B, ...), and what is sent for them, `z` (B, ...), show their shapes."""

    def transform(self, z: Tensor) -> Tensor:
        """What of a release is not noise: of the activations `z` (B, ...), inside the graph."""
        return z

    def release(self, z: Tensor, noise: NoiseSource) -> Tensor:  # noqa: ARG002
        """What is sent in place of the activations `z` (B, ...), inside the graph."""
        return self.transform(z)

    def penalty(self, x: Tensor, z: Tensor, y_B: Tensor | None = None) -> Tensor | None:  # noqa: ARG002
        """The weighted penalty on records `x` (B, ...) and exactly what will be sent, `z`: a scalar, or None.

        y_B: the records' labels, where this client has them.
        """
        return None

    def learn(self, x: Tensor, z: Tensor) -> None:  # noqa: B027
        """After a training batch: learn from records `x` (B, ...) and what was sent for them, `z` (B, ...)."""

    def protect(self, gradient: Tensor, y_B: Tensor, noise: NoiseSource) -> Tensor:  # noqa: ARG002
        """What is sent in place of a gradient (B, ...) that leaves who holds the labels `y_B` (B,)."""
        return gradient

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep beside the stages: flat, named tensors."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Go on where `state` was taken."""
