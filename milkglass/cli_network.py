"""The commands between machines: certs, serve, join, predict; and what all commands share. `cli.py` registers them."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, in TOML.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a field of the recipe; repeatable.")
]
Tls = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="This party's certificates: rootCA.pem, and server (or client) .crt and .key."),
]
PlainText = Annotated[bool, typer.Option("--plaintext", help="No encryption, no names checked: on loopback alone.")]


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
    answers: Annotated[
        bool, typer.Option("--predict", help="Train no more: answer the clients of the finished run at --out.")
    ] = False,
    metrics: Annotated[int | None, typer.Option(metavar="PORT", help="Prometheus metrics at 127.0.0.1:PORT.")] = None,
    plaintext: PlainText = False,
) -> None:
    """Be the server of a training between machines: wait for the recipe's clients, and train with them.

    With --predict: answer their questions with what was trained, until it is stopped.
    """
    from milkglass.errors import RecipeError
    from milkglass.logs import party_log, quiet_grpc
    from milkglass.transports.address import checked_address

    checked_address(listen, "--listen", free_port=True)
    if onward is not None:
        checked_address(onward, "--onward")
    quiet_grpc()
    from milkglass.recipe import load_recipe
    from milkglass.training.serve import Onward, follow
    from milkglass.training.serve import serve as serve_recipe
    from milkglass.training.sharded import following, shared_out

    loaded = load_recipe(recipe, overrides or ())
    if onward is not None and not loaded.parties.hops:
        raise RecipeError("--onward: the recipe has no hops; expected parties.hops, and this party's name in it")
    if answers and shared_out():
        raise RecipeError("--predict: one process answers; start it without torchrun")
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
    out = out or Path("runs") / f"{recipe.stem}-{hop or 'server'}"
    if answers:
        if key is not None or resume or onward is not None:
            raise RecipeError("--predict: goes without --key, --resume and --onward; nothing is trained")
        _answer(loaded, listen, credentials, out, log, _watch(metrics, log))
        return
    warn_of_key(key)
    summary = serve_recipe(
        loaded,
        listen,
        credentials,
        out,
        onward=None if onward is None or hop is None else Onward(hop, onward, credentials, log),
        key=key,
        resume=resume,
        log=log,
        watch=_watch(metrics, log),
        ready=lambda port: log("ready", port=port),
    )
    print(f"{summary['party']}: trained with {', '.join(summary['clients'])}; {summary['messages']:,} messages")


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
    from milkglass.logs import party_log, quiet_grpc
    from milkglass.transports.address import checked_address

    checked_address(server, "--server")
    quiet_grpc()
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
    for file in (key, shared_key):
        warn_of_key(file)
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
        say(f"milkglass: note: {caution}")
    accuracy = "" if summary["accuracy"] is None else f"accuracy {summary['accuracy']:.3f}, "
    print(
        f"{out}: defense {summary['defense']}; {accuracy}"
        f"{summary['bytes_sent']:,} bytes sent, {summary['bytes_received']:,} received in "
        f"{summary['messages']:,} messages; {summary['keys']}"
    )


def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A client's run folder, or one that holds both halves.")],
    given: Annotated[
        Path, typer.Argument(metavar="INPUT", help="Records: a .npy array, or data as the recipe's (.npz, parquet).")
    ],
    server: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where `serve --predict` listens; without it all is here.")
    ] = None,
    tls: Tls = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Class and probabilities of every record: .csv or .jsonl.")
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Records in a message.")] = 256,
    plaintext: PlainText = False,
) -> None:
    """Classify records across the cut, with the run's defense on; RUN/predictions.json holds what is printed."""
    from rich.table import Table

    from milkglass.errors import LinkError
    from milkglass.logs import party_log, quiet_grpc
    from milkglass.transports.address import checked_address

    if server is not None:
        checked_address(server, "--server")
    quiet_grpc()
    from milkglass.progress import PredictionProgress
    from milkglass.training.predict import predict as predict_records

    if server is None and (tls is not None or plaintext):
        raise LinkError("--tls and --plaintext go with --server HOST:PORT")
    credentials = None if server is None else _credentials("client", tls, plaintext, server)
    with PredictionProgress() as progress:
        summary = predict_records(
            run,
            given,
            address=server,
            credentials=credentials,
            batch=batch,
            out=out,
            log=party_log(credentials.name if credentials is not None else "client"),
            on_records=progress.records,
        )
    table = Table("record", "class", "probability", *(["label"] if summary["accuracy"] is not None else []))
    for row in summary["first"]:
        table.add_row(
            str(row["record"]),
            str(row["class"]),
            f"{row['probability']:.3f}",
            *([str(row["label"])] if "label" in row else []),
        )
    show(table)
    counts = ", ".join(f"{count:,} of class {k}" for k, count in enumerate(summary["classes"]) if count)
    accuracy = "" if summary["accuracy"] is None else f"; accuracy {summary['accuracy']:.3f}"
    print(
        f"{run}: {summary['records']:,} records: {counts}{accuracy}; defense {summary['defense']}; "
        f"{summary['bytes_sent']:,} bytes sent, {summary['bytes_received']:,} received in "
        f"{summary['messages']:,} messages{'' if out is None else f'; every record: {out}'}"
    )


def _watch(port: int | None, log: Any) -> Any:
    """Prometheus metrics at that port of the loopback, where one is named."""
    if port is None:
        return None
    from milkglass.metrics import PrometheusWatch

    watch = PrometheusWatch(port)
    log("metrics", address=f"http://127.0.0.1:{watch.port}/metrics")
    return watch


def _answer(recipe: Any, listen: str, credentials: Any, out: Path, log: Any, watch: Any) -> None:
    from milkglass.training.answer import answer

    summary = answer(recipe, listen, credentials, out, log=log, watch=watch, ready=lambda port: log("ready", port=port))
    asked = ", ".join(f"{name} {count['records']:,}" for name, count in summary["clients"].items())
    print(f"{summary['party']}: answered {summary['messages']:,} messages; records by client: {asked}")


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
        say(f"milkglass: warning: {caution}")
    return credentials


def warn_of_key(key: Path | None) -> None:
    """Say so where a key file can be read by others; one that is not there is told by whoever reads it."""
    with suppress(OSError):
        if key is not None and key.stat().st_mode & 0o077:
            say(f"milkglass: warning: key {key} can be read by others; chmod 600 {key}")


def say(line: str) -> None:
    """A line on the error stream."""
    print(line, file=sys.stderr)


def show(what: Any) -> None:
    """A table, as wide as the terminal, or as a log takes it."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a log has no width of its own
    console.print(what)
