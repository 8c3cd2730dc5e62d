"""One volunteer for the benchmarks of overhead and of shares: `milkglass collab`, with its clock and bandwidth shown.

    python -m benchmarks.measured_volunteer RECIPE --out RUN [--peer ADDRESS] [--listen HOST:PORT] [--go FILE]
        [--bandwidth measured|none|BYTES_PER_SECOND]

A line for each epoch goes to <RUN>.jsonl: that of metrics.jsonl, with the seconds of forward and backward passes in it
(`compute_seconds`), what this volunteer told its group that its bandwidth is, and when its averaging began and ended by
the machine's clock. --go: it connects, and begins to train once this file is there, so that several begin together.
--bandwidth: `none` says nothing, and parts are equal where all do so; a number is said in place of what would be
measured.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final, final

from torch import nn

from milkglass.collaboration.collaborate import collaborate
from milkglass.collaboration.contribution import Gradients
from milkglass.collaboration.group import Group
from milkglass.collaboration.node import read_listen
from milkglass.collaboration.session import Place, Session
from milkglass.errors import MilkglassError
from milkglass.memory import keep_freed_memory
from milkglass.networks import mlp
from milkglass.recipe import load_recipe

_LOOK_SECONDS: Final = 0.02


@final
class Measured:
    """What is measured of a volunteer, in its process. bandwidth: as the option."""

    def __init__(self, bandwidth: str) -> None:
        self._given = bandwidth
        self._compute_seconds = 0.0
        self._bandwidth: float | None = None
        self._averaged = (0.0, 0.0)

    def install(self) -> None:
        """From now on `Gradients.add` is timed, `Session.average` is watched, and `Session._measure` as was told."""
        setattr(Gradients, "add", self._timed(Gradients.add))  # noqa: B010 - the classes are not ours
        setattr(Session, "average", self._watched(Session.average))  # noqa: B010
        if self._given != "measured":
            setattr(Session, "_measure", self._told())  # noqa: B010

    def line(self, line: dict[str, Any]) -> dict[str, Any]:
        """An epoch's line with what was measured in it; the next epoch begins."""
        more = {
            "compute_seconds": self._compute_seconds,
            "bandwidth": self._bandwidth,
            "averaging_began": self._averaged[0],
            "averaging_ended": self._averaged[1],
        }
        self._compute_seconds = 0.0
        return line | more

    def _timed(self, add: Callable[[Gradients], None]) -> Callable[[Gradients], None]:
        def timed(gradients: Gradients) -> None:
            if not gradients.samples:  # an epoch that was given up does not count
                self._compute_seconds = 0.0
            begun = time.perf_counter()
            add(gradients)
            self._compute_seconds += time.perf_counter() - begun

        return timed

    def _watched(self, average: Callable[..., Any]) -> Callable[..., Any]:
        def watched(session: Session, group: Group, *rest: Any) -> Any:
            own = group.index(session.node.identity.peer_id)
            self._bandwidth = None if own is None else group.members[own].bandwidth
            begun = time.monotonic()
            found = average(session, group, *rest)
            self._averaged = begun, time.monotonic()
            return found

        return watched

    def _told(self) -> Callable[[Session], Coroutine[Any, Any, None]]:
        async def told(session: Session) -> None:
            session.bandwidth = None if self._given == "none" else float(self._given)

        return told


def waiting_mlp(record_shape: Sequence[int], classes: int, hidden: Sequence[int], seconds: float) -> nn.Module:
    """A perceptron for which a batch takes so long, without keeping a processor busy: a network for recipes."""
    network = mlp(record_shape, classes, hidden)
    network.register_forward_pre_hook(lambda module, _: time.sleep(seconds) if module.training else None)
    return network


def main() -> None:
    """Take part, and write lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peer", action="append", default=[])
    parser.add_argument("--listen", default="127.0.0.1:0")
    parser.add_argument("--go", type=Path)
    parser.add_argument("--bandwidth", default="measured")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    keep_freed_memory()
    measured = Measured(arguments.bandwidth)
    measured.install()

    def ready(addresses: list[str]) -> None:
        for address in addresses:
            print(f"others join with: --peer {address}", flush=True)
        while arguments.go is not None and not arguments.go.exists():
            time.sleep(_LOOK_SECONDS)

    with arguments.out.with_name(f"{arguments.out.name}.jsonl").open("w") as file:

        def told(line: dict[str, Any]) -> None:
            file.write(json.dumps(measured.line(line)) + "\n")
            file.flush()

        collaborate(
            load_recipe(arguments.recipe),
            arguments.out,
            Place(tuple(arguments.peer), read_listen(arguments.listen)),
            ready=ready,
            told=told,
            note=lambda words: print(f"milkglass: {words}", flush=True),
        )


if __name__ == "__main__":
    try:
        main()
    except MilkglassError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
