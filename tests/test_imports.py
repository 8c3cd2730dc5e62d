"""Imports go downward: no room of the house reaches into one above it.

The line that matters most: an attack that can reach a party can cheat by accident, and report a leak no adversary has.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import milkglass

PACKAGE = Path(milkglass.__file__).parent

# A room, and those right below it. A room may import those, and every lower one that is reached through them.
GRAPH: dict[str, tuple[str, ...]] = {
    "progress": ("client",),
    "report": ("results", "figures", "audit", "compare", "runs"),
    "results": ("figures",),
    "compare_files": (
        *("compare_advice", "compare_cells", "compare_inference", "compare_model", "compare_page", "compare_place"),
        *("compare", "training", "cuts", "runs", "data", "networks"),
    ),
    "compare_cells": ("compare_updates", "compare_processes", "compare_place", "replay", "private", "codec"),
    "compare_inference": ("compare", "compare_place", "replay", "private"),
    "compare_updates": ("compare", "compare_place", "update_audit", "training", "private"),
    "compare_model": ("compare", "costs_figure", "costs_wire", "survey", "charts", "cuts", "data", "networks"),
    "compare_place": ("audit_files", "compare", "training"),
    "compare_processes": ("runs", "training"),
    "compare_page": ("compare_advice", "charts"),
    "compare_advice": ("compare", "figures"),
    "compare": ("recipe", "leakage"),
    "costs_figure": ("costs", "figures"),
    "costs_wire": ("costs",),
    "costs": (),
    "survey": ("costs", "survey_networks", "cuts"),
    "survey_networks": (),
    "update_audit": ("contribution_audit", "inference", "data"),
    "sightings": ("messages",),
    "replay": ("sightings", "client", "server", "training", "runs", "data", "defenses", "attacks", "transcript"),
    "frontier_files": ("frontier", "frontier_figure", "audit_files"),
    "frontier_figure": ("frontier", "figures"),
    "frontier": ("recipe", "verdict"),
    "bounds_files": ("bounds", "bounds_figure", "replay", "results", "verdict"),
    "bounds_figure": ("charts", "figures"),
    "charts": ("figures",),
    "collaboration_audit": ("audit_files", "collaboration", "contribution_audit"),
    "contribution_audit": ("audit_work", "contribution_controls", "findings"),
    "contribution_controls": ("contributions", "controls"),
    "contributions": ("attacks", "compression", "verdict"),
    "audit_files": ("audit", "kept", "recorded", "replay", "verdict"),
    "audit": ("audit_work", "bounds", "defenses", "findings", "inference", "self_test", "verdict"),
    "audit_work": ("attacks", "inference", "transcript"),
    "self_test": ("controls", "findings"),
    "findings": ("attacks", "leakage", "transcript"),
    "kept": ("attacks", "leakage", "runs", "transcript"),
    "recorded": ("transcript",),
    "verdict": ("leakage",),
    "bounds": ("defenses", "leakage", "transcript"),
    "inference": ("attacks", "leakage", "transcript"),
    "controls": ("transcript",),
    "training": (
        *("private", "client", "server", "desk", "sharding", "certificates", "cuts", "compression"),
        *("memory", "transports", "transports.wrappers", "runs", "data", "networks", "recipe"),
    ),
    "collaboration": ("training", "parties", "compression", "cuts", "runs", "recipe", "networks"),
    "attacks": ("transcript", "messages", "leakage", "networks"),
    "hop": ("server", "messages", "transports.base"),
    "sharding": ("rank_links", "server"),
    "rank_links": (),
    "desk": ("defenses", "handover", "hop", "linkage", "recipe", "server", "messages"),
    "client_batch": ("codec", "messages"),
    "client": ("client_batch", "parties", "guards", "hijack", "defenses", "compression", "transports.base"),
    "server": ("parties", "guards", "codec", "messages"),
    "certificates": (),
    "logs": (),
    "memory": (),
    "metrics": (),
    "handover": (),
    "linkage": (),
    "parties": (),
    "guards": ("leakage", "messages"),
    "hijack": ("leakage", "messages"),
    "transports": ("transports.base", "certificates", "compression", "codec", "messages"),
    "transports.base": ("codec", "messages"),
    "transports.wrappers": ("transports", "compression", "transcript"),
    "defenses": ("leakage", "networks"),
    "private": ("federated_section", "flower", "defenses", "networks", "cuts", "messages"),
    "flower": (),
    "runs": ("recipe",),
    "data": ("formats", "records"),
    "formats": ("records",),
    "codec": ("messages",),
    "compression": ("messages",),
    "transcript": ("messages",),
    "cuts": ("messages", "tracing"),
    "tracing": (),
    "messages": (),
    "leakage": (),
    "figures": (),
    "records": (),
    "networks": (),
    "recipe": ("sections", "parallel_section", "collaboration_section", "compare_section", "federated_rules"),
    "federated_rules": ("sections", "federated_section"),
    "federated_section": ("defense_sections",),
    "compare_section": ("defense_sections",),
    "collaboration_section": ("defense_sections",),
    "parallel_section": ("defense_sections",),
    "sections": ("defense_sections",),
    "defense_sections": (),
    "randomness": (),
    "errors": (),
}
OPEN_TO_ALL = {"errors", "randomness"}
# The command line may use every room; the public names are loaded from where they lie.
ABOVE_ALL = {
    "cli",
    "cli_authority",
    "cli_collaboration",
    "cli_collaboration_audit",
    "cli_bounds",
    "cli_compare",
    "cli_federated",
    "cli_frontier",
    "cli_network",
    "__main__",
    "",
}
ABOVE_ATTACKS = {"parties", "client", "client_batch", "server", "desk", "training", "replay"}
NEVER = {"attacks": {*ABOVE_ATTACKS, "transports", "transports.base", "transports.wrappers"}}


def allowed(room: str) -> set[str]:
    """The rooms that this one may import."""
    if room in ABOVE_ALL:
        return {
            *GRAPH,
            "cli",
            "cli_authority",
            "cli_collaboration",
            "cli_collaboration_audit",
            "cli_bounds",
            "cli_compare",
            "cli_federated",
            "cli_frontier",
            "cli_network",
        }
    reached: set[str] = set()
    waiting = [room]
    while waiting:
        current = waiting.pop()
        if current not in reached:
            reached.add(current)
            waiting.extend(GRAPH[current])
    return reached | OPEN_TO_ALL


def room_of(module: str) -> str:
    """The room that a dotted name (without `milkglass.`) lies in: the longest one known; else its first part."""
    parts = module.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((name for name in names if name in GRAPH), parts[0])


def imported(file: Path, package: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name below `milkglass`) of every import in a file: on top, in functions, for the types alone."""
    inside = ["milkglass", *file.relative_to(package).parent.parts]
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Import | ast.ImportFrom | ast.Call):
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = inside[: len(inside) - node.level + 1] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{start}.{alias.name}" for alias in node.names]
        elif isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            given = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            names = [str(value) for value in given] if called in ("import_module", "__import__") else []
        for name in names:
            if name.split(".")[0] == "milkglass":
                yield node.lineno, name.removeprefix("milkglass").removeprefix(".")


