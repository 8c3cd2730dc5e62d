"""What a volunteer leaves in its run folder: a line per epoch, appended once, and wherever it stops a checkpoint.

Legend: D numbers of all parameters that learn.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, final

import pytest
import torch

from milkglass.collaboration.collaborate import NETWORK, Diary, _in_one_line, _within_an_hour
from milkglass.collaboration.engine import P2PDaemonError
from milkglass.collaboration.replica import Replica
from milkglass.errors import LinkError, MilkglassError, RunError
from milkglass.runs import RunFolder
from tests.collaboration.in_process import recipe_of, replica_of

NUMBERS = 5


def line_of(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "loss": 1 / epoch, "seconds": 0.5}


def folder_of(path: Path) -> RunFolder:
    return RunFolder.create(path / "run", recipe_of(), "digest of the records")


def lines_in(folder: RunFolder) -> list[dict[str, Any]]:
    content = (folder.path / "metrics.jsonl").read_text()
    assert content == "" or content.endswith("\n")
    return [json.loads(line) for line in content.splitlines()]


def checkpoints_in(folder: RunFolder) -> list[int]:
    return sorted(int(file.parent.name) for file in folder.path.glob("checkpoint/*/progress.json"))


@contextmanager
def full_disk(length_bytes: int) -> Iterator[None]:
    """Inside, no file of this process grows beyond that; Python ignores the signal, so that writing fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@final
class Writer:
    """A volunteer that makes steps, and notes them; no network, no training."""

    def __init__(self, folder: RunFolder, *, checkpoints: bool = False) -> None:
        self.folder, self.replica, self.notes = folder, replica_of(NUMBERS), list[str]()
        network = self.replica._party.stage
        task: Any = SimpleNamespace(network=network, test=lambda: {"accuracy": 0.5})
        self.diary = Diary(folder, task, self.replica, self.notes.append, checkpoints=checkpoints)

    def resumed(self) -> Writer:
        """Another process, later."""
        other = Writer(self.folder)
        other.diary.resume()
        return other

    def epochs(self, count: int) -> None:
        """Go on by so many."""
        for _ in range(count):
            step(self.replica)
            self.diary.epoch(line_of(self.replica.epoch))

    def stop(self, error: BaseException) -> None:
        """As that error ends the training."""
        with pytest.raises(type(error)) as caught, self.diary.kept():
            raise error
        assert caught.value is error


def step(replica: Replica) -> None:
    generator = torch.Generator().manual_seed(replica.epoch)
    replica.step(torch.randn(NUMBERS, generator=generator))


# Lines


def test_lines_are_appended(tmp_path: Path) -> None:
    """The file stays the same one, and what is in it is not written again; only its owner may read it."""
    writer = Writer(folder_of(tmp_path))
    writer.epochs(1)
    file = writer.folder.path / "metrics.jsonl"
    number, mode = file.stat().st_ino, file.stat().st_mode
    file.write_bytes(file.read_bytes().replace(b"loss", b"LOSS"))
    writer.epochs(2)
    assert file.stat().st_ino == number
    assert mode & 0o777 == 0o600
    first, *others = lines_in(writer.folder)
    assert "LOSS" in first
    assert others == [line_of(2), line_of(3)]
    assert writer.diary._unwritten == []


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    """It is said once. What had no room comes as soon as there is some, in order."""
    writer = Writer(folder_of(tmp_path))
    writer.epochs(2)
    file = writer.folder.path / "metrics.jsonl"
    before = file.read_bytes()
    with full_disk(len(before) + 7):
        writer.epochs(2)
        assert file.read_bytes() == before
        with pytest.raises(RunError, match=r"cannot write .*metrics\.jsonl: File too large"):
            writer.diary.finish({})
    assert len(writer.notes) == 1
    assert writer.notes[0].endswith("what was written before is whole; going on without checkpoints")
    writer.epochs(1)
    assert lines_in(writer.folder) == [line_of(epoch) for epoch in range(1, 6)]


def test_a_stop_within_a_line_leaves_none_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(folder_of(tmp_path))
    writer.epochs(2)

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", stop)
        with pytest.raises(KeyboardInterrupt):
            writer.epochs(1)
    assert lines_in(writer.folder) == [line_of(1), line_of(2)]
    writer.stop(KeyboardInterrupt())
    assert lines_in(writer.folder) == [line_of(1), line_of(2), line_of(3)]


def test_append_after_a_length(tmp_path: Path) -> None:
    """What is behind it goes; a file that is shorter is gone on with where it ends."""
    folder = folder_of(tmp_path)
    file = folder.path / "metrics.jsonl"
    length = folder.append_metrics([line_of(1), line_of(2)], 0)
    assert length == file.stat().st_size
    with file.open("ab") as opened:
        opened.write(b'{"half')
    assert folder.append_metrics([line_of(3)], length) == file.stat().st_size
    assert lines_in(folder) == [line_of(1), line_of(2), line_of(3)]
    assert folder.append_metrics([], length) == length == file.stat().st_size
    file.unlink()
    assert folder.append_metrics([line_of(4)], length) == file.stat().st_size
    assert lines_in(folder) == [line_of(4)]


