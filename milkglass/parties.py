"""What every party has: a stage, an optimizer, and its own random numbers.

`client.py` and `server.py` hold the two sides of a cut; messages are all they share.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from milkglass.errors import MilkglassError, RunError
from milkglass.randomness import Source, drawing_from

Result = TypeVar("Result")
Rate = Callable[[int], float]
"""Step of a client's training, from 0 -> learning rate."""


class Party:
    """What both sides have: a stage with its optimizer, and a private generator that its dropout draws from.

    rate: the learning rate by step of the client whose batch it is, where that changes. An optimizer that adds noise
    counts its draws in `block` (`private/dp.py`): the party's own, never handed on with what it has learned.
    """

    def __init__(
        self,
        stage: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        source: Source | None,
        *,
        head: nn.Module | None = None,
        rate: Rate | None = None,
    ) -> None:
        for part in (stage, head):
            if part is not None and any(t.device.type != "cpu" for t in (*part.parameters(), *part.buffers())):
                raise MilkglassError("a party's stage must be on the CPU, so far; move it there with stage.cpu()")
        self.stage = stage
        self.head = head
        self.optimizer = optimizer
        self.rate = rate
        self.source = source or Source(os.urandom(32))
        self.generator = self.source.generator("stage")

    def take_step(self, step: int) -> None:
        """Let the optimizer go one step, at the learning rate of this step of the training."""
        if self.optimizer is None:
            return
        if self.rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(step)
        self.optimizer.step()

    def weights(self, *, with_optimizer: bool = False) -> dict[str, Tensor]:
        """What it has learned, as flat, named tensors, not copied; on request with what its optimizer remembers."""
        parts = {"stage": self.stage} if self.head is None else {"stage": self.stage, "head": self.head}
        learned = {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}
        return learned | (_flatten_optimizer(self.optimizer) if with_optimizer else {})

    def load_weights(self, weights: Mapping[str, Tensor], *, with_optimizer: bool = False) -> None:
        """Take over what `weights` holds. Raises RuntimeError, as torch does, where it does not fit."""
        for part, module in (("stage", self.stage), ("head", self.head)):
            if module is not None:
                prefix = f"{part}."
                own = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
                module.load_state_dict(own)
        if with_optimizer:
            _load_optimizer(self.optimizer, weights)

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint must keep of this party: flat, named tensors. The private key is not among them."""
        block = getattr(self.optimizer, "block", None)
        return {
            **self.weights(with_optimizer=True),
            "generator": self.generator.get_state(),
            "check": self._check(),
            **({} if block is None else {"optimizer_block": torch.tensor(block)}),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken. Raises RunError if it was taken under another private key."""
        if not torch.equal(state["check"], self._check()):
            raise RunError("the checkpoint was made under another private key; name the key that the run began with")
        self.load_weights(state, with_optimizer=True)
        self.generator.set_state(state["generator"])
        if self.optimizer is not None and hasattr(self.optimizer, "block"):
            self.optimizer.block = int(state["optimizer_block"])

    def _check(self) -> Tensor:
        """A few bytes that follow from the key, and from which it does not follow."""
        return torch.frombuffer(bytearray(self.source.derive("check").read(16)), dtype=torch.uint8)

    def _forward(self, inputs: Tensor, *, training: bool) -> Tensor:
        return self._run(self.stage, inputs, training=training)

    def _run(self, module: nn.Module, inputs: Tensor, *, training: bool) -> Tensor:
        module.train(training)
        with drawing_from(self.generator):
            return cast(Tensor, module(inputs))


def run_to_end(paused: Generator[None, None, Result]) -> Result:
    """Let a party's work run through all its pauses; what it returns."""
    while True:
        try:
            next(paused)
        except StopIteration as end:
            return cast(Result, end.value)


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
