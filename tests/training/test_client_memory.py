"""What a client must hold is counted: each part by hand on a network whose parts are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from milkglass.errors import MilkglassError
from milkglass.training.client_memory import optimizer_slots, training_bytes

BATCH = torch.zeros(8, 5)


def test_a_linear_layer_by_hand() -> None:
    """Weights 5 x 3 and 3, their gradients, two slots each; the batch, once though it is kept; what comes out."""
    weights = 4 * (5 * 3 + 3)
    assert training_bytes([(nn.Linear(5, 3), BATCH)], slots=2) == weights * (1 + 1 + 2) + BATCH.nbytes + 4 * 8 * 3


def test_what_autograd_keeps_is_counted_once() -> None:
    """ReLU keeps its result, which is the next layer's input: one storage."""
    two = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
    weights = 4 * (5 * 3 + 3 + 3 * 2 + 2)
    assert training_bytes([(two, BATCH)], slots=0) == weights * 2 + BATCH.nbytes + 4 * 8 * (3 + 2)


def test_frozen_weights_have_no_gradient_and_no_slots() -> None:
    layer = nn.Linear(5, 3).requires_grad_(False)
    assert training_bytes([(layer, BATCH)], slots=2) == 4 * (5 * 3 + 3) + BATCH.nbytes + 4 * 8 * 3


def test_two_stages_are_held_together_and_a_larger_batch_takes_more() -> None:
    first, last = nn.Linear(5, 3), nn.Linear(3, 2)
    together = training_bytes([(first, BATCH), (last, torch.zeros(8, 3))], slots=1)
    assert together == training_bytes([(first, BATCH)], 1) + training_bytes([(last, torch.zeros(8, 3))], 1)
    assert training_bytes([(first, torch.zeros(16, 5))], 1) - training_bytes([(first, BATCH)], 1) == 4 * 8 * (5 + 3)


def test_the_stage_is_left_as_it_was() -> None:
    stage = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Dropout()).eval()
    before = {name: tensor.clone() for name, tensor in stage.state_dict().items()}
    state = torch.get_rng_state()
    training_bytes([(stage, torch.randn(8, 5, generator=torch.Generator().manual_seed(0)))], slots=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stage.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module.training for module in stage.modules())
    assert all(parameter.grad is None for parameter in stage.parameters())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_slots_are_those_that_torch_makes(name: str, momentum: float) -> None:
    layer = nn.Linear(5, 3)
    made = torch.optim.Adam(layer.parameters()) if name == "adam" else None
    optimizer = made or torch.optim.SGD(layer.parameters(), lr=0.1, momentum=momentum)
    layer(BATCH).sum().backward()
    optimizer.step()
    held = [
        value
        for slots in optimizer.state.values()
        for value in slots.values()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    ]
    assert sum(each.numel() for each in held) == optimizer_slots(name, momentum) * (5 * 3 + 3)
    with pytest.raises(MilkglassError, match="expected sgd or adam"):
        optimizer_slots("rmsprop", 0.0)
