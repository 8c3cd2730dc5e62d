"""The installer: what it calls, that it does nothing twice, and that a failure is one line and leaves no half."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from milkglass.errors import MissingExtraError
from milkglass.private import two_party_environment as environment


class Commands:
    """Stands in for `subprocess.run`: remembers what was called; the call with `failing` among its words fails."""

    def __init__(self, failing: str = "nothing") -> None:
        self.called: list[list[str]] = []
        self._failing = failing

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.called.append(command)
        if "venv" in command:
            (Path(command[-1]) / "bin").mkdir(parents=True, exist_ok=True)
            (Path(command[-1]) / "bin" / "python").touch()
        if any(self._failing in word for word in command):
            return subprocess.CompletedProcess(command, 1, "", "Looking\nERROR: No matching distribution\nnotice: hm\n")
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the environment would be; Node is installed and Python is one that SPU has wheels for."""
    monkeypatch.setattr(environment, "environment_folder", lambda: tmp_path / "two-party")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sys, "version_info", (3, 11, 7))
    return tmp_path / "two-party"


def test_it_is_made_once_with_every_package_pinned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands()
    monkeypatch.setattr(subprocess, "run", commands)
    assert environment.make_environment() == folder / "bin" / "python" == environment.find_environment()
    assert commands.called[0] == [sys.executable, "-m", "venv", "--clear", str(folder)]
    installed = [word for word in commands.called[1] if "==" in word]
    assert installed == list(environment.PACKAGES)
    assert {"spu==0.9.5", "jax==0.4.34", "jaxlib==0.4.34", "numpy==1.26.4"} <= set(installed)
    assert not any("torch" in word for word in installed)
    node = json.loads((folder / "garbled" / "package.json").read_text())["dependencies"]
    assert node["emp-wasm"] == "0.3.2"
    assert all(version[0].isdigit() for version in node.values())
    assert environment.find_garbling().is_relative_to(folder)
    called = len(commands.called)
    environment.make_environment()
    assert len(commands.called) == called


@pytest.mark.parametrize(
    ("failing", "words"),
    [("venv", "cannot be made"), ("install", "SPU cannot be installed"), ("import spu", "does not start")],
)
def test_a_failure_is_one_line_and_leaves_nothing_to_be_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failing: str, words: str
) -> None:
    monkeypatch.setattr(subprocess, "run", Commands(failing))
    monkeypatch.setattr(sys, "argv", ["two_party_environment"])
    assert environment.main() == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert words in said
    assert said.endswith("ERROR: No matching distribution\n")
    with pytest.raises(MissingExtraError):
        environment.find_environment()
    monkeypatch.setattr(subprocess, "run", Commands())
    assert environment.main() == 0
    assert environment.find_environment() == folder / "bin" / "python"


def test_another_python_is_refused_before_anything_is_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 13, 1))
    monkeypatch.setattr(subprocess, "run", Commands())
    with pytest.raises(MissingExtraError, match=r"3\.10 and 3\.11, this is 3\.13"):
        environment.make_environment()
    assert not folder.exists()


def test_without_node_only_garbling_is_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", Commands())
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert environment.make_environment() == folder / "bin" / "python"
    assert "Node is not installed" in capsys.readouterr().out
    with pytest.raises(MissingExtraError, match="install Node"):
        environment.find_garbling()
