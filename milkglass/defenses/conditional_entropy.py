"""Conditional entropy: a penalty on an upper bound of what a noisy release tells about the record (after Xia, Yu, Yang,
Ding, Chen, Duan, Kot and Jiang, CVPR 2025, arXiv 2503.00383: conditional entropy maximization, CEM).

Legend: B records in a batch, D values sent a record, K components (one a label); logarithms are natural.

**The bound.** Z are the activations of record X, N is independent Gaussian noise of covariance s^2 I, Z~ = Z + N is
sent, and Y is a label, with probabilities pi. X - Z - Z~ is a Markov chain, so (Cover and Thomas 2006)

    I(Z~; X) <= I(Z~; Z)                                            data processing, theorem 2.8.1
             <= I(Z~; Z, Y) = I(Z~; Y) + I(Z~; Z | Y)               chain rule, theorem 2.5.2
             <= H(pi) + sum_k pi_k (h(Z~ | Y = k) - h(N))           N is independent of Z and Y
             <= H(pi) + sum_k pi_k 1/2 log det(I + Sigma_k / s^2)   most entropy for a covariance: Gaussian, 8.6.5

with Sigma_k the covariance of Z in class k. Nothing is supposed about how Z is distributed. So H(X | Z~) >= H(X) minus
the bound; and where X has a density, and d values, whoever rebuilds it errs by exp(2 h(X | Z~) / d) / (2 pi e) a value
at least (mean square; CEM's theorem). Laplace's noise of equal variance has .0724 nats less entropy a value: add
.0724 D there. Where D is large against the batch, the product of the diagonal stands for the determinant: it is larger
(Hadamard). H(pi) is what the task asks for; the penalty presses on the rest, on how far records of one class differ, in
units of the noise.

**From batches.** Penalized is what will be sent, noise included: its covariance in class k is Sigma_k + s^2 I already.
By chance an estimate may have less in some direction: eigenvalues are held at s^2 or above. A class has a dozen records
in a batch of 128, so counts, means and covariances run along, detached, a record's weight falling by a tenth a batch.
The value is the bound of these; the gradient is that of 1/2 mean_i (z_i - mean)' C^-1 (z_i - mean) over the batch, C
the running covariance of z_i's class: on average the bound's own. Without labels there is one component, and the batch
alone.

**Where we differ from CEM.** Its paper bounds the same entropy by a Gaussian mixture. Its public code (read, not run)
takes k-means clusters within each class, fitted each epoch, and for a cluster *one* variance v, the mean over all
coordinates, part from the batch and part from that fit; its loss is max(0, log(v + .01) - log(tau s^2 + .01)), tau .1
unless set, times the cluster's share, averaged over the classes of a batch, on activations before the noise; the
gradient is multiplied by .001 / learning rate while that is high. Ours is the bound itself, in nats: a determinant, so
that what is sent twice counts for little more than once, and a quiet coordinate as much as it tells; no threshold; one
component a label; and on what is sent.

An estimate from records, of a stage that trains: it certifies nothing. Audit what it leaves. Do-nothing twin: weight 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, cast, final

import torch
from torch import Tensor
from torch.nn import functional as F

from milkglass.defenses.base import Defense
from milkglass.errors import RecipeError

KEPT: Final = 0.9
"""What is left of a record's weight in the running estimate after one more batch."""
RECORDS_A_VALUE: Final = 4
"""The full covariance is used from so many records in a batch per value sent; below, its diagonal. The logarithm of a
sample covariance's determinant is too low by about D (D + 1) / (2 n)."""


@final
class ConditionalEntropy(Defense):
    """`weight` times a bound, in nats a record, on what is sent tells about the record; it goes with noise.

    sigma: the standard deviation of the noise that other defenses put on each value, in the activations' unit.
    """

    def __init__(self, weight: float, sigma: float) -> None:
        if not 0 <= weight < math.inf:
            raise RecipeError(f"conditional entropy: weight is {weight}; expected a number from 0 on")
        if not 0 < sigma < math.inf:
            raise RecipeError(f"conditional entropy: sigma is {sigma}; expected the noise's, a positive number")
        self.weight = weight
        self.sigma = sigma
        self._running: Moments | None = None
        self._latest: Moments | None = None

    def __repr__(self) -> str:
        return f"ConditionalEntropy(weight={self.weight}, sigma={self.sigma})"

    def describe(self) -> str:
        return f"conditional entropy, weight {self.weight:g}, at noise of sigma {self.sigma:g}"

    def penalty(self, x: Tensor, z: Tensor, y_B: Tensor | None = None) -> Tensor | None:  # noqa: ARG002
        if self.weight == 0:
            return None
        sent_BD = z.flatten(1)
        labels_B = None if y_B is None or bool((y_B < 0).any()) else y_B
        before = None if labels_B is None else self._running
        seen = moments(sent_BD, labels_B, full=is_full(sent_BD) if before is None else before.is_full)
        if before is not None:
            seen = before.faded(KEPT).merged(seen)
        # kept by `learn` alone: whoever only asks for a penalty leaves no trace
        self._latest = None if labels_B is None else seen
        pull = seen.distances(sent_BD, labels_B, self.sigma)
        return self.weight * (seen.bound(self.sigma).to(z.dtype) + (pull - pull.detach()))

    def learn(self, x: Tensor, z: Tensor) -> None:  # noqa: ARG002
        """Take the last penalty's batch into the running estimate."""
        if self._latest is not None:
            self._running, self._latest = self._latest, None

    def state(self) -> dict[str, Tensor]:
        return {} if self._running is None else self._running.tensors()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._running = Moments(state["count_K"], state["mean_KD"], state["scatter"]) if state else None
        self._latest = None


