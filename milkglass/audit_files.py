"""From a run folder, or from recorded arrays, to `audit.json` and `pictures.safetensors`: what `milkglass audit` does.

Results of attacks are kept in `attacks/` beside them: an audit that was interrupted goes on at the next attack.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from milkglass.attacks.base import Attack
from milkglass.attacks.suite import Strength, attacks_of, choose_attacks
from milkglass.audit import Audit, audit, measurable
from milkglass.audit_work import Progress as AuditProgress
from milkglass.defenses.certificate import JointTotal
from milkglass.errors import AuditError, RunError
from milkglass.kept import Kept
from milkglass.leakage.classification import clopper_pearson
from milkglass.leakage.estimate import Estimate
from milkglass.recorded import NAMES, read_trial
from milkglass.replay import Replay, find_reference, replay
from milkglass.runs import RunFolder, tensors_as_bytes, write_beside
from milkglass.training.shares import deal_records
from milkglass.training.split import Progress, computing_with
from milkglass.training.summary import certificate_ahead
from milkglass.verdict import BITS, MATCHING, MEMBERSHIP_MEASURES, RECONSTRUCTION_MEASURES, check_budget

KEPT: Final = "attacks"


@dataclass(frozen=True)
class Plan:
    """How hard to attack, with what, and what may be shown at most. attacks: only these; None: all of the strength.

    fresh_only: only new records, released once: for a sweep, where the other exposures take too long.
    """

    strength: Strength = "default"
    attacks: Sequence[str] | None = None
    budget: Mapping[str, float] | None = None
    fresh_only: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the audit has to know of the plan."""
        if self.attacks is None:
            return ()
        return (f"only these attacks were asked for: {', '.join(self.attacks)}; no release should be judged by a few",)

    def suite(self, seed: int) -> tuple[Attack, ...]:
        """The attacks; those named are looked for among all there are."""
        if self.attacks is None:
            return attacks_of(self.strength, seed)
        return choose_attacks(self.attacks, attacks_of("thorough", seed))


Watched = AbstractContextManager[AuditProgress]


@dataclass(frozen=True)
class Watching:
    """Who watches: a training of so many epochs, by its name; an audit; and who is told, in a line, what a cell did."""

    training: Callable[[int, str], AbstractContextManager[Progress]]
    audit: Callable[[], Watched]
    tell: Callable[[str], None]


def accuracy_of(summary: Mapping[str, Any]) -> Estimate:
    """The accuracy of a run's summary, with Clopper and Pearson's interval over its test records."""
    count, value = int(summary["records"]["test"]), float(summary["accuracy"])
    around = clopper_pearson(round(value * count), count)
    return Estimate(value, around.low, around.high)


def audit_run(
    run: Path,
    plan: Plan,
    *,
    reference: Path | None = None,
    out: Path | None = None,
    training: Callable[[int, str], AbstractContextManager[Progress]],
    watching: Callable[[], Watched],
) -> tuple[Audit, dict[str, Any]]:
    """Audit a finished run; returns what was found, and what audit.json holds. training, watching: who watches."""
    folder = RunFolder.open_finished(run)
    recipe = folder.recipe
    suite = plan.suite(recipe.seed)
    if plan.budget is not None:  # told before the work
        attributes = [f"attribute.{name}" for name in recipe.data.sensitive]
        check_budget(plan.budget, [*RECONSTRUCTION_MEASURES, MATCHING, *attributes, *MEMBERSHIP_MEASURES, BITS])
        if BITS in plan.budget:
            records = deal_records(recipe)
            certificate_ahead(recipe, records.record_shape, records.classes)  # raises where there is none
    folder.accuracy  # noqa: B018  a damaged summary is told before the work too
    together = _joint_total(folder)
    target = out or run
    _check_writable(target)
    with training(recipe.training.epochs, "reference") as progress:
        undefended = find_reference(folder, reference, progress)
    with training(recipe.training.epochs, "replayed training") as progress:
        replayed = replay(
            folder,
            undefended,
            repeated=not plan.fresh_only,
            trained_on=plan.strength != "quick" and not plan.fresh_only,
            progress=progress,
        )
    if replayed.certificate is not None:
        replayed = replace(replayed, certificate=replace(replayed.certificate, training=together))
    with computing_with(recipe.threads), watching() as watch:
        found = _audit(replayed, plan, suite, recipe.seed, target, watch)
    content = found.to_dict() | {
        "defense": replayed.defense,
        "accuracy": folder.accuracy,
        "reference": str(undefended.path),
        "reference_accuracy": replayed.reference_accuracy,
        "fresh_only": plan.fresh_only,
        "attacks_asked_for": None if plan.attacks is None else list(plan.attacks),
    }
    _write(target, found, content)
    return found, content


