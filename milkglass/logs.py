"""Structured logs of a party that runs as a process of its own: a JSON object a line, with party, run and step.

Only names, numbers and short reasons go in: never a tensor, a record or a key.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import structlog

_PLAIN = (str, int, float, bool, type(None))
_WORDS = 2000
"""No text in a log is longer."""


def quiet_grpc() -> None:
    """Keep gRPC's own lines out of the log, a line for each stranger's failed handshake among them.

    Before gRPC is imported. Whoever looks for the cause of one sets GRPC_VERBOSITY=INFO, which is left as it is.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # there is no other way to tell it


def party_log(party: str) -> Callable[..., None]:
    """(event, named values): writes a line to the error stream, with the time and the party's name."""
    logger = structlog.wrap_logger(
        structlog.WriteLogger(sys.stderr),
        processors=[
            _plain_only,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
    ).bind(party=party)

    def log(event: str, **values: object) -> None:
        peer = values.pop("party", party)
        logger.info(event, **({"peer_party": peer} if peer != party else {}), **values)

    return log


def _plain_only(_: Any, __: str, event: Any) -> Any:
    """Refuse what is no plain value: whatever else an object would print, it does not get into a log."""
    return {key: _plain(value) for key, value in event.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value[:_WORDS]
    return value if isinstance(value, _PLAIN) else f"<{type(value).__name__}>"
