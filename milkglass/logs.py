"""Structured logs of a party that runs as a process of its own: a JSON object a line, with party, run and step.

Only names, numbers and short reasons go in: never a tensor, a record or a key.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import structlog

_PLAIN = (str, int, float, bool, type(None))


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
    return {key: value if isinstance(value, _PLAIN) else f"<{type(value).__name__}>" for key, value in event.items()}
