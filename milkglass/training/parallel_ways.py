"""How ranks keep one network, as a recipe's `parallel` table says: gradients at every step, or weights now and then.

Both have the same verbs, so that the training loop is one. What a way tells of itself (`lines`) is for exchange.jsonl.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Final, cast, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.algorithms.model_averaging.utils import average_parameters
from torch.nn.parallel import DistributedDataParallel

from milkglass.compression.gaussian_k import GaussianK
from milkglass.compression.vector import bounds
from milkglass.errors import MilkglassError
from milkglass.parallel_section import Parallel
from milkglass.training.averaging import CEILING, SAMPLING_STEPS, AdaptivePeriodicAverager, Sync
from milkglass.training.data_parallel import GaussianKState, GradientState, StepReport, TopKState, gaussian_k_hook

POWERSGD_STARTS: Final = 2
"""The first steps of PowerSGD send everything, as torch asks for: buckets are parted anew after the first one."""
ONE_BUCKET: Final = 1 << 20
"""Mebibytes, more than any network has. With several buckets torch's PowerSGD waits in gloo's threads, and hangs."""
_PUBLISHED_PERIODS: Final = {"periodic": 8, "adaptive": 4}


class Way(ABC):
    """module: what the loop calls in place of the network."""

    module: nn.Module

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    @abstractmethod
    def check(self, step: int) -> None:
        """After the backward pass. Raises MilkglassError, at all ranks alike, where the training has diverged."""

    @abstractmethod
    def stepped(self) -> None:
        """After the optimizer's step."""

    @abstractmethod
    def end(self) -> None:
        """After the last step: from here on all ranks hold the same network."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What this rank needs to go on, beside weights and optimizer."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken. Raises RunError where it does not fit."""


@final
class Gradients(Way):
    """Gradients meet at every step, by DistributedDataParallel and perhaps a communication hook of ours."""

    def __init__(self, network: nn.Module, section: Parallel, momentum: float, steps_per_epoch: int, seed: int) -> None:
        super().__init__()
        bucket = None if section.exchange == "dense" else ONE_BUCKET
        ddp = DistributedDataParallel(network, bucket_cap_mb=bucket, gradient_as_bucket_view=True)
        self.module, self._network = ddp, network
        self._hook = gradient_state(section, momentum=momentum, steps_per_epoch=steps_per_epoch)
        if self._hook is not None:
            ddp.register_comm_hook(self._hook, gaussian_k_hook)
        if section.exchange == "powersgd":
            ddp.register_comm_hook(power_sgd_state(section, seed), powerSGD_hook)

    def check(self, step: int) -> None:
        report = None if self._hook is None else self._hook.report
        if report is not None:
            self.lines.append(told_of(report))
            if report.broken:
                ranks = ", ".join(map(str, report.broken))
                raise MilkglassError(
                    f"step {step}: a gradient of rank {ranks} is not finite; training has diverged: lower the "
                    "learning rate"
                )
        # NaN has reached all ranks by now: the last parameter's gradient is the smallest that shows it.
        smallest = min(self._network.parameters(), key=Tensor.numel)
        if smallest.grad is not None and not bool(torch.isfinite(smallest.grad).all()):
            raise MilkglassError(
                f"step {step}: the gradient is not finite; training has diverged: lower the learning rate"
            )

    def stepped(self) -> None:
        pass  # the ranks took the same step

    def end(self) -> None:
        pass  # and hold the same network

    def state(self) -> dict[str, Tensor]:
        return {} if self._hook is None else self._hook.state_dict(self._network)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if self._hook is not None:
            self._hook.load_state_dict(state, self._network)


@final
class Weights(Way):
    """Each rank trains by itself; weights are averaged after periods of steps, constant or adaptive."""

    def __init__(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, averager: AdaptivePeriodicAverager
    ) -> None:
        super().__init__()
        self.module, self._optimizer, self._averager = network, optimizer, averager

    def check(self, step: int) -> None:
        pass  # ranks that diverge are named when they meet

    def stepped(self) -> None:
        self._averager.average_parameters(self._optimizer.param_groups)

    def end(self) -> None:
        average_parameters(self.module.parameters(), cast(dist.ProcessGroup, dist.group.WORLD))
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.module.parameters()):
            raise MilkglassError(
                "after the last step the weights are not finite; training has diverged: lower the learning rate"
            )

    def state(self) -> dict[str, Tensor]:
        return self._averager.state_dict()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._averager.load_state_dict(state)


