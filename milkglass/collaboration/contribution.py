"""What a volunteer has computed since the last step: the mean gradient of its records, and what it sends of that.

All of it; or its largest numbers, the rest with what comes later (Gaussian-k); or, in robust mode, with a memory of
what earlier averages have left out of it, so that its noise is small beside what all agree on
(`centered_clipping.py`).

Legend: D numbers of all parameters that learn.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from milkglass.collaboration.centered_clipping import compensated, remembered
from milkglass.collaboration.replica import Replica
from milkglass.collaboration.tasks import Task
from milkglass.compression.error_feedback import ErrorFeedback
from milkglass.compression.gaussian_k import GaussianK
from milkglass.randomness import Source, drawing_from


@final
class Gradients:
    """Adds up gradients, batch by batch. source: private; order of records and dropout follow from it.

    density: with Gaussian-k, the share of numbers that is sent; None: all. mixed: forward and backward in bfloat16.
    robust: contributions have a memory.
    """

    def __init__(
        self,
        task: Task,
        replica: Replica,
        source: Source,
        batch_size: int,
        *,
        density: float | None = None,
        mixed: bool = False,
        robust: bool = False,
    ) -> None:
        self._task, self._replica, self._size, self._mixed = task, replica, batch_size, mixed
        self._order, self._dropout = source.generator("order"), source.generator("dropout")
        self._feedback = None
        if density is not None:
            self._feedback = ErrorFeedback(GaussianK(density), torch.zeros(replica.numbers))
        self._left_out_D = torch.zeros(replica.numbers) if robust else None
        self.samples, self._loss_sum = 0, 0.0

    @property
    def loss(self) -> float | None:
        """Mean over the records so far; None where there are none."""
        return self._loss_sum / self.samples if self.samples else None

    def add(self) -> None:
        """One batch more."""
        batch = self._task.draw(self._order, self._size)
        self._task.network.train()
        with drawing_from(self._dropout), torch.autocast("cpu", torch.bfloat16, enabled=self._mixed):
            loss = self._task.loss(batch)
        (loss * len(batch)).backward()  # type: ignore[no-untyped-call]
        self.samples += len(batch)
        self._loss_sum += float(loss.detach()) * len(batch)

    def mean(self) -> Tensor | None:
        """(D,) the mean gradient; None, and all is forgotten, where it is not finite."""
        mean_D = self._replica.gradient() / max(self.samples, 1)
        if bool(torch.isfinite(mean_D).all()):
            return mean_D
        self.forget()
        return None

    def forget(self) -> None:
        """Begin anew."""
        self._replica.forget_gradient()
        self.samples, self._loss_sum = 0, 0.0

    def chosen(self, mean_D: Tensor) -> Tensor:
        """(D,) what is sent of a mean gradient, and of what was left over or out."""
        if self._left_out_D is not None:
            return compensated(mean_D, self._left_out_D, self.samples)
        if self._feedback is None:
            return mean_D
        before_D = self._feedback.left_D.clone()
        sent_D = torch.zeros_like(mean_D)
        self._feedback.compressor.add_to(sent_D, self._feedback.take(mean_D).parts)
        self._before_D = before_D
        return sent_D

    def not_sent(self) -> None:
        """What was chosen last has reached nobody: it is to be sent again, with what comes after."""
        if self._feedback is not None:
            self._feedback.left_D.copy_(self._before_D)

    def averaged(self, mean_D: Tensor, average_D: Tensor) -> None:
        """A mean gradient was contributed to that average."""
        if self._left_out_D is not None:
            self._left_out_D = remembered(self._left_out_D, mean_D, average_D, self.samples)
