"""DP-SGD at one party: what a step may depend on, how much noise it has, and what that proves."""

from __future__ import annotations

import copy
import hashlib
import sys
from dataclasses import replace
from typing import Any, Literal

import dp_accounting
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.cuts import flops_per_sample
from milkglass.defenses.base import NoiseStream
from milkglass.errors import CutError, MissingExtraError, RecipeError
from milkglass.federated_section import DifferentialPrivacy
from milkglass.private.dp import (
    Mechanism,
    check_gradients,
    check_network,
    make_private,
    mechanism_of,
    most_records,
    poisson_batches,
)
from milkglass.randomness import Source, drawing_from, public_source, rehearsal_source
from tests.helpers import KEY

CLASSES, RECORDS = 3, 12
PLAIN = Mechanism(1.0, 1e-5, 1e9, 0.0, 0.1, 10, "rdp", RECORDS)
"""No noise, and a clip that touches nothing."""


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _network(kind: str = "cnn") -> nn.Sequential:
    """Layers with Opacus' own rules, one that works in place, and (`mixed`) one that needs functorch, and dropout."""
    with drawing_from(_generator()):
        layers: list[nn.Module] = [nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Flatten()]
        if kind == "mixed":
            layers += [Scaled(144), nn.LayerNorm(144), nn.Dropout(0.3)]
        return nn.Sequential(*layers, nn.Linear(144, CLASSES))


class Scaled(nn.Module):
    """A weight of its own, without a rule in Opacus."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 2, width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Centered(nn.Module):
    """Couples the records of a batch, and is no BatchNorm."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=0)


class Folded(nn.Module):
    """Its layer sees several rows for one record: clipped each by itself, they would count several times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(-1, 4)).reshape(len(x), -1)  # type: ignore[no-any-return]


class Borrowed(nn.Module):
    """Uses a layer's weight behind its back, where no hook sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layer(x), self.layer.weight)


def _records(count: int = RECORDS) -> tuple[Tensor, Tensor]:
    generator = _generator(1)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.randint(CLASSES, (count,), generator=generator)


def _private(network: nn.Module, mechanism: Mechanism, source: Source | None = None, rate: float = 1.0) -> Any:
    return make_private([network], torch.optim.SGD(network.parameters(), lr=rate), mechanism, source or Source(KEY))


def _step(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y_B: Tensor) -> None:
    optimizer.zero_grad()
    if len(x):
        with drawing_from(_generator(2)):
            loss = F.cross_entropy(network(x), y_B)
        loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _flat(network: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in network.parameters()])


def _moved(mechanism: Mechanism, x: Tensor, y_B: Tensor, source: Source | None = None) -> Tensor:
    """By how much one step at rate 1 moves the weights: minus the noised sum over the expected batch."""
    network = _network()
    before = _flat(network)
    _step(network, _private(network, mechanism, source), x, y_B)
    return before - _flat(network)


@pytest.mark.parametrize("kind", ["cnn", "mixed"])
def test_without_noise_and_clipping_a_private_step_is_a_plain_one(kind: str) -> None:
    plain, private = _network(kind), _network(kind)
    ordinary = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    dp = make_private([private], torch.optim.SGD(private.parameters(), lr=0.1, momentum=0.9), PLAIN, Source(KEY))
    x, y_B = _records()
    for _ in range(3):
        _step(plain, ordinary, x, y_B)
        _step(private, dp, x, y_B)
    assert float((_flat(plain) - _flat(private)).abs().max()) < 1e-6
    assert float((_flat(plain) - _flat(_network(kind))).abs().max()) > 1e-2


def test_a_smaller_poisson_batch_counts_by_the_batch_that_was_expected() -> None:
    x, y_B = _records()
    some = _moved(PLAIN, x[:4], y_B[:4])
    assert torch.allclose(some * RECORDS, _moved(replace(PLAIN, batch_size=4), x[:4], y_B[:4]) * 4, atol=1e-5)
    rest = _moved(PLAIN, x[4:], y_B[4:])
    assert torch.allclose(some + rest, _moved(PLAIN, x, y_B), atol=1e-6)


