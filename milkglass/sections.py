"""The tables of a recipe: every field, with its meaning, its limits and its default.

`milkglass train --help` and docs/recipes.md are made from this file.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Self, final

from pydantic import Field, model_validator

from milkglass.defense_sections import Section
from milkglass.errors import nearest

Share = Annotated[float, Field(gt=0, lt=1)]
PartyName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


@final
class Data(Section):
    """Which records, and how many. Exactly one of `name`, `path` and `hub`; none at a server that holds no records."""

    name: str | None = Field(None, description="An embedded data set: `digits` (1,797 grey 8x8 pictures).")
    path: str | None = Field(
        None,
        description="A `.npz` or parquet file, or a folder of pictures, a subfolder a class; for the network `albert` "
        "a text, `.txt` in UTF-8. Relative to the recipe.",
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
    classes: int | None = Field(
        None,
        ge=2,
        description="How many classes: for a server that holds no records, and for a client whose own file may lack "
        "some of them, or the labels (`vertical`).",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [key for key in ("name", "path", "hub") if getattr(self, key) is not None]
        told = self.record_shape is not None and self.classes is not None
        if len(given) > 1 or not (given or told):
            found = " and ".join(given) if given else "none of them, nor both record_shape and classes"
            raise ValueError(f"exactly one of name, path and hub says where the records are; found {found}")
        if self.test_split is not None and (self.hub is None or self.test_path is not None):
            raise ValueError("test_split goes with hub, and without test_path")
        if len(set(self.sensitive)) < len(self.sensitive):
            raise ValueError(f"sensitive names a column twice: {', '.join(self.sensitive)}")
        return self


@final
class Network(Section):
    """Which network."""

    name: str = Field(
        description="`mlp`, `cnn`, `resnet`, or a factory of your own as `package.module:function`. With "
        "`parties.mode` collaboration also `albert`, which guesses masked tokens of a text."
    )
    settings: dict[str, Any] = Field(
        default_factory=dict,
        description="Keyword arguments of the network's factory, such as `{ width = 16 }`. Of `albert`: `size` "
        "(`tiny`, `small`, `base`), and over it `hidden`, `layers`, `heads`, `embedding`, `length`, `vocabulary`, "
        "`dropout`.",
    )
    start: str | None = Field(
        None,
        description="A finished run folder whose weights this one begins with: a network trained at home that is to be "
        "defended now. Relative to the recipe; each party names its own.",
    )


@final
class Cut(Section):
    """Where the network is cut in two: the client keeps what is before, the server what is behind."""

    at: str = Field(
        "",
        description="The name of the client's last layer; `milkglass cuts` lists them with their costs. Required, but "
        "with `parties.mode` data_parallel, collaboration or federated, where nothing is cut.",
    )
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
    decay_steps: int | None = Field(
        None,
        ge=1,
        description="The learning rate falls to 0 over so many batches of a client, by half a cosine; default: it "
        "stays. All of a training are epochs times batches an epoch.",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum; read by `sgd` alone.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay.")
    micro_batches: int = Field(
        1,
        ge=1,
        le=64,
        description="In how many pieces of equal size a batch goes out, so that client, wire and server overlap; must "
        "divide batch_size.",
    )
    client_learns: Literal["all", "ends", "nothing"] = Field(
        "all",
        description="`ends`: the client's stage keeps the weights of `network.start`, and only what defenses add to it "
        "learns. `nothing`: all of it stays, and the server alone learns (and a U-shaped client's last stage).",
    )
    at_home: bool = Field(
        False,
        description="All is trained at the client's own site, and the server's stage handed over for inference alone: "
        "an audit then has no messages of a training to attack.",
    )
    drop_last_batch: bool = Field(True, description="Leave out the last, shorter batch of an epoch in training.")


Mode = Literal["relay", "splitfed1", "splitfed2", "vertical", "data_parallel", "collaboration", "federated"]


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
        " of different columns of the same records; the first one holds the labels. `data_parallel`: nothing is split;"
        " one owner's processes, under torchrun, train the whole network together (`parallel`). `collaboration`:"
        " nothing is split; volunteers train it together (`collaboration`, `milkglass collab`). `federated`: nothing is"
        " split; each client trains the whole network, and a server averages their weights (`federated`).",
    )
    vertical: Vertical = Field(default_factory=Vertical)

    @property
    def is_vertical(self) -> bool:
        """Whether several owners hold parts of the same records."""
        return self.mode == "vertical"

    @property
    def is_data_parallel(self) -> bool:
        """Whether one owner's processes train the whole network together."""
        return self.mode == "data_parallel"

    @property
    def is_collaboration(self) -> bool:
        """Whether volunteers train the whole network together."""
        return self.mode == "collaboration"

    @property
    def is_federated(self) -> bool:
        """Whether each client trains the whole network, and a server averages weights."""
        return self.mode == "federated"

    @property
    def is_split(self) -> bool:
        """Whether the network is cut between parties."""
        return self.mode not in ("data_parallel", "collaboration", "federated")

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
        description="True: the file holds this client's records alone, unparted between clients. False: the seed deals "
        "one file out to all.",
    )
    most_releases: int | None = Field(
        None, ge=1, description="Stop before a record is sent more often than this in training; default: no limit."
    )
    keep_releases: bool = Field(
        False,
        description="While its stage does not change, the client sends the same noise for the same record: whoever "
        "asks again learns nothing more.",
    )
    most_queries: int | None = Field(
        None,
        ge=1,
        description="`predict` stops before a record is released afresh more often than this; default: no limit.",
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

    auxiliary_share: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="The share of the data that the attacker knows pairs of. It is set aside of a client's own file as "
        "well; 0 where there are only such (`client.own_records`) and no audit is to come, or with `data_parallel`.",
    )
    validation_share: float = Field(
        0.1, ge=0, lt=1, description="The share on which attacks are chosen and weighted; 0 like `auxiliary_share`."
    )


