"""A suite of attacks on one view: who is in it, how it is run, which of them is best.

Legend: N rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from milkglass.attacks.base import Attack, Reconstruction
from milkglass.attacks.decoder import Decoder
from milkglass.attacks.kernel_ridge import KernelRidge
from milkglass.attacks.mean_record import MeanRecord
from milkglass.attacks.ridge import Ridge
from milkglass.attacks.stack import Stack, combine
from milkglass.errors import AuditError, nearest
from milkglass.leakage.reconstruction import squared_errors
from milkglass.transcript import View


def default_attacks(seed: int = 0) -> tuple[Attack, ...]:
    """The suite of an honest but curious server, cheapest first; an audit adds their stack."""
    return MeanRecord(), Ridge(), KernelRidge(), Decoder(seed=seed)


def choose_attacks(names: Iterable[str], attacks: Sequence[Attack]) -> tuple[Attack, ...]:
    """Those of the attacks that are named; the mean record, ridge regression and the stack are always there."""
    known = {attack.name: attack for attack in attacks}
    wanted = {MeanRecord.name, Ridge.name}
    for name in (name.strip() for name in names):
        if name not in known and name != Stack.name:
            raise AuditError(f"attack {name!r} is not known; {nearest(name, [*known, Stack.name])}")
        wanted.add(name)
    return tuple(attack for attack in attacks if attack.name in wanted)


@dataclass(frozen=True)
class Run:
    """One attack's reconstruction of one view, and its error on validation records."""

    attack: Attack
    reconstruction: Reconstruction
    validation_error: float

    @property
    def name(self) -> str:
        """The attack's name."""
        return self.attack.name

    @property
    def usable(self) -> bool:
        """Whether all values of the reconstruction are finite."""
        return self.validation_error < float("inf")


def run_attack(attack: Attack, view: View) -> Run:
    """Run it, and see that it gives what an attack has to give."""
    return _judged(attack, view, attack.attack(view))


def _judged(attack: Attack, view: View, made: Reconstruction) -> Run:
    records = view.validation.records
    for what, tensor, rows in (
        ("validation", made.validation, len(records)),
        ("target", made.target, len(view.target)),
    ):
        if tensor.shape != (rows, *records.shape[1:]):
            raise AuditError(
                f"attack {attack.name!r}: its {what} reconstruction has shape {tuple(tensor.shape)}; "
                f"expected {(rows, *records.shape[1:])}"
            )
    finite = bool(torch.isfinite(made.validation).all() and torch.isfinite(made.target).all())
    error = squared_errors(made.validation, records).mean().item() if finite else float("inf")
    return Run(attack, made, error)


def run_suite(
    view: View, suite: Sequence[Attack], starting: Callable[[str], None], members: Sequence[Run] = ()
) -> list[Run]:
    """Every attack on the view, and the stack of all these with the runs already made, `members`."""
    runs = []
    for attack in suite:
        starting(attack.name)
        runs.append(run_attack(attack, view))
    together = [run.reconstruction for run in (*runs, *members) if run.usable]
    if not together:
        raise AuditError("no attack gave a reconstruction whose values are all finite")
    return [*runs, _judged(Stack(suite), view, combine(view, together))]


def best(runs: Sequence[Run]) -> Run:
    """The run with the least error on validation records; the earlier one of two alike."""
    return min(runs, key=lambda run: run.validation_error)


def until(
    suite: Sequence[Attack], view: View, measure: Callable[[Run], float], passes: Callable[[float], bool]
) -> float:
    """The measure of the best of the attacks so far, cheapest first, ended by the first that passes."""
    runs: list[Run] = []
    value = 0.0  # where nothing was rebuilt: no control passes with it
    for attack in suite:
        runs.append(run_attack(attack, view))
        if best(runs).usable:
            measured = measure(best(runs))
            value = measured if math.isfinite(measured) else value
        if passes(value):
            break
    return value