def wrong_imports(package: Path) -> list[str]:
    """A line for every import that the graph does not allow, and for every file in no room."""
    wrong = []
    for file in sorted(package.rglob("*.py")):
        module = ".".join(file.relative_to(package).with_suffix("").parts).removesuffix("__init__").removesuffix(".")
        room = room_of(module)
        if room not in GRAPH and room not in ABOVE_ALL:
            wrong.append(f"{module}: a room that the graph does not know")
            continue
        for line, name in imported(file, package):
            if room_of(name) != room and room_of(name) not in allowed(room):
                wrong.append(f"{module}:{line} imports {name or 'milkglass'}: not below {room}")
    return wrong


def test_imports_go_downward() -> None:
    assert len(list(PACKAGE.rglob("*.py"))) > 10
    assert wrong_imports(PACKAGE) == []


def test_the_graph_has_no_circle_and_keeps_attacks_from_parties() -> None:
    TopologicalSorter(GRAPH).prepare()
    for room, forbidden in NEVER.items():
        assert not allowed(room) & forbidden


@pytest.mark.parametrize(
    "line",
    [
        "from milkglass.client import Client",
        "import milkglass.training.split",
        "from milkglass import replay",
        "from milkglass import train",
        "import milkglass",
        "from ..parties import Client",
        "from .. import transports",
        "def f() -> None:\n    from milkglass.transports.local import LocalTransport",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from milkglass.client import Client",
        "import importlib\nimportlib.import_module('milkglass.parties')",
    ],
)
def test_an_attack_that_reaches_a_party_is_found(line: str, tmp_path: Path) -> None:
    (tmp_path / "attacks").mkdir()
    (tmp_path / "attacks" / "decoder.py").write_text("from milkglass.attacks.base import Attack\nimport torch\n")
    assert wrong_imports(tmp_path) == []
    (tmp_path / "attacks" / "decoder.py").write_text(line)
    assert len(wrong_imports(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("client.py", "from milkglass.transports.local import LocalTransport"),
        ("audit.py", "from milkglass.replay import views"),
        ("leakage/reconstruction.py", "from milkglass.messages import Message"),
        ("errors.py", "from milkglass.recipe import Recipe"),
        ("attic.py", "x = 1"),
    ],
)
def test_other_ways_up_are_found(file: str, line: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(line)
    assert len(wrong_imports(tmp_path)) == 1