def test_cut_to_so_many_lines(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    file = folder.path / "metrics.jsonl"
    with pytest.raises(RunError, match="No such file"):
        folder.cut_metrics(1)
    folder.append_metrics([line_of(epoch) for epoch in (1, 2, 3)], 0)
    with file.open("ab") as opened:
        opened.write(b'{"half')
    with pytest.raises(RunError, match="holds 3 whole lines; expected 4"):
        folder.cut_metrics(4)
    for count in (3, 2, 0):
        assert folder.cut_metrics(count) == file.stat().st_size
        assert lines_in(folder) == [line_of(epoch) for epoch in range(1, count + 1)]


# Stopping and going on


@pytest.mark.parametrize("error", [KeyboardInterrupt(), LinkError("withdrawn"), MilkglassError("diverged")])
def test_whatever_stops_a_run_it_goes_on_from_there(tmp_path: Path, error: BaseException) -> None:
    """Without --checkpoints too; in the end all is as in a run that was not stopped."""
    (tmp_path / "whole").mkdir()
    whole, writer = Writer(folder_of(tmp_path / "whole")), Writer(folder_of(tmp_path))
    whole.epochs(5)
    writer.epochs(2)
    assert checkpoints_in(writer.folder) == []
    writer.stop(error)
    assert checkpoints_in(writer.folder) == [2]
    writer.epochs(1)  # a line that no checkpoint knows of, as after a kill
    resumed = writer.resumed()
    assert resumed.replica.epoch == 2
    assert lines_in(writer.folder) == [line_of(1), line_of(2)]
    resumed.epochs(3)
    resumed.diary.finish({})
    whole.diary.finish({})
    assert resumed.replica.save() == whole.replica.save()
    for name in ("metrics.jsonl", NETWORK, "summary.json"):
        assert (resumed.folder.path / name).read_bytes() == (whole.folder.path / name).read_bytes()
    assert writer.notes + resumed.notes == []


def test_a_checkpoint_is_kept_only_where_there_is_anything_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(folder_of(tmp_path))
    writer.stop(KeyboardInterrupt())
    assert checkpoints_in(writer.folder) == []
    writer.epochs(1)
    writer.stop(KeyboardInterrupt())
    resumed = writer.resumed()
    monkeypatch.setattr(RunFolder, "save_checkpoint", lambda *_: pytest.fail("kept again"))
    writer.stop(KeyboardInterrupt())
    resumed.stop(KeyboardInterrupt())


def test_half_a_step_is_not_kept(tmp_path: Path) -> None:
    """What was kept before stays."""
    writer = Writer(folder_of(tmp_path))
    writer.epochs(1)
    writer.stop(KeyboardInterrupt())
    writer.epochs(1)
    assert writer.replica.version.epoch == 2
    with torch.no_grad():
        next(writer.replica._party.stage.parameters())[0] += 1
    writer.stop(KeyboardInterrupt())
    assert writer.notes == ["stopped in the middle of step 3; stopping without a new checkpoint"]
    assert checkpoints_in(writer.folder) == [1]
    assert writer.resumed().replica.epoch == 1


def test_what_cannot_be_kept_does_not_hide_why_it_stops(tmp_path: Path) -> None:
    writer = Writer(folder_of(tmp_path))
    writer.epochs(2)
    with full_disk((writer.folder.path / "metrics.jsonl").stat().st_size):
        writer.stop(LinkError("withdrawn"))
    (note,) = writer.notes
    assert note.startswith("cannot write ")
    assert note.endswith("; stopping without a new checkpoint")
    assert checkpoints_in(writer.folder) == []


def test_resume_without_a_checkpoint_begins_anew(tmp_path: Path) -> None:
    writer = Writer(folder_of(tmp_path))
    writer.epochs(2)
    resumed = writer.resumed()
    assert resumed.notes == ["no checkpoint here: beginning at epoch 0"]
    resumed.epochs(1)
    assert lines_in(writer.folder) == [line_of(1)]


@pytest.mark.parametrize("damage", ["missing", "shorter", "half a line"])
def test_resume_with_other_lines_than_the_checkpoint_counts(tmp_path: Path, damage: str) -> None:
    writer = Writer(folder_of(tmp_path))
    writer.epochs(3)
    writer.stop(KeyboardInterrupt())
    file = writer.folder.path / "metrics.jsonl"
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if damage == "half a line" else b"".join(content.splitlines(keepends=True)[:2]))
    with pytest.raises(RunError, match=r"checkpoint of epoch 3: damaged .*metrics\.jsonl"):
        writer.resumed()


@pytest.mark.parametrize("lines", [None, -1, "3", 1.5, [line_of(1)]])
def test_resume_with_a_count_that_is_none(tmp_path: Path, lines: object) -> None:
    writer = Writer(folder_of(tmp_path))
    writer.epochs(3)
    writer.stop(KeyboardInterrupt())
    writer.folder.write_json("checkpoint/0003/progress.json", {"lines": lines})
    with pytest.raises(RunError, match="checkpoint of epoch 3: damaged"):
        writer.resumed()
    assert len(lines_in(writer.folder)) == 3


def test_finish_of_one_that_made_no_step(tmp_path: Path) -> None:
    """It came at the end and took over the state: no line, but the file is there."""
    writer = Writer(folder_of(tmp_path))
    writer.diary.finish({})
    assert lines_in(writer.folder) == []


# The daemon


@pytest.mark.parametrize(
    "error",
    [P2PDaemonError("no route\nat all"), ConnectionResetError("reset"), asyncio.IncompleteReadError(b"", 4)],
)
def test_a_failed_call_is_told_in_one_line(error: Exception) -> None:
    with pytest.raises(LinkError, match="a call of it failed") as caught, _in_one_line():
        raise error
    assert "\n" not in str(caught.value)


def test_restarts_of_the_last_hour_count() -> None:
    assert _within_an_hour([0.0]) == [0.0]
    assert _within_an_hour([0.0, 10.0, 3599.0]) == [0.0, 10.0, 3599.0]
    assert _within_an_hour([0.0, 10.0, 3605.0, 3606.0]) == [10.0, 3605.0, 3606.0]
