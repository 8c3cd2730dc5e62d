"""A client does not go on under a server that does not care for labels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from milkglass.errors import HijackError
from milkglass.hijack import Gathered, HijackGuard, angle, hijack_score, hijack_value
from milkglass.randomness import Source
from tests.helpers import KEY

# -- the statistics, against values computed by hand


@pytest.mark.parametrize(
    ("a", "b", "radians"),
    [
        ([3.0, 0.0], [0.0, 2.0], math.pi / 2),
        ([1.0, 0.0], [-2.0, 0.0], math.pi),
        ([1.0, 1.0], [1.0, 0.0], math.pi / 4),
        ([0.1, 0.7], [0.2, 1.4], 0.0),
        ([0.0, 0.0], [1.0, 0.0], 0.0),
    ],
)
def test_angles(a: list[float], b: list[float], radians: float) -> None:
    assert angle(torch.tensor(a), torch.tensor(b)) == pytest.approx(radians, abs=1e-7)


def test_a_batch_is_gathered_by_class() -> None:
    dz = torch.tensor([[[1.0], [2.0]], [[3.0], [5.0]], [[10.0], [20.0]]])  # three records of shape (2, 1)
    batch = Gathered.of(dz, torch.tensor([2, 0, 2]), 3)
    assert batch.sum_KD.tolist() == [[3.0, 5.0], [0.0, 0.0], [11.0, 22.0]]
    both = batch.faded(0.5).with_(batch)
    assert both.sum_KD.tolist() == [[4.5, 7.5], [0.0, 0.0], [16.5, 33.0]]
    assert both.weight == 1.5
    assert both.distance(batch) == 0  # the means are the same
    assert Gathered(torch.tensor([[6.0, 8.0]]), 2.0).distance(Gathered(torch.zeros(1, 2), 1.0)) == 5


@pytest.mark.parametrize(
    ("fake", "first", "second", "value"),
    [
        # R = (4, 0), its mean (2, 0): theta(F, R) = pi/2, d(F, R) = sqrt 8; theta(R1, R2) = 0, d(R1, R2) = 2
        ([0.0, 2.0], [1.0, 0.0], [3.0, 0.0], math.pi / 2 * math.sqrt(8) / (math.sqrt(8) + 2)),
        # R = (1, 1), its mean (.5, .5): theta(F, R) = 3 pi/4, d(F, R) = sqrt 2.5; theta(R1, R2) = pi/2, d = sqrt 2
        (
            [-1.0, 0.0],
            [0.0, 1.0],
            [1.0, 0.0],
            math.pi * (0.75 * math.sqrt(2.5) - 0.5 * math.sqrt(2)) / (math.sqrt(2.5) + math.sqrt(2)),
        ),
        ([-1.0, 0.0], [1.0, 0.0], [1.0, 0.0], math.pi),  # labels turn the gradient round, and nothing else moves it
        ([1.0, 0.0], [1.0, 0.0], [1.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 0.0], [0.0, 0.0], 0.0),
    ],
)
def test_the_value_by_hand(fake: list[float], first: list[float], second: list[float], value: float) -> None:
    batches = [Gathered(torch.tensor([sums]), 1.0) for sums in (fake, first, second)]
    assert hijack_value(*batches) == pytest.approx(value, rel=1e-6)


def test_the_score_is_one_half_where_labels_do_not_matter() -> None:
    assert hijack_score(0.0) == 0.5
    assert hijack_score(math.log(3) / 2.5) == pytest.approx(0.75)
    assert hijack_score(-0.3) < 0.5 < hijack_score(0.3) < hijack_score(math.pi) < 1


# -- which batches, which labels


@pytest.mark.parametrize(("share", "period"), [(0.1, 10), (0.25, 4), (0.04, 25)])
def test_one_batch_in_each_period_is_mislabeled_and_never_two_in_a_row(share: float, period: int) -> None:
    guard = HijackGuard(Source(KEY), 3, fake_share=share, warm_up=7)
    chosen = [step for step in range(7 + 200 * period) if guard.mislabels(step)]
    assert [(step - 7) // period for step in chosen] == list(range(200))
    assert min(later - earlier for earlier, later in itertools.pairwise(chosen)) > 1
    assert {(step - 7) % period for step in chosen} == set(range(1, period)), "any place but the first"
    other = HijackGuard(Source(b"x" * 32), 3, fake_share=share, warm_up=7)
    assert chosen != [step for step in range(7 + 200 * period) if other.mislabels(step)]


@pytest.mark.parametrize("classes", [2, 5])
def test_wrong_labels_are_wrong_and_even(classes: int) -> None:
    guard, y = HijackGuard(Source(KEY), classes), torch.arange(4000) % classes
    told = guard.wrong_labels(3, y)
    assert not (told == y).any()
    for label in range(classes):
        counts = torch.bincount(told[y == label], minlength=classes)
        assert counts[label] == 0
        assert (counts.sum() - counts.max() * (classes - 1)).abs() < 0.2 * counts.sum()
    assert torch.equal(told, guard.wrong_labels(3, y))
    assert classes == 2 or not torch.equal(told, guard.wrong_labels(4, y))


# -- the guard before servers that care for labels, and servers that do not

Answer = Callable[[Tensor, Tensor, int], Tensor]
"""(activations (B, D), labels told (B,), step) -> gradient (B, D)."""
W = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def _honest(z: Tensor, y: Tensor, step: int) -> Tensor:  # noqa: ARG001
    return ((z @ W.T).softmax(dim=1) - F.one_hot(y, 4)) @ W / len(z)


def _discriminator(z: Tensor, y: Tensor, step: int) -> Tensor:  # noqa: ARG001
    direction = torch.linspace(-1, 1, 6)
    return -torch.sigmoid(z @ direction)[:, None] * direction / len(z) * (1 + step)  # and it grows


def _noisy(z: Tensor, y: Tensor, step: int) -> Tensor:
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(step))
    return _discriminator(z, y, 0) + 10 * noise / len(z)


def _zeros(z: Tensor, y: Tensor, step: int) -> Tensor:  # noqa: ARG001
    return torch.zeros_like(z)


def _play(guard: HijackGuard, answer: Answer, steps: range) -> None:
    centers = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        y = torch.randint(4, (32,), generator=generator)
        z = centers[y] + torch.randn(32, 6, generator=generator)
        told = guard.wrong_labels(step, y) if guard.mislabels(step) else y
        guard.observe(step, answer(z, told, step), y)


def test_an_honest_server_is_not_accused() -> None:
    for key in range(5):
        guard = HijackGuard(Source(bytes([key]) * 32), 4)
        _play(guard, _honest, range(guard.steps_to_judge))
        early = guard.score
        _play(guard, _honest, range(guard.steps_to_judge, 200))
        assert early is not None
        assert guard.score is not None
        assert min(early, guard.score) > 0.95


@pytest.mark.parametrize("answer", [_discriminator, _noisy, _zeros])
def test_a_server_that_does_not_care_for_labels_is_refused_as_soon_as_it_is_judged(answer: Answer) -> None:
    guard = HijackGuard(Source(KEY), 4)
    _play(guard, answer, range(guard.steps_to_judge - 10))
    words = r"step 4\d: .* score 0\.\d{3} over the last 3 mislabeled batches, expected at least 0\.9"
    with pytest.raises(HijackError, match=words) as caught:
        _play(guard, answer, range(guard.steps_to_judge - 10, guard.steps_to_judge))
    assert "\n" not in str(caught.value)


def test_the_threshold_is_that_of_the_setting() -> None:
    _play(HijackGuard(Source(KEY), 4, threshold=0.3), _discriminator, range(100))
    with pytest.raises(HijackError, match=r"expected at least 0\.9999"):
        _play(HijackGuard(Source(KEY), 4, threshold=0.9999), _honest, range(100))


def test_a_guard_goes_on_from_its_state() -> None:
    whole, stopped, resumed = (HijackGuard(Source(KEY), 4) for _ in range(3))
    _play(whole, _honest, range(75))
    _play(stopped, _honest, range(50))
    resumed.load_state(stopped.state())
    _play(resumed, _honest, range(50, 75))
    assert resumed.score == whole.score
    assert {name: tensor.tolist() for name, tensor in resumed.state().items()} == {
        name: tensor.tolist() for name, tensor in whole.state().items()
    }
    resumed.load_state({})  # a run that had no guard when it was stopped
    assert resumed.score is None
