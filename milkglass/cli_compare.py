"""The command `milkglass compare`; `cli.py` registers it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from milkglass.cli_network import Overrides, RecipePath, say, show
from milkglass.errors import MilkglassError

if TYPE_CHECKING:
    from milkglass.compare_files import Comparison


def compare(
    recipe: RecipePath,
    overrides: Overrides = None,
    only: Annotated[
        str | None, typer.Option(metavar="WAY,...", help="Only these ways of training, such as split,federated.")
    ] = None,
    clients: Annotated[
        str | None, typer.Option(metavar="N,...", help="Numbers of clients, such as 2,10; over the recipe's.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where rows and results go; default runs/<recipe>-compare.")
    ] = None,
) -> None:
    """Ways of training and protections side by side on your data. Run it again, and it goes on where it was.

    What is measured and what you need (labels that stay, a slow uplink, a limit on peek) stands in the recipe's
    `compare` table. DIR/compare.json holds every number, DIR/compare.html shows them.
    """
    from milkglass.audit_files import Watching
    from milkglass.compare_files import compare as compare_recipe
    from milkglass.memory import keep_freed_memory
    from milkglass.progress import AuditProgress, TrainingProgress
    from milkglass.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    out = out or Path("runs") / f"{recipe.stem}-compare"
    keep_freed_memory()
    found = compare_recipe(
        loaded,
        out,
        Watching(TrainingProgress, AuditProgress, lambda line: say(f"compare: {line}")),
        only=None if only is None else [name.strip() for name in only.split(",")],
        clients=None if clients is None else _numbers(clients),
    )
    show(_table(found))
    _tell(found, out)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise MilkglassError(f"--clients {text!r}: expected numbers with commas between, such as 2,10") from None


def _table(found: Comparison) -> Any:
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    from milkglass.compare import PROTECTIONS, WAYS, sorted_rows
    from milkglass.figures import number

    shown = Table("training", "protection", box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for heading in ("clients", "accuracy", "peek\n(95 % interval)", "client's\nFLOPs", "sent", "received", "time"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in sorted_rows([row for row in found.known if row.is_measured], found.section.sort):
        peek = row.peek
        cells = (
            WAYS[row.cell.training].words,
            PROTECTIONS[row.cell.protection].words,
            str(row.cell.clients),
            "–" if row.accuracy is None else f"{100 * row.accuracy.value:.1f} %",
            "–" if peek is None else f"{number(peek.value, 3)} [{number(peek.low, 3)}, {number(peek.high, 3)}]",
            "–" if row.client_flops is None else f"{row.client_flops:.2g}",
            "–" if row.bytes_up is None else decimal(round(row.bytes_up)),
            "–" if row.bytes_down is None else decimal(round(row.bytes_down)),
            "–" if row.seconds is None else f"{row.seconds:.1f} s",
        )
        shown.add_row(*map(Text, cells))  # as Text, brackets are no mark-up
    return shown


def _tell(found: Comparison, out: Path) -> None:
    from milkglass.compare_advice import advise

    for row in found.rows:
        if not row.is_measured:
            print(f"{out}: {row.cell.words}: not measured: {row.status}")
        elif not row.sound:
            print(f"{out}: {row.cell.words}: its audit is inconclusive: the attacks failed their own controls")
    for note in found.notes:
        print(f"{out}: {note}")
    for advice in advise(found.known, found.section):
        print(f"{out}: {advice.headline}")
    print(f"{out / 'compare.html'}, {out / 'compare.json'}")
