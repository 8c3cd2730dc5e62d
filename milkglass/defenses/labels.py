"""Label protection on gradients that leave who holds the labels (Li, Sun, Yang, Gao, Zhang, Xie, Wang 2022, "Label
leakage and protection in two-party split learning", ICLR, arXiv 2102.08504): max-norm, and Marvell for two classes.

Legend: B records in a batch, `...` a gradient's own shape, D values in it, p the share of class 1 in the batch, g the
squared distance of the two classes' mean gradients.

Max-norm lengthens every gradient by noise along itself, so that all have the largest one's squared norm on average.
Marvell models the gradients of class k as N(mean_k, v_k I) and picks, of all noise with p tr(S1) + (1 - p) tr(S0) <=
strength * g, the covariances S0 and S1 for which KL(0 || 1) + KL(1 || 0) is least. They have one variance along the
difference of the means and one across it, so four numbers are sought.

Where we differ: the authors' code descends on these numbers in turn, from a random start. Here the search is exact: in
logarithms the problem is convex (a geometric program), and the variances along are closed-form given those across, of
which one alone can be above zero. A gradient of zero, and a batch of one class, are not left bare: see below.

Neither promises anything for one record: the sum of divergences is that of the model, and gradients are no Gaussians.
The noise has mean zero, so who is sent many gradients of one record averages it away; their sum over a batch still
tells the server's weights, and what these tell of labels in general. Do-nothing twin: leave it out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from milkglass.defenses.base import Defense, NoiseSource
from milkglass.errors import MilkglassError, RecipeError

PRECISION: Final = 1e-10
"""How near the search comes to the best variance across the means' difference, as a share of it."""

Pair = tuple[float, float]
"""A number for class 0 and one for class 1."""


@dataclass(frozen=True)
class Variances:
    """Of the noise of class 0 and class 1, in the unit of the squared gradient.

    along: in the direction of the means' difference. across: of each of the D - 1 coordinates orthogonal to it. sum_kl:
    KL(0 || 1) + KL(1 || 0) of the noised classes in the model, in nats; 0 = not to be told apart, higher = leaks more.
    """

    along: Pair
    across: Pair
    sum_kl: float


@dataclass(frozen=True, eq=False)
class ClassNoise:
    """Gaussian noise of mean zero for each class. direction: (D,) float64, of length 1.

    variances: (2, 2) float64, first along the direction, then across it, each of class 0 and class 1.
    """

    direction: Tensor
    variances: Tensor

    def add_to(self, gradient: Tensor, y_B: Tensor, normal: Tensor) -> Tensor:
        """`gradient` (B, ...) of labels `y_B` (B,) with this noise, made of standard normal numbers, (B, ...)."""
        normal_BD = _rows(normal)
        along_BD = torch.outer(normal_BD @ self.direction, self.direction)
        sigma_2B1 = self.variances.sqrt()[:, y_B, None]
        noise_BD = sigma_2B1[0] * along_BD + sigma_2B1[1] * (normal_BD - along_BD)
        return (_rows(gradient) + noise_BD).to(gradient.dtype).reshape(gradient.shape)


def max_norm(gradient: Tensor, normal: Tensor) -> Tensor:
    """`gradient` (B, ...) with noise along each row; every row's expected squared norm is then the batch's largest.

    normal: standard normal numbers, (B, ...). The largest row stays as it is, hence a batch of one row too. A row of
    zeros has no direction: its noise goes in all of them, of the same expected squared norm.
    """
    square_B = _rows(gradient).square().sum(1)
    return along_itself(gradient, square_B.amax() - square_B, normal)


