"""Split equals unsplit, bit for bit: the law this library stands on.

The unsplit twin is an ordinary training loop over the same two stages: each runs under its own generator state, and the
penalty's gradient is added at the cut once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.client import Client
from milkglass.cuts import cut
from milkglass.data import load
from milkglass.defenses.base import Defense, NoiseStream
from milkglass.defenses.noise import Noise
from milkglass.defenses.nopeek import NoPeek
from milkglass.networks import build
from milkglass.randomness import Source, drawing_from, public_source
from milkglass.server import Server
from milkglass.transports.local import LocalTransport

CLASSES, BATCH, STEPS = 5, 12, 4
CUTS = [
    *[("mlp", {"hidden": (24, 16)}, at) for at in ("hidden1", "hidden2")],
    *[("cnn", {"width": 8}, at) for at in ("block1", "block2", "hidden")],
    *[("resnet", {"depth": 8, "width": 8}, at) for at in ("stem", "block1", "block2", "block3", "pool")],
]
DEFENSES: dict[str, list[Defense]] = {
    "undefended": [],
    "NoPeek": [NoPeek(2.0)],
    "NoPeek, unbiased": [NoPeek(2.0, "unbiased")],
    "noise and NoPeek": [Noise(0.3), NoPeek(1.0)],
}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda stage: torch.optim.SGD(stage.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4),
    "adam": lambda stage: torch.optim.Adam(stage.parameters(), lr=0.01),
}


def _batches() -> list[tuple[Tensor, Tensor]]:
    """Real pictures, as the package deals them: their strides choose the kernels, and so the last bits."""
    digits = load(name="digits")
    chosen = torch.arange(len(digits))[torch.from_numpy(digits.labels) < CLASSES][: BATCH * STEPS]
    records = digits.take(chosen)
    return list(zip(torch.split(records.x, BATCH), torch.split(records.y, BATCH), strict=True))


def _train_unsplit(
    bottom: nn.Module,
    top: nn.Module,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    defenses: list[Defense],
    sources: tuple[Source, Source],
) -> list[float]:
    optimizers = [optimizer(bottom), optimizer(top)]
    generators = [source.generator("stage") for source in sources]
    noise = NoiseStream(sources[0].derive("noise"))
    losses = []
    for x, y in _batches():
        with drawing_from(generators[0]):
            z = bottom(x)
        for defense in defenses:
            z = defense.release(z, noise)
        with drawing_from(generators[1]):
            # a node of its own at the cut: what the top stage makes of z is summed there, then the penalty is added
            logits = top(z.clone())
        loss = F.cross_entropy(logits, y)
        penalties = [penalty for d in defenses if (penalty := d.penalty(x, z)) is not None]
        for each in optimizers:
            each.zero_grad()
        (loss + sum(penalties, torch.zeros(()))).backward()  # type: ignore[no-untyped-call]
        for each in optimizers:
            each.step()
        losses.append(loss.item())
    return losses


def _assert_same_bits(
    bottom: nn.Module,
    top: nn.Module,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    defenses: list[Defense],
) -> None:
    start = copy.deepcopy(bottom.state_dict())
    twin_bottom, twin_top = copy.deepcopy(bottom), copy.deepcopy(top)
    sources = public_source(1).derive("client"), public_source(1).derive("server")
    server = Server(top, optimizer(top), source=sources[1])
    client = Client(bottom, optimizer(bottom), LocalTransport(server), defenses=defenses, source=sources[0])
    losses = [client.step(x, y).loss for x, y in _batches()]
    assert losses == _train_unsplit(twin_bottom, twin_top, optimizer, defenses, sources)
    for stage, twin in ((bottom, twin_bottom), (top, twin_top)):
        for name, tensor in stage.state_dict().items():
            assert torch.equal(tensor, twin.state_dict()[name]), name
    assert any(not torch.equal(tensor, start[name]) for name, tensor in bottom.state_dict().items())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("defense", DEFENSES)
@pytest.mark.parametrize(("network", "settings", "at"), CUTS, ids=lambda value: value if isinstance(value, str) else "")
def test_split_equals_unsplit(network: str, settings: dict[str, object], at: str, defense: str, optimizer: str) -> None:
    model = build(network, (1, 8, 8), CLASSES, settings, public_source(0).generator("weights"))
    _assert_same_bits(*cut(model, at), OPTIMIZERS[optimizer], DEFENSES[defense])


def test_every_reference_cut_is_in_the_table() -> None:
    for network, settings in (
        ("mlp", {"hidden": (24, 16)}),
        ("cnn", {"width": 8}),
        ("resnet", {"depth": 8, "width": 8}),
    ):
        model = build(network, (1, 8, 8), CLASSES, settings, public_source(0).generator("weights"))
        names = [name for name, _ in model.named_children()][:-1]
        tested = [at for other, _, at in CUTS if other == network]
        assert [name for name in names if name != "flatten"] == tested  # after `flatten` the raw record would cross


class _Unusual(nn.Module):
    """Dropout on both sides, BatchNorm with running statistics, a skip connection and functional calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.3)
        self.narrow = nn.Linear(6 * 16, 20)
        self.act = nn.ReLU(inplace=True)
        self.drop_again = nn.Dropout(0.2)
        self.last = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        h = F.max_pool2d(h + F.relu(self.norm(h)), 2)
        h = self.drop(h)
        h = self.narrow(torch.flatten(h, 1))
        return self.last(self.drop_again(self.act(h)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("at", ["drop", "act"])
@pytest.mark.parametrize("defense", ["undefended", "noise and NoPeek"])
def test_dropout_batchnorm_and_in_place_layers(at: str, defense: str) -> None:
    with drawing_from(public_source(3).generator("weights")):
        model = _Unusual()
    _assert_same_bits(*cut(model, at), OPTIMIZERS["sgd"], DEFENSES[defense])


def test_a_different_bit_is_seen() -> None:
    model = build("mlp", (1, 8, 8), CLASSES, {}, public_source(0).generator("weights"))
    bottom, top = cut(model, "hidden1")
    with pytest.raises(AssertionError):
        _assert_same_bits(bottom, top, OPTIMIZERS["adam"], [_Tilted(bottom)])


class _Tilted(Defense):
    """Changes a weight in its last bits after each batch, which the twin does not do."""

    def __init__(self, stage: nn.Module) -> None:
        self._weight = next(stage.parameters())

    def describe(self) -> str:
        return "tilted"

    @torch.no_grad()
    def learn(self, x: Tensor, z: Tensor) -> None:
        self._weight.mul_(1 + 1e-6)
