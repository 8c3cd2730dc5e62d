"""What each rank does in `test_data_parallel.py`: a small network under DistributedDataParallel with a hook.

Every play returns plain numbers and tensors. A rank's own gradients come from a twin of the network, with the same
weights, that no hook touches.
"""

from __future__ import annotations

import copy
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from milkglass.compression.quantize import Int8
from milkglass.compression.rounding import Rounding
from milkglass.compression.vector import Dense, VectorCompressor
from milkglass.training.data_parallel import GaussianKState, GradientState, TopKState, gaussian_k_hook

WIDTH, CLASSES, RECORDS = 20, 4, 8
Maker = Callable[..., GradientState]


class DenseState(GradientState):
    """Sends all gradients."""

    def compressor(self, density: float) -> VectorCompressor:
        return Dense()


class RoundingState(GradientState):
    """Sends all gradients in eight bits."""

    def compressor(self, density: float) -> VectorCompressor:
        return Rounding(Int8())


STATES: dict[str, Maker] = {
    "dense": DenseState,
    "rounding": RoundingState,
    "top-k": TopKState,
    "Gaussian-k": GaussianKState,
}


class Net(nn.Module):
    """Its layers are used in another order than they are registered in, so that buckets are rebuilt; one weight is
    a single number."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.last = nn.Linear(hidden, CLASSES)
        self.first = nn.Linear(WIDTH, hidden)
        self.middle = nn.Linear(hidden, hidden)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(self.scale * torch.tanh(self.first(x)))))  # type: ignore[no-any-return]


def net(seed: int = 0, hidden: int = 64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(hidden)


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(RECORDS, WIDTH, generator=generator), torch.randint(CLASSES, (RECORDS,), generator=generator)


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    x, y = batch(rank, step)
    return nn.functional.cross_entropy(model(x), y)


@dataclass
class Played:
    """weights: by name, at the end. own, mean: sums over all steps of own gradients and of those that came back."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    own: dict[str, Tensor] = field(default_factory=dict)
    mean: dict[str, Tensor] = field(default_factory=dict)
    means: list[dict[str, Tensor]] = field(default_factory=list)
    owns: list[dict[str, Tensor]] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    sent: list[int] = field(default_factory=list)
    dense: list[bool] = field(default_factory=list)
    left_shares: list[float] = field(default_factory=list)
    buckets: list[list[int]] = field(default_factory=list)


def wrapped(model: nn.Module, state: GradientState | None, *, buckets: bool = True) -> DistributedDataParallel:
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.002 if buckets else None)
    if state is not None:
        ddp.register_comm_hook(state, gaussian_k_hook)
    return ddp


def train(
    rank: int,
    maker: str | None,
    settings: dict[str, Any],
    steps: int = 6,
    buckets: bool = True,
    resume_at: int | None = None,
    model_settings: dict[str, Any] | None = None,
) -> Played:
    """Plain SGD. resume_at: there everything is made anew, and only state_dicts are carried over."""
    state = None if maker is None else STATES[maker](**settings)
    ddp = wrapped(net(**(model_settings or {})), state, buckets=buckets)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    played = Played()
    for step in range(steps):
        if step == resume_at and maker is not None and state is not None:
            kept, weights = state.state_dict(ddp), copy.deepcopy(ddp.module.state_dict())
            state = STATES[maker](**settings)
            fresh = net(seed=5)
            fresh.load_state_dict(weights)
            state.load_state_dict(kept, fresh)
            ddp = wrapped(fresh, state, buckets=buckets)
            optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        twin = copy.deepcopy(ddp.module)
        loss_of(twin, rank, step).backward()  # type: ignore[no-untyped-call]
        optimizer.zero_grad()
        loss_of(ddp, rank, step).backward()  # type: ignore[no-untyped-call]
        played.means.append({n: _gradient(p) for n, p in ddp.module.named_parameters()})
        played.owns.append({n: _gradient(p) for n, p in twin.named_parameters()})
        for into, now in ((played.mean, played.means[-1]), (played.own, played.owns[-1])):
            for name, gradient in now.items():
                into[name] = into.get(name, torch.zeros_like(gradient)) + gradient
        if state is not None and state.report is not None:
            played.sent.append(state.report.sent)
            played.left_shares.append(state.report.left_share)
            played.dense.append(all(vector.dense for vector in state.report.vectors))
            played.buckets.append([vector.numbers for vector in state.report.vectors])
        optimizer.step()
    played.weights = {name: p.detach().clone() for name, p in ddp.module.named_parameters()}
    played.state = {} if state is None else state.state_dict(ddp)
    return played


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.detach().clone()


