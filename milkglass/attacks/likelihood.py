"""White-box inversion: who knows the client's weights looks for the record that makes the activations most likely.

Legend: N records, T targets, V validation records, B batch, D activation values, K loud directions, P values a record,
C channels, H height, W width; trailing `...` is any shape.

After He, Zhang and Lee, "Model inversion attacks against collaborative inference" (ACSAC 2019, section 4), called
regularized maximum likelihood there: gradient descent on the record, with total variation as the prior of a picture.
Here all records descend together (one Adam step each, nothing is shared between them), with a rate that decays to zero.

What is minimized for each record is |client(x) - z|^2 / S + prior, S the mean squared distance of known activations
from their mean: one scale for all coordinates, so that a nearly dead one that jumps does not drown the others. For
Gaussian noise that is the log-likelihood, up to a factor that the prior's weight takes up. The weights tried grow with
the noise; the best one, and the best moment to stop, are chosen on validation records.

From the ridge image there is a second descent beside that on pixels: x = image + L u, L L' the covariance of the
left-out errors of ridge regression, with the Gaussian prior |u|^2. It moves first where ridge regression is unsure. It
also turns the loudest directions of the activations down: on a cut trained with NoPeek one direction alone held 75 % of
their variance, and a descent that sees little else stops in a poor valley. Validation records choose between the two.
Flat rows, which have no neighbors to be smooth with, take the second alone.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from milkglass.attacks.base import Attack, Reconstruction, Tick, silent
from milkglass.attacks.features import as_records, flat
from milkglass.attacks.ridge import best_ridge
from milkglass.errors import AuditError
from milkglass.leakage.reconstruction import squared_errors
from milkglass.transcript import Known, View

CHECKS: Final = 15
"""How often a descent is looked at: it is stopped where validation records are rebuilt best."""
CHOICE_RECORDS: Final = 16
"""Priors are compared on so many validation records."""
PIXEL_RATE: Final = 0.02
"""First step of a pixel, in units of the records' range."""
LOUD: Final = 64
"""So many directions of the activations, those of the largest variance, are turned down."""
LOUD_ROWS: Final = 1000
"""They are found on so many known pairs."""
LOUD_FLOOR: Final = 0.03
"""Variances are taken to be larger by this share of their mean, so that nothing is turned down to next to nothing."""
ERROR_RATE: Final = 0.02
"""First step along an eigenvector of ridge regression's errors, in standard deviations of them."""
SMOOTHNESS: Final = (0.01, 0.1)
"""Weights of the total variation a pixel, noise-free; each grows by ten times the noise's share, see `noise_share`."""
CERTAINTY: Final = 0.01
"""The same for the Gaussian prior's mean square, which grows by the noise's share itself."""
LEAST_ERROR: Final = 1e-5
"""Eigenvalues of the errors' covariance are held above this share of the largest: none is ever quite certain."""


def total_variation(x_BCHW: Tensor, corner: float = 1e-3) -> Tensor:
    """Mean length of the brightness gradient over the pixels, (B,), in units of brightness a pixel. Lower = smoother.

    Rudin, Osher and Fatemi 1992, isotropic; lengths below about `corner` count as their square, to be differentiable.
    """
    here = x_BCHW[:, :, :-1, :-1]
    down, right = x_BCHW[:, :, 1:, :-1] - here, x_BCHW[:, :, :-1, 1:] - here
    length = (down.square() + right.square() + corner**2).sqrt() - corner
    return length.flatten(1).sum(1) / max(1, x_BCHW[0].numel())


def sent_for(view: View, records: Tensor, values: int) -> Tensor:
    """The known client's activations, flattened, for records (N, ...): (N, D), differentiable by the records.

    Raises AuditError unless D is `values`, the width of what was seen.
    """
    client = view.knowledge.client
    assert client is not None  # `check` has seen to it
    sent_ND = client(records).flatten(1)
    if sent_ND.shape != (len(records), values):
        raise AuditError(
            f"client weights: the known client sends {tuple(sent_ND.shape)} values for {len(records)} records; "
            f"expected {(len(records), values)}, as crossed"
        )
    return sent_ND


def spread(view: View) -> float:
    """Mean squared distance of the known activations from their mean, all coordinates together; 1 if none moves."""
    known_ND = flat(view.known.activations)
    return (known_ND - known_ND.mean(0)).square().sum(1).mean().item() or 1.0


@dataclass(frozen=True, eq=False)
class Misfit:
    """Squared errors of activations (B, D) -> (B,): 1 for the mean's, 2 for other records'. Lower = more likely.

    view: where the known client is. scale: what they are divided by. loud_DK, gain_K: orthonormal directions whose
    squared errors count `gain_K` times less; K may be 0.
    """

    view: View
    scale: float
    loud_DK: Tensor
    gain_K: Tensor

    def __call__(self, x: Tensor, z_BD: Tensor) -> Tensor:
        """Of the activations of records `x` (B, ...) and those seen.

        Raises AuditError if the client's output does not depend differentiably on the record.
        """
        sent_BD = sent_for(self.view, x, z_BD.shape[1])
        if not sent_BD.requires_grad:
            raise AuditError("client weights: the known client cannot be differentiated by the record")
        error_BD = sent_BD - z_BD
        quieter_B = ((error_BD @ self.loud_DK).square() * (1 - 1 / self.gain_K)).sum(1)
        return (error_BD.square().sum(1) - quieter_B) / self.scale


