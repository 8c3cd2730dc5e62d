"""The commands. Each is thin: it reads its arguments, calls one function, prints what also stands in a JSON file."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from typer.core import TyperCommand

from milkglass.errors import MilkglassError

EXIT_BAD_INPUT: Final = 2
EXIT_BY_VERDICT: Final = {"within budget": 0, "no budget set": 0, "over budget": 3, "inconclusive": 4}

app = typer.Typer(
    help="Train and serve deep networks across organizations without showing the data, and measure what is shown.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, in TOML.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a field of the recipe; repeatable.")
]


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
    """Train a network in two halves, in this process, as the recipe says."""
    from milkglass.progress import TrainingProgress
    from milkglass.randomness import read_key
    from milkglass.recipe import load_recipe
    from milkglass.training.split import train as train_recipe

    loaded = load_recipe(recipe, overrides or ())
    source = read_key(key) if key is not None else None
    if key is not None and key.stat().st_mode & 0o077:
        _say(f"milkglass: warning: key {key} can be read by others; chmod 600 {key}")
    out = out or Path("runs") / recipe.stem
    with TrainingProgress(loaded.training.epochs) as progress:
        summary = train_recipe(loaded, out, source, resume=resume, progress=progress)
    for caution in summary["cautions"]:
        _say(f"milkglass: note: {caution}")
    dependence = summary["distance_correlation"]
    print(
        f"{out}: defense {summary['defense']}; accuracy {summary['accuracy']:.3f}, distance correlation "
        f"(squared, unbiased) {dependence['squared_unbiased']:.3f}, {summary['bytes_sent']:,} bytes sent, "
        f"{summary['bytes_received']:,} received in {summary['messages']:,} messages; {summary['keys']}"
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
        found, content = audit_run(
            run, plan, reference=reference, out=out, training=TrainingProgress, watching=AuditProgress
        )
    subject = run or activations
    for note in found.notes:
        print(f"{subject}: {note}")
    for left in found.skipped:
        name = "" if left.attack in left.why else f"{left.attack}: "
        print(f"{subject}: left out on {left.exposure} records: {name}{left.why}")
    for name, measure in found.measures.items():
        if name != "peek":
            print(f"{subject}: {name} {measure.value:.3f}, 95 % interval {measure.low:.3f} to {measure.high:.3f}")
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
    from milkglass.training.setup import deal_records

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
        write_beside(json_file, json.dumps({"cuts": [asdict(cost) for cost in costs]}, indent=2).encode())
    _print(table)
    print("FLOPs: multiplications and additions of matrix products and convolutions, forward, for one record.")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a folder of run folders.")],
) -> None:
    """Write report.html, one page without any outside part, and print its table."""
    from milkglass.report import read_results, table, write_report

    page = write_report(run)
    _print(table(read_results(run)))
    print(page)


Tls = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="This party's certificates: rootCA.pem, and server (or client) .crt and .key."),
]
PlainText = Annotated[bool, typer.Option("--plaintext", help="No encryption, no names checked: on loopback alone.")]


@app.command()
def certs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where they go, a folder for each party.")],
    server: Annotated[str, typer.Option(metavar="HOST", help="The name under which clients reach the server.")],
    client: Annotated[list[str], typer.Option(metavar="NAME", help="A client; repeatable.")],
    days: Annotated[int, typer.Option(help="How long they hold.")] = 365,
) -> None:
    """Make a private certificate authority and a certificate for each party, for trials."""
    from milkglass.certificates import certs as make

    for line in make(folder, server, client, days=days):
        print(line)


@app.command()
def serve(
    recipe: RecipePath,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where clients dial in; port 0: a free one.")],
    tls: Tls = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="The server's folder; default runs/<recipe>-server.")
    ] = None,
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="The server's private key; default: made.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier run was stopped.")] = False,
    onward: Annotated[
        str | None, typer.Option("--onward", metavar="HOST:PORT", help="For a hop: where the next party listens.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="For a hop: which; default: the certificate's.")
    ] = None,
    metrics: Annotated[int | None, typer.Option(metavar="PORT", help="Prometheus metrics at 127.0.0.1:PORT.")] = None,
    plaintext: PlainText = False,
) -> None:
    """Be the server of a training between machines: wait for the recipe's clients, and train with them."""
    from milkglass.logs import party_log
    from milkglass.recipe import load_recipe
    from milkglass.training.serve import Onward, follow
    from milkglass.training.serve import serve as serve_recipe
    from milkglass.training.sharded import following

    loaded = load_recipe(recipe, overrides or ())
    if following():
        follow(loaded)
        return
    credentials = _credentials("server", tls, plaintext, listen)
    hop = None
    if onward is not None:
        hop = name or (credentials.name if credentials is not None else "")
        if plaintext:
            _credentials("client", tls, plaintext, onward)
    log = party_log(hop or loaded.parties.server)
    watch = None
    if metrics is not None:
        from milkglass.metrics import PrometheusWatch

        watch = PrometheusWatch(metrics)
        log("metrics", address=f"http://127.0.0.1:{watch.port}/metrics")
    summary = serve_recipe(
        loaded,
        listen,
        credentials,
        out or Path("runs") / f"{recipe.stem}-{hop or 'server'}",
        onward=None if onward is None or hop is None else Onward(hop, onward, credentials, log),
        key=key,
        resume=resume,
        log=log,
        watch=watch,
        ready=lambda port: log("ready", port=port),
    )
    print(f"{summary['party']}: trained with {', '.join(summary['clients'])}; {summary['messages']:,} messages")


