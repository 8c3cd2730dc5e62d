"""From a recipe to parties that are ready to train: records, stages, optimizers, defenses, guards.

The client's first weights, batch order, dropout and noise come from its private source; dealing and the server's first
weights from the recipe's seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from milkglass.client import Client, Guards
from milkglass.compression.base import Compressor
from milkglass.compression.wire import compressor_of
from milkglass.cuts import Caution, check_stages, couples_records, cut
from milkglass.defenses.base import Defense
from milkglass.defenses.certificate import certify
from milkglass.defenses.protection import Protection
from milkglass.desk import Desk
from milkglass.errors import CutError, DataError, RecipeError, first_line
from milkglass.guards import LeakageGuard, ReleaseLedger
from milkglass.hijack import HijackGuard
from milkglass.hop import Hop
from milkglass.networks import build
from milkglass.parties import Rate
from milkglass.private.dp import check_gradients, check_network, make_private, mechanism_of
from milkglass.randomness import Source, drawing_from, public_source
from milkglass.recipe import SMALLEST_PENALIZED_BATCH, Recipe
from milkglass.server import Server
from milkglass.tracing import in_mode
from milkglass.training.defended import check_classes, defenses, label_protection, prepare, start_from, with_ends
from milkglass.training.shares import Share, owner_shapes
from milkglass.transports.base import Transport


@dataclass(frozen=True)
class Parts:
    """A network in the parts that parties hold: the client's first, the server's, U-shaped the client's last.

    bare: the first one and the one that it sends to, without what defenses add at their ends. hops: those of the
    parties between client and server, in order.
    """

    bottom: nn.Module
    middle: nn.Module
    head: nn.Module | None
    bare: tuple[nn.Module, nn.Module]
    hops: tuple[nn.Module, ...] = ()


@dataclass(frozen=True)
class Shapes:
    """What crosses, a record: the cut's activations, of each client and each hop; U-shaped, what the server makes of
    them.
    """

    cut: Mapping[str, tuple[int, ...]]
    features: tuple[int, ...]


def network_parts(
    recipe: Recipe,
    shape: Sequence[int],
    classes: int,
    source: Source | torch.Generator,
    *,
    owner: bool = False,
    chosen: Sequence[Defense] | None = None,
) -> Parts:
    """The recipe's network for records of `shape`, drawn from `source`, cut, with its defenses' ends.

    owner: with the owner's settings. chosen: the defenses that are to keep hold of their ends; by default new ones.
    """
    if not recipe.parties.is_split:
        command = "collab" if recipe.parties.is_collaboration else "train"
        raise RecipeError(
            f"parties.mode is {recipe.parties.mode}, where nothing is split; `milkglass {command}` alone runs such a "
            "recipe: expected another mode, and cut.at"
        )
    network = recipe.network
    settings = {**network.settings, **recipe.parties.vertical.owner_settings} if owner else network.settings
    generator = source.generator("weights") if isinstance(source, Source) else source
    model = build(network.name, tuple(shape), classes, settings, generator)
    bottom, rest = cut(model, at=recipe.cut.at)
    check_stages(bottom, rest)  # before parts of two networks are put together: afterwards nothing is shared any more
    stages = [rest]
    for at in (*recipe.cut.hops, *(() if recipe.cut.back_at is None else (recipe.cut.back_at,))):
        before, behind = cut(stages.pop(), at=at)
        check_stages(before, behind)
        stages += [before, behind]
    bare = bottom, stages[0]
    with drawing_from(generator):
        bottom, stages[0] = with_ends(
            bottom, stages[0], _output(bottom, shape), defenses(recipe) if chosen is None else chosen
        )
    if recipe.cut.back_at is not None:
        return Parts(bottom, stages[0], stages[1], bare)
    return Parts(bottom, stages[-1], None, bare, tuple(stages[:-1]))


def crossing_shapes(recipe: Recipe, shape: Sequence[int], classes: int) -> Shapes:
    """What crosses for one record: found by sending zeros through networks drawn from the seed.

    Raises RecipeError where vertical activations do not join to what the server's stage takes.
    """
    source = public_source(recipe.seed)
    whole = network_parts(recipe, shape, classes, source)
    wanted = _output(whole.bottom, shape)
    cuts = dict.fromkeys(recipe.parties.clients, wanted)
    crossed = wanted
    for name, hop in zip(recipe.parties.hops, whole.hops, strict=True):
        crossed = cuts[name] = _output(hop, crossed)
    features = _output(whole.middle, crossed)
    if not recipe.parties.is_vertical:
        return Shapes(cuts, features)
    cuts = {
        name: _output(network_parts(recipe, part, classes, source, owner=True).bottom, part)
        for name, part in owner_shapes(recipe, shape).items()
    }
    axis = join_axis(recipe, shape)
    joined = _joined(list(cuts.values()), axis)
    if joined != wanted:
        raise RecipeError(
            f"parties.vertical: owners' activations {' and '.join(map(_by, cuts.values()))} "
            f"{'cannot be joined' if joined is None else 'join to ' + _by(joined)}; the server's stage takes "
            f"{_by(wanted)}: change the owners' stages with parties.vertical.owner_settings, such as hidden"
        )
    return Shapes(cuts, features)


def join_axis(recipe: Recipe, shape: Sequence[int]) -> int:
    """Along which dimension of a batch vertical activations are joined, where they have it."""
    return recipe.parties.vertical.axis or (1 if len(shape) == 1 else 2)


def compressor(recipe: Recipe) -> Compressor:
    """What the wire does to activations and gradients."""
    return compressor_of(recipe.wire.compress, recipe.wire.topk_share)


def make_client(
    recipe: Recipe, name: str, share: Share, classes: int, private: Source, transport: Transport
) -> tuple[Client, tuple[Caution, ...]]:
    """A client with its stage drawn from its private source, its defenses and guards; and cautions.

    Raises MilkglassError where the recipe cannot be run with these records.
    """
    owner = recipe.parties.is_vertical
    shape = share.train.x.shape[1:]
    check_classes(recipe, classes)
    chosen = defenses(recipe)
    own = network_parts(recipe, shape, classes, private, owner=owner, chosen=chosen)
    public = network_parts(recipe, shape, classes, public_source(recipe.seed), owner=owner)
    cautions = check_stages(own.bottom, public.middle)
    held = [part for part in (own.bottom, public.middle, own.head) if part is not None]
    _check_batches(recipe, len(share.train), coupled=[name for part in held for name in couples_records(part)])
    pairs = list(zip(own.bottom.parameters(), public.bottom.parameters(), strict=True))
    if pairs and all(torch.equal(*pair) for pair in pairs):
        cautions.append(
            Caution(
                recipe.network.name,
                "draws the same first weights under every key, so the server knows the client's",
                "leave it to milkglass to seed torch (fine for weights that are public and pretrained)",
            )
        )
    _begin(recipe, own, chosen, share)
    cut_shape = _output(public.bottom, shape)
    if recipe.defense.certified:
        certify(chosen, cut_shape, couples_records(own.bottom))  # before anything is sent
    parts = [own.bottom] if own.head is None else [own.bottom, own.head]
    learner = optimizer(recipe, *parts)
    if recipe.dp is not None:
        learner = _private_optimizer(recipe, learner, own, public.middle, share.train.x, private)
    client = Client(
        own.bottom,
        learner,
        transport,
        head=own.head,
        sends_labels=not owner or name == recipe.parties.clients[0],
        pieces=recipe.training.micro_batches,
        defenses=chosen,
        keep_releases=recipe.client.keep_releases,
        rate=rate(recipe),
        guards=_guards(recipe, len(share.train), classes, private),
        cut_shape=cut_shape,
        compressor=compressor(recipe),
        name=name,
        source=private,
    )
    return client, tuple(cautions)


def _begin(recipe: Recipe, own: Parts, chosen: Sequence[Defense], share: Share) -> None:
    """The weights that a client's parts begin with, its defenses' ends fitted to its records, and what of it learns."""
    has_ends = False
    if recipe.network.start is not None:
        has_ends = start_from(recipe.network.start, "bottom.safetensors", own.bare[0], own.bottom)
        if own.head is not None:
            start_from(recipe.network.start, "head.safetensors", own.head, own.head)
    if not has_ends:
        x = share.train.x
        if recipe.dp is not None:  # no noise would cover what is fitted to records
            x = torch.rand(256, *x.shape[1:], generator=public_source(recipe.seed).generator("in place of records"))
        prepare(chosen, own.bare[0], x)
    coupled = couples_records(own.bare[0])
    if recipe.training.client_learns == "ends" and coupled:
        raise CutError(
            f"BatchNorm ({coupled[0]}) in the client's stage moves its statistics in training, and "
            "training.client_learns = 'ends' says that the stage stays: use nn.GroupNorm, or 'nothing'"
        )
    if recipe.training.client_learns != "all":
        (own.bare[0] if recipe.training.client_learns == "ends" else own.bottom).requires_grad_(False)


def make_desk(recipe: Recipe, shape: Sequence[int], classes: int, shapes: Shapes, private: Source) -> Desk:
    """The server's side: its stage drawn from the seed, one for each client in SplitFed 1, and who is served when."""
    public, parties = public_source(recipe.seed), recipe.parties
    sent_by = (parties.hops or parties.clients)[-1]

    def server(cut_shape: tuple[int, ...] | None, source: Source) -> Server:
        parts = network_parts(recipe, shape, classes, public)
        stage = parts.middle
        if recipe.network.start is not None:
            start_from(recipe.network.start, "top.safetensors", parts.bare[1], stage)
        more: dict[str, Any] = {} if recipe.cut.back_at is None else {"loss": None}
        more |= {"cut_shape": cut_shape, "classes": classes, "rate": rate(recipe)}
        return Server(stage, optimizer(recipe, stage), name=parties.server, source=source, **more)

    if parties.hops:
        servers = {sent_by: server(shapes.cut[sent_by], private)}
    elif parties.mode == "splitfed1" and len(parties.clients) > 1:
        servers = {name: server(shapes.cut[name], private.derive(name)) for name in parties.clients}
    else:
        joined = _joined(list(shapes.cut.values()), join_axis(recipe, shape)) if parties.is_vertical else None
        one = server(joined or shapes.cut[sent_by], private)
        servers = dict.fromkeys(parties.clients, one)
    protection = None
    if parties.is_vertical and recipe.defense.labels is not None:
        protection = Protection({name: label_protection(recipe, classes) for name in parties.clients[1:]}, private)
    return Desk(
        servers, parties.mode, public=public.derive("desk"), axis=join_axis(recipe, shape), protection=protection
    )


