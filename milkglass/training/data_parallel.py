"""Compressed gradients for torch's DistributedDataParallel: GaussianK-SGD (Shi, Chu, Cheung, See 2019, arXiv
1911.08772) as a communication hook, and the same for any other compressor.

    ddp.register_comm_hook(GaussianKState(density=0.001), gaussian_k_hook)

What is not sent stays at its rank and goes out with a later step (error feedback). It is kept by parameter:
DistributedDataParallel parts parameters into buckets, and parts them anew after the first step. `flat=True` takes one
threshold over all gradients, as the paper does, in an order of its own that no bucket changes; otherwise each bucket
has its own threshold, and travels while the backward pass goes on.

Where we differ from the paper: see `gaussian_k.py` for the threshold, `exchange.py` for the way over the wire. Warm-up
counts steps, as a hook does not know of epochs. Momentum correction (Lin et al. 2018) is an option, and off.

A gradient that is not finite at any rank becomes NaN at all, as it would without compression, and what is left over
stays finite: the gradient scaler of mixed precision then skips the step, and others see it in `report.broken`. What the
other ranks had of that step waits with what is left over, and goes out later.

Legend: D numbers of a bucket, or of all of them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from milkglass.compression.base import FLOATS
from milkglass.compression.error_feedback import ErrorFeedback
from milkglass.compression.gaussian_k import GaussianK
from milkglass.compression.topk import ExactTopK
from milkglass.compression.vector import VectorCompressor, check_density
from milkglass.errors import RecipeError, RunError
from milkglass.training.exchange import Exchange, Exchanged
from milkglass.training.pulse import Pulse, keep

DENSITY: Final = 0.001
"""The share of gradients that the paper sends."""
Warmup = Sequence[tuple[int, float]]
"""(steps, density) one after the other, before the density proper."""


@dataclass(frozen=True)
class StepReport:
    """What one step sent of this rank's gradients. step: from 0. vectors: an `Exchanged` for each bucket."""

    step: int
    vectors: tuple[Exchanged, ...]

    @property
    def numbers(self) -> int:
        """How many gradients there are."""
        return sum(vector.numbers for vector in self.vectors)

    @property
    def sent(self) -> int:
        """How many of them this rank sent."""
        return sum(vector.sent for vector in self.vectors)

    @property
    def left_share(self) -> float:
        """||u - C(u)||^2 / ||u||^2, u gradient and what was left before, C(u) what is sent: 0 = all of it, 1 = none."""
        before = sum(vector.before for vector in self.vectors)
        share = sum(vector.left for vector in self.vectors) / before if before else 0.0
        return share if math.isfinite(share) else math.nan

    @property
    def broken(self) -> tuple[int, ...]:
        """The ranks whose gradients were not finite."""
        return tuple(sorted({rank for vector in self.vectors for rank in vector.broken}))


@dataclass
class _Slot:
    """A bucket's parameters, in its order, and what is left over of them."""

    parameters: tuple[Tensor, ...]
    feedback: ErrorFeedback


@dataclass
class _OnTheWay:
    """What was begun and is not finished: whose results wait for it."""

    exchange: Exchange
    slot: _Slot
    waiting: list[tuple[Tensor, torch.futures.Future[Tensor]]]
    flat_D: Tensor
    held: list[tuple[Tensor, Tensor]]
    sent: bool = field(default=False)


