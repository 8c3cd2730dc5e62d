"""Certificates: what they say is right, what is sent agrees with them, and a client that cheats is found out.

Re-identification games are played by who knows the client's weights and all candidates, with the likelihood of each.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import final

import pytest
import torch
from torch import Tensor, nn

from benchmarks.reidentification import BITS, CANDIDATES, Game
from milkglass.client import Client
from milkglass.compression.topk import TopK
from milkglass.data import load
from milkglass.defenses import certificate as module
from milkglass.defenses.base import Defense
from milkglass.defenses.certificate import certificate, certify, check_releases, counted
from milkglass.defenses.channel import Channel
from milkglass.defenses.clipping import Clipping
from milkglass.defenses.noise import Noise
from milkglass.defenses.nopeek import NoPeek
from milkglass.errors import AuditError
from milkglass.leakage.classification import clopper_pearson
from milkglass.leakage.gaussian_mechanism import gaussian_epsilon
from milkglass.leakage.information import gaussian_sigma_for_bits
from milkglass.randomness import drawing_from, public_source
from milkglass.server import Server
from milkglass.transcript import Transcript
from milkglass.transports.local import LocalTransport
from milkglass.transports.wrappers import RecordingTransport

WIDTH = 8


def test_the_certificate_of_a_channel() -> None:
    found = certificate(8, math.sqrt(8), 0.3)
    assert found.bits_per_release == pytest.approx(4 * math.log2(1 + 1 / 0.09))
    assert [each.vacuous for each in found.reidentification] == [True, True, False]
    assert found.reidentification[2].bound < (found.bits_per_release + 1) / math.log2(1e6)
    assert any("no meaningful local DP" in words for words in found.words)
    assert any("among 256: vacuous" in words for words in found.words)
    assert found.epsilon == gaussian_epsilon(1e-5, 2 * math.sqrt(8), 0.3)  # two records are 2C apart at most
    private = certificate(2, 1.0, 8.0)
    assert private.epsilon < 10
    assert any("locally (" in words for words in private.words)
    assert not any(each.vacuous for each in private.reidentification)


def test_words_say_no_more_than_the_numbers() -> None:
    def words(sigma: float) -> str:
        return " ".join(certificate(2, 1.0, sigma).words)

    around_ten = [sigma / 1000 for sigma in range(500, 1500)]
    for sigma in around_ten:
        promised = certificate(2, 1.0, sigma).epsilon <= 10
        assert ("locally (" in words(sigma)) == promised != ("no meaningful local DP" in words(sigma))
    assert {certificate(2, 1.0, sigma).epsilon <= 10 for sigma in around_ten} == {True, False}
    almost = certificate(8, math.sqrt(8), gaussian_sigma_for_bits(7.99, 8, math.sqrt(8)))
    assert almost.reidentification[0].bound < 1
    assert any("among 256: vacuous" in line for line in almost.words)
    assert certificate(8, 1e12, 1e-9).epsilon == math.inf
    assert certificate(8, 1e12, 1e-9).to_dict()["epsilon"] is None


def test_what_has_a_certificate_and_what_has_none() -> None:
    cut = (2, 3, 4)
    assert certify([Channel(4, 0.5)], cut) == certificate(4, 2.0, 0.5)
    assert certify([Channel(4, 0.5), NoPeek(1.0)], cut) == certificate(4, 2.0, 0.5)
    assert certify([Clipping(3.0), Noise(0.5)], cut) == certificate(24, 3.0, 0.5)
    assert certify([Clipping(3.0), Noise(0.3), Noise(0.4)], cut) == certificate(24, 3.0, 0.5)
    assert certify([Noise(9.0), Clipping(3.0), Noise(0.5)], cut) == certificate(24, 3.0, 0.5)  # first noise is clipped
    refused: list[tuple[Sequence[Defense], Sequence[str], str]] = [
        ([], [], "no certificate: there is no defense"),
        ([NoPeek(2.0)], [], "NoPeek, weight 2, biased estimator does not bound what is sent"),
        ([Noise(1.0)], [], "does not bound what is sent; expected a channel, or clipping and noise"),
        ([Channel(4, 0.0)], [], "adds no Gaussian noise; expected a sigma above 0"),
        ([Clipping(1.0), Noise(0.5, "laplace")], [], "adds no Gaussian noise"),
        ([Channel(4, 0.5)], ["norm"], "BatchNorm (norm) in the client's stage couples records"),
    ]
    for defenses, coupled, words in refused:
        with pytest.raises(AuditError, match=re.escape(words)):
            certify(defenses, cut, coupled)


def _client(defense: Channel, gain: float = 1.0) -> tuple[Client, Transcript]:
    """A real client, and a record of all that it sends."""
    with drawing_from(torch.Generator().manual_seed(0)):
        bottom, top = defense.around(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU()), nn.Linear(16, 10), (16,)
        )
    with torch.no_grad():
        for name, parameter in bottom.get_submodule("channel").named_parameters():
            parameter.mul_(gain if "linear" in name or name == "gain" else 1.0)
    transport = RecordingTransport(LocalTransport(Server(top, None)))
    client = Client(bottom, None, transport, defenses=[defense], source=public_source(5))
    return client, transport.transcript


def _sent(client: Client, transcript: Transcript, x: Tensor, times: int = 10) -> Tensor:
    """What crossed for the records, asked about so many times: (R, N, D)."""
    for _ in range(times):
        client.predict(x)
    crossed = [each.message.tensors["activations"] for each in transcript if each.message.kind == "queries"]
    return torch.stack(crossed)


def _records(count: int) -> Tensor:
    return load(name="digits").take(torch.arange(count)).x


@pytest.mark.parametrize("gain", [1.0, 100.0])
def test_an_honest_client_is_believed(gain: float) -> None:
    channel = Channel(WIDTH, 0.4)
    client, transcript = _client(channel, gain)
    found = check_releases(_sent(client, transcript, _records(100)), certify([channel], (16,)))
    assert found.agrees
    assert found.sigma == pytest.approx(0.4, rel=0.05)
    assert found.p_noise > 1e-4
    assert found.p_clip > 1e-4
    assert found.p_least > 1e-4


@pytest.mark.parametrize("more", [Noise(1.0, "laplace"), Noise(2.0, "laplace"), NoPeek(1.0)])
def test_what_comes_on_top_of_a_channel_does_not_void_its_certificate(more: Defense) -> None:
    channel = Channel(WIDTH, 0.3)
    client, _ = _client(channel, gain=100.0)
    client.defenses = (channel, more)
    client.compressor = TopK(0.25)
    claimed = certify(client.defenses, (16,))
    assert claimed == certify([channel], (16,))
    repeats = torch.stack([client.released_by(_records(100), counted(client.defenses)) for _ in range(10)])
    assert check_releases(repeats, claimed).agrees


def _half_sigma(channel: Channel) -> None:
    channel.sigma /= 2


def _no_clip(channel: Channel) -> None:
    channel.clip = 1e9


def _no_noise_at_inference(channel: Channel) -> None:
    channel.sigma = 0.0


@pytest.mark.parametrize("cheat", [_half_sigma, _no_clip, _no_noise_at_inference])
def test_a_client_that_cheats_is_found_by_what_it_sends(cheat: Callable[[Channel], None]) -> None:
    channel = Channel(WIDTH, 0.4)
    claimed = certify([channel], (16,))
    client, transcript = _client(channel, gain=100.0)
    cheat(channel)
    assert not check_releases(_sent(client, transcript, _records(100)), claimed).agrees


def _honest(generator: torch.Generator) -> Tensor:
    """Five releases of 20 records, all at a clip of 2, which is the hardest case, with noise of sigma 0.5."""
    z = torch.randn(20, WIDTH, generator=generator)
    at_clip: Tensor = 2.0 * z / z.norm(dim=1, keepdim=True)
    return at_clip + 0.5 * torch.randn(5, 20, WIDTH, generator=generator)


def test_honest_releases_are_hardly_ever_called_false() -> None:
    claimed = certificate(WIDTH, 2.0, 0.5)
    generator = torch.Generator().manual_seed(0)
    worst = 1.0
    for _ in range(300):
        found = check_releases(_honest(generator), claimed)
        worst = min(worst, found.p_noise, found.p_clip, found.p_least)
    assert 1e-5 < worst < 0.05  # over 900 looks: rare, as it should be, and not never


def test_honest_releases_are_refused_no_more_often_than_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a level that can be counted. Three tests that did not share it would refuse 14 % of them."""
    monkeypatch.setattr(module, "SURELY_WRONG", 0.05)
    claimed = certificate(WIDTH, 2.0, 0.5)
    generator = torch.Generator().manual_seed(1)
    refused = sum(not check_releases(_honest(generator), claimed).agrees for _ in range(800))
    assert clopper_pearson(refused, 800).low <= 0.05
    assert refused > 800 * 0.02  # and the level is used, not given away


