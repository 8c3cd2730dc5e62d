"""Ways of training and protections side by side: which cells there are, the recipe of each, what a row says. Pure.

A cell is a way of training, a protection, and a number of clients; all cells have the same records, network, seed and
epochs. The ways are those that Vepakomma et al. 2018 (arXiv 1812.03288) set side by side on paper, and a few more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal, final

from milkglass.compare_section import CompareSection
from milkglass.defense_sections import ChannelDefense, Defense, NoPeekDefense
from milkglass.errors import RecipeError, nearest
from milkglass.federated_section import DifferentialPrivacy, SecureAggregation
from milkglass.leakage.estimate import Estimate
from milkglass.recipe import Recipe, parse_recipe

Kind = Literal["whole", "split", "update"]
MEASURED: Final = "measured"
MODELLED: Final = "modelled"
DEFAULT_EPSILON: Final = 8.0


@final
@dataclass(frozen=True)
class Way:
    """A way of training. kind: what an audit attacks: records, activations, or updates of a whole network.

    shares: what a client shows, in words. extra: of the package, that it needs. in_turn: clients train one after the
    other.
    """

    words: str
    kind: Kind
    shares: str
    labels_leave: bool
    extra: str | None = None
    in_turn: bool = False

    @property
    def records_leave(self) -> bool:
        """Whether raw records go to who computes."""
        return self.kind == "whole"


WAYS: Final[Mapping[str, Way]] = MappingProxyType(
    {
        "whole": Way("whole, at one place", "whole", "all records and labels", True),
        "split": Way("split, clients in turn", "split", "activations and labels of every batch", True, in_turn=True),
        "u_shaped": Way("split, U-shaped", "split", "activations of every batch; labels stay", False, in_turn=True),
        "splitfed": Way("SplitFed", "split", "activations and labels of every batch", True),
        "federated": Way("federated averaging", "update", "weights after every round", False, "federated"),
        "large_batch": Way("large-batch synchronous SGD", "update", "the gradient of every batch", False),
        "adaptive": Way("adaptive periodic averaging", "update", "weights after every period", False),
        "collaboration": Way("open collaboration", "update", "the gradient of every contribution", False, "collab"),
    }
)
"""By the name that a recipe and `--only` give them."""


@final
@dataclass(frozen=True)
class Protection:
    """A protection. ways: those that it goes with. extra: of the package. inference: protects answers, not training."""

    words: str
    ways: tuple[str, ...]
    extra: str | None = None
    inference: bool = False


_SPLIT: Final = ("split", "u_shaped", "splitfed")
PROTECTIONS: Final[Mapping[str, Protection]] = MappingProxyType(
    {
        "none": Protection("none", tuple(WAYS)),
        "nopeek": Protection("NoPeek", _SPLIT),
        "channel": Protection("channel", _SPLIT),
        "dp": Protection("DP-SGD at the client", (*_SPLIT, "federated"), "dp"),
        "secure_aggregation": Protection("secure aggregation", ("federated",), "federated"),
        "homomorphic": Protection("homomorphic inference", ("split", "u_shaped"), "he", inference=True),
        "two_party": Protection("two-party inference", ("split",), inference=True),
        "garbled": Protection("garbled circuit for the answer", ("split",), inference=True),
    }
)
"""By the name that a recipe gives them."""


@final
@dataclass(frozen=True)
class Cell:
    """A row to be made."""

    training: str
    protection: str
    clients: int

    @property
    def name(self) -> str:
        """As its folder is called."""
        return f"{self.training}-{self.protection}-{self.clients}"

    @property
    def words(self) -> str:
        """For a reader."""
        plural = "" if self.clients == 1 else "s"
        shield = "" if self.protection == "none" else f", {PROTECTIONS[self.protection].words}"
        return f"{WAYS[self.training].words}{shield}, {self.clients} client{plural}"

    @property
    def undefended(self) -> Cell:
        """The same way without a protection: what an audit compares with, and whose answers are encrypted."""
        return Cell(self.training, "none", self.clients)


def section_of(
    recipe: Recipe, only: Sequence[str] | None = None, clients: Sequence[int] | None = None
) -> CompareSection:
    """The recipe's table with what a command line says over it. Raises RecipeError for an unknown way."""
    section = recipe.compare or CompareSection()
    changes: dict[str, Any] = {}
    if only is not None:
        for name in only:
            if name not in WAYS:
                raise RecipeError(f"--only: no way of training is called {name!r}; {nearest(name, WAYS)}")
        changes["trainings"] = tuple(dict.fromkeys(only))
    if clients is not None:
        changes["clients"] = tuple(dict.fromkeys(clients))
    tables = recipe.model_dump() | {"compare": section.model_dump() | changes}
    return parse_recipe(tables, where="--only, --clients").compare or section


