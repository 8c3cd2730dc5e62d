"""The command of an open collaboration's volunteers: collab. `cli.py` registers it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from milkglass.cli_network import Overrides, RecipePath, say, warn_of_key

if TYPE_CHECKING:
    from milkglass.recipe import Recipe

_LISTEN: Final = "127.0.0.1:0"
_LONGEST_NOTE: Final = 1000


def collab(
    recipe: RecipePath,
    overrides: Overrides = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADDRESS", help="Of a volunteer who is there already; repeatable. None: you are the first."
        ),
    ] = None,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where others reach this one; port 0: a free one.")
    ] = _LISTEN,
    client_mode: Annotated[
        bool, typer.Option("--client-mode", help="Nobody can reach this one (a firewall, say): it only calls others.")
    ] = False,
    auxiliary: Annotated[
        bool, typer.Option("--auxiliary", help="Help to average, and keep the state, without training.")
    ] = False,
    admission: Annotated[
        Path | None, typer.Option(metavar="DIR", help="This volunteer's folder, from collab-authority; default: open.")
    ] = None,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Keep checkpoints and test, every client.checkpoint_seconds.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Only show the run, live, and take no part; JSON lines in a log.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="The run folder; default runs/<recipe's name>.")
    ] = None,
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="The volunteer's private key: 32 raw bytes.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from this folder's checkpoint.")] = False,
) -> None:
    """Train one network together with volunteers (DeDLOC): start a run, or join one by an address.

    Gradients go to strangers: private data do not belong here.
    """
    from milkglass.errors import RecipeError, foreign_line
    from milkglass.recipe import load_recipe

    if watch:
        given = {
            "--listen": listen != _LISTEN,
            "--client-mode": client_mode,
            "--auxiliary": auxiliary,
            "--checkpoints": checkpoints,
            "--out": out is not None,
            "--key": key is not None,
            "--resume": resume,
        }
        for flag in (flag for flag, is_given in given.items() if is_given):
            raise RecipeError(f"--watch only looks on; expected it without {flag}")
    if client_mode and auxiliary:
        raise RecipeError("--auxiliary averages for others, who must reach it; expected it without --client-mode")
    if client_mode and not peer and admission is None:
        raise RecipeError("--client-mode: nobody can come to this one; expected --peer, a volunteer who is there")
    loaded = load_recipe(recipe, overrides or ())
    if not loaded.parties.is_collaboration:
        raise RecipeError(f"recipe {recipe}: parties.mode is {loaded.parties.mode}; expected collaboration")
    if watch:
        _watch(loaded, tuple(peer or ()), admission)
        return
    from milkglass.collaboration.collaborate import collaborate
    from milkglass.collaboration.node import check_address, check_reachable, read_listen
    from milkglass.collaboration.session import Place
    from milkglass.collaboration.token_admission import read_pass
    from milkglass.memory import keep_freed_memory
    from milkglass.randomness import read_key

    place = Place(tuple(map(check_address, peer or ())), read_listen(listen), not client_mode, not auxiliary)
    if place.reachable:
        check_reachable(place.listen, (*place.peers, *(read_pass(admission).addresses if admission else ())))
    source = read_key(key) if key is not None else None
    if key is not None:
        warn_of_key(key)
    keep_freed_memory()
    summary = collaborate(
        loaded,
        out or Path("runs") / recipe.stem,
        place,
        pass_folder=admission,
        key=source,
        checkpoints=checkpoints,
        resume=resume,
        ready=_tell_addresses,
        told=lambda line: _tell_epoch(line, loaded.collaboration.epochs),
        note=lambda words: say(f"milkglass: {foreign_line(words, _LONGEST_NOTE)}"),
    )
    print(
        f"{out or Path('runs') / recipe.stem}: {summary['epochs']} epochs of run {loaded.collaboration.run}; accuracy "
        f"{summary['accuracy']:.3f}; {summary['samples']:,} records of this volunteer, {summary['bytes_sent']:,} bytes "
        f"sent, {summary['bytes_received']:,} received"
    )


def _tell_addresses(addresses: list[str]) -> None:
    for address in addresses:
        print(f"others join with: --peer {address}", flush=True)
    if not addresses:
        say("milkglass: connected; nobody can join by this volunteer")


def _tell_epoch(line: dict[str, Any], epochs: int) -> None:
    say(
        f"milkglass: epoch {line['epoch']} of {epochs}: loss {line['loss']:.4f}, {line['peers']} volunteers, "
        f"{line['group_samples']:,} records, {line['samples']:,} of them from here, {line['seconds']:.1f} s"
    )


def _watch(recipe: Recipe, peers: tuple[str, ...], admission: Path | None) -> None:
    from milkglass.collaboration.watch import watch

    watch(recipe, peers, admission)
