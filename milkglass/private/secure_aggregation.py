"""Secure aggregation: the server learns the clients' weighted sum, and no client's own weights.

SecAgg+ (Bell et al. 2020, eprint 2020/704; after Bonawitz et al. 2017, eprint 2017/281) as Flower implements it. Pairs
of clients agree on masks that cancel in the sum, each client adds one of its own, and shares of the masks' keys let the
others take out what a client left behind that dropped out. What is done here beside setting it up (flwr 1.41):

- Flower expands a 32-byte key into a mask by numpy's Mersenne Twister, seeded with the key's 4-byte words XORed: at
  most 32 bits, and 28 for the masks of pairs, whose keys are base64. Whoever sees a masked vector, and knows its first
  number (the client's weight), could try them all. The papers ask for a secure generator; here the key stream of
  ChaCha20 makes the masks.
- Flower's server cannot go on without a client that drops out before its key shares are with the others. Such a client
  has no mask in any sum, so it is left out of what follows.
- A client checks what Flower's takes from the server: threshold, shares and rounding must be the recipe's, a key and a
  seed of one client are not given out together, and where all hold shares a sum of fewer than 3 is not unmasked.
- The rounding is drawn from the client's source, so that runs repeat. What a client tells beside its weights (loss,
  records classified right) is summed with them, not told. The closing test of the common weights is told openly.
- The server does not unmask a sum of fewer clients than the recipe wants in a round (`federated.least_clients`). One
  that stops between a sum and its checkpoint, and repeats the round with other clients, knows the two sums' difference.

How exact the mean is: weights are rounded to `levels` steps between -clip and clip (2**29 of them for 3 or 4 clients, a
step of 3e-8 at a clip of 8); see `Settings.bound`. A masked vector takes 8 bytes for each weight.
"""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, cast, final

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.client.mod.secure_aggregation import secaggplus_mod as flower_mod
from flwr.common import Code, FitIns, FitRes, Scalar, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, RECORD_KEY_STATE, Key, Stage
from flwr.compat.common import recorddict_compat as compat
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.server.workflow.secure_aggregation.secaggplus_workflow import SecAggPlusWorkflow, WorkflowState
from flwr.serverapp import Grid
from numpy.typing import NDArray

from milkglass.errors import DataError, LinkError, MessageError, RecipeError, first_line
from milkglass.federated_section import SecureAggregation
from milkglass.flower import flower
from milkglass.randomness import Source

GUARANTEE: Final = (
    "The server learns the weighted sum of the clients' weights, which clients took part, and how many training "
    "records each has, but no single client's weights, as long as it follows the protocol (honest but curious) and "
    "fewer than `threshold` clients collude with it. This says nothing about what the sum itself shows: of one's own "
    "records, or to a server that knows all but one of the clients."
)

Array = NDArray[Any]
_MODULUS: Final = 2**32
_SMALLEST_SUM: Final = 3
"""Of two clients each would know the other's weights from the sum."""
_MOST_TOLD: Final = 64.0
"""Numbers that are told with the weights are of at most this size."""


@final
@dataclass(frozen=True)
class Settings:
    """Of SecAgg+, for a whole training. levels: the steps that numbers between -clip and clip are rounded to."""

    clients: int
    shares: int
    threshold: int
    clip: float
    levels: int

    def bound(self, records: Sequence[int]) -> float:
        """How far a weight of the mean may be from the exact one, where clients of so many records take part.

        A client's numbers are rounded to one step, and its weight in the mean to one of `levels`.
        """
        return 3 * self.clip / self.levels * len(records) * max(records) / sum(records)