@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_one_record_more_moves_the_clipped_sum_by_at_most_the_clip(size: float) -> None:
    clip = 0.5
    mechanism = replace(PLAIN, clip=clip, batch_size=1)
    x, y_B = _records()
    x[0] *= size
    for mislabeled in range(CLASSES):
        y_B[0] = mislabeled
        moved = _moved(mechanism, x, y_B) - _moved(mechanism, x[1:], y_B[1:])
        assert float(moved.norm()) <= clip * (1 + 1e-4)
        unclipped = _moved(replace(mechanism, clip=1e9), x, y_B) - _moved(replace(mechanism, clip=1e9), x[1:], y_B[1:])
        if float(unclipped.norm()) > clip:
            assert float(moved.norm()) > 0.99 * clip  # so the law above could fail


def test_the_noise_has_the_standard_deviation_that_was_accounted_for() -> None:
    noise = replace(PLAIN, clip=2.0, noise_multiplier=1.5, batch_size=8)
    network = nn.Linear(200, 100)
    optimizer, x = _private(network, noise), torch.zeros(0, 200)
    moved = []
    for _ in range(2):
        before = _flat(network)
        _step(network, optimizer, x, torch.zeros(0, dtype=torch.int64))
        moved.append(before - _flat(network))
    for each in moved:
        assert float(each.std()) == pytest.approx(1.5 * 2.0 / 8, rel=0.03)
        assert abs(float(each.mean())) < 5 * 0.375 / len(each) ** 0.5
    assert abs(float(torch.corrcoef(torch.stack(moved))[0, 1])) < 5 / len(moved[0]) ** 0.5
    # and it is what is added to a batch's clipped sum
    x, y_B = _records()
    small = replace(noise, clip=0.5)
    found = _moved(small, x, y_B) - _moved(replace(small, noise_multiplier=0.0), x, y_B)
    assert float(found.std()) == pytest.approx(1.5 * 0.5 / 8, rel=0.15)


def test_two_sums_under_one_key_get_two_noises_and_the_same_sum_the_same_one() -> None:
    noise = replace(PLAIN, clip=1.0, noise_multiplier=1.0)
    quiet = replace(noise, noise_multiplier=0.0)
    x, y_B = _records()

    def drawn(count: int, key: Source | None = None) -> Tensor:
        return _moved(noise, x[:count], y_B[:count], key) - _moved(quiet, x[:count], y_B[:count])

    one, other = drawn(12), drawn(11)
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 5 / len(one) ** 0.5
    assert torch.equal(one, drawn(12))
    assert not torch.isclose(one, drawn(12, Source(bytes(32)))).any()


def test_who_has_the_recipe_and_the_seed_does_not_predict_the_noise_and_the_key_does() -> None:
    network = nn.Linear(64, 16)
    count = 64 * 16 + 16
    before = _flat(network)
    mechanism = replace(PLAIN, noise_multiplier=1.0, clip=1.0, batch_size=1)
    _step(network, _private(network, mechanism), torch.zeros(0, 64), torch.zeros(0, dtype=torch.int64))
    drawn = before - _flat(network)

    def guessed(stream: Source) -> Tensor:
        return NoiseStream(stream).gaussian_like(torch.zeros(count), "dp", torch.float64).float()

    for source in (
        public_source(1),
        rehearsal_source(1, "client"),
        rehearsal_source(1, "server"),
        Source(hashlib.sha256(b"milkglass").digest()),
        Source(bytes(32)),
    ):
        for stream in (source, source.derive("dp")):
            assert not torch.isclose(guessed(stream), drawn, atol=1e-6).any()
            assert abs(float(torch.corrcoef(torch.stack([guessed(stream), drawn]))[0, 1])) < 5 / count**0.5
    assert torch.allclose(guessed(Source(KEY).derive("dp")), drawn, atol=1e-6)


