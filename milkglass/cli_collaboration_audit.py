"""What `milkglass audit` does and prints for the run of an open collaboration; `cli.py` calls it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from milkglass.errors import MilkglassError

if TYPE_CHECKING:
    from milkglass.audit_files import Plan
    from milkglass.contribution_audit import ContributionAudit, ContributionScore
    from milkglass.verdict import Verdict


def audit_of_collaboration(run: Path, plan: Plan, *, reference: Path | None, out: Path | None) -> Verdict:
    """Audit the run and tell what was found, line by line; the verdict."""
    from milkglass.collaboration_audit import PRIVATE, audit_collaboration
    from milkglass.progress import AuditProgress

    if reference is not None:
        raise MilkglassError("--reference goes with a run of split training, not with an open collaboration")
    found, content = audit_collaboration(run, plan, out=out, watching=AuditProgress)
    for line in _findings(found):
        print(f"{run}: {line}")
    budget = ", ".join(f"{name}<={limit:g}" for name, limit in (plan.budget or {}).items())
    print(
        f"{run}: {found.verdict}{f' ({budget})' if budget else ''}: peek {found.peek.value:.3f}, 95 % interval "
        f"{found.peek.low:.3f} to {found.peek.high:.3f}; accuracy {content['accuracy']:.3f}"
    )
    print(f"{run}: {PRIVATE}")
    return found.verdict


def _findings(found: ContributionAudit) -> list[str]:
    """All but the verdict."""
    measures = [(name, measure) for name, measure in found.measures.items() if name != "peek"]
    return [
        *found.notes,
        *(_words(score) for score in found.scores),
        *(f"{name} {each.value:.3f}, 95 % interval {each.low:.3f} to {each.high:.3f}" for name, each in measures),
    ]


def _words(score: ContributionScore) -> str:
    """What contributions of one size show, in a sentence."""
    size, one = score.contribution_records, score.contribution_records == 1
    shown, peek = round(score.shown * score.records), score.peek
    if score.shown <= score.others_shown:
        what = "showed nothing to this attack, which is no proof"
    else:
        often = "" if shown == score.records else "mostly " if score.shown >= 0.5 else "sometimes "
        what = f"{often}shows {'it' if one else 'them'}"
    labels = "" if score.labels_restored is None else f", {100 * score.labels_restored:.0f} % of the labels restored"
    return (
        f"a contribution of {size} record{'' if one else 's'} {score.moment} {what}: peek {peek.value:.3f}, "
        f"95 % interval {peek.low:.3f} to {peek.high:.3f}; {shown} of {score.records} records shown{labels}"
    )
