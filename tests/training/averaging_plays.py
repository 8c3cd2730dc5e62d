"""What the ranks of `test_averaging.py` do: each trains a small network on records of its own, and averages."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import ModelAverager, PeriodicModelAverager

from milkglass.compression.vector import Selected, Selector, add, squares
from milkglass.errors import LinkError, MilkglassError, RecipeError, RunError
from milkglass.training.averaging import AdaptivePeriodicAverager, Sync, average_buffers

_RECORDS = 8
_WIDTH = 6
_COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce", "all_to_all", "barrier")


class InTurn(Selector):
    """Sends 20 numbers, from the one that the hint names: without the hint it sends others."""

    def describe(self) -> str:
        return "20 numbers in turn"

    def _select(self, u_D: Tensor, plus_D: Tensor | None, hint: float | None) -> Selected:
        add(u_D, plus_D)
        first = int(hint or 0)
        indexes_K = torch.arange(first, first + 20) % len(u_D)
        return Selected(indexes_K, squares(u_D), float(first + 20))


def network(seed: int = 0, hidden: int = 32, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same weights for the same seed, whatever was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(_WIDTH, hidden), nn.Tanh(), nn.Linear(hidden, 3)).to(dtype)


def flat(model: nn.Module) -> Tensor:
    """All parameters (D,), a copy."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def backward(model: nn.Module, rank: int, step: int) -> None:
    """The gradient of this rank's records of this step."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(_RECORDS, _WIDTH, generator=generator)
    y = torch.randint(3, (_RECORDS,), generator=generator)
    model.zero_grad()
    nn.functional.cross_entropy(model(x.to(next(model.parameters()).dtype)).float(), y).backward()  # type: ignore[no-untyped-call]


@dataclass
class Played:
    """after: parameters after each step. before: those before an average, where the play looks. calls: (collective,
    numbers) in each step. states: of an averager, after each step. initial: before all steps."""

    initial: Tensor
    after: list[Tensor] = field(default_factory=list)
    before: list[Tensor] = field(default_factory=list)
    calls: list[list[tuple[str, int]]] = field(default_factory=list)
    syncs: list[Sync] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class Play:
    """A training. torchs: with torch's own averager. wrapped: in a PostLocalSGDOptimizer. apart: begin with another
    model at each rank. resume_after: the step after which everything is made anew, from states."""

    settings: dict[str, Any]
    steps: int = 20
    torchs: bool = False
    wrapped: bool = False
    apart: bool = False
    dtype: torch.dtype = torch.float32
    resume_after: int | None = None
    rate_drops_after: int | None = None


def train(rank: int, play: Play) -> Played:
    model = network(rank if play.apart else 0, dtype=play.dtype)
    played = Played(flat(model))
    optimizer, averager = _made(play, model, played)
    for step in range(play.steps):
        backward(model, rank, step)
        with counted() as calls:
            optimizer.step()
            played.before.append(flat(model))
            if not play.wrapped:
                averager.average_parameters(optimizer.param_groups)  # type: ignore[no-untyped-call]
        played.calls.append(calls)
        played.after.append(flat(model))
        if isinstance(averager, AdaptivePeriodicAverager):
            played.states.append(averager.state_dict())
        if step == play.resume_after:
            model, optimizer, averager = _made_anew(play, model, optimizer, averager, played)
        if step == play.rate_drops_after:
            for group in optimizer.param_groups:
                group["lr"] /= 10
    return played


def _made(play: Play, model: nn.Module, played: Played) -> tuple[torch.optim.Optimizer, ModelAverager]:
    local = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    averager: ModelAverager
    if play.torchs:
        averager = PeriodicModelAverager(**play.settings)
    else:
        averager = AdaptivePeriodicAverager(**play.settings, log=played.syncs.append)
    if not play.wrapped:
        return local, averager
    from torch.distributed.optim import PostLocalSGDOptimizer  # warns of torch.jit, which is an error where tests are

    return PostLocalSGDOptimizer(local, averager), averager


def _made_anew(
    play: Play, model: nn.Module, optimizer: torch.optim.Optimizer, averager: ModelAverager, played: Played
) -> tuple[nn.Module, torch.optim.Optimizer, ModelAverager]:
    assert isinstance(averager, AdaptivePeriodicAverager)
    kept = safetensors.torch.save(averager.state_dict())  # so there is nothing in it but tensors
    again = network(seed=7, dtype=play.dtype)
    again.load_state_dict(model.state_dict())
    new_optimizer, new_averager = _made(play, again, played)
    assert isinstance(new_averager, AdaptivePeriodicAverager)
    new_averager.load_state_dict(safetensors.torch.load(kept))
    new_optimizer.load_state_dict(optimizer.state_dict())
    return again, new_optimizer, new_averager


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """Every collective operation that is called inside, and of how many numbers."""
    calls: list[tuple[str, int]] = []
    real = {name: getattr(dist, name) for name in _COLLECTIVES}

    def counting(name: str) -> Callable[..., Any]:
        @functools.wraps(real[name])
        def call(*arguments: Any, **named: Any) -> Any:
            tensor = next(given for given in reversed(arguments) if isinstance(given, Tensor))
            calls.append((name, tensor.numel()))
            return real[name](*arguments, **named)

        return call

    for name in _COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def meet_nan(rank: int, settings: dict[str, Any], value: float) -> tuple[str, bool]:
    """Rank 1 gets a parameter that is not finite before the second average: what all say, whether parameters stayed."""
    model = network()
    averager = AdaptivePeriodicAverager(**settings, learning_rate=0.1)
    averager.average_parameters(model.parameters())
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1.0 if rank == 0 else value
    before = flat(model)
    for _ in range(averager.period - 1):
        averager.average_parameters(model.parameters())
    try:
        averager.average_parameters(model.parameters())
    except MilkglassError as error:
        return str(error), torch.equal(before.nan_to_num(), flat(model).nan_to_num())
    return "", False


def be_far_apart(rank: int) -> str:
    """Finite parameters whose squared distance is not."""
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, 1e30 * (1 - 2 * rank))
    try:
        AdaptivePeriodicAverager(learning_rate=0.1).average_parameters(model.parameters())
    except MilkglassError as error:
        return str(error)
    return ""


def refuse_states(_: int, settings: dict[str, Any]) -> list[str]:
    """What is said to the state of another model, at the next step and before anything is sent; and to no state."""
    model = network()
    averager = AdaptivePeriodicAverager(**settings, learning_rate=0.1)
    averager.average_parameters(model.parameters())
    averager.average_parameters(model.parameters())
    state = averager.state_dict()
    said = []
    for other in (network(hidden=31), nn.Linear(_WIDTH, 32)):
        new = AdaptivePeriodicAverager(**settings, learning_rate=0.1)
        new.load_state_dict(state)
        before = flat(other)
        said.append(_said(lambda new=new, other=other: new.average_parameters(other.parameters())))  # type: ignore[misc]
        assert torch.equal(before, flat(other))
    damaged = {name: tensor for name, tensor in state.items() if name != "c2"}
    said.append(_said(lambda: averager.load_state_dict(damaged)))
    plain = AdaptivePeriodicAverager(learning_rate=0.1)
    said.append(_said(lambda: plain.load_state_dict(state)))
    if "left" in state:
        said.append(_said(lambda: averager.load_state_dict(state | {"left": state["left"][1:]})))
    after = averager.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)
    return said


def _said(call: Callable[[], None]) -> str:
    try:
        call()
    except RunError as error:
        return str(error)
    return ""


def be_alone(_: int, settings: dict[str, Any]) -> tuple[bool, int, list[Sync]]:
    """In a group of one's own: whether parameters stayed, how many collectives there were, and what was logged."""
    group, _ = dist.new_subgroups(group_size=1)  # type: ignore[no-untyped-call]
    model, syncs = network(), list[Sync]()
    averager = AdaptivePeriodicAverager(**settings, learning_rate=0.1, process_group=group, log=syncs.append)
    stayed = True
    with counted() as calls:
        for _ in range(40):
            with torch.no_grad():
                next(model.parameters()).add_(0.01)
            before = flat(model)
            averager.average_parameters(model.parameters())
            stayed = stayed and torch.equal(before, flat(model))
        average_buffers(nn.BatchNorm1d(3), group)
    return stayed, len(calls), syncs


