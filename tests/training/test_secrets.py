"""What only a client's key decides: its noise. Who has the recipe and all that crossed does not predict it."""

from __future__ import annotations

import hashlib
from typing import cast

import pytest
import torch
from torch import Tensor

from milkglass.codec import encode
from milkglass.defenses.base import NoiseSource, NoiseStream
from milkglass.defenses.channel import Channel
from milkglass.defenses.noise import Noise
from milkglass.defenses.permanent import PermanentNoise
from milkglass.randomness import Source, public_source, rehearsal_source
from milkglass.recipe import Recipe
from milkglass.training.split import play_epoch, set_up
from milkglass.transcript import Crossing
from milkglass.transports.wrappers import RecordingTransport
from tests.helpers import KEY, small_recipe

SIGMA = 0.5
OTHER_KEY = bytes(reversed(KEY))


def _recipe() -> Recipe:
    return small_recipe(defense={"noise": {"sigma": SIGMA}}, training={"epochs": 2, "batch_size": 16})


def _played(source: Source) -> list[Crossing]:
    setup = set_up(_recipe(), source, wrap=RecordingTransport)
    for epoch in (1, 2):
        play_epoch(setup, epoch)
    return list(cast(RecordingTransport, setup.transport).transcript)


def _sent(transcript: list[Crossing]) -> list[Tensor]:
    return [c.message.tensors["activations"] for c in transcript if c.direction == "to server"]


def test_a_second_run_of_the_recipe_under_a_new_key_sends_other_bytes_in_every_message() -> None:
    first, second = (_played(Source(key)) for key in (KEY, OTHER_KEY))
    assert len(first) == len(second) > 20
    for one, other in zip(first, second, strict=True):
        if one.direction == "to server":
            assert encode(one.message) != encode(other.message)
    values = [torch.cat([z.flatten() for z in _sent(each)]) for each in (first, second)]
    nonzero = (values[0] != 0) | (values[1] != 0)
    assert float((values[0] == values[1])[nonzero].double().mean()) < 1e-3  # chance alone


def test_the_same_key_sends_the_same_bytes_so_that_the_test_above_can_fail() -> None:
    first, second = (_played(Source(KEY)) for _ in range(2))
    assert [encode(c.message) for c in first] == [encode(c.message) for c in second]


def test_who_has_the_recipe_the_seed_and_all_that_crossed_predicts_no_noise() -> None:
    recipe, noises, clean = _recipe(), [], []
    setup = set_up(recipe, Source(KEY), wrap=RecordingTransport)
    release = Noise(SIGMA).release

    class Watching:
        """The client's own defense; beside what it sends it keeps the noise, which nobody else sees."""

        def __getattr__(self, name: str) -> object:
            return getattr(Noise(SIGMA), name)

        def release(self, z: Tensor, noise: NoiseStream) -> Tensor:
            sent = release(z, noise)
            noises.append(((sent - z) / SIGMA).detach())
            clean.append(z.detach().clone())
            return sent

    setup.client.defenses = (cast(Noise, Watching()),)
    play_epoch(setup, 1)
    transcript = list(cast(RecordingTransport, setup.transport).transcript)
    sent = _sent(transcript)
    assert len(sent) == len(noises)
    crossed = b"".join(encode(crossing.message) for crossing in transcript)
    guesses = [
        public_source(recipe.seed),
        rehearsal_source(recipe.seed, "client"),
        rehearsal_source(recipe.seed, "server"),
        Source(hashlib.sha256(crossed).digest()),
        Source(hashlib.sha256(recipe.digest().encode()).digest()),
        Source(bytes(32)),
    ]
    drawn = torch.cat([noise.flatten() for noise in noises])
    assert 0.9 < float(drawn.std()) < 1.1
    most = 5 / len(drawn) ** 0.5
    for guess in guesses:
        for stream in (guess, guess.derive("noise")):
            played = NoiseStream(stream)
            predicted = torch.cat(
                [played.gaussian_like(z, repr(Noise(SIGMA)), torch.float64).float().flatten() for z in sent]
            )
            assert not bool((predicted == drawn).any())
            assert abs(float(torch.corrcoef(torch.stack([predicted, drawn]))[0, 1])) < most
    # nor does one part of the noise tell of the next, even to one who were told it
    assert abs(float(torch.corrcoef(torch.stack([drawn[:-1], drawn[1:]]))[0, 1])) < most
    # the key does: with it, and what the noise is bound to, it comes again
    own = NoiseStream(Source(KEY).derive("noise"))
    for z, found in zip(clean, sent, strict=True):
        assert torch.equal(Noise(SIGMA).release(z, own), found)


@pytest.mark.parametrize("kept", [False, True])
def test_a_channel_under_a_key_is_a_channel_to_who_has_the_recipe_and_the_seed(kept: bool) -> None:
    client = {"keep_releases": kept}
    recipe = small_recipe(defense={"channel": {"width": 4, "sigma": SIGMA}}, client=client)
    setup = set_up(recipe, Source(KEY), wrap=RecordingTransport)
    play_epoch(setup, 1)  # with it a test of every record: queries
    x = setup.seats[0].share.test.x
    sent = _sent(list(cast(RecordingTransport, setup.transport).transcript))[-1]
    noise_free = setup.client.noise_free(x[-len(sent) :]).detach()
    drawn = ((sent - noise_free) / SIGMA).flatten()
    assert 0.8 < float(drawn.std()) < 1.2
    channel = cast(Channel, setup.client.defenses[0])
    weights = setup.client.weights_digest()
    for guess in (public_source(recipe.seed), rehearsal_source(recipe.seed, "client"), Source(bytes(32))):
        noise: NoiseSource = NoiseStream(guess.derive("noise"))
        if kept:
            noise = PermanentNoise(guess, weights, x[-len(sent) :])
        predicted = noise.gaussian_like(noise_free, repr(channel), torch.float64).float().flatten()
        assert not bool(torch.isclose(predicted, drawn, atol=1e-4).any())
        assert abs(float(torch.corrcoef(torch.stack([predicted, drawn]))[0, 1])) < 5 / len(drawn) ** 0.5
    if kept:  # the key does
        own = PermanentNoise(Source(KEY), weights, x[-len(sent) :])
        assert torch.allclose(
            own.gaussian_like(noise_free, repr(channel), torch.float64).float().flatten(), drawn, atol=1e-3
        )