@dataclass(frozen=True)
class Recorded:
    """Where the arrays of another framework lie: `.npy` files."""

    activations: Path
    records: Path
    entitled: Path | None


def where_recorded(
    run: Path | None, activations: Path | None, records: Path | None, entitled: Path | None
) -> Recorded | None:
    """The arrays that a command line names, by file or by their folder; None where it names a run folder."""
    if activations is not None or records is not None or entitled is not None:
        if run is not None:
            raise AuditError(f"both a folder, {run}, and arrays are named; expected one of them")
        if activations is None or records is None:
            raise AuditError("expected --activations and --records, row by row; --entitled if there is one")
        return Recorded(activations, records, entitled)
    if run is None:
        raise AuditError("nothing to audit; expected a run folder, or --activations and --records")
    files = [run / name for name in NAMES]
    if not files[0].exists() or (run / "recipe.toml").exists():
        return None
    return Recorded(files[0], files[1], files[2] if files[2].exists() else None)


def audit_recorded(
    recorded: Recorded, plan: Plan, *, out: Path, watching: Callable[[], Watched]
) -> tuple[Audit, dict[str, Any]]:
    """Audit arrays recorded elsewhere."""
    trial = read_trial(recorded.activations, recorded.records, recorded.entitled)
    suite = plan.suite(seed=0)
    if plan.budget is not None:
        check_budget(plan.budget, measurable([trial], None, plan.strength))
    _check_writable(out)
    with computing_with(1), watching() as watch:
        found = _audit(Replay((trial,), "not known", 0.0), plan, suite, 0, out, watch)
    content = found.to_dict() | {
        "activations": str(recorded.activations),
        "records": str(recorded.records),
        "entitled": None if recorded.entitled is None else str(recorded.entitled),
    }
    _write(out, found, content)
    return found, content


def _audit(
    replayed: Replay, plan: Plan, suite: Sequence[Attack], seed: int, target: Path, watch: AuditProgress
) -> Audit:
    return audit(
        replayed.trials,
        attacks=suite,
        strength=plan.strength,
        membership=replayed.membership,
        budget=plan.budget,
        seed=seed,
        progress=watch,
        kept=Kept(target / KEPT),
        certificate=replayed.certificate,
        check=replayed.check,
        notes=(*replayed.notes, *plan.notes),
    )


def _joint_total(folder: RunFolder) -> JointTotal | None:
    """What all releases of the run's training came to, as its summary tells; None where it does not."""
    held = folder.read_json("summary.json").get("certificate")
    if held is None:
        return None
    try:
        told = held["training"]
        return JointTotal(int(told["releases"]), float(told["joint_bits"]), str(told["words"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        raise RunError(
            f"{folder.path / 'summary.json'}: damaged, certificate.training: expected releases, joint_bits and words"
        ) from None


def _check_writable(target: Path) -> None:
    write_beside(target / "audit.json.partial", b"")
    (target / "audit.json.partial").unlink()


def _write(target: Path, found: Audit, content: Mapping[str, Any]) -> None:
    write_beside(target / "pictures.safetensors", tensors_as_bytes(found.pictures))
    write_beside(target / "audit.json", (json.dumps(content, indent=2) + "\n").encode())
