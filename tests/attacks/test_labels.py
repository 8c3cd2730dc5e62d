"""Labels leak from honest gradients and from a party's own activations, and not from noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.attacks.labels import GradientDirection, GradientNorm, LabelAttack, ModelCompletion
from milkglass.errors import AuditError, MissingKnowledgeError
from milkglass.leakage.classification import balanced_accuracy
from milkglass.leakage.membership import leak_auc
from milkglass.randomness import drawing_from
from milkglass.transcript import LabelView

ATTACKS = (GradientNorm(), GradientDirection(), ModelCompletion())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def honest(classes: int, rare: float | None = None, known: int = 3, count: int = 600) -> tuple[LabelView, Tensor]:
    """The gradients that a little top network sends, after some training; `known` rows of each class are known."""
    draws = generator(classes)
    labels_T = torch.randint(classes, (count,), generator=draws)
    if rare is not None:
        labels_T = (torch.rand(count, generator=draws) < rare).long()
    z_TD = torch.randn(count, 10, generator=draws) + 1.2 * F.one_hot(labels_T, 10)
    with drawing_from(draws):
        top = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, classes))
    optimizer = torch.optim.Adam(top.parameters(), lr=1e-2)
    for _ in range(20):
        loss = F.cross_entropy(top(z_TD), labels_T)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    z_TD.requires_grad_(True)
    (gradients_TD,) = torch.autograd.grad(F.cross_entropy(top(z_TD), labels_T), z_TD)
    rows_k = torch.cat([(labels_T == label).nonzero()[:known, 0] for label in range(classes)])
    return LabelView(gradients_TD, z_TD.detach(), rows_k, labels_T[rows_k], classes), labels_T


def area(attack: LabelAttack, view: LabelView, labels_T: Tensor) -> float:
    return leak_auc(attack.attack(view).scores_TK, labels_T).value


def test_a_rare_label_leaks_from_norm_and_from_direction() -> None:
    view, labels_T = honest(classes=2, rare=0.15)
    assert area(GradientNorm(), view, labels_T) > 0.9
    assert area(GradientDirection(), view, labels_T) > 0.97
    scores_TK = GradientDirection().attack(view).scores_TK
    assert balanced_accuracy(scores_TK.argmax(1), labels_T) > 0.9


def test_two_classes_need_little_to_be_known() -> None:
    view, labels_T = honest(classes=2, rare=0.15)
    none = replace(view, known_rows=view.known_rows[:0], known_labels=view.known_labels[:0])
    assert area(GradientNorm(), none, labels_T) == pytest.approx(area(GradientNorm(), view, labels_T))
    one = replace(view, known_rows=view.known_rows[3:4], known_labels=view.known_labels[3:4])
    assert one.known_labels.tolist() == [1]
    assert area(GradientDirection(), one, labels_T) > 0.9
    with pytest.raises(MissingKnowledgeError, match="'gradient direction' needs a row of known label for class 1"):
        GradientDirection().attack(none)


@pytest.mark.parametrize("classes", [3, 5])
def test_of_several_labels_the_direction_tells_most(classes: int) -> None:
    view, labels_T = honest(classes)
    assert area(GradientDirection(), view, labels_T) > 0.9
    assert area(GradientDirection(), view, labels_T) > area(GradientNorm(), view, labels_T)


@pytest.mark.parametrize("classes", [2, 4])
def test_model_completion_reads_labels_from_the_partys_own_activations(classes: int) -> None:
    view, labels_T = honest(classes, known=4)
    sharper = replace(view, activations=torch.randn(600, 10, generator=generator()) + 3 * F.one_hot(labels_T, 10))
    found = ModelCompletion().attack(sharper).scores_TK
    assert balanced_accuracy(found.argmax(1), labels_T) > 0.85
    plain = ModelCompletion(rounds=0).attack(sharper).scores_TK
    assert balanced_accuracy(found.argmax(1), labels_T) > balanced_accuracy(plain.argmax(1), labels_T)
    assert found.exp().sum(1).allclose(torch.ones(600, dtype=torch.float64))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
@pytest.mark.parametrize("classes", [2, 4])
def test_noise_tells_no_label(attack: LabelAttack, classes: int) -> None:
    view, labels_T = honest(classes)
    draws = generator(8)
    noise = replace(
        view, gradients=torch.randn(600, 10, generator=draws), activations=torch.rand(600, 7, generator=draws)
    )
    unknown_T = torch.ones(600, dtype=torch.bool)
    unknown_T[view.known_rows] = False
    found = leak_auc(attack.attack(noise).scores_TK[unknown_T], labels_T[unknown_T])
    assert found.low <= 0.5 <= found.high


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_gradients_of_any_shape_and_of_zero_are_taken(attack: LabelAttack) -> None:
    view, labels_T = honest(classes=3)
    assert view.activations is not None
    maps = replace(
        view, gradients=view.gradients.reshape(600, 5, 2, 1), activations=view.activations.reshape(600, 2, 5)
    )
    assert torch.equal(attack.attack(maps).scores_TK, attack.attack(view).scores_TK)
    nothing = replace(view, gradients=torch.zeros(600, 10), activations=torch.zeros(600, 10))
    assert area(attack, nothing, labels_T) == pytest.approx(0.5)


def test_what_is_missing_is_named_and_bad_input_refused() -> None:
    view, _ = honest(classes=3)
    with pytest.raises(MissingKnowledgeError, match="'model completion' needs the party's own activations"):
        ModelCompletion().attack(replace(view, activations=None))
    known = view.known_labels != 2
    partly = replace(view, known_rows=view.known_rows[known], known_labels=view.known_labels[known])
    for attack in ATTACKS:
        with pytest.raises(MissingKnowledgeError, match="needs a row of known label for class 2"):
            attack.attack(partly)
    with pytest.raises(AuditError, match="gradients: not all values are finite"):
        GradientNorm().attack(replace(view, gradients=view.gradients / 0))
    with pytest.raises(AuditError, match="known rows are out of range; expected 0 to 599"):
        replace(view, known_rows=view.known_rows + 600)
    with pytest.raises(AuditError, match="known labels are out of range; expected 0 to 2"):
        replace(view, known_labels=view.known_labels + 1)
    with pytest.raises(AuditError, match="rounds = -1"):
        ModelCompletion(rounds=-1)
