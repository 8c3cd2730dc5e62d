"""A server and a client as users run them (`serve`, `join`), each in a process of its own, that work when told to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from benchmarks.slow_link import enter
from benchmarks.turns import OverError, Turn, Worker
from milkglass.certificates import load_credentials, make_certificates
from milkglass.client import StepResult
from milkglass.errors import MilkglassError
from milkglass.recipe import Recipe

CLIENT: Final = "hospital"
WARM_UP_STEPS: Final = 6
_SYNTHETIC_RECORDS: Final = 20_000
_FILES: Final[Mapping[tuple[int, ...], str]] = {
    (1, 28, 28): "fashion-mnist-train.npz",
    (3, 32, 32): "cifar10-train.parquet",
}


@dataclass(frozen=True)
class Case:
    """What is trained."""

    data: str
    shape: tuple[int, ...]
    network: str
    settings: Mapping[str, object]
    at: str

    @property
    def name(self) -> str:
        """For a table."""
        return f"{self.data} {self.network}"


CASES: Final = (
    Case("Fashion-MNIST", (1, 28, 28), "cnn", {}, "block2"),
    Case("Fashion-MNIST", (1, 28, 28), "cnn", {}, "block1"),
    Case("CIFAR-10", (3, 32, 32), "resnet", {"depth": 8}, "block1"),
    Case("CIFAR-10", (3, 32, 32), "resnet", {"depth": 8}, "block2"),
)


def records_file(shape: tuple[int, ...], data: Path | None, folder: Path) -> Path:
    """The data set of that shape; random records where there is no folder of data sets: as good, for speed."""
    if data is not None:
        return data / _FILES[shape]
    path = folder / f"{'x'.join(map(str, shape))}.npz"
    if not path.exists():
        generator = np.random.default_rng(0)
        channels, height, width = shape
        images = generator.integers(0, 256, (_SYNTHETIC_RECORDS, height, width, channels), dtype=np.uint8)
        labels = generator.integers(0, 10, _SYNTHETIC_RECORDS)
        np.savez(path, images=images[..., 0] if channels == 1 else images, labels=labels)
    return path


def recipe_of(case: Case, records: Path, **training: Any) -> Recipe:
    """Nearly all records are for training, so that no epoch ends within a few blocks."""
    return Recipe.model_validate(
        {
            "data": {
                "path": str(records),
                "record_shape": case.shape,
                "classes": 10,
                "test_share": 0.01,
                "test_records": 8,
            },
            "network": {"name": case.network, "settings": dict(case.settings)},
            "cut": {"at": case.at},
            "training": {"epochs": 1000, **training},
            "parties": {"clients": [CLIENT]},
            "attacker": {"auxiliary_share": 0.01, "validation_share": 0.01},
        }
    )


@dataclass(frozen=True)
class Place:
    """Where the two parties are. Namespaces of the network: None for this one."""

    pki: Path
    host: str = "localhost"
    server_namespace: str | None = None
    client_namespace: str | None = None


def place(folder: Path, host: str = "localhost", **namespaces: str) -> Place:
    """With certificates for both."""
    make_certificates(folder / "pki", host, [CLIENT])
    return Place(folder / "pki", host, **namespaces)


@final
class _Gate:
    """Watches a training, and holds it between batches until it is its turn."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn

    def batch(self, epoch: int, step: int, steps: int, result: StepResult) -> None:  # noqa: ARG002
        """One batch is done."""
        self._turn.done()

    def epoch(self, line: dict[str, Any]) -> None:
        """Nothing to do."""


def _be_server(pipe: Connection, recipe: Recipe, where: Place, out: Path) -> None:
    from milkglass.training.serve import serve

    if where.server_namespace is not None:
        enter(where.server_namespace)
    credentials = load_credentials(where.pki / where.host, "server")
    with contextlib.suppress(MilkglassError):  # it is stopped in the middle
        serve(recipe, f"{where.host}:0", credentials, out, ready=pipe.send)


def _be_client(pipe: Connection, recipe: Recipe, where: Place, port: int, out: Path) -> None:
    from milkglass.training.join import join

    if where.client_namespace is not None:
        enter(where.client_namespace)
    credentials = load_credentials(where.pki / CLIENT, "client")
    gate = _Gate(Turn(pipe, WARM_UP_STEPS))
    with contextlib.suppress(OverError):
        join(recipe, CLIENT, f"{where.host}:{port}", credentials, out, progress=gate)


@contextlib.contextmanager
def two_parties(recipe: Recipe, where: Place, out: Path) -> Iterator[tuple[Worker, Worker]]:
    """(client, server), warm. The client works in steps of training."""
    server = Worker(_be_server, recipe, where, out / "server")
    try:
        client = Worker(_be_client, recipe, where, server.told(), out / "client")
        try:
            client.told()
            yield client, server
        finally:
            client.end()
    finally:
        server.end()
