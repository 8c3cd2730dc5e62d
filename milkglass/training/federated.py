"""Federated averaging: each client trains the whole network on its own records, a server averages their weights.

McMahan et al. 2017 (arXiv 1602.05629), on Flower (Beutel et al. 2020, arXiv 2007.14390). This file is what a client
does in a round, and the training of all clients in one process (`flower_simulation.py`); what they say to each other
is in `flower_apps.py`. Where we differ from the paper:

- Every client takes part in every round; with `federated.least_clients` a round goes on without those who fail.
- A client keeps nothing from round to round but its key: optimizer, order and dropout are new, from its private source
  and the number of the epoch. So a client that was away, or a run that is resumed, needs no state of its own.
- Weights count by the client's training records, as in the paper, whether or not its last, shorter batch was dropped.
- A client tests the weights that it receives, and tells how many it had right with its answer. So a round costs two
  networks for each client, and the last weights are tested in one more message down. An epoch's accuracy in
  metrics.jsonl is therefore known a round later.

Legend: B records in a batch, K classes.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.client import StepResult
from milkglass.cuts import couples_records, flops_per_sample
from milkglass.data import Deal
from milkglass.errors import CutError, DataError, RecipeError
from milkglass.flower import flower
from milkglass.networks import build
from milkglass.randomness import Source, drawing_from, public_source, rehearsal_source
from milkglass.recipe import Recipe
from milkglass.runs import RunFolder, tensors_as_bytes
from milkglass.training.federated_rounds import Rounds
from milkglass.training.inputs import RECORDS, told
from milkglass.training.setup import optimizer, rate
from milkglass.training.shares import Share, deal_records, share_of
from milkglass.training.split import Progress, Silence, computing_with, digest_of

if TYPE_CHECKING:
    from milkglass.private.dp import Mechanism

NETWORK: Final = "network.safetensors"
_TEST_BATCH: Final = 256

OnBatch = Callable[[int, StepResult], None]
"""(epoch, what the batch cost): called after each batch of a client."""


@final
@dataclass(frozen=True)
class LocalRound:
    """What a client's round came to: its weights, and the mean loss and accuracy (0..1) on the way."""

    weights: dict[str, Tensor]
    loss: float
    accuracy: float


@final
@dataclass(frozen=True)
class Member:
    """One client: its records, its private source, and the network that received weights are loaded into."""

    recipe: Recipe
    name: str
    share: Share
    source: Source
    network: nn.Module

    @property
    def records(self) -> int:
        """How many it trains on, which is what its weights count by."""
        return len(self.share.train)

    @property
    def privacy(self) -> dict[str, Any] | None:
        """The mechanism of its whole training, with words for what it covers; None without `dp`."""
        found = mechanism(self.recipe, self.records)
        if found is None:
            return None
        from milkglass.private.dp import FEDERATED_COVERS

        return found.to_dict() | {"words": f"{found.words}; {FEDERATED_COVERS}"}

    def round(self, weights: Mapping[str, Tensor], epoch: int, on_batch: OnBatch | None = None) -> LocalRound:
        """Its round from these weights, whose first epoch has that number (from 1)."""
        self.network.load_state_dict(dict(weights))
        train = self.share.train
        return local_round(
            self.network, train.x, train.y, self.recipe, source=self.source, epoch=epoch, on_batch=on_batch
        )

    def right(self, weights: Mapping[str, Tensor]) -> int:
        """How many of its test records these weights classify right."""
        self.network.load_state_dict(dict(weights))
        return classified_right(self.network, self.share.test.x, self.share.test.y)


def local_update(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    *,
    source: Source,
    epoch: int,
    private: Mechanism | None = None,
) -> dict[str, Tensor]:
    """The weights (and buffers) after one client's round from `network`, which is left as it is: `local_round`."""
    return local_round(network, x, y, recipe, source=source, epoch=epoch, private=private).weights


