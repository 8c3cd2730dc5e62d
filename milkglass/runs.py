"""The run folder: recipe, metrics, each party's weights, checkpoints. Files are written beside and renamed.

recipe.toml            resolved, with the versions of the packages that made the run
records.sha256         what the dealt records hash to: nobody goes on with, or audits, others
metrics.jsonl          a line per epoch
checkpoint/0007/       the newest complete epoch: a file per party, and progress.json; resume starts here
bottom.safetensors     the client's half          top.safetensors   the server's
records.json           what records are like, and how a table's columns were converted: what `predict` needs
summary.json           written last: a folder that has it is a finished run
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, final

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from milkglass.errors import HijackError, RunError, first_line
from milkglass.recipe import Recipe, first_difference, load_recipe

_VERSIONED = ("milkglass", "torch", "numpy", "scipy", "scikit-learn")


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from: each party's tensors by its name, and the run's progress so far.

    number: counts up; of the epoch, or between machines of the messages so far.
    """

    number: int
    parties: Mapping[str, Mapping[str, Tensor]]
    progress: Mapping[str, Any]


@final
class RunFolder:
    """One run on disk. Make one with `create`, `resume` or `open_finished`."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self.recipe = recipe

    @classmethod
    def create(cls, path: Path, recipe: Recipe, records_digest: str) -> RunFolder:
        """A new folder at `path`. Raises RunError if something is there already: nothing is overwritten.

        records_digest: what the dealt records hash to, so that nobody goes on, or audits, with other ones.
        """
        if path.exists():
            if not path.is_dir():
                raise RunError(f"run folder {path}: a file of that name exists; choose another --out")
            if (path / "summary.json").exists():
                raise RunError(f"run folder {path}: holds a finished run; choose another --out, or remove it")
            if (path / "recipe.toml").exists():
                raise RunError(f"run folder {path}: holds a run that was stopped; go on with --resume, or remove it")
            if _files_in(path):
                raise RunError(f"run folder {path}: exists and holds other files; choose another --out")
        folder = cls(path, recipe)
        versions = {name: _version(name) for name in _VERSIONED}
        # the first file makes the folder, closed to others: it will hold the client's weights
        folder.write("records.sha256", records_digest.encode())
        folder.write("recipe.toml", recipe.model_copy(update={"versions": versions}).to_toml().encode())
        return folder

    @classmethod
    def resume(cls, path: Path, recipe: Recipe, records_digest: str) -> RunFolder:
        """The folder of a run that was stopped, or a new one where there is none.

        Raises RunError if the folder is not a run, or a run of another recipe; it says which key differs.
        """
        if not path.exists() or (path.is_dir() and not _files_in(path)):
            return cls.create(path, recipe, records_digest)
        found = _read_recipe(path)
        difference = first_difference(recipe, found)
        if difference is not None:
            raise RunError(f"run folder {path}: belongs to another recipe: {difference}")
        folder = cls(path, recipe)
        folder.check_records(records_digest)
        return folder

    @classmethod
    def open_finished(cls, path: Path, needed: Sequence[str] | None = None) -> RunFolder:
        """The folder of a finished run. Raises RunError if there is none, or if it is half-written.

        needed: the files that must be there; by default those of a run in one process.
        """
        folder = cls(path, _read_recipe(path))
        if not folder.recipe.parties.is_split:
            raise RunError(
                f"run folder {path}: its parties.mode is {folder.recipe.parties.mode}: nothing was split there, "
                "and nothing crossed a cut; expected a run of split training (`milkglass compare` attacks other ways)"
            )
        missing = [name for name in needed or FINISHED if not (path / name).is_file()]
        if missing:
            raise RunError(f"run folder {path}: half-written, {missing[0]} is missing; finish it with --resume")
        return folder

    @property
    def records_digest(self) -> str:
        """What the records of this run hash to."""
        try:
            return (self.path / "records.sha256").read_text()
        except (OSError, UnicodeDecodeError):
            raise RunError(f"run folder {self.path}: half-written: records.sha256 is missing or damaged") from None

    def check_records(self, records_digest: str) -> None:
        """Raise RunError if the run was made from other records than those that hash to `records_digest`."""
        if self.records_digest != records_digest:
            raise RunError(
                f"run folder {self.path}: the records are not those that the run began with; "
                "expected the same data files, with the same content"
            )

    def check_alarm(self) -> None:
        """Raise HijackError if a guard of the client stopped this run, until a person has removed its word."""
        if (self.path / ALARM).exists():
            said = (self.path / ALARM).read_text("utf-8", errors="replace")
            raise HijackError(f"{self.path} was stopped by its guard, and {ALARM} must be removed to go on: {said}")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process trains in this folder. Raises RunError if one does already."""
        with (self.path / "recipe.toml").open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(f"run folder {self.path}: another process is training in it; wait for it") from None
            yield

    @property
    def finished(self) -> bool:
        """Whether the run was trained to its end."""
        return (self.path / "summary.json").is_file()

    @property
    def accuracy(self) -> float:
        """The finished run's accuracy on test records, 0..1."""
        accuracy = self.read_json("summary.json").get("accuracy")
        if not isinstance(accuracy, float | int):
            raise RunError(f"{self.path / 'summary.json'}: damaged, accuracy is {accuracy!r}; expected a number")
        return float(accuracy)

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all."""
        write_beside(self.path / name, content)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file, whole or not at all."""
        self.write(name, (json.dumps(content, indent=2) + "\n").encode())

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a safetensors file, whole or not at all."""
        self.write(name, tensors_as_bytes(tensors))

    def write_metrics(self, lines: list[dict[str, Any]]) -> None:
        """Write metrics.jsonl anew, a line per epoch."""
        self.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())

    def append_metrics(self, lines: Sequence[Mapping[str, Any]], length_bytes: int) -> int:
        """Write further lines of metrics.jsonl after its first `length_bytes`, all or none; its length then, in bytes.

        What is behind that length, as after a stop between two statements, is cut off. Raises RunError.
        """
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        return _write_after(self.path / "metrics.jsonl", length_bytes, content)

    def cut_metrics(self, lines: int) -> int:
        """Keep the first `lines` of metrics.jsonl; its length then, in bytes. Raises RunError where it has fewer."""
        if lines == 0:
            self.write_metrics([])
            return 0
        path, found, length_bytes = self.path / "metrics.jsonl", 0, 0
        try:
            with path.open("r+b") as file:
                for line in itertools.islice(file, lines):
                    found, length_bytes = found + line.endswith(b"\n"), length_bytes + len(line)
                if found < lines:
                    raise RunError(f"{path}: holds {found} whole lines; expected {lines}")
                file.truncate(length_bytes)
        except OSError as error:
            raise RunError(f"{path}: {error.strerror or error}") from None
        return length_bytes

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object of this run. Raises RunError if it is missing or damaged."""
        try:
            content = json.loads((self.path / name).read_bytes())
        except OSError as error:
            raise RunError(f"{self.path / name}: {error.strerror or error}") from None
        except ValueError as error:
            raise RunError(f"{self.path / name}: damaged, not JSON: {error}") from None
        if not isinstance(content, dict):
            raise RunError(f"{self.path / name}: damaged, expected a JSON object")
        return content

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """A safetensors file of this run. Raises RunError if it is missing or damaged."""
        try:
            return load_tensors((self.path / name).read_bytes())
        except OSError as error:
            raise RunError(f"{self.path / name}: {error.strerror or error}") from None
        except SafetensorError as error:
            raise RunError(f"{self.path / name}: damaged, not a safetensors file: {error}") from None

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint, then forget the one before."""
        name = f"checkpoint/{checkpoint.number:04d}"
        for party, tensors in checkpoint.parties.items():
            self.write_tensors(f"{name}/{party}.safetensors", tensors)
        self.write_json(
            f"{name}/progress.json", checkpoint.progress
        )  # last: its presence makes the checkpoint complete
        for older in (self.path / "checkpoint").iterdir():
            if older.is_dir() and older.name != f"{checkpoint.number:04d}":
                shutil.rmtree(older, ignore_errors=True)

    def load_checkpoint(self) -> Checkpoint | None:
        """The newest complete one, or None if there is none."""
        complete = [file.parent for file in (self.path / "checkpoint").glob("*/progress.json")]
        if not complete:
            return None
        strange = [folder.name for folder in complete if not folder.name.isdecimal()]
        if strange:
            raise RunError(
                f"run folder {self.path}: checkpoint/{strange[0]} is not a checkpoint; expected a number such as 0007"
            )
        newest = max(complete, key=lambda folder: int(folder.name))
        name = newest.relative_to(self.path)
        files = sorted(newest.glob("*.safetensors"))
        parties = {file.name.removesuffix(".safetensors"): self.read_tensors(f"{name}/{file.name}") for file in files}
        return Checkpoint(int(newest.name), parties, self.read_json(f"{name}/progress.json"))


def damaged(checkpoint: Checkpoint, error: Exception) -> RunError:
    """What to raise where a checkpoint cannot be gone on from, and why."""
    return RunError(
        f"checkpoint of epoch {checkpoint.number}: damaged or half-written ({first_line(error)}); "
        "remove the checkpoint folder to begin anew"
    )


def _files_in(path: Path) -> bool:
    """Whether a folder holds anything but what a stopped start left."""
    return any(not file.name.endswith(".partial") and file.name != "records.sha256" for file in path.iterdir())


def tensors_as_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a safetensors file."""
    return save_tensors({key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()})


