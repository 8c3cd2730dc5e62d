"""Run folders, and folders with an audit alone, as they are read for a report: `RunResults`.

Files are read through pydantic models, so a damaged one is one clear line.

Legend: P records shown, C channels, H height, W width, F values of a flat record.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeVar

import numpy as np
import safetensors.numpy
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import SafetensorError

from milkglass.errors import RunError
from milkglass.figures import MOST_ACROSS, Array


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class DistanceCorrelation(_File):
    """Between records and activations: 0 = independent; the squared, bias-corrected value may be slightly negative."""

    squared_unbiased: float
    biased: float
    n: int
    permutation_floor: float


class Epoch(_File):
    """A line of `metrics.jsonl`, as far as it is drawn. Accuracy is 0..1."""

    epoch: int
    loss: float
    accuracy: float | None = Field(None, validation_alias=AliasChoices("accuracy", "test_accuracy"))  # volunteers
    distance_correlation: DistanceCorrelation | None = None  # where nothing is split there is no cut to measure it at


class ExchangeLine(_File):
    """A line of `exchange.jsonl`: of a step with compressed gradients, or of an average of weights.

    left_share: ||u - C(u)||^2 / ||u||^2. bound: what is proved of it for bell-shaped u, or of an average what its
    variance is compared with. old_bound: what is proved for any. period: in steps.
    """

    step: int
    numbers: int | None = None
    sent: int | None = None
    left_share: float | None = None
    bound: float | None = None
    old_bound: float | None = None
    period: int | None = None
    variance: float | None = None


class Wire(_File):
    """All messages of one kind in one direction, as counted on the wire."""

    direction: str
    kind: str
    messages: int
    bytes: int


class Summary(_File):
    """`summary.json`. Accuracy is 0..1 on test records; bytes are counted at the client's side, or those of all ranks.

    exchange, ranks: of data-parallel training; its bytes are None where they are not counted. samples: a volunteer's.
    """

    accuracy: float
    distance_correlation: DistanceCorrelation | None
    bytes_sent: int | None
    bytes_received: int | None
    messages: int
    seconds: float
    seconds_per_epoch: float
    client_flops_per_sample: float | None = None
    seed: int
    defense: str
    keys: str
    wire: tuple[Wire, ...]
    records: dict[str, int | dict[str, int]] = {}  # training records are counted by client
    samples: int | None = None
    exchange: str | None = None
    ranks: int | None = None


class Interval(_File):
    """A value with the ends of its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class Control(_File):
    """One known-answer test of the attacks."""

    value: float
    limit: float
    passed: bool


class AttackFigures(_File):
    """What one attack reached on the `records` it rebuilt. Higher peek, PSNR, SSIM and top-1 match = more leakage."""

    name: str
    adversary: str
    knows: tuple[str, ...]
    exposure: str
    mse: float
    psnr_db: float
    ssim: float | None = None
    peek: float
    peek_low: float | None = None
    peek_high: float | None = None
    match_top1: float
    records: int | None = None
    seconds: float
    undertrained: bool = False

    @property
    def interval(self) -> tuple[float, float] | None:
        """The ends of the peek's 95 % interval, where the file has them."""
        return None if self.peek_low is None or self.peek_high is None else (self.peek_low, self.peek_high)

    @property
    def outcome(self) -> str:
        """Against the answer alone: "more" was rebuilt, "nothing" more, or "worse": too weak an attack to tell."""
        low, high = self.interval or (self.peek, self.peek)
        return "more" if low > 0 else "worse" if high < 0 else "nothing"


class Inference(_File):
    """What one attack guessed of the records, a sensitive attribute or who was trained on. Higher = more leakage."""

    measure: str
    name: str
    adversary: str
    knows: tuple[str, ...] = ()
    exposure: str
    value: float
    low: float
    high: float
    n: int
    seconds: float
    details: dict[str, float] = {}


class BoundFigures(_File):
    """What is proved of any attack of a kind. kind: "lower", some attacker does so well; "upper", nobody better."""

    measure: str
    kind: Literal["lower", "upper"]
    name: str = ""
    value: float
    low: float | None = None
    exposure: str = "fresh"
    words: str