FAMILIES: Final = (
    *("none", "recipe", "nopeek", "noise", "channel", "channel_entropy", "channel_nopeek"),
    *("adversary", "learned_noise", "random_projection", "pca"),
)
"""Families of defenses that `milkglass frontier` knows; `none` and `recipe` have no strength."""


@final
class FrontierSection(Section):
    """What `milkglass frontier` sweeps: no part of what is agreed, and of no other command."""

    families: tuple[str, ...] | None = Field(
        None,
        description=f"Families of defenses: {', '.join(f'`{name}`' for name in FAMILIES)}. Default: all that the "
        "recipe allows. What a family needs beside its strength it takes from the recipe's own `defense` table.",
        strict=False,
    )
    strengths: dict[str, list[Annotated[float, Field(gt=0)]]] = Field(
        default_factory=dict,
        description="By family the strengths to begin with, such as `{ channel = [0.1, 0.3] }` (its sigma): a weight, "
        "or a sigma. Default: a grid of the family's own.",
    )
    bisections: int = Field(
        2,
        ge=0,
        le=8,
        description="So often, after the grid, strengths between two neighbours are tried: with a budget those between "
        "which it is met, in every family; else those with the widest gap in peek.",
    )

    @model_validator(mode="after")
    def _families_are_known(self) -> Self:
        for name in (*(self.families or ()), *self.strengths):
            if name not in FAMILIES:
                raise ValueError(f"no family of defenses is called {name!r}; {nearest(name, FAMILIES)}")
        if self.families is not None and len(set(self.families)) < len(self.families):
            raise ValueError(f"families names one twice: {', '.join(self.families)}")
        for name, strengths in self.strengths.items():
            if name in FAMILIES[:2]:
                raise ValueError(f"strengths: the family {name!r} has none to set")
            if not strengths or len({f"{strength:g}" for strength in strengths}) < len(strengths):
                raise ValueError(f"strengths of {name}: {strengths}; expected different numbers, one at least")
        return self