def make_hop(
    recipe: Recipe, name: str, shape: Sequence[int], classes: int, shapes: Shapes, private: Source, onward: Transport
) -> Desk:
    """The side of a party in the middle, which sends on over `onward`; its stage is drawn from the seed."""
    parties = recipe.parties
    before = previous_party(recipe, name)
    stage = network_parts(recipe, shape, classes, public_source(recipe.seed)).hops[parties.hops.index(name)]
    more: dict[str, Any] = {"cut_shape": shapes.cut[before], "rate": rate(recipe)}
    server = Server(stage, optimizer(recipe, stage), loss=None, name=name, source=private, **more)
    return Desk({before: server}, public=public_source(recipe.seed), hop=Hop(server, onward, classes))


def previous_party(recipe: Recipe, name: str) -> str:
    """Who sends to the hop, or the server, of that name: the client, or the hop before it."""
    way = [recipe.parties.clients[0], *recipe.parties.hops, recipe.parties.server]
    return way[way.index(name) - 1]


def optimizer(recipe: Recipe, *stages: nn.Module) -> torch.optim.Optimizer | None:
    """The recipe's optimizer of all that the stages can learn; None if that is nothing."""
    parameters = [parameter for stage in stages for parameter in stage.parameters() if parameter.requires_grad]
    if not parameters:
        return None
    training = recipe.training
    if training.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    return torch.optim.SGD(
        parameters, lr=training.learning_rate, momentum=training.momentum, weight_decay=training.weight_decay
    )


