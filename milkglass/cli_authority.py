"""The command of an open collaboration's authority: collab-authority. `cli.py` registers it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

_LONGEST_MINUTES = 60


def collab_authority(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The authority's folder, and a folder per volunteer.")],
    allow: Annotated[
        str | None,
        typer.Option(metavar="NAME[=PEERID],...", help="May take part; with a peer id: keeps a key of its own."),
    ] = None,
    revoke: Annotated[str | None, typer.Option(metavar="NAME,...", help="May take part no more, at once.")] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Give tokens, until stopped. HOST: an IP address.")
    ] = None,
    minutes: Annotated[int, typer.Option(help="How long a token holds.")] = 5,
    run: Annotated[
        str, typer.Option(metavar="NAME", help="Tokens for this collaboration.run alone; default: any.")
    ] = "",
) -> None:
    """Decide who takes part in an open collaboration: keep the list, and give those on it tokens for some minutes.

    The list can be changed by a second command while the first one listens.
    """
    from milkglass.errors import CertificateError

    if allow is None and revoke is None and listen is None:
        raise CertificateError("collab-authority: nothing to do; expected --allow, --revoke or --listen")
    if not 1 <= minutes <= _LONGEST_MINUTES:
        raise CertificateError(f"--minutes {minutes}: expected 1 to {_LONGEST_MINUTES}")
    names = {} if allow is None else _pairs(allow)
    if listen is not None:
        from milkglass.transports.address import checked_address

        checked_address(listen, "--listen")  # no port 0: the address goes into every volunteer's folder
    from milkglass.collaboration.authority import listening_at
    from milkglass.collaboration.authority_folder import allow as allow_names
    from milkglass.collaboration.authority_folder import revoke as revoke_names
    from milkglass.collaboration.tokens import check_run_name

    check_run_name(run)
    place = None if listen is None else listening_at(listen)
    for line in allow_names(folder, names) if names else ():
        print(line)
    for line in revoke_names(folder, _names(revoke, "--revoke")) if revoke is not None else ():
        print(line)
    if place is not None:
        _serve(folder, place, 60.0 * minutes, run)


def _serve(folder: Path, place: tuple[str, int], lifetime_seconds: float, run: str) -> None:
    """Until Ctrl-C or SIGTERM, which raise here."""
    from milkglass.collaboration.authority import reachable_addresses, serve
    from milkglass.errors import LinkError
    from milkglass.logs import party_log

    log = party_log("authority")
    with serve(folder, place, lifetime_seconds=lifetime_seconds, run=run, log=log) as node:
        for address in reachable_addresses(node.addresses):
            print(address, flush=True)
        log("ready", port=place[1])
        while node.alive:
            time.sleep(0.2)
    raise LinkError("the peer-to-peer daemon has ended; start the authority again")


def _pairs(text: str) -> dict[str, str | None]:
    """Names, each with its peer id or None."""
    from milkglass.errors import CertificateError

    pairs: dict[str, str | None] = {}
    for item in _names(text, "--allow"):
        name, equals, peer_id = item.partition("=")
        if name in pairs:
            raise CertificateError(f"--allow {name}: named twice; expected a name of its own, whatever the case")
        pairs[name] = peer_id if equals else None
    return pairs


def _names(text: str, what: str) -> list[str]:
    from milkglass.errors import CertificateError

    names = text.split(",")
    if not all(names):
        raise CertificateError(f"{what} {text!r}: expected names with a comma between, such as alice,bob")
    return names
