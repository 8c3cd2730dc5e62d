"""Adaptive periodic averaging of models, ADPSGD (Jiang, Agrawal 2020, arXiv 2007.06134), for torch's local SGD.

    optimizer = PostLocalSGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), AdaptivePeriodicAverager())

Each rank trains alone for p steps; then all go on from the mean of their models. S is the mean of the squared distances
between the models and that mean. At first p is constant, and C2 is the mean of S / gamma, gamma the learning rate. Then
p grows by one where S < 0.7 gamma C2, and shrinks by one where S > 1.3 gamma C2. A drop of the learning rate lowers
that bound at once and S only later, so p dips before it grows.

Where we differ, or the paper is silent:
- The first average is taken after the first step, as torch's PeriodicModelAverager does. From there on all ranks are at
  one model, wherever they began. It does not end a whole period, so C2 is not told of it.
- A learning rate of 0 says nothing of how far models should lie apart: it changes neither C2 nor p. p has a ceiling.
- Momentum buffers, and whatever else an optimizer keeps, stay at their rank, neither averaged nor set to zero. So do
  buffers of the model, as the statistics of BatchNorm: `average_buffers` is for evaluation and saving.
- With a compressor it is what moved since the last average that travels, and what is not sent waits for the next one.
  S is then measured from the model that all ranks go on with, so what was not sent is part of it, in C2 as well.

Legend: D numbers of all parameters, P ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, NoReturn, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import ModelAverager

from milkglass.compression.error_feedback import ErrorFeedback
from milkglass.compression.vector import VectorCompressor
from milkglass.errors import MilkglassError, RecipeError, RunError
from milkglass.training.exchange import Exchanged, average, finite
from milkglass.training.pulse import Pulse

CEILING: Final = 64  # ours: with it, models cost 1/64 of an average after each step, and little is left to save
SAMPLING_STEPS: Final = 1000  # ours, for who does not know how many steps there will be

Phase = Literal["every step", "sampling", "adapting"]
Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


@dataclass(frozen=True)
class Course:
    """Where a period has got to. period: in steps, 1 at first. c2: the mean of S / gamma, of `samples` of them."""

    period: int = 1
    c2: float = 0.0
    samples: int = 0


@final
@dataclass(frozen=True)
class PeriodRule:
    """How the period follows from S and the learning rate: a function, from a `Course` to the next one.

    Steps count from the end of the warm-up. Settings: see `AdaptivePeriodicAverager`. Raises RecipeError.
    """

    initial_period: int = 4
    low: float = 0.7
    high: float = 1.3
    floor: int = 1
    ceiling: int = CEILING
    sampling_steps: int = SAMPLING_STEPS
    every_step_for: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.floor <= self.initial_period <= self.ceiling:
            periods = f"floor is {self.floor}, initial_period {self.initial_period}, ceiling {self.ceiling}"
            raise RecipeError(f"{periods}; expected 1 <= floor <= initial_period <= ceiling")
        if not 0 <= self.low < self.high < math.inf:
            raise RecipeError(f"low is {self.low}, high {self.high}; expected 0 <= low < high")
        if not 1 <= self.every_step_for < self.sampling_steps:
            steps = f"every_step_for is {self.every_step_for}, sampling_steps {self.sampling_steps}"
            raise RecipeError(f"{steps}; expected 1 <= every_step_for < sampling_steps")

    def phase(self, course: Course, step: int) -> Phase:
        """What the average after that step (from 0) is for."""
        if step < self.every_step_for:
            return "every step"
        if course.samples >= max(1, (self.sampling_steps - self.every_step_for) // self.initial_period):
            return "adapting"
        # Another period than the first one: an averager that was given a step to go on from, but no state.
        return "sampling" if course.period == self.initial_period else "every step"

    def after(self, course: Course, step: int, variance: float, learning_rate: float) -> Course:
        """The course after the average that followed `step` (from 0). variance: S, finite. learning_rate: gamma."""
        phase = self.phase(course, step)
        if phase == "every step":
            return replace(course, period=1 if step + 1 < self.every_step_for else self.initial_period)
        if not learning_rate:
            return course
        if phase == "sampling":
            samples = course.samples + 1
            return replace(course, c2=course.c2 + (variance / learning_rate - course.c2) / samples, samples=samples)
        bound, period = learning_rate * course.c2, course.period
        if variance < self.low * bound:
            period = min(self.ceiling, period + 1)
        elif variance > self.high * bound:
            period = max(self.floor, period - 1)
        return replace(course, period=period)


@dataclass(frozen=True)
class Sync:
    """One average. step: after which, from 0, the warm-up included. period: how many steps it ended.

    variance: S. bound: gamma C2, to which S is compared; None before there is a sample. next_period: in steps.
    exchanged: where a compressor was used, what this rank sent.
    """

    step: int
    period: int
    variance: float
    learning_rate: float
    bound: float | None
    phase: Phase
    next_period: int
    exchanged: Exchanged | None = None


@final
class AdaptivePeriodicAverager(ModelAverager):
    """Averages models after every period of steps, as torch's PeriodicModelAverager, and adapts the period to them.

    initial_period: steps, in the sampling phase. low, high: thresholds, in units of gamma C2. floor, ceiling: of the
    period. sampling_steps: where the sampling phase ends, in steps after the warm-up; published is a quarter of all
    steps. Averages at a learning rate of 0 do not count. warmup_steps: as in torch: no averages, as gradients are
    averaged elsewhere. every_step_for: steps after the warm-up with an average after each; in the paper an epoch.
    learning_rate: a number, or a function that tells it; None: that of the parameter groups; of different ones the
    mean, weighted by numbers of parameters. It must be the same at all ranks, as each follows the rule by itself.
    compressor: of what moved; None: whole models travel. process_group: whose ranks take part; None: all. log: is given
    each `Sync`. Raises RecipeError.

    With floor = ceiling = initial_period it is a PeriodicModelAverager, bit for bit where each parameter has a
    gradient. torch leaves out those without. Here all that require one are averaged, in place: what has not moved here
    may have moved elsewhere, and ranks that leave out different ones would add up what does not belong together.
    With one rank nothing is sent: S and C2 are 0, neither threshold is passed, and the period stays the initial one.
    """

    def __init__(
        self,
        *,
        initial_period: int = 4,
        low: float = 0.7,
        high: float = 1.3,
        floor: int = 1,
        ceiling: int = CEILING,
        sampling_steps: int = SAMPLING_STEPS,
        warmup_steps: int = 0,
        every_step_for: int = 1,
        learning_rate: float | Callable[[], float] | None = None,
        compressor: VectorCompressor | None = None,
        process_group: dist.ProcessGroup | None = None,
        log: Callable[[Sync], None] | None = None,
    ) -> None:
        self.rule = PeriodRule(initial_period, low, high, floor, ceiling, sampling_steps, every_step_for)
        if warmup_steps < 0:
            raise RecipeError(f"warmup_steps is {warmup_steps}; expected 0 or more")
        if not dist.is_initialized():
            raise RecipeError("no process group to average models in: call torch.distributed.init_process_group first")
        super().__init__(process_group)
        self.warmup_steps = warmup_steps
        self._learning_rate, self._compressor, self._log = learning_rate, compressor, log
        self._ranks = dist.get_world_size(process_group)
        self._course = Course()
        self._since = 0  # steps since the last average
        self._shapes: list[tuple[int, ...]] = []
        self._loaded = False  # the shapes are those of a state, and were compared with no parameters yet
        self._reference_D: Tensor | None = None  # with a compressor: where all ranks went on from
        self._feedback: ErrorFeedback | None = None
        self._pulse = Pulse.of_default_group() if self._ranks > 1 else None

    @property
    def period(self) -> int:
        """The steps between the last average and the next, or before the first one."""
        return self._course.period

    @torch.no_grad()
    def average_parameters(self, params: Parameters) -> None:
        """Count a step and, where it ends a period, set the parameters to their mean over the ranks.

        params: parameters of a model, or parameter groups of an optimizer. All ranks call it equally often; with a
        gradient scaler that skips steps, call it next to the scaler's step, not in it.

        Raises RecipeError where nothing tells a learning rate; MilkglassError, at all ranks and with all parameters as
        they were, where a rank's are not finite (with a compressor, go on from a state: what was left over is not as it
        was); LinkError where a rank is gone; RunError for parameters that are not those of the state.
        """
        sync = None
        if self.step >= self.warmup_steps and self._ranks > 0:
            due = self._since + 1 >= self._course.period
            if due or self._loaded:
                tensors, rate = _given(params)
                self._check(tensors)
                if due:
                    sync = self._sync(tensors, self._rate(rate))
            self._since = 0 if due else self._since + 1
        self.step += 1
        if sync is not None and self._log is not None:
            self._log(sync)

    def state_dict(self) -> dict[str, Tensor]:
        """What this rank needs to go on in the same bits; each rank keeps its own. Parameters are known by position."""
        course, told = self._course, dict[str, Tensor]()
        numbers: dict[str, float] = {"step": self.step, "since": self._since, "c2": course.c2}
        numbers |= {"period": course.period, "samples": course.samples}
        if self._reference_D is not None and self._feedback is not None:
            told |= {"reference": self._reference_D.clone(), "left": self._feedback.left_D.clone()}
            if self._feedback.hint is not None:
                numbers["hint"] = self._feedback.hint
        told |= {name: torch.tensor(number, dtype=torch.float64) for name, number in numbers.items()}
        return told | {f"shape.{place}": torch.tensor(shape).long() for place, shape in enumerate(self._shapes)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken, within the floor and the ceiling of this averager.

        Raises RunError, and changes nothing, where it is no state, or one with a compressor and here is none. Whether
        it is of this model shows at the next `average_parameters`, which says what differs.
        """
        for name in ("step", "since", "period", "samples", "c2"):
            if name not in state:
                raise RunError(f"state of an averager: {name} is missing; expected what state_dict returned")
        shapes: list[tuple[int, ...]] = []
        while (key := f"shape.{len(shapes)}") in state:
            shapes.append(tuple(state[key].tolist()))
        numbers = sum(map(math.prod, shapes))
        vectors = [state[name] for name in ("reference", "left") if name in state]
        if vectors and self._compressor is None:
            raise RunError("state of an averager with a compressor; expected one without, for here is none")
        if vectors and [vector.shape for vector in vectors] != [(numbers,)] * 2:
            raise RunError(f"state of an averager: reference and left do not both have shape ({numbers},)")
        self._reference_D = self._feedback = None
        if vectors and self._compressor is not None:
            self._reference_D, left_D = (vector.clone() for vector in vectors)
            self._feedback = ErrorFeedback(self._compressor, left_D)
            self._feedback.hint = float(state["hint"]) if "hint" in state else None
        period = min(max(int(state["period"]), self.rule.floor), self.rule.ceiling)
        self._course = Course(period, float(state["c2"]), int(state["samples"]))
        self.step, self._since = int(state["step"]), int(state["since"])
        self._shapes, self._loaded = shapes, bool(shapes)

    def _check(self, tensors: Sequence[Tensor]) -> None:
        """Compare the parameters with those that the state is of. Without one they may change, as layers are thawed."""
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if self._loaded or self._reference_D is not None:
            if len(shapes) != len(self._shapes):
                raise RunError(f"state of another model: of {len(self._shapes)} parameters; here are {len(shapes)}")
            for place, (known, found) in enumerate(zip(self._shapes, shapes, strict=True)):
                if known != found:
                    raise RunError(f"state of another model: its parameter {place} has shape {known}; here {found}")
        if self._loaded and self._reference_D is not None and self._feedback is not None:
            self._reference_D = self._reference_D.to(tensors[0].device, _wide(tensors))
            self._feedback.left_D = self._feedback.left_D.to(tensors[0].device, _wide(tensors))
        self._shapes, self._loaded = shapes, False

    def _rate(self, of_groups: float | None) -> float:
        told = self._learning_rate
        rate = of_groups if told is None else float(told() if callable(told) else told)
        if rate is None:
            raise RecipeError("averaging: no learning rate; expected learning_rate, or parameter groups with an lr")
        if not 0 <= rate < math.inf:
            raise RecipeError(f"averaging: the learning rate is {rate}; expected a finite number from 0")
        return rate

    def _sync(self, tensors: Sequence[Tensor], rate: float) -> Sync:
        variance, exchanged = 0.0, None
        if self._pulse is not None:
            with self._pulse.naming_the_missing():
                variance, exchanged = self._average(tensors)
        before, step = self._course, self.step - self.warmup_steps
        phase, bound = self.rule.phase(before, step), rate * before.c2 if before.samples else None
        self._course = self.rule.after(before, step, variance, rate)
        return Sync(self.step, before.period, variance, rate, bound, phase, self._course.period, exchanged)

    def _average(self, tensors: Sequence[Tensor]) -> tuple[float, Exchanged | None]:
        """Set the parameters to their mean; tell S."""
        if self._reference_D is None or self._feedback is None:
            mean_D, exchanged = self._mean(tensors), None
        else:
            mean_D = _moved(tensors, self._reference_D)  # of this rank, as yet
            exchanged = average(self._feedback, mean_D, self.process_group)
            mean_D.add_(self._reference_D)
        spread = squared_distance(tensors, mean_D).div_(self._ranks)
        dist.all_reduce(spread, group=self.process_group)
        variance = spread.item()
        if not math.isfinite(variance):  # at all ranks, so all may talk once more
            self._refuse(tensors)
        _set(tensors, mean_D)
        if self._compressor is not None:
            self._reference_D = mean_D.to(_wide(tensors))
            if self._feedback is None:
                self._feedback = ErrorFeedback(self._compressor, torch.zeros_like(self._reference_D))
        return variance, exchanged

    def _mean(self, tensors: Sequence[Tensor]) -> Tensor:
        """(D,), of all ranks: the same operations as in torch's model_averaging.utils, so the same bits."""
        mean_D = _flat(tensors).div_(self._ranks)
        if not mean_D.is_cpu:  # no other group's operation may still be under way
            torch.accelerator.synchronize()
        dist.all_reduce(mean_D, group=self.process_group)
        return mean_D

    def _refuse(self, tensors: Sequence[Tensor]) -> NoReturn:
        """Name the ranks whose parameters are not finite."""
        broken_P = torch.zeros(self._ranks, device=tensors[0].device)
        broken_P[dist.get_rank(self.process_group)] = not all(map(finite, tensors))
        dist.all_reduce(broken_P, group=self.process_group)
        broken = [dist.get_global_rank(self.process_group, rank) for rank in broken_P.nonzero().flatten().tolist()]
        what = "the ranks' parameters lie so far apart that their distance has no number"
        if broken:
            what = f"parameters of rank{'s' * (len(broken) > 1)} {', '.join(map(str, broken))} are NaN or infinite"
        raise MilkglassError(f"averaging after step {self.step}: {what}; nothing was averaged")


