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

from milkglass.collaboration.admission import OpenDoor
from milkglass.collaboration.board import Board
from milkglass.collaboration.engine import get_dht_time
from milkglass.collaboration.identity import new_identity, peer_name
from milkglass.collaboration.node import Node
from milkglass.collaboration.progress import Report, judge
from milkglass.collaboration.signed_records import SignedRecords
from milkglass.collaboration.token_admission import TokenAdmission, read_pass
from milkglass.errors import LinkError
from milkglass.recipe import Recipe

_EVERY_SECONDS: Final = 1.0
_GONE_SECONDS: Final = 60.0


def watch(recipe: Recipe, peers: tuple[str, ...], pass_folder: Path | None) -> None:
    """Show the run until it is stopped, or all volunteers have been gone for a minute, once one was there.

    peers: addresses of volunteers. pass_folder: from the authority, to believe those alone whom it admits: who looks on
    is nobody itself, so a volunteer can be watched by its own folder. A key that the authority revokes is shown until
    its token expires. Raises LinkError where nobody answers.
    """
    own = read_pass(pass_folder) if pass_folder is not None else None
    admission = OpenDoor() if own is None else TokenAdmission(own, recipe.collaboration.run)
    addresses = (*peers, *(() if own is None else own.addresses))
    if not addresses:
        raise LinkError("--watch: whom to ask? expected --peer, the address of a volunteer")

    identity = new_identity()
    validator = SignedRecords(identity, admission)
    terminal = sys.stdout.isatty()
    with (
        Node(identity, validator, peers=addresses, reachable=False) as node,
        Live(console=Console(), auto_refresh=False) if terminal else _Lines() as live,
    ):
        board = Board(node, recipe.collaboration.run, None)
        last_seen: float | None = None
        while node.alive:
            with contextlib.suppress(TimeoutError):  # it shows what it saw last
                node.run(board.look(), recipe.collaboration.timeout_seconds)
            seen = view(board.reports, recipe, get_dht_time())
            if isinstance(live, Live):
                live.update(picture(seen), refresh=True)
            else:
                print(json.dumps(seen), flush=True)
            if seen["peers"]:
                last_seen = time.monotonic()
            elif last_seen is not None and time.monotonic() - last_seen > _GONE_SECONDS:
                return
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
