"""Gradient inversion: records from the gradients, or the step, that a party shared in federated or parallel training.

Legend: B records of the shared batch, K classes, F values of a record, O outputs of a layer, I inputs of a layer;
trailing `...` is any shape.

Three ways, the surest first.
- Labels: where the loss is mean cross-entropy, the last layer's bias gradient is mean(p - y), so for one record its
  only negative entry is the label (iDLG: Zhao, Mopuri and Bilen 2020, arXiv 2001.02610). For several records the most
  negative entry is taken, 1 / B is added there, and so on: an estimate, good while the network is still uncertain.
- Closed form: behind a first fully connected layer with bias, dL/dW = dL/db x', so one record is read off exactly.
- Descent: records whose gradients have the least cosine distance to those shared, with total variation, by Adam on
  signs (Geiping, Bauermeister, Droege and Moeller, NeurIPS 2020, arXiv 2003.14053). Where we differ: it starts from
  grey once and then from noise, the best is kept, and there are fewer steps than their 24,000.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from milkglass.attacks.base import Method, Tick, silent
from milkglass.attacks.unsplit import total_variation
from milkglass.errors import AuditError
from milkglass.randomness import public_source
from milkglass.transcript import Known

EXACT: Final = 1e-4
"""A record in closed form is believed if its gradients have at most this cosine distance to those shared."""
DECAYS: Final = (3 / 8, 5 / 8, 7 / 8)
"""At these shares of all steps the step becomes a tenth, as in the paper."""


@dataclass(frozen=True, eq=False)
class GradientView:
    """What a party sees that is sent gradients: of the mean cross-entropy of `count` records, one a parameter.

    model: as it was when the gradients were computed; records (B, *record_shape) -> logits (B, K). labels: (B,) int64
    where they are known. value_range: the least and the largest value a record may have.
    """

    model: nn.Module
    gradients: tuple[Tensor, ...]
    record_shape: tuple[int, ...]
    classes: int
    count: int
    labels: Tensor | None = None
    value_range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        shapes = [tuple(parameter.shape) for parameter in self.model.parameters()]
        given = [tuple(gradient.shape) for gradient in self.gradients]
        if shapes != given:
            first = next((i for i, pair in enumerate(zip(shapes, given, strict=False)) if pair[0] != pair[1]), None)
            where = f"number {first} has shape {given[first]}" if first is not None else f"there are {len(given)}"
            expected = shapes[first] if first is not None else len(shapes)
            raise AuditError(f"gradients: {where}; expected {expected}, as the model's parameters in order")
        if not all(bool(torch.isfinite(gradient).all()) for gradient in self.gradients):
            raise AuditError("gradients: not all values are finite (NaN or infinity)")
        if self.count < 1 or (self.labels is not None and self.labels.shape != (self.count,)):
            raise AuditError(f"gradient view: count = {self.count}; expected at least 1, and a label for each record")
        if not self.value_range[0] < self.value_range[1]:
            raise AuditError(f"gradient view: value_range = {self.value_range}; expected (least, largest)")


@dataclass(frozen=True, eq=False)
class GradientReconstruction:
    """Records (B, ...) and their labels (B,), in no particular order where the labels were not known.

    distance: cosine distance of their gradients to those shared, 0 to 2; lower = explains more of what was shared.
    """

    records: Tensor
    labels: Tensor
    distance: float
    seconds: float


def shared_gradients(model: nn.Module, records: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """The gradients of mean cross-entropy that a party shares for (B, ...) records and (B,) labels; model unchanged."""
    return tuple(gradient.detach() for gradient in _gradients(model, records, labels))


def gradients_from_step(before: Sequence[Tensor], after: Sequence[Tensor], learning_rate: float) -> tuple[Tensor, ...]:
    """The gradients behind one plain step of descent: (before - after) / learning_rate, parameter by parameter.

    Exact for one local step without momentum (federated averaging); after several steps, their mean times their number.
    """
    if len(before) != len(after) or any(one.shape != other.shape for one, other in zip(before, after, strict=True)):
        raise AuditError("parameters before and after a step do not match; expected the same shapes in the same order")
    if not learning_rate > 0:
        raise AuditError(f"learning_rate = {learning_rate}; expected a positive one")
    return tuple((one.detach() - other.detach()) / learning_rate for one, other in zip(before, after, strict=True))


def restore_labels(view: GradientView) -> Tensor:
    """The labels (B,) of the batch from the last layer's gradient: exact for one record, an estimate for several.

    Without a bias there, rows of the weight's gradient are summed, which asks for inputs that are not negative (behind
    a ReLU) and for one record. Raises AuditError where the last layer cannot be read.
    """
    named = [name for name, _ in view.model.named_parameters()]
    last = view.gradients[-1]
    if last.shape == (view.classes,) and named[-1].endswith("bias"):
        slope_K = last.clone()
    elif last.ndim == 2 and len(last) == view.classes and view.count == 1:
        slope_K = last.sum(1)
    else:
        raise AuditError(
            f"labels cannot be read from the last layer ({named[-1]}, shape {tuple(last.shape)}); expected a bias of "
            f"{view.classes} classes, or for one record a weight with a row for each; or give `labels`"
        )
    labels = []
    for _ in range(view.count):
        labels.append(int(slope_K.argmin()))
        slope_K[labels[-1]] += 1 / view.count
    return torch.tensor(labels)


def closed_form(view: GradientView) -> Tensor | None:
    """One record (1, ...) behind a first fully connected layer with bias, exactly; None where there is no such layer.

    Every output's weight gradient is its bias gradient times the record; they are joined by least squares.
    """
    layer = next((module for module in view.model.modules() if list(module.parameters(recurse=False))), None)
    if view.count != 1 or not isinstance(layer, nn.Linear) or layer.bias is None:
        return None
    if layer.in_features != math.prod(view.record_shape):
        return None
    weight_OI, bias_O = view.gradients[0].double(), view.gradients[1].double()
    if not bool(bias_O.any()):  # no unit of the layer was awake
        return None
    record_I = bias_O @ weight_OI / bias_O.square().sum()
    return record_I.to(view.gradients[0].dtype).reshape(1, *view.record_shape)


@final
class GradientInversion(Method):
    """Closed form where it explains the gradients; else signed descent on their cosine distance.

    steps: of Adam, from each start. starts: the first from grey, the others from noise. smoothness: weight of total
    variation. rate: the first step, in units of the records' range.
    """

    name: ClassVar[str] = "gradient inversion"
    knows: ClassVar[tuple[Known, ...]] = ("gradients", "client weights", "server weights")
    paper: ClassVar[str] = "Geiping et al., NeurIPS 2020, arXiv 2003.14053; Zhao et al. 2020, arXiv 2001.02610"

    def __init__(
        self, steps: int = 1000, starts: int = 2, smoothness: float = 1e-3, rate: float = 0.1, seed: int = 0
    ) -> None:
        if min(steps, starts) < 1 or smoothness < 0 or rate <= 0:
            raise AuditError(
                f"gradient inversion: steps = {steps}, starts = {starts}, smoothness = {smoothness}, rate = {rate}; "
                "expected at least one step and start, no negative smoothness, a positive rate"
            )
        self._steps, self._starts, self._smoothness, self._rate, self._seed = steps, starts, smoothness, rate, seed

    def __repr__(self) -> str:
        return (
            f"GradientInversion(steps={self._steps}, starts={self._starts}, smoothness={self._smoothness}, "
            f"rate={self._rate}, seed={self._seed})"
        )

    def attack(self, view: GradientView, tick: Tick = silent) -> GradientReconstruction:
        """Rebuild the batch behind the view's gradients."""
        begun = time.perf_counter()
        labels_B = view.labels if view.labels is not None else restore_labels(view)
        exact = closed_form(view)
        if exact is not None:
            distance = _distance(view, exact, labels_B).item()
            if distance <= EXACT:
                return GradientReconstruction(exact, labels_B, distance, time.perf_counter() - begun)
        best: tuple[float, Tensor] | None = None
        for number, start in enumerate(self._begin(view)):
            x_B = self._descend(view, start, labels_B, number, tick)
            distance = _distance(view, x_B, labels_B).item()
            if best is None or distance < best[0]:
                best = distance, x_B
        assert best is not None  # there is at least one start
        return GradientReconstruction(best[1], labels_B, best[0], time.perf_counter() - begun)

    def _begin(self, view: GradientView) -> Iterator[Tensor]:
        low, high = view.value_range
        generator = public_source(self._seed).generator("gradient inversion")
        grey = torch.full((view.count, *view.record_shape), (low + high) / 2, dtype=view.gradients[0].dtype)
        for number in range(self._starts):
            noise = torch.randn(grey.shape, generator=generator, dtype=grey.dtype)
            yield grey + (high - low) * (0.01 if number == 0 else 0.25) * noise  # never quite alike: records part ways

    def _descend(self, view: GradientView, start: Tensor, labels_B: Tensor, number: int, tick: Tick) -> Tensor:
        low, high = view.value_range
        x_B = start.clamp(low, high).requires_grad_()
        optimizer = torch.optim.Adam([x_B], lr=self._rate * (high - low))
        milestones = [round(share * self._steps) for share in DECAYS]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
        for step in range(1, self._steps + 1):
            loss = _distance(view, x_B, labels_B)
            if len(view.record_shape) == 3:
                loss = loss + self._smoothness * total_variation(x_B)
            (slope_B,) = torch.autograd.grad(loss, [x_B])
            x_B.grad = slope_B.sign()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                x_B.clamp_(low, high)
            if step % 50 == 0 or step == self._steps:
                tick(number * self._steps + step, self._starts * self._steps)
        return x_B.detach()


def _gradients(model: nn.Module, x_B: Tensor, labels_B: Tensor) -> tuple[Tensor, ...]:
    """As a function of the records: the model's own parameters, gradients and buffers stay as they are."""
    weights = {name: parameter.detach().requires_grad_() for name, parameter in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    logits_BK = functional_call(model, {**weights, **buffers}, (x_B,))
    loss = F.cross_entropy(logits_BK, labels_B)
    return torch.autograd.grad(loss, list(weights.values()), create_graph=x_B.requires_grad)


def _distance(view: GradientView, x_B: Tensor, labels_B: Tensor) -> Tensor:
    """1 - cosine of all parameters' gradients, joined, to those shared: a scalar from 0 to 2."""
    made = _gradients(view.model, x_B, labels_B)
    product = sum(((one * other).sum() for one, other in zip(made, view.gradients, strict=True)), x_B.new_zeros(()))
    sizes = [torch.stack([one.square().sum() for one in part]).sum().sqrt() for part in (made, view.gradients)]
    return 1 - product / (sizes[0] * sizes[1]).clamp_min(torch.finfo(x_B.dtype).tiny)
