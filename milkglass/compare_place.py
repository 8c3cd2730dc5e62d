"""What every cell of a comparison has: where it is made, who watches, and figures that are read off a summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from milkglass.attacks.suite import Strength
from milkglass.audit_files import Watching
from milkglass.compare import Cell
from milkglass.recipe import Recipe
from milkglass.training.client_memory import optimizer_slots

LARGEST_EPSILON: Final = 10.0


@final
@dataclass(frozen=True)
class Place:
    """Where a cell is made, and how hard it is attacked. reference: the undefended cell of the same way."""

    run: Path
    name: str
    strength: Strength
    watching: Watching
    reference: Path | None = None


def batches_of_client(recipe: Recipe, summary: Mapping[str, Any]) -> float:
    """Of one client in the whole training, on average."""
    train = summary["records"]["train"]
    held = list(train.values()) if isinstance(train, dict) else [train / int(summary.get("ranks", 1))]
    batches: float = sum(records // recipe.training.batch_size for records in held) / len(held) * recipe.training.epochs
    return batches


def record_gradients(recipe: Recipe, learned: int) -> int:
    """Bytes of the gradients of single records, which DP-SGD holds of so many weights at once; 0 without it."""
    return 0 if recipe.dp is None else 4 * learned * recipe.training.batch_size


def slots(recipe: Recipe) -> int:
    """How many numbers the recipe's optimizer keeps for each weight."""
    return optimizer_slots(recipe.training.optimizer, recipe.training.momentum)


def covers(cell: Cell, summary: Mapping[str, Any]) -> bool:
    """Whether the guarantee of a training is about a record, for all of it that the way shares but its label.

    A channel's certificate is of activations: U-shaped, gradients of a second cut go out as well. DP-SGD is of weights:
    in split training activations go out as well; and above an epsilon of 10 it says nothing that means anything.
    """
    if cell.protection == "channel":
        return cell.training != "u_shaped" and bool(summary.get("certificate"))
    spent = [each["epsilon"] for each in (summary.get("privacy") or {}).values()]
    return cell.training == "federated" and bool(spent) and max(spent) <= LARGEST_EPSILON


def guarantee(summary: Mapping[str, Any]) -> str | None:
    """The words of a certificate, or of differential privacy."""
    if summary.get("certificate"):
        return str(summary["certificate"]["words"][0])
    if summary.get("privacy"):
        return str(next(iter(summary["privacy"].values()))["words"])
    return None
