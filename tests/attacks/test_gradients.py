"""Records from shared gradients: closed forms exactly, descent by a wide margin."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.attacks.gradients import (
    GradientInversion,
    GradientView,
    closed_form,
    gradients_from_step,
    restore_labels,
    shared_gradients,
)
from milkglass.errors import AuditError
from milkglass.leakage.reconstruction import squared_errors
from milkglass.networks import cnn, mlp
from milkglass.randomness import drawing_from, public_source

SHAPE = (1, 8, 8)


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


def network(kind: str, seed: int = 0) -> nn.Module:
    with drawing_from(public_source(seed).generator("network")):
        if kind == "plain":
            layers = [nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1, stride=2), nn.ReLU()]
            return nn.Sequential(*layers, nn.Flatten(), nn.Linear(192, 10))
        return cnn(SHAPE, 10, width=8, hidden=32) if kind == "cnn" else mlp(SHAPE, 10, (32,))


def view_of(kind: str, rows: slice, labels_known: bool = False) -> tuple[GradientView, Tensor, Tensor]:
    x, y = digits()
    model = network(kind)
    shared = shared_gradients(model, x[rows], y[rows])
    count = len(x[rows])
    return GradientView(model, shared, SHAPE, 10, count, y[rows] if labels_known else None), x[rows], y[rows]


def error(made: Tensor, truth: Tensor) -> float:
    return squared_errors(made, truth).mean().item()


@pytest.mark.parametrize("row", range(5))
def test_behind_a_fully_connected_layer_the_record_is_read_off(row: int) -> None:
    view, x, y = view_of("mlp", slice(row, row + 1))
    made = GradientInversion().attack(view)
    torch.testing.assert_close(made.records, x, atol=1e-5, rtol=0)
    assert torch.equal(made.labels, y)
    assert made.distance < 1e-6


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_the_label_of_one_record_is_always_right(kind: str) -> None:
    for row in range(12):
        view, _, y = view_of(kind, slice(row, row + 1))
        assert torch.equal(restore_labels(view), y)


def test_a_last_layer_without_bias_tells_the_label_behind_a_relu() -> None:
    x, y = digits()
    with drawing_from(public_source(0).generator("n")):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10, bias=False))
    for row in range(20):
        shared = shared_gradients(model, x[row : row + 1], y[row : row + 1])
        assert restore_labels(GradientView(model, shared, SHAPE, 10, 1)).item() == y[row]
    two = GradientView(model, shared_gradients(model, x[:2], y[:2]), SHAPE, 10, 2)
    with pytest.raises(AuditError, match="give `labels`"):
        restore_labels(two)


def test_the_labels_of_several_records_are_mostly_right() -> None:
    view, _, y = view_of("cnn", slice(0, 8))
    made = restore_labels(view).bincount(minlength=10)
    assert (made - y.bincount(minlength=10)).abs().sum() <= 4  # at most two of eight are wrong


def test_one_digit_is_rebuilt_from_a_convolutional_network() -> None:
    view, x, y = view_of("plain", slice(3, 4))
    made = GradientInversion(steps=100, starts=1).attack(view)
    assert torch.equal(made.labels, y)
    assert error(made.records, x) < 0.1 * error(digits()[0].mean(0, keepdim=True), x)
    assert made.distance < 0.1


def test_a_step_of_federated_averaging_is_a_gradient() -> None:
    x, y = digits()
    model = network("mlp")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    expected = shared_gradients(model, x[:1], y[:1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(x[:1]), y[:1]).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    stepped = gradients_from_step(before, list(model.parameters()), 0.1)
    for one, other in zip(stepped, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=0)
    made = GradientInversion().attack(GradientView(network("mlp"), stepped, SHAPE, 10, 1))
    assert error(made.records, x[:1]) < 1e-4
    with pytest.raises(AuditError, match="do not match"):
        gradients_from_step(before, before[:-1], 0.1)
    with pytest.raises(AuditError, match="learning_rate"):
        gradients_from_step(before, before, 0.0)


def test_a_closed_door_stays_closed() -> None:
    view, x, _ = view_of("plain", slice(3, 4))
    draws = public_source(1).generator("noise")
    noise = tuple(torch.randn(g.shape, generator=draws) * g.std() * 100 for g in view.gradients)
    made = GradientInversion(steps=30, starts=1).attack(replace(view, gradients=noise))
    assert error(made.records, x) > 0.8 * error(digits()[0].mean(0, keepdim=True), x)
    several, _, _ = view_of("mlp", slice(0, 2))
    assert closed_form(several) is None  # a sum of two records is no record
    assert closed_form(view) is None  # a convolution comes first


def test_a_closed_form_that_does_not_explain_the_gradients_is_not_believed() -> None:
    x, y = digits()
    with drawing_from(public_source(0).generator("n")):
        model = nn.Sequential(nn.Flatten(), nn.Softmax(dim=1), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    view = GradientView(model, shared_gradients(model, x[:1], y[:1]), SHAPE, 10, 1)
    exact = closed_form(view)
    assert exact is not None
    assert error(exact, x[:1]) > 0.05  # it found what the softmax made of the record
    made = GradientInversion(steps=2, starts=1).attack(view)
    assert not torch.equal(made.records, exact)


def test_the_model_is_left_alone_and_the_same_seed_gives_the_same_bits() -> None:
    view, _, _ = view_of("cnn", slice(0, 2), labels_known=True)
    before = copy.deepcopy(view.model.state_dict())
    attack = GradientInversion(steps=5, starts=2)
    seen: list[tuple[int, int]] = []
    first = attack.attack(view, lambda done, total: seen.append((done, total)))
    assert seen == [(5, 10), (10, 10)]
    assert torch.equal(first.records, attack.attack(view).records)
    assert not torch.equal(first.records, GradientInversion(steps=5, starts=2, seed=1).attack(view).records)
    assert all(torch.equal(before[name], value) for name, value in view.model.state_dict().items())
    assert all(parameter.grad is None for parameter in view.model.parameters())
    assert first.records.shape == (2, *SHAPE)


def test_bad_views_and_settings() -> None:
    view, _, _ = view_of("mlp", slice(0, 1))
    with pytest.raises(AuditError, match="number 0 has shape"):
        replace(view, gradients=tuple(reversed(view.gradients)))
    with pytest.raises(AuditError, match="there are 3"):
        replace(view, gradients=view.gradients[:-1])
    with pytest.raises(AuditError, match="not all values are finite"):
        replace(view, gradients=tuple(g * float("nan") for g in view.gradients))
    with pytest.raises(AuditError, match="a label for each record"):
        replace(view, labels=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(AuditError, match="value_range"):
        replace(view, value_range=(1.0, 0.0))
    with pytest.raises(AuditError, match="at least one step"):
        GradientInversion(steps=0)
    assert repr(GradientInversion()) == ("GradientInversion(steps=1000, starts=2, smoothness=0.001, rate=0.1, seed=0)")
    assert GradientInversion.knows == ("gradients", "client weights", "server weights")
