"""What every attack is: settings in its constructor, a view in the call, a reconstruction out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from milkglass.transcript import View

Adversary = Literal["honest-but-curious", "malicious"]


@dataclass(frozen=True)
class Reconstruction:
    """The attacker's guess of the validation records (N, ...) and of the target's records (T, ...)."""

    validation: Tensor
    target: Tensor
    seconds: float


class Attack(ABC):
    """A method of rebuilding records from a view. Subclasses are final; each states its adversary and knowledge.

    learned: trained step by step, so it may stop too early; an audit compares it with ridge regression.
    """

    name: ClassVar[str]
    adversary: ClassVar[Adversary] = "honest-but-curious"
    knows: ClassVar[tuple[str, ...]] = ("pairs",)
    learned: ClassVar[bool] = False

    @abstractmethod
    def attack(self, view: View) -> Reconstruction:
        """Rebuild the records behind `view.target`. Higher fidelity = more leakage."""
