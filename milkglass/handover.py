"""Weights that clients hand to each other by way of the server, which must not read them: sealed, and averaged.

Sealed with AES-SIV (RFC 5297) under a key that the clients share and the server lacks. It is deterministic, so a client
that dies and goes on sends the same bytes again; and unlike a counter mode it loses nothing when one key seals two
different weights, as two runs under one key do (all it then tells is whether two plain texts are equal).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from milkglass.errors import MessageError
from milkglass.randomness import Source

Weights = Mapping[str, Tensor]
_KEY_BYTES: Final = 64


def seal(weights: Weights, shared: Source, party: str, round_: int) -> Tensor:
    """Named tensors as bytes (n,) uint8 that only holders of `shared` can open, bound to who left them, and when."""
    plain = save({name: tensor.detach().contiguous().clone() for name, tensor in weights.items()})
    sealed = _cipher(shared).encrypt(plain, [party.encode(), str(round_).encode()])
    return torch.frombuffer(bytearray(sealed), dtype=torch.uint8)


def unseal(sealed: Tensor, shared: Source, party: str, round_: int) -> dict[str, Tensor]:
    """What `party` sealed in that round. Raises MessageError where it was changed, or sealed under another key."""
    try:
        plain = _cipher(shared).decrypt(sealed.numpy().tobytes(), [party.encode(), str(round_).encode()])
        return load(plain)
    except (InvalidTag, SafetensorError, ValueError):
        raise MessageError(
            f"weights of {party} in round {round_}: cannot be opened; they were changed on the way, or the clients do "
            "not share one key"
        ) from None


def average(weights: Sequence[Weights], counts: Sequence[float]) -> dict[str, Tensor]:
    """The mean of several parties' weights, each counting in proportion to `counts` (McMahan et al. 2017, FedAvg).

    Computed in float64, in the order given. What is not a floating-point number (BatchNorm's counter) is the first's.
    """
    total = float(sum(counts))
    mean = {}
    for name, first in weights[0].items():
        if first.is_floating_point():
            terms = [part[name].double() * (count / total) for part, count in zip(weights, counts, strict=True)]
            mean[name] = torch.stack(terms).sum(0).to(first.dtype)
        else:
            mean[name] = first.clone()
    return mean


def _cipher(shared: Source) -> AESSIV:
    return AESSIV(shared.derive("handed over").read(_KEY_BYTES))