def local_round(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    *,
    source: Source,
    epoch: int,
    on_batch: OnBatch | None = None,
    private: Mechanism | None = None,
) -> LocalRound:
    """Train a copy of `network` for `federated.local_epochs` epochs on records x (N, ...), labels y (N,).

    source: the client's private one. epoch: the number of the round's first epoch, from 1. private: in place of the
    mechanism that the recipe's `dp` comes to for so many records. The same arguments give the same bits. Raises
    DataError where the records make no batch, RecipeError where there is nothing to learn.
    """
    own = copy.deepcopy(network).train()
    learning, changing = _optimizer(recipe, own), rate(recipe)
    private = private or mechanism(recipe, len(y))
    if private is not None:
        from milkglass.private.dp import make_private

        # of these weights alone: asked twice, from other ones, the same noise would take itself out of a difference
        received = hashlib.sha256(tensors_as_bytes(own.state_dict())).hexdigest()
        learning = make_private([own], learning, private, source.derive("dp", epoch, received))
    loss_sum, right, seen = 0.0, 0, 0
    for number in range(epoch, epoch + recipe.federated.local_epochs):
        batches = local_batches(recipe, len(y), source, number)
        with drawing_from(source.generator("dropout", number)):
            for place, rows in enumerate(batches):
                if changing is not None:
                    for group in learning.param_groups:
                        group["lr"] = changing((number - 1) * len(batches) + place)
                loss, correct = _step(own, learning, x[rows], y[rows])
                loss_sum, right, seen = loss_sum + loss * len(rows), right + correct, seen + len(rows)
                if on_batch is not None:
                    on_batch(number, StepResult(loss, 0.0, correct / max(1, len(rows))))
    weights = {name: tensor.detach().clone() for name, tensor in own.state_dict().items()}
    return LocalRound(weights, loss_sum / max(1, seen), right / max(1, seen))


