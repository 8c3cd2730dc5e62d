"""The adversary in the loop: it walks through an open door, the stage learns to shut it, and a resume is exact."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.defenses.adversary import Adversary, decoder_success, ridge_success
from milkglass.errors import RecipeError, RunError
from milkglass.randomness import drawing_from, public_source

SOURCE = public_source(0)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


X, Y = uniform(48, 1, 8, 8), torch.arange(48) % 3
SENT = {
    "maps": F.pixel_unshuffle(X, 4),
    "maps that do not divide": F.interpolate(X, (3, 3)),
    "flat": X.flatten(1) @ uniform(64, 64, seed=1),
}


def begun(x: Tensor, z: Tensor, weight: float = 1.0, learning_rate: float = 1e-3, steps: int = 1) -> Adversary:
    defense = Adversary(weight, learning_rate, steps=steps)
    defense.begin(x, z, SOURCE)
    return defense


def trained(defense: Adversary, x: Tensor, z: Tensor, count: int) -> Adversary:
    for _ in range(count):
        defense.learn(x, z)
    return defense


def value(penalty: Tensor | None) -> float:
    assert penalty is not None
    assert penalty.shape == ()
    return penalty.item()


def decoded(defense: Adversary, x: Tensor, z: Tensor) -> float:
    """The trained decoder's own success."""
    assert defense._decoder is not None
    return decoder_success(defense._decoder(z), x).item()


@pytest.mark.parametrize("sent", SENT)
def test_penalty_is_a_share_of_what_may_be_rebuilt(sent: str) -> None:
    defense = begun(X, SENT[sent], 2.0)
    for labels in (None, Y):
        assert 0 <= value(trained(defense, X, SENT[sent], 3).penalty(X, SENT[sent], labels)) <= 2


@pytest.mark.parametrize("sent", ["maps", "flat"])
def test_the_open_door_is_walked_through(sent: str) -> None:
    z = SENT[sent]
    defense = begun(X, z, 1.0, 1e-2)
    assert decoded(defense, X, z) == pytest.approx(1 / 48, abs=1e-4)  # the mean record, of the batch itself
    assert decoded(trained(defense, X, z, 400), X, z) > 0.9


def test_what_does_not_depend_on_the_records_is_no_success() -> None:
    other, x = uniform(512, 16, seed=2), uniform(512, 1, 4, 4)
    defense = begun(x, other)
    for rows in itertools.chain.from_iterable([torch.split(torch.arange(256), 64)] * 5):
        defense.learn(x[rows], other[rows])
    assert value(defense.penalty(x[256:], other[256:])) < 0.05  # records that it has not learned from


@pytest.mark.parametrize("labels", [None, Y])
def test_ridge_success_is_that_of_fits_to_all_the_others(labels: Tensor | None) -> None:
    z = uniform(48, 7, seed=6).double()
    x = (z.square() @ uniform(7, 64, seed=7).double()).reshape(X.shape) + X
    classes = F.one_hot(labels if labels is not None else torch.zeros_like(Y)).double()
    within = z - classes @ torch.linalg.lstsq(classes, z).solution
    shares = []
    for penalty in (0.01, 0.1, 1.0):
        shrink = (penalty * within.square().sum(1).mean()) * torch.eye(7, dtype=z.dtype)
        wrong, nothing = [], []
        for row in range(len(x)):
            rest = torch.arange(len(x)) != row
            means_z = torch.linalg.lstsq(classes[rest], z[rest]).solution
            means_x = torch.linalg.lstsq(classes[rest], x[rest].flatten(1)).solution
            inner, outer = z[rest] - classes[rest] @ means_z, x[rest].flatten(1) - classes[rest] @ means_x
            weights = torch.linalg.solve(inner.T @ inner + shrink, inner.T @ outer)
            alone = x[row].flatten() - classes[row] @ means_x
            nothing.append(alone)
            wrong.append(alone - (z[row] - classes[row] @ means_z) @ weights)
        shares.append(1 - (torch.stack(wrong).square().mean() / torch.stack(nothing).square().mean()).item())
    assert 0.1 < max(shares) < 0.9
    assert ridge_success(x, z, labels).item() == pytest.approx(max(shares), rel=1e-6)


