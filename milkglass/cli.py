"""The commands. Each is thin: it reads its arguments, calls one function, prints what also stands in a JSON file."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, final

import typer
from typer.core import TyperCommand, TyperGroup

from milkglass.cli_authority import collab_authority
from milkglass.cli_bounds import bounds
from milkglass.cli_collaboration import collab
from milkglass.cli_collaboration_audit import audit_of_collaboration
from milkglass.cli_compare import compare
from milkglass.cli_federated import federated_join, federated_serve
from milkglass.cli_frontier import frontier
from milkglass.cli_network import Overrides, RecipePath, certs, join, predict, say, serve, show, warn_of_key
from milkglass.errors import MilkglassError, StopError

if TYPE_CHECKING:
    from milkglass.audit import Audit
    from milkglass.randomness import Source
    from milkglass.recipe import Recipe

EXIT_BAD_INPUT: Final = 2
EXIT_INTERRUPTED: Final = 128 + signal.SIGINT
EXIT_TERMINATED: Final = 128 + signal.SIGTERM
EXIT_BY_VERDICT: Final = {"within budget": 0, "no budget set": 0, "over budget": 3, "inconclusive": 4}


@final
class _Terminated(KeyboardInterrupt):
    """SIGTERM came: it ends a command in the same way as Ctrl-C."""


@final
class _StoppedError(Exception):
    """A command was stopped from outside. code: what the process exits with."""

    def __init__(self, code: int) -> None:
        super().__init__("stopped")
        self.code = code


@contextmanager
def _ending_at_sigterm() -> Iterator[None]:
    """Inside, SIGTERM raises, so that the command hangs up and leaves its folder in order."""

    def end(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets no other thread handle signals
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@final
class _Commands(TyperGroup):
    """All commands. One that is stopped says so in `main`: Typer by itself would end the process without a word."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was typed."""
        try:
            with _ending_at_sigterm():
                return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise _StoppedError(EXIT_TERMINATED if isinstance(stop, _Terminated) else EXIT_INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    help="Train and serve deep networks across organizations without showing the data, and measure what is shown.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class RecipeCommand(TyperCommand):
    """A command whose help ends with every field of a recipe."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the fields, read from the model itself."""
        from milkglass.recipe import fields

        super().format_epilog(ctx, formatter)
        with formatter.section("Fields of a recipe (docs/recipes.md)"):
            formatter.write_dl([(f"{key}  [{kind}; {default}]", text) for key, kind, default, text in fields()])


@app.command(cls=RecipeCommand)
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="The run folder; default runs/<recipe's name>.")
    ] = None,
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="The client's private key: 32 raw bytes.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier run was stopped.")] = False,
) -> None:
    """Train a network in two halves, in this process, as the recipe says; federated; or data-parallel, by torchrun."""
    from milkglass.memory import keep_freed_memory
    from milkglass.progress import TrainingProgress
    from milkglass.randomness import read_key
    from milkglass.recipe import load_recipe
    from milkglass.training.split import train as train_recipe

    loaded = load_recipe(recipe, overrides or ())
    source = read_key(key) if key is not None else None
    warn_of_key(key)
    out = out or Path("runs") / recipe.stem
    keep_freed_memory()
    if loaded.parties.is_data_parallel:
        _train_together(loaded, out, source, resume=resume)
        return
    if loaded.parties.is_federated:
        _train_federated(loaded, out, source, resume=resume)
        return
    with TrainingProgress(loaded.training.epochs) as progress:
        summary = train_recipe(loaded, out, source, resume=resume, progress=progress)
    for caution in summary["cautions"]:
        say(f"milkglass: note: {caution}")
    dependence = summary["distance_correlation"]
    print(
        f"{out}: defense {summary['defense']}; accuracy {summary['accuracy']:.3f}, distance correlation "
        f"(squared, unbiased) {dependence['squared_unbiased']:.3f}, {summary['bytes_sent']:,} bytes sent, "
        f"{summary['bytes_received']:,} received in {summary['messages']:,} messages; {summary['keys']}"
    )


