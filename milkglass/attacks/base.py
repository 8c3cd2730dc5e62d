"""What every attack is: settings in its constructor, a view in the call, a reconstruction out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from milkglass.errors import MissingKnowledgeError
from milkglass.transcript import Known, View

Adversary = Literal["honest-but-curious", "malicious"]

Tick = Callable[[int, int], None]
"""(done, total): how far an attack has come, in steps of its own."""


def silent(done: int, total: int) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class Reconstruction:
    """The attacker's guess of the validation records (N, ...) and of the target's records (T, ...).

    An attack that optimizes record by record may rebuild only the first of each: (n, ...) and (t, ...), n <= N, t <= T.
    note: what a reader has to know of how it came about, such as a client that stopped half-way; "" for nothing.
    """

    validation: Tensor
    target: Tensor
    seconds: float
    note: str = ""


class Method(ABC):
    """What all attacks state of themselves. `repr` must show every setting: results are kept by it.

    knows: what the attacker must have. paper: where it comes from. open_door: the least peek it must reach where the
    raw record crosses (or where a trainable, wide, invertible client trains, for an attack that needs a training).
    closed_door: the most peek it may reach on releases of other records.
    """

    name: ClassVar[str]
    adversary: ClassVar[Adversary] = "honest-but-curious"
    knows: ClassVar[tuple[Known, ...]] = ("pairs",)
    paper: ClassVar[str]
    open_door: ClassVar[float] = 0.95
    closed_door: ClassVar[float] = 0.05

    def check(self, view: View) -> None:
        """Raise MissingKnowledgeError if the view lacks something that this attack must know."""
        missing = [needed for needed in self.knows if view.lacks(needed)]
        if missing:
            raise MissingKnowledgeError(f"attack {self.name!r} needs {', '.join(missing)}; the view has none")


class Attack(Method):
    """A method of rebuilding records from a view. Subclasses are final; each states its adversary and knowledge.

    learned: trained step by step, so it may stop too early; an audit compares it with ridge regression.
    """

    learned: ClassVar[bool] = False

    @abstractmethod
    def attack(self, view: View, tick: Tick = silent) -> Reconstruction:
        """Rebuild the records behind `view.target`. Higher fidelity = more leakage."""
