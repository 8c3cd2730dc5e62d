"""Query-free inversion on digits: a shadow fitted to the server's stage reads the real client's activations."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.attacks.decoder import Decoder
from milkglass.attacks.features import answer_alone
from milkglass.attacks.kernel_ridge import KernelRidge
from milkglass.attacks.ridge import Ridge
from milkglass.attacks.shadow import Moments, Shadow, in_shadow
from milkglass.cuts import cut
from milkglass.errors import AuditError, MissingKnowledgeError
from milkglass.leakage.reconstruction import squared_errors
from milkglass.networks import cnn, mlp
from milkglass.randomness import drawing_from, public_source
from milkglass.transcript import Knowledge, Pairs, Release, View

QUICK = Shadow(steps=120, decoder=Decoder(steps=20, width=4))


def halves(generator: torch.Generator, network: str = "cnn") -> tuple[nn.Module, nn.Module]:
    with drawing_from(generator):
        model = cnn((1, 8, 8), 10, width=8, hidden=32) if network == "cnn" else mlp((1, 8, 8), 10, (32,))
    return cut(model, "block1" if network == "cnn" else "flatten")


@cache
def digits_view(network: str = "cnn") -> tuple[View, Tensor]:
    """A trained client, 600 auxiliary records, 200 validation, 200 target; entitled: the network's own answer."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(data.target)
    source = public_source(11)
    bottom, top = halves(source.generator("weights"), network)
    optimizer = torch.optim.Adam([*bottom.parameters(), *top.parameters()], lr=1e-2)
    draws = source.generator("batches")
    for _ in range(150):
        rows = torch.randint(700, (64,), generator=draws)
        optimizer.zero_grad()
        F.cross_entropy(top(bottom(x[rows])), y[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for parameter in top.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    with torch.no_grad():
        sent = bottom(x)
        entitled = top(sent).softmax(1)
    parts = [slice(700, 1300), slice(1300, 1500), slice(1500, 1700)]
    known, validation, target = (Pairs(sent[part], x[part], entitled[part], y[part]) for part in parts)
    knowledge = Knowledge(architecture=lambda generator: halves(generator, network), server=top)
    release = Release(target.activations, target.entitled, target.labels)
    return View(known, validation, release, knowledge=knowledge), target.records


def error(made: Tensor, truth: Tensor) -> float:
    return squared_errors(made, truth).mean().item()


def test_a_shadow_tells_more_than_the_answer_does() -> None:
    view, truth = digits_view()
    alone = min(error(attack.attack(answer_alone(view)).target, truth) for attack in (Ridge(), KernelRidge()))
    made = QUICK.attack(view)
    assert made.target.shape == truth.shape
    assert error(made.target, truth) < 0.85 * alone
    assert error(made.validation, view.validation.records) < 0.85 * alone


def test_it_looks_at_no_pair() -> None:
    view, _ = digits_view()
    attack = Shadow(shadows=2, steps=10, decoder=Decoder(steps=5, width=4))
    first = attack.attack(view)
    other = replace(view, known=replace(view.known, activations=torch.zeros_like(view.known.activations)), release=None)
    again = attack.attack(other)  # also: the same seed gives the same bits
    assert torch.equal(first.target, again.target)
    assert torch.equal(first.validation, again.validation)


def test_the_open_door_and_the_closed_one() -> None:
    view, truth = digits_view("mlp")  # cut after the flattening: the raw record crosses
    quick = Shadow(shadows=2, steps=1, decoder=Decoder(steps=1, width=4))
    alone = error(Ridge().attack(answer_alone(view)).target, truth)
    assert error(quick.attack(view).target, truth) < 0.05 * alone
    closed = replace(view, target=replace(view.target, activations=view.target.activations.roll(1, dims=0)))
    assert error(quick.attack(closed).target, truth) > 0.95 * alone


def test_moments_are_zero_for_what_was_seen_and_count_each_difference() -> None:
    z = torch.randn(40, 3, generator=public_source(0).generator("z"))
    labels = torch.arange(40) % 4
    moments = Moments(Release(z, torch.zeros(40, 0), labels))
    torch.testing.assert_close(moments.mismatch(z, labels), torch.tensor(0.0), atol=1e-9, rtol=0)
    shifted = moments.mismatch(z + 1, labels)  # the mean over all and that of each class, by 1
    torch.testing.assert_close(shifted, 2 / z.var())
    assert moments.mismatch(2 * (z - z.mean(0)) + z.mean(0), labels) > 0.5  # the spread
    assert moments.mismatch(z, labels.roll(1)) > 0.01  # the classes alone
    assert torch.isfinite(moments.mismatch(z, labels + 7))  # none of its classes were seen


def test_shadow_pairs_are_what_shadows_send() -> None:
    view, truth = digits_view()
    shadows = [halves(public_source(seed).generator("w"))[0].eval() for seed in (1, 2, 3)]
    made = in_shadow(view, shadows)
    count = len(view.known)
    assert len(made.known) == 2 * count
    with torch.no_grad():
        torch.testing.assert_close(made.known.activations[count:], shadows[1](view.known.records))
        torch.testing.assert_close(made.validation.activations, shadows[2](view.validation.records))
    assert torch.equal(made.known.records[count:], view.known.records)
    assert torch.equal(made.target.activations[-len(truth) :], view.target.activations)


def test_the_servers_stage_is_left_as_it_was() -> None:
    view, _ = digits_view()
    server = view.knowledge.server
    assert server is not None
    before = [parameter.clone() for parameter in server.parameters()]
    Shadow(shadows=2, steps=2, decoder=Decoder(steps=1, width=4)).attack(view)
    assert all(torch.equal(one, other) for one, other in zip(before, server.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in server.parameters())


def test_missing_knowledge_is_named() -> None:
    view, _ = digits_view()
    without = replace(view, knowledge=replace(view.knowledge, architecture=None, server=None))
    with pytest.raises(MissingKnowledgeError, match="'shadow' needs architecture, server weights"):
        QUICK.attack(without)
    unlabelled = replace(view, target=replace(view.target, labels=None))
    with pytest.raises(MissingKnowledgeError, match="labels"):
        QUICK.attack(unlabelled)


def test_settings() -> None:
    assert repr(Shadow(steps=7)) == (
        "Shadow(shadows=3, steps=7, moments=10.0, decoder=Decoder(steps=500, width=32, seed=0), seed=0)"
    )
    with pytest.raises(AuditError, match="expected at least 2 shadows"):
        Shadow(shadows=1)


def test_a_client_that_drops_values_is_attacked_the_same_way_twice() -> None:
    view, _ = digits_view()
    whole = view.knowledge.architecture
    assert whole is not None

    def dropping(generator: torch.Generator) -> tuple[nn.Module, nn.Module]:
        bottom, top = whole(generator)
        return nn.Sequential(bottom, nn.Dropout(0.3)), top

    view = replace(view, knowledge=replace(view.knowledge, architecture=dropping))
    attack = Shadow(shadows=2, steps=5, decoder=Decoder(steps=5, width=4))
    first = attack.attack(view)
    state = torch.get_rng_state()
    assert torch.equal(attack.attack(view).target, first.target)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not asked
