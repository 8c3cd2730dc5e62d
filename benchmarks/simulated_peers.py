"""Sixteen peers that train one network together, in one process and without a network: who lies, who reduces what.

As in `milkglass collab`: in each epoch (DeDLOC's word for a step of the optimizer) the peers share a target batch, each
contributes the mean gradient of its share, a butterfly reduces one part of the vector at one peer, or at two of them,
and all take the same step. Who reduces which part is drawn anew in each epoch, and no peer can choose it. A peer
that is banned has no share of the next target batch.

Legend: P peers of this epoch, H honest and L lying ones of them, D numbers of the network (or of a part), B records of
a share, K classes; trailing `...` is the shape of a record.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Final, final

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from milkglass.collaboration.centered_clipping import (
    centered_clip,
    compensated,
    is_plausible,
    remembered,
    running_mean,
)
from milkglass.collaboration.weights import cap_weights
from milkglass.data import Deal, Records
from milkglass.randomness import public_source

PEERS: Final = 16
LIARS: Final = (2, 7, 11)
HEARD: Final = 0.9
"""Of the running mean of how much of a peer's weight counted; below a half, it is out."""

Contribute = Callable[["Known"], Tensor]
"""What liars contribute (L, D)."""
Reduce = Callable[["Known", Tensor], Tensor]
"""What lying reducers return in place of the true part (D,)."""


@final
@dataclass(frozen=True)
class Known:
    """What liars know: everything. own_LD, honest_HD: true contributions. gradients_HD: of the honest. center_D: the
    running mean of earlier averages.
    """

    own_LD: Tensor
    honest_HD: Tensor
    gradients_HD: Tensor
    center_D: Tensor
    generator: torch.Generator

    def part(self, columns: slice) -> Known:
        """Of these columns alone."""
        return Known(
            self.own_LD[:, columns],
            self.honest_HD[:, columns],
            self.gradients_HD[:, columns],
            self.center_D[columns],
            self.generator,
        )


@final
@dataclass(frozen=True)
class Lie:
    """contribute, reduce: None is honest. in_pairs: lies as a reducer only where both reducers of a part are liars.

    two_faced: tells each of a part's two reducers something else. claim: times its true number of records.
    """

    contribute: Contribute | None = None
    reduce: Reduce | None = None
    in_pairs: bool = False
    two_faced: bool = False
    claim: float = 1.0


@final
@dataclass(frozen=True)
class Defense:
    """clip: centered clipping of contributions with a memory, in place of the mean; who is not heard for long is out.

    twice: each part is reduced by two, compared, and checked. memory: of contributions. cap: of claims of records, in
    medians. factor: of `is_plausible`. audits: the chance that a peer checks one part of an epoch, drawn in secret.
    """

    clip: bool = False
    twice: bool = False
    memory: float = 0.0
    cap: float = math.inf
    outs: bool = False
    factor: float = 4.0
    audits: float = 0.0


@final
@dataclass(frozen=True)
class Setting:
    """How all train. speeds: peers share the target batch in these proportions; each of them varies from epoch to epoch
    by a part `uneven` of it, either way.
    """

    seed: int
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    epochs: int = 200
    target_batch: int = 512
    speeds: tuple[float, ...] = (1.0,) * PEERS
    uneven: float = 0.0


@final
@dataclass(frozen=True)
class Outcome:
    """loss: mean cross-entropy of all training records. accuracy: of test records, 0 to 1. Diverged: infinite, and NaN.

    counts: as in `_Group`. banned: (epoch, peer).
    """

    loss: float
    accuracy: float
    counts: dict[str, int]
    banned: list[tuple[int, int]]


def train(records: Deal, network: nn.Module, setting: Setting, lie: Lie, defense: Defense) -> Outcome:
    """One training from the network's weights on; the records of each epoch follow from the seed alone."""
    flat, (train_set,) = Flat(network), records.train.values()
    public = public_source(setting.seed)
    batches, group = public.generator("batches"), _Group(public.generator("lies"), len(flat.start_D))
    weights_D = flat.start_D.clone().requires_grad_()
    optimizer = _optimizer(weights_D, setting)
    for epoch in range(setting.epochs):
        chosen = torch.randperm(len(train_set), generator=batches)[: setting.target_batch]
        pace = 1 + setting.uneven * (2 * torch.rand(PEERS, generator=batches) - 1)
        counts = _counts(len(chosen), [setting.speeds[peer] * pace[peer].item() for peer in group.live])
        gradients_PD = flat.gradients(weights_D.detach(), train_set, torch.split(chosen, counts))
        optimizer.param_groups[0]["lr"] = setting.learning_rate * (1 + math.cos(math.pi * epoch / setting.epochs)) / 2
        weights_D.grad = group.average(gradients_PD, counts, lie, defense, epoch)
        optimizer.step()
        if not bool(torch.isfinite(weights_D).all()):
            return Outcome(math.inf, math.nan, dict(group.counts), group.banned)
    loss, _ = flat.loss_and_accuracy(weights_D.detach(), train_set)
    _, accuracy = flat.loss_and_accuracy(weights_D.detach(), records.test)
    return Outcome(loss, accuracy, dict(group.counts), group.banned)