def test_a_resumed_optimizer_goes_on_in_the_same_bits_only_with_its_block() -> None:
    mechanism = replace(PLAIN, noise_multiplier=1.0, clip=1.0)
    x, y_B = _records()
    network = _network()
    optimizer = _private(network, mechanism, rate=0.1)
    for _ in range(2):
        _step(network, optimizer, x, y_B)
    kept, block, memory = copy.deepcopy(network.state_dict()), optimizer.block, optimizer.state_dict()
    assert block == 2
    _step(network, optimizer, x, y_B)

    def resumed(block: int) -> Tensor:
        again = _network()
        again.load_state_dict(kept)
        other = _private(again, mechanism, rate=0.1)
        other.load_state_dict(memory)
        other.block = block
        _step(again, other, x, y_B)
        return _flat(again)

    assert torch.equal(resumed(block), _flat(network))
    assert not torch.equal(resumed(0), _flat(network))


def test_a_stage_keeps_its_names_and_is_differentiated_as_ever_between_steps() -> None:
    network, plain = _network(), _network()
    names = list(network.state_dict())
    optimizer = _private(network, PLAIN, rate=0.1)
    x, y_B = _records()
    for _ in range(2):
        assert list(network.state_dict()) == names
        assert flops_per_sample(network, x) == flops_per_sample(plain, x)
        wanted = x.clone().requires_grad_()
        (by_record,) = torch.autograd.grad(network.train()(wanted).square().sum(), wanted)
        assert by_record.shape == x.shape
        collected = [getattr(parameter, "grad_sample", None) for parameter in network.parameters()]
        assert all(each is None or not len(each) for each in collected)
        _step(network, optimizer, x, y_B)
        optimizer.zero_grad()
        optimizer.step()  # of an empty batch: from here to the next `zero_grad` nobody watches


def test_a_step_that_was_broken_off_leaves_nothing_behind() -> None:
    x, y_B = _records()
    broken, clean = _network(), _network()
    optimizer = _private(broken, PLAIN)
    optimizer.zero_grad()
    broken(x[:5])  # and no backward pass
    optimizer.zero_grad()
    F.cross_entropy(broken(x[:7]), y_B[:7]).backward()  # type: ignore[no-untyped-call]
    _step(broken, optimizer, x, y_B)
    _step(clean, _private(clean, PLAIN), x, y_B)
    assert torch.equal(_flat(broken), _flat(clean))


def test_two_batches_before_a_step_are_refused() -> None:
    network, (x, y_B) = _network(), _records()
    optimizer = _private(network, PLAIN)
    optimizer.zero_grad()
    for _ in range(2):
        F.cross_entropy(network(x), y_B).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(CutError, match="not one gradient for each of 12 records"):
        optimizer.step()


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), r"^dp: BatchNorm \(1\) .* use nn\.GroupNorm$"),
        (nn.Sequential(nn.LSTM(8, 8)), r"^dp: LSTM \(0\): Opacus says: .* use opacus\.layers\.DPLSTM"),
        (nn.InstanceNorm1d(8, affine=True, track_running_stats=True), r"^dp: InstanceNorm1d \(the stage\).*statistics"),
    ],
    ids=["batch norm", "lstm", "running statistics"],
)
def test_layers_that_dp_does_not_go_with_are_named(network: nn.Module, words: str) -> None:
    with pytest.raises(CutError, match=words):
        check_network(nn.Linear(8, 8), network)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (nn.Sequential(nn.Linear(8, 8), Centered()), "depends on the other records"),
        (nn.Sequential(Centered(), nn.Linear(8, 8)), "depends on the other records"),
        (Folded(), "gradient of layer.weight: use it in a layer of its own"),
        (Borrowed(), "gradient of layer.weight: use it in a layer of its own"),
    ],
    ids=["centered behind", "centered before", "folded", "borrowed"],
)
def test_a_network_is_tried_before_it_is_trained(network: nn.Module, words: str) -> None:
    check_network(network)  # by their names alone its layers look fine
    with pytest.raises(CutError, match=words):
        check_gradients(network, torch.randn(2, 8, generator=_generator()))


