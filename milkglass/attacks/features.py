"""A view as matrices: what every decoder of this folder regresses records on.

Legend: N pairs, T targets, F features, A activation values a record, E entitled values a record, P values a record.

Features are [activations | entitled]. Each block is centered per coordinate and divided by *one* number, its root mean
square over all known pairs: dividing every coordinate by its own spread lets a nearly dead one, that jumps on a new
record, throw the reconstruction far away, and a weak attack then passes for a strong defense. For the same reason a
coordinate that leaves the range it has in the known pairs is held within one such range beyond it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from milkglass.transcript import View


@dataclass(frozen=True)
class Features:
    """Centered and scaled features of the known (N, F), validation (N, F) and target (T, F) rows, in float64."""

    known_NF: Tensor
    validation_NF: Tensor
    target_TF: Tensor


def features(view: View) -> Features:
    """The view's activations and entitled values, flattened, scaled block by block and joined."""
    known, validation, target = view.known, view.validation, view.target
    seen = _block(known.activations, validation.activations, target.activations)
    entitled = _block(known.entitled, validation.entitled, target.entitled)
    return Features(*(torch.cat(blocks, dim=1) for blocks in zip(seen, entitled, strict=True)))


def flat(tensor: Tensor) -> Tensor:
    """(N, ...) -> (N, P) in float64."""
    return tensor.reshape(len(tensor), -1).to(torch.float64) if tensor.numel() else tensor.new_zeros(len(tensor), 0).to(torch.float64)


def as_records(values_TP: Tensor, view: View) -> Tensor:
    """Predicted values (T, P) as records (T, ...) of the known ones' shape and type, held within their range.

    The range is that of all values of all known records: [0, 1] for pictures. Attack and entitled baseline alike.
    """
    records = view.known.records
    held = values_TP.to(records.dtype).clamp(records.min(), records.max())
    return held.reshape(len(held), *records.shape[1:])


def _block(known: Tensor, *others: Tensor) -> list[Tensor]:
    known_NF = flat(known)
    low_F, high_F, mean_F = known_NF.amin(0), known_NF.amax(0), known_NF.mean(0)
    width_F = high_F - low_F
    spread = float((known_NF - mean_F).square().mean().sqrt()) if known_NF.numel() else 0.0
    scale = spread if spread > 0.0 else 1.0
    return [
        (flat(rows).clamp(low_F - width_F, high_F + width_F) - mean_F) / scale
        for rows in (known, *others)
    ]
