"""The formulas of `costs.py` as bytes on our own wire: each thing that a formula leaves out is a term with a name.

A term follows from numbers of the recipe alone, before anything has run; tests and `benchmarks/communication_formulas`
hold the sums to what was counted: split training to the byte where names and shapes of the client's stage are given,
else within 2 %, with an estimate of the text around a sealed tensor; ranks within 2 %: what gloo sends between epochs
is a measured constant.

What crosses beside the papers' pq/K each way and eta N, and is stated here:

- labels go up with activations; the loss and how many were right come back; U-shaped there is a second cut instead;
- the last, shorter batch of an epoch is left out (less than the formula says);
- test records cross the cut after every epoch, at each client a share of them;
- handing on: the paper counts eta N once, where it is sent. Here it also comes down, sealed, through the server: in a
  relay to the next client and, from the last, to all (with what the optimizer remembers, of Adam two numbers a weight);
  in SplitFed each client takes all K and averages by itself, for the server must not read them: K eta N;
- frames: headers, zeros up to a multiple of 64, questions and receipts.

Not counted: TLS, HTTP/2 and TCP below the frames, retries, pieces of a batch (`micro_batches`), compressors, defenses
with weights of their own, hops, vertical owners.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Final, Literal, final

from milkglass.costs import BYTES_PER_SCALAR
from milkglass.errors import RecipeError

_FIXED_BYTES: Final = 48  # of a frame; see codec.py, which the tests compare this with
_ALIGNMENT: Final = 64
_LABEL_BYTES: Final = 8  # int64
_TEST_BATCH: Final = 256
_SEAL_BYTES: Final = 16  # AES-SIV's tag
_SEALED_ENTRY_BYTES: Final = 82  # measured: name, type, shape and place of a tensor in safetensors' JSON, 71 to 89
_JSON_LENGTH_BYTES, _JSON_ALIGNMENT = 8, 8  # safetensors'
_GLOO_MESSAGE_BYTES: Final = 48
_GLOO_SEGMENT_BYTES: Final = 1 << 20
_FIRST_BUCKET_BYTES, _BUCKET_BYTES = 1 << 20, 25 << 20  # DistributedDataParallel's
_RANK_EPOCH_BYTES: Final = 360  # measured, 2 to 4 ranks, times ranks: tests and checkpoints after an epoch
_RANK_RUN_BYTES: Final = 280  # the same, once: start and end

Tensor = tuple[str, int, int]
"""Name, dimensions, bytes of its values."""


@final
@dataclass(frozen=True)
class Terms:
    """Bytes of one client, one way. `payload` and `weights` are the papers' formulas; the others are stated overheads.

    payload: the formula's activations or gradients, weights of a federated round, or all-reduces. weights: eta N handed
    on. left_out: records of shorter last batches, below 0. labels: and in the other direction loss and right ones.
    second_cut: U-shaped, features or their gradients. evaluation: test records, or what ranks tell each other after an
    epoch. optimizer: what it remembers, handed on. handed: all that is taken over from others. framing: the rest.
    """

    payload: float = 0.0
    weights: float = 0.0
    left_out: float = 0.0
    labels: float = 0.0
    second_cut: float = 0.0
    evaluation: float = 0.0
    optimizer: float = 0.0
    handed: float = 0.0
    framing: float = 0.0

    def __add__(self, other: Terms) -> Terms:
        return Terms(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    @property
    def total(self) -> float:
        """All terms: what is counted on the wire."""
        return math.fsum(getattr(self, each.name) for each in fields(self))

    @property
    def formula(self) -> float:
        """What the papers count."""
        return self.payload + self.weights


@final
@dataclass(frozen=True)
class Flows:
    """Bytes of one client in a whole training: up to the server (or sent to ranks), down (or received)."""

    up: Terms
    down: Terms

    @property
    def total(self) -> float:
        """Both ways."""
        return self.up.total + self.down.total

    @property
    def formula(self) -> float:
        """What the papers count, both ways."""
        return self.up.formula + self.down.formula


@final
@dataclass(frozen=True)
class Work:
    """A split training in numbers. Raises RecipeError for what cannot be dealt out.

    clients: their names. cut: shape of one record's activations. records, test_records: of all clients, dealt evenly.
    client_parameters, client_tensors: of a client's stage (and U-shaped its head). features: U-shaped, the shape at the
    second cut; None: labels go to the server. tested: whether test records cross after each epoch. stage: names and
    shapes of those tensors, float32, in order (`stage.conv.weight`, U-shaped also `head. ...`): with them it is exact.

    A recipe has at most 64 clients; for more this goes on by the same rules.
    """

    clients: tuple[str, ...]
    cut: tuple[int, ...]
    classes: int
    records: int
    test_records: int
    client_parameters: int
    client_tensors: int
    epochs: int
    batch_size: int
    features: tuple[int, ...] | None = None
    mode: Literal["relay", "splitfed1", "splitfed2"] = "relay"
    optimizer: Literal["adam", "sgd"] = "adam"
    momentum: float = 0.9
    drop_last_batch: bool = True
    tested: bool = True
    server: str = "server"
    stage: tuple[tuple[str, tuple[int, ...]], ...] | None = None

    def __post_init__(self) -> None:
        if not self.clients or self.epochs < 1 or self.batch_size < 1:
            raise RecipeError(
                f"work: {len(self.clients)} clients, {self.epochs} epochs, batches of {self.batch_size}; expected at "
                "least one of each"
            )
        if self.drop_last_batch and self.records // len(self.clients) < self.batch_size:
            raise RecipeError(
                f"work: {self.records} records of {len(self.clients)} clients make no batch of {self.batch_size} each"
            )
        told = None if self.stage is None else (sum(math.prod(shape) for _, shape in self.stage), len(self.stage))
        if told not in (None, (self.client_parameters, self.client_tensors)):
            raise RecipeError(
                f"work: stage has {told[0]} numbers in {told[1]} tensors; client_parameters and client_tensors say "
                f"{self.client_parameters} in {self.client_tensors}"
            )

    @property
    def weight_bytes(self) -> int:
        """Of a client's stage, eta N."""
        return BYTES_PER_SCALAR * self.client_parameters

    @property
    def optimizer_bytes(self) -> int:
        """What the optimizer remembers of a client's stage: handed on in a relay alone."""
        steps = BYTES_PER_SCALAR * self.client_tensors * ("step" in self._slots)
        return self.weight_bytes * len([slot for slot in self._slots if slot != "step"]) + steps

    @cached_property
    def sealed_bytes(self) -> int:
        """Of one client's weights as handed on: values, their names, how many records taught them, the seal."""
        if self.stage is None:
            tensors = 1 + (1 + len(self._slots)) * self.client_tensors
            values = self.weight_bytes + self.optimizer_bytes + BYTES_PER_SCALAR
            return _SEAL_BYTES + _JSON_LENGTH_BYTES + _SEALED_ENTRY_BYTES * tensors + values
        remembered = [
            (f"optimizer.{index}.{slot}", () if slot == "step" else shape)
            for index, (_, shape) in enumerate(self.stage)
            for slot in self._slots
        ]
        return _SEAL_BYTES + _safetensors_bytes([*self.stage, *remembered, ("records", ())])

    @property
    def _slots(self) -> tuple[str, ...]:
        if self.mode != "relay":
            return ()
        if self.optimizer == "adam":
            return ("step", "exp_avg", "exp_avg_sq")
        return ("momentum_buffer",) if self.momentum else ()