def test_ridge_success_is_exact_on_the_records_and_blind_to_scale_and_rotation() -> None:
    x = X.flatten(1)[:, :6]
    assert ridge_success(x, x).item() > 0.99
    turned = 1e-3 * x @ torch.linalg.qr(uniform(6, 6, seed=4)).Q + 5
    assert ridge_success(x, turned).item() == pytest.approx(ridge_success(x, x).item(), abs=1e-3)


def test_what_the_label_tells_is_no_success() -> None:
    x = uniform(3, 1, 8, 8, seed=3)[Y] + 0.1 * X
    told = F.one_hot(Y).float() + 0.01 * uniform(48, 3, seed=5)
    assert ridge_success(x, told).item() > 0.9
    assert ridge_success(x, told, Y).item() < 0.05
    means = torch.stack([x[label == Y].mean(0) for label in range(3)])[Y]
    assert decoder_success(means, x).item() > 0.9
    assert decoder_success(means, x, Y).item() == pytest.approx(3 / 48, abs=1e-4)  # the batch's own means fit it a bit


def test_batches_in_which_nothing_can_be_learned() -> None:
    alone = torch.arange(48)
    assert torch.equal(ridge_success(X, SENT["flat"], alone), ridge_success(X, SENT["flat"]))
    assert torch.equal(decoder_success(X * 0.9, X, alone), decoder_success(X * 0.9, X))
    for x, z in ((X[:1], SENT["flat"][:1]), (torch.ones_like(X), SENT["flat"]), (X, torch.zeros(48, 5))):
        z = z.clone().requires_grad_()
        penalty = begun(x, z.detach()).penalty(x, z)
        assert value(penalty) < 0.03  # the mean of the batch itself explains 1 / 48
        penalty.backward()  # type: ignore[union-attr]
        assert z.grad is None or torch.isfinite(z.grad).all()


def test_descending_the_penalty_lowers_success_of_both_adversaries() -> None:
    z = SENT["maps"].clone().requires_grad_()
    defense = trained(begun(X, z, 1.0, 1e-2), X, z, 300)
    before = (decoded(defense, X, z), ridge_success(X, z).item())
    optimizer = torch.optim.Adam([z], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        penalty = defense.penalty(X, z)
        assert penalty is not None
        penalty.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    after = (decoded(defense, X, z), ridge_success(X, z).item())
    assert before[0] > after[0] + 0.5
    assert before[1] > 0.1
    assert after[1] < before[1] / 2


def test_the_decoder_stands_still_in_the_penalty_and_the_stage_in_learning() -> None:
    z = SENT["maps"].clone().requires_grad_()
    defense = trained(begun(X, z, 1.0, 1e-2), X, z, 100)
    assert defense._decoder is not None
    stood_still = z.grad is None
    assert stood_still
    for parameter in defense._decoder.parameters():
        parameter.grad = None
    before = defense.state()
    penalty = defense.penalty(X, z)
    assert penalty is not None
    penalty.backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    assert z.grad.any()
    assert all(parameter.grad is None for parameter in defense._decoder.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in defense.state().items())


@pytest.mark.parametrize("sent", SENT)
@pytest.mark.parametrize("begun_first", [False, True])
def test_a_resume_gives_the_same_bits(sent: str, begun_first: bool) -> None:
    z = SENT[sent]
    whole = trained(begun(X, z, 1.0, steps=2), X, z, 3)
    kept = whole.state()
    trained(whole, X, z, 3)
    resumed = Adversary(1.0, steps=2)
    if begun_first:
        resumed.begin(X, z, SOURCE)
    resumed.load_state(kept)
    assert all(torch.equal(kept[name], tensor) for name, tensor in resumed.state().items())
    resumed.begin(X[:5], z[:5], public_source(1))
    trained(resumed, X, z, 3)
    ended = whole.state()
    assert resumed.state().keys() == ended.keys()
    assert all(torch.equal(ended[name], tensor) for name, tensor in resumed.state().items())
    assert any(not torch.equal(ended[name], tensor) for name, tensor in kept.items())


def test_begin_again_changes_nothing_and_weights_follow_from_the_source() -> None:
    z = SENT["flat"]
    defense = trained(begun(X, z), X, z, 2)
    before = defense.state()
    defense.begin(X, z, public_source(1))
    assert all(torch.equal(before[name], tensor) for name, tensor in defense.state().items())
    name = "decoder.network.first.weight"
    assert torch.equal(begun(X, z).state()[name], begun(X, z).state()[name])
    other = Adversary()
    other.begin(X, z, public_source(1))
    assert not torch.equal(begun(X, z).state()[name], other.state()[name])


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    defense = trained(begun(X, SENT["maps"]), X, SENT["maps"], 2)
    defense.penalty(X, SENT["maps"])
    assert torch.equal(torch.get_rng_state(), before)


def test_weight_0_and_an_adversary_that_has_not_begun_do_nothing() -> None:
    nothing = begun(X, SENT["flat"], 0.0)
    for defense in (nothing, Adversary(1.0)):
        defense.learn(X, SENT["flat"])
        assert defense.penalty(X, SENT["flat"], Y) is None
        assert defense.state() == {}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Adversary(-1.0), "weight is -1.0; expected a number from 0 on"),
        (lambda: Adversary(float("nan")), "weight is nan"),
        (lambda: Adversary(float("inf")), "weight is inf"),
        (lambda: Adversary(learning_rate=0.0), "learning_rate is 0.0; expected a positive number"),
        (lambda: Adversary(learning_rate=float("nan")), "learning_rate is nan"),
        (lambda: Adversary(width=0), "width = 0, steps = 1; expected at least 1 of each"),
        (lambda: Adversary(steps=0), "width = 16, steps = 0"),
    ],
)
def test_settings_out_of_range(make: Callable[[], Adversary], words: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(words)) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_a_state_of_another_decoder_is_refused() -> None:
    state = begun(X, SENT["maps"]).state()
    other = Adversary(width=4)
    other.load_state(state)
    with pytest.raises(RunError, match="not one of width 4"):
        other.begin(X, SENT["maps"], SOURCE)