@pytest.mark.parametrize("bare", [1, 50])
def test_noise_on_some_records_does_not_make_up_for_its_lack_on_others(bare: int) -> None:
    claimed = certificate(WIDTH, 2.0, 0.5)
    draws = torch.randn(10, 100, WIDTH, generator=torch.Generator().manual_seed(0))
    sigma_N1 = torch.where(torch.arange(100)[:, None] < bare, 0.0, 0.5 * math.sqrt(2))
    found = check_releases(torch.full((100, WIDTH), 0.1) + sigma_N1 * draws, claimed)
    assert found.p_noise > 1e-3  # all together there is noise enough
    assert found.p_clip > 1e-3
    assert found.least < 1e-6
    assert not found.agrees
    honest = check_releases(torch.full((100, WIDTH), 0.1) + 0.5 * draws, claimed)
    assert honest.agrees
    assert 0.25 < honest.least < 0.5  # of 100 records with 72 degrees of freedom each


def test_very_many_releases_are_judged_as_few_are() -> None:
    claimed = certificate(400, 20.0, 0.5)
    z = 0.5 * torch.randn(4, 300, 400, generator=torch.Generator().manual_seed(0))  # 360,000 degrees of freedom
    assert 1e-4 < check_releases(z, claimed).p_noise < 1 - 1e-4
    assert not check_releases(0.98 * z, claimed).agrees


