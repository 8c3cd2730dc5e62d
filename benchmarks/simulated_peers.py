"""Sixteen peers that train one network together, in one process and without a network: who lies, who reduces what.

As in `milkglass collab`: in each epoch (DeDLOC's word for a step of the optimizer) the peers share a target batch, each
contributes the mean gradient of its share, a butterfly reduces one part of the vector at one peer, or at two of them,
and all take the same step. Who reduces which part is drawn anew in each epoch, and no peer can choose it.

Legend: P peers of this epoch, H honest and L lying ones of them, D numbers of the network (or of a part), B records of
a share, F values of a record.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, final

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from milkglass.collaboration.centered_clipping import centered_clip, is_plausible
from milkglass.collaboration.weights import cap_weights
from milkglass.data import Records

PEERS: Final = 16
LIARS: Final = (2, 7, 11)
MOMENTUM: Final = 0.9

Contribute = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""What liars send: (their true contributions (L, D), the honest ones (H, D), generator) -> (L, D)."""
Reduce = Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]
"""What lying reducers return: (true part (D,), center (D,), honest contributions (H, D), generator) -> (D,)."""


@final
@dataclass(frozen=True)
class Lie:
    """contribute, reduce: None is honest. in_pairs: lies as a reducer only where both reducers of a part are liars.

    two_faced: of a part's two reducers, the second is sent the truth. claim: times its true number of records.
    """

    contribute: Contribute | None = None
    reduce: Reduce | None = None
    in_pairs: bool = False
    two_faced: bool = False
    claim: float = 1.0


@final
@dataclass(frozen=True)
class Defense:
    """clip: centered clipping in place of the mean. twice: each part reduced by two, compared, and checked.

    momentum: peers contribute running means of their gradients, and the optimizer has none of its own. cap: of claims
    of records, in medians. factor: of `is_plausible`. audits: the chance that a peer checks one part of an epoch.
    """

    clip: bool = False
    twice: bool = False
    momentum: bool = False
    cap: float | None = None
    factor: float = 4.0
    audits: float = 0.0


@final
class Network:
    """A network as one vector of D numbers: gradients of shares, loss, accuracy."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
        self.start_D = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
        self._gradients = vmap(grad(self._share_loss), in_dims=(None, 0, 0, 0))

    def gradients(self, weights_D: Tensor, x_PBF: Tensor, y_PB: Tensor, mask_PB: Tensor) -> Tensor:
        """(P, D): each share's gradient of mean cross-entropy, over the records whose mask is 1."""
        found: Tensor = self._gradients(weights_D, x_PBF, y_PB, mask_PB)
        return found

    def loss_and_accuracy(self, weights_D: Tensor, records: Records) -> tuple[float, float]:
        """Mean cross-entropy; share of records that are classified right, 0 to 1."""
        with torch.no_grad():
            logits = self._logits(weights_D, records.x)
        return F.cross_entropy(logits, records.y).item(), (logits.argmax(1) == records.y).float().mean().item()

    def _share_loss(self, weights_D: Tensor, x_BF: Tensor, y_B: Tensor, mask_B: Tensor) -> Tensor:
        losses_B = F.cross_entropy(self._logits(weights_D, x_BF), y_B, reduction="none")
        return (losses_B * mask_B).sum() / mask_B.sum().clamp_min(1)

    def _logits(self, weights_D: Tensor, x: Tensor) -> Tensor:
        pieces = weights_D.split([math.prod(shape) for shape in self._shapes.values()])
        weights = {name: piece.view(self._shapes[name]) for name, piece in zip(self._shapes, pieces, strict=True)}
        logits: Tensor = functional_call(self._network, weights, (x,))
        return logits


@final
@dataclass
class Group:
    """Who is still there, what all know of the last epoch (center_D), and what happened in all epochs.

    counts: parts that were recomputed because reducers "differ", are "implausible", or by "audit"; "slipped": false
    parts that were taken for true; "false alarm": true ones called implausible; "parts": all of them.
    """

    live: list[int] = field(default_factory=lambda: list(range(PEERS)))
    center_D: Tensor | None = None
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def honest(self) -> list[int]:
        """Rows of the honest among the live peers."""
        return [row for row, peer in enumerate(self.live) if peer not in LIARS]

    @property
    def lying(self) -> list[int]:
        """Rows of the liars among them."""
        return [row for row, peer in enumerate(self.live) if peer in LIARS]


