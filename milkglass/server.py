"""The server's side of a cut: the stage that activations go through, and the loss where it holds that.

Legend: B records in a batch, `...` an activation's own shape, K classes.

Two ways: with a loss, a training batch is answered with its gradient (vanilla). Without one it is answered with the
features that the stage makes of it; the client then returns their gradient, and gets that of its activations (U-shaped:
Vepakomma et al. 2018, arXiv 1812.00564, section 2.2). A batch may come in pieces of equal size: their gradients add up,
and the step is taken after the last.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Protocol, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.codec import shapes
from milkglass.errors import MessageError, MilkglassError
from milkglass.guards import finite
from milkglass.messages import Message
from milkglass.parties import Party, Rate
from milkglass.randomness import Source

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, K), labels (B,)) -> scalar."""


class Sharing(Protocol):
    """Other processes that compute the stage together with this one; see sharding.py."""

    def forward(self, z: Tensor, piece: tuple[int, int] | None) -> Tensor:
        """The stage's output for `z`, with a graph in training; piece: (index, of how many), None for queries."""

    def step(self) -> None:
        """The others take the step that this one is about to take."""

    def stepped(self) -> None:
        """This one has taken its step, as the others: now weights may meet."""

    def agree(self) -> None:
        """Between two steps: where each process has stepped by itself, all take the mean of their weights."""

    def load(self) -> None:
        """The others take over this one's weights and what its optimizer remembers."""