@final
class Flat:
    """A network as one vector of D numbers: gradients of shares, loss, accuracy."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
        self.start_D = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
        self._gradients = vmap(grad(self._share_loss), in_dims=(None, 0, 0, 0))

    def gradients(self, weights_D: Tensor, records: Records, shares: Sequence[Tensor]) -> Tensor:
        """(P, D): each share's gradient of mean cross-entropy. shares: record numbers of each."""
        chosen_PB = nn.utils.rnn.pad_sequence(list(shares), batch_first=True)
        sizes_P1 = torch.tensor([len(share) for share in shares]).unsqueeze(1)
        mask_PB = (torch.arange(chosen_PB.shape[1]) < sizes_P1).float()
        found: Tensor = self._gradients(weights_D, records.x[chosen_PB], records.y[chosen_PB], mask_PB)
        return found

    def loss_and_accuracy(self, weights_D: Tensor, records: Records) -> tuple[float, float]:
        """Mean cross-entropy; share of records that are classified right, 0 to 1."""
        logits_BK = self._logits(weights_D, records.x)
        right = (logits_BK.argmax(1) == records.y).float().mean().item()
        return F.cross_entropy(logits_BK, records.y).item(), right

    def _share_loss(self, weights_D: Tensor, x_B: Tensor, y_B: Tensor, mask_B: Tensor) -> Tensor:
        losses_B = F.cross_entropy(self._logits(weights_D, x_B), y_B, reduction="none")
        return (losses_B * mask_B).sum() / mask_B.sum()

    def _logits(self, weights_D: Tensor, x_B: Tensor) -> Tensor:
        pieces = torch.split(weights_D, [shape.numel() for shape in self._shapes.values()])
        weights = {name: piece.view(self._shapes[name]) for name, piece in zip(self._shapes, pieces, strict=True)}
        logits_BK: Tensor = functional_call(self._network, weights, (x_B,))
        return logits_BK


@final
@dataclass
class _Group:
    """Who is still there, what all know of earlier epochs, and what happened.

    counts: all "parts"; those whose reducers "differ"; false ones that are "implausible" or found by "audit", or
    "slipped" through; true ones that raised a "false alarm".
    """

    generator: torch.Generator
    size: int
    live: list[int] = field(default_factory=lambda: list(range(PEERS)))
    center_D: Tensor | None = None
    counts: Counter[str] = field(default_factory=Counter)
    banned: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._left_out_PD = torch.zeros(PEERS, self.size)
        self._heard = [1.0] * PEERS

    def average(self, gradients_PD: Tensor, counts: Sequence[int], lie: Lie, defense: Defense, epoch: int) -> Tensor:
        """One epoch's average (D,), as all peers get it; bans whom it catches. counts: records of each live peer."""
        claims = [count * (lie.claim if peer in LIARS else 1) for peer, count in zip(self.live, counts, strict=True)]
        weights = cap_weights(claims, defense.cap)
        rows = list(zip(self.live, gradients_PD, weights, strict=True))
        sent_PD = torch.stack(
            [compensated(gradient_D, self._left_out_PD[peer], w, defense.memory) for peer, gradient_D, w in rows]
        )
        butterfly = _Butterfly(self, gradients_PD, sent_PD, torch.tensor(weights, dtype=torch.float64), lie, defense)
        average_D = butterfly.reduced()
        for peer, gradient_D, w in rows:
            self._left_out_PD[peer] = remembered(self._left_out_PD[peer], gradient_D, average_D, w, defense.memory)
        self.center_D = running_mean(self.center_D, average_D, defense.memory)
        out = set(butterfly.caught)
        for row, peer in enumerate(self.live):
            self._heard[peer] = HEARD * self._heard[peer] + (1 - HEARD) * butterfly.heard_P[row].item()
            if defense.outs and self._heard[peer] < 0.5:
                out.add(row)
        self.banned += [(epoch, self.live[row]) for row in sorted(out)]
        self.live = [peer for row, peer in enumerate(self.live) if row not in out]
        return average_D


