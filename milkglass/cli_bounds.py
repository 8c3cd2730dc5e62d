"""The command `milkglass bounds`; `cli.py` registers it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from milkglass.cli_network import say, show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from milkglass.bounds_files import Measured


def bounds(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.")],
    sizes: Annotated[
        str | None,
        typer.Option(metavar="N,...", help="Train the same recipe with so many training records each, and compare."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where bounds.json and the runs of other sizes go; default RUN.")
    ] = None,
) -> None:
    """Measure the generalization gap, say what it proves about membership, and what attacks reach beside it.

    With --sizes: DIR/size-N is a run of the same recipe with N training records, DIR/bounds.svg draws them all. Run it
    again, and it goes on where it was.
    """
    from milkglass.bounds_files import FIGURE, FILE, bounds_of_run, bounds_over_sizes, parse_sizes
    from milkglass.memory import keep_freed_memory
    from milkglass.progress import TrainingProgress

    if sizes is None:
        _tell(bounds_of_run(run, out))
        print((out or run) / FILE)
        return
    asked = parse_sizes(sizes)
    keep_freed_memory()
    whole, made = bounds_over_sizes(
        run, asked, out, training=TrainingProgress, tell=lambda line: say(f"bounds: {line}")
    )
    _tell(whole)
    show(_by_size(made))
    print(f"{(out or run) / FIGURE}, {(out or run) / FILE}")


def _tell(found: Measured) -> None:
    from rich.table import Table
    from rich.text import Text

    proof, run = found.proof, found.run
    print(
        f"{run}: {proof.members:,} members, accuracy {proof.accuracy_on_members:.3f}; {proof.others:,} other records, "
        f"accuracy {proof.accuracy_on_others:.3f}"
    )
    for note in found.notes:
        print(f"{run}: {note}")
    for gap in proof.gaps:
        print(
            f"{run}: gap of the {gap.loss} (0 to {gap.limit:.3g}) {gap.value:.3f}, 95 % interval {gap.low:.3f} to "
            f"{gap.high:.3f}"
        )
    shown = Table("membership, .5 = guessing", box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for heading in ("measured", "95 % interval"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for bound in proof.bounds:
        surely = "" if bound.low is None else f"{bound.low:.3f} or more"
        shown.add_row(*map(Text, (f"bound: {bound.name}", f"{bound.value:.3f}", surely)))
    attacks = [(f"attack: {each.attack}, {each.measure}", each.value, each.low, each.high) for each in proof.attacks]
    attacks += [(f"audit: {row.name}, {row.measure}", row.value, row.low, row.high) for row in found.audit or ()]
    for name, value, low, high in attacks:
        shown.add_row(*map(Text, (name, f"{value:.3f}", f"{low:.3f} to {high:.3f}")))
    show(shown)
    for bound in proof.bounds:
        print(f"{run}: {bound.name}: {bound.words}")
    print("Bounds are lower bounds: what some attacker surely can do. A small one is no sign of safety.")


def _by_size(made: Sequence[Measured]) -> Any:
    from rich.table import Table

    shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    headings = (
        *("records", "batch", "epochs", "accuracy on\nmembers, others", "Brier gap", "bound as\npublished"),
        *(
            "bound for\n0 <= loss <= 2",
            "clipped bound\n(at least)",
            "attack:\nprobability > .8",
            "attack: best\nloss",
            "AUC of\nloss",
        ),
    )
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    for each in made:
        proof = each.proof
        published, sound, clipped = proof.bounds
        sure, best, _, area = proof.attacks
        shown.add_row(
            f"{each.records:,}",
            str(each.batch_size),
            f"{each.epochs:,}",
            f"{proof.accuracy_on_members:.3f}, {proof.accuracy_on_others:.3f}",
            f"{proof.gaps[0].value:.3f}",
            f"{published.value:.3f}",
            f"{sound.value:.3f}",
            f"{clipped.value:.3f} ({clipped.low:.3f})",
            f"{sure.value:.3f}",
            f"{best.value:.3f}",
            f"{area.value:.3f}",
        )
    return shown
