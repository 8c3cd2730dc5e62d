"""A view as matrices: what every decoder of this folder regresses records on.

Legend: N pairs, T targets, F features, E entitled values a record, P values a record.

Features are [activations | entitled]. Each block is centered per coordinate and scaled in one of two ways, and the
attack takes the one that does better on validation pairs. *One scale a block* divides by the root mean square of its
known rows' norms: small coordinates stay small. *By coordinate* divides each by its own spread, so that what is sent
at a tiny scale beside loud coordinates is read as well. With that scaling alone, a nearly dead coordinate that jumps on
a new record throws the reconstruction far away, and a weak attack then passes for a strong defense. So a coordinate
that leaves the range it has in the known pairs is held within one such range beyond it, and one that never moves is 0.

Entitled values within [0, 1], such as probabilities, come with their logarithms, for attack and entitled baseline
alike. They tell much more: on Fashion-MNIST the entitled-only error of kernel ridge regression went from 0.042 to
0.026. Without them an attack would look good for reading out of the activations what the answer says already.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from milkglass.errors import AuditError
from milkglass.transcript import Pairs, Release, View

SMALLEST_PROBABILITY: Final = 1e-12
"""Entitled values are held above this before the logarithm."""


@dataclass(frozen=True)
class Features:
    """Centered and scaled features of the known (N, F), validation (N, F) and target (T, F) rows, in float64."""

    known_NF: Tensor
    validation_NF: Tensor
    target_TF: Tensor


def features(view: View, by_coordinate: bool = False) -> Features:
    """The view's activations and entitled values, flattened, scaled and joined; F is at least 1.

    Each block has the same mean squared norm, 1, over the known rows. Raises AuditError for values that are not finite.
    """
    rows = (view.known, view.validation, view.target)
    entitled = [flat(part.entitled) for part in rows]
    blocks = [[flat(part.activations) for part in rows], entitled]
    if entitled[0].numel() and all(bool(((part >= 0) & (part <= 1)).all()) for part in entitled):
        blocks.append([part_NE.clamp_min(SMALLEST_PROBABILITY).log() for part_NE in entitled])
    if not any(block[0].numel() for block in blocks):  # a party that saw nothing: one coordinate that never moves
        blocks = [[torch.zeros(len(part), 1, dtype=torch.float64) for part in rows]]
    if not all(bool(torch.isfinite(part).all()) for block in blocks for part in block):
        raise AuditError("activations or entitled values: not all values are finite (NaN or infinity)")
    scaled = [_scaled(block, by_coordinate) for block in blocks]
    return Features(*(torch.cat(parts, dim=1) for parts in zip(*scaled, strict=True)))


def answer_alone(view: View) -> View:
    """The view of a party that got its entitled values and saw no activations: they are zero wide."""

    def blind(pairs: Pairs) -> Pairs:
        return replace(pairs, activations=pairs.entitled[:, :0], repeats=None)

    target = Release(view.target.entitled[:, :0], view.target.entitled, view.target.labels)
    known, validation = blind(view.known), blind(view.validation)
    return View(known, validation, target, view.exposure)


def flat(tensor: Tensor) -> Tensor:
    """(N, ...) -> (N, P) in float64; P may be 0."""
    return tensor.flatten(1).to(torch.float64) if tensor.ndim > 1 else tensor[:, None].to(torch.float64)


def as_records(values_TP: Tensor, view: View) -> Tensor:
    """Predicted values (T, P) as records (T, ...) of the known ones' shape and type, held within their range.

    The range is that of all values of all known records: [0, 1] for pictures. Attack and entitled baseline alike.
    """
    records = view.known.records
    held_TP = values_TP.clamp(records.min().item(), records.max().item()).to(records.dtype)
    return held_TP.reshape(len(held_TP), *records.shape[1:])


def _scaled(parts: list[Tensor], by_coordinate: bool) -> list[Tensor]:
    known_NF = parts[0]
    low_F, high_F, mean_F = known_NF.amin(0), known_NF.amax(0), known_NF.mean(0)
    width_F = high_F - low_F
    moves_F = width_F > 0
    if not bool(moves_F.any()):  # also where there is no coordinate
        return [torch.zeros_like(part) for part in parts]
    # in units of the range first: the square of a very small or very large number is 0 or infinity
    unit_F = torch.where(moves_F, width_F, 1.0) if by_coordinate else width_F.max().expand_as(width_F)
    spread_F = ((known_NF - mean_F) / unit_F).square().mean(0).sqrt()
    scale_F = unit_F * (spread_F * moves_F.sum().sqrt() if by_coordinate else spread_F[moves_F].norm())
    if not bool(torch.isfinite(scale_F).all()):
        raise AuditError("activations or entitled values: too large to compute with; expected sane values")

    def scaled(part_NF: Tensor) -> Tensor:
        held_NF = part_NF.clamp(low_F - width_F, high_F + width_F)
        return torch.where(moves_F, (held_NF - mean_F) / scale_F, 0.0)

    return [scaled(part) for part in parts]
