"""The unsplit twin of a split training: an ordinary loop over the whole network, which knows nothing of messages.

Split training must end in its bits. Like a party, each part of the network draws its dropout from its own generator.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.data import Records
from milkglass.defenses.base import NoiseStream
from milkglass.handover import average
from milkglass.randomness import drawing_from
from milkglass.recipe import Recipe
from milkglass.server import Server
from milkglass.training.rounds import Seat
from milkglass.training.shares import deal_records
from milkglass.training.split import Setup, set_up
from tests.helpers import small_recipe

CLIENTS = ["ann", "ben", "cas"]
DEFENDED = {"nopeek": {"weight": 1.0}, "noise": {"sigma": 0.5}}
EVERY_DEFENSE: dict[str, Any] = {
    "clipping": {"clip": 5.0},
    "channel": {"width": 6, "sigma": 0.2},
    "noise": {"sigma": 0.05, "kind": "laplace"},
    "learned_noise": {"start": 0.05},
    "nopeek": {"weight": 0.5},
    "adversary": {"weight": 0.5},
    "entropy": {"weight": 0.05},
}
"""All that act on activations."""
MLP: dict[str, Any] = {
    "network": {"name": "mlp", "settings": {"hidden": [16, 12, 8]}},
    "cut": {"at": "hidden1"},
}
U_SHAPED: dict[str, Any] = {"cut": {"at": "hidden1", "back_at": "hidden2"}}
DROPOUTS: dict[str, Any] = {
    "network": {"name": "tests.training.whole:dropouts"},
    "cut": {"at": "drop1"},
}
BATCH_NORM: dict[str, Any] = {
    "network": {"name": "tests.training.whole:with_batch_norm"},
    "cut": {"at": "norm"},
}


def dropouts(record_shape: tuple[int, ...], classes: int) -> nn.Module:
    """A factory of a user's own, with dropout in each of three parts."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            first=nn.Linear(torch.Size(record_shape).numel(), 16),
            drop1=nn.Dropout(0.2),
            second=nn.Linear(16, 12),
            drop2=nn.Dropout(0.2),
            third=nn.Linear(12, 12),
            drop3=nn.Dropout(0.2),
            last=nn.Linear(12, classes),
        )
    )


def with_batch_norm(record_shape: tuple[int, ...], classes: int) -> nn.Module:
    """A factory of a user's own, with BatchNorm where the client has it; cut at `norm`."""
    values = torch.Size(record_shape).numel()
    layers = {"flatten": nn.Flatten(), "first": nn.Linear(values, 16), "norm": nn.BatchNorm1d(16)}
    return nn.Sequential(OrderedDict({**layers, "last": nn.Linear(16, classes)}))


def training(**changes: Any) -> dict[str, Any]:
    """The training table of a recipe."""
    return {"epochs": 2, "batch_size": 32, "learning_rate": 1e-2, **changes}


def parties(mode: str, clients: Sequence[str] = CLIENTS, **vertical: Any) -> dict[str, Any]:
    """The table of several clients."""
    return {"clients": list(clients), "mode": mode, "vertical": vertical}


def recipe_of(**tables: Any) -> Recipe:
    """A recipe over `MLP`; `tables` replace whole ones."""
    return small_recipe(**{**MLP, "training": training(), **tables})


def unequal(recipe: Recipe, sizes: Sequence[int] = (64, 32, 40)) -> Setup:
    """Its parties, where the clients have so many records, and unlike many."""
    records = deal_records(recipe.model_copy(update={"data": recipe.data.model_copy(update={"train_records": 300})}))
    parts = list(records.train.values())
    joined = Records(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))
    rows = torch.split(torch.arange(sum(sizes)), list(sizes))
    train = {name: joined.take(part) for name, part in zip(recipe.parties.clients, rows, strict=True)}
    return set_up(recipe, records=replace(records, train=train))