def write_beside(target: Path, content: bytes) -> None:
    """Write a file beside and rename it: it is whole, or as it was before. Raises RunError, such as for a full disk."""
    beside = None
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, beside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial")
        with os.fdopen(descriptor, "wb") as file:  # readable by its owner alone, as mkstemp makes it
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(beside).replace(target)
    except OSError as error:
        if beside is not None:
            with contextlib.suppress(OSError):
                Path(beside).unlink(missing_ok=True)
        raise RunError(f"cannot write {target}: {error.strerror or error}; what was written before is whole") from None


def _write_after(target: Path, length_bytes: int, content: bytes) -> int:
    """Write after the first `length_bytes` of a file, whole or not at all; its length then, in bytes."""
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            kept = min(length_bytes, os.fstat(descriptor).st_size)
            try:
                os.ftruncate(descriptor, kept)
                os.lseek(descriptor, kept, os.SEEK_SET)
                rest = memoryview(content)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                os.fsync(descriptor)
            except BaseException:
                os.ftruncate(descriptor, kept)
                raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise RunError(f"cannot write {target}: {error.strerror or error}; what was written before is whole") from None
    return kept + len(content)


ALARM = "alarm.txt"
FINISHED = ("bottom.safetensors", "top.safetensors", "metrics.jsonl", "summary.json")


def _read_recipe(path: Path) -> Recipe:
    if not path.is_dir():
        raise RunError(f"run folder {path}: no such folder")
    if not (path / "recipe.toml").is_file():
        raise RunError(f"run folder {path}: not a run, or half-written: recipe.toml is missing")
    return load_recipe(path / "recipe.toml")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed as a package"