def cells_of(section: CompareSection) -> list[Cell]:
    """What there is to make, in the order of ways, clients, protections; undefended before what compares with it.

    Training at one place has one client, SecAgg+ three at least, and encrypted answers are measured for one number of
    clients, the first.
    """
    found: list[Cell] = []
    for training in WAYS:
        if training not in (section.trainings or WAYS):
            continue
        for index, clients in enumerate(section.clients if training != "whole" else (1,)):
            for name, protection in PROTECTIONS.items():
                if name not in (section.protections or PROTECTIONS) or training not in protection.ways:
                    continue
                if protection.inference and index:
                    continue
                least = max(clients, section.secure_clients) if name == "secure_aggregation" else clients
                found.append(Cell(training, name, least))
    return list(dict.fromkeys(found))


def recipe_of(recipe: Recipe, cell: Cell, *, train_records: int, back_at: str | None = None) -> Recipe:
    """The recipe of a cell's training. train_records: of all clients. back_at: where a U-shaped network comes back.

    Raises RecipeError where the recipe does not allow it.
    """
    way, tables = WAYS[cell.training], recipe.model_dump()
    names = recipe.parties.clients
    if len(names) != cell.clients:
        names = tuple(f"client-{number}" for number in range(1, cell.clients + 1))
    tables |= {"compare": None, "frontier": None, "dp": None, "guard": {}, "defense": {}}
    tables["parties"] = {"clients": names, "server": recipe.parties.server, "mode": _MODES[cell.training]}
    if way.kind == "split":
        at = recipe.cut.model_dump() | {"hops": (), "back_at": back_at if cell.training == "u_shaped" else None}
        tables |= {"cut": at, "federated": {}}
        tables["defense"] = _defense(recipe.defense, cell.protection)
    else:
        tables |= {"cut": {}, "wire": {}}
        tables["training"] |= {"micro_batches": 1, "client_learns": "all"}
        tables |= _way_tables(recipe, cell, train_records)
    if cell.protection == "dp":
        tables["dp"] = (recipe.dp or DifferentialPrivacy(epsilon=DEFAULT_EPSILON)).model_dump()
    return parse_recipe(tables, where=cell.words)


_MODES: Final[Mapping[str, str]] = {
    "whole": "data_parallel",
    "split": "relay",
    "u_shaped": "relay",
    "splitfed": "splitfed1",
    "federated": "federated",
    "large_batch": "data_parallel",
    "adaptive": "data_parallel",
    "collaboration": "collaboration",
}


def _defense(base: Defense, protection: str) -> dict[str, Any]:
    """NoPeek and the channel as the recipe has them, or as they are by default."""
    if protection == "nopeek":
        return {"nopeek": (base.nopeek or NoPeekDefense()).model_dump()}
    if protection == "channel":
        entropy = {} if base.entropy is None or base.channel is None else {"entropy": base.entropy.model_dump()}
        return {"channel": (base.channel or ChannelDefense()).model_dump()} | entropy
    return {}