@app.command()
def join(
    recipe: RecipePath,
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the server listens.")],
    tls: Tls = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Which client; default: the certificate's.")] = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="The client's folder; default runs/<recipe>-<name>.")
    ] = None,
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="The client's private key; default: made.")] = None,
    shared_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With several clients: the key that they share, not the server.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier run was stopped.")] = False,
    plaintext: PlainText = False,
) -> None:
    """Be a client of a training between machines: dial out to the server, and train with one's own records."""
    from milkglass.errors import RecipeError
    from milkglass.logs import party_log
    from milkglass.progress import TrainingProgress
    from milkglass.recipe import load_recipe
    from milkglass.training.join import join as join_recipe

    loaded = load_recipe(recipe, overrides or ())
    credentials = _credentials("client", tls, plaintext, server)
    name = name or (credentials.name if credentials is not None else None)
    if name is None:
        raise RecipeError("--name NAME: expected, where no certificate says who this client is")
    if credentials is not None and credentials.name != name:
        raise RecipeError(f"--name {name}: the certificate is {credentials.name}'s; a party has its certificate's name")
    out = out or Path("runs") / f"{recipe.stem}-{name}"
    with TrainingProgress(loaded.training.epochs) as progress:
        summary = join_recipe(
            loaded,
            name,
            server,
            credentials,
            out,
            key=key,
            shared_key=shared_key,
            resume=resume,
            progress=progress,
            log=party_log(name),
        )
    for caution in summary["cautions"]:
        _say(f"milkglass: note: {caution}")
    accuracy = "" if summary["accuracy"] is None else f"accuracy {summary['accuracy']:.3f}, "
    print(
        f"{out}: defense {summary['defense']}; {accuracy}"
        f"{summary['bytes_sent']:,} bytes sent, {summary['bytes_received']:,} received in "
        f"{summary['messages']:,} messages; {summary['keys']}"
    )


def _credentials(role: Any, tls: Path | None, plaintext: bool, address: str) -> Any:
    """The party's certificate and key; None for plain text, which is refused anywhere but on loopback."""
    from milkglass.certificates import load_credentials
    from milkglass.errors import LinkError

    host = address.rpartition(":")[0]
    if plaintext:
        if tls is not None or host not in ("localhost", "127.0.0.1", "[::1]"):
            raise LinkError(f"--plaintext with {address}: only on loopback (127.0.0.1), and without --tls")
        return None
    if tls is None:
        raise LinkError("--tls DIR: expected a folder of certificates; `milkglass certs` makes some for trials")
    credentials = load_credentials(tls, role)
    for caution in credentials.cautions:
        _say(f"milkglass: warning: {caution}")
    return credentials


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; bad input ends in one line on the error stream and exit code 2."""
    sys.path.append(str(Path.cwd()))  # a recipe may name a network of the user's own, `package.module:function`
    try:
        app(arguments)
    except MilkglassError as error:
        _say(f"milkglass: {error}")
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        _say("milkglass: stopped; nothing finished is lost: run it again (train: with --resume), and it goes on")
        sys.exit(130)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _print(what: Any) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a log has no width of its own
    console.print(what)
