"""What two parties tell each other before the first message, and what may cross after it.

The handshake compares what both must agree on, and names the first thing that differs. The limits say, for each kind of
message, which tensors it holds, their shapes and types: a frame that holds anything else is refused from its header.

Legend: B records in a message, D values of an activation, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final, final

import torch
from torch import Tensor

from milkglass.codec import VERSION, Allowed, Limits, frame_bound
from milkglass.compression.base import Compressor, Identity
from milkglass.errors import LinkError, MessageError
from milkglass.messages import Message

GREETING_BYTES: Final = 1 << 20
MOST_HASHED: Final = 1 << 20
"""So many records may vertical owners match."""
_FLOAT: Final = frozenset({torch.float32})
_MOST_WORDS: Final = 1000
_INT: Final = frozenset({torch.int64})
_BYTES: Final = frozenset({torch.uint8})
GREETINGS: Final = Limits(
    GREETING_BYTES + 4096,
    {kind: {"told": Allowed((None,), _BYTES, GREETING_BYTES)} for kind in ("hello", "welcome")},
    0,
)
"""What may come before the parties have agreed."""
HEARTBEATS: Final = Limits(4096, {"waits": {"for": Allowed((None,), _BYTES, 1024)}}, 0)
"""What may come instead of an answer."""


@final
@dataclass(frozen=True)
class Agreement:
    """What both sides must hold alike. run: the server's number of this run; a new client has none yet."""

    recipe: Mapping[str, Any]
    cut_shape: tuple[int, ...]
    classes: int = 0
    features: tuple[int, ...] = ()
    version: str = metadata.version("milkglass")
    frame_version: int = VERSION

    def told(self, **more: Any) -> Tensor:
        """As bytes (n,) uint8."""
        content = {
            "recipe": dict(self.recipe),
            "cut_shape": list(self.cut_shape),
            "classes": self.classes,
            "features": list(self.features),
            "version": self.version,
            "frame_version": self.frame_version,
        }
        return torch.frombuffer(bytearray(json.dumps(content | more).encode()), dtype=torch.uint8)

    def difference(self, told: Mapping[str, Any]) -> str | None:
        """The first thing in which another party's words differ, with both values; None where they agree."""
        for what in ("version", "frame_version", "cut_shape", "classes", "features"):
            ours, theirs = getattr(self, what), told.get(what)
            ours = list(ours) if isinstance(ours, tuple) else ours
            if ours != theirs:
                return f"{what.replace('_', ' ')} is {_short(ours)} here and {_short(theirs)} there"
        return _first_difference(self.recipe, told.get("recipe"), "recipe: ")


def read_greeting(message: Message) -> dict[str, Any]:
    """What a hello or a welcome says. Raises MessageError where it is no JSON object."""
    try:
        content = json.loads(message.tensors["told"].numpy().tobytes())
    except (KeyError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise MessageError(f"{message.kind!r} of {message.party!r}: expected a JSON object")
    return content


@final
@dataclass(frozen=True)
class Crossing:
    """What crosses between one client and the server, in shapes without the batch.

    cut: the client's activations. features: U-shaped, what the server makes of them, else None. classes: K. rows: most
    records in a message. sealed_bytes: of handed-over weights, 0 where none are. handed: how many come in one answer.
    """

    cut: tuple[int, ...]
    features: tuple[int, ...] | None
    classes: int
    rows: int
    compressor: Compressor = Identity()  # noqa: RUF009 - it holds nothing
    sends_labels: bool = True
    sealed_bytes: int = 0
    handed: int = 0
    vertical: bool = False

    def to_server(self) -> Limits:
        """What the client may send."""
        activations = self._parts("activations", self.cut)
        kinds: dict[str, Mapping[str, Allowed]] = {"queries": activations, "goodbye": {}}
        kinds["activations"] = {**activations, **({"labels": Allowed((None,), _INT)} if self.sends_labels else {})}
        if self.features is not None:
            kinds["returns"] = self._parts("gradient", self.features)
        if self.handed:
            kinds["enters"] = {"batches": Allowed((1,), _INT)}
            kinds["weights"] = {"sealed": Allowed((None,), _BYTES, self.sealed_bytes)}
            kinds["collect"] = {"of": Allowed((None,), _INT, self.handed)}
        if self.vertical:
            kinds["hashes"] = {"hashes": Allowed((None, 32), _BYTES, MOST_HASHED)}
        return Limits(max(frame_bound(kinds, self.rows), GREETINGS.frame_bytes), kinds, self.rows)

    def to_client(self) -> Limits:
        """What the server may answer."""
        kinds: dict[str, Mapping[str, Allowed]] = {"receipt": {}}
        gradient = self._parts("gradient", self.cut)
        scalars = {"loss": Allowed((), _FLOAT), "right": Allowed((), _INT)}
        kinds["gradients"] = {**gradient, **(scalars if self.sends_labels else {})}
        answer = (self.classes,) if self.features is None else self.features
        kinds["predictions"] = {"logits": Allowed((None, *answer), _FLOAT)}
        if self.features is not None:
            kinds["features"] = self._parts("features", self.features)
        if self.handed:
            sealed = Allowed((None,), _BYTES, self.sealed_bytes)
            kinds["handed"] = {str(place): sealed for place in range(self.handed)}
        return Limits(max(frame_bound(kinds, self.rows), GREETINGS.frame_bytes), kinds, self.rows)

    def _parts(self, name: str, shape: Sequence[int]) -> dict[str, Allowed]:
        if isinstance(self.compressor, Identity):
            return {name: Allowed((None, *shape), _FLOAT)}
        layout = self.compressor.layout((1, *shape), torch.float32)
        return {
            f"{name}.{part}": Allowed((None, *each.shape[1:]), frozenset({each.dtype})) for part, each in layout.items()
        }


def refused(reason: str) -> LinkError:
    """What a client raises when the server does not let it in."""
    words = "".join(letter if letter.isprintable() else "?" for letter in reason[:_MOST_WORDS])
    return LinkError(f"the server refuses this client: {words}")


def _first_difference(ours: Any, theirs: Any, where: str) -> str | None:
    """Of two tables of tables: no deeper than ours is, whatever a stranger sends."""
    if not isinstance(ours, Mapping) or not isinstance(theirs, Mapping):
        return None if ours == theirs else f"{where.rstrip('.')} is {_short(ours)} here and {_short(theirs)} there"
    for key in sorted(ours.keys() | theirs.keys()):
        difference = _first_difference(ours.get(key), theirs.get(key), f"{where}{_cut(key)}.")
        if difference is not None:
            return difference
    return None


def _short(value: Any) -> str:
    try:
        return _cut(repr(value))
    except RecursionError:
        return "something nested too deep"


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
