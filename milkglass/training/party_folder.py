"""The folder of a party that is a process of its own: its key, whose run it is, whether anything has happened yet."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path
from typing import Final

from milkglass.errors import RunError
from milkglass.randomness import Source, read_key, write_key
from milkglass.recipe import Recipe
from milkglass.runs import RunFolder
from milkglass.transports.grpc import RUN_UNKNOWN

PARTY: Final = "party.json"
"""Says that a party made this folder, and tells its key from others without telling it."""


def own_folder(out: Path, recipe: Recipe, records_digest: str, *, resume: bool) -> RunFolder:
    """A party's folder: a new one, or with `resume` the one of a run that was stopped.

    What a party's start has left that came to nothing (no message was taken or sent) is no run yet, and makes way for
    another start. A folder that no party made is left as it is.
    """
    if not resume and (out / PARTY).exists() and (out / "recipe.toml").exists() and not _begun(out):
        folder = RunFolder(out, recipe)
        with folder.locked():
            made_key = folder.read_json(PARTY).get("made_key") is True
            mine = ["run.json", "onward.json", "records.json", "records.sha256", PARTY, *(["key"] if made_key else [])]
            for name in [*mine, "recipe.toml"]:
                (out / name).unlink(missing_ok=True)
            for journal in ("journal", "onward"):
                shutil.rmtree(out / journal, ignore_errors=True)
    return (RunFolder.resume if resume else RunFolder.create)(out, recipe, records_digest)


def _begun(out: Path) -> bool:
    made = ("checkpoint", "metrics.jsonl", "summary.json", "alarm.txt", "bottom.safetensors", "top.safetensors")
    journals = [file for journal in ("journal", "onward") for file in (out / journal).glob("*")]
    return any((out / name).exists() for name in made) or any(file.stat().st_size for file in journals)


def private_source(folder: RunFolder, key: Path | None) -> Source:
    """The party's private source: of the key named, or of one made in its folder at the start.

    Raises RunError where the run began under another key: what was sent under one must never be said again under
    another.
    """
    own = folder.path / "key"
    began = folder.read_json(PARTY) if (folder.path / PARTY).exists() else None
    if key is None and began is not None and not own.exists():
        raise RunError(f"run folder {folder.path}: the run began with a key of its own; name it again with --key")
    source = read_key(key) if key is not None else read_key(own) if own.exists() else write_key(own)
    check = source.derive("check").read(16).hex()
    if began is None:
        folder.write_json(PARTY, {"key_check": check, "made_key": key is None})
    elif began.get("key_check") != check:
        raise RunError(f"run folder {folder.path}: the run began under another private key; name that one")
    return source


def known_run(folder: RunFolder, name: str) -> int:
    """The number of the run that a client has been told, and kept in that file; 0 before."""
    if not (folder.path / name).exists():
        return RUN_UNKNOWN
    number = folder.read_json(name).get("run")
    if not isinstance(number, int):
        raise RunError(f"{folder.path / name}: damaged; expected a number")
    return number


def drawn_run(folder: RunFolder) -> int:
    """The number of this run, drawn once: two runs of one recipe differ in it."""
    if not (folder.path / "run.json").exists():
        folder.write_json("run.json", {"run": secrets.randbits(63) + 1})
    return known_run(folder, "run.json")
