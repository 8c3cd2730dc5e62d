"""Nearest neighbors: a record looks like the known ones that the client sends nearly the same for.

Legend: N known pairs, M other rows, F features, k neighbors, P values a record.

Fix and Hodges 1951. Scaling of the features and number of neighbors are chosen on validation pairs. It cannot invent a
picture that is not a mean of known ones, so its error on an open door is that of the nearest known record, and falls
with the number of pairs only. It needs no smooth map, and tells at once if what is sent gives groups of records away.
"""

from __future__ import annotations

import time
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from milkglass.attacks.base import Attack, Reconstruction, Tick, silent
from milkglass.attacks.features import Features, as_records, features, flat
from milkglass.errors import AuditError
from milkglass.leakage.reconstruction import squared_errors
from milkglass.transcript import View

ROWS_AT_ONCE: Final = 128


@final
class NearestNeighbor(Attack):
    """The mean of the k known records whose features are nearest, k a power of two up to `most`."""

    name: ClassVar[str] = "nearest neighbor"
    paper: ClassVar[str] = "Fix and Hodges 1951"
    open_door: ClassVar[float] = 0.0  # how near the nearest known record is: no more is promised

    def __init__(self, most: int = 64) -> None:
        if most < 1:
            raise AuditError(f"nearest neighbor: most = {most}; expected at least 1")
        self._most = most

    def __repr__(self) -> str:
        return f"NearestNeighbor(most={self._most})"

    def attack(self, view: View, tick: Tick = silent) -> Reconstruction:
        """Rebuild by the mean of the nearest known records."""
        start = time.perf_counter()
        most = min(self._most, len(view.known))
        counts = [2**power for power in range(most.bit_length())]
        tried: list[tuple[float, Features, int]] = []
        for by_coordinate in (False, True):
            inputs = features(view, by_coordinate)
            errors = _errors(view, _neighbors(inputs.validation_NF, inputs.known_NF, counts[-1]), counts)
            tried += [(error, inputs, count) for error, count in zip(errors, counts, strict=True)]
            tick(1 + by_coordinate, 3)
        _, inputs, count = min(tried, key=lambda each: each[0])

        def rebuild(x_MF: Tensor) -> Tensor:
            rows_Mk = _neighbors(x_MF, inputs.known_NF, count)
            return torch.cat([_means(view, part_Mk, [count])[0] for part_Mk in torch.split(rows_Mk, ROWS_AT_ONCE)])

        validation, target = rebuild(inputs.validation_NF), rebuild(inputs.target_TF)
        return Reconstruction(validation, target, time.perf_counter() - start)


def _neighbors(x_MF: Tensor, known_NF: Tensor, count: int) -> Tensor:
    """Rows of the nearest known pairs, (M, count), nearest first. In float32: it is twice as fast, and near enough."""
    known_FN = known_NF.float().T
    halves_N = known_FN.square().sum(0) / 2
    found = [torch.topk(part @ known_FN - halves_N, count).indices for part in torch.split(x_MF.float(), ROWS_AT_ONCE)]
    return torch.cat(found)


def _means(view: View, rows_Mk: Tensor, counts: list[int]) -> list[Tensor]:
    """The mean of the first `count` of each row's neighbors, for each count: records (M, ...)."""
    records = view.known.records
    sums_MkP = flat(records[rows_Mk].flatten(0, 1)).reshape(*rows_Mk.shape, -1).cumsum_(1)
    return [as_records(sums_MkP[:, count - 1] / count, view) for count in counts]


def _errors(view: View, rows_Mk: Tensor, counts: list[int]) -> list[float]:
    """Mean squared error on validation records by number of neighbors."""
    totals = [0.0] * len(counts)
    parts = zip(torch.split(rows_Mk, ROWS_AT_ONCE), torch.split(view.validation.records, ROWS_AT_ONCE), strict=True)
    for part_Mk, records in parts:
        for index, mean in enumerate(_means(view, part_Mk, counts)):
            totals[index] += squared_errors(mean, records).sum().item()
    return [total / len(rows_Mk) for total in totals]
