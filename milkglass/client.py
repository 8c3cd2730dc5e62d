"""The client's side of a cut: it holds records, the first stage, and in U-shaped training the last one.

Legend: B records in a batch, `...` a record's or an activation's own shape, K classes.

One batch, in design order: the client's stage and defenses, the guard, the message; the server's stage, loss, backward,
step; the gradient back; the client's backward and step. The client adds its penalties' gradient to the returned one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.client_batch import Batch, expect, expect_scalar
from milkglass.codec import shapes
from milkglass.compression.base import Compressor, Identity
from milkglass.defenses.base import Defense, NoiseSource, NoiseStream, content_digest
from milkglass.defenses.permanent import PermanentNoise
from milkglass.errors import DataError, EgressError, MessageError, MilkglassError
from milkglass.guards import U_SHAPED, VANILLA, EgressGuard, LeakageGuard, ReleaseLedger, finite, with_shapes
from milkglass.hijack import HijackGuard
from milkglass.messages import Kind, Message
from milkglass.parties import Party, Rate, run_to_end
from milkglass.randomness import Source
from milkglass.transports.base import Transport

LeftKind = Literal["enters", "weights", "collect", "hashes", "goodbye"]


@dataclass(frozen=True)
class StepResult:
    """What one batch cost: the server's loss, the client's weighted penalty, the share of records classified right.

    mislabeled: the batch went out with wrong labels, to test the server; its figures tell nothing of the training.
    """

    loss: float
    penalty: float
    accuracy: float
    mislabeled: bool = False


@final
@dataclass(frozen=True)
class Guards:
    """How a client watches itself and its server; a guard that is None is not at work.

    hijack: stops under a server that looks hostile. ledger: stops before a record is released too often. leakage: stops
    where what is sent depends too much on the records.
    """

    hijack: HijackGuard | None = None
    ledger: ReleaseLedger | None = None
    leakage: LeakageGuard | None = None

    def check(self) -> None:
        """Raise again what a guard has raised before: from then on nothing leaves."""
        if self.hijack is not None:
            self.hijack.check()
        if self.leakage is not None:
            self.leakage.check()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep: flat, named tensors."""
        return {f"{place}.{name}": t for place, guard in self._present() for name, t in guard.state().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        for place, guard in self._present():
            prefix = f"{place}."
            guard.load_state({name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)})

    def _present(self) -> list[tuple[str, HijackGuard | ReleaseLedger | LeakageGuard]]:
        guards = (("guard", self.hijack), ("ledger", self.ledger), ("leakage", self.leakage))
        return [(place, guard) for place, guard in guards if guard is not None]