def test_a_network_that_works_is_tried_and_left_as_it_was() -> None:
    network, x = _network("mixed"), _records()[0]
    network.eval()
    before, state = _flat(network), torch.get_rng_state()
    check_network(network)
    check_gradients(network, x)
    assert torch.equal(before, _flat(network))
    assert torch.equal(state, torch.get_rng_state())
    assert not network.training
    assert not hasattr(next(network.parameters()), "grad_sample")


@pytest.mark.parametrize(
    ("name", "epsilon", "records", "batch", "epochs"),
    [("rdp", 1.0, 2000, 40, 3), ("rdp", 8.0, 300, 60, 5), ("prv", 3.0, 300, 60, 2)],
    ids=["rdp", "rdp, large", "prv"],
)
def test_epsilon_agrees_with_another_accountant(
    name: Literal["rdp", "prv"], epsilon: float, records: int, batch: int, epochs: int
) -> None:
    found = mechanism_of(DifferentialPrivacy(epsilon=epsilon, accountant=name), records, batch, epochs)
    assert (found.sampling_rate, found.steps) == (batch / records, epochs * (records // batch))
    assert 0.98 * epsilon < found.epsilon <= epsilon
    step = dp_accounting.PoissonSampledDpEvent(
        found.sampling_rate, dp_accounting.GaussianDpEvent(found.noise_multiplier)
    )
    other = RdpAccountant() if name == "rdp" else PLDAccountant()
    other.compose(step, found.steps)
    assert found.epsilon == pytest.approx(other.get_epsilon(found.delta), rel=0.03)
    assert f"({found.epsilon:.3g}, 1e-05)" in found.words
    assert found.to_dict()["words"] == found.words


def test_more_epochs_in_one_budget_need_more_noise() -> None:
    section = DifferentialPrivacy(epsilon=2.0, accountant="rdp")
    noises = [mechanism_of(section, 500, 50, epochs).noise_multiplier for epochs in (1, 4, 16)]
    assert noises == sorted(noises)
    assert noises[0] < noises[-1]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"epsilon": 0.05, "accountant": "rdp"}, r"^dp\.epsilon is 0\.05; .* no less than 0\.10\d, .*accountant prv$"),
        ({"epsilon": 0.001}, r"^dp\.epsilon is 0\.001; .* no less than 0\.00999, .*raise dp\.epsilon or dp\.delta$"),
        ({"epsilon": 1.0, "delta": 0.01}, r"^dp\.delta is 0\.01; expected below 1 / 100 = 0\.01"),
    ],
    ids=["rdp", "prv", "delta"],
)
def test_a_budget_that_nothing_reaches_is_refused_with_the_least(section: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        mechanism_of(DifferentialPrivacy(**section), 100, 10, 2)


def test_every_record_is_in_every_batch_by_the_same_chance_and_in_no_order() -> None:
    records, rate, steps = 200, 0.1, 400
    batches = poisson_batches(records, rate, steps, _generator())
    assert len(batches) == steps
    assert all(len(set(rows.tolist())) == len(rows) for rows in batches)
    times = torch.bincount(torch.cat(batches), minlength=records).double()
    spread = (steps * rate * (1 - rate)) ** 0.5
    assert float((times - steps * rate).abs().max()) < 5 * spread
    assert float(times.std()) == pytest.approx(spread, rel=0.25)
    sizes = torch.tensor([len(rows) for rows in batches]).double()
    assert float(sizes.std()) == pytest.approx((records * rate * (1 - rate)) ** 0.5, rel=0.2)
    assert float(sizes.max()) <= most_records(20)
    ascending = [bool((rows.diff() > 0).all()) for rows in batches if len(rows) > 4]
    assert not any(ascending)
    assert any(not len(rows) for rows in poisson_batches(3, 1 / 3, 60, _generator()))


def test_without_opacus_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(MissingExtraError, match=r"^differential privacy needs .* install 'milkglass\[dp\]'$"):
        mechanism_of(DifferentialPrivacy(epsilon=1.2345), 100, 10, 1)
    with pytest.raises(MissingExtraError):
        check_network(nn.Linear(2, 2))
    with pytest.raises(MissingExtraError):
        _private(nn.Linear(2, 2), PLAIN)
