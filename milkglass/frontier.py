"""Accuracy against peek: which defenses are tried at which strength, which of them are worth having, and which one fits
a budget. Pure: nothing is trained here, and no file is read.

A family of defenses has one number that is swept, its strength: higher = more hidden, as a rule. What else a family
needs it takes from the recipe's own defense table. Accuracy is the share of test records (0..1), higher = better; peek
is of fresh records, lower = more private. What counts against a budget is the upper end of an interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from types import MappingProxyType
from typing import Any, Final, final

from milkglass.defense_sections import (
    AdversaryDefense,
    ChannelDefense,
    Defense,
    EntropyDefense,
    LearnedNoiseDefense,
    NoiseDefense,
    NoPeekDefense,
)
from milkglass.errors import RecipeError
from milkglass.leakage.estimate import Estimate
from milkglass.recipe import Recipe, parse_recipe
from milkglass.sections import FrontierSection
from milkglass.verdict import BITS, Verdict, judge

Tables = dict[str, dict[str, Any]]


@final
@dataclass(frozen=True)
class Family:
    """A way to defend. words: its name for a reader. knob: what its strength is. make: the defense's tables."""

    words: str
    knob: str
    grid: tuple[float, ...]
    make: Callable[[Defense, float], Tables] = field(repr=False)


def _channel(base: Defense, **changes: Any) -> dict[str, Any]:
    return (base.channel or ChannelDefense()).model_dump() | changes


def _nopeek(base: Defense, weight: float) -> dict[str, Any]:
    return (base.nopeek or NoPeekDefense()).model_dump() | {"weight": weight}


def _noise(base: Defense, sigma: float) -> Tables:
    clipping = {} if base.clipping is None else {"clipping": base.clipping.model_dump()}
    return clipping | {"noise": (base.noise or NoiseDefense(sigma=sigma)).model_dump() | {"sigma": sigma}}


def _entropy(base: Defense, weight: float) -> Tables:
    entropy = (base.entropy or EntropyDefense()).model_dump() | {"weight": weight}
    return {"channel": _channel(base), "entropy": entropy}


def _adversary(base: Defense, weight: float) -> Tables:
    return {"adversary": (base.adversary or AdversaryDefense()).model_dump() | {"weight": weight}}


def _learned(base: Defense, weight: float) -> Tables:
    return {"learned_noise": (base.learned_noise or LearnedNoiseDefense()).model_dump() | {"weight": weight}}


def _projected(base: Defense, sigma: float, fixed: str | None = None) -> Tables:
    """A channel with a projection that is fixed before training, or a learned one: the recipe's, if that is."""
    projection = fixed or _channel(base)["projection"]
    if fixed is None and projection in _FIXED:
        projection = ChannelDefense().projection
    return {"channel": _channel(base, sigma=sigma, projection=projection)}


_FIXED: Final = ("random", "pca")


FAMILY: Final[Mapping[str, Family]] = MappingProxyType(
    {
        "nopeek": Family("NoPeek", "weight", (1.0, 4.0, 16.0), lambda b, s: {"nopeek": _nopeek(b, s)}),
        "noise": Family("noise", "sigma", (0.3, 1.0, 3.0), _noise),
        "channel": Family("channel", "sigma", (0.2, 0.4, 0.8), _projected),
        "channel_entropy": Family("channel + entropy", "weight", (0.01, 0.03, 0.1), _entropy),
        "channel_nopeek": Family(
            "channel + NoPeek",
            "weight",
            (0.1, 0.3, 1.0),
            lambda b, s: {"channel": _channel(b), "nopeek": _nopeek(b, s)},
        ),
        "adversary": Family("adversary", "weight", (1.0, 3.0, 10.0), _adversary),
        "learned_noise": Family("learned noise", "weight", (0.1, 0.3, 1.0), _learned),
        "random_projection": Family(
            "random projection", "sigma", (0.2, 0.4, 0.8), lambda b, s: _projected(b, s, "random")
        ),
        "pca": Family("PCA", "sigma", (0.2, 0.4, 0.8), lambda b, s: _projected(b, s, "pca")),
    }
)
"""The families that have a strength, by name."""


@final
@dataclass(frozen=True)
class Setting:
    """A family at one strength; `none` (undefended) and `recipe` (its own defense table) have no strength."""

    family: str
    strength: float | None = None

    @property
    def name(self) -> str:
        """As a folder's name begins."""
        return self.family if self.strength is None else f"{self.family}-{self.strength:g}"

    @property
    def words(self) -> str:
        """For a reader."""
        if self.strength is None:
            return {"none": "undefended", "recipe": "the recipe's own defense"}[self.family]
        return f"{FAMILY[self.family].words}, {FAMILY[self.family].knob} {self.strength:g}"


UNDEFENDED: Final = Setting("none")
AS_IT_IS: Final = Setting("recipe")


