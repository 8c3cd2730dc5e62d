"""What several test files share: a small recipe, and the unsplit twin of a split training."""

from __future__ import annotations

from typing import Any, final

from milkglass.client import StepResult
from milkglass.recipe import Recipe, parse_recipe
from milkglass.training.split import Silence

KEY = bytes(range(32))


def small_recipe(**changes: Any) -> Recipe:
    """Digits, a tiny network, two epochs; `changes` replace whole tables."""
    tables: dict[str, Any] = {
        "data": {"name": "digits", "train_records": 96, "test_records": 40, "test_share": 0.1},
        "network": {"name": "mlp", "settings": {"hidden": [16, 8]}},
        "cut": {"at": "hidden1"},
        "training": {"epochs": 2, "batch_size": 32, "learning_rate": 1e-2},
        "attacker": {"auxiliary_share": 0.1, "validation_share": 0.1},
    }
    return parse_recipe(tables | changes)


@final
class Stop(Silence):
    """Stops a training from outside, as a signal would."""

    def __init__(self, epoch: int, step: int) -> None:
        self._when = (epoch, step)

    def batch(self, epoch: int, step: int, steps: int, result: StepResult) -> None:
        if (epoch, step) == self._when:
            raise KeyboardInterrupt