def even_misfit(view: View) -> Misfit:
    """All directions count alike: the likelihood under Gaussian noise."""
    none_D0 = view.known.activations.flatten(1)[:0].T
    return Misfit(view, spread(view), none_D0, none_D0[0])


def quiet_misfit(view: View) -> Misfit:
    """The 64 loudest directions count as much less as their variance exceeds the mean of the others'.

    Without noise the true record has misfit 0 here too. In noise it is no longer the likelihood alone that is
    minimized; validation records tell whether that pays.
    """
    known_ND = view.known.activations[:LOUD_ROWS].flatten(1)
    known_ND = known_ND - known_ND.mean(0)
    count = min(LOUD, min(known_ND.shape) // 2)
    total = known_ND.square().sum().item() / len(known_ND)
    if count < 1 or total == 0:
        return even_misfit(view)
    _, lengths_K, loud_KD = torch.linalg.svd(known_ND, full_matrices=False)
    variance_K = lengths_K[:count].square() / len(known_ND)
    floor, left = LOUD_FLOOR * total / known_ND.shape[1], max(0.0, total - variance_K.sum().item())
    other = left / (known_ND.shape[1] - count) + floor
    gain_K = ((variance_K + floor) / other).clamp_min(1)
    return Misfit(view, left + (variance_K / gain_K).sum().item(), loud_KD[:count].T.contiguous(), gain_K)


def noise_share(view: View) -> float:
    """P sigma^2 / spread: how the Gaussian prior's mean square weighs against the misfit; 0 without noise.

    sigma is the noise of what is compared: of the mean, where a record was released several times.
    """
    repeats = view.target.repeats
    variance = view.knowledge.noise_sigma**2 / (1 if repeats is None else len(repeats))
    return view.known.records[0].numel() * variance / spread(view)


def first_rows(view: View, count: int) -> tuple[Tensor, Tensor]:
    """Activations of the first `count` validation and target records, flattened: (V, D), (T, D)."""
    return view.validation.activations[:count].flatten(1), view.target.activations[:count].flatten(1)


def descend(
    parameter: Sequence[Tensor],
    rebuild: Callable[[], Tensor],
    loss: Callable[[Tensor], Tensor],
    rate: float,
    steps: int,
    tick: Tick = silent,
) -> list[Tensor]:
    """Adam on the sum of `loss(rebuild())`, cosine decay of the rate to 0; what is rebuilt at the start and each check.

    Only the parameters given are differentiated: no gradient is left on the client's weights.
    """
    optimizer = torch.optim.Adam(parameter, lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    every = max(1, steps // CHECKS)
    seen: list[Tensor] = []
    for step in range(steps):
        made = rebuild()
        if step % every == 0:
            seen.append(made.detach().clone())
            tick(step, steps)
        total = loss(made).sum()
        for value, gradient in zip(parameter, torch.autograd.grad(total, parameter), strict=True):
            value.grad = gradient
        optimizer.step()
        schedule.step()
    tick(steps, steps)
    return [*seen, rebuild().detach().clone()]


def best_check(seen: Sequence[Tensor], truth: Tensor) -> tuple[float, int]:
    """(error, index) of the check whose first rows are nearest to `truth` (V, ...); checks not finite never are."""
    errors = [squared_errors(made[: len(truth)], truth).mean().item() for made in seen]
    return min((error if math.isfinite(error) else math.inf, index) for index, error in enumerate(errors))


@dataclass(frozen=True, eq=False)
class Prior:
    """What is likely of a record before it is seen: that a picture is smooth, or how ridge regression errs.

    weight: of the total variation, or of |u|^2 / P. misfit: what it is weighed against. root_PP: L of the Gaussian
    prior; None for the one on pixels.
    """

    weight: float
    misfit: Misfit
    root_PP: Tensor | None = None


def invert(
    prior: Prior, z_BD: Tensor, start: Tensor, low: float, high: float, steps: int, tick: Tick = silent
) -> list[Tensor]:
    """Records (B, ...) within [low, high] that make `z_BD` most likely, from `start` (B, ...): at each check."""
    if prior.root_PP is None:
        pixels = start.clone().requires_grad_()

        def held() -> Tensor:
            with torch.no_grad():
                pixels.clamp_(low, high)
            return pixels

        def smoothly(x: Tensor) -> Tensor:
            picture = x.ndim == 4 and prior.weight > 0
            misfit_B = prior.misfit(x, z_BD)
            return misfit_B + prior.weight * total_variation(x) if picture else misfit_B

        return descend([pixels], held, smoothly, PIXEL_RATE * (high - low), steps, tick)
    root_PP, base_BP = prior.root_PP, start.flatten(1)
    u_BP = torch.zeros_like(base_BP).requires_grad_()

    def moved() -> Tensor:
        free = (base_BP + u_BP @ root_PP.T).reshape(start.shape)
        return free + (free.clamp(low, high) - free).detach()  # held in range, and free to come back from its edge

    def likely(x: Tensor) -> Tensor:
        return prior.misfit(x, z_BD) + prior.weight * u_BP.square().mean(1)

    return descend([u_BP], moved, likely, ERROR_RATE, steps, tick)


class Likelihood(Attack):
    """Maximum likelihood on the record itself, for the first `records` validation and target records.

    Subclasses say where the descent starts. That it fails from a poor start says nothing of privacy: the surface has
    many valleys, and the record may lie in one that was not found.
    """

    paper: ClassVar[str] = "He, Zhang and Lee, ACSAC 2019"

    def __init__(self, steps: int = 150, records: int = 64) -> None:
        if steps < 1 or records < 1:
            raise AuditError(f"{self.name}: steps = {steps}, records = {records}; expected at least 1 of each")
        self._steps, self._records = steps, records

    def __repr__(self) -> str:
        return f"{type(self).__name__}(steps={self._steps}, records={self._records})"

    @abstractmethod
    def start(self, view: View) -> tuple[Tensor, list[Prior]]:
        """Where the first validation and target records start, one below the other, and the priors to be tried."""

    def attack(self, view: View, tick: Tick = silent) -> Reconstruction:
        """Choose prior and moment to stop on validation records, rebuild the first targets."""
        start = time.perf_counter()
        self.check(view)
        validation_VD, target_TD = first_rows(view, self._records)
        first, priors = self.start(view)
        low, high = view.known.records.min().item(), view.known.records.max().item()
        truth = view.validation.records[: self._records]
        few, works = min(CHOICE_RECORDS, len(truth)), len(priors) + 1

        def part(number: int) -> Tick:
            return lambda done, total: tick(number * total + done, works * total)

        errors = []
        for number, prior in enumerate(priors if len(priors) > 1 else []):
            tried = invert(prior, validation_VD[:few], first[:few], low, high, self._steps, part(number))
            errors.append(best_check(tried, truth[:few])[0])
        best = priors[errors.index(min(errors))] if errors else priors[0]
        both_BD = torch.cat([validation_VD, target_TD])
        seen = invert(best, both_BD, first, low, high, self._steps, part(works - 1))
        made = seen[best_check(seen, truth)[1]]
        validation, target = (as_records(rows.flatten(1), view) for rows in (made[: len(truth)], made[len(truth) :]))
        return Reconstruction(validation, target, time.perf_counter() - start)


def smooth(view: View) -> list[Prior]:
    """The priors of pictures; flat rows have none."""
    if view.known.records.ndim != 4:
        return []
    misfit = even_misfit(view)
    return [Prior(weight + 10 * noise_share(view), misfit) for weight in SMOOTHNESS]


@final
class LikelihoodFromGrey(Likelihood):
    """From the middle of the records' range. Total variation for pictures; flat rows have no prior.

    Finds the record where the client is nearly linear, such as on an identity cut. Through a deeper client it often
    ends far from it: then read the attack from the ridge image, and do not call it privacy. The validation records
    choose the prior's weight and the moment to stop; the range is that of the known records.
    """

    name: ClassVar[str] = "likelihood from grey"
    knows: ClassVar[tuple[Known, ...]] = ("client weights",)

    def start(self, view: View) -> tuple[Tensor, list[Prior]]:
        """All grey."""
        records = view.known.records
        count = sum(len(rows) for rows in first_rows(view, self._records))
        middle = (records.min().item() + records.max().item()) / 2
        grey = torch.full((count, *records.shape[1:]), middle, dtype=records.dtype)
        return grey, smooth(view) or [Prior(0.0, even_misfit(view))]


@final
class LikelihoodFromRidge(Likelihood):
    """From the image that ridge regression gives on known pairs; on validation records never worse than that."""

    name: ClassVar[str] = "likelihood from ridge"
    knows: ClassVar[tuple[Known, ...]] = ("pairs", "client weights")

    def start(self, view: View) -> tuple[Tensor, list[Prior]]:
        """The ridge images, and besides smoothness the Gaussian prior of their errors."""
        fit = best_ridge(view)
        images_BP = torch.cat([fit.validation_NP[: self._records], fit.target_TP[: self._records]])
        errors_NP = flat(view.known.records) - fit.left_out_NP
        covariance_PP = (errors_NP.T @ errors_NP / len(errors_NP)).to(view.known.records.dtype)
        values_P, vectors_PP = torch.linalg.eigh(covariance_PP)
        held_P = values_P.clamp_min(LEAST_ERROR * max(values_P.max().item(), 0.0))
        gaussian = Prior(CERTAINTY + noise_share(view), quiet_misfit(view), vectors_PP * held_P.sqrt())
        return as_records(images_BP, view), [*smooth(view), gaussian]