def way_of(
    section: Parallel,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    momentum: float,
    steps_per_epoch: int,
    epochs: int,
    seed: int,
) -> Way:
    """The way of that table. momentum: for momentum correction. seed: of PowerSGD's first factors."""
    if section.exchange not in _PUBLISHED_PERIODS:
        return Gradients(network, section, momentum, steps_per_epoch, seed)
    lines: list[dict[str, Any]] = []
    averager = averager_of(
        section,
        steps_per_epoch=steps_per_epoch,
        total_steps=epochs * steps_per_epoch,
        log=lambda sync: lines.append(told_of_sync(sync)),
    )
    way = Weights(network, optimizer, averager)
    way.lines = lines
    return way


def gradient_state(
    section: Parallel, *, momentum: float = 0.0, steps_per_epoch: int = 1, group: dist.ProcessGroup | None = None
) -> GradientState | None:
    """The state of a hook that sends the largest gradients; None where the table asks for another way."""
    maker = {"topk": TopKState, "gaussian_k": GaussianKState}.get(section.exchange)
    if maker is None:
        return None
    warmup = [(steps_per_epoch, density) for density in section.warmup]
    correction = momentum if section.momentum_correction else 0.0
    return maker(section.density, warmup=warmup, flat=True, momentum=correction, group=group)


def power_sgd_state(section: Parallel, seed: int, group: dist.ProcessGroup | None = None) -> PowerSGDState:
    """torch's PowerSGD (Vogels et al. 2019, arXiv 1905.13727)."""
    return PowerSGDState(
        group,
        matrix_approximation_rank=section.matrix_rank,
        start_powerSGD_iter=POWERSGD_STARTS,
        random_seed=seed % 2**32,
    )


def averager_of(
    section: Parallel,
    *,
    steps_per_epoch: int = 1,
    total_steps: int | None = None,
    group: dist.ProcessGroup | None = None,
    log: Callable[[Sync], None] | None = None,
) -> AdaptivePeriodicAverager:
    """A constant period is an adaptive one whose floor is its ceiling. total_steps: where it is known beforehand."""
    period = section.period or _PUBLISHED_PERIODS[section.exchange]
    together = max(1, section.dense_epochs * steps_per_epoch)
    floor, ceiling = (period, period) if section.exchange == "periodic" else (1, max(CEILING, period))
    # a quarter of all, as published, but counted from the end of the epochs together: few epochs would leave no sample
    sampled = SAMPLING_STEPS if total_steps is None else max(period, total_steps // 4)
    return AdaptivePeriodicAverager(
        initial_period=period,
        floor=floor,
        ceiling=ceiling,
        every_step_for=together,
        sampling_steps=together + sampled,
        compressor=GaussianK(section.density) if section.compress_weights else None,
        process_group=group,
        log=log,
    )


def told_of(report: StepReport) -> dict[str, Any]:
    """The line of a step: what compression left over, beside what is proved for bell-shaped vectors, and for any."""
    tight, old = bounds(report.sent, report.numbers)
    return {
        "step": report.step,
        "numbers": report.numbers,
        "sent": report.sent,
        "left_share": report.left_share if math.isfinite(report.left_share) else None,
        "bound": tight,
        "old_bound": old,
    }


def told_of_sync(sync: Sync) -> dict[str, Any]:
    """The line of an average."""
    told = {
        "step": sync.step,
        "period": sync.period,
        "variance": sync.variance,
        "bound": sync.bound,
        "learning_rate": sync.learning_rate,
        "phase": sync.phase,
        "next_period": sync.next_period,
    }
    if sync.exchanged is not None and sync.exchanged.before:
        told |= {"sent": sync.exchanged.sent, "left_share": sync.exchanged.left / sync.exchanged.before}
    return told