def average(
    group: Group, sent_PD: Tensor, counts: Sequence[float], lie: Lie, defense: Defense, generator: torch.Generator
) -> Tensor:
    """One epoch's butterfly over contributions of the live peers, with their claims of records; bans whom it catches.

    sent_PD: true contributions, of liars too. Returns the average (D,) that all peers apply.
    """
    told_PD, claims = sent_PD.clone(), torch.tensor(counts, dtype=torch.float64)
    if group.lying:
        claims[group.lying] *= lie.claim
        if lie.contribute is not None:
            told_PD[group.lying] = lie.contribute(sent_PD[group.lying], sent_PD[group.honest], generator)
    weights_P = claims if defense.cap is None else torch.tensor(cap_weights(claims.tolist(), defense.cap))
    peers = len(group.live)
    first = torch.randperm(peers, generator=generator).tolist()
    shift = int(torch.randint(1, peers, (), generator=generator))
    second = first[shift:] + first[:shift]
    parts, caught = [], set[int]()
    bounds = torch.arange(sent_PD.shape[1]).tensor_split(peers)
    for columns, reducers in zip(bounds, zip(first, second, strict=True), strict=True):
        at = slice(int(columns[0]), int(columns[-1]) + 1)
        part = _Part(group, told_PD[:, at], sent_PD[:, at], weights_P, at, lie, defense)
        value_D, liars = part.reduced(reducers, generator)
        parts.append(value_D)
        caught |= liars
    group.center_D = torch.cat(parts)
    group.live = [peer for row, peer in enumerate(group.live) if row not in caught]
    return group.center_D


@final
class _Part:
    """One part of the vector in one epoch."""

    def __init__(
        self, group: Group, told_PD: Tensor, sent_PD: Tensor, weights_P: Tensor, at: slice, lie: Lie, defense: Defense
    ) -> None:
        self._group, self._told_PD, self._sent_PD, self._weights_P = group, told_PD, sent_PD, weights_P
        self._center_D = None if group.center_D is None else group.center_D[at]
        self._lie, self._defense = lie, defense

    def reduced(self, reducers: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, set[int]]:
        """The part that all peers take, and the rows of those who are caught."""
        true_D = self._mean(self._told_PD)
        liars = {row for row in reducers if row in self._group.lying and self._lie.reduce is not None}
        if not self._defense.twice:
            return (self._lied(true_D, generator) if reducers[0] in liars else true_D), set()
        self._group.counts["parts"] += 1
        if self._lie.two_faced and self._group.lying:  # the two results differ; the signed contributions say why
            self._group.counts["differ"] += 1
            told = [row for row in range(len(self._told_PD)) if row not in self._group.lying]
            return self._mean(self._told_PD, told), set(self._group.lying)
        if self._lie.in_pairs and len(liars) < 2:
            liars = set()
        if not liars:
            if not self._plausible(true_D):
                self._group.counts["false alarm"] += 1
            return true_D, set()
        if len(liars) == 1:
            self._group.counts["differ"] += 1
            return true_D, liars
        false_D = self._lied(true_D, generator)
        if not self._plausible(false_D):
            self._group.counts["implausible"] += 1
            return true_D, liars
        chance = 1 - (1 - self._defense.audits / len(self._group.live)) ** len(self._group.honest)
        if torch.rand((), generator=generator).item() < chance:
            self._group.counts["audit"] += 1
            return true_D, liars
        self._group.counts["slipped"] += 1
        return false_D, set()

    def _mean(self, told_PD: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        weights_P = self._weights_P
        if rows is not None:
            told_PD, weights_P = told_PD[rows], weights_P[rows]
        if self._defense.clip:
            return centered_clip(told_PD, weights_P, self._center_D).value_D
        return ((weights_P / weights_P.sum()).float() @ told_PD).nan_to_num()

    def _plausible(self, part_D: Tensor) -> bool:
        own_HD, factor = self._sent_PD[self._group.honest], self._defense.factor
        return all(is_plausible(part_D, self._center_D, own_D, factor) for own_D in own_HD)

    def _lied(self, true_D: Tensor, generator: torch.Generator) -> Tensor:
        assert self._lie.reduce is not None
        center_D = torch.zeros_like(true_D) if self._center_D is None else self._center_D
        return self._lie.reduce(true_D, center_D, self._sent_PD[self._group.honest], generator)
