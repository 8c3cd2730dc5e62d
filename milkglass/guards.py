"""What a client refuses to do, whatever the recipe or the server says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, final

import torch
from torch import Tensor

from milkglass.errors import EgressError
from milkglass.messages import Message

AGREED: Final[Mapping[str, frozenset[str]]] = {
    "activations": frozenset({"activations", "labels"}),
    "queries": frozenset({"activations"}),
}
"""What a client may send in vanilla split training: kind -> the tensors of such a message."""


@final
class EgressGuard:
    """Lets a message pass only if it is of an agreed kind, holds the agreed tensors, and no raw record."""

    def __init__(self, agreed: Mapping[str, frozenset[str]] = AGREED) -> None:
        self._agreed = agreed

    def check(self, message: Message, records: Tensor) -> None:
        """Raise EgressError if `message` is not what was agreed, or carries one of `records` (N, ...) unchanged."""
        expected = self._agreed.get(message.kind)
        if expected is None:
            raise EgressError(f"a client may not send {message.kind!r}; agreed are {', '.join(sorted(self._agreed))}")
        if message.tensors.keys() != expected:
            found = ", ".join(sorted(message.tensors)) or "nothing"
            raise EgressError(f"{message.kind!r} may hold {', '.join(sorted(expected))}; it holds {found}")
        flat = records.flatten(1)
        for name, tensor in message.tensors.items():
            if len(tensor) != len(records):
                raise EgressError(f"{message.kind!r}: {len(tensor)} rows of {name} for {len(records)} records")
            same_size = tensor.dim() > 1 and tensor[0].numel() == flat.shape[1]
            if same_size and _holds_one_of(flat, tensor.flatten(1)):
                raise EgressError(
                    f"{message.kind!r}: {name} holds a record as it is; cut the network behind a layer that computes"
                )
            if tensor.is_floating_point() and not finite(tensor):
                raise EgressError(f"{message.kind!r}: {name} is not finite (NaN or infinity); training has diverged")


def _holds_one_of(records_NP: Tensor, sent_NP: Tensor) -> bool:
    same_N = (sent_NP == records_NP.to(sent_NP.dtype)).all(dim=1)
    return bool((same_N & (records_NP != 0).any(dim=1)).any())  # an empty record, all zeros, tells nothing


def finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # a sum is finite only if its terms are, and costs a sixtieth of asking each; only an overflowing sum must ask
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
