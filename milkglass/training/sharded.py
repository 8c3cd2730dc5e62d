"""A server under torchrun: its stage shared out among the processes that torchrun has started.

`torchrun --nproc-per-node N -m milkglass serve ...` starts N processes that all read the same command line. The one of
rank 0 serves; the others make the same stage, from the recipe's seed, and do as it says.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from milkglass.cuts import couples_records
from milkglass.errors import CutError, RecipeError
from milkglass.randomness import public_source
from milkglass.rank_links import linked
from milkglass.recipe import Recipe
from milkglass.server import Server
from milkglass.sharding import Crew, Joint
from milkglass.sharding import follow as follow_crew
from milkglass.training.data_parallel import gaussian_k_hook
from milkglass.training.parallel_ways import ONE_BUCKET, averager_of, gradient_state, power_sgd_state
from milkglass.training.setup import network_parts, optimizer
from milkglass.transports.grpc import Log

_LAST: Final = -1  # the server's stage, at the end of all hops; those have 0, 1, ...


def shared_out() -> bool:
    """Whether torchrun has started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def following() -> bool:
    """Whether torchrun has started this process as another rank than 0."""
    return shared_out() and int(os.environ["RANK"]) != 0  # torchrun's own word: before there is a process group


@contextmanager
def sharing_out(
    recipe: Recipe, shape: Sequence[int], classes: int, hop: str | None, log: Log
) -> Iterator[Callable[[Server], None]]:
    """At rank 0: what a server's stage is shared out with, or a hop's; it does nothing where torchrun is not at work.

    Raises RecipeError or CutError, before anybody is waited for, where a stage cannot be shared out.
    """
    if not shared_out():
        yield lambda _: None
        return
    if recipe.parties.mode == "splitfed1" and len(recipe.parties.clients) > 1:
        raise RecipeError(
            "parties.mode splitfed1 keeps a stage for each client, and torchrun shares out one: serve it without "
            "torchrun, or set parties.mode = 'splitfed2'"
        )
    if recipe.training.decay_steps is not None:
        raise RecipeError("training.decay_steps changes the learning rate at rank 0 alone: serve it without torchrun")
    if recipe.parallel.warmup or recipe.parallel.momentum_correction:
        raise RecipeError(
            "parallel.warmup and parallel.momentum_correction go with parties.mode data_parallel: the processes that "
            "share a server's stage know of no epochs, and keep its optimizer: leave them out"
        )
    coupled = couples_records(_stage(recipe, shape, classes, _place(recipe, hop)))
    if coupled:
        raise CutError(
            f"BatchNorm ({coupled[0]}) in the server's stage takes its statistics over a whole batch, and under "
            "torchrun each process has a part of one: use nn.GroupNorm, or serve it without torchrun"
        )
    with linked() as links:
        crew = Crew(links, _joint(recipe))

        def share(server: Server) -> None:
            crew.lead(server, number=_place(recipe, hop), check=_check(recipe))
            log("stage shared out", processes=links.ranks, device=links.device.type)

        try:
            yield share
        finally:
            crew.stop()


def follow(recipe: Recipe, shape: Sequence[int], classes: int) -> None:
    """Be another rank than 0, to the end. Raises MilkglassError where rank 0 is gone."""

    def make_server(place: int) -> Server:
        stage = _stage(recipe, shape, classes, place)
        return Server(stage, optimizer(recipe, stage))

    with linked() as links:
        for number in (signal.SIGTERM, signal.SIGINT):  # rank 0 keeps the state first, and then says that all is done
            signal.signal(number, signal.SIG_IGN)
        follow_crew(links, make_server, check=_check(recipe), joint=_joint(recipe))


def _joint(recipe: Recipe) -> Joint:
    """How the ranks' stages stay one: as `parallel.exchange` says, from the first step on."""
    section = recipe.parallel.model_copy(update={"dense_epochs": 0})  # they know of no epochs
    if section.exchange in ("periodic", "adaptive"):
        return Joint(averager=lambda group: averager_of(section, group=group))

    def attach(meeting: DistributedDataParallel) -> None:
        state = gradient_state(section, group=meeting.process_group)
        if state is not None:
            meeting.register_comm_hook(state, gaussian_k_hook)
        if section.exchange == "powersgd":
            meeting.register_comm_hook(power_sgd_state(section, recipe.seed, meeting.process_group), powerSGD_hook)

    return Joint(attach, bucket_mebibytes=None if section.exchange == "dense" else ONE_BUCKET)


def _stage(recipe: Recipe, shape: Sequence[int], classes: int, place: int) -> nn.Module:
    parts = network_parts(recipe, shape, classes, public_source(recipe.seed))
    return parts.middle if place == _LAST else parts.hops[place]


def _place(recipe: Recipe, hop: str | None) -> int:
    return recipe.parties.hops.index(hop) if hop in recipe.parties.hops else _LAST


def _check(recipe: Recipe) -> int:
    return int(recipe.digest()[:15], 16)
