"""The two sides of a cut. Each holds a stage, an optimizer, and its own random numbers; messages are all they share.

Legend: B records in a batch, `...` a record's or an activation's own shape, K classes.

One batch, in design order: the client's stage and defenses, the guard, the message; the server's stage, loss, backward,
step; the gradient back; the client's backward and step. The client adds its penalties' gradient to the returned one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.codec import shapes
from milkglass.defenses.base import Defense, NoiseStream
from milkglass.errors import DataError, MessageError, MilkglassError, RunError
from milkglass.guards import EgressGuard, HijackGuard, finite
from milkglass.messages import Message
from milkglass.randomness import Source, drawing_from
from milkglass.transports.base import Transport

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, K), labels (B,)) -> scalar."""


@dataclass(frozen=True)
class StepResult:
    """What one batch cost: the server's loss, the client's weighted penalty, the share of records classified right.

    mislabeled: the batch went out with wrong labels, to test the server; its figures tell nothing of the training.
    """

    loss: float
    penalty: float
    accuracy: float
    mislabeled: bool = False


class _Party:
    """What both sides have: a stage with its optimizer, and a private generator that its dropout draws from."""

    def __init__(self, stage: nn.Module, optimizer: torch.optim.Optimizer | None, source: Source | None) -> None:
        if any(tensor.device.type != "cpu" for tensor in (*stage.parameters(), *stage.buffers())):
            raise MilkglassError("a party's stage must be on the CPU, so far; move it there with stage.cpu()")
        self.stage = stage
        self.optimizer = optimizer
        self.source = source or Source(os.urandom(32))
        self.generator = self.source.generator("stage")

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint must keep of this party: flat, named tensors. The private key is not among them."""
        return {
            **{f"stage.{name}": tensor for name, tensor in self.stage.state_dict().items()},
            **_flatten_optimizer(self.optimizer),
            "generator": self.generator.get_state(),
            "check": self._check(),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken. Raises RunError if it was taken under another private key."""
        if not torch.equal(state["check"], self._check()):
            raise RunError("the checkpoint was made under another private key; name the key that the run began with")
        self.stage.load_state_dict({name[6:]: tensor for name, tensor in state.items() if name.startswith("stage.")})
        _load_optimizer(self.optimizer, state)
        self.generator.set_state(state["generator"])

    def _check(self) -> Tensor:
        """A few bytes that follow from the key, and from which it does not follow."""
        return torch.frombuffer(bytearray(self.source.derive("check").read(16)), dtype=torch.uint8)

    def _forward(self, inputs: Tensor, *, training: bool) -> Tensor:
        self.stage.train(training)
        with drawing_from(self.generator):
            return cast(Tensor, self.stage(inputs))


