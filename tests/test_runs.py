"""A run folder is whole, or says what is wrong with it; nothing is overwritten and nothing is lost."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from milkglass.errors import RunError
from milkglass.runs import Checkpoint, RunFolder
from tests.helpers import small_recipe

DIGEST = "0" * 64


def test_a_new_folder_holds_the_resolved_recipe(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "a" / "b", small_recipe(), DIGEST)
    text = (folder.path / "recipe.toml").read_text()
    assert folder.path.stat().st_mode & 0o077 == 0  # the client's weights will lie here
    assert f'torch = "{torch.__version__}' in text
    assert "seed = 0" in text
    assert RunFolder.resume(folder.path, small_recipe(), DIGEST).recipe.digest() == small_recipe().digest()


def test_folders_that_exist(tmp_path: Path) -> None:
    recipe = small_recipe()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="a file of that name"):
        RunFolder.create(tmp_path / "file", recipe, DIGEST)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    for make in (RunFolder.create, RunFolder.resume):
        with pytest.raises(RunError, match=r"other files|not a run"):
            make(tmp_path / "other", recipe, DIGEST)
    folder = RunFolder.create(tmp_path / "run", recipe, DIGEST)
    with pytest.raises(RunError, match="stopped; go on with --resume"):
        RunFolder.create(folder.path, recipe, DIGEST)
    folder.write_json("summary.json", {})
    with pytest.raises(RunError, match="finished run; choose another --out"):
        RunFolder.create(folder.path, recipe, DIGEST)
    with pytest.raises(RunError, match="another recipe: seed is 1 here and 0 there"):
        RunFolder.resume(folder.path, small_recipe(seed=1), DIGEST)
    (tmp_path / "empty").mkdir()
    RunFolder.create(tmp_path / "empty", recipe, DIGEST)


def test_half_written_and_damaged_folders(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such folder"):
        RunFolder.open_finished(tmp_path / "none")
    folder = RunFolder.create(tmp_path / "run", small_recipe(), DIGEST)
    with pytest.raises(RunError, match=r"half-written, bottom\.safetensors is missing"):
        RunFolder.open_finished(folder.path)
    (folder.path / "x.safetensors").write_bytes(b"\x00" * 9)
    with pytest.raises(RunError, match="damaged, not a safetensors file"):
        folder.read_tensors("x.safetensors")
    (folder.path / "x.json").write_text("{")
    with pytest.raises(RunError, match="damaged, not JSON"):
        folder.read_json("x.json")
    (folder.path / "x.json").write_text("[]")
    with pytest.raises(RunError, match="expected a JSON object"):
        folder.read_json("x.json")
    with pytest.raises(RunError, match="No such file"):
        folder.read_json("none.json")


def _checkpoint(epoch: int) -> Checkpoint:
    return Checkpoint(epoch, {"client": {"w": torch.full((3,), float(epoch))}}, {"metrics": [epoch]})


def test_the_newest_complete_checkpoint_counts(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", small_recipe(), DIGEST)
    assert folder.load_checkpoint() is None
    folder.save_checkpoint(_checkpoint(1))
    folder.save_checkpoint(_checkpoint(2))
    folder.write_tensors("checkpoint/0003/client.safetensors", {"w": torch.zeros(3)})  # stopped before progress.json
    found = folder.load_checkpoint()
    assert found is not None
    assert found.number == 2
    assert torch.equal(found.parties["client"]["w"], torch.full((3,), 2.0))
    assert [path.name for path in (folder.path / "checkpoint").iterdir() if path.name == "0001"] == []


def test_out_of_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path / "run", small_recipe(), DIGEST)
    folder.save_checkpoint(_checkpoint(1))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left on device; what was written before is whole"):
        folder.save_checkpoint(_checkpoint(2))
    monkeypatch.undo()
    found = folder.load_checkpoint()
    assert found is not None
    assert found.number == 1
    assert not list(folder.path.rglob("*.partial"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=64k tmpfs {disk} 2>/dev/null") != 0:
        pytest.skip("mounting a small file system is not allowed here, even to root")
    try:
        folder = RunFolder.create(disk / "run", small_recipe(), DIGEST)
        folder.write_tensors("small.safetensors", {"w": torch.zeros(100)})
        with pytest.raises(RunError, match="No space left on device"):
            folder.write_tensors("large.safetensors", {"w": torch.zeros(100_000)})
        assert sorted(path.name for path in folder.path.iterdir()) == [
            "recipe.toml",
            "records.sha256",
            "small.safetensors",
        ]
    finally:
        os.system(f"umount {disk}")