@final
class Whole:
    """A network in one place: the stages of one client, or of all owners, the server's, and what is behind.

    beside: another one, whose server's stage, optimizer and dropout this one shares.
    """

    def __init__(self, seats: Sequence[Seat], server: Server, axis: int = 1, beside: Whole | None = None) -> None:
        clients = [seat.client for seat in seats]
        self.bottoms = [copy.deepcopy(client.stage) for client in clients]
        self.head = nn.Identity() if clients[0].head is None else copy.deepcopy(clients[0].head)
        self.top: nn.Module = copy.deepcopy(server.stage) if beside is None else beside.top
        self._axis = axis
        self._draws = [client.source.generator("stage") for client in clients]
        self._server_draws: torch.Generator = (
            server.source.generator("stage") if beside is None else beside._server_draws
        )
        self._defenses = clients[0].defenses
        self._noises = [NoiseStream(client.source.derive("noise")) for client in clients]
        settings = seats[0].recipe.training
        own = _optimizer(settings.optimizer, nn.ModuleList([*self.bottoms, self.head]), settings.learning_rate)
        top = (
            _optimizer(settings.optimizer, self.top, settings.learning_rate) if beside is None else beside.optimizers[1]
        )
        self.optimizers: list[torch.optim.Optimizer] = [own, top]

    def train(self, xs: Sequence[Tensor], y: Tensor, pieces: int = 1) -> None:
        """One batch: each owner's part of the records, in so many pieces, whose gradients add up in their order."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if self._defenses:
            self._train_defended(xs, y, pieces)
        else:
            self._backward([self._bottom(i, x.tensor_split(pieces)) for i, x in enumerate(xs)], y, pieces)
        for optimizer in self.optimizers:
            optimizer.step()

    def train_on(self, seat: Seat, epoch: int, pieces: int = 1) -> None:
        """One client's epoch."""
        for rows in seat.batches(epoch):
            self.train([seat.share.train.x[rows]], seat.share.train.y[rows], pieces)

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """The share of records classified right, in evaluation mode."""
        for part in (self.bottoms[0], self.top, self.head):
            part.eval()
        right = int((self.head(self.top(self.bottoms[0](x))).argmax(dim=1) == y).sum())
        for part in (self.bottoms[0], self.top, self.head):
            part.train()
        return right / len(y)

    def _bottom(self, owner: int, parts: Sequence[Tensor]) -> list[Tensor]:
        with drawing_from(self._draws[owner]):
            return [self.bottoms[owner](part) for part in parts]

    def _backward(self, zs: Sequence[Sequence[Tensor]], y: Tensor, pieces: int) -> None:
        """zs: of each owner, its pieces."""
        for parts, y_part in zip(zip(*zs, strict=True), y.tensor_split(pieces), strict=True):
            z = parts[0] if len(parts) == 1 else torch.cat(parts, dim=self._axis)
            with drawing_from(self._server_draws):
                features = self.top(z.clone())  # a node of its own, where what comes back is summed
            with drawing_from(self._draws[0]):
                logits = self.head(features.clone())
            (F.cross_entropy(logits, y_part) / pieces).backward()  # type: ignore[no-untyped-call]

    def _train_defended(self, xs: Sequence[Tensor], y: Tensor, pieces: int) -> None:
        """Noise and penalties of the whole batch first."""
        zs = []
        for owner, x in enumerate(xs):
            (z,) = self._bottom(owner, [x])
            for defense in self._defenses:
                z = defense.release(z, self._noises[owner])
            zs.append(z)
        cuts = [z.detach().requires_grad_() for z in zs]
        self._backward([cut.tensor_split(pieces) for cut in cuts], y, pieces)
        for x, z, cut in zip(xs, zs, cuts, strict=True):
            penalties = [penalty for d in self._defenses if (penalty := d.penalty(x, z)) is not None]
            torch.autograd.backward([z, *penalties], [cut.grad, *[None for _ in penalties]])


def _optimizer(name: str, part: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    parameters = list(part.parameters()) or [nn.Parameter(torch.zeros(1))]  # a stage may have nothing to learn
    if name == "adam":
        return torch.optim.Adam(parameters, lr=learning_rate)
    return torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9)


def average_into(parts: Sequence[nn.Module], counts: Sequence[float]) -> None:
    """Give all of them their mean, each counting by its records."""
    mean = average([copy.deepcopy(part.state_dict()) for part in parts], counts)
    for part in parts:
        part.load_state_dict(mean)


def assert_same_bits(part: nn.Module | None, twin: nn.Module) -> None:
    """Every weight of the two is the same number."""
    assert part is not None
    found, expected = part.state_dict(), twin.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def all_weights(setup: Setup) -> dict[str, Tensor]:
    """A copy of everything that any party has learned, optimizers included."""
    parties = {seat.client.name: seat.client for seat in setup.seats}
    weights = {
        f"{name}.{key}": tensor.clone()
        for name, client in parties.items()
        for key, tensor in client.weights(with_optimizer=True).items()
    }
    for name, server in setup.desk.servers.items():
        weights |= {f"server of {name}.{k}": t.clone() for k, t in server.weights(with_optimizer=True).items()}
    return weights


def assert_equal_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, the same numbers."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
