"""The commands of federated rounds between machines: federated-serve, federated-join. `cli.py` registers them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from milkglass.cli_network import Overrides, RecipePath, say, warn_of_key

_Tls = Annotated[
    Path, typer.Option(metavar="DIR", help="This party's certificates: rootCA.pem, and server (or client) .crt, .key.")
]


def federated_serve(
    recipe: RecipePath,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where clients dial in; port 0: a free one.")],
    tls: _Tls,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="The server's folder; default runs/<recipe>-server.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier run was stopped.")] = False,
) -> None:
    """Be the server of federated rounds between machines, on Flower: average the clients' weights.

    Clients show certificates of the same CA, with names of the recipe. No code is sent to them.
    """
    from milkglass.logs import party_log, quiet_grpc
    from milkglass.transports.address import checked_address

    checked_address(listen, "--listen", free_port=True)
    quiet_grpc()
    from milkglass.progress import TrainingProgress
    from milkglass.recipe import load_recipe
    from milkglass.training.federated_serve import federated_serve as serve

    loaded = load_recipe(recipe, overrides or ())
    _warn_of_certificates(tls, "server")
    out = out or Path("runs") / f"{recipe.stem}-server"
    log = party_log(loaded.parties.server)
    with TrainingProgress(loaded.training.epochs) as progress:
        summary = serve(
            loaded,
            listen,
            tls,
            out,
            resume=resume,
            progress=progress,
            log=log,
            ready=lambda port: log("ready", port=port),
        )
    crossed = summary["http_bytes"]
    print(
        f"{out}: {summary['rounds']} rounds with {summary['clients']} clients; {_accuracy(summary)}"
        f"{crossed['bytes_sent']:,} bytes from clients, {crossed['bytes_received']:,} to them"
    )


def federated_join(
    recipe: RecipePath,
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the server listens.")],
    tls: _Tls,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Which client; default: the certificate's.")] = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="The client's folder; default runs/<recipe>-<name>.")
    ] = None,
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="The client's private key; default: made.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier run was stopped.")] = False,
) -> None:
    """Be a client of federated rounds between machines, on Flower: train on one's own records, send weights.

    What runs here is this milkglass, whatever the server sends.
    """
    from milkglass.logs import party_log, quiet_grpc
    from milkglass.transports.address import checked_address

    checked_address(server, "--server")
    quiet_grpc()
    from milkglass.progress import TrainingProgress
    from milkglass.recipe import load_recipe
    from milkglass.training.federated_join import federated_join as join

    loaded = load_recipe(recipe, overrides or ())
    name = name or _warn_of_certificates(tls, "client").name
    out = out or Path("runs") / f"{recipe.stem}-{name}"
    warn_of_key(key)
    with TrainingProgress(loaded.training.epochs) as progress:
        summary = join(loaded, name, server, tls, out, key=key, resume=resume, progress=progress, log=party_log(name))
    print(
        f"{out}: {summary['rounds']} rounds; {_accuracy(summary)}{summary['bytes_sent']:,} bytes sent, "
        f"{summary['bytes_received']:,} received; {summary['keys']}"
    )


def _warn_of_certificates(tls: Path, role: Any) -> Any:
    """The party's certificate, checked; a line for what is allowed and should be mended."""
    from milkglass.certificates import load_credentials

    credentials = load_credentials(tls, role)
    for caution in credentials.cautions:
        say(f"milkglass: warning: {caution}")
    return credentials


def _accuracy(summary: dict[str, Any]) -> str:
    return "" if summary["accuracy"] is None else f"accuracy {summary['accuracy']:.3f}, "