def _way_tables(recipe: Recipe, cell: Cell, train_records: int) -> dict[str, Any]:
    """What ways that do not split say in tables of their own."""
    tables: dict[str, Any] = {"federated": {}, "parallel": {}, "collaboration": {}}
    if cell.training in ("whole", "large_batch"):
        tables["parallel"] = {"exchange": "dense", "patience_seconds": recipe.parallel.patience_seconds}
    elif cell.training == "adaptive":
        tables["parallel"] = recipe.parallel.model_dump() | {
            **{"exchange": "adaptive", "warmup": (), "momentum_correction": False},
            "period": recipe.parallel.period if recipe.parallel.exchange in ("periodic", "adaptive") else None,
        }
    elif cell.training == "federated":
        tables["federated"] = recipe.federated.model_dump() | {"secure_aggregation": None, "least_clients": None}
        if cell.protection == "secure_aggregation":
            secure = recipe.federated.secure_aggregation or SecureAggregation()
            tables["federated"]["secure_aggregation"] = secure.model_dump()
    elif cell.training == "collaboration":
        target = recipe.training.batch_size * cell.clients
        steps = max(1, recipe.training.epochs * train_records // target)
        tables["collaboration"] = recipe.collaboration.model_dump() | {
            **{"target_batch": target, "epochs": steps},
            "first_peers": cell.clients,
        }
    return tables


def check_comparable(recipe: Recipe) -> None:
    """Refuse a recipe whose records or weights cannot be the same in every way. Raises RecipeError."""
    for name, given, expected in (
        ("parties.mode vertical", recipe.parties.is_vertical, "whole records, dealt to clients"),
        ("client.own_records", recipe.client.own_records, "one file, dealt to clients"),
        ("network.start", recipe.network.start is not None, "first weights from the seed"),
        ("training.at_home", recipe.training.at_home, "trainings between parties"),
        ("training.drop_last_batch = false", not recipe.training.drop_last_batch, "whole batches in every way"),
        ("network albert", recipe.network.name == "albert", "a network that classifies pictures or tables"),
    ):
        if given:
            raise RecipeError(f"{name}: compare sets ways of training side by side on the same; expected {expected}")
    if not recipe.cut.at:
        raise RecipeError("'cut.at' is missing: compare splits the network too")


@final
@dataclass(frozen=True)
class Row:
    """What a cell came to. status: "measured", "modelled", or why it was not run.

    accuracy: 0..1 on test records. client_flops: of one client's whole training. client_memory: bytes that it must
    hold at its peak. bytes_up, bytes_down: of one client, on the wire. rounds: exchanges with the others. seconds:
    wall clock of all parties on one machine. peek, membership, attribute, gradient_inversion: by the audit, None
    where that attack does not apply. guarantee: in words; guarantee_covers: whether it is about a record, for all of
    it that the way shares. inference: bytes and seconds are of `records` encrypted answers, not of a training.
    """

    cell: Cell
    status: str
    accuracy: Estimate | None = None
    client_flops: float | None = None
    client_memory: int | None = None
    bytes_up: float | None = None
    bytes_down: float | None = None
    rounds: int | None = None
    seconds: float | None = None
    peek: Estimate | None = None
    membership: Estimate | None = None
    attribute: Estimate | None = None
    gradient_inversion: Estimate | None = None
    sound: bool = True
    guarantee: str | None = None
    guarantee_covers: bool = False
    inference: bool = False
    records: int | None = None
    notes: tuple[str, ...] = ()
    run: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_measured(self) -> bool:
        """Whether there are figures that were seen."""
        return self.status == MEASURED

    def to_dict(self) -> dict[str, Any]:
        """As in compare.json: of a measure its value, its interval beside it."""
        told: dict[str, Any] = {
            "training": self.cell.training,
            "protection": self.cell.protection,
            "clients": self.cell.clients,
            "status": self.status,
            "words": self.cell.words,
            "shares": WAYS[self.cell.training].shares,
            "labels_leave": WAYS[self.cell.training].labels_leave,
        }
        for name in _FIGURES:
            found: Estimate | None = getattr(self, name)
            told[name] = None if found is None else found.value
            told[f"{name}_interval"] = None if found is None else [found.low, found.high]
        for name in _AS_THEY_ARE:
            told[name] = getattr(self, name)
        return told | {"notes": list(self.notes), "details": dict(self.details)}


_FIGURES: Final = ("accuracy", "peek", "membership", "attribute", "gradient_inversion")
_AS_THEY_ARE: Final = (
    *("client_flops", "client_memory", "bytes_up", "bytes_down", "rounds", "seconds", "sound", "guarantee"),
    *("guarantee_covers", "inference", "records", "run", "details"),
)


def read_row(told: Mapping[str, Any]) -> Row:
    """The row that `Row.to_dict` told. Raises KeyError, TypeError or ValueError for what is none."""
    cell = Cell(str(told["training"]), str(told["protection"]), int(told["clients"]))
    if cell.training not in WAYS or cell.protection not in PROTECTIONS:
        raise ValueError(f"no such row: {cell.name}")
    figures: dict[str, Any] = {
        name: None if told[name] is None else Estimate(float(told[name]), *map(float, told[f"{name}_interval"]))
        for name in _FIGURES
    }
    same = {name: told[name] for name in _AS_THEY_ARE}
    return Row(cell, str(told["status"]), notes=tuple(map(str, told["notes"])), **figures, **same)


def extras_of(cell: Cell) -> list[str]:
    """The extras of the package that a cell needs."""
    found = [WAYS[cell.training].extra, PROTECTIONS[cell.protection].extra]
    return [extra for extra in dict.fromkeys(found) if extra is not None]


def sorted_rows(rows: Collection[Row], by: str) -> list[Row]:
    """Best first: accuracy falls, all else rises; rows that lack the figure come last, in their own order."""

    def key(row: Row) -> tuple[bool, float]:
        if by == "training":
            return False, 0.0
        value = getattr(row, by)
        if value is None:
            return True, 0.0
        number = value.value if isinstance(value, Estimate) else float(value)
        return False, -number if by == "accuracy" else number

    return sorted(rows, key=key)
