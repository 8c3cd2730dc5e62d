"""The channel: what it bounds is bounded, what it hides is hidden, and what it must let through comes through."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

from milkglass.defenses.base import NoiseStream
from milkglass.defenses.channel import PROJECTIONS, Channel, ClientEnd, Projection
from milkglass.defenses.clipping import Clipping, clip_norm
from milkglass.defenses.noise import GRID
from milkglass.defenses.permanent import PermanentNoise
from milkglass.errors import RecipeError
from milkglass.randomness import drawing_from, public_source

Z = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)) * 3


def _noise(number: int = 0) -> NoiseStream:
    return NoiseStream(public_source(number))


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 1e10])
def test_no_norm_is_above_the_clip(size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for width in (1, 8, 1568, 802_816):
        z = size * torch.randn(50 if width < 10_000 else 2, width, generator=generator)
        clipped = clip_norm(z, 2.0).double()
        assert (clipped.norm(dim=1) <= 2.0).all()
        short = z.double().norm(dim=1) < 1.99
        assert torch.equal(clipped[short].float(), z[short])  # what fits stays as it is
        long = ~short
        cosine = torch.cosine_similarity(clipped[long], z[long].double(), dim=1)
        assert (cosine > 1 - 1e-6).all()  # and what does not keeps its direction


def test_clipping_is_the_same_in_any_shape() -> None:
    maps = Z.reshape(64, 3, 1, 2)
    clipping = Clipping(1.5)
    assert torch.equal(clipping.release(maps, _noise()), clip_norm(Z, 1.5).reshape(64, 3, 1, 2))
    assert not clipping.random
    assert torch.equal(Clipping(1e6).release(Z, _noise()), Z)  # the do-nothing twin


def test_noise_has_its_sigma_around_the_clipped_value() -> None:
    channel = Channel(width=6, sigma=0.7)
    z = Z[:1].expand(100_000, 6).contiguous()
    sent = channel.release(z, _noise())
    inside = clip_norm(Z[:1], math.sqrt(6))
    assert sent.mean(0) == pytest.approx(inside[0], abs=5 * 0.7 / math.sqrt(100_000))
    covariance = torch.from_numpy(np.cov(sent.double().numpy().T))
    assert covariance == pytest.approx(0.49 * torch.eye(6), abs=0.02)


def test_what_is_sent_lies_on_a_grid_that_does_not_depend_on_the_record() -> None:
    channel = Channel(width=6, sigma=0.3)
    step = 2.0 ** math.floor(math.log2(0.3 / GRID))
    for number, z in enumerate((Z, Z * 1e-4, torch.zeros_like(Z))):
        steps = channel.release(z, _noise(number)).double() / step
        assert torch.equal(steps, steps.round())


def test_the_gradient_passes_as_if_there_were_no_noise() -> None:
    channel = Channel(width=6, sigma=0.3)
    weights = torch.randn(64, 6, generator=torch.Generator().manual_seed(2))
    grads = []
    for release in (lambda z: channel.release(z, _noise()), channel.transform):
        z = Z.clone().requires_grad_()
        (release(z) * weights).sum().backward()  # type: ignore[no-untyped-call]
        assert z.grad is not None
        grads.append(z.grad)
    assert torch.allclose(grads[0], grads[1], rtol=1e-6, atol=0)


def test_without_sigma_it_is_a_plain_bottleneck() -> None:
    twin = Channel(width=6, sigma=0.0, clip=1e6)
    assert torch.equal(twin.release(Z, _noise()), Z)
    assert not twin.random


def test_what_gets_how_much_signal_over_the_noise_is_learned() -> None:
    """One of 16 directions tells the class: under a clip and noise, what power there is goes to it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 16, generator=generator)
    y = (x[:, 3] > 0).long()
    channel = Channel(width=4, sigma=1.0, projection="linear")
    with drawing_from(torch.Generator().manual_seed(1)):
        bottom, top = channel.around(nn.Identity(), nn.Linear(16, 2), (16,))
    channel.prepare(x)
    linear = bottom.get_submodule("channel.linear")

    def share() -> float:
        """Of the signal's power, what goes to that direction; the noise is the same for all."""
        power_H = linear.get_parameter("weight").detach().square().sum(0)
        return (power_H[3] / power_H.sum()).item()

    before = share()
    optimizer = torch.optim.Adam([*bottom.parameters(), *top.parameters()], lr=1e-2)
    noise = _noise()
    for rows in torch.randint(2048, (160, 128), generator=generator):
        loss = nn.functional.cross_entropy(top(channel.release(bottom(x[rows]), noise)), y[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert before < 0.15
    assert share() > 0.6


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_ends_change_the_width_and_give_the_shape_back(projection: Projection) -> None:
    with drawing_from(torch.Generator().manual_seed(0)):
        bottom, top = Channel(5, projection=projection).around(nn.Conv2d(1, 3, 3), nn.Flatten(), (3, 8, 10))
    x = torch.rand(7, 1, 10, 12, generator=torch.Generator().manual_seed(0))
    assert bottom(x).shape == (7, 5)
    assert top(bottom(x)).shape == (7, 240)
    assert {name.split(".")[0] for name in bottom.state_dict()} == {"stage", "channel"}
    one_by_one = torch.cat([bottom(row[None]) for row in x])  # no record's coordinates depend on another's
    assert bottom(x).detach() == pytest.approx(one_by_one.detach(), abs=1e-5)


def test_the_server_rescales_what_it_receives_to_about_unit_size() -> None:
    for size in (1.0, 100.0):
        channel = Channel(4, sigma=0.5 * size, clip=2.0 * size)
        with drawing_from(torch.Generator().manual_seed(0)):
            end = channel.server_end((6,))
        assert end is not None
        z = size * torch.randn(5000, 4, generator=torch.Generator().manual_seed(1))
        sent = channel.release(2.0 * size * z / z.norm(dim=1, keepdim=True), _noise())
        hooked: list[Tensor] = []
        end.get_submodule("expand").register_forward_pre_hook(lambda _, inputs, kept=hooked: kept.append(inputs[0]))
        end(sent)
        assert hooked[0].square().mean().sqrt().item() == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_training_begins_at_the_clip(projection: Projection) -> None:
    channel = Channel(5, projection=projection, clip=3.0)
    with drawing_from(torch.Generator().manual_seed(0)):
        end = channel.client_end((3, 8, 8))
    z = torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    channel.prepare(z)
    assert end is not None
    assert end(z).square().sum(1).mean().sqrt().item() == pytest.approx(3.0, rel=1e-3)


def test_pca_is_that_of_scikit_learn() -> None:
    z = torch.randn(200, 12, generator=torch.Generator().manual_seed(3)) @ torch.diag(torch.arange(1.0, 13.0))
    end = ClientEnd((12,), 4, "pca")
    end.fit(z, 2.0)
    twin = PCA(4).fit(z.numpy())
    sent = end(z).detach()
    scores = torch.from_numpy(twin.transform(z.numpy()))
    gain = 2.0 / scores.square().sum(1).mean().sqrt()
    assert sent.abs() == pytest.approx((gain * scores).abs(), rel=1e-3, abs=1e-3)  # signs of axes are free
    assert sent.square().sum(1).mean().item() == pytest.approx(4.0, rel=1e-4)


def test_random_directions_are_orthonormal_and_stay() -> None:
    with drawing_from(torch.Generator().manual_seed(4)):
        end = ClientEnd((30,), 5, "random")
    before = end.directions_DH.clone()
    end.fit(torch.rand(50, 30, generator=torch.Generator().manual_seed(5)), 1.0)
    assert torch.equal(end.directions_DH, before)
    assert before @ before.T == pytest.approx(torch.eye(5), abs=1e-5)
    assert [name for name, _ in end.named_parameters()] == ["gain"]


def test_settings_out_of_range() -> None:
    for settings, words in (
        ({"width": 0}, "channel: width is 0; expected a whole number of 1 or more"),
        ({"clip": 0.0}, "channel: clip is 0.0; expected a number from 1e-06 to 1e+06"),
        ({"clip": math.inf}, "channel: clip is inf"),
        ({"sigma": -0.1}, "channel: sigma is -0.1; expected a number from 1e-06"),
        ({"sigma": 1e-9}, "channel: sigma is 1e-09; expected a number from 1e-06 to 1e+06"),
        ({"projection": "pac"}, "did you mean 'pca'?"),
    ):
        with pytest.raises(RecipeError, match=re.escape(words)):
            Channel(**settings)
    with pytest.raises(RecipeError, match=re.escape("width is 9, and the cut has 8 values a record")):
        Channel(width=9).client_end((2, 2, 2))
    with pytest.raises(RecipeError, match="clip is nan"):
        Clipping(math.nan)
    with pytest.raises(RecipeError, match="'conv' is for maps of at least 8 x 8"):
        Channel(projection="conv").client_end((3, 7, 9))
    with pytest.raises(RecipeError, match="4 records for 4 principal components"):
        ClientEnd((12,), 4, "pca").fit(torch.rand(4, 12), 1.0)


# Noise that stays with its record.


def _kept(x: Tensor, weights: str = "w", key: int = 0) -> Tensor:
    channel = Channel(width=6, sigma=0.3)
    return channel.release(torch.zeros(len(x), 6), PermanentNoise(public_source(key), weights, x))


def test_the_same_record_gets_the_same_noise_whatever_it_is_sent_with() -> None:
    x = torch.rand(9, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = _kept(x)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(_kept(x[order]), whole[order])
    assert torch.equal(torch.cat([_kept(row[None]) for row in x]), whole)


def test_another_record_other_weights_or_another_key_give_other_noise() -> None:
    x = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    almost = x.clone()
    almost[:, 0, 0, 0] += 1e-6
    assert not (_kept(x) == _kept(almost)).all(dim=1).any()
    assert not (_kept(x) == _kept(x, weights="v")).all(dim=1).any()
    assert not (_kept(x) == _kept(x, key=1)).all(dim=1).any()
    minus = torch.where(x > 0.5, x, -0.0)
    assert torch.equal(_kept(minus), _kept(minus.abs()))  # 0 and -0 are one value
    two = PermanentNoise(public_source(0), "w", x)
    assert not torch.equal(two.gaussian_like(Z[:4], "a"), two.gaussian_like(Z[:4], "a"))  # two defenses in a row


def test_kept_noise_is_as_large_as_fresh_noise() -> None:
    x = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0))
    noise = PermanentNoise(public_source(0), "w", x)
    z = torch.zeros(2000, 10)
    assert noise.gaussian_like(z, "a").std().item() == pytest.approx(1.0, abs=0.02)
    assert noise.laplace_like(z, "b").std().item() == pytest.approx(1.0, abs=0.03)
