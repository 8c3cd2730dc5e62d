"""What a client must hold at once while it trains its part of a network, in bytes.

Counted, not read off the process: weights, their gradients, what the optimizer keeps, the batch, and what autograd
keeps of it until the backward pass, all as they are stored. What a library holds besides (its own code, work space of
a convolution) is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from milkglass.errors import MilkglassError
from milkglass.tracing import in_mode


def training_bytes(stages: Sequence[tuple[nn.Module, Tensor]], slots: int) -> int:
    """Of stages with the batch (B, ...) that each is given. slots: numbers that the optimizer keeps for each weight.

    Stages are run in training mode and left as they were; two stages of one client are held together.
    """
    total = 0
    for stage, x_B in stages:
        weights = list(stage.parameters())
        learned = sum(each.nbytes for each in weights if each.requires_grad)
        total += sum(each.nbytes for each in weights) + learned * (1 + slots) + x_B.nbytes + _kept(stage, x_B, weights)
    return total


def optimizer_slots(name: str, momentum: float) -> int:
    """How many numbers the optimizer of that name keeps for each weight: two with Adam, one with momentum."""
    if name == "adam":
        return 2
    if name != "sgd":
        raise MilkglassError(f"optimizer {name!r}: expected sgd or adam")
    return 1 if momentum else 0


def _kept(stage: nn.Module, x_B: Tensor, weights: Sequence[Tensor]) -> int:
    """Bytes of all storages that autograd keeps, and of what the stage gives, but for the weights and the batch."""
    known = {each.untyped_storage().data_ptr() for each in (*weights, x_B)}
    kept: dict[int, Tensor] = {}  # the tensors are held, so that no storage is given out twice

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    state = torch.get_rng_state()
    buffers = {name: buffer.clone() for name, buffer in stage.named_buffers()}
    try:
        with in_mode(stage, training=True), torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
            keep(stage(x_B).detach())
    finally:
        torch.set_rng_state(state)
        with torch.no_grad():
            for name, buffer in stage.named_buffers():
                buffer.copy_(buffers[name])
    return sum(each.untyped_storage().nbytes() for place, each in kept.items() if place not in known)