class GradientState(ABC):
    """What a hook remembers from step to step, at one rank. A state serves one DistributedDataParallel.

    density: the share of gradients sent. warmup: densities of the first steps. flat: one threshold over all gradients.
    momentum: above 0 momentum correction, for an SGD optimizer that has none of its own. scaler: the gradient scaler of
    mixed precision, if there is one: what is left over is kept in its scale. group: whose ranks take part; None: all.
    Raises RecipeError for a density that is not above 0 and at most 1, or a warm-up without steps.
    """

    def __init__(
        self,
        density: float = DENSITY,
        *,
        warmup: Warmup = (),
        flat: bool = False,
        momentum: float = 0.0,
        scaler: torch.amp.GradScaler | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.density = check_density(density)
        for steps, share in warmup:
            check_density(share)
            if steps < 1:
                raise RecipeError(f"warmup: {steps} steps with density {share}; expected at least one")
        if not 0 <= momentum < 1:
            raise RecipeError(f"momentum is {momentum}; expected a number from 0, below 1")
        self.warmup = tuple(warmup)
        self.flat = flat
        self.momentum = momentum
        self.step = 0
        self.report: StepReport | None = None
        self._group, self._scaler = group, scaler
        self._scale = 1.0
        self._compressor: tuple[float, VectorCompressor] | None = None
        self._slots: dict[tuple[int, ...], _Slot] = {}
        self._left: dict[Tensor, Tensor] = {}  # by parameter, views of the slots'
        self._velocity: dict[Tensor, Tensor] = {}
        self._flat_hint: float | None = None
        self._under_way: list[_OnTheWay] = []
        self._seen: list[tuple[tuple[Tensor, ...], Tensor, torch.futures.Future[Tensor]]] = []
        self._pulse: Pulse | None = None

    @abstractmethod
    def compressor(self, density: float) -> VectorCompressor:
        """What sends that share of a vector."""

    @final
    @property
    def density_now(self) -> float:
        """The density of the step to come."""
        before = 0
        for steps, density in self.warmup:
            before += steps
            if self.step < before:
                return density
        return self.density

    @final
    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """What this rank needs to go on, by the names of the parameters of `model`; each rank keeps its own.

        model: as DistributedDataParallel wraps it, or was given it.
        """
        told = {"step": torch.tensor(self.step)}
        if self._flat_hint is not None:
            told["hint"] = torch.tensor(self._flat_hint, dtype=torch.float64)
        for kind, tensors in (("left", self._left), ("velocity", self._velocity)):
            told |= {f"{kind}.{name}": tensors[p] / self._scale for name, p in _named(model).items() if p in tensors}
        return told

    @final
    def load_state_dict(self, state: Mapping[str, Tensor], model: nn.Module) -> None:
        """Go on where `state` was taken. Raises RunError, and changes nothing, where it is not one of this model."""
        parameters = _named(model)
        found: dict[str, dict[Tensor, Tensor]] = {"left": {}, "velocity": {}}
        for key, tensor in state.items():
            kind, _, name = key.partition(".")
            if kind not in found:
                continue
            if name not in parameters:
                raise RunError(f"state of another model: it has left over gradients of {name}, a parameter not here")
            if tensor.shape != parameters[name].shape:
                raise RunError(
                    f"state of another model: left over gradients of {name} have shape {tuple(tensor.shape)}; "
                    f"expected {tuple(parameters[name].shape)}"
                )
            found[kind][parameters[name]] = tensor.clone()
        if "step" not in state:
            raise RunError("state of gradient compression: step is missing; expected what state_dict returned")
        self.step = int(state["step"])
        self._scale = 1.0
        self._flat_hint = float(state["hint"]) if "hint" in state else None
        self._left, self._velocity = found["left"], found["velocity"]
        self._slots = {}

    @final
    def take_in(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        """What the hook does: begin with a bucket, go on with those before, and after the last one finish all."""
        if self._pulse is None and dist.get_world_size(self._group) > 1:
            self._pulse = Pulse.of_default_group()
            keep(self._group)
        if bucket.buffer().is_sparse or bucket.buffer().dtype not in FLOATS:
            kind = "sparse" if bucket.buffer().is_sparse else bucket.buffer().dtype
            raise RecipeError(f"gradients are {kind}; expected dense floats, as of nn.Embedding(..., sparse=False)")
        future: torch.futures.Future[Tensor] = torch.futures.Future(
            devices=[bucket.buffer().device] if bucket.buffer().is_cuda else []
        )
        self._rescale()
        waiting = (tuple(bucket.parameters()), bucket.buffer(), future)
        if self._pulse is None:
            self._advance(waiting, last=bucket.is_last())
        else:
            with self._pulse.naming_the_missing():
                self._advance(waiting, last=bucket.is_last())
        return future

    def _advance(self, waiting: tuple[tuple[Tensor, ...], Tensor, torch.futures.Future[Tensor]], *, last: bool) -> None:
        if self.flat:
            self._seen.append(waiting)
            if last:
                self._begin_flat()
        else:
            parameters, buffer, future = waiting
            self._begin(parameters, buffer, [(buffer, future)])
        for begun in self._under_way[: None if last else -1]:
            if not begun.sent:
                begun.exchange.send()
                begun.sent = True
        if last:
            self._finish()

    def _begin_flat(self) -> None:
        """All buckets as one vector, in the order in which parameters were first seen, whatever bucket has them now."""
        gradients: dict[Tensor, Tensor] = {}
        for parameters, buffer, _ in self._seen:
            gradients |= dict(zip(parameters, _parted(buffer, parameters), strict=True))
        known = [slot.parameters for slot in self._slots.values() if gradients.keys() == set(slot.parameters)]
        order = known[0] if known else tuple(gradients)
        flat_D = torch.cat([gradients[parameter] for parameter in order])
        self._begin(order, flat_D, [(buffer, future) for _, buffer, future in self._seen])

    def _begin(
        self,
        parameters: tuple[Tensor, ...],
        flat_D: Tensor,
        waiting: list[tuple[Tensor, torch.futures.Future[Tensor]]],
    ) -> None:
        slot = self._slot(parameters, flat_D)
        held = _held_back(slot, flat_D)
        exchange = Exchange(slot.feedback, flat_D, self._group)
        exchange.start()
        self._under_way.append(_OnTheWay(exchange, slot, waiting, flat_D, held))

    def _finish(self) -> None:
        vectors = []
        for begun in self._under_way:
            vectors.append(begun.exchange.finish())
            for kept, before in begun.held:
                kept.add_(before)
            if self.flat:
                parameters = begun.slot.parameters
                self._flat_hint = begun.slot.feedback.hint
                means = dict(zip(parameters, _parted(begun.flat_D, parameters), strict=True))
                for parameters, buffer, _ in self._seen:
                    torch.cat([means[parameter] for parameter in parameters], out=buffer)
            for buffer, future in begun.waiting:
                future.set_result(buffer)
        self._under_way, self._seen = [], []
        self.report = StepReport(self.step, tuple(vectors))
        self.step += 1

    def _slot(self, parameters: tuple[Tensor, ...], buffer_D: Tensor) -> _Slot:
        """Where that is left over which belongs to these parameters: moved here from where it was, if they are new."""
        key = tuple(map(id, parameters))
        slot = self._slots.get(key)
        if slot is None:
            wide = buffer_D.dtype if buffer_D.dtype == torch.float64 else torch.float32
            left_D = torch.zeros(len(buffer_D), dtype=wide, device=buffer_D.device)
            slot = _Slot(parameters, ErrorFeedback(self._compressor_now(), left_D, self.momentum))
            for flat_D, own in ((left_D, self._left), (slot.feedback.velocity_D, self._velocity)):
                if flat_D is not None:
                    _move(flat_D, parameters, own)
            if self.flat:
                slot.feedback.hint = self._flat_hint
            mine = set(parameters)
            self._slots = {k: old for k, old in self._slots.items() if mine.isdisjoint(old.parameters)}
            self._slots[key] = slot
        if slot.feedback.compressor is not self._compressor_now():
            slot.feedback.compressor, slot.feedback.hint = self._compressor_now(), None
        return slot

    def _compressor_now(self) -> VectorCompressor:
        density = self.density_now
        if self._compressor is None or self._compressor[0] != density:
            self._compressor = density, self.compressor(density)
        return self._compressor[1]

    def _rescale(self) -> None:
        """At a step's first bucket: what is left over follows the gradient scaler."""
        if self._scaler is None or self._under_way or self._seen:
            return
        scale = float(self._scaler.get_scale())
        if scale != self._scale:
            for kept in (*self._left.values(), *self._velocity.values()):
                kept.mul_(scale / self._scale)
            self._scale = scale


@final
class GaussianKState(GradientState):
    """Sends about the largest gradients, by a threshold from their mean and spread (`gaussian_k.py`)."""

    def compressor(self, density: float) -> VectorCompressor:
        return GaussianK(density)


@final
class TopKState(GradientState):
    """Sends exactly the largest gradients: slower to find, the same in effect."""

    def compressor(self, density: float) -> VectorCompressor:
        return ExactTopK(density)


# torch compares the annotations with the classes themselves, so this file does not put them off.
def gaussian_k_hook(
    state: GradientState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """The communication hook for `GaussianKState`, and for any other `GradientState`.

    Raises LinkError, at all ranks that are left, with the names of those that are gone.
    """
    return state.take_in(bucket)


def _held_back(slot: _Slot, flat_D: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Set what is left over of parameters without any gradient to zero; (where it was, what it was).

    torch takes a parameter that no rank has used (`find_unused_parameters`) out of the bucket's results: what would be
    sent for it would be lost.
    """
    feedback, held = slot.feedback, []
    kept_D = [kept for kept in (feedback.left_D, feedback.velocity_D) if kept is not None]
    for place, gradient in enumerate(_parted(flat_D, slot.parameters)):
        if gradient[:1].any() or gradient.any():  # mostly the first number tells
            continue
        for kept in (_parted(each, slot.parameters)[place] for each in kept_D):
            if kept.any():
                held.append((kept, kept.clone()))
                kept.zero_()
    return held


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return dict(inner.named_parameters())


def _parted(flat_D: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The part of each parameter, flat, in the order of the vector."""
    return list(torch.split(flat_D, [parameter.numel() for parameter in parameters]))


def _move(flat_D: Tensor, parameters: Sequence[Tensor], own: dict[Tensor, Tensor]) -> None:
    """Copy what there is of each parameter into its part of `flat_D`, and keep that part from now on."""
    for parameter, part in zip(parameters, _parted(flat_D, parameters), strict=True):
        if parameter in own:
            part.copy_(own[parameter].flatten())
        own[parameter] = part.view(parameter.shape)