@torch.no_grad()
def average_buffers(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Average the buffers of `model` over the ranks: the statistics of BatchNorm, before evaluation or saving.

    Floats: the plain mean; for statistics of the averaged model itself there is torch.optim.swa_utils.update_bn.
    int64, as BatchNorm's count of batches: the largest of any rank. Others stay. All ranks call it.
    """
    if not dist.is_initialized() or (ranks := dist.get_world_size(group)) <= 1:
        return
    floats = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    counts = [buffer for buffer in model.buffers() if buffer.dtype == torch.int64]
    for buffers, operation in ((floats, dist.ReduceOp.SUM), (counts, dist.ReduceOp.MAX)):
        if buffers:
            flat_D = _flat(buffers)
            dist.all_reduce(flat_D, op=operation, group=group)
            _set(buffers, flat_D / ranks if buffers is floats else flat_D)


def squared_distance(tensors: Sequence[Tensor], point_D: Tensor) -> Tensor:
    """||w - w'||^2 as a float64 scalar: of tensors and a vector of as many numbers.

    One pass over memory, on a CPU in chunks that stay in cache; their sums are added in float64.
    """
    wide, length = _wide(tensors), _CHUNK if point_D.is_cpu else len(point_D)
    sums: list[Tensor] = []
    for tensor, part in zip(tensors, _parted(point_D, tensors), strict=True):
        chunks = torch.split(tensor.detach().reshape(-1), length)
        for own, other in zip(chunks, torch.split(part, length), strict=True):
            apart = own.to(wide) - other
            sums.append(torch.dot(apart, apart))
    return torch.stack(sums).double().sum()


_CHUNK: Final = 1 << 17


def _given(params: Parameters) -> tuple[list[Tensor], float | None]:
    """The parameters that require a gradient, and the mean learning rate of their groups, if those tell one."""
    tensors: list[Tensor] = []
    weighted, known = 0.0, True
    for entry in params:
        if not isinstance(entry, Tensor | dict):
            raise RecipeError(f"averaging: cannot average {type(entry).__name__}; expected parameters or their groups")
        group: dict[str, Any] = entry if isinstance(entry, dict) else {"params": [entry]}
        mine = [tensor for tensor in group["params"] if tensor.requires_grad]
        tensors += mine
        known = known and "lr" in group
        weighted += float(group.get("lr", 0.0)) * sum(map(torch.numel, mine))
    numbers = sum(map(torch.numel, tensors))
    if not numbers:
        raise RecipeError("averaging: no parameter requires a gradient; expected at least one")
    return tensors, weighted / numbers if known else None


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _moved(tensors: Sequence[Tensor], reference_D: Tensor) -> Tensor:
    """(D,): how far the parameters are from where the last average put them: at the reference, in their own dtype."""
    wide, starts = reference_D.dtype, zip(tensors, _parted(reference_D, tensors), strict=True)
    return _flat(own.detach().reshape(-1).to(wide) - start.to(own.dtype).to(wide) for own, start in starts)


def _wide(tensors: Sequence[Tensor]) -> torch.dtype:
    """What distances are computed in, and what is left over is kept in."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _set(tensors: Sequence[Tensor], flat_D: Tensor) -> None:
    for tensor, part in zip(tensors, _parted(flat_D, tensors), strict=True):
        tensor.copy_(part.view(tensor.shape))


def _parted(flat_D: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.split(flat_D, [tensor.numel() for tensor in tensors])
