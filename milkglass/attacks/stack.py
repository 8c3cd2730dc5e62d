"""Stacking: the non-negative combination of all attacks' reconstructions that rebuilds validation records best.

Legend: M members, V validation values (rows x values a record).

Breiman, "Stacked regressions" (1996), with the weights fitted on validation pairs instead of by cross-validation. The
members include the entitled-only decoders, so a stack cannot do clearly worse than the entitled baseline.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar, final

import scipy.optimize
import torch
from torch import Tensor

from milkglass.attacks.base import Attack, Reconstruction
from milkglass.attacks.features import answer_alone, as_records, flat
from milkglass.errors import AuditError
from milkglass.transcript import View


def combine(view: View, members: Sequence[Reconstruction]) -> Reconstruction:
    """Non-negative least squares over the members' reconstructions; members with values not finite are left out.

    The reconstruction's seconds are those of the combination alone.
    """
    start = time.perf_counter()
    usable = [m for m in members if bool(torch.isfinite(m.validation).all() and torch.isfinite(m.target).all())]
    if not usable:
        raise AuditError("stack: no member gave a reconstruction whose values are all finite")
    design_VM = torch.stack([flat(member.validation).flatten() for member in usable], dim=1)
    # the same least squares problem with M rows instead of V
    basis_VM, small_MM = torch.linalg.qr(design_VM)
    right_M = basis_VM.T @ flat(view.validation.records).flatten()
    weights, _ = scipy.optimize.nnls(small_MM.numpy(), right_M.numpy(), maxiter=100 * len(usable))
    weights_M = torch.from_numpy(weights)

    def weighted(tensors: Sequence[Tensor]) -> Tensor:
        total = torch.zeros_like(flat(tensors[0]))
        for weight, tensor in zip(weights_M.tolist(), tensors, strict=True):
            total += weight * flat(tensor)
        return as_records(total, view)

    validation, target = weighted([m.validation for m in usable]), weighted([m.target for m in usable])
    return Reconstruction(validation, target, time.perf_counter() - start)


@final
class Stack(Attack):
    """All `members` on the view and on what the party was entitled to alone, combined."""

    name: ClassVar[str] = "stack"

    def __init__(self, members: Sequence[Attack]) -> None:
        if not members:
            raise AuditError("stack: no members; expected at least one attack")
        self._members = tuple(members)

    def __repr__(self) -> str:
        return f"Stack({list(self._members)!r})"

    def attack(self, view: View) -> Reconstruction:
        """Run every member twice and combine. An audit has run them already and calls `combine` itself."""
        start = time.perf_counter()
        views = (view, answer_alone(view))
        both = combine(view, [member.attack(seen) for seen in views for member in self._members])
        return Reconstruction(both.validation, both.target, time.perf_counter() - start)