@final
class Server(Party):
    """Holds the top stage; and, unless `loss` is None, the labels that clients send along, and the loss.

    loss: None for U-shaped training. cut_shape: of one record's activations (without the batch), where it is agreed on
    beforehand; else the first message sets it. classes: K, where it is known: then labels are checked before anything
    is computed. rate: the learning rate by step, where it changes.
    """

    def __init__(
        self,
        stage: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        loss: Loss | None = F.cross_entropy,
        cut_shape: tuple[int, ...] | None = None,
        classes: int | None = None,
        rate: Rate | None = None,
        name: str = "server",
        source: Source | None = None,
    ) -> None:
        super().__init__(stage, optimizer, source, rate=rate)
        self.name = name
        self.sharing: Sharing | None = None
        self._loss = loss
        self._classes = classes
        self._agreed = None if cut_shape is None else (torch.Size(cut_shape), torch.float32)
        self._open: dict[int, tuple[Tensor, Tensor]] = {}  # U-shaped: piece -> activations, features with their graph
        self._begun = self._ended = 0  # pieces of the training batch that is under way
        self._under_way = (0, 1)  # its step, and its pieces

    @property
    def resting(self) -> bool:
        """Whether no training step is half done."""
        return self._begun == 0

    @property
    def holds_labels(self) -> bool:
        """Whether the loss is here; else a batch is answered with features, and their gradient comes back."""
        return self._loss is not None

    def snapshot(self) -> Server:
        """A server that answers queries as this one would now, and never learns."""
        self._agree()
        stage = copy.deepcopy(self.stage).cpu()
        copied = Server(stage, None, loss=self._loss, name=self.name, source=self.source)
        copied._agreed = self._agreed
        return copied

    def weights(self, *, with_optimizer: bool = False) -> dict[str, Tensor]:
        """What all processes that share the stage have learned; of each optimizer, what this one's remembers."""
        self._agree()
        return super().weights(with_optimizer=with_optimizer)

    def load_weights(self, weights: Mapping[str, Tensor], *, with_optimizer: bool = False) -> None:
        """Take over what `weights` holds, in all processes that share the stage."""
        super().load_weights(weights, with_optimizer=with_optimizer)
        if self.sharing is not None:
            self.sharing.load()

    def reply(self, message: Message) -> Message:
        """Answer one message of a client: a training step, its second half, or predictions."""
        before = self.generator.get_state()
        try:
            return self._reply(message)
        except MilkglassError:
            self.generator.set_state(before)  # who is refused moves nobody else's dropout
            raise

    def _reply(self, message: Message) -> Message:
        if message.kind == "returns":
            return self._finish(message)
        z = self._activations(message)
        self._check_activations(message, z)
        if message.kind == "queries":
            self._agree()
            with torch.no_grad():
                logits_BK = self._through(message, z)
            return Message("predictions", self.name, message.step, {"logits": logits_BK})
        if message.kind == "activations":
            return self._train(message, z)
        raise MessageError(f"a server does not answer {message.kind!r}")

    def check(self, message: Message, *, part: bool = False, labels: bool = True) -> None:
        """Raise MessageError for activations that could not be served: for who holds them back until others came.

        part: they are one owner's, of several whose join is served. labels: whether they come with labels.
        """
        z = self._activations(message)
        if not part:
            self._check_activations(message, z)
        elif z.dim() < 2 or not len(z):
            raise MessageError(f"{message.kind!r} of {message.party}: expected activations, got none of any record")
        elif not finite(z):
            raise MessageError(f"{message.kind!r} of {message.party}: activations are not finite (NaN or infinity)")
        if labels:
            self._labels(message, z)

    def _activations(self, message: Message) -> Tensor:
        z = message.tensors.get("activations")
        if z is None or not z.is_floating_point():
            raise MessageError(
                f"{message.kind!r} of {message.party}: expected activations, got {shapes(message.tensors)}"
            )
        return z

    def _check_activations(self, message: Message, z: Tensor) -> None:
        """Raise MessageError unless `z` has the shape and type agreed on (the first one's), and is finite."""
        if self._agreed is None and z.dim() > 1:
            self._agreed = (z.shape[1:], z.dtype)
        if len(z.shape) < 2 or not len(z) or (z.shape[1:], z.dtype) != self._agreed:
            raise MessageError(
                f"{message.kind!r} of {message.party}: {shapes({'activations': z})} do not have the shape agreed on"
            )
        if not finite(z):
            raise MessageError(f"{message.kind!r} of {message.party}: activations are not finite (NaN or infinity)")

    def _train(self, message: Message, z: Tensor) -> Message:
        """The forward pass of a piece; with a loss the backward pass as well."""
        y_B = self._labels(message, z)
        self._check_piece(message)
        z = z.detach().requires_grad_()
        out = self._through(message, z)
        if self._loss is None or y_B is None:
            self._open[message.piece] = z, out
            self._begin_piece()
            return Message(
                "features", self.name, message.step, {"features": out.detach()}, message.piece, message.pieces
            )
        self._check_range(message, y_B, out.shape[1])
        loss = self._loss(out, y_B)
        if not finite(loss.detach()):
            raise MilkglassError(
                f"step {message.step}: the loss is {loss.item()}; training has diverged: lower the learning rate"
            )
        self._begin_piece()
        (loss / message.pieces if message.pieces > 1 else loss).backward()  # type: ignore[no-untyped-call]
        self._check_gradient(message, z)
        self._end_piece(message)
        right = (out.detach().argmax(dim=1) == y_B).sum()
        tensors = {"gradient": cast(Tensor, z.grad), "loss": loss.detach(), "right": right}
        return Message("gradients", self.name, message.step, tensors, message.piece, message.pieces)

    def _through(self, message: Message, z: Tensor) -> Tensor:
        """What the stage makes of `z`, here or in all processes that share it."""
        training = message.kind == "activations"
        if self.sharing is None:
            return self._forward(z.clone(), training=training)  # the stage may begin with an in-place layer
        return self.sharing.forward(z, (message.piece, message.pieces) if training else None)

    def _finish(self, message: Message) -> Message:
        """U-shaped: the backward pass of a piece, from the gradient at its features."""
        if message.piece not in self._open or (message.step, message.pieces) != self._under_way:
            raise MessageError(
                f"'returns' of {message.party}: no features of step {message.step}, piece {message.piece} of "
                f"{message.pieces}, are out"
            )
        z, features = self._open[message.piece]
        gradient = message.tensors.get("gradient")
        if gradient is None or (gradient.shape, gradient.dtype) != (features.shape, features.dtype):
            raise MessageError(
                f"'returns' of {message.party}: expected a gradient of shape {tuple(features.shape)}, "
                f"got {shapes(message.tensors)}"
            )
        if not finite(gradient.square()):
            raise MessageError(f"'returns' of {message.party}: the gradient is not finite, or far too large")
        if message.piece != min(self._open):
            raise MessageError(
                f"'returns' of {message.party}: piece {message.piece} came before piece {min(self._open)}"
            )
        del self._open[message.piece]
        features.backward(gradient)  # type: ignore[no-untyped-call]
        self._check_gradient(message, z)
        self._end_piece(message)
        tensors = {"gradient": cast(Tensor, z.grad)}
        return Message("gradients", self.name, message.step, tensors, message.piece, message.pieces)

    def _labels(self, message: Message, z: Tensor) -> Tensor | None:
        y_B = message.tensors.get("labels")
        if self._loss is None:
            if y_B is not None:
                raise MessageError(f"{message.kind!r} of {message.party}: labels, where they stay with the client")
            return None
        if y_B is None or y_B.shape != z.shape[:1] or y_B.dtype != torch.int64:
            raise MessageError(
                f"{message.kind!r} of {message.party}: expected an int64 label for each of {len(z)} records"
            )
        if self._classes is not None:
            self._check_range(message, y_B, self._classes)
        return y_B

    def _check_range(self, message: Message, y_B: Tensor, classes: int) -> None:
        if y_B.min() < 0 or y_B.max() >= classes:
            raise MessageError(
                f"{message.kind!r} of {message.party}: labels from {y_B.min()} to {y_B.max()}; "
                f"expected 0 to {classes - 1}"
            )

    def _check_piece(self, message: Message) -> None:
        """Raise MessageError unless this piece of a training batch is the next one."""
        found = (message.step, message.pieces)
        if message.piece != self._begun or (self._begun and found != self._under_way):
            step, pieces = self._under_way
            raise MessageError(
                f"step {message.step} of {message.party}: piece {message.piece} of {message.pieces}; "
                f"expected piece {self._begun}" + (f" of {pieces}, of step {step}" if self._begun else "")
            )
        self._under_way = found

    def _check_gradient(self, message: Message, z: Tensor) -> None:
        """Before the step: what the client would refuse must not have taught this stage."""
        if not finite(cast(Tensor, z.grad)):
            raise MilkglassError(
                f"step {message.step}: the gradient is not finite; training has diverged: lower the learning rate"
            )

    def _begin_piece(self) -> None:
        """The first piece of a step clears the gradients."""
        if self._begun == 0 and self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        self._begun += 1

    def _end_piece(self, message: Message) -> None:
        """Count a piece whose gradient is added; after the last one of a step, take the step."""
        self._ended += 1
        if self._ended < message.pieces:
            return
        if self.sharing is not None:
            self.sharing.step()  # first: where it fails, the step is half done, and no state to keep
        self._begun = self._ended = 0
        self.take_step(message.step)
        if self.sharing is not None:
            self.sharing.stepped()

    def _agree(self) -> None:
        """Not in the middle of a step, whose backward pass needs the weights of its forward pass."""
        if self.sharing is not None and self.resting:
            self.sharing.agree()
