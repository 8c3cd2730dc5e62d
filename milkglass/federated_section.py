"""The recipe's tables of federated training, and of differential privacy at a client."""

from __future__ import annotations

from typing import Literal, Self, final

from pydantic import Field, model_validator

from milkglass.defense_sections import Section


@final
class SecureAggregation(Section):
    """SecAgg+ (Bell et al. 2020, eprint 2020/704): the server learns the clients' sum, and no client's own weights."""

    shares: int | None = Field(
        None, ge=3, description="In how many shares each client's keys are split; default: one for every client."
    )
    threshold: int | None = Field(
        None,
        ge=2,
        description="So many shares rebuild a key; with fewer clients left a round fails. Default: two thirds of the "
        "shares, rounded up.",
    )
    clip: float = Field(
        8.0,
        gt=0,
        le=1e6,
        description="The largest weight that can be summed: they are rounded on this scale. A larger one is refused.",
    )

    @model_validator(mode="after")
    def _threshold_below_shares(self) -> Self:
        if self.shares is not None and self.threshold is not None and self.threshold >= self.shares:
            raise ValueError(f"threshold is {self.threshold}; expected fewer than shares, {self.shares}")
        return self


@final
class Federated(Section):
    """How the clients of `parties.mode = "federated"` train one network (FedAvg, McMahan et al. 2017)."""

    local_epochs: int = Field(
        1,
        ge=1,
        description="Epochs that each client trains by itself in a round; training.epochs is a multiple of it.",
    )
    least_clients: int | None = Field(
        None,
        ge=1,
        description="A round that fewer clients finish ends the run; with as many or more it goes on without the "
        "others. Default: all of them.",
    )
    secure_aggregation: SecureAggregation | None = Field(
        None, description="Secure aggregation; leave the table out for none."
    )
    round_seconds: float = Field(
        600.0, gt=0, description="A client that has not answered after so long is taken for gone in this round."
    )


@final
class DifferentialPrivacy(Section):
    """DP-SGD (Abadi et al. 2016) at each client, by Opacus: per-record gradients clipped, summed, noised."""

    epsilon: float = Field(gt=0, le=100, description="The budget of a client's whole training; noise follows from it.")
    delta: float = Field(1e-5, gt=0, lt=1, description="The chance that the bound does not hold; below 1 / records.")
    clip: float = Field(1.0, gt=0, description="The largest norm of one record's gradient.")
    accountant: Literal["rdp", "prv"] = Field(
        "prv", description="How the loss adds up: `prv` (Gopi et al. 2021) is tighter, `rdp` (Mironov 2017) quicker."
    )
