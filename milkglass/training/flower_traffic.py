"""A grid around Flower's that counts what each client sends and receives, and knows which of them failed, and why.

Counted is the size of Flower's `Message` in its own wire format (protobuf), as it would be on a wire without TLS;
the payload in it are the numbers of arrays alone, without their headers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, final

from flwr.app import Message, MessageType, RecordDict
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.common.serde import message_to_proto
from flwr.serverapp import Grid

from milkglass.errors import first_line, foreign_line
from milkglass.training.federated_rounds import Sent

_KINDS: Final = {
    Stage.SETUP: "keys",
    Stage.SHARE_KEYS: "shares",
    Stage.COLLECT_MASKED_VECTORS: "weights",
    Stage.UNMASK: "unmasking",
}
_NPY_LENGTH: Final = slice(8, 10)
_NPY_PREFIX: Final = 10


@final
class CountingGrid(Grid):
    """sent: where each client's bytes are counted, by its name. names: the client at a node, once it has said it."""

    def __init__(self, grid: Grid, sent: Mapping[str, Sent]) -> None:
        self._grid, self._sent = grid, sent
        self.names: dict[int, str] = {}
        self.failed: dict[str, str] = {}
        self._failed_nodes: dict[int, str] = {}
        self._early: list[tuple[int, Any]] = []

    def name(self, node: int, name: str) -> None:
        """This node is that client; what went to and fro before is counted as its own."""
        self.names[node] = name
        for other, counted in self._early:
            if other == node:
                self._sent[name].count(*counted)
        self._early = [(other, counted) for other, counted in self._early if other != node]

    def in_order(self) -> list[tuple[int, str]]:
        """(node, name) of the clients, in the recipe's order."""
        places = {name: place for place, name in enumerate(self._sent)}
        return sorted(self.names.items(), key=lambda item: places[item[1]])

    def present(self) -> list[str]:
        """The clients whose nodes are connected."""
        return [self.names[node] for node in self._grid.get_node_ids() if node in self.names]

    def missing(self, there: Iterable[str]) -> dict[str, str]:
        """The clients that are not `there`, each with the reason, in the recipe's order."""
        found = set(there)
        return {name: self.failed.get(name, "not connected") for name in self._sent if name not in found}

    def refuse(self, name: str, reason: str) -> None:
        """This client's answer is not taken."""
        self.failed[name] = reason

    def reason(self, node: int) -> str:
        """Why the newest answer of this node was an error."""
        return self._failed_nodes[node]

    def forget(self) -> None:
        """A new round: nobody has failed in it."""
        self.failed.clear()

    def ask(self, messages: Iterable[Message], timeout_seconds: float) -> list[Message]:
        """Send a round's messages to clients that are known, or to be known, and wait for the answers."""
        self.forget()
        asked = [m for m in messages if not self.names or m.metadata.dst_node_id in self.names]
        return list(self.send_and_receive(asked, timeout=timeout_seconds))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Flower's own, counted."""
        asked = list(messages)
        kind = _kind(asked[0]) if asked else ""
        for message in asked:
            self._count(message.metadata.dst_node_id, "to client", kind, message)
        answers = list(self._grid.send_and_receive(asked, timeout=timeout))
        for answer in answers:
            node = answer.metadata.src_node_id
            self._count(node, "to server", kind, answer)
            if answer.has_error():
                self._failed_nodes[node] = foreign_line(first_line(Exception(answer.error.reason)))
                self._fail(node, self._failed_nodes[node])
        for node in {message.metadata.dst_node_id for message in asked} - {a.metadata.src_node_id for a in answers}:
            self._fail(node, f"no answer in {timeout:g} seconds" if timeout is not None else "no answer")
        return answers

    def set_run(self, run: Any) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        return self._grid.run

    def get_node_ids(self) -> Iterable[int]:
        return list(self._grid.get_node_ids())

    def create_message(self, *args: Any, **settings: Any) -> Message:
        return self._grid.create_message(*args, **settings)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return list(self._grid.push_messages(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return list(self._grid.pull_messages(message_ids))

    def _fail(self, node: int, reason: str) -> None:
        if node in self.names:
            self.failed[self.names[node]] = reason

    def _count(self, node: int, direction: Any, kind: str, message: Message) -> None:
        payload = payload_bytes(message.content) if message.has_content() else 0
        counted = direction, kind, message_to_proto(message).ByteSize(), payload
        if node in self.names:
            self._sent[self.names[node]].count(*counted)
        else:
            self._early.append((node, counted))


def payload_bytes(content: RecordDict) -> int:
    """The bytes of all numbers in the arrays of a message, masked ones among them."""
    arrays = [array.data for record in content.array_records.values() for array in record.values()]
    configs: Mapping[str, Any] = content.config_records.get(RECORD_KEY_CONFIGS, {})
    return sum(_numbers(array) for array in [*arrays, *configs.get(Key.MASKED_PARAMETERS, [])])


def _numbers(npy: bytes) -> int:
    """Without the header of numpy's format, whose length it tells."""
    return len(npy) - _NPY_PREFIX - int.from_bytes(npy[_NPY_LENGTH], "little")


def _kind(message: Message) -> str:
    category = message.metadata.message_type.partition(".")[0]
    if category != MessageType.TRAIN:
        return {MessageType.QUERY: "greeting", MessageType.EVALUATE: "test"}.get(category, category)
    configs: Mapping[str, Any] = message.content.config_records.get(RECORD_KEY_CONFIGS, {})
    return _KINDS.get(configs.get(Key.STAGE, ""), "weights")