@final
class _Louder(Defense):
    """A user's own, which undoes the clip."""

    def describe(self) -> str:
        return "ten times as loud"

    def transform(self, z: Tensor) -> Tensor:
        return 10 * z


def test_a_defense_that_nothing_is_known_of_has_no_certificate() -> None:
    with pytest.raises(AuditError, match="ten times as loud changes what is sent in a way that nothing is known of"):
        certify([Clipping(1.0), _Louder(), Noise(0.5)], (4,))


def test_releases_of_another_form_are_refused() -> None:
    claimed = certificate(WIDTH, 2.0, 0.5)
    for shape in ((1, 5, WIDTH), (5, WIDTH), (3, 5, WIDTH + 1)):
        with pytest.raises(AuditError, match=r"expected \(R, N, \.\.\.\), R at least 2, with 8 coordinates"):
            check_releases(torch.zeros(shape), claimed)


# Games: one release, N candidates, and an attacker who knows everything but the noise.


@pytest.mark.parametrize("candidates", CANDIDATES)
@pytest.mark.parametrize("bits", BITS)
def test_nobody_names_the_record_more_often_than_certified(bits: float, candidates: int) -> None:
    game = Game(bits, candidates)
    assert game.claimed.bits_per_release == pytest.approx(bits, rel=1e-9)
    assert game.bound < 0.9
    measured = clopper_pearson(*game.play(4096))
    assert measured.low <= game.bound
    assert measured.value > 1.5 / candidates  # the attack is alive
    if bits >= 4:
        assert measured.value >= 3 / candidates


def test_the_game_would_be_won_without_noise() -> None:
    game = Game(6.0, 256)
    game.channel.sigma = 0.0
    right, of = game.play(256)
    assert right / of > 0.9  # so a bound that is held is the noise's doing
