"""A finished run -> the views of a party that attacks it: fresh releases by the real client, defenses on.

The attacker is the server. It holds auxiliary records, what the client would send for them, and what it is entitled to:
the class probabilities of the undefended reference network, and the labels. What it may know or do beyond (the client's
weights, a training of the real client against a server of its own) is on the view; each attack says what it uses.

Legend: N records, R releases, K classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.client import Client
from milkglass.data import Deal, Records
from milkglass.defenses.certificate import Certificate, ReleaseCheck, check_releases, counted
from milkglass.errors import AuditError, HijackError, MilkglassError, RunError
from milkglass.messages import Responder
from milkglass.randomness import Source, public_source, rehearsal_source
from milkglass.recipe import Recipe, first_difference
from milkglass.runs import RunFolder
from milkglass.sightings import InTwoHalves, Seen, Watch
from milkglass.training.evaluate import BATCH
from milkglass.training.setup import crossing_shapes, network_parts
from milkglass.training.split import (
    Progress,
    Setup,
    Silence,
    batches_of,
    computing_with,
    digest_of,
    set_up,
    train,
    transport_to,
)
from milkglass.training.summary import certificate_of
from milkglass.transcript import (
    Driven,
    Exposure,
    HonestServer,
    Knowledge,
    MembershipTrial,
    MembershipView,
    Pairs,
    Release,
    Trial,
    View,
)

RELEASES_WHEN_REPEATED: Final = 10
RECORDS_CHECKED: Final = 256
"""So many test records are released anew, to see whether what is sent agrees with the certificate."""
VALUES_TRAINED_ON: Final = 4096
"""Of what the server saw over all epochs, so many values a record are attacked: means over groups of epochs."""


@dataclass(frozen=True)
class Replay:
    """The trials of a run, one per exposure; how good the reference is that tells what is entitled (0..1).

    certificate: of the client's defenses, None where they have none; check: whether releases agree with it.
    """

    trials: tuple[Trial, ...]
    defense: str
    reference_accuracy: float
    membership: MembershipTrial | None = None
    notes: tuple[str, ...] = ()
    certificate: Certificate | None = None
    check: ReleaseCheck | None = None


def find_reference(run: RunFolder, named: Path | None = None, progress: Progress | None = None) -> RunFolder:
    """The undefended run of the same recipe: the one named, the run itself, or one trained once beside the run.

    Raises RunError if the one named is defended, or made from another recipe; AuditError for one not replayed.
    """
    check_replayable(run.recipe)  # before a reference is trained for it
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
    began_with = undefended.network.start or ""
    made_from = hashlib.sha256(f"{undefended.digest()} {run.records_digest}{began_with}".encode()).hexdigest()
    path = run.path.resolve().parent / f"reference-{made_from[:12]}"
    train(undefended, path, resume=True, progress=progress)
    return RunFolder.open_finished(path)


def replay(
    run: RunFolder,
    reference: RunFolder,
    *,
    repeated: bool = True,
    trained_on: bool = False,
    progress: Progress | None = None,
) -> Replay:
    """Release the attacker's, the validation and the test records anew, with the run's weights and defenses.

    Noise is drawn anew too, under a key of the audit's own. Exposures: `fresh`, one release of each record; where
    releases differ, `repeated`, ten of each; and, if asked for, `trained-on`, which replays the whole training.
    Without repeated the second is left out, and a note says so.
    """
    check_replayable(run.recipe)
    with computing_with(run.recipe.threads):
        setup = load_parties(run)
        entitled = _entitlement(load_parties(reference))
        knowledge = _knowledge(run, setup)
        random = any(defense.random for defense in setup.client.defenses)
        trials = [_trial(setup, entitled, knowledge, "fresh", 1)]
        notes: list[str] = []
        if not _is_rehearsal(run):
            notes.append("the client's key is not at hand: a training that is replayed is another client's")
        if random and repeated:
            trials.append(_trial(setup, entitled, knowledge, "repeated", RELEASES_WHEN_REPEATED))
        elif random:
            notes.append("repeated: left out, as asked; ten releases of a record tell more than one")
        if run.recipe.training.at_home:
            notes.append("trained-on: none, for all was trained at home; the server got its stage, and no messages")
        elif trained_on and len(run.recipe.parties.clients) > 1:
            notes.append(
                "trained-on: not attacked, for a training of several clients is not replayed; what the server saw of "
                "the private records over all epochs may tell more than is told here"
            )
        elif trained_on:
            trial, note = _trained_on(run, setup.records, entitled, progress or Silence())
            trials.append(trial)
            notes.append(note)
    membership = None
    if _is_u_shaped(run.recipe):
        notes.append("membership: not attacked, for the server has neither labels nor the network's last part")
    else:
        membership = _membership(setup, knowledge)
    certified, check, why_not = _certified(setup)
    notes += why_not
    return Replay(tuple(trials), setup.defense, reference.accuracy, membership, tuple(notes), certified, check)


def _certified(setup: Setup) -> tuple[Certificate | None, ReleaseCheck | None, list[str]]:
    """The certificate of the run's defenses, and what releases say of it; or why there is none."""
    if not setup.client.defenses:
        return None, None, []
    try:
        claimed = certificate_of(setup.recipe, setup.client, setup.records.record_shape, setup.records.classes)
    except AuditError as error:
        return None, None, [str(error)]
    x, times = setup.records.test.x[:RECORDS_CHECKED], range(RELEASES_WHEN_REPEATED)
    repeats = torch.stack([setup.client.released_by(x, counted(setup.client.defenses)) for _ in times])
    return claimed, check_releases(repeats, claimed), []