def along_itself(gradient: Tensor, power_B: Tensor, normal: Tensor) -> Tensor:
    """`gradient` (B, ...) with noise along each row, of expected squared norm `power_B` (B,).

    normal: standard normal numbers, (B, ...). The noise of a row of zeros goes in all directions.
    """
    rows_BD, normal_BD = _rows(gradient), _rows(normal)
    norm_B1 = rows_BD.norm(dim=1, keepdim=True)
    unit_BD = rows_BD / norm_B1.where(norm_B1 > 0, 1.0)
    along_BD = (normal_BD * unit_BD).sum(1, keepdim=True) * unit_BD
    noise_BD = along_BD.where(norm_B1 > 0, normal_BD / rows_BD.shape[1] ** 0.5)
    sent_BD: Tensor = rows_BD + power_B[:, None].sqrt() * noise_BD
    return sent_BD.to(gradient.dtype).reshape(gradient.shape)


def marvell(gradient: Tensor, y_B: Tensor, strength: float) -> ClassNoise | None:
    """Marvell's noise for the batch with this gradient (B, ...) and labels `y_B` (B,) in {0, 1}.

    A class with one record has variance 0, and is treated as any other. None where a class is missing or the means are
    equal: then there is no difference to hide noise in.
    """
    rows_BD, is_1_B = _rows(gradient), y_B == 1
    if bool(is_1_B.all()) or not bool(is_1_B.any()):
        return None
    mean_0_D, variance_0 = _moments(rows_BD[~is_1_B])
    mean_1_D, variance_1 = _moments(rows_BD[is_1_B])
    difference_D = mean_1_D - mean_0_D
    gap = difference_D.square().sum().item()
    if gap == 0:
        return None
    share = is_1_B.to(torch.float64).mean().item()
    found = marvell_variances((variance_0, variance_1), gap, rows_BD.shape[1], share, strength)
    return ClassNoise(difference_D / gap**0.5, torch.tensor([found.along, found.across], dtype=torch.float64))


def marvell_variances(variances: Pair, gap: float, dimension: int, share: float, strength: float) -> Variances:
    """The noise with the least sum of divergences whose power is `strength` times `gap`.

    variances: of a coordinate within each class, from 0 on. gap: g > 0. dimension: D. share: p, above 0 and below 1.
    """
    v = (variances[0] / gap, variances[1] / gap)  # in units of the gap, which is then 1
    shares = (1 - share, share)
    low = int(v[1] < v[0])  # noise across can only help the class that varies less, and up to the other's variance
    highest = v[1 - low]
    others = dimension - 1

    def at(variance_across: float) -> tuple[Pair, float]:
        """The best variances along, noise included, and the sum of divergences, given that across of class `low`."""
        spent = shares[low] * others * (variance_across - v[low])
        along = _best_along(v, shares, max(strength - spent, 0.0))
        across = others * _unlike(variance_across, highest) if others else 0.0
        return along, 0.5 * (across + _unlike(*along) + 1 / along[0] + 1 / along[1])

    best = v[low]
    if others and v[low] < highest:
        most = v[low] + min(highest - v[low], strength / (shares[low] * others))
        _, reached = at((v[low] + most) / 2)
        # 2 * reached >= others * (highest / best - 2): below this the best one cannot lie
        least = min(max(v[low], highest / (2 + 2 * reached / others)), most)
        found = minimize_scalar(
            lambda log: at(math.exp(log))[1],
            bounds=(math.log(least), math.log(most)),
            method="bounded",
            options={"xatol": PRECISION},
        )
        best = min(max(math.exp(float(found.x)), v[low]), most)
    along, sum_kl = at(best)
    across = [0.0, 0.0]
    across[low] = gap * (best - v[low])
    return Variances(
        along=(gap * max(along[0] - v[0], 0.0), gap * max(along[1] - v[1], 0.0)),
        across=(across[0], across[1]),
        sum_kl=sum_kl,
    )


