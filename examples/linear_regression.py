"""What the generalization gap of a linear regression proves about its members, and what attackers really do.

    python examples/linear_regression.py

After Del Grosso, Pichler, Palamidessi and Piantanida 2021 (arXiv 2105.03875), section on Gaussian linear regression:
d = 20 features of standard deviation 2, noise of standard deviation 2, least squares on n rows that everybody knows. A
fair coin says whether the attacker sees the response S that row i had in training or a fresh one for the same row; it
also sees the weights, and knows the law of everything. The table has, for each n,

    gap         2 d sigma^2 / n, the mean squared error of fresh responses less that of the training ones
    published   their bound, as they print it: their search stops at R = 40
    maximum     the same formula at its true maximum over R. It takes for the losses' scale sigma^2, which members keep
                to and others do not (a fresh residual has variance sigma^2 (1 + h), h the row's leverage). So it proves
                nothing: it is here to be compared
    right s2    the same with sigma^2 (1 + the greatest h): proves that some attack does at least so well
    clipped     the loss clipped at R, exact chi-square tails, the leverages drawn: proves the same, and more of it
    equal h     clipped, for a design whose leverages are all d / n
    theirs      the success of their attack, as they print it: 1,000 trials, so .03 either way, and .492 is luck
    mixture     the same attack, simulated; it knows S and not its row: proves that an attacker can do that
    threshold   "member" below one threshold on the loss, simulated; it need not know the true weights, but the row
    best        the likelihood ratio with the row and the true weights, simulated: nobody who sees this does better

Everything left of `theirs` is, or is meant as, a lower bound: a small one certifies nothing, as the attacks beside it
show. Attacks carry the half-width of a 95 % interval over designs; the bounds are exact, given the leverages drawn.

Where we differ from the paper: designs and true weights are drawn anew (the paper has one of each), which moves the
mixture attack by .02 from one to the next at n = 21. Not in it: the true maximum, the right scale, the clipped bound,
and the last two attacks.

Legend: G designs, T trials in each, N rows, D features, H leverages.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import erf, erfc
from torch import Tensor

from milkglass.leakage.information import GapBound, exponential_gap_bound, maximum_over_radius
from milkglass.randomness import public_source

FEATURES: Final = 20
SIGMA_X: Final = 2.0
SIGMA_Y: Final = 2.0
VARIANCE: Final = SIGMA_Y**2
PUBLISHED: Final = {
    21: (0.53966, 0.744),
    40: (0.51691, 0.563),
    60: (0.50858, 0.554),
    80: (0.50441, 0.544),
    140: (0.49906, 0.492),
}
"""Rows; the bound in the authors' file, and the success of their attack."""
DESIGNS: Final = 100
TRIALS: Final = 200


class Attacks(NamedTuple):
    """Success of each attack in each design (G,), and what the simulation says of the rest."""

    mixture: Tensor
    threshold: Tensor
    best: Tensor
    gap: float
    leverage_H: NDArray[np.float64]


def expected_gap(rows: int) -> float:
    """E[squared error of a fresh response] less that of a training one, for a fixed design and least squares."""
    return 2 * FEATURES * VARIANCE / rows


def clipped_success(leverage_H: NDArray[np.float64], radius: float) -> float:
    """1/2 + (E[min(loss, R) | fresh] - E[min(loss, R) | member]) / (2 R), exactly, a row being any one alike."""
    return 0.5 + float((_clipped(1 + leverage_H, radius) - _clipped(1 - leverage_H, radius)).mean()) / (2 * radius)


def threshold_success(leverage_H: NDArray[np.float64], threshold: float) -> float:
    """The chance that "member if the loss is below the threshold" is right, exactly."""
    below = [erf(np.sqrt(threshold / (2 * VARIANCE * (1 + sign * leverage_H)))).mean() for sign in (-1, 1)]
    return 0.5 + float(below[0] - below[1]) / 2


def clipped_bound(leverage_H: NDArray[np.float64]) -> GapBound:
    """The greatest `clipped_success` over R."""
    return maximum_over_radius(lambda radius: clipped_success(leverage_H, radius), 1e-4, 1e4)


def best_threshold(leverage_H: NDArray[np.float64]) -> GapBound:
    """The greatest `threshold_success`, and the threshold."""
    return maximum_over_radius(lambda threshold: threshold_success(leverage_H, threshold), 1e-4, 1e4)


def log_ratios(fitted: Tensor, error: Tensor, leverage: Tensor) -> Tensor:
    """log p(weights | S was row i's in training) - log p(weights | it was not), of the shape of the arguments.

    fitted: x_i' (weights - true weights). error: S - x_i' true weights. leverage: x_i' (X'X)^-1 x_i. Only along one
    direction do the two normal laws differ; in it the weights' variance is sigma^2, or sigma^2 (1 - h) around the pull
    of the error.
    """
    other = fitted**2 / leverage
    member = (fitted - leverage * error) ** 2 / (leverage * (1 - leverage))
    return ((other - member) / VARIANCE - (1 - leverage).log()) / 2


