"""The tables of a recipe's defenses, and what every table is: the rest stands in `sections.py`."""

from __future__ import annotations

from typing import Literal, Self, final

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A table of the recipe: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


@final
class NoPeekDefense(Section):
    """Distance correlation between records and activations as a penalty (Vepakomma et al. 2020)."""

    weight: float = Field(1.0, ge=0, description="Weight of the penalty beside the cross-entropy, which has weight 1.")
    estimator: Literal["biased", "unbiased", "linear"] = Field(
        "biased",
        description="`biased`: distance correlation as in the paper. `unbiased`: its bias-corrected square. "
        "`linear`: the squared-distance variant (square root of linear CKA), a baseline.",
    )


@final
class NoiseDefense(Section):
    """Noise on every activation that leaves the client, in training and in inference."""

    sigma: float = Field(ge=1e-6, le=1e6, description="Standard deviation of the noise, in the activations' own unit.")
    kind: Literal["gaussian", "laplace"] = Field("gaussian", description="How it is distributed.")


@final
class LearnedNoiseDefense(Section):
    """Noise whose scale is learned for each value that is sent (after Shredder, Mireshghallah et al. 2020)."""

    weight: float = Field(0.1, ge=0, description="Weight of the reward for noise; 0: the task alone sets the scales.")
    start: float = Field(
        0.1, ge=1e-6, le=1e6, description="The scale that all values begin with, in the activations' own unit."
    )
    kind: Literal["gaussian", "laplace"] = Field("gaussian", description="How it is distributed.")


@final
class ClippingDefense(Section):
    """A bound on the norm of what is sent for a record."""

    clip: float = Field(
        ge=1e-6,
        le=1e6,
        description="The largest Euclidean norm of a record's activations; with a channel, of its projected "
        "coordinates, for the projection is part of the client's stage.",
    )


@final
class ChannelDefense(Section):
    """A narrow noisy channel: projection, clipped norm, Gaussian noise; it comes with a certificate."""

    width: int = Field(8, ge=1, le=4096, description="How many coordinates are sent for a record.")
    sigma: float = Field(
        0.3, ge=0, le=1e6, description="Standard deviation of the noise on each of them; 0: no certificate."
    )
    clip: float | None = Field(
        None, ge=1e-6, le=1e6, description="The largest norm of a record's coordinates; default sqrt(width)."
    )

    projection: Literal["linear", "mlp", "conv", "random", "pca"] = Field(
        "mlp",
        description="Learned: `linear`; `mlp`, with a hidden layer of 128; `conv`, for maps of 8 x 8 or more. "
        "Baselines that are fixed before training: `random`, and `pca`, fitted to the client's records as its first "
        "weights see them.",
    )

    @model_validator(mode="after")
    def _sigma_can_be_carried(self) -> Self:
        if 0 < self.sigma < 1e-6:
            raise ValueError(f"sigma is {self.sigma:g}; expected 0, or 1e-06 and more")
        return self


@final
class AdversaryDefense(Section):
    """A decoder at the client, trained against its stage (after ResSFL, Li et al. 2022)."""

    weight: float = Field(1.0, ge=0, description="Weight of the penalty on what the decoder explains of the records.")
    learning_rate: float = Field(1e-3, gt=0, description="Of the decoder's own Adam.")
    width: int = Field(16, ge=1, le=256, description="Channels of the decoder.")
    steps: int = Field(1, ge=1, le=16, description="Steps of the decoder after each batch.")


@final
class EntropyDefense(Section):
    """A penalty on a bound of what a noisy release tells (after conditional entropy maximization, CEM, 2025)."""

    weight: float = Field(0.1, ge=0, description="Weight of the penalty, a nat a record; it goes with noise.")


@final
class LabelDefense(Section):
    """Noise on gradients that leave who holds the labels (Li et al. 2022)."""

    kind: Literal["max_norm", "marvell"] = Field(
        "max_norm", description="`max_norm`: all gradients as long as the longest. `marvell`: two classes, least told."
    )
    strength: float = Field(
        4.0, gt=0, description="With `marvell`: the noise's power over the squared distance of the classes' means."
    )


@final
class Defense(Section):
    """What the client does to show less. All that are there act, in the order of this table: first what bounds what is
    sent, then noise, then penalties on exactly what will be sent. Leave a table out for none.
    """

    clipping: ClippingDefense | None = Field(None, description="Clipped activations.")
    channel: ChannelDefense | None = Field(None, description="A narrow noisy channel.")
    noise: NoiseDefense | None = Field(None, description="Fixed noise.")
    learned_noise: LearnedNoiseDefense | None = Field(None, description="Learned noise.")
    nopeek: NoPeekDefense | None = Field(None, description="NoPeek's penalty.")
    adversary: AdversaryDefense | None = Field(None, description="An adversary in the loop.")
    entropy: EntropyDefense | None = Field(None, description="Conditional entropy; it goes with noise.")
    labels: LabelDefense | None = Field(
        None, description="Label protection; it goes with labels that the server is not sent, or other owners are not."
    )
    certified: bool = Field(
        False,
        description="Refuse to run unless the defenses come with a certificate: a channel, or clipping and noise; in "
        "vertical training there is none.",
    )

    @model_validator(mode="after")
    def _certificate_can_be_had(self) -> Self:
        gaussian = self.noise is not None and self.noise.kind == "gaussian" and self.clipping is not None
        if self.certified and self.channel is not None and self.channel.sigma == 0 and not gaussian:
            raise ValueError("certified asks for a certificate, and channel.sigma is 0: without noise there is none")
        if self.certified and self.channel is None and not gaussian:
            given = ", ".join(name for name in type(self).model_fields if name != "certified" and getattr(self, name))
            raise ValueError(
                f"certified asks for a certificate, and {given or 'no defense'} has none; expected channel, or "
                "clipping and noise of kind gaussian"
            )
        return self

    @model_validator(mode="after")
    def _entropy_has_noise(self) -> Self:
        noisy = self.noise is not None or (self.channel is not None and self.channel.sigma > 0)
        if self.entropy is not None and not noisy:
            raise ValueError(
                "entropy needs noise of a sigma that is fixed; expected channel or noise (learned_noise alone has none)"
            )
        return self