@final
class _Butterfly:
    """One epoch's reduction, part by part. caught: rows of reducers and contributors who lied, and were found out.

    heard_P: how much of each contribution counted, over all parts.
    """

    def __init__(
        self, group: _Group, gradients_PD: Tensor, sent_PD: Tensor, weights_P: Tensor, lie: Lie, defense: Defense
    ) -> None:
        self._group, self._lie, self._defense, self._weights_P = group, lie, defense, weights_P
        self._lying = [row for row, peer in enumerate(group.live) if peer in LIARS]
        honest = [row for row, peer in enumerate(group.live) if peer not in LIARS]
        center_D = torch.zeros(sent_PD.shape[1]) if group.center_D is None else group.center_D
        self._known = Known(sent_PD[self._lying], sent_PD[honest], gradients_PD[honest], center_D, group.generator)
        self._told_PD = sent_PD.clone()
        if lie.contribute is not None and self._lying:
            self._told_PD[self._lying] = lie.contribute(self._known)
        self.caught: set[int] = set()
        self.heard_P = torch.zeros(len(sent_PD), dtype=torch.float64)

    def reduced(self) -> Tensor:
        """The average (D,) that all peers apply."""
        peers, size = self._told_PD.shape
        first = torch.randperm(peers, generator=self._group.generator).tolist()
        shift = int(torch.randint(1, peers, (), generator=self._group.generator))
        ends = [size * number // peers for number in range(peers + 1)]
        parts = []
        for number, reducer in enumerate(first):
            columns = slice(ends[number], ends[number + 1])
            parts.append(self._part(columns, {reducer, first[(number + shift) % peers]}, reducer))
        return torch.cat(parts)

    def _part(self, columns: slice, reducers: set[int], first: int) -> Tensor:
        """What all peers take for the part; `first` is its one reducer where parts are not reduced twice."""
        lie, known, counts = self._lie, self._known.part(columns), self._group.counts
        counts["parts"] += 1
        two_faced = lie.two_faced and self._defense.twice and bool(self._lying)
        if two_faced:  # results differ, so all see the signed contributions: those who signed two of them are out
            counts["differ"] += 1
            self.caught.update(self._lying)
        true_D = self._mean(columns, without=self._lying if two_faced else [])
        if lie.reduce is None:
            return self._checked(true_D, known)
        if not self._defense.twice:
            return lie.reduce(known, true_D) if first in self._lying else true_D
        liars = reducers & set(self._lying)
        if not liars or (lie.in_pairs and len(liars) == 1):
            return self._checked(true_D, known)
        false_D = lie.reduce(known, true_D)
        if len(liars) == 1:
            counts["differ"] += 1
        elif not self._plausible(false_D, known):
            counts["implausible"] += 1
        elif self._audited():
            counts["audit"] += 1
        else:
            counts["slipped"] += 1
            return false_D
        self.caught |= liars
        return true_D

    def _mean(self, columns: slice, without: Sequence[int]) -> Tensor:
        told_PD, weights_P = self._told_PD[:, columns], self._weights_P.clone()
        weights_P[list(without)] = 0
        if not self._defense.clip:
            self.heard_P += 1
            return ((weights_P / weights_P.sum()).unsqueeze(1) * told_PD).sum(0).float()
        center_D = None if self._group.center_D is None else self._group.center_D[columns]
        found = centered_clip(told_PD, weights_P, center_D)
        self.heard_P += found.heard_N * (told_PD.shape[1] / self._told_PD.shape[1])
        return found.value_D

    def _checked(self, true_D: Tensor, known: Known) -> Tensor:
        if self._defense.twice and not self._plausible(true_D, known):
            self._group.counts["false alarm"] += 1
        return true_D

    def _plausible(self, part_D: Tensor, known: Known) -> bool:
        """To all honest peers: to the one whose own gradient is nearest to the center."""
        center_D = None if self._group.center_D is None else known.center_D
        nearest = int((known.gradients_HD - known.center_D).norm(dim=1).argmin())
        return is_plausible(part_D, center_D, known.gradients_HD[nearest], self._defense.factor)

    def _audited(self) -> bool:
        """Whether some honest peer happens to check this part."""
        chance = 1 - (1 - self._defense.audits / len(self._group.live)) ** len(self._known.gradients_HD)
        return torch.rand((), generator=self._group.generator).item() < chance


def _counts(records: int, speeds: Sequence[float]) -> list[int]:
    """How many of the records each peer takes."""
    reached = [0, *(round(records * part / sum(speeds)) for part in accumulate(speeds))]
    return [after - before for before, after in pairwise(reached)]


def _optimizer(weights_D: Tensor, setting: Setting) -> torch.optim.Optimizer:
    if setting.optimizer == "adam":
        return torch.optim.Adam([weights_D], lr=setting.learning_rate)
    return torch.optim.SGD([weights_D], lr=setting.learning_rate, momentum=0.9)
