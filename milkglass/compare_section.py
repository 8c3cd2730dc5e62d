"""The recipe's table of `milkglass compare`: what is set side by side, and what its user needs."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self, final

from pydantic import Field, model_validator

from milkglass.defense_sections import Section
from milkglass.errors import nearest

TRAININGS: Final = (
    *("whole", "split", "u_shaped", "splitfed", "federated", "large_batch", "adaptive", "collaboration"),
)
"""Ways of training that `milkglass compare` knows."""
PROTECTIONS: Final = (
    *("none", "nopeek", "channel", "dp", "secure_aggregation", "homomorphic", "two_party", "garbled"),
)
"""Protections that `milkglass compare` knows."""
Clients = Annotated[int, Field(ge=1, le=64)]


@final
class CompareSection(Section):
    """What is compared, and what its user needs: the recommendation follows from these by rules that it states."""

    trainings: tuple[str, ...] | None = Field(
        None,
        description=f"Ways of training: {', '.join(f'`{name}`' for name in TRAININGS)}. Default: all.",
        strict=False,
    )
    protections: tuple[str, ...] | None = Field(
        None,
        description=f"Protections: {', '.join(f'`{name}`' for name in PROTECTIONS)}. Default: all. NoPeek and the "
        "channel are as in the recipe's `defense` table, or as they are by default.",
        strict=False,
    )
    clients: tuple[Clients, ...] = Field(
        (2, 10), min_length=1, description="With so many clients each row is measured.", strict=False
    )
    formula_clients: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (100, 500), description="With so many clients costs are computed, by formula.", strict=False
    )
    attacks: Literal["quick", "default", "thorough"] = Field(
        "default", description="How hard every row is attacked; with `quick` on fresh records alone."
    )
    secure_clients: Annotated[int, Field(ge=3, le=64)] = Field(
        3, description="SecAgg+ needs three clients; where a row has fewer, so many take part."
    )
    records: int = Field(
        100, ge=1, description="Encrypted and two-party inference is measured on so many test records."
    )
    labels_stay: bool = Field(False, description="A need: labels must not leave a client.")
    peek_at_most: float | None = Field(None, ge=0, le=1, description="A need: the upper end of peek is at most this.")
    guarantee: bool = Field(False, description="A need: a formal guarantee, not a measurement alone.")
    uplink_mbit_per_second: float | None = Field(
        None, gt=0, description="A need: a client sends so fast; what a training sends then takes time."
    )
    downlink_mbit_per_second: float | None = Field(None, gt=0, description="The same for what a client receives.")
    accuracy_lost_at_most: float = Field(
        0.02, ge=0, le=1, description="A need: so much less than the best accuracy of all measured rows, at most."
    )
    sort: Literal[
        "accuracy", "peek", "bytes_up", "bytes_down", "client_flops", "client_memory", "seconds", "training"
    ] = Field("peek", description="What the table is sorted by, best first.")

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        for key, names, known in (
            ("trainings", self.trainings, TRAININGS),
            ("protections", self.protections, PROTECTIONS),
        ):
            for name in names or ():
                if name not in known:
                    raise ValueError(f"{key}: nothing is called {name!r}; {nearest(name, known)}")
            if names is not None and (not names or len(set(names)) < len(names)):
                raise ValueError(f"{key}: expected different names, one at least; found {', '.join(names) or 'none'}")
        return self
