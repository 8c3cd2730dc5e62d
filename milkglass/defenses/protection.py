"""Label protection at a server: owners without labels get gradients that hide them, with noise of the server's own.

Which defenses that are is in `labels.py`; what they remember of an owner's gradients is kept for each owner apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from milkglass.defenses.base import Defense, NoiseStream
from milkglass.randomness import Source


@final
class Protection:
    """The defenses on gradients by owner, and the noise: from `source`, which is private to the server."""

    def __init__(self, by_owner: Mapping[str, Sequence[Defense]], source: Source) -> None:
        self._by_owner = {owner: tuple(defenses) for owner, defenses in by_owner.items()}
        self._noise = NoiseStream(source.derive("noise"))

    def protect(self, owner: str, gradient: Tensor, y_B: Tensor) -> Tensor:
        """What that owner gets in place of the gradient (B, ...) at its activations; labels `y_B` (B,)."""
        for defense in self._by_owner.get(owner, ()):
            gradient = defense.protect(gradient, y_B, self._noise)
        return gradient

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep: flat, named tensors."""
        kept = {f"{prefix}{name}": t for prefix, defense in self._all() for name, t in defense.state().items()}
        return {"noise_block": torch.tensor(self._noise.block), **kept}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        self._noise.block = int(state["noise_block"])
        for prefix, defense in self._all():
            defense.load_state({name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)})

    def _all(self) -> list[tuple[str, Defense]]:
        everyone = [defense for owner in sorted(self._by_owner) for defense in self._by_owner[owner]]
        return [(f"{index}.", defense) for index, defense in enumerate(everyone)]
