"""The main job from end to end, as `make demo` runs it, with fewer epochs and quick audits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from milkglass.cli import main

ROOT = Path(__file__).parents[1]
RUNS = ("undefended", "nopeek", "channel")


def _milkglass(*arguments: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert not stop.value.code, arguments


def _demo_commands() -> list[list[str]]:
    """The commands of the Makefile's demo, so that this test runs what a newcomer runs."""
    makefile = (ROOT / "Makefile").read_text()
    names = dict(re.findall(r"^(UNDEFENDED|NOPEEK|CHANNEL) := (\S+)$", makefile, flags=re.MULTILINE))
    lines = re.findall(r"^\t\$\(VENV\)/milkglass (.*)$", makefile, flags=re.MULTILINE)
    for name, value in names.items():
        lines = [line.replace(f"$({name})", value) for line in lines]
    return [line.replace("'", "").split() for line in lines]


def _score(audit: dict[str, Any], attack: str, exposure: str) -> dict[str, Any]:
    (found,) = (row for row in audit["attacks"] if (row["name"], row["exposure"]) == (attack, exposure))
    return dict(found)


@pytest.mark.slow
def test_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    commands = _demo_commands()
    assert [command[0] for command in commands] == ["train"] * 3 + ["audit"] * 3 + ["report"]
    for command in commands:
        shorter = {"train": ["--set", "training.epochs=8"], "audit": ["--quick"]}.get(command[0], [])
        _milkglass(*command, *shorter)
    audits = {name: json.loads(Path(f"runs/demo/{name}/audit.json").read_text()) for name in RUNS}
    for audit in audits.values():
        assert audit["verdict"] == "no budget set"  # the controls passed
        assert all(control["passed"] for control in audit["controls"].values())
        assert audit["peek"]["high"] == max(found["high"] for found in audit["exposures"].values())
    fresh = {name: _score(audit, "stack", "fresh") for name, audit in audits.items()}
    assert fresh["nopeek"]["peek_high"] < fresh["undefended"]["peek_low"]  # the same attackers, on new records
    assert fresh["nopeek"]["peek_low"] > 0.2  # it does not protect, the channel does: what the README says
    assert fresh["channel"]["peek_high"] < 0.1
    assert audits["channel"]["certificate"]["check"]["agrees"]
    assert audits["nopeek"]["certificate"] is None
    page = Path("runs/demo/report.html")
    assert 10_000 < page.stat().st_size < 3_000_000
    assert Path("runs/demo/nopeek/summary.json").exists()
