"""Flower, made quiet before it is used: it tells nobody that it runs, and prints nothing.

Everybody in milkglass who imports `flwr` calls `flower()` first. Flower reports each start of its commands to its
makers, with the machine's kind and a number that stays, and some commands ask for newer versions; both are off from
then on, here and in the processes that this one starts. Who wants its log adds a handler to the logger `flwr`.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from milkglass.errors import MissingExtraError

SILENT = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
"""What processes of Flower must have in their environment."""


def flower() -> Any:
    """The package `flwr`, silent. Raises MissingExtraError without `milkglass[federated]`."""
    os.environ.update(SILENT)
    try:
        import flwr
        from flwr.supercore import telemetry
        from flwr.supercore.logger import ConsoleHandler
    except ImportError:
        raise MissingExtraError("federated training", "federated") from None
    telemetry.FLWR_TELEMETRY_ENABLED = "0"  # read once, when it is imported, and somebody may have been before us
    log = logging.getLogger("flwr")
    for handler in [handler for handler in log.handlers if isinstance(handler, ConsoleHandler)]:
        log.removeHandler(handler)
        log.addHandler(logging.NullHandler())
    log.propagate = False
    return flwr
