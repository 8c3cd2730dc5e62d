"""Look on: where a run stands, live on a terminal and as JSON lines in a log, without taking part."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any, Final

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from milkglass.collaboration.board import Board
from milkglass.collaboration.collaborate import membership
from milkglass.collaboration.engine import P2P, get_dht_time
from milkglass.collaboration.identity import peer_name
from milkglass.collaboration.node import Node
from milkglass.collaboration.progress import Report, judge
from milkglass.collaboration.signed_records import SignedRecords
from milkglass.errors import LinkError
from milkglass.recipe import Recipe

_EVERY_SECONDS: Final = 1.0


def watch(recipe: Recipe, peers: tuple[str, ...], pass_folder: Path | None) -> None:
    """Show the run until stopped. peers: addresses of volunteers. Raises LinkError where nobody answers."""
    own = membership(pass_folder, recipe.collaboration.run)
    addresses = (*peers, *own.addresses)
    if not addresses:
        raise LinkError("--watch: whom to ask? expected --peer, the address of a volunteer")

    async def look_around(p2p: P2P) -> None:
        if own.renew is not None:
            await own.renew(p2p)

    validator = SignedRecords(own.identity, own.admission)
    terminal = sys.stdout.isatty()
    with (
        Node(own.identity, validator, peers=addresses, reachable=False, look_around=look_around) as node,
        Live(console=Console(), auto_refresh=False) if terminal else _Lines() as live,
    ):
        board = Board(node, recipe.collaboration.run, None)
        while node.alive:
            with contextlib.suppress(TimeoutError):  # it shows what it saw last
                node.run(board.look(), recipe.collaboration.timeout_seconds)
            seen = view(board.reports, recipe, get_dht_time())
            if isinstance(live, Live):
                live.update(picture(seen), refresh=True)
            else:
                print(json.dumps(seen), flush=True)
            time.sleep(_EVERY_SECONDS)
    raise LinkError("the peer-to-peer daemon has ended; watch again")


class _Lines:
    """In a log there is nothing to draw on."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def view(reports: dict[bytes, Report], recipe: Recipe, now: float) -> dict[str, Any]:
    """One look at a run, for JSON. share: of the batch so far; loss: mean over the records so far, as claimed."""
    section = recipe.collaboration
    empty: dict[str, Any] = {"time": now, "run": section.run, "epoch": None, "epochs": section.epochs}
    if not reports:
        return empty | {"samples": 0, "target": section.target_batch, "rate": 0.0, "loss": None, "peers": []}
    first, *others = reports
    progress = judge(
        reports[first], {peer: reports[peer] for peer in others}, target=section.target_batch, cap=section.weight_cap
    )
    there = {peer: report for peer, report in reports.items() if report.epoch == progress.epoch}
    total = sum(report.samples for report in there.values())
    losses = [(report.samples, report.loss) for report in there.values() if report.loss is not None]
    counted = sum(samples for samples, _ in losses)
    return empty | {
        "epoch": progress.epoch,
        "samples": round(progress.samples),
        "target": section.target_batch,
        "rate": progress.rate,
        "loss": sum(samples * loss for samples, loss in losses) / counted if counted else None,
        "peers": [
            {
                "peer": peer_name(peer),
                "epoch": report.epoch,
                "samples": report.samples,
                "share": report.samples / total if total and peer in there else 0.0,
                "rate": report.rate,
                "loss": report.loss,
                "reachable": report.reachable,
                "trains": report.trains,
                "seconds_ago": max(0.0, now - report.time),
            }
            for peer, report in sorted(reports.items())
        ],
    }


def picture(seen: dict[str, Any]) -> Group:
    """The same for a terminal."""
    epoch = "no volunteer is there" if seen["epoch"] is None else f"epoch {seen['epoch']} of {seen['epochs']}"
    loss = "" if seen["loss"] is None else f", loss {seen['loss']:.4f}"
    batch = f"{seen['samples']:,} of {seen['target']:,} records, {seen['rate']:,.0f} records/s"
    head = Text(f"{seen['run']}: {epoch}, {batch}{loss}")
    bar = ProgressBar(total=seen["target"], completed=min(seen["samples"], seen["target"]), width=60)
    table = Table("volunteer", "", "epoch", "records", "share", "records/s", "loss", "seen", box=None)
    for column in table.columns[2:]:
        column.justify = "right"
    for each in seen["peers"]:
        kind = " ".join([*([] if each["trains"] else ["auxiliary"]), *([] if each["reachable"] else ["client mode"])])
        table.add_row(
            each["peer"][-8:],
            kind,
            str(each["epoch"]),
            f"{each['samples']:,}",
            f"{each['share']:.0%}",
            f"{each['rate']:,.0f}",
            "" if each["loss"] is None else f"{each['loss']:.4f}",
            f"{each['seconds_ago']:.0f} s ago",
        )
    return Group(head, Padding(bar, (0, 0, 1, 0)), table)
