"""Probes read an attribute that crosses, in plain sight or only by a curved border, and not one that does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from milkglass.attacks.attributes import AttributeProbe, LinearProbe, MlpProbe
from milkglass.attacks.features import answer_alone
from milkglass.errors import AuditError
from milkglass.leakage.classification import balanced_accuracy
from milkglass.transcript import Pairs, Release, View

PROBES = (LinearProbe(), MlpProbe(width=32, epochs=20))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def view_of(activations: Tensor, entitled: Tensor, attribute: Tensor) -> tuple[View, Tensor]:
    """Half known, a quarter validation, a quarter target, with the attribute `a` of the first two."""
    half, rest = len(attribute) // 2, 3 * len(attribute) // 4

    def pairs(rows: slice) -> Pairs:
        return Pairs(activations[rows], activations[rows], entitled[rows], attributes={"a": attribute[rows]})

    target = Release(activations[rest:], entitled[rest:])
    return View(pairs(slice(half)), pairs(slice(half, rest)), target), attribute[rest:]


def crossing(rare: float = 0.5, values: int = 3, count: int = 1200) -> tuple[View, Tensor]:
    """An attribute whose value moves one of 20 coordinates; value 0 is had by all but a share of `rare`."""
    draws = generator()
    attribute_N = torch.randint(1, values, (count,), generator=draws)
    attribute_N *= torch.rand(count, generator=draws) < rare
    z_ND = torch.randn(count, 20, generator=draws)
    z_ND[:, 7] += 5 * attribute_N
    return view_of(z_ND.reshape(count, 5, 2, 2), torch.zeros(count, 0), attribute_N)


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
@pytest.mark.parametrize("rare", [0.6, 0.1])
def test_an_attribute_that_crosses_is_read_a_rare_value_too(probe: AttributeProbe, rare: float) -> None:
    view, true_T = crossing(rare)
    guess = probe.attack(view, "a")
    assert guess.validation_N.shape == (len(view.validation),)
    assert guess.target_T.dtype == torch.int64
    assert balanced_accuracy(guess.target_T, true_T) > 0.8  # always guessing value 0 reaches .33


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
def test_an_attribute_that_crosses_at_a_tiny_scale_is_read(probe: AttributeProbe) -> None:
    view, true_T = crossing()

    def faint(z: Tensor) -> Tensor:
        z = z.clone()
        z[:, 1, 1, 1] *= 1e-5  # coordinate 7
        return z

    faded = replace(
        view,
        known=replace(view.known, activations=faint(view.known.activations)),
        validation=replace(view.validation, activations=faint(view.validation.activations)),
        target=replace(view.target, activations=faint(view.target.activations)),
    )
    assert balanced_accuracy(probe.attack(faded, "a").target_T, true_T) > 0.9


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
def test_an_attribute_that_does_not_cross_is_not_read(probe: AttributeProbe) -> None:
    draws = generator(3)
    coin_N = torch.randint(2, (2000,), generator=draws)
    view, true_T = view_of(torch.randn(2000, 12, generator=draws), torch.zeros(2000, 0), coin_N)
    assert balanced_accuracy(probe.attack(view, "a").target_T, true_T) == pytest.approx(0.5, abs=0.07)


def test_a_curved_border_takes_the_perceptron() -> None:
    draws = generator(4)
    z_ND = torch.randn(1600, 4, generator=draws)
    view, true_T = view_of(z_ND, torch.zeros(1600, 0), (z_ND[:, 0] * z_ND[:, 1] > 0).long())
    linear, curved = (balanced_accuracy(probe.attack(view, "a").target_T, true_T) for probe in PROBES)
    assert linear < 0.6
    assert curved > 0.85


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
def test_what_the_answer_tells_is_read_from_the_answer_alone(probe: AttributeProbe) -> None:
    draws = generator(5)
    answer_N2 = torch.rand(800, 1, generator=draws) * torch.tensor([[1.0, -1.0]]) + torch.tensor([[0.0, 1.0]])
    view, true_T = view_of(torch.randn(800, 6, generator=draws), answer_N2, (answer_N2[:, 0] > 0.5).long())
    assert balanced_accuracy(probe.attack(answer_alone(view), "a").target_T, true_T) > 0.95
    silent, _ = crossing()
    nothing = probe.attack(answer_alone(silent), "a").target_T
    assert len(set(nothing.tolist())) == 1


def test_values_need_not_be_next_to_each_other() -> None:
    view, true_T = crossing()

    def apart(pairs: Pairs) -> Pairs:
        return replace(pairs, attributes={"a": pairs.attributes["a"] * 4 + 1})

    for probe in PROBES:
        moved = replace(view, known=apart(view.known), validation=apart(view.validation))
        assert set(probe.attack(moved, "a").target_T.tolist()) <= {1, 5, 9}
        assert balanced_accuracy(probe.attack(moved, "a").target_T, true_T * 4 + 1) > 0.9


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
def test_the_same_settings_guess_the_same(probe: AttributeProbe) -> None:
    view, _ = crossing(count=400)
    steps: list[tuple[int, int]] = []
    first = probe.attack(view, "a", lambda *step: steps.append(step))
    assert torch.equal(first.target_T, probe.attack(view, "a").target_T)
    assert all(0 < done <= total for done, total in steps)
    assert steps == sorted(steps)


def test_bad_input_is_refused() -> None:
    view, _ = crossing()
    with pytest.raises(AuditError, match=r"'b': the known pairs do not have it; .*known: a"):
        LinearProbe().attack(view, "b")
    with pytest.raises(AuditError, match="'a': the known pairs have one value of it only"):
        LinearProbe().attack(replace(view, known=replace(view.known, attributes={"a": torch.ones(600).long()})), "a")
    with pytest.raises(AuditError, match="vector of whole numbers"):
        LinearProbe().attack(replace(view, known=replace(view.known, attributes={"a": torch.rand(600)})), "a")
    holed = view.target.activations.clone()
    holed[3] = torch.nan
    with pytest.raises(AuditError, match="finite"):
        MlpProbe().attack(replace(view, target=replace(view.target, activations=holed)), "a")
    with pytest.raises(AuditError, match="width = 0"):
        MlpProbe(width=0)