def recipe_of(recipe: Recipe, setting: Setting, seed: int | None = None) -> Recipe:
    """The recipe of a cell: of that setting and seed, without what is to be swept. Raises RecipeError."""
    seed = recipe.seed if seed is None else seed
    alone = recipe.model_copy(update={"frontier": None, "seed": seed})
    if setting == UNDEFENDED:
        return alone.undefended()
    if setting.strength is None:
        return alone
    base = recipe.defense
    tables: dict[str, Any] = {"certified": base.certified, **FAMILY[setting.family].make(base, setting.strength)}
    if base.labels is not None:
        tables["labels"] = base.labels.model_dump()
    return parse_recipe(alone.model_dump() | {"defense": tables}, where=setting.words)


def settings_of(recipe: Recipe) -> tuple[list[Setting], list[str]]:
    """What is tried first, the undefended network before all, and a note for each family that is left out.

    Families that the recipe names and that it does not allow raise RecipeError; by default they are left out.
    """
    section = recipe.frontier or FrontierSection()
    found, notes = [UNDEFENDED], []
    for name in section.families or FAMILY:
        if name not in FAMILY:
            continue
        strengths = sorted(section.strengths.get(name, FAMILY[name].grid))
        try:
            for strength in strengths:
                recipe_of(recipe, Setting(name, float(strength)))
        except RecipeError as error:
            if section.families is not None:
                raise
            notes.append(f"{FAMILY[name].words}: left out: {error}")
            continue
        found += [Setting(name, float(strength)) for strength in strengths]
    wanted = section.families is None or AS_IT_IS.family in section.families
    same = [setting for setting in found if recipe_of(recipe, setting).defense == recipe.defense]
    if wanted and not same:
        found.insert(1, AS_IT_IS)
    return found, notes


@final
@dataclass(frozen=True)
class Row:
    """What one cell came to. defense: in words. measures: on fresh records; sound: whether its attacks can be trusted.

    client_flops_share: 0..1. run: its folder.
    """

    setting: Setting
    seed: int
    defense: str
    accuracy: Estimate
    measures: Mapping[str, Estimate]
    sound: bool
    client_flops_share: float
    run: str

    @property
    def peek(self) -> Estimate:
        """1 = the raw record, 0 = nothing beyond the answer."""
        return self.measures["peek"]

    @property
    def bits(self) -> float | None:
        """What one release tells at most; None without a certificate."""
        return self.measures[BITS].value if BITS in self.measures else None

    def verdict(self, budget: Mapping[str, float] | None) -> Verdict:
        """Against a budget; what has no certificate may tell any number of bits."""
        unbounded = {BITS: Estimate(*[math.inf] * 3)}
        return judge({**unbounded, **self.measures} if budget else self.measures, budget, sound=self.sound)

    def to_dict(self, budget: Mapping[str, float] | None, *, on_front: bool) -> dict[str, Any]:
        """As in frontier.json."""
        return {
            "family": self.setting.family,
            "strength": self.setting.strength,
            "seed": self.seed,
            "defense": self.defense,
            "accuracy": self.accuracy.to_dict(),
            "peek": self.peek.to_dict(),
            "bits": self.bits,
            "client_flops_share": self.client_flops_share,
            "verdict": self.verdict(budget),
            "sound": self.sound,
            "on_front": on_front,
            "measures": {name: value.to_dict() for name, value in self.measures.items()},
            "run": self.run,
        }


