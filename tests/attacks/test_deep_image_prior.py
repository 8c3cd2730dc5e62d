"""The deep image prior through known clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from milkglass.attacks.deep_image_prior import DeepImagePrior
from milkglass.errors import AuditError, MissingKnowledgeError
from milkglass.leakage.reconstruction import squared_errors
from milkglass.randomness import drawing_from
from milkglass.transcript import Knowledge, Pairs, Release, View


def view_of(client: Callable[[Tensor], Tensor], records: Tensor) -> tuple[View, Tensor]:
    """Half known, a quarter validation, a quarter target."""
    with torch.no_grad():
        sent = client(records)
    nothing, half, rest = torch.zeros(len(records), 0), len(records) // 2, 3 * len(records) // 4

    def pairs(rows: slice) -> Pairs:
        return Pairs(sent[rows], records[rows], nothing[rows])

    target = Release(sent[rest:], nothing[rest:])
    view = View(pairs(slice(half)), pairs(slice(half, rest)), target, knowledge=Knowledge(client=client))
    return view, records[rest:]


def digits(count: int) -> Tensor:
    return torch.tensor(load_digits().images[:count, None] / 16, dtype=torch.float32)


def convolution() -> nn.Module:
    with drawing_from(torch.Generator().manual_seed(3)):
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten())


def test_through_an_identity_client_the_record_itself_is_found() -> None:
    view, truth = view_of(lambda x: x, digits(80))
    made = DeepImagePrior(steps=300, records=4).attack(view).target
    peek = 1 - squared_errors(made, truth[:4]).mean().item() / truth[:4].var().item()
    assert peek >= DeepImagePrior.open_door


def test_every_record_has_a_network_of_its_own() -> None:
    client = convolution()
    view, _ = view_of(client, digits(80))
    attack = DeepImagePrior(steps=30, records=3, width=8)
    first = attack.attack(view)
    changed = view.target.activations.clone()
    changed[1] += 1
    other = attack.attack(replace(view, target=replace(view.target, activations=changed)))
    torch.testing.assert_close(first.target[[0, 2]], other.target[[0, 2]])
    torch.testing.assert_close(first.validation, other.validation)
    assert (first.target[1] - other.target[1]).abs().max() > 0.01
    assert all(parameter.grad is None for parameter in client.parameters())


def test_the_same_seed_gives_the_same_bits() -> None:
    view, _ = view_of(convolution(), digits(80))
    first = DeepImagePrior(steps=10, records=2, width=4).attack(view)
    torch.rand(1)  # the global generator is not asked
    again = DeepImagePrior(steps=10, records=2, width=4).attack(view)
    other = DeepImagePrior(steps=10, records=2, width=4, seed=1).attack(view)
    assert torch.equal(first.target, again.target)
    assert torch.equal(first.validation, again.validation)
    assert not torch.equal(first.target, other.target)


@pytest.mark.parametrize("shape", [(1, 6, 7), (3, 9, 5)])
def test_constant_activations_give_finite_pictures_in_range(shape: tuple[int, ...]) -> None:
    records = 2 * torch.rand(40, *shape, generator=torch.Generator().manual_seed(0)) - 1
    view, truth = view_of(lambda x: 0 * x.flatten(1)[:, :3] + 1, records)
    made = DeepImagePrior(steps=10, records=20, width=4).attack(view)
    assert made.target.shape == truth.shape  # fewer than asked for: all of them
    assert made.validation.shape == view.validation.records.shape
    assert torch.isfinite(made.target).all()
    assert made.target.abs().max() <= 1


def test_bad_input_is_refused() -> None:
    view, _ = view_of(convolution(), digits(80))
    with pytest.raises(MissingKnowledgeError, match="'deep image prior' needs client weights"):
        DeepImagePrior().attack(replace(view, knowledge=Knowledge()))
    with pytest.raises(AuditError, match="cannot be differentiated"):
        DeepImagePrior().attack(replace(view, knowledge=Knowledge(client=lambda x: convolution()(x).detach())))
    rows, _ = view_of(lambda x: x, torch.rand(40, 5))
    with pytest.raises(AuditError, match=r"rebuilds pictures \(C, H, W\); the records have shape \(5,\)"):
        DeepImagePrior().attack(rows)
    with pytest.raises(AuditError, match="expected at least 1 of each"):
        DeepImagePrior(width=0)
    assert repr(DeepImagePrior(steps=2)) == "DeepImagePrior(steps=2, records=32, width=32, seed=0)"