def information_bound(z_BD: Tensor, sigma: float, y_B: Tensor | None = None) -> float:
    """At most what one release tells about its record, in nats, estimated from releases (B, D), noise included.

    sigma: the noise's, on each value. y_B: labels from 0; None for one component. Lower = more private.
    """
    return float(moments(z_BD, y_B, full=is_full(z_BD)).bound(sigma))


def is_full(z_BD: Tensor) -> bool:
    """Whether a batch has records enough for a full covariance."""
    return len(z_BD) >= RECORDS_A_VALUE * z_BD.shape[1]


def moments(z_BD: Tensor, y_B: Tensor | None, *, full: bool) -> Moments:
    """Of the classes 0 to max of `y_B` (B,), or of one; in float64, detached."""
    y_B = _one_class(z_BD) if y_B is None else y_B
    z_BD = z_BD.detach().double()
    one_hot_BK = F.one_hot(y_B).double()
    count_K = one_hot_BK.sum(0)
    mean_KD = (one_hot_BK.T @ z_BD) / count_K.clamp_min(1)[:, None]
    apart_BD = z_BD - mean_KD[y_B]
    if not full:
        return Moments(count_K, mean_KD, one_hot_BK.T @ apart_BD.square())
    return Moments(count_K, mean_KD, torch.einsum("bk,bd,be->kde", one_hot_BK, apart_BD, apart_BD))


@final
@dataclass(frozen=True, eq=False)
class Moments:
    """How many records each class had, (K,), and their mean, (K, D).

    scatter: the sum of outer products of their distances from it, (K, D, D), or its diagonal, (K, D).
    """

    count_K: Tensor
    mean_KD: Tensor
    scatter: Tensor

    @property
    def is_full(self) -> bool:
        """Whether there are covariances, and not only variances."""
        return self.scatter.dim() == 3

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by name."""
        return {"count_K": self.count_K, "mean_KD": self.mean_KD, "scatter": self.scatter}

    def faded(self, kept: float) -> Moments:
        """The same with each record's weight times `kept`."""
        return Moments(self.count_K * kept, self.mean_KD, self.scatter * kept)

    def merged(self, other: Moments) -> Moments:
        """Of both sets of records together (Chan, Golub and LeVeque 1983). Either may lack the other's last classes."""
        classes = max(len(self.count_K), len(other.count_K))
        a, b = self._padded(classes), other._padded(classes)
        count_K = a.count_K + b.count_K
        share_K1 = (b.count_K / count_K.clamp_min(1e-12))[:, None]
        apart_KD = b.mean_KD - a.mean_KD
        between_KD = (a.count_K[:, None] * share_K1) * apart_KD
        between = between_KD[:, :, None] * apart_KD[:, None, :] if self.is_full else between_KD * apart_KD
        return Moments(count_K, a.mean_KD + share_K1 * apart_KD, a.scatter + b.scatter + between)

    def bound(self, sigma: float) -> Tensor:
        """H(pi) + sum_k pi_k 1/2 log det(C_k / sigma^2), in nats, C_k with the noise in it: a scalar."""
        share_K = self.count_K / self.count_K.sum()
        nats_K = 0.5 * (self._spread(sigma)[0] / sigma**2).log().sum(1)
        return cast(Tensor, torch.special.entr(share_K) + share_K * nats_K).sum()

    def distances(self, z_BD: Tensor, y_B: Tensor | None, sigma: float) -> Tensor:
        """Half the mean squared distance of `z_BD` from its classes' means, each direction in units of its spread.

        A direction that has no more spread than the noise does not count.
        """
        y_B = _one_class(z_BD) if y_B is None else y_B
        spread_KD, axes_KDD = self._spread(sigma)
        weight_KD = torch.where(spread_KD > sigma**2, 1 / spread_KD, 0.0).to(z_BD.dtype)
        apart_BD = z_BD - self.mean_KD.to(z_BD.dtype)[y_B]
        if axes_KDD is not None:
            apart_BD = torch.einsum("bd,bde->be", apart_BD, axes_KDD.to(z_BD.dtype)[y_B])
        return 0.5 * (weight_KD[y_B] * apart_BD.square()).sum(1).mean()

    def _spread(self, sigma: float) -> tuple[Tensor, Tensor | None]:
        """Variances (K, D), none below the noise's, and the axes (K, D, D, one a column) along which they are."""
        freedom_K = (self.count_K - 1).clamp_min(1)
        if not self.is_full:
            return (self.scatter / freedom_K[:, None]).clamp_min(sigma**2), None
        values_KD, axes_KDD = torch.linalg.eigh(self.scatter / freedom_K[:, None, None])
        return values_KD.clamp_min(sigma**2), axes_KDD

    def _padded(self, classes: int) -> Moments:
        more = classes - len(self.count_K)
        if more == 0:
            return self
        return Moments(*(torch.cat([t, t.new_zeros(more, *t.shape[1:])]) for t in self.tensors().values()))


def _one_class(z_BD: Tensor) -> Tensor:
    return torch.zeros(len(z_BD), dtype=torch.int64)
