"""Stacking: the non-negative combination of all attacks' reconstructions that rebuilds validation records best.

Legend: N validation rows, M members.

Breiman, "Stacked regressions" (1996), with the weights fitted on validation pairs instead of by cross-validation. The
members include the entitled-only decoders, so a stack cannot do clearly worse than the entitled baseline. The stack's
own validation records are rebuilt crosswise, each half by weights from the other: judged on the records that its
weights were fitted on, it would look better than it is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar, Final, final

import scipy.optimize
import torch
from torch import Tensor

from milkglass.attacks.base import Attack, Reconstruction, Tick, silent
from milkglass.attacks.features import answer_alone, as_records, flat
from milkglass.errors import AuditError
from milkglass.transcript import View

VALUES_AT_ONCE: Final = 1_000_000
"""How many values (rows x values a record) of each member are looked at together; it bounds the memory."""


def combine(view: View, members: Sequence[Reconstruction]) -> Reconstruction:
    """Non-negative least squares over the members' reconstructions; members with values not finite are left out.

    `validation` is cross-fitted: even rows by weights from the odd ones, and the other way round. `target` is by the
    weights from all. The seconds are those of the combination alone.
    """
    start = time.perf_counter()
    usable = [m for m in members if bool(torch.isfinite(m.validation).all() and torch.isfinite(m.target).all())]
    if not usable:
        raise AuditError("stack: no member gave a reconstruction whose values are all finite")
    rows_N = torch.arange(len(view.validation))
    halves = [rows_N[0::2], rows_N[1::2]]
    systems = [_reduced(view, usable, half) for half in halves]
    rebuilt = torch.empty_like(view.validation.records)
    for half, system in zip(halves, reversed(systems), strict=True):
        rebuilt[half] = _weighted(view, [member.validation[half] for member in usable], _weights(system))
    target = _weighted(view, [member.target for member in usable], _weights(torch.cat(systems)))
    return Reconstruction(rebuilt, target, time.perf_counter() - start)


def _reduced(view: View, members: Sequence[Reconstruction], rows_N: Tensor) -> Tensor:
    """The same least squares problem in at most M + 1 rows: [members | records] of these rows, (M + 1, M + 1).

    The triangular factor of the QR decomposition, built up chunk by chunk.
    """
    system_SM = torch.zeros(0, len(members) + 1, dtype=torch.float64)
    step = max(1, VALUES_AT_ONCE // max(1, view.validation.records[0].numel()))
    for chunk_N in torch.split(rows_N, step):
        columns = [*(member.validation[chunk_N] for member in members), view.validation.records[chunk_N]]
        chunk_SM = torch.stack([flat(column).flatten() for column in columns], dim=1)
        system_SM = torch.linalg.qr(torch.cat([system_SM, chunk_SM]), mode="r").R
    return system_SM


def _weights(system_SM: Tensor) -> list[float]:
    """Non-negative weights of the members."""
    members = system_SM.shape[1] - 1
    weights, _ = scipy.optimize.nnls(system_SM[:, :-1].numpy(), system_SM[:, -1].numpy(), maxiter=100 * members)
    return [float(weight) for weight in weights]


def _weighted(view: View, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(flat(tensors[0]))
    for weight, tensor in zip(weights, tensors, strict=True):
        total += weight * flat(tensor)
    return as_records(total, view)


@final
class Stack(Attack):
    """All `members` on the view and on what the party was entitled to alone, combined."""

    name: ClassVar[str] = "stack"
    paper: ClassVar[str] = "Breiman 1996"

    def __init__(self, members: Sequence[Attack]) -> None:
        if not members:
            raise AuditError("stack: no members; expected at least one attack")
        self._members = tuple(members)

    def __repr__(self) -> str:
        return f"Stack({list(self._members)!r})"

    def attack(self, view: View, tick: Tick = silent) -> Reconstruction:
        """Run every member twice and combine. An audit has run them already and calls `combine` itself."""
        start = time.perf_counter()
        made = []
        for seen in (view, answer_alone(view)):
            for member in self._members:
                made.append(member.attack(seen))
                tick(len(made), 2 * len(self._members))
        both = combine(view, made)
        return Reconstruction(both.validation, both.target, time.perf_counter() - start)
