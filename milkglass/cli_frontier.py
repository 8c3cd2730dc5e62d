"""The command `milkglass frontier`; `cli.py` registers it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from milkglass.cli_network import Overrides, RecipePath, say, show
from milkglass.errors import MilkglassError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from milkglass.frontier_files import Frontier

EXIT_NOTHING_FITS: Final = 3
EXIT_INCONCLUSIVE: Final = 4


def frontier(
    recipe: RecipePath,
    overrides: Overrides = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="'peek<=0.1, ...'", help="Choose the most accurate setting inside it, for fresh records."),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Sweeps with fewer and smaller attacks; what is chosen is still audited in full."),
    ] = False,
    thorough: Annotated[bool, typer.Option("--thorough", help="Audits with every attack on records: long.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where cells and results go; default runs/<recipe>-frontier.")
    ] = None,
) -> None:
    """Train and audit a sweep of defenses: accuracy against peek. Run it again, and it goes on where it was.

    With --budget the choice is retrained on three other seeds and audited in full, not quicker than usual, and
    DIR/recipe.toml is the recipe to use. Exit code 3: nothing meets the budget, or the choice does not hold it on the
    other seeds. 4: their audits are inconclusive.
    """
    from milkglass.audit_files import Watching
    from milkglass.frontier_files import sweep
    from milkglass.memory import keep_freed_memory
    from milkglass.progress import AuditProgress, TrainingProgress
    from milkglass.recipe import load_recipe
    from milkglass.verdict import parse_budget

    if quick and thorough:
        raise MilkglassError("--quick and --thorough: expected one of them, or neither")
    limits = parse_budget(budget) if budget is not None else None
    loaded = load_recipe(recipe, overrides or ())
    out = out or Path("runs") / f"{recipe.stem}-frontier"
    keep_freed_memory()
    found = sweep(
        loaded,
        out,
        strength="quick" if quick else "thorough" if thorough else "default",
        budget=limits,
        watching=Watching(TrainingProgress, AuditProgress, lambda line: say(f"frontier: {line}")),
    )
    show(_table(found))
    for failure in found.failures:
        print(f"{out}: {failure.setting.words}: failed: {failure.why}")
    for note in found.notes:
        print(f"{out}: {note}")
    if limits is not None:
        _tell_choice(found, limits, out)
    print(f"{out / 'frontier.svg'}, {out / 'frontier.html'}, {out / 'frontier.json'}")
    if limits is not None and (found.chosen is None or found.held == "over budget"):
        raise typer.Exit(EXIT_NOTHING_FITS)
    raise typer.Exit(EXIT_INCONCLUSIVE if found.held == "inconclusive" else 0)


def _table(found: Frontier) -> Any:
    from rich.table import Table
    from rich.text import Text

    from milkglass.figures import number
    from milkglass.frontier import front

    shown = Table("defense", box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for heading in ("accuracy, %\n(95 % interval)", "peek\n(95 % interval)", "bits", "client's\nFLOPs", "front"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("verdict")
    rows = zip(found.rows, front(found.rows), strict=True)
    for row, on in sorted(rows, key=lambda pair: pair[0].peek.value):
        accuracy, peek = row.accuracy, row.peek
        percents = [number(100 * value, 1) for value in (accuracy.value, accuracy.low, accuracy.high)]
        cells = (
            row.setting.words,
            f"{percents[0]} [{percents[1]}, {percents[2]}]",
            f"{number(peek.value, 3)} [{number(peek.low, 3)}, {number(peek.high, 3)}]",
            "–" if row.bits is None else number(row.bits, 1),
            f"{100 * row.client_flops_share:.0f} %",
            "*" if on else "",
            row.verdict(found.budget),
        )
        shown.add_row(*map(Text, cells))  # as Text, brackets are no mark-up
    return shown


def _tell_choice(found: Frontier, budget: Mapping[str, float], out: Path) -> None:
    from milkglass.frontier import means_of, misses

    limits = ", ".join(f"{name}<={limit:g}" for name, limit in budget.items())
    near, chosen = found.nearest, found.chosen
    if chosen is None and near is None:
        print(f"{out}: nothing meets {limits}: no sound audit has a value for all of it")
    elif chosen is None and near is not None:
        over = ", ".join(f"{name} by {excess:.3g}" for name, excess in misses(near, budget).items())
        print(
            f"{out}: nothing meets {limits}; nearest: {near.setting.words}, accuracy {near.accuracy.value:.3f}: over "
            f"in {over} (the interval's upper end)"
        )
    elif chosen is not None:
        means = means_of(found.finalists)
        print(f"{out}: chosen for {limits}: {chosen.defense}; accuracy {chosen.accuracy.value:.3f} in the sweep")
        if means:
            peeks = "; ".join(
                f"{name} {peek['mean']:.3f} ({peek['lowest']:.3f} to {peek['highest']:.3f})"
                for name, peek in means["exposures"].items()
            )
            print(
                f"{out}: on seeds {', '.join(str(each.seed) for each in found.finalists)}: accuracy "
                f"{means['accuracy']:.3f}, {means['accuracy_lost']:.3f} less than undefended; peek (range): {peeks}"
            )
        inside = sum(each.verdict == "within budget" for each in found.finalists)
        held = {"within budget": "hold", "inconclusive": "cannot be told to hold"}.get(
            found.held or "", "do not all hold"
        )
        print(
            f"{out}: the finalists {held} the budget on fresh records ({inside} of {len(found.finalists)} do); "
            f"the recipe: {out / 'recipe.toml'}"
        )
