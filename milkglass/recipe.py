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

    ids: str | None = Field(
        None,
        description="The array of the `.npz`, or the parquet column, of the records' ids, unique integers or texts:"
        " how vertical owners match their records. Default: the record's number in the file.",
    )
    record_shape: tuple[int, ...] | None = Field(
        None,
        description="For a server that holds no records: the shape of one, `[channels, height, width]` or `[columns]`; "
        "`milkglass cuts` prints it.",
        strict=False,
    )
    classes: int | None = Field(None, ge=2, description="For a server that holds no records: how many classes.")

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
    hops: tuple[str, ...] = Field(
        (),
        description="Multi-hop: the names of the last layers of the stages between the client's and the server's, one "
        "for each of `parties.hops`.",
        strict=False,
    )
    back_at: str | None = Field(
        None,
        description="U-shaped: the name of the server's last layer. What is behind it, labels and loss stay with the "
        "client. Default: the server has the rest of the network, and is sent the labels.",
    )


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
    micro_batches: int = Field(
        1,
        ge=1,
        le=64,
        description="In how many pieces of equal size a batch goes out, so that client, wire and server overlap; must "
        "divide batch_size.",
    )
    drop_last_batch: bool = Field(True, description="Leave out the last, shorter batch of an epoch in training.")


Mode = Literal["relay", "splitfed1", "splitfed2", "vertical"]


@final
class Vertical(Section):
    """Owners of different columns of the same records."""

    axis: int | None = Field(
        None,
        ge=1,
        le=3,
        description="Along which dimension of a record the owners' parts lie: 1 columns or channels, 2 height, 3 width;"
        " activations are joined along it too, where they have it. Default: 1 for tables, 2 for pictures.",
    )
    parts: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None,
        description="How many columns (or rows of pictures) each owner has, in the owners' order. Default: as even as "
        "can be.",
        strict=False,
    )
    owner_settings: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings of the network's factory for an owner's stage, over `network.settings`, where the parts "
        "must be narrower: two of `{ hidden = [16] }` join to the whole network's 32.",
    )


@final
class Parties(Section):
    """Who takes part."""

    clients: tuple[PartyName, ...] = Field(
        ("client",), min_length=1, max_length=64, description="Names of the clients, in order.", strict=False
    )
    server: PartyName = Field("server", description="Name of the server.")
    hops: tuple[PartyName, ...] = Field(
        (),
        max_length=8,
        description="Multi-hop: names of the parties on the way from the client to the server, in order.",
        strict=False,
    )
    mode: Mode = Field(
        "relay",
        description="How several clients train. `relay`: in turn, weights handed on. `splitfed1`: in parallel, a server"
        " stage for each, all averaged after an epoch. `splitfed2`: in parallel, one server stage. `vertical`: owners"
        " of different columns of the same records; the first one holds the labels.",
    )
    vertical: Vertical = Field(default_factory=Vertical)

    @property
    def is_vertical(self) -> bool:
        """Whether several owners hold parts of the same records."""
        return self.mode == "vertical"

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        everyone = (*self.clients, *self.hops, self.server)
        if len({name.casefold() for name in everyone}) < len(everyone):  # they become file names as well
            raise ValueError(f"{', '.join(everyone)}: every party needs a name of its own")
        if self.hops and len(self.clients) > 1:
            raise ValueError("hops go with one client")
        if self.is_vertical and len(self.clients) < 2:
            raise ValueError("mode vertical needs two clients or more: each owns a part of every record")
        parts = self.vertical.parts
        if parts is not None and len(parts) != len(self.clients):
            raise ValueError(f"vertical.parts has {len(parts)} numbers for {len(self.clients)} owners")
        return self


@final
class Wire(Section):
    """What crosses the wire in place of activations and gradients; rounding, outside the graph."""

    compress: Literal["none", "fp16", "bf16", "int8", "topk"] = Field(
        "none",
        description="`fp16`, `bf16`: half the bytes. `int8`: a quarter, a scale per record and channel. `topk`: the "
        "largest values of each record alone.",
    )
    topk_share: float = Field(0.1, gt=0, le=1, description="With `topk`: the share of values that are sent.")


@final
class LeakageLimit(Section):
    """Stop where what is sent depends too much on the records."""

    limit: float = Field(
        gt=0, le=1, description="Of the squared distance correlation, bias-corrected, of records and what is sent."
    )
    window: int = Field(256, ge=16, le=4096, description="Over so many records; it costs their square in time.")


@final
class ClientSection(Section):
    """A client's own business, its limits among it: no part of what is agreed, and nothing a server can change."""

    own_records: bool = Field(
        False,
        description="True: the file holds this client's records alone. False: the seed deals one file out to all.",
    )
    most_releases: int | None = Field(
        None, ge=1, description="Stop before a record is sent more often than this in training; default: no limit."
    )
    leakage: LeakageLimit | None = Field(None, description="A limit on measured dependence; leave it out for none.")
    patience_seconds: float = Field(600, gt=0, description="How long to try to reach a server that is away.")
    answer_seconds: float = Field(300, gt=0, description="How long to await an answer of a server that is there.")
    checkpoint_seconds: float = Field(30, ge=0, description="So often the client's state is kept, between batches.")


@final
class ServerSection(Section):
    """A server's own business: no part of what is agreed."""

    heartbeat_seconds: float = Field(
        10, ge=1, description="A client that leaves two heartbeats unanswered is taken for gone, and its name is free."
    )
    checkpoint_seconds: float = Field(30, ge=0, description="So often the server's state is kept, between batches.")


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
    wire: Wire = Field(default_factory=Wire)
    client: ClientSection = Field(default_factory=ClientSection)
    server: ServerSection = Field(default_factory=ServerSection)
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
        """The same recipe without a defense or a guard: the reference that tells what a server is entitled to."""
        free = self.client.model_copy(update={"most_releases": None, "leakage": None})
        return self.model_copy(update={"defense": Defense(), "guard": Guard(), "client": free})

    def agreed(self) -> dict[str, Any]:
        """The part that all parties must agree on: all but data paths, package versions, and each party's own part."""
        local = {"path", "test_path", "ids", "record_shape", "classes"}
        if not self.data.sensitive:
            local.add("sensitive")  # a recipe from before there was the key keeps its digest
        agreed = self.model_dump(mode="json", exclude={**dict.fromkeys(LOCAL, True), "data": local})
        for section, key, default in (
            ("cut", "back_at", None),
            ("cut", "hops", []),
            ("parties", "hops", []),
            ("training", "micro_batches", 1),
            ("parties", "mode", "relay"),
            ("parties", "vertical", Vertical().model_dump(mode="json")),
        ):  # the same for these
            if agreed[section][key] == default:
                del agreed[section][key]
        if self.wire.compress == "none":
            del agreed["wire"]
        return agreed

    def digest(self) -> str:
        """SHA-256 of the agreed part, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.agreed(), sort_keys=True).encode()).hexdigest()

    def to_toml(self) -> str:
        """The recipe as TOML, every default written out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


LOCAL: Final = ("versions", "guard", "client", "server")
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
        ("tuple[int", "list of whole numbers"),
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