def accumulate(rank: int, settings: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(gradients after three backward passes of which the last one synchronizes, this rank's own sum)."""
    state = TopKState(**settings)
    ddp, twin = wrapped(net(), state), net()
    for step in range(3):
        loss_of(twin, rank, step).backward()  # type: ignore[no-untyped-call]
        if step < 2:
            with ddp.no_sync():
                loss_of(ddp, rank, step).backward()  # type: ignore[no-untyped-call]
        else:
            loss_of(ddp, rank, step).backward()  # type: ignore[no-untyped-call]
    assert state.step == 1
    mean = {n: _gradient(p) for n, p in ddp.module.named_parameters()}
    left = {n: state.state_dict(ddp)[f"left.{n}"] for n in mean}
    return {n: 2 * mean[n] + left[n] + _of_other(left[n]) for n in mean}, {
        n: _gradient(p) for n, p in twin.named_parameters()
    }


def _of_other(own: Tensor) -> Tensor:
    """The other rank's tensor, of two."""
    total = own.clone()
    dist.all_reduce(total)
    return total - own


def poisoned(rank: int, bad: float, maker: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Rank 1's gradients are not finite at step 2 of 5; nobody takes that step."""
    state = STATES[maker](**settings)
    ddp = wrapped(net(), state)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    broken, alive = [], []
    for step in range(5):
        optimizer.zero_grad()
        loss = loss_of(ddp, rank, step)
        if step == 2 and rank == 1:
            loss = loss + ddp.module.middle.weight[0, 0] * bad
        loss.backward()  # type: ignore[no-untyped-call]
        assert state.report is not None
        broken.append(state.report.broken)
        found = torch.cat([_gradient(p).flatten() for p in ddp.parameters()])
        alive.append(bool(torch.isfinite(found).all()))
        if not state.report.broken:
            optimizer.step()
    kept = state.state_dict(ddp)
    weights = torch.cat([p.detach().flatten() for p in ddp.parameters()])
    return {
        "broken": broken,
        "alive": alive,
        "weights": weights,
        "left_is_finite": all(bool(torch.isfinite(t).all()) for n, t in kept.items() if n.startswith("left")),
    }


def zeros(rank: int, maker: str, both: bool) -> tuple[list[int], list[Tensor]]:
    """Gradients of zeros at rank 0, or at both."""
    state = STATES[maker](density=0.1)
    ddp = wrapped(net(), state)
    (loss_of(ddp, rank, 0) * (0 if both or rank == 0 else 1)).backward()  # type: ignore[no-untyped-call]
    assert state.report is not None
    return [vector.sent for vector in state.report.vectors], [_gradient(p) for p in ddp.parameters()]


def single(rank: int, maker: str) -> tuple[float, float]:
    """A network of one weight: (its mean gradient, this rank's own)."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ddp = wrapped(model, STATES[maker](density=0.001))
    ddp(torch.tensor([[rank + 1.0]])).sum().backward()
    return float(_gradient(model.weight)), rank + 1.0


def with_scaler(rank: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Autocast under a gradient scaler that halves its scale once."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    state = TopKState(scaler=scaler, **settings)
    ddp = wrapped(net(), state)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.0)  # the gradients stay those of the first weights
    twin = net()
    own = mean = torch.zeros(())
    for step in range(5):
        optimizer.zero_grad()
        twin.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(ddp, rank, step)
            loss_of(twin, rank, step).backward()  # type: ignore[no-untyped-call]
        if step == 2 and rank == 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
        healthy = state.report is not None and not state.report.broken
        if healthy:
            mean = mean + torch.cat([_gradient(p).flatten() for p in ddp.parameters()])
        if healthy or rank == 0:
            own = own + torch.cat([_gradient(p).flatten() for p in twin.parameters()])
        scaler.step(optimizer)
        scaler.update()
    kept = state.state_dict(ddp)
    left = torch.cat([kept[f"left.{n}"].flatten() for n, _ in ddp.module.named_parameters()])
    without = TopKState(**settings)
    without.load_state_dict(kept, ddp)
    again = without.state_dict(ddp)
    same = all(torch.equal(tensor, again[name]) for name, tensor in kept.items())
    return {"scale": scaler.get_scale(), "own": own, "mean": mean, "left": left, "same": same}


def in_half(rank: int, maker: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A network whose weights and gradients are of half precision."""
    state = STATES[maker](density=0.05)
    ddp = wrapped(net().to(dtype), state)
    own = mean = torch.zeros((), dtype=torch.float64)
    for step in range(4):
        ddp.zero_grad()
        x, y = batch(rank, step)
        nn.functional.cross_entropy(ddp(x.to(dtype)).float(), y).backward()  # type: ignore[no-untyped-call]
        mean = mean + torch.cat([_gradient(p).flatten() for p in ddp.parameters()]).double()
        twin = copy.deepcopy(ddp.module)
        twin.zero_grad()
        nn.functional.cross_entropy(twin(x.to(dtype)).float(), y).backward()  # type: ignore[no-untyped-call]
        own = own + torch.cat([_gradient(p).flatten() for p in twin.parameters()]).double()
    kept = state.state_dict(ddp)
    left = [kept[f"left.{n}"].flatten() for n, _ in ddp.module.named_parameters()]
    return {"own": own, "mean": mean, "left": torch.cat(left).double()}


class Branches(nn.Module):
    """Uses one of two layers, in turns; rank 1 both, every third time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32)
        self.last = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor, which: int) -> Tensor:
        taken = [self.first(x), self.second(x), self.first(x) + self.second(x)][which]
        return self.last(torch.tanh(taken))  # type: ignore[no-any-return]


def with_branches(rank: int, settings: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(what came back, own gradients, what is left over): sums over steps. Some parameters are used by no rank."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Branches()
    state = TopKState(**settings)
    ddp = DistributedDataParallel(model, find_unused_parameters=True, bucket_cap_mb=0.002)
    ddp.register_comm_hook(state, gaussian_k_hook)
    mean = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    own = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for step in range(9):
        which = 2 if rank == 1 and step % 3 == 2 else step % 2
        x, y = batch(rank, step)
        twin = copy.deepcopy(model)
        nn.functional.cross_entropy(twin(x, which), y).backward()  # type: ignore[no-untyped-call]
        ddp.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(ddp(x, which), y).backward()  # type: ignore[no-untyped-call]
        for into, one in ((mean, model), (own, twin)):
            for name, parameter in one.named_parameters():
                into[name] += 0 if parameter.grad is None else parameter.grad
    kept = state.state_dict(ddp)
    left = [kept[f"left.{name}"].flatten() for name in own]
    flat_mean, flat_own = (torch.cat([t.flatten() for t in tensors.values()]) for tensors in (mean, own))
    return flat_mean, flat_own, torch.cat(left)


def large_halves(_: int, dtype: torch.dtype) -> Tensor:
    """Two gradients whose sum half precision does not hold, and whose mean it does."""
    model = nn.Linear(1, 4, bias=False).to(dtype)
    ddp = wrapped(model, DenseState(density=1.0))
    (ddp(torch.ones(1, 1, dtype=dtype)).float() * 40000.0).sum().backward()
    return _gradient(model.weight)


def two_with_one_state(rank: int, flat: bool) -> tuple[Tensor, Tensor]:
    """(weights of two networks that take turns, left over of both): under one state."""
    state = TopKState(0.05, flat=flat)
    models = [wrapped(net(seed), state) for seed in (0, 1)]
    for step in range(4):
        for model in models:
            model.zero_grad()
            loss_of(model, rank, step).backward()  # type: ignore[no-untyped-call]
    found = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models]
    return torch.cat(found), torch.cat([t.flatten() for m in models for t in state.state_dict(m).values()])


def alone_with_momentum(_: int) -> tuple[list[float], tuple[int, ...]]:
    """Gradients of ones under momentum correction, and who is named for one that is not finite: of one rank."""
    model = nn.Linear(1, 1, bias=False)
    state = GaussianKState(momentum=0.9)
    ddp = wrapped(model, state)
    found = []
    for value in (1.0, 1.0, 1.0, float("nan")):
        ddp.zero_grad()
        ddp(torch.tensor([[value]])).sum().backward()
        found.append(float(_gradient(model.weight)))
    assert state.report is not None
    return found, state.report.broken


def asleep(rank: int, quiet: int) -> None:
    """Train, until rank `quiet` does something else for long."""
    state = GaussianKState(density=0.01)
    ddp = wrapped(net(), state)
    for step in range(10**6):
        if rank == quiet and step == 5:
            time.sleep(60)
        ddp.zero_grad()
        loss_of(ddp, rank, step).backward()  # type: ignore[no-untyped-call]


def endless(rank: int, quiet: int, steps: int, mark: str | None = None) -> None:
    """Train until somebody is gone; rank `quiet` is gone after so many steps, by its own hand.

    mark: a file that is there after so many steps.
    """
    state = GaussianKState(density=0.01)
    ddp = wrapped(net(), state)
    for step in range(10**6):
        if rank == quiet and step == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        if mark is not None and step == steps:
            Path(mark).touch()
        ddp.zero_grad()
        loss_of(ddp, rank, step).backward()  # type: ignore[no-untyped-call]