def _best_along(v: Pair, shares: Pair, power: float) -> Pair:
    """The variances a0 >= v0 and a1 >= v1 of least divergence along, whose noise has this power.

    That is shares0 (a0 - v0) + shares1 (a1 - v1) = power. With r = a0 / a1 and t = shares0 a0 + shares1 a1, the
    divergence is r (t + shares0) + (t + shares1) / r, but for a factor and a constant: convex in r.
    """
    total = shares[0] * v[0] + shares[1] * v[1] + power
    ratio = math.sqrt((total + shares[1]) / (total + shares[0]))
    a1 = total / (shares[1] + shares[0] * ratio)
    if ratio * a1 < v[0]:
        return v[0], v[1] + power / shares[1]
    if a1 < v[1]:
        return v[0] + power / shares[0], v[1]
    return ratio * a1, a1


def _unlike(a: float, b: float) -> float:
    """Twice the sum of divergences of two centred normal variables of variances a and b: a/b + b/a - 2."""
    return 0.0 if a == b else (a - b) ** 2 / (a * b)


def _moments(rows_ND: Tensor) -> tuple[Tensor, float]:
    """The mean (D,), and the variance around it, averaged over coordinates."""
    mean_D = rows_ND.mean(0)
    return mean_D, (rows_ND - mean_D).square().mean().item()


def _rows(tensor: Tensor) -> Tensor:
    """(B, D) in float64: the squares of small gradients vanish in float32."""
    return tensor.detach().to(torch.float64).reshape(len(tensor), -1)


@final
class MaxNorm(Defense):
    """Noise along each record's gradient, up to the largest norm of the batch; for any number of classes.

    It hides norms alone, and on average alone: a gradient stays on its line, and the longest keep their direction.
    """

    def __repr__(self) -> str:
        return "MaxNorm()"

    def describe(self) -> str:
        return "max-norm label protection"

    def protect(self, gradient: Tensor, y_B: Tensor, noise: NoiseSource) -> Tensor:  # noqa: ARG002
        """What is sent in place of the gradient (B, ...); the labels play no part."""
        return max_norm(gradient, noise.gaussian_like(gradient, self.describe(), torch.float64))


@final
class Marvell(Defense):
    """The noise that best hides which of two classes a gradient is of; `strength` is its power in units of g.

    A batch of one class gets the noise of the last batch of both, so that it looks like one: with its own small noise
    it would be known for a batch of the frequent class. Before there was any, each row gets noise along itself, of
    `strength` times the largest squared norm. That noise is the defense's state.
    """

    def __init__(self, strength: float = 4.0) -> None:
        if not 0 < strength < math.inf:
            raise RecipeError(f"Marvell: strength is {strength}; expected a positive number")
        self.strength = strength
        self._last: ClassNoise | None = None

    def __repr__(self) -> str:
        return f"Marvell(strength={self.strength})"

    def describe(self) -> str:
        return f"Marvell label protection, strength {self.strength:g}"

    def protect(self, gradient: Tensor, y_B: Tensor, noise: NoiseSource) -> Tensor:
        """What is sent in place of the gradient (B, ...).

        Raises RecipeError for labels other than 0 and 1, and MilkglassError for a gradient that is not finite.
        """
        if bool(((y_B < 0) | (y_B > 1)).any()):
            raise RecipeError(
                f"Marvell: labels from {y_B.min()} to {y_B.max()}; expected two classes, 0 and 1; for more take MaxNorm"
            )
        if not bool(torch.isfinite(gradient).all()):
            raise MilkglassError("Marvell: the gradient is not finite; training has diverged: lower the learning rate")
        normal = noise.gaussian_like(gradient, self.describe(), torch.float64)
        self._last = marvell(gradient, y_B, self.strength) or self._last
        if self._last is None or len(self._last.direction) != gradient[0].numel():
            largest = _rows(gradient).square().sum(1).amax()
            return along_itself(gradient, (self.strength * largest).expand(len(gradient)), normal)
        return self._last.add_to(gradient, y_B, normal)

    def state(self) -> dict[str, Tensor]:
        if self._last is None:
            return {}
        return {"direction": self._last.direction, "variances": self._last.variances}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._last = ClassNoise(state["direction"], state["variances"]) if state else None