def settings_of(section: SecureAggregation, clients: int) -> Settings:
    """What the recipe's table comes to for so many clients. Raises RecipeError for what Flower cannot do."""
    shares = clients if section.shares is None else section.shares
    threshold = -(-2 * shares // 3) if section.threshold is None else section.threshold
    where = "federated.secure_aggregation"
    if clients < _SMALLEST_SUM or shares > clients:
        raise RecipeError(f"{where} needs {max(_SMALLEST_SUM, shares)} clients or more; there are {clients}")
    if shares % 2 == 0 and shares != clients:
        raise RecipeError(f"{where}.shares is {shares}; expected an odd number, or one share for each client")
    if not 2 <= threshold < shares:
        raise RecipeError(f"{where}.threshold is {threshold}; expected 2 or more, and fewer than shares, {shares}")
    return Settings(clients, shares, threshold, section.clip, 2 ** (31 - math.ceil(math.log2(clients))))


@final
@dataclass(frozen=True)
class SecureRound:
    """A round's mean: `arrays` of weights, as the clients got them; `told`: of what they told; nodes: whose it is."""

    arrays: list[Array]
    told: Array
    nodes: frozenset[int]


def secure_round(
    grid: Grid,
    settings: Settings,
    nodes: Sequence[int],
    arrays: Sequence[Array],
    *,
    largest: int,
    least: int,
    round_: int,
    config: Mapping[str, int],
    timeout_seconds: float,
) -> SecureRound:
    """One round with the clients at these nodes, from the weights `arrays`: the mean of what they answer.

    largest: the training records of the largest client, by which weights are scaled. least: so many clients must be in
    the sum, or it is not unmasked: a round that is repeated with more of them would show the difference. config: what
    the clients are told. Raises LinkError, one line, where fewer are left than that, than the threshold, or than 3.
    """
    least = max(least, settings.threshold, _SMALLEST_SUM)
    _with_secure_masks()
    strategy = _Once(nodes, grid, config)
    context = LegacyContext(Context(0, 0, {}, RecordDict(), {}), strategy=strategy)
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({WorkflowKey.CURRENT_ROUND: round_})
    context.state.array_records[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(
        ndarrays_to_parameters(list(arrays)), keep_input=True
    )
    workflow = _Workflow(
        least,
        settings.shares,
        settings.threshold,
        max_weight=float(largest),
        clipping_range=settings.clip,
        quantization_range=settings.levels,
        modulus_range=_MODULUS,
        timeout=timeout_seconds,
    )
    failed = ""
    try:
        workflow(grid, context)
    except (KeyError, IndexError, ValueError) as error:  # of shares that do not fit
        failed = f" ({type(error).__name__}: {first_line(error)})"
    if strategy.mean is None or failed:
        raise LinkError(
            f"round {round_}: secure aggregation failed{failed}: of {len(nodes)} clients too few were left to take out "
            f"the masks; at least {least} must stay until its end"
        )
    return SecureRound(strategy.mean[:-1], strategy.mean[-1] * (_MOST_TOLD / settings.clip), strategy.answered)


def received(message: Message) -> tuple[list[Array], dict[str, Any]]:
    """The weights, and what else a client was told, in the message that asks for its masked ones."""
    ins = compat.recorddict_to_fitins(message.content, keep_input=True)
    return parameters_to_ndarrays(ins.parameters), dict(ins.config)


def answer(
    settings: Settings, context: Context, arrays: Sequence[Array], told: Sequence[float], records: int
) -> RecordDict:
    """A client's weights, for Flower to mask: it goes no further as it is.

    told: numbers of at most 64 that only their mean is to tell. Raises DataError for what would not come out as it went
    in: numbers that are not finite or too large, or more records than the server has heard of. What it says goes to the
    server, so it names no value.
    """
    most = cast(float, context.state.config_records[RECORD_KEY_STATE][Key.MAX_WEIGHT])
    if records > most:
        raise DataError(f"{records} training records, and the server takes {most:.0f} for the most that a client has")
    if max(told) > _MOST_TOLD or not all(map(math.isfinite, told)):
        raise DataError(f"its loss, or a count, is not finite or too large: at most {_MOST_TOLD} can be summed")
    exact = [np.asarray(array, np.float64) for array in arrays]
    largest = max((float(np.abs(array).max(initial=0.0)) for array in exact), default=0.0)
    if not largest <= settings.clip:  # nor is NaN
        raise DataError(
            f"a weight is too large, or not finite; federated.secure_aggregation.clip is {settings.clip}: raise it"
        )
    exact.append(np.asarray(told, np.float64) * (settings.clip / _MOST_TOLD))
    result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters(exact), records, {})
    return compat.fitres_to_recorddict(result, keep_input=True)


def client_mods(settings: Settings, source_of: Callable[[Context], Source]) -> list[Any]:
    """What stands between Flower and a client's training: the checks, then Flower's own masking.

    source_of: the client's private source; its rounding is drawn from it.
    """
    _with_secure_masks()

    def checking(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        if message.metadata.message_type != MessageType.TRAIN:
            return call_next(message, context)
        _check_request(message, settings)
        with _rounding_from(source_of(context).derive("rounding", message.metadata.group_id)):
            return call_next(message, context)

    return [checking, flower_mod]


def _check_request(message: Message, settings: Settings) -> None:
    """Raise MessageError for what an honest server would not ask."""
    configs: Mapping[str, Any] = message.content.config_records.get(RECORD_KEY_CONFIGS, {})
    stage = configs.get(Key.STAGE)
    if stage is None:
        raise MessageError("the recipe says secure aggregation, and the server asks for weights without it")
    if stage == Stage.SETUP:
        expected: dict[str, Any] = {
            Key.SHARE_NUMBER: settings.shares,
            Key.THRESHOLD: settings.threshold,
            Key.CLIPPING_RANGE: settings.clip,
            Key.TARGET_RANGE: settings.levels,
            Key.MOD_RANGE: _MODULUS,
        }
        for name, value in expected.items():
            if configs.get(name) != value:
                raise MessageError(
                    f"secure aggregation: {name} is {value} by the recipe, and the server says {configs.get(name)}"
                )
    if stage == Stage.UNMASK:
        active, dead = (
            set(cast(list[int], configs.get(key, []))) for key in (Key.ACTIVE_NODE_ID_LIST, Key.DEAD_NODE_ID_LIST)
        )
        least = _SMALLEST_SUM if settings.shares == settings.clients else settings.threshold  # it is told of neighbors
        if active & dead or len(active) < least:
            raise MessageError("secure aggregation: the server asks for what would show a single client's weights")


@final
class _Workflow(SecAggPlusWorkflow):
    """Flower's, which goes on without clients that drop out before their shares are with the others.

    least: so many clients must be in a sum that is unmasked.
    """

    def __init__(self, least: int, *shares: int, **settings: Any) -> None:
        super().__init__(*shares, **settings)
        self._least = least

    def share_keys_stage(self, grid: Grid, context: LegacyContext, state: WorkflowState) -> bool:
        """They have no mask in any sum, so there is nothing to take out."""
        if not super().share_keys_stage(grid, context, state):
            return False
        state.sampled_node_ids = set(state.active_node_ids)
        state.nid_to_neighbours = {
            node: state.nid_to_neighbours[node] & state.active_node_ids for node in state.active_node_ids
        }
        return True

    def collect_masked_vectors_stage(self, grid: Grid, context: LegacyContext, state: WorkflowState) -> bool:
        """Without them nobody is asked for the shares that unmask it."""
        enough = super().collect_masked_vectors_stage(grid, context, state)
        return enough and len(state.active_node_ids) >= self._least


@final
class _Once(FedAvg):
    """Flower's legacy strategy of one round: asks all nodes in the given order, and keeps the mean that comes out."""

    def __init__(self, nodes: Sequence[int], grid: Grid, config: Mapping[str, int]) -> None:
        super().__init__()
        self._nodes, self._grid, self._config = list(nodes), grid, cast(dict[str, Scalar], dict(config))
        self.mean: list[Array] | None = None
        self.answered: frozenset[int] = frozenset()

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> list[tuple[Any, FitIns]]:
        del server_round, client_manager
        ins = FitIns(parameters, self._config)
        return [(GridClientProxy(node, self._grid, 0), ins) for node in self._nodes]

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> tuple[Any, dict[str, Any]]:
        """All results are the mean already: the workflow has put it in their place."""
        del server_round, failures
        self.mean = parameters_to_ndarrays(results[0][1].parameters)
        self.answered = frozenset(proxy.node_id for proxy, _ in results)
        return None, {}


@contextmanager
def _rounding_from(source: Source) -> Iterator[None]:
    """Inside, numpy's global generator, by which Flower rounds up or down, follows from `source`."""
    before = np.random.get_state()
    np.random.seed(np.frombuffer(source.read(64), np.uint32))
    try:
        yield
    finally:
        np.random.set_state(before)


def _mask(seed: bytes, num_range: int, dimensions_list: Sequence[tuple[int, ...]]) -> list[NDArray[np.int64]]:
    """In place of Flower's `pseudo_rand_gen`: numbers below `num_range`, a power of two, of these shapes."""
    counts = [math.prod(shape) for shape in dimensions_list]
    stream = Source(hashlib.sha256(b"milkglass mask" + seed).digest()).read(4 * sum(counts))
    numbers = np.frombuffer(stream, "<u4").astype(np.int64) & (num_range - 1)
    parts = np.split(numbers, np.cumsum(counts)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, dimensions_list, strict=True)]


def _with_secure_masks() -> None:
    """Let Flower's client and server make their masks by `_mask`."""
    flower()
    for name in (
        "flwr.client.mod.secure_aggregation.secaggplus_mod",
        "flwr.server.workflow.secure_aggregation.secaggplus_workflow",
    ):
        importlib.import_module(name).pseudo_rand_gen = _mask  # type: ignore[attr-defined]