def digits() -> tuple[Tensor, Tensor]:
    pictures, labels = load_digits(return_X_y=True)
    return torch.tensor(pictures, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)


def split_training(defense: Adversary, x: Tensor, y_B: Tensor, epochs: int) -> tuple[nn.Module, nn.Module]:
    with drawing_from(torch.Generator().manual_seed(0)):
        bottom = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        top = nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam([*bottom.parameters(), *top.parameters()], lr=3e-3)
    order = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(x), generator=order)[: len(x) // 128 * 128], 128):
            z = bottom(x[rows])
            defense.begin(x[rows], z, SOURCE)
            penalty = defense.penalty(x[rows], z, y_B[rows])
            optimizer.zero_grad()
            loss = F.cross_entropy(top(z), y_B[rows]) + (0 if penalty is None else penalty)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            defense.learn(x[rows], z)
    return bottom, top


@torch.no_grad()
def accuracy_and_peek(bottom: nn.Module, top: nn.Module, x: Tensor, y_B: Tensor) -> tuple[float, float]:
    """On the records from 1,200 on; the attacker's ridge regression knows 300 of them, and is scored beyond the label's
    mean picture."""
    z = bottom(x[1200:])
    seen = torch.cat([z.flatten(1), F.one_hot(y_B[1200:])], dim=1)
    truth = x[1200:].flatten(1)
    entitled = F.one_hot(y_B[1200:]).float()
    rebuilt, mean = (
        torch.tensor(Ridge(alpha=alpha).fit(given[:300], truth[:300]).predict(given[300:]))
        for given, alpha in ((seen, 0.1), (entitled, 1e-3))
    )
    peek = 1 - F.mse_loss(rebuilt, truth[300:]) / F.mse_loss(mean, truth[300:])
    accuracy = (top(z).argmax(1) == y_B[1200:]).float().mean()
    return accuracy.item(), peek.item()


@pytest.mark.slow
def test_a_training_on_digits_keeps_accuracy_and_shows_less() -> None:
    x, y_B = digits()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    x, y_B = x[order], y_B[order]
    plain, defended = (
        accuracy_and_peek(*split_training(Adversary(weight), x[:1200], y_B[:1200], 15), x, y_B) for weight in (0.0, 2.0)
    )
    assert plain[0] > 0.93
    assert defended[0] > plain[0] - 0.05
    assert plain[1] > 0.6
    assert defended[1] < plain[1] - 0.08
