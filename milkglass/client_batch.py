"""One training batch of a client under way, and what it expects of an answer.

Legend: B records in a batch, `...` a record's or an activation's own shape.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from milkglass.codec import shapes
from milkglass.errors import MessageError
from milkglass.messages import Message


@final
class Batch:
    """One training batch under way: its pieces, what was sent for them, and what came of it."""

    def __init__(self, x: Tensor, y_B: Tensor | None, pieces: int) -> None:
        self.x = x
        self.y_B = y_B
        self.pieces = pieces
        self.outputs: list[Tensor] = []  # where the backward pass begins
        self.sent: list[Tensor] = []
        self.penalty: Tensor | None = None
        self.loss = 0.0
        self.right = 0

    def labels(self, piece: int) -> Tensor:
        """The labels of a piece."""
        assert self.y_B is not None
        return self.y_B if self.pieces == 1 else self.y_B.tensor_split(self.pieces)[piece]

    def count(self, loss: float, right: int) -> None:
        """Take in a piece's mean loss, and how many of its records were classified right."""
        self.loss += loss / self.pieces
        self.right += right

    def backward(self, dz: Tensor) -> None:
        """From the gradient (B, ...) at the cut, and the penalty, to the weights."""
        if self.penalty is not None and self.penalty.requires_grad:
            torch.autograd.backward([self.outputs[0], self.penalty], [dz, None])
            return
        parts = [dz] if len(self.outputs) == 1 else dz.tensor_split(len(self.outputs))
        for z, gradient in zip(self.outputs, parts, strict=True):
            torch.autograd.backward([z], [gradient])


def expect(message: Message, name: str, like: Tensor) -> Tensor:
    """The tensor of that name. Raises MessageError unless it has the shape and type of `like`."""
    tensor = message.tensors.get(name)
    if tensor is None or tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise MessageError(
            f"expected a {name} of shape {tuple(like.shape)}, {like.dtype}; the server sent {shapes(message.tensors)}"
        )
    return tensor


def expect_scalar(message: Message, name: str) -> float:
    """The single number of that name. Raises MessageError where there is none."""
    tensor = message.tensors.get(name)
    if tensor is None or tensor.numel() != 1:
        raise MessageError(f"expected a number {name!r}; the server sent {shapes(message.tensors)}")
    return float(tensor)