def be_left_out(rank: int) -> tuple[bool, int, int]:
    """A group of rank 0 and rank 1's averager with it: whether parameters stayed, steps, and collectives."""
    group = dist.new_group([0])
    model = network(rank)
    averager = AdaptivePeriodicAverager(learning_rate=0.1, process_group=group)
    before = flat(model)
    with counted() as calls:
        for _ in range(6):
            averager.average_parameters(model.parameters())
    return torch.equal(before, flat(model)), averager.step, len(calls)


def tell_rates(_: int) -> list[float | str]:
    """The learning rate that is logged: of groups, of a number, of a function; and what is said without one."""
    model = network()
    first, *others = model.parameters()  # 192 of 323 numbers
    groups = [{"params": [first], "lr": 0.5}, {"params": others, "lr": 0.1}]
    told: list[float | str] = []
    right: list[tuple[Any, Any]] = [(None, groups), (0.25, groups), (lambda: 0.125, model.parameters())]
    for rate, params in right:
        syncs: list[Sync] = []
        averager = AdaptivePeriodicAverager(learning_rate=rate, log=syncs.append)
        averager.average_parameters(params)
        told.append(syncs[0].learning_rate)
    wrong: list[tuple[Any, Any]] = [(None, model.parameters()), (-1.0, groups), (None, []), (None, ["weight"])]
    for rate, params in wrong:
        averager = AdaptivePeriodicAverager(learning_rate=rate)
        with counted() as calls:
            try:
                averager.average_parameters(params)
            except RecipeError as error:
                told.append(str(error))
        assert not calls
    return told


