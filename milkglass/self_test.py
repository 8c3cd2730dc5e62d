"""The audit's test of its own attacks, on controls whose answer is known.

Only attacks that need nothing but pairs are run here; the others are held to their own bars by the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from milkglass import controls
from milkglass.attacks.base import Attack
from milkglass.attacks.suite import Run, best, from_pairs, run_suite, until
from milkglass.controls import ControlResult
from milkglass.findings import Finding, with_finite_errors
from milkglass.leakage.reconstruction import squared_errors
from milkglass.randomness import Source
from milkglass.transcript import Trial, View

Remember = Callable[[str, View, Callable[[], float]], float]
"""(what, view, compute) -> the number, computed or brought back."""

MADE_FROM_A_TRIAL: Final = 4
"""Controls of a trial; one more, the Gaussian channel, is made of nothing."""


def try_on_trial(
    finding: Finding, suite: Sequence[Attack], source: Source, remember: Remember
) -> dict[str, ControlResult]:
    """The controls made from a trial. They share its records and entitled values, so its baseline too.

    They try the attacks, and depend on records and pairs, hardly on the exposure: one trial of an audit is enough.
    """
    trial, exposure, attacks = finding.trial, finding.exposure, from_pairs(suite)
    error_entitled = finding.errors_entitled_T.mean().item()

    def peek_of(run: Run) -> float:
        rebuilt = run.reconstruction.target
        alone = finding.errors_entitled_T[: len(rebuilt)].mean().item()
        return 1 - squared_errors(rebuilt, trial.truth[: len(rebuilt)]).mean().item() / alone

    def is_open(value: float) -> bool:
        return value >= controls.IDENTITY_AT_LEAST

    def door(what: str, made: Trial) -> ControlResult:
        value = remember(
            f"{exposure}, {what} control {attacks!r} {error_entitled}",
            made.view,
            lambda: until(attacks, made.view, peek_of, is_open),
        )
        return ControlResult(value, controls.IDENTITY_AT_LEAST, is_open(value))

    closed = controls.independent(trial, source.generator("independent", exposure))

    def leak_of_others() -> float:
        runs, _ = run_suite(closed.view, attacks, members=finding.entitled)
        return peek_of(best(with_finite_errors(runs, closed)))

    value = remember(f"{exposure}, independent control {attacks!r} {error_entitled}", closed.view, leak_of_others)
    return {
        "identity": door("identity", controls.identity(trial)),
        "identity_rotated": door(
            "rotated identity", controls.identity_rotated(trial, source.generator("rotation", exposure))
        ),
        "faint": door("faint", controls.faint(trial, source.generator("faint", exposure))),
        "independent": ControlResult(value, controls.INDEPENDENT_AT_MOST, value <= controls.INDEPENDENT_AT_MOST),
    }


def try_on_gaussian(suite: Sequence[Attack], source: Source, remember: Remember) -> ControlResult:
    """The error over the least possible one: near 1, and below it only by the luck of the test records."""
    trial, least_error = controls.gaussian(source.generator("gaussian"))
    attacks = from_pairs(suite)

    def ratio_of(run: Run) -> float:
        rebuilt = run.reconstruction.target
        return squared_errors(rebuilt, trial.truth[: len(rebuilt)]).mean().item() / least_error

    def is_near(value: float) -> bool:
        return abs(value - 1) <= controls.GAUSSIAN_WITHIN

    value = remember(f"gaussian control {attacks!r}", trial.view, lambda: until(attacks, trial.view, ratio_of, is_near))
    return ControlResult(value, 1 + controls.GAUSSIAN_WITHIN, is_near(value))
