"""What a clipped and noised release can tell at most, whatever the attack; and whether given releases agree with it.

Legend: N records, R releases of one record, D coordinates sent for a record.

A release of norm at most C and Gaussian noise sigma on each of D coordinates is a use of a Gaussian channel (Shannon
1949): at most D/2 log2(1 + C^2 / (D sigma^2)) bits about the record. From the bits follows, by Fano's inequality, how
often anyone can name the record among N that are equally likely. Two records move a release by 2C at most, which makes
it locally (epsilon, delta)-private by the analytic Gaussian mechanism (Balle and Wang 2018, arXiv 1805.06530).

All of it holds for fixed weights of the client's stage. Totals add up per record only where that stage does not depend
on the record: no weight of it was learned from it, or fitted to it. During training only the joint total, releases
times bits, about the whole data set can be said. It says nothing of labels, ids, timing, or weights that are handed on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, final

import torch
from scipy.stats import chi2, ncx2, norm
from torch import Tensor

from milkglass.defenses.base import Defense
from milkglass.defenses.channel import Channel
from milkglass.defenses.clipping import Clipping
from milkglass.defenses.learned_noise import LearnedNoise
from milkglass.defenses.noise import Noise
from milkglass.errors import AuditError
from milkglass.leakage.gaussian_mechanism import gaussian_epsilon
from milkglass.leakage.information import exact_fano_upper_bound, gaussian_capacity_bits, is_vacuous

DELTA: Final = 1e-5
CANDIDATES: Final = (256, 1024, 1_000_000)
LARGEST_EPSILON: Final = 10.0
"""Above this an epsilon is no promise worth the name."""
LARGEST_RATIO: Final = 1e9
"""Of clip to sigma, up to which an epsilon is computed; beyond, there is none worth a number."""
SURELY_WRONG: Final = 1e-6
"""Releases disagree with a certificate if so little noise, or such norms, are less likely than this under it."""


@dataclass(frozen=True)
class Reidentification:
    """At most so often (0..1) is the right one of N equally likely records named from one release."""

    candidates: int
    bound: float
    vacuous: bool


@final
@dataclass(frozen=True)
class JointTotal:
    """What all releases of a training tell at most, in bits: about all its records together, and not about each."""

    releases: int
    joint_bits: float
    words: str


@final
@dataclass(frozen=True)
class Certificate:
    """Of one release, for fixed weights of the client's stage. Lower bits, bounds and epsilon = less can be told.

    dimensions: D. clip: C, in the unit of what is sent, as sigma is. reidentification: by Fano's inequality. epsilon:
    local, at this delta and a sensitivity of 2C. training: the joint total of the one behind it, where that is known.
    """

    dimensions: int
    clip: float
    sigma: float
    bits_per_release: float
    reidentification: tuple[Reidentification, ...]
    epsilon: float
    delta: float
    training: JointTotal | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """What it says, in sentences."""
        named = "; ".join(f"among {each.candidates:,}: {_at_most(each.bound)}" for each in self.reidentification)
        private = (
            "no meaningful local DP"
            if self.epsilon > LARGEST_EPSILON
            else f"locally ({self.epsilon:.2f}, {self.delta:g})-private"
        )
        return (
            f"one release tells at most {self.bits_per_release:.2f} bits about its record, in the mean over records, "
            "whatever the attack, for fixed weights of the client's stage",
            f"the right one of equally likely records is named from one release with probability {named}",
            private + ("" if self.epsilon <= LARGEST_EPSILON else f" (epsilon {self.epsilon:.1f})"),
            "it does not cover labels, ids, timing or weights that are handed on, and further releases of a record "
            "add up",
            *(() if self.training is None else (self.training.words,)),
        )

    def to_dict(self) -> dict[str, Any]:
        """As in audit.json; an epsilon beyond all numbers is null there."""
        epsilon = self.epsilon if math.isfinite(self.epsilon) else None
        return {**asdict(self), "epsilon": epsilon, "words": list(self.words)}


def _at_most(bound: float) -> str:
    """In words; rounded up, so that what is read is true."""
    if bound > 0.999:
        return "vacuous"
    digits = 3 if bound >= 0.01 else 6
    return f"at most {math.ceil(bound * 10**digits) / 10**digits:.{digits}f}"


def certificate(dimensions: int, clip: float, sigma: float, delta: float = DELTA) -> Certificate:
    """That of a release of `dimensions` coordinates, norm at most `clip`, Gaussian noise `sigma` on each.

    Raises AuditError for values out of range, a sigma of 0 among them.
    """
    bits = gaussian_capacity_bits(dimensions, clip, sigma)
    bounds = ((count, exact_fano_upper_bound(bits, count)) for count in CANDIDATES)
    return Certificate(
        dimensions,
        clip,
        sigma,
        bits,
        tuple(Reidentification(count, bound, is_vacuous(bound)) for count, bound in bounds),
        gaussian_epsilon(delta, 2 * clip, sigma) if clip / sigma < LARGEST_RATIO else math.inf,
        delta,
    )


def counted(defenses: Sequence[Defense]) -> list[Defense]:
    """Those of a client's defenses that a certificate rests on. What the others add comes on top, and tells no more."""
    return [
        defense
        for defense in defenses
        if isinstance(defense, Clipping | Channel) or (isinstance(defense, Noise) and defense.kind == "gaussian")
    ]