def _train_together(loaded: Recipe, out: Path, source: Source | None, *, resume: bool) -> None:
    """This process's part of a data-parallel training; rank 0 tells what it came to."""
    from milkglass.progress import TrainingProgress
    from milkglass.training.large_batch import train as train_large_batch
    from milkglass.training.sharded import following

    with nullcontext() if following() else TrainingProgress(loaded.training.epochs) as progress:
        summary = train_large_batch(loaded, out, source, resume=resume, progress=progress)
    if summary is None:
        return
    sent = summary["bytes_sent"]
    counted = "bytes not counted on this system" if sent is None else f"{sent:,} bytes sent by all"
    print(
        f"{out}: {summary['ranks']} ranks, exchange {summary['exchange']}; accuracy {summary['accuracy']:.3f} after "
        f"{summary['steps']:,} steps, {counted}; {summary['keys']}"
    )


def _train_federated(loaded: Recipe, out: Path, source: Source | None, *, resume: bool) -> None:
    """All clients of a federated training in this process, on Flower's simulation."""
    from milkglass.progress import TrainingProgress
    from milkglass.training.federated import train as train_federated

    with TrainingProgress(loaded.training.epochs) as progress:
        summary = train_federated(loaded, out, source, resume=resume, progress=progress)
    print(
        f"{out}: {len(loaded.parties.clients)} clients, {summary['rounds']} rounds; accuracy "
        f"{summary['accuracy']:.3f}, {summary['bytes_sent']:,} bytes sent by all, {summary['bytes_received']:,} "
        f"received; {summary['keys']}"
    )


@app.command()
def audit(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN]", help="A run folder, or a folder of activations.npy and records.npy."),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(metavar="RUN", help="The undefended run of the same recipe; default: trained once.")
    ] = None,
    activations: Annotated[
        Path | None, typer.Option(metavar="A.npy", help="Without RUN: what was sent, recorded with any framework.")
    ] = None,
    records: Annotated[
        Path | None, typer.Option(metavar="X.npy", help="The records behind the activations, row by row.")
    ] = None,
    entitled: Annotated[
        Path | None, typer.Option(metavar="E.npy", help="What the receiver was meant to learn; default: nothing.")
    ] = None,
    attacks: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Only these; the mean record, ridge and stack are always there."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="'peek<=0.3, ...'", help="What may be shown at most, by measure: peek, match, ssim, ..."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer and smaller attacks: under a minute on digits.")
    ] = False,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Every attack on records, a malicious server too: long.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where audit.json goes; default the run folder.")
    ] = None,
) -> None:
    """Attack what crossed the cut, and say how much of a record was rebuilt.

    Exit code 0: within the budget, or none set. 3: over it. 4: inconclusive, the attacks failed their own controls.
    """
    from milkglass.audit_files import Plan, audit_recorded, audit_run, where_recorded
    from milkglass.collaboration_audit import is_collaboration
    from milkglass.progress import AuditProgress, TrainingProgress
    from milkglass.verdict import parse_budget

    if quick and thorough:
        raise MilkglassError("--quick and --thorough: expected one of them, or neither")
    plan = Plan(
        strength="quick" if quick else "thorough" if thorough else "default",
        attacks=attacks.split(",") if attacks is not None else None,
        budget=parse_budget(budget) if budget is not None else None,
    )
    recorded = where_recorded(run, activations, records, entitled)
    if recorded is not None:
        if reference is not None:
            raise MilkglassError("--reference goes with a run folder, not with recorded arrays")
        if out is None:
            raise MilkglassError("recorded arrays: --out DIR is missing; it says where audit.json goes")
        found, content = audit_recorded(recorded, plan, out=out, watching=AuditProgress)
    else:
        assert run is not None  # where_recorded refuses that
        if is_collaboration(run):
            verdict = audit_of_collaboration(run, plan, reference=reference, out=out)
            raise typer.Exit(EXIT_BY_VERDICT[verdict])
        found, content = audit_run(
            run, plan, reference=reference, out=out, training=TrainingProgress, watching=AuditProgress
        )
    subject = run or activations
    _tell_findings(subject, found)
    accuracy = ""
    if recorded is None:
        accuracy = (
            f"; defense {content['defense']}; accuracy {content['accuracy']:.3f}, of the undefended reference "
            f"{content['reference_accuracy']:.3f}"
        )
    print(
        f"{subject}: {found.verdict}{'' if budget is None else f' ({budget})'}: peek {found.peek.value:.3f}, "
        f"95 % interval {found.peek.low:.3f} to {found.peek.high:.3f}, best attack {found.best_attack}{accuracy}"
    )
    raise typer.Exit(EXIT_BY_VERDICT[found.verdict])