def load_parties(run: RunFolder) -> Setup:
    """The parties of a finished run with their trained weights, drawing noise under the audit's own key."""
    setup = set_up(_in_one_piece(run.recipe), public_source(run.recipe.seed).derive("audit"))
    run.check_records(digest_of(setup.records))
    stages = [(setup.client.stage, "bottom.safetensors"), (setup.server.stage, "top.safetensors")]
    if setup.client.head is not None:
        stages.append((setup.client.head, "head.safetensors"))
    for stage, name in stages:
        try:
            stage.load_state_dict(run.read_tensors(name))
        except RuntimeError as error:
            raise RunError(
                f"{run.path / name}: not this recipe's weights: {str(error).splitlines()[-1].strip()}"
            ) from None
    return setup


def release_all(client: Client, x: Tensor) -> Tensor:
    """What the client sends for records `x` (N, ...), one release of each: (N, ...)."""
    return torch.cat([client.release(part) for part in torch.split(x, BATCH)])


def drive(recipe: Recipe, records: Deal, private: Source, server: Responder, steps: int) -> Driven:
    """Train the real client from its first weights against `server`, for so many batches, defenses and guards on.

    Where the client stops on its own, it is as far as it came. Then it releases validation and test records, once each.
    """
    recipe = _in_one_piece(recipe)
    setup = set_up(recipe, private, records=records)
    name = setup.client.name
    shapes = crossing_shapes(recipe, records.record_shape, records.classes)
    responder = InTwoHalves(server, shapes.features) if _is_u_shaped(recipe) else server
    setup.client.transport = transport_to(responder, recipe, shapes, name)
    part = records.train[setup.client.name]
    done, epoch, stopped, by_guard = 0, 0, None, False
    try:
        while done < steps:
            epoch += 1
            for rows in batches_of(setup, epoch)[: steps - done]:
                setup.client.step(part.x[rows], part.y[rows])
                done += 1
    except MilkglassError as error:  # its guard, or what it refuses: a gradient that is not finite
        stopped, by_guard = str(error), isinstance(error, HijackError)
        if done == 0:
            raise AuditError(f"the client stopped before its first batch was over: {stopped}") from None
    validation, target = (release_all(setup.client, part.x) for part in (records.validation, records.test))
    return Driven(validation, target, done, stopped, by_guard)


