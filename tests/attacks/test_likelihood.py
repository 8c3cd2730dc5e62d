"""Maximum likelihood through known clients whose answer is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.attacks.likelihood import (
    Likelihood,
    LikelihoodFromGrey,
    LikelihoodFromRidge,
    Prior,
    even_misfit,
    invert,
    noise_share,
    quiet_misfit,
    total_variation,
)
from milkglass.attacks.ridge import Ridge
from milkglass.errors import AuditError, MissingKnowledgeError
from milkglass.leakage.reconstruction import squared_errors
from milkglass.randomness import drawing_from
from milkglass.transcript import Knowledge, Pairs, Release, View

BOTH: tuple[type[Likelihood], ...] = (LikelihoodFromGrey, LikelihoodFromRidge)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def view_of(client: Callable[[Tensor], Tensor], records: Tensor, known: int, sigma: float = 0.0) -> tuple[View, Tensor]:
    """`known` pairs, the rest half validation, half target; Gaussian noise on all that crosses."""
    with torch.no_grad():
        sent = client(records)
    sent = sent + sigma * torch.randn(sent.shape, generator=generator(9), dtype=sent.dtype)
    nothing, middle = torch.zeros(len(records), 0), (known + len(records)) // 2

    def pairs(rows: slice) -> Pairs:
        return Pairs(sent[rows], records[rows], nothing[rows])

    view = View(
        pairs(slice(known)),
        pairs(slice(known, middle)),
        Release(sent[middle:], nothing[middle:]),
        knowledge=Knowledge(client=client, noise_sigma=sigma),
    )
    return view, records[middle:]


def digits(count: int) -> Tensor:
    return torch.tensor(load_digits().images[:count, None] / 16, dtype=torch.float32)


def error(attack: Likelihood | Ridge, view: View, truth: Tensor) -> float:
    made = attack.attack(view).target
    return squared_errors(made, truth[: len(made)]).mean().item()


def bent(width: int, sent: int) -> nn.Module:
    """A client that no linear map undoes."""
    with drawing_from(generator(3)):
        return nn.Sequential(nn.Flatten(), nn.Linear(width, sent), nn.Tanh(), nn.Linear(sent, sent), nn.Softplus())


@pytest.mark.parametrize("kind", BOTH)
def test_through_an_identity_client_the_record_itself_is_found(kind: type[Likelihood]) -> None:
    view, truth = view_of(lambda x: x, digits(60), 40)
    assert 1 - error(kind(records=8), view, truth) / truth[:8].var().item() >= kind.open_door


@pytest.mark.parametrize("kind", BOTH)
def test_a_known_linear_client_is_undone(kind: type[Likelihood]) -> None:
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=generator(), dtype=torch.float64))[0]
    mixing = rotation * torch.linspace(0.5, 2, 12, dtype=torch.float64)
    records = torch.randn(40, 12, generator=generator(1), dtype=torch.float64)
    view, truth = view_of(lambda x: x @ mixing.T + 3, records, 20)
    assert error(kind(steps=400), view, truth) < 1e-6


def test_from_the_ridge_image_it_goes_where_ridge_cannot() -> None:
    view, truth = view_of(bent(64, 128), digits(200), 160)
    ridge = squared_errors(Ridge().attack(view).target[:16], truth[:16]).mean().item()
    assert error(LikelihoodFromRidge(records=16), view, truth) < 0.5 * ridge


def test_on_validation_it_is_never_worse_than_the_ridge_image_even_in_loud_noise() -> None:
    view, _ = view_of(bent(64, 32), digits(120), 80, sigma=2.0)
    losses = [
        squared_errors(attack.attack(view).validation[:16], view.validation.records[:16]).mean().item()
        for attack in (Ridge(), LikelihoodFromRidge(steps=30, records=16))
    ]
    assert losses[1] <= losses[0] * (1 + 1e-6)


def test_total_variation_is_that_of_a_ramp_and_prefers_the_smooth() -> None:
    ramp = torch.linspace(0, 1, 5).expand(1, 1, 5, 5)
    rough = ramp[..., torch.tensor([0, 3, 1, 4, 2])]  # the same values
    assert total_variation(ramp).item() == pytest.approx(0.25 * 16 / 25, rel=0.01)
    assert total_variation(ramp).item() < total_variation(rough).item()
    assert total_variation(torch.full((2, 1, 4, 4), 0.3)).tolist() == [0, 0]
    assert total_variation(torch.rand(2, 3, 1, 1)).tolist() == [0, 0]


def test_of_two_equally_likely_records_the_smooth_one_is_taken() -> None:
    def halves(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, (8, 4))  # the means of the left and of the right half: all else is free

    view, _ = view_of(halves, digits(60), 40)
    start = torch.rand(4, 1, 8, 8, generator=generator())
    z_BD = halves(start).flatten(1)
    free, smooth = (
        invert(Prior(weight, replace(even_misfit(view), scale=1.0)), z_BD, start, 0, 1, 200)[-1]
        for weight in (0.0, 0.05)
    )
    torch.testing.assert_close(free, start)  # as likely as can be from the start
    assert (total_variation(smooth) < 0.2 * total_variation(start)).all()
    torch.testing.assert_close(halves(smooth).flatten(1), z_BD, atol=0.1, rtol=0)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("shape", [(1, 6, 6), (7,)])
def test_constant_activations_give_finite_records_in_range(kind: type[Likelihood], shape: tuple[int, ...]) -> None:
    records = torch.rand(40, *shape, generator=generator())
    view, truth = view_of(lambda x: 0 * x.flatten(1)[:, :3] + 1, records, 20)
    made = kind(steps=20, records=4).attack(view)
    for rebuilt, of in ((made.target, truth), (made.validation, view.validation.records)):
        assert rebuilt.shape == of[:4].shape
        assert torch.isfinite(rebuilt).all()
        assert rebuilt.min() >= records[:20].min()
        assert rebuilt.max() <= records[:20].max()


@pytest.mark.parametrize("kind", BOTH)
def test_the_same_bits_twice_and_no_gradient_is_left_on_the_client(kind: type[Likelihood]) -> None:
    client = bent(64, 20)
    view, _ = view_of(client, digits(60), 40, sigma=0.1)
    ticks: list[tuple[int, int]] = []
    first = kind(steps=20, records=3).attack(view, lambda done, total: ticks.append((done, total)))
    torch.rand(1)  # the global generator is not asked
    again = kind(steps=20, records=3).attack(view)
    assert torch.equal(first.target, again.target)
    assert torch.equal(first.validation, again.validation)
    assert all(parameter.grad is None for parameter in client.parameters())
    assert ticks == sorted(ticks)
    assert ticks[-1][0] == ticks[-1][1]


def test_records_descend_each_on_its_own() -> None:
    view, truth = view_of(bent(64, 40), digits(60), 40)
    z_BD = view.target.activations
    start = torch.full_like(truth, 0.5)
    prior = Prior(0.01, even_misfit(view))
    together = invert(prior, z_BD, start, 0, 1, 30)[-1]
    alone = invert(prior, z_BD[:1], start[:1], 0, 1, 30)[-1]
    torch.testing.assert_close(together[:1], alone, atol=1e-3, rtol=0)


def test_a_quiet_direction_is_heard_beside_loud_ones() -> None:
    """The misfit of other records is about 2; turned down, loud directions no longer make up nearly all of it."""
    records = torch.randn(400, 40, generator=generator(), dtype=torch.float64)
    loudness = torch.ones(40, dtype=torch.float64)
    loudness[:2], loudness[2] = 100, 1e-6
    view, truth = view_of(lambda x: x * loudness, records, 300)
    other = truth.roll(1, 0)
    half = torch.cat([truth[:, :2], other[:, 2:]], dim=1).requires_grad_()  # right where it is loud
    z_BD = view.target.activations
    for misfit, low, high in ((even_misfit(view), 0.0, 0.01), (quiet_misfit(view), 0.5, 2.5)):
        assert misfit(truth.clone().requires_grad_(), z_BD).abs().max().item() < 1e-9
        assert misfit(other.clone().requires_grad_(), z_BD).mean().item() == pytest.approx(2, rel=0.5)
        assert low < misfit(half, z_BD).mean().item() < high
    dead = torch.zeros(1, 40, dtype=torch.float64)
    dead[0, 2] = 1e-3  # far out of the range of a coordinate that hardly moves
    assert quiet_misfit(view)(truth[:1].clone().requires_grad_(), z_BD[:1] + dead).item() < 1e-3


def test_what_it_must_know_is_asked_for() -> None:
    view, _ = view_of(bent(64, 20), digits(60), 40)
    assert LikelihoodFromGrey.knows == ("client weights",)
    assert LikelihoodFromRidge.knows == ("pairs", "client weights")
    for attack in (LikelihoodFromGrey(), LikelihoodFromRidge()):
        with pytest.raises(MissingKnowledgeError, match=f"'{attack.name}' needs client weights"):
            attack.attack(replace(view, knowledge=Knowledge()))


def test_clients_that_do_not_fit_are_refused() -> None:
    view, _ = view_of(bent(64, 20), digits(60), 40)
    for client, line in (
        (bent(64, 21), r"sends \(10, 21\) values for 10 records; expected \(10, 20\)"),
        (lambda x: bent(64, 20)(x).detach(), "cannot be differentiated"),
    ):
        with pytest.raises(AuditError, match=line):
            LikelihoodFromGrey(records=12).attack(replace(view, knowledge=Knowledge(client=client)))
    for steps, records in ((0, 1), (1, 0)):
        with pytest.raises(AuditError, match="expected at least 1 of each"):
            LikelihoodFromGrey(steps, records)
    assert repr(LikelihoodFromRidge(steps=3, records=2)) == "LikelihoodFromRidge(steps=3, records=2)"


def test_the_priors_weigh_more_in_noise_and_less_after_many_releases() -> None:
    view, _ = view_of(lambda x: x.flatten(1), digits(60), 40)
    loud = replace(view, knowledge=replace(view.knowledge, noise_sigma=0.5))
    repeated = replace(loud, target=replace(view.target, repeats=view.target.activations.expand(10, -1, -1)))
    centered = view.known.activations - view.known.activations.mean(0)
    expected = 64 * 0.5**2 / centered.square().sum(1).mean().item()
    assert noise_share(view) == 0
    assert noise_share(loud) == pytest.approx(expected, rel=1e-5)
    assert noise_share(repeated) == pytest.approx(expected / 10, rel=1e-5)
