"""The folder of a party that is a process of its own: its key, whose run it is, whether anything has happened yet."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

from milkglass.errors import RunError
from milkglass.randomness import Source, read_key, write_key
from milkglass.recipe import Recipe
from milkglass.runs import RunFolder
from milkglass.transports.grpc import RUN_UNKNOWN


def own_folder(out: Path, recipe: Recipe, records_digest: str, *, resume: bool) -> RunFolder:
    """A party's folder: a new one, or with `resume` the one of a run that was stopped.

    What a start has left that came to nothing (no message was taken or sent) is no run yet, and makes way.
    """
    if (out / "recipe.toml").exists() and not _begun(out):
        with RunFolder(out, recipe).locked():
            for name in ("recipe.toml", "records.sha256", "run.json", "onward.json", "records.json", "key"):
                (out / name).unlink(missing_ok=True)
            for journal in ("journal", "onward"):
                shutil.rmtree(out / journal, ignore_errors=True)
    return (RunFolder.resume if resume else RunFolder.create)(out, recipe, records_digest)


def _begun(out: Path) -> bool:
    made = ("checkpoint", "metrics.jsonl", "summary.json", "alarm.txt", "bottom.safetensors", "top.safetensors")
    journals = [file for journal in ("journal", "onward") for file in (out / journal).glob("*")]
    return any((out / name).exists() for name in made) or any(file.stat().st_size for file in journals)


def private_source(folder: RunFolder, key: Path | None) -> Source:
    """The party's private source: of the key named, or of one made in its folder at the start."""
    own = folder.path / "key"
    if key is not None:
        return read_key(key)
    return read_key(own) if own.exists() else write_key(own)


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
    number = folder.read_json("run.json").get("run")
    if not isinstance(number, int):
        raise RunError(f"{folder.path / 'run.json'}: damaged; expected a number")
    return number
