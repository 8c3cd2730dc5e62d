"""A suite of attacks on one view: who is in it, how it is run, which of them is best.

Legend: N validation rows, of which an attack may have rebuilt only the first n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, Self, get_args

import torch
from torch import Tensor

from milkglass.attacks.attributes import AttributeProbe, LinearProbe, MlpProbe
from milkglass.attacks.base import Attack, Method, Reconstruction
from milkglass.attacks.decoder import Decoder
from milkglass.attacks.deep_image_prior import DeepImagePrior
from milkglass.attacks.defense_aware import DefenseAware
from milkglass.attacks.fsha import FsAttribute, FsHijack
from milkglass.attacks.fsha import Plan as FshaPlan
from milkglass.attacks.kernel_ridge import KernelRidge
from milkglass.attacks.likelihood import LikelihoodFromGrey, LikelihoodFromRidge
from milkglass.attacks.mean_record import MeanRecord
from milkglass.attacks.membership import ClassDistance, Lira, LossThreshold, MembershipAttack
from milkglass.attacks.nearest_neighbor import NearestNeighbor
from milkglass.attacks.ridge import Ridge
from milkglass.attacks.sdar import Sdar
from milkglass.attacks.shadow import Shadow
from milkglass.attacks.stack import Stack, combine
from milkglass.attacks.unsplit import UnSplit
from milkglass.errors import AuditError, nearest
from milkglass.leakage.reconstruction import squared_errors
from milkglass.transcript import Known, Pairs, Release, View

Strength = Literal["quick", "default", "thorough"]
STRENGTHS: Final = get_args(Strength)
Runner = Callable[[Attack, View], Reconstruction]
"""Runs an attack on a view, or brings back what it gave before."""

FROM_PAIRS: Final[frozenset[Known]] = frozenset({"pairs", "records"})
FAILURES: Final = (AuditError, MemoryError, RuntimeError, ValueError, ArithmeticError)
"""What an attack may end with: AuditError where it does not apply; torch, numpy and scikit-learn raise the others."""


def attacks_of(strength: Strength, seed: int = 0) -> tuple[Attack, ...]:
    """The attacks of an audit, cheapest first; the audit adds their stack.

    quick: under a minute on digits, pairs alone. default: an honest but curious server that has pairs, fresh releases
    of its own records, and the client's weights. thorough: everything there is, a malicious server too.
    """
    if strength not in STRENGTHS:
        raise AuditError(f"strength {strength!r} is not known; {nearest(strength, STRENGTHS)}")
    from_pairs_alone: tuple[Attack, ...] = (MeanRecord(), NearestNeighbor(), Ridge(), KernelRidge())
    if strength == "quick":
        return (*from_pairs_alone, Decoder(steps=200, seed=seed))
    default = (*from_pairs_alone, Decoder(seed=seed), DefenseAware(seed=seed), LikelihoodFromRidge())
    if strength == "default":
        return default
    return (
        *default,
        Decoder(width=8, seed=seed),
        Decoder(steps=2000, width=64, seed=seed),
        LikelihoodFromGrey(),
        DeepImagePrior(seed=seed),
        Shadow(seed=seed),
        UnSplit(seed=seed),
        Sdar(seed=seed),
        FsHijack(FshaPlan(seed=seed)),
    )


def membership_attacks(strength: Strength, seed: int = 0) -> tuple[MembershipAttack, ...]:
    """Who was trained on: by loss and by distance to the class; with shadow networks when thorough."""
    attacks: tuple[MembershipAttack, ...] = (ClassDistance(seed), LossThreshold())
    return (*attacks, Lira(seed=seed)) if strength == "thorough" else attacks


def attribute_probes(strength: Strength, seed: int = 0) -> tuple[AttributeProbe, ...]:
    """Which sensitive value a record has: from what crosses, and from what a hijacked client sends when thorough."""
    probes: tuple[AttributeProbe, ...] = (LinearProbe(), MlpProbe(seed=seed))
    return (*probes, FsAttribute(FshaPlan(seed=seed))) if strength == "thorough" else probes


def choose_attacks(names: Iterable[str], attacks: Sequence[Attack]) -> tuple[Attack, ...]:
    """Those of the attacks that are named; the mean record, ridge regression and the stack are always there."""
    known = {attack.name: attack for attack in attacks}
    wanted = {MeanRecord.name, Ridge.name}
    for name in (name.strip() for name in names):
        if name not in known and name != Stack.name:
            raise AuditError(f"attack {name!r} is not known; {nearest(name, [*known, Stack.name])}")
        wanted.add(name)
    return tuple(attack for attack in attacks if attack.name in wanted)


def from_pairs(attacks: Iterable[Attack]) -> tuple[Attack, ...]:
    """Those that need nothing but pairs: they can be run on any trial, on the answer alone, and on the controls."""
    return tuple(attack for attack in attacks if FROM_PAIRS.issuperset(attack.knows))


@dataclass(frozen=True)
class Run:
    """One attack's reconstruction of one view, and the errors of the first n validation records, (n,).

    complete: it rebuilt all rows. knows: all that went into it.
    """

    attack: Attack
    reconstruction: Reconstruction
    errors_n: Tensor
    complete: bool
    knows: tuple[Known, ...]

    @property
    def name(self) -> str:
        """The attack's name."""
        return self.attack.name

    @property
    def validation_error(self) -> float:
        """Mean squared error per value on the validation records it rebuilt."""
        return self.errors_n.mean().item()

    @property
    def usable(self) -> bool:
        """Whether all values of the reconstruction are finite."""
        return self.validation_error < math.inf

    @property
    def may_be_stacked(self) -> bool:
        """Whether it speaks of the run as it is, and of every record."""
        return self.usable and self.complete and "training" not in self.attack.knows