def certify(defenses: Sequence[Defense], cut_shape: tuple[int, ...], coupled: Sequence[str] = ()) -> Certificate:
    """The certificate of a client's defenses, in the order in which they act, on a cut of `cut_shape` without ends.

    coupled: layers of the client's stage that mix the records of a batch (`cuts.couples_records`). Raises AuditError,
    which says why, where there is none.
    """
    if coupled:
        raise AuditError(
            f"no certificate: BatchNorm ({coupled[0]}) in the client's stage couples records; use nn.GroupNorm"
        )
    dimensions, clip, variance = torch.Size(cut_shape).numel(), 0.0, 0.0
    for defense in defenses:
        changes = any(getattr(type(defense), hook) is not getattr(Defense, hook) for hook in ("transform", "release"))
        if changes and not isinstance(defense, Clipping | Channel | Noise | LearnedNoise):
            raise AuditError(
                f"no certificate: {defense.describe()} changes what is sent in a way that nothing is known of"
            )
    for defense in counted(defenses):
        if isinstance(defense, Clipping):
            clip, variance = defense.clip, 0.0
        elif isinstance(defense, Channel):
            dimensions, clip, variance = defense.width, defense.clip, defense.sigma**2
        elif isinstance(defense, Noise):
            variance += defense.sigma**2
    named = " + ".join(defense.describe() for defense in defenses)
    if not named:
        raise AuditError("no certificate: there is no defense; expected a channel, or clipping and noise")
    if not clip:
        raise AuditError(
            f"no certificate: {named} does not bound what is sent; expected a channel, or clipping and noise"
        )
    if not variance:
        raise AuditError(f"no certificate: {named} adds no Gaussian noise; expected a sigma above 0")
    return certificate(dimensions, clip, variance**0.5)


@dataclass(frozen=True)
class ReleaseCheck:
    """What releases say of a certificate. sigma: of the noise, as they show it. longest: the largest norm of a record's
    mean release. p_noise, p_clip: how likely so little noise, and such norms, are if the certificate is true; the
    second for the likeliest culprit of all records. least: the smallest sigma that the releases of one record show;
    p_least: how likely that is of any of them, for noise on some records does not make up for its lack on others.
    """

    sigma: float
    longest: float
    p_noise: float
    p_clip: float
    least: float
    p_least: float

    @property
    def agrees(self) -> bool:
        """Whether nothing in the releases speaks against the certificate. Honest ones are refused with a probability
        of at most SURELY_WRONG, which the tests share evenly."""
        tests = (self.p_noise, self.p_clip, self.p_least)
        return len(tests) * min(tests) >= SURELY_WRONG


def _chi_squared_cdf(value: float, freedom: int) -> float:
    """With very many degrees of freedom scipy's series gives up; the cube root is normal (Wilson and Hilferty 1931)."""
    if freedom < 100_000:
        return float(chi2.cdf(value, freedom))
    share = 2 / (9 * freedom)
    return float(norm.cdf(((value / freedom) ** (1 / 3) - 1 + share) / math.sqrt(share)))


def check_releases(repeats: Tensor, claimed: Certificate) -> ReleaseCheck:
    """Compare `repeats` (R, N, ...), R releases with fresh noise of each of N records, with what is claimed of them.

    It looks at releases alone: at how far those of one record are from their mean, over all records and for each, and
    how long that mean is.
    Raises AuditError for fewer than two releases, or another number of coordinates.
    """
    if repeats.dim() < 3 or len(repeats) < 2 or repeats[0, 0].numel() != claimed.dimensions:
        raise AuditError(
            f"releases of shape {tuple(repeats.shape)}; expected (R, N, ...), R at least 2, with "
            f"{claimed.dimensions} coordinates a record"
        )
    sent_RND = repeats.flatten(2).double()
    times, records, width = sent_RND.shape
    mean_ND = sent_RND.mean(0)
    freedom = (times - 1) * width
    scatter_N = (sent_RND - mean_ND).square().sum((0, 2))
    scatter, least = scatter_N.sum().item(), scatter_N.min().item()
    norms_N = mean_ND.norm(dim=1)
    signal = times * (claimed.clip / claimed.sigma) ** 2
    p_N = ncx2.sf((times * norms_N.square() / claimed.sigma**2).numpy(), width, signal)
    return ReleaseCheck(
        sigma=(scatter / (freedom * records)) ** 0.5,
        longest=norms_N.max().item(),
        p_noise=_chi_squared_cdf(scatter / claimed.sigma**2, freedom * records),
        p_clip=min(1.0, float(p_N.min()) * records),
        least=(least / freedom) ** 0.5,
        p_least=min(1.0, _chi_squared_cdf(least / claimed.sigma**2, freedom) * records),
    )
