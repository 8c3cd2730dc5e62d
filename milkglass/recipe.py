"""Recipe: the typed, validated description of a run. TOML in, a frozen pydantic model out.

What its tables hold stands in `sections.py`, of defenses in `defense_sections.py`, field by field.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self, final

import tomli_w
from pydantic import BaseModel, Field, ValidationError, model_validator

from milkglass.collaboration_section import Collaboration
from milkglass.compare_section import CompareSection
from milkglass.defense_sections import Defense, Section
from milkglass.errors import RecipeError, nearest
from milkglass.federated_rules import check_federated, check_private
from milkglass.federated_section import DifferentialPrivacy, Federated
from milkglass.parallel_section import Parallel
from milkglass.sections import (
    Attacker,
    ClientSection,
    Cut,
    Data,
    FrontierSection,
    Guard,
    Network,
    Parties,
    ServerSection,
    Training,
    Vertical,
    Wire,
)


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
    cut: Cut = Field(default_factory=Cut)
    defense: Defense = Field(default_factory=Defense)
    guard: Guard = Field(default_factory=Guard)
    training: Training = Field(default_factory=Training)
    parties: Parties = Field(default_factory=Parties)
    wire: Wire = Field(default_factory=Wire)
    parallel: Parallel = Field(default_factory=Parallel)
    collaboration: Collaboration = Field(default_factory=Collaboration)
    federated: Federated = Field(default_factory=Federated)
    dp: DifferentialPrivacy | None = Field(
        None,
        description="Differential privacy at each client; leave the table out for none. It goes with `federated` and "
        "with split training, where it covers the weights of the client's stage, not what is sent of it.",
    )
    client: ClientSection = Field(default_factory=ClientSection)
    server: ServerSection = Field(default_factory=ServerSection)
    attacker: Attacker = Field(default_factory=Attacker)
    frontier: FrontierSection | None = Field(None, description="What `milkglass frontier` sweeps.")
    compare: CompareSection | None = Field(None, description="What `milkglass compare` sets side by side.")
    versions: dict[str, str] = Field(
        default_factory=dict, description="Written into the run folder for the reader: the packages that made the run."
    )

    @model_validator(mode="after")
    def _defenses_fit_the_way(self) -> Self:
        if self.parties.is_vertical and (self.defense.channel is not None or self.defense.adversary is not None):
            raise ValueError(
                "defense.channel and defense.adversary go with whole records, not with parties.mode vertical"
            )
        if self.parties.is_vertical and self.defense.certified:
            raise ValueError(
                "defense.certified asks for a certificate, and with parties.mode vertical there is none: every owner "
                "sends a message of its own for a record"
            )
        if self.defense.labels is not None and self.cut.back_at is None and not self.parties.is_vertical:
            raise ValueError(
                "defense.labels protects labels that stay with a client, and here the server is sent them; expected "
                "cut.back_at (U-shaped) or parties.mode vertical"
            )
        if self.training.at_home and (self.parties.is_vertical or self.parties.hops or len(self.parties.clients) > 1):
            raise ValueError("training.at_home is for one client without hops: it trains the whole network by itself")
        if self.network.start is not None and (self.parties.is_vertical or self.parties.hops):
            raise ValueError("network.start goes with one cut of whole records, not with parties.hops or mode vertical")
        if self.training.client_learns != "all" and len(self.parties.clients) > 1:
            raise ValueError(
                f"training.client_learns is {self.training.client_learns}, and weights that several clients hand on or "
                "average do not stay; expected one client"
            )
        if self.training.client_learns != "all" and self.network.start is None:
            raise ValueError(
                f"training.client_learns is {self.training.client_learns}, so the client keeps the weights it begins "
                "with; network.start must say which"
            )
        return self

    @model_validator(mode="after")
    def _cut_or_parallel(self) -> Self:
        if self.parties.is_split:
            if not self.cut.at:
                raise ValueError("'cut.at' is missing")
            return self
        for name, given in (
            ("defense", self.defense != Defense()),
            ("guard.hijack", self.guard.hijack is not None),
            ("parties.hops", bool(self.parties.hops)),
            ("cut.back_at", self.cut.back_at is not None),
            ("network.start", self.network.start is not None),
            ("wire.compress", self.wire.compress != "none"),
            ("training.micro_batches", self.training.micro_batches > 1),
            ("training.at_home", self.training.at_home),
            ("training.client_learns", self.training.client_learns != "all"),
            ("client.own_records", self.client.own_records and not self.parties.is_federated),
            ("training.drop_last_batch = false", not self.training.drop_last_batch),
        ):
            if given:
                raise ValueError(f"{name} does not go with parties.mode {self.parties.mode}, where nothing is split")
        if self.parallel.momentum_correction and (self.training.optimizer != "sgd" or not self.training.momentum):
            raise ValueError(
                "parallel.momentum_correction is training.momentum, moved before the choice of gradients; expected "
                "training.optimizer sgd with a momentum"
            )
        return self

    @model_validator(mode="after")
    def _federated_and_private(self) -> Self:
        check_federated(self.federated, self.parties, self.training)
        if self.dp is not None:
            check_private(self.defense, self.guard, self.parties, self.training)
        return self

    @model_validator(mode="after")
    def _penalties_fit_batches(self) -> Self:
        if self.defense.nopeek is not None and self.training.batch_size < SMALLEST_PENALIZED_BATCH:
            raise ValueError(
                f"training.batch_size is {self.training.batch_size}; "
                f"NoPeek's penalty needs at least {SMALLEST_PENALIZED_BATCH} records in a batch"
            )
        return self

    @model_validator(mode="after")
    def _ways_fit_together(self) -> Self:
        if self.training.batch_size % self.training.micro_batches:
            raise ValueError(
                f"training.micro_batches is {self.training.micro_batches}; it must divide batch_size, "
                f"{self.training.batch_size}"
            )
        if self.cut.back_at is not None and self.parties.is_vertical:
            raise ValueError("cut.back_at keeps labels with a client; in vertical training the first owner sends them")
        if len(self.cut.hops) != len(self.parties.hops) or (self.cut.hops and self.cut.back_at is not None):
            raise ValueError(
                f"cut.hops names {len(self.cut.hops)} layers for {len(self.parties.hops)} parties.hops; "
                "expected one for each, and no cut.back_at"
            )
        if self.guard.hijack is not None and (self.cut.back_at is not None or self.parties.is_vertical):
            raise ValueError("guard.hijack sends wrong labels; where labels stay with a client there are none to send")
        return self

    def undefended(self) -> Recipe:
        """The same recipe without defense, guard or dp: the reference that tells what a server is entitled to."""
        free = self.client.model_copy(update={"most_releases": None, "leakage": None, "keep_releases": False})
        return self.model_copy(update={"defense": Defense(), "guard": Guard(), "client": free, "dp": None})

    def agreed(self) -> dict[str, Any]:
        """The part that all parties must agree on: all but data paths, package versions, and each party's own part."""
        local = {"path", "test_path", "ids", "record_shape", "classes"}
        if not self.data.sensitive:
            local.add("sensitive")  # a recipe from before there was the key keeps its digest
        agreed = self.model_dump(mode="json", exclude={**dict.fromkeys(LOCAL, True), "data": local})
        defaults: tuple[tuple[str, str, object], ...] = (
            ("cut", "back_at", None),
            ("cut", "hops", []),
            ("parties", "hops", []),
            ("training", "micro_batches", 1),
            ("parties", "mode", "relay"),
            ("parties", "vertical", Vertical().model_dump(mode="json")),
            ("collaboration", "first_peers", 1),
            ("training", "client_learns", "all"),
            ("training", "at_home", False),
            ("training", "decay_steps", None),
            ("network", "start", None),
            *(("defense", name, None) for name in _LATER_DEFENSES),
            ("defense", "certified", False),
        )
        for section, key, default in defaults:  # the same for these
            if agreed[section][key] == default:
                del agreed[section][key]
        if self.network.start is not None:
            agreed["network"]["start"] = True  # where it lies is each party's own business
        if self.defense.noise is not None and self.defense.noise.kind == "gaussian":
            del agreed["defense"]["noise"]["kind"]
        if self.wire.compress == "none":
            del agreed["wire"]
        if not self.parties.is_data_parallel:
            del agreed["parallel"]  # how a server's own processes work together
        if not self.parties.is_federated:
            del agreed["federated"]
        if self.dp is None:
            del agreed["dp"]
        if not self.parties.is_collaboration:
            del agreed["collaboration"]
        else:  # how much a volunteer computes at a time, and with what, is its own business
            del agreed["threads"], agreed["training"]["batch_size"], agreed["training"]["epochs"]
        return agreed

    def digest(self) -> str:
        """SHA-256 of the agreed part, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.agreed(), sort_keys=True).encode()).hexdigest()

    def to_toml(self) -> str:
        """The recipe as TOML, every default written out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


_LATER_DEFENSES: Final = ("clipping", "channel", "learned_noise", "adversary", "entropy", "labels")
LOCAL: Final = ("versions", "guard", "client", "server", "frontier", "compare")
"""Sections that are no part of what is agreed."""
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
        "A recipe is a TOML file that describes a run. This page is made from the model in `milkglass/sections.py`,",
        "`defense.*` from that in `milkglass/defense_sections.py` (`make docs` writes it); unknown keys are refused.",
        "`milkglass train RECIPE --set training.epochs=3` overrides a field, `--set 'defense={}'` a whole table. Paths",
        "in a recipe are relative to the recipe's own folder, paths in `--set` to the working folder.",
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
        ("tuple[int", "list of whole numbers"),
        ("tuple[typing.Annotated[int", "list of whole numbers"),
        ("tuple[typing.Annotated[float", "list of numbers"),
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
    for section, key in (("data", "path"), ("data", "test_path"), ("network", "start")):
        table = tables.get(section)
        if isinstance(table, dict) and isinstance(table.get(key), str):
            table[key] = str((folder / table[key]).resolve())


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
