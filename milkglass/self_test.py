"""The audit's test of its own attacks, on controls whose answer is known.

Only attacks that need nothing but pairs are run here; the others are held to their own bars by the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

DOORS = ("identity", "identity_rotated", "faint")


def try_on_trial(
    finding: Finding, suite: Sequence[Attack], source: Source, remember: Remember, *, doors: bool
) -> dict[str, ControlResult]:
    """The controls made from a trial. They share its records and entitled values, so its baseline too.

    doors: also the open ones; they depend on the records and pairs, hardly on the exposure, so one trial is enough.
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
    found = {"independent": ControlResult(value, controls.INDEPENDENT_AT_MOST, value <= controls.INDEPENDENT_AT_MOST)}
    if doors:
        found["identity"] = door("identity", controls.identity(trial))
        rotated = controls.identity_rotated(trial, source.generator("rotation", exposure))
        found["identity_rotated"] = door("rotated identity", rotated)
        found["faint"] = door("faint", controls.faint(trial, source.generator("faint", exposure)))
    return found


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


def worst(by_trial: Sequence[dict[str, ControlResult]]) -> dict[str, ControlResult]:
    """Of each control the result furthest on the wrong side."""
    found: dict[str, ControlResult] = {}
    for name in (*DOORS, "independent"):
        results = [each[name] for each in by_trial if name in each]
        pick = max if name == "independent" else min
        found[name] = pick(results, key=lambda result: result.value)
    return found