def frame_bytes(party: str, *tensors: Tensor) -> int:
    """The length of a frame that `party` sends with these tensors: header and names, then values at multiples of 64."""
    heads = sum(3 + len(name.encode()) + 8 * dimensions for name, dimensions, _ in tensors)
    total = _FIXED_BYTES + len(party.encode()) + heads
    for _, _, value_bytes in tensors:
        total += -total % _ALIGNMENT + value_bytes
    return total


def split_bytes(work: Work) -> tuple[Flows, ...]:
    """What each client sends and receives in a whole training, in their order, term by term."""
    alike: dict[tuple[int, ...], Flows] = {}
    flows = []
    for index, name in enumerate(work.clients):
        dealt = [_share(records, len(work.clients), index) for records in (work.records, work.test_records)]
        key = (len(name.encode()), *dealt, min(index, 1))
        if key not in alike:
            alike[key] = _of_client(work, index)
        flows.append(alike[key])
    return tuple(flows)


def ring_bytes(
    parameters: int, ranks: int, exchanges: int, *, epochs: int = 1, bucketed: bool = True, tested: bool = True
) -> Flows:
    """What a rank of data-parallel training sends and receives over gloo's sockets in `exchanges` dense all-reduces.

    exchanges: steps of large-batch SGD; where weights meet now and then, the lines of exchange.jsonl and one more, the
    average at the end. bucketed: in the buckets of DistributedDataParallel, as gradients are; weights go in one.
    tested: with what ranks say after an epoch. A resent packet is counted as sent, and the ranks' heartbeats are left
    out, some 150 bytes a second.
    """
    if ranks < 2:
        return Flows(Terms(), Terms())
    size = BYTES_PER_SCALAR * parameters
    messages = sum(3 * 2 * (ranks - 1) * _segments(part, ranks) // ranks for part in _buckets(size, bucketed))
    terms = Terms(
        payload=exchanges * 2 * size * (ranks - 1) / ranks,
        framing=exchanges * messages * _GLOO_MESSAGE_BYTES,
        evaluation=ranks * (_RANK_RUN_BYTES + _RANK_EPOCH_BYTES * epochs) if tested else 0,
    )
    return Flows(terms, terms)


def federated_bytes(
    parameter_bytes: int,
    rounds: int,
    *,
    closing_tests: int = 1,
    messages_per_round: int = 1,
    message_overhead_bytes: float = 0.0,
) -> Flows:
    """What a client of federated averaging sends and receives: 2N numbers a round, N down and N up.

    parameter_bytes: of the whole network. closing_tests: rounds at the end that only test, N down and nearly nothing
    up. message_overhead_bytes: around one message, either way, of which there are `messages_per_round` each way.
    """
    payload = float(parameter_bytes * rounds)
    framing = message_overhead_bytes * messages_per_round * (rounds + closing_tests)
    up = Terms(payload=payload, framing=framing)
    return Flows(up, Terms(payload=payload, evaluation=float(parameter_bytes * closing_tests), framing=framing))


def _of_client(work: Work, index: int) -> Flows:
    name, count = work.clients[index], len(work.clients)
    records = _share(work.records, count, index)
    up, down = _training(work, name, records)
    if work.tested:
        for more_up, more_down in _testing(work, name, _share(work.test_records, count, index)):
            up, down = up + more_up, down + more_down
    if count > 1:
        more_up, more_down = _handing(work, name, index)
        up, down = up + more_up, down + more_down
    trained = sum(_batches(records, work.batch_size, work.drop_last_batch))
    each = BYTES_PER_SCALAR * math.prod(work.cut) * work.epochs
    formula = Terms(payload=each * records, left_out=each * (trained - records))
    return Flows(up + formula, down + formula)


def _training(work: Work, name: str, records: int) -> tuple[Terms, Terms]:
    """All but the activations and gradients at the cut, which `_of_client` counts."""
    up, down = Terms(), Terms()
    for size in _batches(records, work.batch_size, work.drop_last_batch):
        z = _rows("activations", work.cut, size)
        dz = _rows("gradient", work.cut, size)
        if work.features is None:
            labels = ("labels", 1, _LABEL_BYTES * size)
            answers = (("loss", 0, 4), ("right", 0, 8))
            up += _told(name, [z, labels], beside=z, labels=labels[2])
            down += _told(work.server, [dz, *answers], beside=dz, labels=12)
            continue
        features, returned = _rows("features", work.features, size), _rows("gradient", work.features, size)
        up += _told(name, [z], beside=z) + _told(name, [returned], second_cut=returned[2])
        down += _told(work.server, [features], second_cut=features[2]) + _told(work.server, [dz], beside=dz)
    return _times(up, work.epochs), _times(down, work.epochs)


def _testing(work: Work, name: str, records: int) -> Iterator[tuple[Terms, Terms]]:
    for size in _batches(records, _TEST_BATCH, drop_last=False):
        asked = _rows("activations", work.cut, size)
        answer = _rows("logits", work.features or (work.classes,), size)
        yield (
            _times(_told(name, [asked], evaluation=asked[2]), work.epochs),
            _times(_told(work.server, [answer], evaluation=answer[2]), work.epochs),
        )


def _handing(work: Work, name: str, index: int) -> tuple[Terms, Terms]:
    """Weights left for others and taken from them, after each epoch; entering, once."""
    sealed = ("sealed", 1, work.sealed_bytes)
    one, all_ = [1], [len(work.clients)]
    asks = (one if index == 0 else one * 2) if work.mode == "relay" else all_  # how many clients' weights, each time
    kept = work.weight_bytes + work.optimizer_bytes
    up = _told(name, [sealed], weights=work.weight_bytes, optimizer=work.optimizer_bytes)
    down = _told(work.server, [])
    for many in asks:
        up += _told(name, [("of", 1, 8 * many)])
        taken = [(str(place), 1, work.sealed_bytes) for place in range(many)]
        down += _told(work.server, taken, handed=many * kept)
    entering = _told(name, [("batches", 1, 8)]), _told(work.server, [])
    return _times(up, work.epochs) + entering[0], _times(down, work.epochs) + entering[1]


def _told(party: str, tensors: list[Tensor], *, beside: Tensor | None = None, **terms: float) -> Terms:
    """A message: named terms for its values, framing for all else. beside: values that are counted elsewhere."""
    elsewhere = 0 if beside is None else beside[2]
    return Terms(**terms, framing=frame_bytes(party, *tensors) - elsewhere - sum(terms.values()))


def _times(terms: Terms, epochs: int) -> Terms:
    return Terms(*(epochs * getattr(terms, each.name) for each in fields(terms)))


def _rows(name: str, shape: tuple[int, ...], rows: int) -> Tensor:
    return name, 1 + len(shape), BYTES_PER_SCALAR * math.prod(shape) * rows


def _batches(records: int, size: int, drop_last: bool) -> list[int]:
    whole, rest = divmod(records, size)
    return [size] * whole + ([rest] if rest and not drop_last else [])


def _share(records: int, clients: int, index: int) -> int:
    """As records are dealt: the first clients have one more where they do not part evenly."""
    return records // clients + (index < records % clients)


def _safetensors_bytes(tensors: Sequence[tuple[str, tuple[int, ...]]]) -> int:
    """The length of a safetensors file of float32: length, JSON that says what lies where, values."""
    described, end = {}, 0
    for name, shape in sorted(tensors):
        begin, end = end, end + BYTES_PER_SCALAR * math.prod(shape)
        described[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = len(json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode())
    return _JSON_LENGTH_BYTES + text + -text % _JSON_ALIGNMENT + end


def _buckets(size: int, bucketed: bool) -> list[int]:
    """Bytes of each all-reduce: the first bucket is a small one."""
    if not bucketed or size <= _FIRST_BUCKET_BYTES:
        return [size]
    rest = size - _FIRST_BUCKET_BYTES
    return [_FIRST_BUCKET_BYTES, *_batches(rest, _BUCKET_BYTES, drop_last=False)]


def _segments(size: int, ranks: int) -> int:
    """In how many gloo parts a vector: two a rank, or more where they would be large."""
    fewest = max(2 * ranks, -(-size // _GLOO_SEGMENT_BYTES))
    return -(-fewest // ranks) * ranks
