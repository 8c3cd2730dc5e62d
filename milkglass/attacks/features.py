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
class Scaling:
    """How activations and entitled values become features, as fitted to the known pairs; each tensor is (F,), float64.

    low_F, high_F: what a coordinate is held within. scale_F: what it is divided by, infinite where it never moves.
    with_logarithms: whether the entitled values come with theirs.
    """

    low_F: Tensor
    high_F: Tensor
    mean_F: Tensor
    scale_F: Tensor
    with_logarithms: bool

    def rows(self, activations: Tensor, entitled: Tensor) -> Tensor:
        """Features (N, F) of further releases (N, ...) with their entitled values (N, E)."""
        return self.scaled(_joined(activations, entitled, self.with_logarithms))

    def scaled(self, joined_NF: Tensor) -> Tensor:
        """In place."""
        return joined_NF.clamp_(self.low_F, self.high_F).sub_(self.mean_F).div_(self.scale_F)


@dataclass(frozen=True)
class Features:
    """Centered and scaled features of the known (N, F), validation (N, F) and target (T, F) rows, in float64."""

    known_NF: Tensor
    validation_NF: Tensor
    target_TF: Tensor
    scaling: Scaling


def features(view: View, by_coordinate: bool = False) -> Features:
    """The view's activations and entitled values, flattened, scaled and joined; F is at least 1.

    Each block has the same mean squared norm, 1, over the known rows. Raises AuditError for values that are not finite.
    """
    parts = (view.known, view.validation, view.target)
    entitled = [part.entitled for part in parts]
    with_logarithms = entitled[0].numel() > 0 and all(bool(((each >= 0) & (each <= 1)).all()) for each in entitled)
    known, validation, target = (_joined(part.activations, part.entitled, with_logarithms) for part in parts)
    sent, told = flat(view.known.activations[:1]).shape[1], flat(entitled[0][:1]).shape[1]
    widths = [sent, told, told if with_logarithms else 0]
    scaling = _fit_scaling(known, widths if sum(widths) else [1], by_coordinate, with_logarithms)
    return Features(scaling.scaled(known), scaling.scaled(validation), scaling.scaled(target), scaling)


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


def _joined(activations: Tensor, entitled: Tensor, with_logarithms: bool) -> Tensor:
    """[activations | entitled | their logarithms], (N, F), a new tensor."""
    blocks = [flat(activations), flat(entitled)]
    if with_logarithms:
        blocks.append(blocks[1].clamp_min(SMALLEST_PROBABILITY).log())
    joined_NF = torch.cat(blocks, dim=1)
    if not bool(torch.isfinite(joined_NF).all()):
        raise AuditError("activations or entitled values: not all values are finite (NaN or infinity)")
    if not joined_NF.shape[1]:  # a party that saw nothing: one coordinate that never moves
        return joined_NF.new_zeros(len(joined_NF), 1)
    return joined_NF


def _fit_scaling(known_NF: Tensor, widths: list[int], by_coordinate: bool, with_logarithms: bool) -> Scaling:
    low_F, high_F, mean_F = known_NF.amin(0), known_NF.amax(0), known_NF.mean(0)
    width_F = high_F - low_F
    blocks = zip(*(torch.split(tensor, widths, dim=-1) for tensor in (known_NF, width_F, mean_F)), strict=True)
    scale_F = torch.cat([_scale(block_NF, width, mean, by_coordinate) for block_NF, width, mean in blocks])
    return Scaling(low_F - width_F, high_F + width_F, mean_F, scale_F, with_logarithms)


def _scale(block_NF: Tensor, width_F: Tensor, mean_F: Tensor, by_coordinate: bool) -> Tensor:
    """What each coordinate of a block is divided by, (F,); infinite where it never moves, so that it becomes 0."""
    moves_F = width_F > 0
    if not bool(moves_F.any()):  # also where there is no coordinate
        return torch.full_like(width_F, float("inf"))
    # in units of the range first: the square of a very small or very large number is 0 or infinity
    unit_F = torch.where(moves_F, width_F, 1.0) if by_coordinate else width_F.max().expand_as(width_F)
    spread_F = (block_NF - mean_F).div_(unit_F).square_().mean(0).sqrt()
    scale_F = unit_F * (spread_F * moves_F.sum().sqrt() if by_coordinate else spread_F[moves_F].norm())
    if not bool(torch.isfinite(scale_F).all()):
        raise AuditError("activations or entitled values: too large to compute with; expected sane values")
    return torch.where(moves_F, scale_F, float("inf"))
