"""A comparison on disk: rows that are kept, rows that say why there are none, and one true comparison, small."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from milkglass import compare_cells, compare_files, compare_inference
from milkglass.audit_files import Watching
from milkglass.cli import main
from milkglass.compare import MEASURED, PROTECTIONS, Cell, Row, recipe_of
from milkglass.compare_files import Comparison, compare
from milkglass.compare_place import Place
from milkglass.compare_processes import run_volunteers, volunteers
from milkglass.errors import CutError, MilkglassError, RecipeError, RunError
from milkglass.leakage.estimate import Estimate
from milkglass.recipe import Recipe, parse_recipe
from milkglass.training.split import Silence
from tests.test_compare import TABLES

KEYS = {
    *("training", "protection", "clients", "accuracy", "client_flops", "bytes_up", "bytes_down", "seconds"),
    *("peek", "guarantee", "status"),
}


class Unwatched:
    """An audit that nobody watches."""

    def __enter__(self) -> Unwatched:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def piece(self, *_: object) -> None:
        pass

    def step(self, *_: object) -> None:
        pass


def watching(told: list[str] | None = None) -> Watching:
    lines = [] if told is None else told
    return Watching(lambda *_: nullcontext(Silence()), Unwatched, lines.append)


def recipe(**tables: Any) -> Recipe:
    return parse_recipe(TABLES | {"compare": {"attacks": "quick"}} | tables)


def statuses(out: Path, clients: int = 2) -> dict[tuple[str, str], str]:
    rows = [row for row in told(out)["rows"] if row["clients"] == clients]
    return {(row["training"], row["protection"]): row["status"] for row in rows}


def told(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "compare.json").read_text())
    return content


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """Trainings that take no time: what was made, in order."""
    cells: list[Cell] = []

    def maker(cell: Cell, _: Recipe, place: Place) -> Row:
        cells.append(cell)
        (place.run).mkdir(parents=True, exist_ok=True)
        value = Estimate(0.9, 0.85, 0.95)
        return Row(
            cell,
            MEASURED,
            accuracy=value,
            peek=Estimate(0.3, 0.2, 0.4),
            bytes_up=1000.0,
            bytes_down=500.0,
            client_flops=1e6,
            client_memory=1000,
            rounds=10,
            seconds=1.0,
        )

    for name in compare_cells.MAKERS:
        monkeypatch.setitem(compare_cells.MAKERS, name, maker)
    return cells


def run(out: Path, recipe_: Recipe | None = None, **options: Any) -> Comparison:
    return compare(recipe_ or recipe(), out, watching(), **options)


@pytest.mark.usefixtures("made")
def test_every_row_has_the_keys_that_were_promised(tmp_path: Path) -> None:
    run(tmp_path / "out", only=["split", "large_batch"], clients=[2])
    content = told(tmp_path / "out")
    assert all(row.keys() >= KEYS for row in content["rows"])
    found = {(row["training"], row["protection"], row["status"]) for row in content["rows"] if row["clients"] == 2}
    assert ("split", "channel", "measured") in found
    assert {row["status"] for row in content["rows"] if row["clients"] in (100, 500)} == {"modelled"}
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "large-batch" in page


def test_an_extra_that_is_missing_is_a_row_with_the_command(
    tmp_path: Path, made: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        compare_files, "find_spec", lambda name: None if name in ("flwr", "opacus") else find_spec(name)
    )
    run(tmp_path / "out", only=["federated", "split"], clients=[2])
    rows = statuses(tmp_path / "out")
    assert rows["federated", "none"] == (
        "federated averaging needs an optional part of milkglass: pip install 'milkglass[federated]'"
    )
    assert rows["split", "dp"] == (
        "DP-SGD at the client needs an optional part of milkglass: pip install 'milkglass[dp]'"
    )
    assert rows["split", "none"] == "measured"
    assert "federated" not in {cell.training for cell in made}


def test_what_a_protection_cannot_take_is_a_row_with_the_reason(
    tmp_path: Path, made: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(cell: Cell, *_: object) -> Row:
        raise CutError(f"{cell.protection}: layer 'x' is not affine; cut deeper")

    monkeypatch.setattr(compare_files, "inference_row", refuse)
    run(tmp_path / "out", only=["split"], clients=[2])
    rows = statuses(tmp_path / "out")
    assert rows["split", "homomorphic"] == "homomorphic: layer 'x' is not affine; cut deeper"
    assert made.count(Cell("split", "none", 2)) == 1  # the trained cell is there already


def test_a_cell_is_made_once_and_its_undefended_one_before_it(tmp_path: Path, made: list[Cell]) -> None:
    alone = recipe(compare={"protections": ["channel"], "attacks": "quick"})
    run(tmp_path / "out", alone, only=["split"], clients=[2])
    assert made == [Cell("split", "none", 2), Cell("split", "channel", 2)]


def test_rows_of_an_earlier_call_stay(tmp_path: Path, made: list[Cell]) -> None:
    """Asked for less, or stopped on the way, a second call takes nothing away; attacked harder, it begins anew."""
    out = tmp_path / "out"
    run(out, only=["split", "adaptive"], clients=[2])
    before = statuses(out)
    run(out, only=["adaptive"], clients=[2])
    assert statuses(out) == {name: status for name, status in before.items() if status == "measured"}
    assert ("split", "channel") in statuses(out)
    assert {cell.training for cell in made[-1:]} == {"adaptive"}
    run(out, recipe(compare={"attacks": "default"}), only=["adaptive"], clients=[2])
    assert set(statuses(out)) == {("adaptive", "none")}


def test_what_the_recipe_has_and_no_row_is_told(tmp_path: Path, made: list[Cell]) -> None:
    found = run(tmp_path / "out", recipe(defense={"noise": {"sigma": 1.0}}), only=["adaptive"], clients=[2])
    assert found.notes == ["defense.noise is in the recipe, and in no row: it is not among what is compared"]
    assert made


@pytest.mark.usefixtures("made")
def test_another_recipes_folder_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, only=["split"], clients=[2])
    run(out, only=["split"], clients=[3])  # the table of needs and rows may change
    with pytest.raises(RunError, match=r"holds a comparison of another recipe: seed is 1 here and 0 there"):
        run(out, recipe(seed=1), only=["split"])
    (out / "compare.json").write_text("{")
    with pytest.raises(RunError, match=r"compare.json: damaged: .*; remove it to go on from the cells"):
        run(out, only=["split"])
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(RunError, match=r"holds other files, such as thesis.tex"):
        run(other, only=["split"])
    with pytest.raises(RunError, match="a file of that name exists"):
        run(other / "thesis.tex", only=["split"])


def test_bad_input_writes_nothing(tmp_path: Path, made: list[Cell]) -> None:
    with pytest.raises(RecipeError, match="no way of training is called 'spilt'; did you mean 'split'"):
        run(tmp_path / "out", only=["spilt"])
    with pytest.raises(MilkglassError, match="none of these protections goes with"):
        run(tmp_path / "out", recipe(compare={"protections": ["nopeek"]}), only=["federated"])
    assert not (tmp_path / "out").exists()
    assert made == []


@pytest.mark.usefixtures("made")
def test_a_failed_cell_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Row:
        raise MilkglassError("no batch for each of 10 ranks")

    monkeypatch.setitem(compare_cells.MAKERS, "large_batch", fail)
    lines: list[str] = []
    found = compare(recipe(), tmp_path / "out", watching(lines), only=["large_batch", "adaptive"], clients=[2])
    assert [row.status for row in found.rows] == ["no batch for each of 10 ranks", "measured"]
    assert lines[0] == "row 1 of 2: large-batch synchronous SGD, 2 clients: no batch for each of 10 ranks"


def test_a_line_is_bad_input_at_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(recipe().to_toml())
    for arguments, words in (
        (["--only", "splitt"], "milkglass: --only: no way of training is called 'splitt'; did you mean 'split'?"),
        (["--clients", "two"], "milkglass: --clients 'two': expected numbers with commas between, such as 2,10"),
        (["--clients", "0"], "milkglass: --only, --clients: compare.clients"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["compare", str(file), "--out", str(tmp_path / "out"), *arguments])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith(words)
        assert error.count("\n") == 1


@pytest.mark.slow
def test_a_true_comparison_and_its_second_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row that needs no extra, with two clients and one epoch; the second time nothing is made again."""
    small = recipe(
        training={"epochs": 1, "batch_size": 16},
        data={"name": "digits", "train_records": 160, "test_records": 80},
        compare={"protections": ["none", "channel", "homomorphic"], "attacks": "quick", "clients": [2], "records": 20},
        cut={"at": "hidden2"},
    )
    ways = ["whole", "split", "federated", "large_batch"]
    found = compare(small, tmp_path / "out", watching(), only=ways)
    rows = {(row.cell.training, row.cell.protection): row for row in found.rows}
    assert all(row.is_measured for row in found.rows), [row.status for row in found.rows]
    assert rows["whole", "none"].peek == Estimate(1.0, 1.0, 1.0)
    channel, encrypted = rows["split", "channel"], rows["split", "homomorphic"]
    assert channel.guarantee is not None
    assert "bits" in channel.guarantee
    assert encrypted.details["top1_equal"] >= 0.99
    assert (encrypted.records, encrypted.inference) == (20, True)
    assert rows["large_batch", "none"].gradient_inversion is not None
    ratios = {row["training"]: row["ratio"] for row in told(tmp_path / "out")["formulas"]["rows"]}
    assert ratios.keys() == {"split", "federated", "large_batch"}
    assert all(abs(ratio - 1) < 0.02 for ratio in ratios.values()), ratios

    def never(*_: object, **__: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(compare_cells, "audit_run", never)
    monkeypatch.setattr(compare_cells, "run_ranks", never)
    monkeypatch.setattr("milkglass.compare_updates.audit_updates", never)
    again = compare(small, tmp_path / "out", watching(), only=ways)
    for row in again.rows:
        if not row.inference:  # keys are new each time
            assert replace(row, details={}) == replace(rows[row.cell.training, row.cell.protection], details={})


def test_makers_of_answers_are_those_of_the_protections() -> None:
    makers: dict[str, Callable[..., Row]] = compare_inference._MAKERS
    assert set(makers) == {name for name, each in PROTECTIONS.items() if each.inference}


@pytest.mark.slow
def test_volunteers_begin_together_and_end_with_one_state(tmp_path: Path) -> None:
    """However quick the first is: no step is made before all are there."""
    made = recipe_of(
        recipe(training={"epochs": 1, "batch_size": 16}), Cell("collaboration", "none", 2), train_records=160
    )
    summaries = run_volunteers(made, tmp_path / "out", 2)
    assert len({summary["state"] for summary in summaries}) == 1
    assert all(summary["samples"] > 0 for summary in summaries)
    for name in volunteers(2):
        lines = [json.loads(line) for line in (tmp_path / "out" / name / "metrics.jsonl").read_text().splitlines()]
        assert (lines[0]["epoch"], lines[0]["peers"]) == (1, 2)