def _private_optimizer(
    recipe: Recipe,
    plain: torch.optim.Optimizer | None,
    own: Parts,
    middle: nn.Module,
    x: Tensor,
    private: Source,
) -> torch.optim.Optimizer:
    """The recipe's DP-SGD of a client's parts, which train with its records `x` (N, ...); see `private/dp.py`."""
    assert recipe.dp is not None
    if plain is None:
        raise RecipeError("dp: no weight of the client's part learns, so there is none to protect: leave the table out")
    if couples_records(middle):
        raise CutError(
            f"dp: BatchNorm ({couples_records(middle)[0]}) in the server's stage makes its gradient for a record "
            "depend on the other records of its batch, so that no bound holds for one of them: use nn.GroupNorm"
        )
    parts = [own.bottom] if own.head is None else [own.bottom, own.head]
    check_network(*parts)
    check_gradients(own.bottom, x)
    if own.head is not None:
        with in_mode(own.bottom, training=False), in_mode(middle, training=False), torch.no_grad():
            features = middle(own.bottom(x[:2]))
        check_gradients(own.head, features)
    mechanism = mechanism_of(recipe.dp, len(x), recipe.training.batch_size, recipe.training.epochs)
    return make_private(parts, plain, mechanism, private)


def rate(recipe: Recipe) -> Rate | None:
    """The learning rate by step: half a cosine over the recipe's decay_steps, as `CosineAnnealingLR` without restarts
    (Loshchilov and Hutter 2017, arXiv 1608.03983); None where it stays.
    """
    first, steps = recipe.training.learning_rate, recipe.training.decay_steps
    if steps is None:
        return None
    return lambda step: first * 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))


