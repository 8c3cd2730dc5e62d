"""Who stands in the server's place in a replay, and what it saw.

Legend: N records, n of them seen, D activation values a record, A channels of it; `...` is any shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from milkglass.messages import Message, Responder


class InTwoHalves:
    """One who answers activations with gradients, in a U-shaped training: his features say nothing, and he answers the
    client's gradient at them with his own.
    """

    def __init__(self, server: Responder, features: tuple[int, ...]) -> None:
        self._server, self._features = server, features
        self._asked: Message | None = None

    def reply(self, message: Message) -> Message:
        """Zeros, then the gradient."""
        if message.kind != "returns" or self._asked is None:
            self._asked = message
            rows = len(message.tensors["activations"])
            return Message("features", "server", message.step, {"features": torch.zeros(rows, *self._features)})
        answer = self._server.reply(self._asked)
        return Message("gradients", "server", message.step, {"gradient": answer.tensors["gradient"]})


class Seen:
    """What was seen of N records: sums of releases, (N, ...) a group of epochs, and how many there were."""

    def __init__(self, records: int, groups: int) -> None:
        self._sums: list[Tensor | None] = [None] * groups
        self._times_GN = torch.zeros(groups, records)

    def add(self, group: int, rows: Tensor, sent: Tensor) -> None:
        """One release of each of these records."""
        sums = self._sums[group]
        if sums is None:
            sums = self._sums[group] = torch.zeros(self._times_GN.shape[1], *sent.shape[1:], dtype=sent.dtype)
        sums[rows] += sent
        self._times_GN[group, rows] += 1

    def means(self) -> tuple[Tensor, Tensor]:
        """Means of the n records that were seen at all, and which these are, (n,).

        The groups stand side by side in the first dimension of a release: (n, groups * D), or (n, groups * A, h, w).
        """
        sums_GN = torch.stack([sums for sums in self._sums if sums is not None])
        crossed = self._times_GN.sum(0).nonzero()[:, 0]
        sums_Gn = sums_GN[:, crossed]
        times_Gn = self._times_GN[:, crossed].reshape(*sums_Gn.shape[:2], *[1] * (sums_Gn.ndim - 2))
        means_Gn = torch.where(times_Gn > 0, sums_Gn / times_Gn.clamp_min(1), sums_Gn.sum(0) / times_Gn.sum(0))
        return means_Gn.transpose(0, 1).flatten(1, 2), crossed


class Watch:
    """An honest server that remembers the activations it was sent last."""

    def __init__(self, server: Responder) -> None:
        self._server = server
        self.last = torch.empty(0)

    def reply(self, message: Message) -> Message:
        """The honest answer."""
        if message.kind == "activations":
            self.last = message.tensors["activations"].clone()
        return self._server.reply(message)