def simulate(rows: int, designs: int, trials: int, generator: torch.Generator) -> Attacks:
    """Play the game in each design: a training set, a row and a coin for each trial; attack it in three ways."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x_GND = SIGMA_X * normal(designs, rows, FEATURES)
    beta_GD1 = SIGMA_X * (2 * torch.rand(designs, FEATURES, 1, generator=generator, dtype=torch.float64) - 1)
    mean_G1N = (x_GND @ beta_GD1).mT
    q_GND = torch.linalg.qr(x_GND).Q  # Q Q' projects on the columns of X
    leverage_G1N = q_GND.square().sum(2)[:, None]
    noise_GTN = SIGMA_Y * normal(designs, trials, rows)
    fitted_GTN = noise_GTN @ q_GND @ q_GND.mT  # x_i' (weights - true weights), all that the attacks need of the weights
    row_GT1 = torch.randint(rows, (designs, trials, 1), generator=generator)
    member_GT = torch.randint(2, (designs, trials), generator=generator) == 1
    error_GT1 = torch.where(member_GT[..., None], noise_GTN.gather(2, row_GT1), SIGMA_Y * normal(designs, trials, 1))
    s_GT1 = mean_G1N.expand_as(noise_GTN).gather(2, row_GT1) + error_GT1

    ratio_GTN = log_ratios(fitted_GTN, s_GT1 - mean_G1N, leverage_G1N)
    weight_GTN = -((s_GT1 - mean_G1N) ** 2) / (2 * VARIANCE)  # log p_i(S), up to a constant
    mixture_GT = (ratio_GTN + weight_GTN).logsumexp(2) > weight_GTN.logsumexp(2)
    best_GT = ratio_GTN.gather(2, row_GT1).squeeze(2) > 0

    loss_GT = (error_GT1 - fitted_GTN.gather(2, row_GT1)).squeeze(2) ** 2
    leverage_H = leverage_G1N.numpy().ravel()
    gap = loss_GT[~member_GT].mean() - loss_GT[member_GT].mean()
    mixture_G, threshold_G, best_G = (
        (guess_GT == member_GT).double().mean(1)
        for guess_GT in (mixture_GT, loss_GT < best_threshold(leverage_H).radius, best_GT)
    )
    return Attacks(mixture_G, threshold_G, best_G, gap.item(), leverage_H)


def mean_and_half(success_G: Tensor) -> tuple[float, float]:
    """Over designs: the mean, and half the width of its 95 % interval."""
    return success_G.mean().item(), 1.96 * success_G.std().item() / math.sqrt(len(success_G))


def main(designs: int = DESIGNS) -> None:
    """Print the table."""
    bound_names = ("gap", "published", "maximum", "right s2", "clipped", "equal h")
    print("  n", *(f"{name:>9}" for name in bound_names), *(f"{name:>12}" for name in ("theirs", *Attacks._fields[:3])))
    for rows, (published, theirs) in PUBLISHED.items():
        found = simulate(rows, designs, TRIALS, public_source(0).generator("linear regression", rows))
        gap, equal_H = expected_gap(rows), np.full(rows, FEATURES / rows)
        bounds = (
            published,
            exponential_gap_bound(gap, VARIANCE).value,
            exponential_gap_bound(gap, VARIANCE * (1 + found.leverage_H.max())).value,
            clipped_bound(found.leverage_H).value,
            clipped_bound(equal_H).value,
        )
        attacks = (mean_and_half(each_G) for each_G in found[:3])
        print(
            f"{rows:3d} {gap:9.3f}",
            *(f"{bound:9.5f}" for bound in bounds),
            f"{theirs:12.3f}",
            *(f"{mean:.3f}±{half:.3f}".rjust(12) for mean, half in attacks),
        )
    print(
        "Left of `theirs`: lower bounds. A small one does not mean that attackers do badly: see the attacks beside it."
    )


def _clipped(scale_H: NDArray[np.float64], radius: float) -> NDArray[np.float64]:
    """E[min(sigma^2 scale X^2, R)] for a standard normal X, from the chi-square laws of 1 and 3 degrees of freedom."""
    c_H = radius / (VARIANCE * scale_H)
    root_H = np.sqrt(c_H / 2)
    third_H = erf(root_H) - np.sqrt(2 * c_H / np.pi) * np.exp(-c_H / 2)
    return np.asarray(VARIANCE * scale_H * third_H + radius * erfc(root_H))


if __name__ == "__main__":
    main()