class ReleaseCheckFigures(_File):
    """Whether releases made anew agree with a certificate. sigma: of the noise; longest: the largest norm of a record's
    mean release; p_noise, p_clip: how likely these are if it is true."""

    sigma: float
    longest: float
    p_noise: float
    p_clip: float
    agrees: bool


class CertificateFigures(_File):
    """What one release tells at most, whatever the attack. Lower bits = less can be told."""

    dimensions: int
    clip: float
    sigma: float
    bits_per_release: float
    words: tuple[str, ...]
    check: ReleaseCheckFigures | None = None


class AttackCurve(_File):
    """How one attack does with fewer pairs. Lower mse, higher peek = more leakage."""

    attack: str
    exposure: str
    pairs: tuple[int, ...]
    mse: tuple[float, ...]
    peek: tuple[float, ...]


class Skipped(_File):
    """An attack that was left out, and why."""

    attack: str
    exposure: str = ""
    why: str


class AuditFigures(_File):
    """`audit.json`. Peek: 1 = the raw record, 0 = nothing beyond the answer. `budget`: the most of a measure."""

    peek: Interval
    measures: dict[str, Interval] = {}
    exposures: dict[str, Interval]
    verdict: str
    error_entitled: float
    controls: dict[str, Control]
    attacks: tuple[AttackFigures, ...]
    contributions: tuple[int, ...] = ()  # to an open collaboration: of how many records
    inferences: tuple[Inference, ...] = ()
    bounds: tuple[BoundFigures, ...] = ()
    certificate: CertificateFigures | None = None
    curves: tuple[AttackCurve, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    best_attack: str
    pictures_of: str | None = None
    reference_accuracy: float | None = None
    strength: str | None = None
    budget: dict[str, float] = {}
    notes: tuple[str, ...] = ()
    defense: str | None = None
    activations: str | None = None  # the files that were audited, where the arrays were recorded elsewhere
    records: str | None = None

    @field_validator("budget", mode="before")
    @classmethod
    def _of_peek(cls, value: object) -> object:
        """A number is a budget of the peek; null is none."""
        return {"peek": value} if isinstance(value, int | float) else value or {}

    @property
    def measured(self) -> dict[str, Interval]:
        """All measures, the peek first."""
        return {"peek": self.peek, **self.measures}

    @property
    def ranked(self) -> list[AttackFigures]:
        """The attacks, highest peek first."""
        return sorted(self.attacks, key=lambda k: -math.inf if math.isnan(k.peek) else k.peek, reverse=True)

    @property
    def strongest(self) -> list[AttackFigures]:
        """For each attacker, by who it is and what it knows, its highest peek; highest first.

        Whoever knows pairs knows records, whether or not the file names both.
        """
        by_attacker: dict[tuple[str, frozenset[str]], AttackFigures] = {}
        for attack in self.ranked:
            implied = {"records"} if "pairs" in attack.knows else set()
            by_attacker.setdefault((attack.adversary, frozenset(attack.knows) - implied), attack)
        return list(by_attacker.values())


@dataclass(frozen=True)
class Baseline:
    """What a peek of 0 is, in words that fit into a sentence."""

    name: str
    guess: str
    row: str


ANSWER: Final = Baseline("the answer alone", "a guess from the answer alone", "from the answer alone")
MEAN_RECORD: Final = Baseline("the mean record", "the mean record", "the mean record")
ENTITLED: Final = Baseline("the entitled baseline", "the entitled baseline", "from the entitled values")


@dataclass(frozen=True)
class RunResults:
    """Everything that the report shows of one run. `pictures` are (P, C, H, W) or (P, F), by name; may be empty.

    Where the folder holds an audit alone, `summary` is None, `recipe` "" and `epochs` empty.
    """

    name: str
    recipe: str
    summary: Summary | None
    epochs: tuple[Epoch, ...]
    audit: AuditFigures | None
    pictures: dict[str, Array]
    exchange: tuple[ExchangeLine, ...] = ()

    @property
    def is_recorded(self) -> bool:
        """Whether arrays were audited that were recorded elsewhere: nothing is known then of how they came about."""
        return self.audit is not None and self.audit.activations is not None

    @property
    def is_collaboration(self) -> bool:
        """Whether it is of a volunteer in an open collaboration."""
        return self.summary.samples is not None if self.summary else bool(self.audit and self.audit.contributions)

    @property
    def defense(self) -> str | None:
        """The defense, "none" where there was none, or None where that is not known."""
        return self.summary.defense if self.summary else self.audit.defense if self.audit else None

    @property
    def records(self) -> dict[str, int | dict[str, int]]:
        """How many records there were, by use, as far as it is known."""
        return self.summary.records if self.summary else {}

    @property
    def baseline(self) -> Baseline:
        """Beside recorded arrays there may be no entitled values: then all baseline pictures are the mean record."""
        if self.is_collaboration:
            return MEAN_RECORD
        if not self.is_recorded:
            return ANSWER
        entitled = self.pictures.get("entitled")
        return MEAN_RECORD if entitled is not None and np.allclose(entitled, entitled[:1], atol=1e-4) else ENTITLED


_Model = TypeVar("_Model", bound=_File)


def read_results(folder: Path) -> list[RunResults]:
    """The runs in `folder`: itself, or each direct subfolder with a summary or an audit; undefended ones first.

    Raises RunError where there is no finished run and no audit, or a file of one is missing or damaged.
    """
    if _is_run(folder):
        return [_read_run(folder)]
    runs = [_read_run(path) for path in folder.glob("*") if _is_run(path)]
    if not runs:
        raise RunError(
            f"{folder}: no finished run; expected summary.json, or the audit.json of recorded arrays, in it or in a "
            "folder directly inside it"
        )
    return sorted(runs, key=lambda run: (run.defense != "none", run.name))


def _is_run(folder: Path) -> bool:
    return (folder / "summary.json").is_file() or (folder / "audit.json").is_file()


def _read_run(folder: Path) -> RunResults:
    summary, audit = folder / "summary.json", folder / "audit.json"
    finished = summary.exists()
    return RunResults(
        name=folder.resolve().name,
        recipe=_read_text(folder / "recipe.toml") if finished else "",
        summary=_parse(Summary, _read_text(summary), str(summary)) if finished else None,
        epochs=_read_epochs(folder / "metrics.jsonl") if finished else (),
        audit=_parse(AuditFigures, _read_text(audit), str(audit)) if audit.exists() else None,
        pictures=_read_pictures(folder / "pictures.safetensors"),
        exchange=_read_lines(ExchangeLine, folder / "exchange.jsonl") if (folder / "exchange.jsonl").exists() else (),
    )


def _read_epochs(path: Path) -> tuple[Epoch, ...]:
    epochs = _read_lines(Epoch, path)
    if not epochs:
        raise RunError(f"{path}: empty; expected a line for each epoch")
    return epochs


def _read_lines(model: type[_Model], path: Path) -> tuple[_Model, ...]:
    lines = enumerate(_read_text(path).splitlines(), start=1)
    return tuple(_parse(model, line, f"{path}, line {n}") for n, line in lines if line.strip())


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: missing or damaged, expected UTF-8 text: {error}") from None


def _parse(model: type[_Model], text: str, where: str) -> _Model:
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise RunError(f"{where}: damaged: {place + ': ' if place else ''}{first['msg']}") from None


def _read_pictures(path: Path) -> dict[str, Array]:
    if not path.exists():
        return {}
    try:
        tensors = safetensors.numpy.load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: damaged: {error}") from None
    shape = tensors["records"].shape if "records" in tensors else ()
    if len(shape) not in (2, 4) or any(t.shape[1:] != shape[1:] or len(t) > shape[0] for t in tensors.values()):
        raise RunError(f"{path}: damaged: expected 'records' (P, C, H, W) or (P, F), and tensors of its shape or less")
    return {name: tensor[:MOST_ACROSS].astype(np.float32) for name, tensor in tensors.items() if len(tensor)}