def _entitlement(reference: Setup) -> Callable[[Records], Tensor]:
    """(records) -> (N, 2 K): the reference's class probabilities, and the label as one of K; U-shaped: nothing."""
    if _is_u_shaped(reference.recipe):
        return lambda records: torch.zeros(len(records), 0)

    def entitled(records: Records) -> Tensor:
        logits_NK = torch.cat([reference.client.predict(part)[0] for part in torch.split(records.x, BATCH)])
        one_of_NK = F.one_hot(records.y, reference.records.classes)
        return torch.cat([logits_NK.softmax(dim=1), one_of_NK.to(logits_NK.dtype)], dim=1)

    return entitled


def _knowledge(run: RunFolder, setup: Setup) -> Knowledge:
    recipe, records, stage = _in_one_piece(run.recipe), setup.records, setup.client.stage.eval()
    for parameter in (*stage.parameters(), *setup.server.stage.parameters()):
        parameter.requires_grad_(False)  # an attack differentiates by the record, and never trains a party
    private = _first_key(run)

    def architecture(generator: torch.Generator) -> tuple[nn.Module, nn.Module]:
        parts = network_parts(recipe, records.record_shape, records.classes, generator)
        return parts.bottom, parts.middle if parts.head is None else nn.Sequential(parts.middle, parts.head)

    def honest_server() -> HonestServer:
        return set_up(recipe, private, records=records).server

    weights = hashlib.sha256(f"{recipe.model_dump_json()} {run.records_digest}".encode())
    for part in (stage, setup.server.stage):
        for name, tensor in part.state_dict().items():
            weights.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return Knowledge(
        client=setup.client.noise_free,
        noise_sigma=sum(defense.noise_sigma**2 for defense in setup.client.defenses) ** 0.5,
        penalty=setup.client.penalty,
        stride=_stride(recipe),
        architecture=architecture,
        server=setup.server.stage.eval(),
        train=lambda server, steps: drive(recipe, records, private, server, steps),
        honest_server=honest_server,
        fingerprint=weights.hexdigest(),
    )


def _stride(recipe: Recipe) -> float | None:
    training = recipe.training
    return training.learning_rate / (1 - training.momentum) if training.optimizer == "sgd" else None


def _is_rehearsal(run: RunFolder) -> bool:
    return str(run.read_json("summary.json")["keys"]).endswith("a rehearsal")


def _first_key(run: RunFolder) -> Source:
    """The client's key where it follows from the seed; else one of the audit's own: another client of the recipe."""
    if _is_rehearsal(run):
        return rehearsal_source(run.recipe.seed, run.recipe.parties.clients[0])
    return public_source(run.recipe.seed).derive("audit", "replayed client")


def _trial(
    setup: Setup, entitled: Callable[[Records], Tensor], knowledge: Knowledge, exposure: Exposure, times: int
) -> Trial:
    client, records = setup.client, setup.records

    def pairs(part: Records) -> Pairs:
        repeats = torch.stack([release_all(client, part.x) for _ in range(times)])
        return Pairs(
            repeats.mean(dim=0),
            part.x,
            entitled(part),
            labels=part.y,
            attributes=part.attributes,
            repeats=repeats if times > 1 else None,
        )

    test = pairs(records.test)
    view = View(
        known=pairs(records.auxiliary),
        validation=pairs(records.validation),
        target=Release(
            test.activations, test.entitled, None if _is_u_shaped(setup.recipe) else test.labels, test.repeats
        ),
        exposure=exposure,
        release=lambda x: release_all(client, x),
        knowledge=knowledge,
    )
    return Trial(view, records.test.x, records.test.attributes)


def _membership(setup: Setup, knowledge: Knowledge) -> MembershipTrial:
    """As many private training records as others, and which of them are members."""
    found = setup.records.candidates(setup.client.name)
    candidates = Release(release_all(setup.client, found.x), torch.zeros(len(found.x), 0), found.y)
    own = release_all(setup.client, found.outside_x)
    outsiders = Pairs(own, found.outside_x, torch.zeros(len(own), 0), found.outside_y)
    return MembershipTrial(MembershipView(candidates, outsiders, knowledge, found.x), found.member)


