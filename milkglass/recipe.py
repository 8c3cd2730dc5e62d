"""Recipe: the typed, validated description of a run. TOML in, a frozen pydantic model out.

Every field is documented here and nowhere else: `milkglass train --help` and docs/recipes.md are made from this file.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, final

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from milkglass.errors import RecipeError, nearest

Share = Annotated[float, Field(gt=0, lt=1)]
PartyName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class Section(BaseModel):
    """A table of the recipe: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


@final
class Data(Section):
    """Which records, and how many. Exactly one of `name`, `path` and `hub`."""

    name: str | None = Field(None, description="An embedded data set: `digits` (1,797 grey 8x8 pictures).")
    path: str | None = Field(
        None,
        description="A `.npz` or parquet file, or a folder of pictures, a subfolder a class; relative to the recipe.",
    )
    hub: str | None = Field(
        None, description="A data set on the Hugging Face hub, `owner/name`. Only this one touches the network."
    )
    test_path: str | None = Field(
        None, description="The test records' file; without it a share of the data is set aside."
    )
    test_split: str | None = Field(
        None, description="With `hub`: the name of the split that holds the test records, such as `test`."
    )
    train_records: int | None = Field(None, ge=1, description="At most so many private training records; default all.")
    test_records: int | None = Field(None, ge=1, description="At most so many test records; default all.")
    test_share: Share = Field(
        0.2, description="The share of the data set aside for tests, where there is no test file."
    )
    sensitive: tuple[str, ...] = Field(
        (),
        description="Integer columns whose leak the audit measures, such as `sex`: an array of the `.npz` with a value "
        "per record, one of its `categorical_names`, or a parquet column. A column that is an input stays one.",
        strict=False,
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [key for key in ("name", "path", "hub") if getattr(self, key) is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none of them"
            raise ValueError(f"exactly one of name, path and hub says where the records are; found {found}")
        if self.test_split is not None and (self.hub is None or self.test_path is not None):
            raise ValueError("test_split goes with hub, and without test_path")
        if len(set(self.sensitive)) < len(self.sensitive):
            raise ValueError(f"sensitive names a column twice: {', '.join(self.sensitive)}")
        return self


@final
class Network(Section):
    """Which network."""

    name: str = Field(description="`mlp`, `cnn`, `resnet`, or a factory of your own as `package.module:function`.")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of the network's factory, such as `{ width = 16 }`."
    )


@final
class Cut(Section):
    """Where the network is cut in two: the client keeps what is before, the server what is behind."""

    at: str = Field(description="The name of the client's last layer; `milkglass cuts` lists them with their costs.")


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
    """Gaussian noise on every activation that leaves the client, in training and in inference."""

    sigma: float = Field(gt=0, description="Standard deviation of the noise, in the activations' own unit.")


@final
class Defense(Section):
    """What the client does to show less. Several add up: noise first, then penalties on what will be sent."""

    nopeek: NoPeekDefense | None = Field(None, description="NoPeek's penalty; leave the table out for none.")
    noise: NoiseDefense | None = Field(None, description="Gaussian noise; leave the table out for none.")


@final
class HijackGuard(Section):
    """Some batches go out mislabeled; a server whose gradients do not tell them apart is refused (SplitGuard)."""

    fake_share: float = Field(
        0.1, gt=0, le=0.25, description="The share of batches sent with wrong labels; the client learns from none."
    )
    warm_up: int = Field(20, ge=2, description="So many batches at the start are all honest.")
    threshold: float = Field(
        0.9,
        gt=0,
        lt=1,
        description="Stop where the mean of the last 3 scores (0 hostile, 1 honest) is below it. Honest ones "
        "are above 0.95 with 10 classes, about 0.93 at the start with 100.",
    )


@final
class Guard(Section):
    """How the client watches its server. It is the client's own business: no part of what is agreed."""

    hijack: HijackGuard | None = Field(
        None, description="Stop under a server that rebuilds records instead of training; leave the table out for none."
    )


@final
class Training(Section):
    """How the two halves are trained."""

    epochs: int = Field(10, ge=1, description="How often every training record is used.")
    batch_size: int = Field(64, ge=1, description="Records in a batch.")
    optimizer: Literal["sgd", "adam"] = Field("adam", description="The optimizer of each party.")
    learning_rate: float = Field(1e-3, gt=0, description="Its learning rate.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum; read by `sgd` alone.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay.")
    drop_last_batch: bool = Field(True, description="Leave out the last, shorter batch of an epoch in training.")


@final
class Parties(Section):
    """Who takes part."""

    clients: tuple[PartyName, ...] = Field(
        ("client",), min_length=1, max_length=1, description="Names of the clients. One, so far.", strict=False
    )
    server: PartyName = Field("server", description="Name of the server. It holds the labels and the loss.")

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [name.casefold() for name in (*self.clients, self.server)]  # they become file names as well
        if len(set(names)) < len(names):
            raise ValueError(f"{', '.join((*self.clients, self.server))}: every party needs a name of its own")
        return self


@final
class Attacker(Section):
    """What the audit's attacker owns: records like the private ones, with what the client would send for them."""

    auxiliary_share: Share = Field(0.2, description="The share of the data that the attacker knows pairs of.")
    validation_share: Share = Field(0.1, description="The share on which attacks are chosen and weighted.")


@final
class Recipe(Section):
    """A run: all that its parties agree on, and where the records are."""

    seed: int = Field(
        0, ge=0, description="All public randomness follows from it: dealing, the server's first weights."
    )
    threads: int = Field(
        1, ge=1, le=1024, description="Threads a process computes with; part of what makes the same bits."
    )
    data: Data
    network: Network
    cut: Cut
    defense: Defense = Field(default_factory=Defense)
    guard: Guard = Field(default_factory=Guard)
    training: Training = Field(default_factory=Training)
    parties: Parties = Field(default_factory=Parties)
    attacker: Attacker = Field(default_factory=Attacker)
    versions: dict[str, str] = Field(
        default_factory=dict, description="Written into the run folder for the reader: the packages that made the run."
    )

    @model_validator(mode="after")
    def _penalties_fit_batches(self) -> Self:
        if self.defense.nopeek is not None and self.training.batch_size < SMALLEST_PENALIZED_BATCH:
            raise ValueError(
                f"training.batch_size is {self.training.batch_size}; "
                f"NoPeek's penalty needs at least {SMALLEST_PENALIZED_BATCH} records in a batch"
            )
        return self

    def undefended(self) -> Recipe:
        """The same recipe without a defense or a guard: the reference that tells what a server is entitled to."""
        return self.model_copy(update={"defense": Defense(), "guard": Guard()})

    def agreed(self) -> dict[str, Any]:
        """The part that all parties must agree on: all but data paths, package versions, and the client's own guard."""
        local = {"path", "test_path"}
        if not self.data.sensitive:
            local.add("sensitive")  # a recipe from before there was the key keeps its digest
        return self.model_dump(mode="json", exclude={"versions": True, "guard": True, "data": local})

    def digest(self) -> str:
        """SHA-256 of the agreed part, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.agreed(), sort_keys=True).encode()).hexdigest()

    def to_toml(self) -> str:
        """The recipe as TOML, every default written out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


SMALLEST_PENALIZED_BATCH: Final = 4  # the bias-corrected estimate divides by n (n - 3)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a TOML file, with `a.b=value` overrides. Raises RecipeError, one line, on anything wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"recipe {path}: {error.strerror or error}; expected a TOML file") from None
    except UnicodeDecodeError:
        raise RecipeError(f"recipe {path}: not a text file; expected TOML in UTF-8") from None
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe {path}: not valid TOML: {error}") from None
    _resolve_paths(tables, path.parent)
    for override in overrides:
        _set(tables, override)
    return parse_recipe(tables, where=f"recipe {path}")


def parse_recipe(tables: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """The recipe in already parsed tables. Raises RecipeError, one line, that names `where` and the key."""
    try:
        return Recipe.model_validate(tables)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_one_line(error)}") from None


def first_difference(ours: Recipe, theirs: Recipe) -> str | None:
    """The first agreed key in which two recipes differ, with both values; None if they agree."""
    flat_ours, flat_theirs = dict(_flatten(ours.agreed())), dict(_flatten(theirs.agreed()))
    for key in sorted(flat_ours.keys() | flat_theirs.keys()):
        if flat_ours.get(key) != flat_theirs.get(key):
            return f"{key} is {flat_ours.get(key)!r} here and {flat_theirs.get(key)!r} there"
    return None


def fields() -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, description) of every field, in the order of the file."""
    yield from _fields(Recipe, "")


def reference_page() -> str:
    """docs/recipes.md: every field of a recipe, made from the model."""
    lines = [
        "# Recipes",
        "",
        "A recipe is a TOML file that describes a run. This page is made from the model in `milkglass/recipe.py`",
        "(`make docs` writes it); unknown keys are refused. `milkglass train RECIPE --set training.epochs=3` overrides",
        "a field, `--set 'defense={}'` a whole table. Paths in a recipe are relative to the recipe's own folder, paths",
        "in `--set` to the working folder.",
        "",
        "| key | type | default | what it says |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{key}` | {kind.replace('|', 'or')} | {default} | {text} |" for key, kind, default, text in fields()]
    return "\n".join(lines) + "\n"


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, info in model.model_fields.items():
        inner = _section(info.annotation)
        if inner is not None:
            if info.description:
                yield f"{prefix}{name}", "table", "absent", info.description
            yield from _fields(inner, f"{prefix}{name}.")
            continue
        if info.is_required():
            default = "required"
        else:
            value = info.get_default(call_default_factory=True)
            default = "absent" if value is None else f"`{json.dumps(value)}`"
        yield f"{prefix}{name}", _kind(info.annotation), default, info.description or ""


def _section(annotation: Any) -> type[Section] | None:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _kind(annotation: Any) -> str:
    text = str(annotation)
    for needle, words in (
        ("Literal", ""),
        ("tuple", "list of names"),
        ("dict", "table"),
        ("bool", "true or false"),
        ("int", "whole number"),
        ("float", "number"),
        ("str", "text"),
    ):
        if needle in text:
            return words or " | ".join(f"`{value}`" for value in annotation.__args__)
    return text


def _set(tables: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"--set {override!r}: expected KEY=VALUE, such as training.epochs=3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a text
    table = tables
    for part in parts[:-1]:
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {override!r}: {part} is a value, not a table")
        table = inner
    table[parts[-1]] = value
    _resolve_paths(tables, Path.cwd())  # those of the file are absolute by now


def _resolve_paths(tables: dict[str, Any], folder: Path) -> None:
    data = tables.get("data")
    for key in ("path", "test_path"):
        if isinstance(data, dict) and isinstance(data.get(key), str):
            data[key] = str((folder / data[key]).resolve())


def _one_line(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        message = f"unknown key {key!r}; {nearest(str(first['loc'][-1]), _known_keys(first['loc'][:-1]))}"
    elif first["type"] == "missing":
        message = f"{key!r} is missing"
    elif first["type"] == "value_error":
        message = f"{key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}"
    else:
        message = f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"
    more = len(problems) - 1
    return message + (f" (and {more} more like it)" if more else "")


def _known_keys(location: Sequence[str | int]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in location:
        inner = _section(model.model_fields[str(part)].annotation)
        if inner is not None:
            model = inner
    return list(model.model_fields)


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
