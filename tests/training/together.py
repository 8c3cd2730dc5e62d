"""What each rank does in `test_large_batch.py`: a whole data-parallel training of a recipe, or a part of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from milkglass.errors import MilkglassError
from milkglass.randomness import Source
from milkglass.recipe import Recipe, parse_recipe
from milkglass.training.large_batch import train
from tests.helpers import KEY


class StoppedError(Exception):
    """Raised where a test wants a training to stop."""


class StopsAfter:
    """A progress that stops the training of its own rank after an epoch."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs

    def batch(self, *_: Any) -> None: ...

    def epoch(self, line: dict[str, Any]) -> None:
        if line["epoch"] == self._epochs:
            raise StoppedError


def recipe(batch_size: int = 16, **changes: Any) -> Recipe:
    """Digits, data-parallel; `changes` replace whole tables, those of `parallel` and `training` single keys."""
    training = {"epochs": 3, "batch_size": batch_size, "optimizer": "sgd", "learning_rate": 0.2}
    tables: dict[str, Any] = {
        "data": {"name": "digits", "train_records": 256, "test_records": 100, "test_share": 0.1},
        "network": {"name": "mlp", "settings": {"hidden": [32, 16]}},
        "training": training | changes.pop("training", {}),
        "parties": {"mode": "data_parallel"},
        "parallel": changes.pop("parallel", {}),
        "attacker": {"auxiliary_share": 0.1, "validation_share": 0.1},
    }
    return parse_recipe(tables | changes)


def normed(record_shape: tuple[int, ...], classes: int) -> nn.Module:
    """A factory of a user's own, with dropout and BatchNorm."""
    wide = torch.Size(record_shape).numel()
    layers = (nn.Flatten(), nn.Linear(wide, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, classes))
    return nn.Sequential(*layers)


def whole(
    rank: int, told: Recipe, out: str, resume: bool = False, key: bool = False, stop_after: int | None = None
) -> str | None:
    """What was wrong, in its own words; None where the training ended well. It stops, if so, at both ranks."""
    progress = None if stop_after is None else StopsAfter(stop_after)
    try:
        summary = train(told, Path(out), Source(KEY) if key else None, resume=resume, progress=progress)
    except MilkglassError as error:
        return str(error)
    except StoppedError:
        return "stopped"
    assert (summary is None) == (rank > 0)
    return None


def elsewhere(rank: int, told: Recipe, out: str) -> str | None:
    """Go on, but rank 1 looks for the run in a folder of its own."""
    return whole(rank, told, out if rank == 0 else f"{out}-of-rank-1", resume=True)