def _trained_on(
    run: RunFolder, records: Deal, entitled: Callable[[Records], Tensor], progress: Progress
) -> tuple[Trial, str]:
    """The training once more, and what the server saw of the private records: means over groups of epochs.

    The attacker's pairs of an epoch are released one by one while it lasts, in training mode, as the targets cross one
    by one. A record that was in no batch of a group's epochs (the last, shorter one is dropped) has its mean over the
    other groups there; one that never crossed is no target.
    """
    recipe, name = _in_one_piece(run.recipe), run.recipe.parties.clients[0]
    setup = set_up(recipe, _first_key(run), records=records)
    part = records.train[name]
    first = part.x[: min(len(part), len(records.test))]
    epochs, watch = recipe.training.epochs, Watch(setup.server)
    shapes = crossing_shapes(recipe, records.record_shape, records.classes)
    setup.client.transport = transport_to(watch, recipe, shapes, name)
    owned = (records.auxiliary, records.validation)
    source = public_source(recipe.seed).derive("audit")
    draws, dropout = source.generator("moments"), source.generator("dropout")
    width = setup.client.rehearse(first[:1], dropout, training=False).numel()
    kept = min(epochs, max(1, VALUES_TRAINED_ON // width))
    moments_of = [torch.randperm(len(own), generator=draws) for own in owned]
    seen = [Seen(len(own), kept) for own in owned]
    targets = Seen(len(first), kept)
    for epoch in range(1, epochs + 1):
        batches, group = batches_of(setup, epoch), (epoch - 1) * kept // epochs
        for step, rows in enumerate(batches):
            for sight, own, moments in zip(seen, owned, moments_of, strict=True):
                now = (moments % len(batches) == step).nonzero()[:, 0]
                if not len(now):
                    continue
                for rows_B in torch.tensor_split(now, -(-len(now) // max(1, len(rows)))):  # with dp one may be empty
                    alone = len(rows_B) == 1  # BatchNorm needs two records
                    sight.add(group, rows_B, setup.client.rehearse(own.x[rows_B], dropout, training=not alone))
            result = setup.client.step(part.x[rows], part.y[rows])
            progress.batch(epoch, step + 1, len(batches), result)
            wanted = rows < len(first)
            if len(rows):
                targets.add(group, rows[wanted], watch.last[wanted])
    known, validation = (
        Pairs(sight.means()[0], own.x, entitled(own), own.y, own.attributes)
        for sight, own in zip(seen, owned, strict=True)
    )
    means, crossed = targets.means()
    of = part.take(crossed)
    labels = None if _is_u_shaped(recipe) else of.y
    view = View(known, validation, Release(means, entitled(of), labels), exposure="trained-on")
    note = f"trained-on: {len(of)} private records as they crossed in {epochs} epochs, averaged in {kept} groups"
    return Trial(view, of.x, of.attributes), note


def check_replayable(recipe: Recipe) -> None:
    """Raise AuditError for a way of training whose views are not made yet."""
    if recipe.parties.is_vertical or recipe.parties.hops:
        way = "vertical" if recipe.parties.is_vertical else "multi-hop"
        raise AuditError(
            f"a {way} run is not replayed yet; record what one party received and audit that: milkglass audit "
            "--activations A.npy --records X.npy"
        )
    if not (recipe.attacker.auxiliary_share and recipe.attacker.validation_share):
        raise AuditError(
            "the run set no pairs aside for an attacker; expected attacker.auxiliary_share and "
            "attacker.validation_share above 0, and a training with them"
        )


def _is_u_shaped(recipe: Recipe) -> bool:
    return recipe.cut.back_at is not None


def _in_one_piece(recipe: Recipe) -> Recipe:
    """The same training with whole batches: what crosses is the same, and whoever stands in needs not count pieces."""
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"micro_batches": 1})})