def one_line(error: BaseException) -> str:
    """The first line of what an attack ended with, or its name."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class Skipped:
    """An attack that gave nothing, and why. broke: not that it does not apply here, but in the middle of its work."""

    attack: str
    why: str
    broke: bool

    @classmethod
    def by(cls, attack: Method, error: BaseException) -> Self:
        """After what it ended with."""
        return cls(attack.name, one_line(error), broke=not isinstance(error, AuditError))


def straight(attack: Attack, view: View) -> Reconstruction:
    """Run the attack."""
    return attack.attack(view)


def try_attack(attack: Attack, view: View, runner: Runner = straight) -> Run | Skipped:
    """Run it, and see that it gives what an attack has to give; one that fails is no reason to end an audit."""
    try:
        made = runner(attack, view)
    except FAILURES as error:
        return Skipped.by(attack, error)
    return _judged(attack, view, made, attack.knows)


def _judged(attack: Attack, view: View, made: Reconstruction, knows: tuple[Known, ...]) -> Run:
    records = view.validation.records
    complete = True
    for what, tensor, rows in (
        ("validation", made.validation, len(records)),
        ("target", made.target, len(view.target)),
    ):
        if tensor.shape[1:] != records.shape[1:] or not 0 < len(tensor) <= rows:
            raise AuditError(
                f"attack {attack.name!r}: its {what} reconstruction has shape {tuple(tensor.shape)}; "
                f"expected {(rows, *records.shape[1:])}, or fewer rows"
            )
        complete = complete and len(tensor) == rows
    finite = bool(torch.isfinite(made.validation).all() and torch.isfinite(made.target).all())
    first = records[: len(made.validation)]
    errors_n = squared_errors(made.validation, first) if finite else torch.full((len(first),), math.inf)
    return Run(attack, made, errors_n, complete, knows)


def run_suite(
    view: View, suite: Sequence[Attack], runner: Runner = straight, members: Sequence[Run] = ()
) -> tuple[list[Run], list[Skipped]]:
    """Every attack on the view, and the stack of all these with the runs already made, `members`.

    What cannot be stacked with the others is combined with the members alone, which know the answer: every attacker has
    it. An attack that cannot be run on this view is left out, and why.
    """
    runs: list[Run] = []
    skipped: list[Skipped] = []
    for attack in suite:
        run = try_attack(attack, view, runner)
        if isinstance(run, Skipped):
            skipped.append(run)
            continue
        if run.usable and not run.may_be_stacked:
            # weights come from validation pairs, so that is known as well
            combined = _with_answer(view, run.reconstruction, members)
            run = _judged(attack, view, combined, _union(attack.knows, ("pairs",)))
        runs.append(run)
    together = [run for run in (*runs, *members) if run.may_be_stacked]
    if not together:
        raise AuditError("no attack gave a reconstruction of all records whose values are all finite")
    knows = _union(*(run.knows for run in together))
    stack = Stack([run.attack for run in runs] or suite)
    return [*runs, _judged(stack, view, combine(view, [run.reconstruction for run in together]), knows)], skipped


def _union(*parts: tuple[Known, ...]) -> tuple[Known, ...]:
    return tuple(dict.fromkeys(known for part in parts for known in part))


def _with_answer(view: View, made: Reconstruction, members: Sequence[Run]) -> Reconstruction:
    """The reconstruction, of the first rows perhaps, combined with what is rebuilt from the answer alone."""
    n, t = len(made.validation), len(made.target)
    known, target = view.validation, view.target
    rows = View(
        view.known,
        Pairs(known.activations[:n], known.records[:n], known.entitled[:n]),
        Release(target.activations[:t], target.entitled[:t]),
    )
    alone = [
        Reconstruction(member.reconstruction.validation[:n], member.reconstruction.target[:t], 0.0)
        for member in members
        if member.may_be_stacked
    ]
    return replace(combine(rows, [made, *alone]), seconds=made.seconds, note=made.note) if alone else made


def best(runs: Sequence[Run]) -> Run:
    """The complete run with the least error on validation records; the earlier one of two alike."""
    return min([run for run in runs if run.complete] or runs, key=lambda run: run.validation_error)


def best_of_the_first_rows(runs: Sequence[Run], fewest_targets: int) -> Run | None:
    """Of those that rebuilt only the first rows, and enough of them, the best; None if no one beats the best on these.

    What they rebuilt is judged beside the best complete run, never instead of it: a few lucky rows prove little.
    """
    complete = best(runs)
    partial = [run for run in runs if not run.complete and len(run.reconstruction.target) >= fewest_targets]

    def against_complete(run: Run) -> float:
        return run.validation_error / max(complete.errors_n[: len(run.errors_n)].mean().item(), 1e-12)

    found = min(partial, key=against_complete, default=None)
    return found if found is not None and against_complete(found) < 1 else None


def until(
    suite: Sequence[Attack],
    view: View,
    measure: Callable[[Run], float],
    passes: Callable[[float], bool],
    runner: Runner = straight,
) -> float:
    """The measure of the best of the attacks so far, cheapest first, ended by the first that passes."""
    runs: list[Run] = []
    value = 0.0  # where nothing was rebuilt: no control passes with it
    for attack in suite:
        run = try_attack(attack, view, runner)
        if isinstance(run, Skipped):
            continue
        runs.append(run)
        if best(runs).usable:
            measured = measure(best(runs))
            value = measured if math.isfinite(measured) else value
        if passes(value):
            break
    return value