@final
class Client(_Party):
    """Holds records and the bottom stage. Sends activations, and nothing else that was not agreed.

    optimizer: None if the stage has nothing to train. hijack_guard: stops the training under a server that looks
    hostile. source: the party's private randomness; by default a fresh one that nobody can repeat.
    """

    def __init__(
        self,
        stage: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        transport: Transport,
        *,
        defenses: Sequence[Defense] = (),
        hijack_guard: HijackGuard | None = None,
        name: str = "client",
        source: Source | None = None,
    ) -> None:
        super().__init__(stage, optimizer, source)
        self.transport = transport
        self.defenses = tuple(defenses)
        self.name = name
        self.steps = 0
        self.noise = NoiseStream(self.source.derive("noise"))
        self._guard = EgressGuard()
        self.hijack_guard = hijack_guard

    def state(self) -> dict[str, Tensor]:
        counters = {"steps": torch.tensor(self.steps), "noise_block": torch.tensor(self.noise.block)}
        guard = {} if self.hijack_guard is None else self.hijack_guard.state()
        return super().state() | counters | {f"guard.{name}": tensor for name, tensor in guard.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        self.steps = int(state["steps"])
        self.noise.block = int(state["noise_block"])
        if self.hijack_guard is not None:
            self.hijack_guard.load_state({name[6:]: state[name] for name in state if name.startswith("guard.")})

    def check_egress(self, x: Tensor) -> None:
        """Raise EgressError if a release of records `x` (B, ...) would be refused. Nothing is sent, or counted."""
        block = self.noise.block
        z = self.release(x)
        self.noise.block = block  # what was drawn never left, so it may be drawn again
        self._guard.check(Message("queries", self.name, self.steps, {"activations": z}), x)

    def step(self, x: Tensor, y_B: Tensor) -> StepResult:
        """Train on one batch: records `x` (B, ...) and labels `y_B` (B,); or only test the server with it.

        Raises HijackError where there is a guard and it judges the server hostile; MessageError for a wrong answer.
        """
        if y_B.shape != (len(x),) or y_B.dtype != torch.int64:
            raise DataError(f"labels: {shapes({'y': y_B})}; expected one int64 number for each of {len(x)} records")
        guard = self.hijack_guard
        mislabeled = guard is not None and guard.mislabels(self.steps)
        z = self._release(x, training=True)
        penalty = self.penalty(x, z)
        told_B = guard.wrong_labels(self.steps, y_B) if guard is not None and mislabeled else y_B
        loss, right, dz = self._ask_for_gradient(x, z, told_B)
        if guard is not None:
            guard.observe(self.steps, dz, y_B)
        for defense in self.defenses:
            dz = defense.returned(dz)
        if self.optimizer is not None and not mislabeled:
            self.optimizer.zero_grad(set_to_none=True)
            if penalty is not None and penalty.requires_grad:
                torch.autograd.backward([z, penalty], [dz, None])
            else:
                torch.autograd.backward([z], [dz])
            self.optimizer.step()
        self.steps += 1
        return StepResult(loss, 0.0 if penalty is None else penalty.item(), right / len(y_B), mislabeled)

    def penalty(self, x: Tensor, z: Tensor) -> Tensor | None:
        """What its defenses add to the loss, weighted, for records `x` (B, ...) sent as `z` (B, ...): a scalar."""
        penalties = [penalty for d in self.defenses if (penalty := d.penalty(x, z)) is not None]
        return torch.stack(penalties).sum() if penalties else None

    @torch.no_grad()
    def release(self, x: Tensor) -> Tensor:
        """What this client would send to have records `x` (B, ...) classified: a fresh release, in evaluation mode."""
        return self._release(x, training=False)

    @torch.no_grad()
    def rehearse(self, x: Tensor, generator: torch.Generator, *, training: bool = True) -> Tensor:
        """What this client would send for records `x` (B, ...) as a batch of its training, without a trace on it.

        generator: for dropout. The statistics of BatchNorm and the count of noise draws are put back. training: False
        for a release in evaluation mode.
        """
        own, block = self.generator, self.noise.block
        buffers = [(buffer, buffer.clone()) for buffer in self.stage.buffers()]
        self.generator = generator
        try:
            return self._release(x, training=training)
        finally:
            self.generator, self.noise.block = own, block
            for buffer, before in buffers:
                buffer.copy_(before)

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(logits (B, K), what was sent (B, ...)) for records `x` (B, ...): the cut is crossed as in training."""
        z = self.release(x)
        answer = self._send("queries", "predictions", x, {"activations": z})
        logits_BK = answer.tensors.get("logits")
        if logits_BK is None or logits_BK.dim() != 2 or len(logits_BK) != len(x) or logits_BK.shape[1] == 0:
            raise MessageError(f"expected logits of {len(x)} records; the server sent {shapes(answer.tensors)}")
        if not logits_BK.is_floating_point() or not finite(logits_BK):
            raise MessageError("expected logits; the server sent values that are not finite numbers")
        return logits_BK, z

    def _release(self, x: Tensor, *, training: bool) -> Tensor:
        z = self._forward(x, training=training)
        for defense in self.defenses:
            z = defense.release(z, self.noise)
        return z

    def _ask_for_gradient(self, x: Tensor, z: Tensor, y_B: Tensor) -> tuple[float, float, Tensor]:
        """(loss, records classified right, gradient (B, ...)) as the server answers, checked."""
        answer = self._send("activations", "gradients", x, {"activations": z.detach(), "labels": y_B})
        loss, right = _expect_scalar(answer, "loss"), _expect_scalar(answer, "right")
        if not math.isfinite(loss):
            raise MilkglassError(
                f"step {self.steps}: the loss is {loss}; training has diverged: lower the learning rate"
            )
        dz = _expect(answer, "gradient", z)
        if not finite(dz.square()):  # an optimizer squares it
            raise MessageError(f"step {self.steps}: the server sent a gradient that is not finite, or far too large")
        if not 0 <= right <= len(y_B):
            raise MessageError(f"step {self.steps}: the server says that {right:g} of {len(y_B)} records were right")
        return loss, right, dz

    def _send(self, kind: str, answer_kind: str, x: Tensor, tensors: Mapping[str, Tensor]) -> Message:
        if self.hijack_guard is not None:
            self.hijack_guard.check()
        message = Message(kind, self.name, self.steps, tensors)  # type: ignore[arg-type]
        self._guard.check(message, x)
        answer = self.transport.exchange(message)
        if answer.kind != answer_kind or answer.step != self.steps:
            raise MessageError(
                f"step {self.steps}: expected {answer_kind!r}, the server sent {answer.kind!r} of step {answer.step}"
            )
        return answer


@final
class Server(_Party):
    """Holds the top stage, the labels that clients send along, and the loss."""

    def __init__(
        self,
        stage: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        loss: Loss = F.cross_entropy,
        name: str = "server",
        source: Source | None = None,
    ) -> None:
        super().__init__(stage, optimizer, source)
        self.name = name
        self._loss = loss
        self._agreed: tuple[torch.Size, torch.dtype] | None = None

    def reply(self, message: Message) -> Message:
        """Answer one message of a client: a training step, or predictions."""
        z = message.tensors.get("activations")
        if z is None or not z.is_floating_point():
            raise MessageError(
                f"{message.kind!r} of {message.party}: expected activations, got {shapes(message.tensors)}"
            )
        self._check_activations(message, z)
        if message.kind == "queries":
            with torch.no_grad():
                logits_BK = self._forward(z.clone(), training=False)
            return Message("predictions", self.name, message.step, {"logits": logits_BK})
        if message.kind == "activations":
            return self._train(message, z)
        raise MessageError(f"a server does not answer {message.kind!r}")

    def _check_activations(self, message: Message, z: Tensor) -> None:
        """Raise MessageError unless `z` has the first activations' shape and type, and is finite."""
        if self._agreed is None and z.dim() > 1:
            self._agreed = (z.shape[1:], z.dtype)
        if len(z.shape) < 2 or not len(z) or (z.shape[1:], z.dtype) != self._agreed:
            raise MessageError(
                f"{message.kind!r} of {message.party}: {shapes({'activations': z})} do not have the shape agreed on"
            )
        if not finite(z):
            raise MessageError(f"{message.kind!r} of {message.party}: activations are not finite (NaN or infinity)")

    def _train(self, message: Message, z: Tensor) -> Message:
        y_B = message.tensors.get("labels")
        if y_B is None or y_B.shape != z.shape[:1] or y_B.dtype != torch.int64:
            raise MessageError(
                f"{message.kind!r} of {message.party}: expected an int64 label for each of {len(z)} records"
            )
        z = z.detach().requires_grad_()
        logits_BK = self._forward(z.clone(), training=True)  # the stage may begin with an in-place layer
        if y_B.min() < 0 or y_B.max() >= logits_BK.shape[1]:
            raise MessageError(
                f"{message.kind!r} of {message.party}: labels from {y_B.min()} to {y_B.max()}; "
                f"expected 0 to {logits_BK.shape[1] - 1}"
            )
        loss = self._loss(logits_BK, y_B)
        if not finite(loss.detach()):
            raise MilkglassError(
                f"step {message.step}: the loss is {loss.item()}; training has diverged: lower the learning rate"
            )
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.optimizer is not None:
            self.optimizer.step()
        right = (logits_BK.detach().argmax(dim=1) == y_B).sum()
        tensors = {"gradient": cast(Tensor, z.grad), "loss": loss.detach(), "right": right}
        return Message("gradients", self.name, message.step, tensors)


def _expect(message: Message, name: str, like: Tensor) -> Tensor:
    tensor = message.tensors.get(name)
    if tensor is None or tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise MessageError(
            f"expected a {name} of shape {tuple(like.shape)}, {like.dtype}; the server sent {shapes(message.tensors)}"
        )
    return tensor


def _expect_scalar(message: Message, name: str) -> float:
    tensor = message.tensors.get(name)
    if tensor is None or tensor.numel() != 1:
        raise MessageError(f"expected a number {name!r}; the server sent {shapes(message.tensors)}")
    return float(tensor)


def _flatten_optimizer(optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    if optimizer is None:
        return {}
    return {
        f"optimizer.{index}.{name}": value
        for index, slots in optimizer.state_dict()["state"].items()
        for name, value in slots.items()
        if isinstance(value, Tensor)
    }


def _load_optimizer(optimizer: torch.optim.Optimizer | None, state: Mapping[str, Tensor]) -> None:
    if optimizer is None:
        return
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            slots.setdefault(int(index), {})[name] = value.clone()
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