def local_batches(recipe: Recipe, records: int, source: Source, epoch: int) -> list[Tensor]:
    """The row numbers (B,) of each batch of a client's epoch, in an order that follows from its private source alone.

    With `dp` each record is in each batch by chance (Poisson sampling), so that batches differ in size.
    """
    size, generator = recipe.training.batch_size, source.generator("order", epoch)
    if recipe.training.drop_last_batch and records < size:
        raise DataError(f"{records} training records make no batch of {size}; lower training.batch_size")
    if recipe.dp is not None:
        from milkglass.private.dp import poisson_batches

        return poisson_batches(records, size / records, records // size, generator)
    batches = list(torch.split(torch.randperm(records, generator=generator), size))
    if recipe.training.drop_last_batch and len(batches[-1]) < size:
        batches.pop()
    return batches


@torch.no_grad()
def classified_right(network: nn.Module, x: Tensor, y: Tensor) -> int:
    """How many of the records x (N, ...) with labels y (N,) the network classifies right."""
    network.eval()
    parts = zip(torch.split(x, _TEST_BATCH), torch.split(y, _TEST_BATCH), strict=True) if len(y) else ()
    return sum(int((network(x_part).argmax(dim=1) == y_part).sum()) for x_part, y_part in parts)


def mechanism(recipe: Recipe, records: int) -> Mechanism | None:
    """The privacy mechanism of a client of so many records, for its whole training; None without `dp`."""
    if recipe.dp is None:
        return None
    from milkglass.private.dp import mechanism_of

    return mechanism_of(recipe.dp, records, recipe.training.batch_size, recipe.training.epochs)


def first_network(recipe: Recipe, shape: tuple[int, ...], classes: int) -> nn.Module:
    """The network that all begin with: its weights follow from the recipe's seed.

    Raises CutError for one that `dp` does not go with.
    """
    generator = public_source(recipe.seed).generator("weights")
    network = build(recipe.network.name, shape, classes, recipe.network.settings, generator)
    if recipe.dp is not None:
        from milkglass.private.dp import check_network

        check_network(network)
    return network


def member(recipe: Recipe, name: str, records: Deal, source: Source) -> Member:
    """The client of that name. Raises MilkglassError, before anything is sent, where the recipe cannot be run."""
    share = share_of(recipe, records, name)
    network = first_network(recipe, tuple(records.record_shape), records.classes)
    _optimizer(recipe, network)
    mechanism(recipe, len(share.train))
    batches = local_batches(recipe, len(share.train), source, 1)
    coupled = couples_records(network)
    if coupled and not recipe.training.drop_last_batch and len(batches[-1]) == 1:
        raise CutError(
            f"the last batch of {name} has one record, and BatchNorm ({coupled[0]}) needs two: set "
            "training.drop_last_batch = true, or another batch_size"
        )
    return Member(recipe, name, share, source, network)


def train(
    recipe: Recipe, out: Path, key: Source | None = None, *, resume: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Train a recipe with all its clients in this process into the run folder `out`; what summary.json holds.

    key: several clients derive theirs from it; without one their keys follow from the seed, a rehearsal. Ends in the
    same bits whether it ran through or was stopped and resumed. Raises MilkglassError, one line, as `split.train`; a
    round that failed leaves the checkpoint of the one before.
    """
    flower()
    from milkglass.training.flower_apps import client_app, server_app  # they are made from what stands here
    from milkglass.training.flower_simulation import simulate

    progress, names = progress or Silence(), recipe.parties.clients
    with computing_with(recipe.threads):
        records = deal_records(recipe)
        members = [member(recipe, name, records, _source(recipe, name, key)) for name in names]
        watch = _watch(members, progress)
        app = client_app(recipe, lambda context: members[int(context.node_config["partition-id"])], watch)
        first = first_network(recipe, tuple(records.record_shape), records.classes)
        digest = digest_of(records)
        folder = (RunFolder.resume if resume else RunFolder.create)(out, recipe, digest)
        with folder.locked():
            if folder.finished:
                return folder.read_json("summary.json")
            rounds = Rounds(recipe, first.state_dict(), folder, progress)
            simulate(server_app(rounds), app, len(names))
            folder.write_tensors(NETWORK, rounds.weights)
            folder.write_json(RECORDS, told(records))
            summary = rounds.summary() | _of_the_whole(members[0], records, rehearsal=key is None)
            folder.write_json("summary.json", summary)
    return summary


def _source(recipe: Recipe, name: str, key: Source | None) -> Source:
    if key is None:
        return rehearsal_source(recipe.seed, name)
    return key if len(recipe.parties.clients) == 1 else key.derive(name)


def _optimizer(recipe: Recipe, network: nn.Module) -> torch.optim.Optimizer:
    found = optimizer(recipe, network)
    if found is None:
        raise RecipeError(f"network {recipe.network.name!r} has nothing to learn")
    return found


def _step(network: nn.Module, learning: torch.optim.Optimizer, x: Tensor, y_B: Tensor) -> tuple[float, int]:
    """A step: the batch's mean loss, and how many records it classified right. An empty batch, of `dp`, is noise."""
    learning.zero_grad(set_to_none=True)
    if not len(y_B):
        learning.step()
        return 0.0, 0
    logits_BK = network(x)
    loss = F.cross_entropy(logits_BK, y_B)
    loss.backward()  # type: ignore[no-untyped-call]
    learning.step()
    return float(loss.detach()), int((logits_BK.detach().argmax(dim=1) == y_B).sum())


def _watch(members: list[Member], progress: Progress) -> OnBatch:
    """Tells the batches of all clients as those of the round's first epochs, one after the other."""
    recipe = members[0].recipe
    local = recipe.federated.local_epochs
    total = sum(len(local_batches(recipe, each.records, each.source, 1)) for each in members)
    done = {"round": 0, "batches": 0}

    def on_batch(epoch: int, result: StepResult) -> None:
        round_ = (epoch - 1) // local
        done["batches"] = done["batches"] + 1 if done["round"] == round_ else 1
        done["round"] = round_
        progress.batch(round_ * local + 1, done["batches"], total, result)

    return on_batch


def _of_the_whole(first: Member, records: Deal, *, rehearsal: bool) -> dict[str, Any]:
    """What only who plays all clients can say of a training."""
    return {
        "client_flops_per_sample": flops_per_sample(first.network, first.share.train.x[:1]),
        "keys": "keys derived from the seed: a rehearsal" if rehearsal else "the clients' key came from a file",
        "records": {
            "train": {name: len(part) for name, part in records.train.items()},
            "auxiliary": len(records.auxiliary),
            "validation": len(records.validation),
            "test": len(records.test),
        },
    }