def _guards(recipe: Recipe, records: int, classes: int, private: Source) -> Guards:
    section = recipe.client
    ledger = None if section.most_releases is None else ReleaseLedger(records, section.most_releases)
    leakage = None if section.leakage is None else LeakageGuard(section.leakage.limit, section.leakage.window)
    return Guards(_hijack_guard(recipe, records, classes, private), ledger, leakage)


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _output(stage: nn.Module, shape: Sequence[int]) -> tuple[int, ...]:
    with in_mode(stage, training=False), torch.no_grad():
        try:
            return tuple(stage(torch.zeros(1, *shape)).shape[1:])
        except RuntimeError as error:
            words = first_line(error)
            raise CutError(f"the network's stage fails on a record of shape {tuple(shape)}: {words}") from None


def _joined(cuts: Sequence[tuple[int, ...]], axis: int) -> tuple[int, ...] | None:
    axis = axis if all(len(shape) >= axis for shape in cuts) else 1
    try:
        return tuple(torch.cat([torch.zeros(1, *shape) for shape in cuts], dim=axis).shape[1:])
    except RuntimeError:
        return None


def _check_batches(recipe: Recipe, records: int, coupled: list[str]) -> None:
    """Refuse what would fail on the way: no batch at all, or a last one too short for a penalty."""
    size, rest = recipe.training.batch_size, records % recipe.training.batch_size
    if recipe.training.micro_batches > 1 and coupled:
        raise CutError(
            f"BatchNorm ({coupled[0]}) takes its statistics over a whole batch, so pieces of it would train another "
            "network: set training.micro_batches = 1, or use nn.GroupNorm"
        )
    if recipe.training.drop_last_batch:
        if records < size:
            raise DataError(f"{records} training records make no batch of {size}; lower training.batch_size")
    elif recipe.defense.nopeek is not None and 0 < rest < SMALLEST_PENALIZED_BATCH:
        raise DataError(
            f"the last batch has {rest} records; NoPeek's penalty needs at least {SMALLEST_PENALIZED_BATCH}: "
            "set training.drop_last_batch = true, or another batch_size"
        )
    elif rest == 1 and coupled:
        raise DataError(
            f"the last batch has one record, and BatchNorm ({coupled[0]}) needs two: "
            "set training.drop_last_batch = true, or another batch_size"
        )


def _hijack_guard(recipe: Recipe, records: int, classes: int, private: Source) -> HijackGuard | None:
    """The client's guard, or None. Raises DataError where it could not do its work in so few batches."""
    settings = recipe.guard.hijack
    if settings is None:
        return None
    guard = HijackGuard(private.derive("guard"), classes, **settings.model_dump())
    size, training = recipe.training.batch_size, recipe.training
    batches = records // size if training.drop_last_batch else -(-records // size)
    if batches < 2:
        raise DataError("guard.hijack needs at least 2 batches an epoch: one may be mislabeled; lower batch_size")
    if batches * training.epochs < guard.steps_to_judge:
        raise DataError(
            f"guard.hijack judges the server after {guard.steps_to_judge} batches, and {training.epochs} epochs have "
            f"{batches * training.epochs}: lower its warm_up, or raise its fake_share or training.epochs"
        )
    return guard