@final
@dataclass(frozen=True)
class Failure:
    """A cell that came to nothing, and why, in one line."""

    setting: Setting
    seed: int
    why: str
    run: str

    def to_dict(self) -> dict[str, Any]:
        """As in frontier.json."""
        return {
            "family": self.setting.family,
            "strength": self.setting.strength,
            "seed": self.seed,
            "why": self.why,
            "run": self.run,
        }


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Of points (accuracy, peek): for which no other is at least as good in both, and better in one."""
    on_front = [False] * len(points)
    best = -math.inf
    by_peek = sorted(range(len(points)), key=lambda index: points[index][1])
    for _, together in groupby(by_peek, key=lambda index: points[index][1]):
        group = list(together)
        top = max(points[index][0] for index in group)
        if top > best:
            best = top
            for index in group:
                on_front[index] = points[index][0] == top
    return on_front


def front(rows: Sequence[Row]) -> list[bool]:
    """Which rows are on the Pareto front; one whose audit is inconclusive never is, and hides none that is."""
    sound = [row for row in rows if row.sound and row.peek.is_finite]
    on = dict(zip(map(id, sound), pareto_front([(row.accuracy.value, row.peek.value) for row in sound]), strict=True))
    return [on.get(id(row), False) for row in rows]


def between(weaker: float, stronger: float) -> float | None:
    """Half-way on a log scale, to three digits; None where nothing that short lies between."""
    middle = float(f"{math.sqrt(weaker * stronger):.3g}")
    return middle if weaker < middle < stronger else None


def cut_by_budget(
    rows: Sequence[Row], family: str, budget: Mapping[str, float], tried: Iterable[Setting]
) -> Setting | None:
    """In a family, half-way between the weakest neighbours of which one is inside the budget and one is not."""
    judged = [row for row in _ladder(rows, family) if row.verdict(budget) in ("within budget", "over budget")]
    for weaker, stronger in pairwise(judged):
        if weaker.verdict(budget) != stronger.verdict(budget):
            return _untried(family, weaker, stronger, set(tried))
    return None


def cut_widest(rows: Sequence[Row], tried: Iterable[Setting]) -> Setting | None:
    """Half-way between the two neighbours farthest apart in peek, in the families that have a part in the front."""
    known = set(tried)
    families = {row.setting.family for row, on in zip(rows, front(rows), strict=True) if on}
    pairs = [pair for family in sorted(families & FAMILY.keys()) for pair in pairwise(_ladder(rows, family))]
    for weaker, stronger in sorted(pairs, key=lambda pair: -abs(pair[0].peek.value - pair[1].peek.value)):
        found = _untried(weaker.setting.family, weaker, stronger, known)
        if found is not None:
            return found
    return None


def _untried(family: str, weaker: Row, stronger: Row, tried: set[Setting]) -> Setting | None:
    middle = between(weaker.setting.strength or 0.0, stronger.setting.strength or 0.0)
    found = None if middle is None else Setting(family, middle)
    return None if found in tried else found


def _ladder(rows: Sequence[Row], family: str) -> list[Row]:
    """The sound rows of a family, weakest first."""
    of = [row for row in rows if row.setting.family == family and row.sound and row.peek.is_finite]
    return sorted(of, key=lambda row: row.setting.strength or 0.0)


def choose(rows: Sequence[Row], budget: Mapping[str, float]) -> Row | None:
    """The most accurate row that is within the budget; of equally accurate ones the least peek."""
    fitting = [row for row in rows if row.verdict(budget) == "within budget"]
    return max(fitting, key=lambda row: (row.accuracy.value, -row.peek.high), default=None)


def misses(row: Row, budget: Mapping[str, float]) -> dict[str, float]:
    """By how much the upper end of each measure is over the budget; infinite for what has no bound, or no value."""
    over = {}
    for name, limit in budget.items():
        found = row.measures.get(name)
        excess = math.inf if found is None or not found.is_finite else found.high - limit
        if excess > 0:
            over[name] = excess
    return over


def nearest_row(rows: Sequence[Row], budget: Mapping[str, float]) -> Row | None:
    """Of the sound rows the one whose worst miss is smallest, as a share of its limit; None where all are unbounded."""

    def worst(row: Row) -> float:
        return max((excess / (budget[name] or 1.0) for name, excess in misses(row, budget).items()), default=0.0)

    measured = [row for row in rows if row.sound and math.isfinite(worst(row))]
    return min(measured, key=lambda row: (worst(row), -row.accuracy.value), default=None)


@final
@dataclass(frozen=True)
class Finalist:
    """The chosen setting on another seed, which deals other records, beside the undefended network of that seed.

    exposures: the peek of each. measures: on fresh records, the others than peek of the worst exposure. verdict: of
    these. failed: why there is nothing but a folder.
    """

    seed: int
    run: str
    accuracy: Estimate | None = None
    reference_accuracy: float = math.nan
    exposures: Mapping[str, Estimate] = field(default_factory=dict)
    measures: Mapping[str, Estimate] = field(default_factory=dict)
    verdict: Verdict = "inconclusive"
    failed: str | None = None

    @property
    def lost(self) -> float:
        """Of accuracy, against the undefended network of the same seed: 0.01 is a point."""
        return math.nan if self.accuracy is None else self.reference_accuracy - self.accuracy.value

    def to_dict(self) -> dict[str, Any]:
        """As in frontier.json."""
        made = self.accuracy is not None
        return {
            "seed": self.seed,
            "accuracy": None if self.accuracy is None else self.accuracy.to_dict(),
            "reference_accuracy": self.reference_accuracy if made else None,
            "accuracy_lost": self.lost if made else None,
            "exposures": {name: value.to_dict() for name, value in self.exposures.items()},
            "measures": {name: value.to_dict() for name, value in self.measures.items()},
            "verdict": self.verdict,
            "failed": self.failed,
            "run": self.run,
        }


def verdict_of(finalists: Sequence[Finalist]) -> Verdict:
    """Within the budget if all are; inconclusive if one is."""
    found = {finalist.verdict for finalist in finalists}
    return next(
        verdict for verdict in ("inconclusive", "over budget", "within budget") if verdict in found or not found
    )


def means_of(finalists: Sequence[Finalist]) -> dict[str, Any]:
    """Over the finalists that were made: mean accuracy, what it lost, and of each exposure's peek mean and range."""
    made = [each for each in finalists if each.accuracy is not None]
    if not made:
        return {}
    exposures = {}
    for name in made[0].exposures:
        peeks = [each.exposures[name].value for each in made if name in each.exposures]
        exposures[name] = {"mean": sum(peeks) / len(peeks), "lowest": min(peeks), "highest": max(peeks)}
    return {
        "accuracy": sum(each.accuracy.value for each in made if each.accuracy) / len(made),
        "reference_accuracy": sum(each.reference_accuracy for each in made) / len(made),
        "accuracy_lost": sum(each.lost for each in made) / len(made),
        "exposures": exposures,
    }
