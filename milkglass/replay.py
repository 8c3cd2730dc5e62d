"""A finished run -> the views of a party that attacks it: fresh releases by the real client, defenses on.

The attacker is the server, honest but curious. It holds auxiliary records, what the client would send for them, and
what it is entitled to: the class probabilities of the undefended reference network, and the labels.

Legend: N records, K classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from milkglass.data import Records
from milkglass.errors import RunError
from milkglass.parties import Client
from milkglass.randomness import public_source
from milkglass.recipe import first_difference
from milkglass.runs import RunFolder
from milkglass.training.evaluate import BATCH
from milkglass.training.split import Progress, Setup, computing_with, digest_of, set_up, train
from milkglass.transcript import Exposure, Pairs, Release, Trial, View

RELEASES_WHEN_REPEATED: Final = 10


@dataclass(frozen=True)
class Replay:
    """The trials of a run, one per exposure, and how good the reference is that tells what is entitled (0..1)."""

    trials: tuple[Trial, ...]
    defense: str
    reference_accuracy: float


def find_reference(run: RunFolder, named: Path | None = None, progress: Progress | None = None) -> RunFolder:
    """The undefended run of the same recipe: the one named, the run itself, or one trained once beside the run.

    Raises RunError if the one named is defended, or made from another recipe.
    """
    undefended = run.recipe.undefended()
    if named is not None:
        reference = RunFolder.open_finished(named)
        difference = first_difference(undefended, reference.recipe)
        if difference is not None:
            raise RunError(f"reference {named}: not the undefended run of the same recipe: {difference}")
        reference.check_records(run.records_digest)
        return reference
    if run.recipe.digest() == undefended.digest():
        return run
    made_from = hashlib.sha256(f"{undefended.digest()} {run.records_digest}".encode()).hexdigest()
    path = run.path.resolve().parent / f"reference-{made_from[:12]}"
    train(undefended, path, resume=True, progress=progress)
    return RunFolder.open_finished(path)


def replay(run: RunFolder, reference: RunFolder) -> Replay:
    """Release the attacker's, the validation and the test records anew, with the run's weights and defenses.

    Noise is drawn anew too, under a key of the audit's own. Exposures: `fresh`, one release of each record; and, where
    releases differ, `repeated`, the mean of ten.
    """
    with computing_with(run.recipe.threads):
        setup = load_parties(run)
        entitled = _entitlement(load_parties(reference))
        kinds: list[tuple[Exposure, int]] = [("fresh", 1)]
        if any(defense.random for defense in setup.client.defenses):
            kinds.append(("repeated", RELEASES_WHEN_REPEATED))
        trials = tuple(_trial(setup, entitled, exposure, times) for exposure, times in kinds)
    return Replay(trials, setup.defense, reference.accuracy)


def load_parties(run: RunFolder) -> Setup:
    """The parties of a finished run with their trained weights, drawing noise under the audit's own key."""
    setup = set_up(run.recipe, public_source(run.recipe.seed).derive("audit"))
    run.check_records(digest_of(setup.records))
    for stage, name in ((setup.client.stage, "bottom.safetensors"), (setup.server.stage, "top.safetensors")):
        try:
            stage.load_state_dict(run.read_tensors(name))
        except RuntimeError as error:
            raise RunError(
                f"{run.path / name}: not this recipe's weights: {str(error).splitlines()[-1].strip()}"
            ) from None
    return setup


def release_all(client: Client, x: Tensor, times: int = 1) -> Tensor:
    """What the client sends for records `x` (N, ...): the mean of so many releases, (N, ...)."""
    parts = [torch.stack([client.release(part) for _ in range(times)]).mean(dim=0) for part in torch.split(x, BATCH)]
    return torch.cat(parts)


def _entitlement(reference: Setup) -> Callable[[Records], Tensor]:
    """(records) -> (N, 2 K): the reference's class probabilities, and the label as one of K."""

    def entitled(records: Records) -> Tensor:
        logits_NK = torch.cat([reference.client.predict(part)[0] for part in torch.split(records.x, BATCH)])
        one_of_NK = F.one_hot(records.y, reference.records.classes)
        return torch.cat([logits_NK.softmax(dim=1), one_of_NK.to(logits_NK.dtype)], dim=1)

    return entitled


def _trial(setup: Setup, entitled: Callable[[Records], Tensor], exposure: Exposure, times: int) -> Trial:
    client, records = setup.client, setup.records

    def pairs(part: Records) -> Pairs:
        return Pairs(release_all(client, part.x, times), part.x, entitled(part))

    view = View(
        known=pairs(records.auxiliary),
        validation=pairs(records.validation),
        target=Release(release_all(client, records.test.x, times), entitled(records.test)),
        exposure=exposure,
        release=lambda x: release_all(client, x, times),
    )
    return Trial(view, records.test.x)