@final
class Client(Party):
    """Holds records and the bottom stage. Sends activations, and nothing else that was not agreed.

    optimizer: of the stage and the head; None if they have nothing to train. head: in U-shaped training the network's
    last part: with it labels and loss stay here. sends_labels: False for an owner of columns who has no labels.
    pieces: in how many a training batch goes out, one after the other, before the first answer is awaited. cut_shape:
    of one record's activations, where it is agreed on: nothing else leaves; None for any shape. compressor:
    what the wire does to activations, for who asks what a receiver sees. keep_releases: while its stage stays as it is,
    the same record gets the same noise. rate: the learning rate by step, where it changes. source: the party's private
    randomness; by default a fresh one that nobody can repeat.
    """

    def __init__(
        self,
        stage: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        transport: Transport,
        *,
        head: nn.Module | None = None,
        sends_labels: bool = True,
        pieces: int = 1,
        defenses: Sequence[Defense] = (),
        guards: Guards | None = None,
        cut_shape: tuple[int, ...] | None = None,
        compressor: Compressor | None = None,
        keep_releases: bool = False,
        rate: Rate | None = None,
        name: str = "client",
        source: Source | None = None,
    ) -> None:
        super().__init__(stage, optimizer, source, head=head, rate=rate)
        self.transport = transport
        self.defenses = tuple(defenses)
        self.guards = guards or Guards()
        self.compressor = compressor or Identity()
        self.name = name
        self.steps = 0
        self.noise = NoiseStream(self.source.derive("noise"))
        self.keeps_releases = keep_releases
        self._begun = False  # whether the defenses have seen a batch
        self._frozen = not any(parameter.requires_grad for parameter in stage.parameters())
        self._pieces = pieces
        self._sends_labels = sends_labels and head is None
        agreed = VANILLA if self._sends_labels else U_SHAPED
        if cut_shape is None:
            self._egress = EgressGuard(agreed)
        else:
            self._egress = EgressGuard(with_shapes(agreed, activations=cut_shape))

    def state(self) -> dict[str, Tensor]:
        counters = {"steps": torch.tensor(self.steps), "noise_block": torch.tensor(self.noise.block)}
        learned = {
            f"defense{index}.{name}": tensor
            for index, defense in enumerate(self.defenses)
            for name, tensor in defense.state().items()
        }
        return super().state() | counters | self.guards.state() | learned

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        self.steps = int(state["steps"])
        self.noise.block = int(state["noise_block"])
        self.guards.load_state(state)
        for index, defense in enumerate(self.defenses):
            prefix = f"defense{index}."
            defense.load_state({name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)})

    def check_egress(self, x: Tensor) -> None:
        """Raise EgressError if a release of records `x` (B, ...) would be refused. Nothing is sent, or counted."""
        block = self.noise.block
        z = self._release(x, training=False).detach()
        self.noise.block = block  # what was drawn never left, so it may be drawn again
        self._egress.check(Message("queries", self.name, self.steps, {"activations": z}), x)

    def step(self, x: Tensor, y_B: Tensor | None, rows_B: Tensor | None = None) -> StepResult:
        """Train on one batch: records `x` (B, ...) and labels `y_B` (B,); or only test the server with it.

        rows_B: the records' numbers, for a ledger of releases. Where there are no records (Poisson sampling draws such
        batches), one of zeros goes out, for the server counts steps, and nothing is learned from it. Raises HijackError
        where there is a guard and it judges the server hostile; EgressError where a limit is reached; MessageError for
        a wrong answer.
        """
        return run_to_end(self.stepping(x, y_B, rows_B))

    def stepping(
        self, x: Tensor, y_B: Tensor | None, rows_B: Tensor | None = None
    ) -> Generator[None, None, StepResult]:
        """`step`, which pauses wherever it waits for an answer: for who plays several clients in turn."""
        if y_B is not None and (y_B.shape != (len(x),) or y_B.dtype != torch.int64):
            raise DataError(f"labels: {shapes({'y': y_B})}; expected one int64 number for each of {len(x)} records")
        empty = not len(x)
        if empty:
            x, y_B = x.new_zeros(1, *x.shape[1:]), None if y_B is None else y_B.new_zeros(1)
        guard = self.guards.hijack
        mislabeled = guard is not None and guard.mislabels(self.steps)
        told_B = guard.wrong_labels(self.steps, y_B) if guard is not None and mislabeled and y_B is not None else y_B
        if self.guards.ledger is not None and rows_B is not None:
            self.guards.ledger.charge(self.steps, rows_B, kept=self._frozen and self.keeps_releases)
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        batch = Batch(x, told_B, self._pieces if len(x) % self._pieces == 0 else 1)
        self._send_batch(batch)
        if self.head is not None:
            yield from self._answer_features(batch)
        dz = yield from self._await_gradients(batch)
        if guard is not None and y_B is not None:
            guard.observe(self.steps, dz, y_B)
        if self.optimizer is not None and not mislabeled:
            if empty:
                self.optimizer.zero_grad(set_to_none=True)  # a private optimizer's step is then noise alone
            else:
                batch.backward(dz)
            self.take_step(self.steps)
            for defense in self.defenses:
                defense.learn(x, torch.cat([z.detach() for z in batch.sent]))
        self.steps += 1
        penalty = 0.0 if batch.penalty is None else batch.penalty.item()
        return StepResult(batch.loss, penalty, batch.right / len(x), mislabeled)

    def penalty(self, x: Tensor, z: Tensor, y_B: Tensor | None = None) -> Tensor | None:
        """What its defenses add to the loss, weighted, for records `x` (B, ...) sent as `z` (B, ...): a scalar."""
        penalties = [penalty for d in self.defenses if (penalty := d.penalty(x, z, y_B)) is not None]
        return torch.stack(penalties).sum() if penalties else None

    def weights_digest(self) -> str:
        """SHA-256 of its stage's weights, in hexadecimal: while that stays, so does what a record gives."""
        held = "".join(f"{name} {content_digest(tensor)}\n" for name, tensor in self.stage.state_dict().items())
        return hashlib.sha256(held.encode()).hexdigest()

    def noise_free(self, x: Tensor) -> Tensor:
        """What a release of records `x` (B, ...) is before any noise, in evaluation mode, inside the graph."""
        z = self._forward(x, training=False)
        for defense in self.defenses:
            z = defense.transform(z)
        return z

    @torch.no_grad()
    def release(self, x: Tensor) -> Tensor:
        """What a receiver sees when records `x` (B, ...) are to be classified, in evaluation mode."""
        return self.compressor.round_trip(self._release(x, training=False))

    @torch.no_grad()
    def released_by(self, x: Tensor, defenses: Sequence[Defense]) -> Tensor:
        """What some of its defenses alone make of records `x` (B, ...), with noise of this moment, in evaluation mode.

        Before any compressor, and fresh also where releases are kept: for who measures the noise.
        """
        z = self._forward(x, training=False)
        for defense in defenses:
            z = defense.release(z, self.noise)
        return z

    @torch.no_grad()
    def rehearse(self, x: Tensor, generator: torch.Generator, *, training: bool = True) -> Tensor:
        """What a receiver would see of records `x` (B, ...) as a batch of its training, without a trace on it.

        generator: for dropout. The statistics of BatchNorm and the count of noise draws are put back. training: False
        for a release in evaluation mode.
        """
        own, block = self.generator, self.noise.block
        buffers = [(buffer, buffer.clone()) for buffer in self.stage.buffers()]
        self.generator = generator
        try:
            return self.compressor.round_trip(self._release(x, training=training))
        finally:
            self.generator, self.noise.block = own, block
            for buffer, before in buffers:
                buffer.copy_(before)

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(logits (B, K), what was sent (B, ...)) for records `x` (B, ...): the cut is crossed as in training."""
        return run_to_end(self.predicting(x))

    @torch.no_grad()
    def predicting(self, x: Tensor) -> Generator[None, None, tuple[Tensor, Tensor]]:
        """`predict`, which pauses where it waits. An owner of columns without labels is told no logits: (B, 0)."""
        z = self._release(x, training=False)
        self._send("queries", x, {"activations": z})
        yield
        sent = self.compressor.round_trip(z)
        if not self._sends_labels and self.head is None:
            self._receive("receipt")
            return z.new_zeros(len(x), 0), sent
        answer = self._receive("predictions")
        found = answer.tensors.get("logits")
        if found is None or found.dim() < 2 or len(found) != len(x) or not found.is_floating_point():
            raise MessageError(f"expected logits of {len(x)} records; the server sent {shapes(answer.tensors)}")
        logits_BK = found if self.head is None else self._run(self.head, found.clone(), training=False)
        if logits_BK.dim() != 2 or logits_BK.shape[1] == 0:
            raise MessageError(f"expected logits of {len(x)} records; the server sent {shapes(answer.tensors)}")
        if not finite(logits_BK):
            raise MessageError("expected logits; the server sent values that are not finite numbers")
        return logits_BK, sent

    def leave(self, kind: LeftKind, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Send what other clients need: sealed weights, a request for theirs, hashes of ids. Never plain numbers."""
        plain = [name for name, tensor in tensors.items() if tensor.dtype not in (torch.uint8, torch.int64)]
        if plain:
            raise EgressError(f"{kind!r}: {plain[0]} is not sealed; expected bytes")
        self.guards.check()
        self.transport.send(Message(kind, self.name, step, tensors))

    def take(self, kind: Literal["receipt", "handed"], step: int) -> Message:
        """The answer to what was left. Raises MessageError for another one."""
        answer = self.transport.receive()
        if (answer.kind, answer.step) != (kind, step):
            raise MessageError(f"expected {kind!r} of {step}, the server sent {answer.kind!r} of {answer.step}")
        return answer

    def _release(self, x: Tensor, *, training: bool) -> Tensor:
        z = self._forward(x, training=training and not self._frozen)
        noise = self._noise_of(x, training=training)
        for defense in self.defenses:
            z = defense.release(z, noise)
        return z

    def _noise_of(self, x: Tensor, *, training: bool) -> NoiseSource:
        """Fresh noise; or the records' own, where releases are kept and no training changes what they pass through."""
        if not self.keeps_releases or (training and not self._frozen):
            return self.noise
        return PermanentNoise(self.source, self.weights_digest(), x)

    def _send_batch(self, batch: Batch) -> None:
        """The forward pass, and all pieces on their way: each as soon as it is there, where nothing needs all.

        A defense needs the whole batch: noise follows from the activations' very bits, a penalty from all records.
        """
        parts = [batch.x] if batch.pieces == 1 else batch.x.tensor_split(batch.pieces)
        if batch.pieces == 1 or self.defenses:
            z = self._release(batch.x, training=True)
            if not self._begun:
                for index, defense in enumerate(self.defenses):
                    defense.begin(batch.x, z.detach(), self.source.derive("defense", index))
                self._begun = True
            batch.penalty = self.penalty(batch.x, z, batch.y_B)
            batch.outputs = [z]
            batch.sent = [z] if batch.pieces == 1 else list(z.tensor_split(batch.pieces))
        elif self.guards.leakage is not None:
            batch.outputs = batch.sent = [self._forward(part, training=True) for part in parts]
        if self.guards.leakage is not None:
            self.guards.leakage.observe(self.steps, batch.x, torch.cat([z.detach() for z in batch.sent]))
        for number, part in enumerate(parts):
            if number == len(batch.sent):
                batch.sent.append(self._forward(part, training=True))
            tensors = {"activations": batch.sent[number].detach()}
            if self._sends_labels and batch.y_B is not None:
                tensors["labels"] = batch.labels(number)
            self._send("activations", part, tensors, number, batch.pieces)
        batch.outputs = batch.outputs or batch.sent

    def _answer_features(self, batch: Batch) -> Generator[None, None, None]:
        """U-shaped: the head's forward and backward pass on what the server made of each piece; its gradient back."""
        assert self.head is not None
        for number, part in enumerate(batch.x.tensor_split(batch.pieces)):
            yield
            answer = self._receive("features", number, batch.pieces)
            found = answer.tensors.get("features")
            if found is None or found.dim() < 2 or len(found) != len(part) or not found.is_floating_point():
                raise MessageError(f"expected features of {len(part)} records, got {shapes(answer.tensors)}")
            if not finite(found):
                raise MessageError(f"step {self.steps}: the server sent features that are not finite")
            features = found.detach().requires_grad_()
            logits_BK = self._run(self.head, features.clone(), training=True)
            y_B = batch.labels(number)
            loss = F.cross_entropy(logits_BK, y_B)
            batch.count(self._finite_loss(loss.item()), int((logits_BK.detach().argmax(dim=1) == y_B).sum()))
            (loss / batch.pieces if batch.pieces > 1 else loss).backward()  # type: ignore[no-untyped-call]
            gradient = cast(Tensor, features.grad)
            for defense in self.defenses:
                gradient = defense.protect(gradient, y_B, self.noise)
            self._send("returns", part, {"gradient": gradient}, number, batch.pieces)

    def _await_gradients(self, batch: Batch) -> Generator[None, None, Tensor]:
        """The gradient (B, ...) at what was sent, as the server answers, checked."""
        gradients = []
        for number, z in enumerate(batch.sent):
            yield
            answer = self._receive("gradients", number, batch.pieces)
            if self._sends_labels:
                loss, right = expect_scalar(answer, "loss"), expect_scalar(answer, "right")
                if not 0 <= right <= len(z):
                    raise MessageError(
                        f"step {self.steps}: the server says that {right:g} of {len(z)} records were right"
                    )
                batch.count(self._finite_loss(loss), int(right))
            dz = expect(answer, "gradient", z)
            if not finite(dz.square()):  # an optimizer squares it
                raise MessageError(
                    f"step {self.steps}: the server sent a gradient that is not finite, or far too large"
                )
            gradients.append(dz)
        return gradients[0] if len(gradients) == 1 else torch.cat(gradients)

    def _finite_loss(self, loss: float) -> float:
        if not math.isfinite(loss):
            raise MilkglassError(
                f"step {self.steps}: the loss is {loss}; training has diverged: lower the learning rate"
            )
        return loss

    def _send(self, kind: Kind, x: Tensor, tensors: Mapping[str, Tensor], piece: int = 0, pieces: int = 1) -> None:
        """Past the guards, onto the wire."""
        self.guards.check()
        message = Message(kind, self.name, self.steps, tensors, piece, pieces)
        self._egress.check(message, x)
        self.transport.send(message)

    def _receive(self, kind: Kind, piece: int = 0, pieces: int = 1) -> Message:
        answer = self.transport.receive()
        if answer.kind != kind or (answer.step, answer.piece, answer.pieces) != (self.steps, piece, pieces):
            of = f"step {answer.step}" + (f", piece {answer.piece}" if (answer.piece, answer.pieces) != (0, 1) else "")
            raise MessageError(f"step {self.steps}: expected {kind!r}, the server sent {answer.kind!r} of {of}")
        return answer