def average_some(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A parameter with a gradient at rank 0 alone, one without any, and a frozen one: 1 at rank 0, 3 at rank 1."""
    parameters = [nn.Parameter(torch.full((2,), 1.0 + 2 * rank)) for _ in range(3)]
    parameters[2].requires_grad_(False)
    if rank == 0:
        parameters[0].grad = torch.ones(2)
    AdaptivePeriodicAverager(learning_rate=0.1).average_parameters(parameters)
    return parameters[0].detach(), parameters[1].detach(), parameters[2]


def go_on_from_a_step_alone(rank: int) -> tuple[list[int], list[str]]:
    """As PostLocalSGDOptimizer restores an averager whose own state nobody kept: when averages are, and for what."""
    model, syncs = network(rank), list[Sync]()
    averager = AdaptivePeriodicAverager(learning_rate=0.1, sampling_steps=9, log=syncs.append)
    averager.step = 50
    for _ in range(10):
        averager.average_parameters(model.parameters())
    return [sync.step for sync in syncs], [sync.phase for sync in syncs]


def average_statistics(rank: int) -> dict[str, Tensor]:
    """Buffers of a network with BatchNorm: statistics, a count of batches, a mask."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2))
    model.register_buffer("mask", torch.tensor([rank == 0, True]))
    for step in range(2 + rank):
        model(torch.randn(16, 3, generator=torch.Generator().manual_seed(10 * rank + step)) + rank)
    before = {f"own.{name}": buffer.clone() for name, buffer in model.named_buffers()}
    weights = flat(model)
    average_buffers(model)
    assert torch.equal(weights, flat(model))
    return before | dict(model.named_buffers())


def end_in_the_middle(rank: int, settings: dict[str, Any]) -> str:
    """The last rank ends before an average; what the others say."""
    model = network()
    averager = AdaptivePeriodicAverager(**settings, learning_rate=0.1)
    try:
        for step in range(12):
            if rank == dist.get_world_size() - 1 and step == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            averager.average_parameters(model.parameters())
    except LinkError as error:
        return str(error)
    return "no error"