def _tell_findings(subject: Path | None, found: Audit) -> None:
    """All but the verdict, line by line."""
    from milkglass.verdict import BITS

    for note in found.notes:
        print(f"{subject}: {note}")
    for left in found.skipped:
        name = "" if left.attack in left.why else f"{left.attack}: "
        print(f"{subject}: left out on {left.exposure} records: {name}{left.why}")
    void = found.check is not None and not found.check.agrees
    for line in () if found.certificate is None else found.certificate.words:
        print(f"{subject}: certificate{', void' if void else ''}: {line}")
    for bound in found.bounds:
        print(f"{subject}: {bound.measure}, {bound.exposure} records: {bound.words}")
    for name, measure in found.measures.items():
        if name not in ("peek", BITS):  # the certificate's own words say more of its bits
            print(f"{subject}: {name} {measure.value:.3f}, 95 % interval {measure.low:.3f} to {measure.high:.3f}")


@app.command()
def cuts(
    recipe: RecipePath,
    overrides: Overrides = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the same as JSON.")] = None,
) -> None:
    """Print what each possible cut costs the client: work, parameters, bytes per record."""
    from dataclasses import asdict

    from rich.table import Table

    from milkglass.cuts import cut_costs
    from milkglass.networks import build
    from milkglass.randomness import public_source
    from milkglass.recipe import load_recipe
    from milkglass.runs import write_beside
    from milkglass.training.shares import deal_records

    loaded = load_recipe(recipe, overrides or ())
    records = deal_records(loaded)
    model = build(
        loaded.network.name,
        records.record_shape,
        records.classes,
        loaded.network.settings,
        public_source(loaded.seed).generator("weights"),
    )
    table = Table("cut at", "shape", "client's FLOPs", "share", "client's parameters", "share", "bytes per record")
    for column in table.columns[2:]:
        column.justify = "right"
    costs = cut_costs(model, records.test.x[:1])
    for cost in costs:
        marked = f"{cost.name}  <- the recipe's" if cost.name == loaded.cut.at else cost.name
        table.add_row(
            marked,
            "x".join(map(str, cost.shape)),
            f"{cost.client_flops:,}",
            f"{cost.client_flops_share:.1%}",
            f"{cost.client_parameters:,}",
            f"{cost.client_parameters_share:.1%}",
            f"{cost.bytes_per_record:,}",
        )
    if json_file is not None:
        form = {"record_shape": list(records.record_shape), "classes": records.classes}
        write_beside(json_file, json.dumps({"cuts": [asdict(cost) for cost in costs], **form}, indent=2).encode())
    show(table)
    print("FLOPs: multiplications and additions of matrix products and convolutions, forward, for one record.")
    print(f"For a server's recipe: data.record_shape = {list(records.record_shape)}, data.classes = {records.classes}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a folder of run folders.")],
) -> None:
    """Write report.html, one page without any outside part, and print its table."""
    from milkglass.report import read_results, table, write_report

    page = write_report(run)
    show(table(read_results(run)))
    print(page)


for command in (
    *(
        bounds,
        frontier,
        compare,
        certs,
        serve,
        join,
        predict,
        federated_serve,
        federated_join,
        collab,
        collab_authority,
    ),
):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; bad input ends in one line on the error stream and exit code 2.

    Ctrl-C ends in one line as well, and exit code 130; SIGTERM in the same line, and 143.
    """
    sys.path.append(str(Path.cwd()))  # a recipe may name a network of the user's own, `package.module:function`
    try:
        app(arguments)
    except MilkglassError as error:
        say(f"milkglass: {error}")
        sys.exit(128 + error.number if isinstance(error, StopError) else EXIT_BAD_INPUT)
    except _StoppedError as stop:
        say(
            "milkglass: stopped; nothing finished is lost: run it again (train, serve, join, collab, federated-*: with "
            "--resume), and it goes on"
        )
        sys.exit(stop.code)
