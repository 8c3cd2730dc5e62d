"""The recipe's table of open collaboration: how volunteers train one network together."""

from __future__ import annotations

from typing import Annotated, Literal, final

from pydantic import Field, model_validator

from milkglass.defense_sections import Section


@final
class Collaboration(Section):
    """How the volunteers of `parties.mode = "collaboration"` add up one batch and average its gradients."""

    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")] = Field(
        "milkglass", description="The run's name: volunteers of one run find each other under it."
    )
    target_batch: int = Field(
        1024,
        ge=1,
        description="Records that all volunteers together add up before a step of the optimizer. One such batch is an "
        "epoch here, as in DeDLOC and hivemind.",
    )
    epochs: int = Field(100, ge=1, description="Steps of the optimizer until the run ends.")
    first_peers: int = Field(
        1,
        ge=1,
        le=1024,
        description="Nobody takes the run's first step before so many volunteers are there; a run that is under way "
        "waits for nobody.",
    )
    compress: Literal["none", "fp16", "int8", "gaussian_k"] = Field(
        "none",
        description="What crosses in place of float32 gradients. `fp16`: half the bytes. `int8`: a quarter, a scale "
        "per block. `gaussian_k`: about the largest share `density`, with error feedback; what comes back is the mean "
        "of those.",
    )
    density: Annotated[float, Field(gt=0, le=1)] = Field(
        0.01, description="With `gaussian_k`: the share of gradients that a volunteer sends."
    )
    robust: bool = Field(
        False,
        description="Against volunteers that lie: contributions are clipped around the last average (centered "
        "clipping), and every part is reduced by two volunteers and compared. Sends twice the bytes; needs three.",
    )
    weight_cap: float = Field(
        10.0,
        ge=1,
        description="No volunteer's claim of records counts for more than so many times the group's median, in robust "
        "mode for more than twice. Where machines differ by more, the fast ones wait for the slow.",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="`bfloat16`: forward and backward in mixed precision (autocast); weights stay float32."
    )
    matchmaking_seconds: float = Field(
        5.0, gt=0, le=120, description="How long a group waits for volunteers that are expected and do not come."
    )
    timeout_seconds: float = Field(
        30.0, gt=0, description="An averaging that takes longer is given up and tried again with those who are there."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Collaboration:
        if self.density != 0.01 and self.compress != "gaussian_k":
            raise ValueError(f"density goes with compress gaussian_k; compress is {self.compress}")
        if self.robust and self.compress == "gaussian_k":
            raise ValueError(
                "robust compares contributions, and with compress gaussian_k each has other numbers; expected none, "
                "fp16 or int8"
            )
        return self
