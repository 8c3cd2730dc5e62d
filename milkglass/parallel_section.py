"""The recipe's table of data-parallel training: what ranks send each other in place of all gradients at every step."""

from __future__ import annotations

from typing import Annotated, Literal, final

from pydantic import Field, model_validator

from milkglass.defense_sections import Section

Exchange = Literal["dense", "topk", "gaussian_k", "powersgd", "periodic", "adaptive"]
Density = Annotated[float, Field(gt=0, le=1)]


@final
class Parallel(Section):
    """How the processes of `parties.mode = "data_parallel"`, or of a server under torchrun, keep one network."""

    exchange: Exchange = Field(
        "dense",
        description="What crosses between ranks. At every step: `dense` all gradients; `topk` exactly the largest, "
        "`gaussian_k` about those, by a threshold (GaussianK-SGD), with error feedback; `powersgd` factors of low "
        "rank. Now and then: `periodic` the weights, every `period` steps; `adaptive` as seldom as their spread allows "
        "(ADPSGD).",
    )
    density: Density = Field(
        0.001, description="With `topk`, `gaussian_k` and `compress_weights`: the share of numbers that is sent."
    )
    warmup: tuple[Density, ...] = Field(
        (),
        max_length=100,
        description="With `topk` and `gaussian_k`: densities of the first epochs; published: "
        "`[0.015625, 0.004]` before 0.001.",
        strict=False,
    )
    momentum_correction: bool = Field(
        False,
        description="With `topk` and `gaussian_k`: momentum works before gradients are chosen (Deep Gradient "
        "Compression), `training.momentum` with `sgd`; the published GaussianK-SGD has none.",
    )
    matrix_rank: int = Field(1, ge=1, le=256, description="With `powersgd`: the rank of its factors.")
    period: int | None = Field(
        None,
        ge=1,
        description="`periodic`: steps between two averagings, default 8. `adaptive`: those at first, default 4.",
    )
    dense_epochs: int = Field(
        1,
        ge=0,
        description="`periodic` and `adaptive`: so many epochs at the start average after every step; a server's "
        "processes know of none, and begin with the period.",
    )
    compress_weights: bool = Field(
        False,
        description="`periodic` and `adaptive`: what is averaged goes through Gaussian-k too, with error feedback.",
    )
    patience_seconds: float = Field(
        300, gt=0, description="A rank that leaves the others waiting so long is taken for gone."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Parallel:
        sparse, seldom = self.exchange in ("topk", "gaussian_k"), self.exchange in ("periodic", "adaptive")
        for key, given, fits, names in (
            ("warmup", bool(self.warmup), sparse, "topk or gaussian_k"),
            ("momentum_correction", self.momentum_correction, sparse, "topk or gaussian_k"),
            ("period", self.period is not None, seldom, "periodic or adaptive"),
            ("compress_weights", self.compress_weights, seldom, "periodic or adaptive"),
        ):
            if given and not fits:
                raise ValueError(f"{key} goes with exchange {names}; exchange is {self.exchange}")
        return self
