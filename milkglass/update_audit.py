"""What is shared by who trains a whole network with others: a client's update, and the network they end with, attacked.

Two attacks apply. *Gradient inversion* (`contribution_audit.py`; Geiping et al. 2020, arXiv 2003.14053) rebuilds
records of an update: a mean gradient, or what a client's weights moved in a round of federated averaging, divided by
learning rate and steps, which is a gradient only as far as the steps went one way. *Membership* (`inference.py`; Yeom
et al. 2018, arXiv 1709.01604) asks of the final network, which every party holds, whether a record was trained on.

Updates are made of test records, so that no private one is read, of as many as the run's own updates are made of, up to
`MOST_RECORDS`. The attacker tries itself out on updates that it makes of records of its own, and goes only so far from
the mean record towards what it rebuilds as served it there: where the descent finds nothing, that is no step at all.
Pure: it talks to nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from milkglass.attacks.membership import LossThreshold
from milkglass.attacks.suite import Strength
from milkglass.audit_work import Progress
from milkglass.contribution_audit import END, START, ContributionAudit, audit_contributions
from milkglass.contributions import Share, Subject
from milkglass.data import Candidates
from milkglass.errors import AuditError
from milkglass.inference import InferenceScore, audit_membership
from milkglass.leakage.estimate import Estimate
from milkglass.transcript import Knowledge, MembershipTrial, MembershipView, Pairs, Release

MOST_RECORDS: Final[Mapping[Strength, int]] = {"quick": 32, "default": 64, "thorough": 256}
"""Of one update that is attacked: more records hide each other better, and cost more."""


@final
@dataclass(frozen=True, eq=False)
class UpdateAudit:
    """contributions: of updates. membership: of the final network; empty where there were too few records to say."""

    contributions: ContributionAudit
    membership: tuple[InferenceScore, ...]
    notes: tuple[str, ...]

    @property
    def peek(self) -> Estimate:
        """Of records from an update: 1 = the raw record, 0 = the mean record."""
        return self.contributions.peek

    @property
    def sound(self) -> bool:
        """Whether the attacks passed their controls."""
        return self.contributions.verdict != "inconclusive"

    def to_dict(self) -> dict[str, Any]:
        """As in update_audit.json, beside what `ContributionAudit` has: the rows of membership."""
        found = self.contributions.to_dict()
        rows = {row.measure: Estimate(row.value, row.low, row.high).to_dict() for row in self.membership}
        return found | {
            "measures": found["measures"] | rows,
            "inferences": [row.to_dict() for row in self.membership],
            "notes": [*found["notes"], *self.notes],
        }


def audit_updates(
    subject: Subject,
    own_size: int,
    candidates: Candidates,
    strength: Strength = "default",
    *,
    seed: int = 0,
    progress: Progress | None = None,
    notes: Sequence[str] = (),
) -> UpdateAudit:
    """Attack updates of `own_size` records, or of as many as can be, at both ends of a training; and the final network.

    Quick: at the start alone.

    Raises AuditError where an attack breaks, and for fewer than two test records.
    """
    size = min(own_size, MOST_RECORDS[strength], len(subject.x) // 2)
    if size < 1:
        raise AuditError(
            f"updates: {len(subject.x)} test records; expected two at least, to attack updates made of them"
        )
    told = list(notes)
    if size < own_size:
        told.append(f"the run's own updates are of {own_size} records, those attacked of {size}: they show rather more")
    subject = replace(subject, own_x=candidates.outside_x, own_y=candidates.outside_y)
    moments = (START,) if strength == "quick" else (START, END)
    if strength == "quick":
        told.append("quick: updates from the first weights alone were attacked")
    found = audit_contributions(subject, strength, sizes=[size], moments=moments, seed=seed, progress=progress)
    membership: tuple[InferenceScore, ...] = ()
    try:
        membership = audit_membership(_trial(subject.last, candidates), [LossThreshold()], seed)
    except AuditError as error:
        told.append(f"membership: not attacked: {error}")
    return UpdateAudit(found, membership, tuple(told))


def mean_of(share: Share, parts: int) -> Share:
    """What is seen of several clients' updates where a sum alone can be opened: the mean over `parts` equal parts."""

    def shared(network: nn.Module, x_B: Tensor, y_B: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        pieces = zip(x_B.tensor_split(parts), y_B.tensor_split(parts), strict=True)
        found = [share(network, x, y, generator) for x, y in pieces if len(x)]
        return tuple(torch.stack(each).mean(0) for each in zip(*found, strict=True))

    return shared


def _trial(network: nn.Module, found: Candidates) -> MembershipTrial:
    """Nothing is cut: what the network is given is the record itself."""
    nothing, none = torch.zeros(len(found.x), 0), torch.zeros(len(found.outside_x), 0)
    view = MembershipView(
        Release(found.x, nothing, found.y),
        Pairs(found.outside_x, found.outside_x, none, found.outside_y),
        replace(Knowledge(), server=network.eval()),
        found.x,
    )
    return MembershipTrial(view, found.member)
