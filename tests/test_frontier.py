"""The frontier: what is tried, what is chosen, and a sweep on disk that goes on where it was stopped."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from milkglass import frontier_files
from milkglass.audit_files import Plan, Watching
from milkglass.cli import main
from milkglass.errors import AuditError, MessageError, MilkglassError, RecipeError, RunError
from milkglass.frontier import (
    AS_IT_IS,
    FAMILY,
    UNDEFENDED,
    Row,
    Setting,
    between,
    choose,
    cut_by_budget,
    cut_widest,
    front,
    misses,
    nearest_row,
    pareto_front,
    recipe_of,
    settings_of,
)
from milkglass.frontier_figure import mark, page, picture
from milkglass.frontier_files import Frontier, sweep
from milkglass.leakage.estimate import Estimate
from milkglass.recipe import Recipe, load_recipe, parse_recipe
from milkglass.runs import RunFolder
from milkglass.sections import FAMILIES
from milkglass.training.split import Silence, train
from tests.helpers import small_recipe
from tests.training.whole import BATCH_NORM

COORDINATE = st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0])


def row(
    name: str = "channel",
    strength: float | None = 0.3,
    *,
    accuracy: float = 0.9,
    peek: float = 0.1,
    half: float = 0.01,
    bits: float | None = None,
    sound: bool = True,
) -> Row:
    """A cell as it would be read, with a peek whose interval is `half` wide to each side."""
    measures = {"peek": Estimate(peek, peek - half, peek + half)}
    if bits is not None:
        measures["bits"] = Estimate(bits, bits, bits)
    around = Estimate(accuracy, accuracy - 0.02, accuracy + 0.02)
    return Row(Setting(name, strength), 0, "made up", around, measures, sound, 0.5, f"cells/{name}-{strength}")


@given(st.lists(st.tuples(COORDINATE, COORDINATE), max_size=12))
def test_the_front_is_what_nothing_else_beats(points: list[tuple[float, float]]) -> None:
    def beaten(index: int) -> bool:
        accuracy, peek = points[index]
        return any(a >= accuracy and p <= peek and (a, p) != (accuracy, peek) for a, p in points)

    assert pareto_front(points) == [not beaten(index) for index in range(len(points))]


def test_an_inconclusive_audit_is_not_on_the_front_and_hides_none_that_is() -> None:
    rows = [row(accuracy=0.99, peek=0.0, sound=False), row(accuracy=0.9, peek=0.1), row(peek=math.nan)]
    assert front(rows) == [False, True, False]


@given(st.floats(1e-3, 1e3), st.floats(1.05, 100))
def test_half_way_lies_between_on_a_log_scale(weaker: float, factor: float) -> None:
    stronger = weaker * factor
    middle = between(weaker, stronger)
    assert middle is not None
    assert weaker < middle < stronger
    assert math.log(middle) == pytest.approx((math.log(weaker) + math.log(stronger)) / 2, abs=0.006)


def test_nothing_short_lies_between_neighbours_that_close() -> None:
    assert between(0.3, 0.3001) is None


def test_bisection_closes_in_on_where_the_budget_is_met() -> None:
    def peek(strength: float) -> float:
        return 0.4 / (1 + strength)

    rows = [row(strength=strength, peek=peek(strength), half=0) for strength in (1.0, 10.0, 100.0)]
    for _ in range(6):
        cut = cut_by_budget(rows, "channel", {"peek": 0.1}, [r.setting for r in rows])
        assert cut is not None
        assert cut.strength is not None
        rows.append(row(strength=cut.strength, peek=peek(cut.strength), half=0))
    tried = sorted(r.setting.strength or 0 for r in rows)
    crossing = 3.0  # 0.4 / (1 + 3) = 0.1
    below, above = max(s for s in tried if s < crossing), min(s for s in tried if s >= crossing)
    assert above / below < 10 ** (1 / 2**5)  # halved six times, in logarithms


def test_bisection_takes_the_weakest_crossing_and_looks_past_unsound_audits() -> None:
    rows = [
        row(strength=1.0, peek=0.5),
        row(strength=2.0, peek=0.0, sound=False),
        row(strength=4.0, peek=0.05),
        row(strength=8.0, peek=0.5),
    ]
    assert cut_by_budget(rows, "channel", {"peek": 0.1}, []) == Setting("channel", 2.0)
    assert cut_by_budget(rows, "channel", {"peek": 0.1}, [Setting("channel", 2.0)]) is None
    assert cut_by_budget(rows, "channel", {"peek": 0.6}, []) is None  # all inside
    assert cut_by_budget(rows, "noise", {"peek": 0.1}, []) is None


def test_what_has_no_certificate_is_outside_any_budget_on_bits() -> None:
    without, with_one = row("noise", peek=0.01), row("channel", accuracy=0.5, peek=0.01, bits=12.0)
    assert without.verdict({"bits": 1000.0}) == "over budget"
    assert without.verdict({"peek": 0.1}) == "within budget"
    assert choose([without, with_one], {"peek": 0.1, "bits": 16.0}) is with_one
    assert choose([without, with_one], {"peek": 0.1}) is without


def test_without_a_budget_the_widest_gap_of_families_on_the_front_is_cut() -> None:
    rows = [
        row("noise", 1.0, accuracy=0.5, peek=0.9),  # a wide gap, and nothing of it on the front
        row("noise", 100.0, accuracy=0.5, peek=0.2),
        row("channel", 1.0, accuracy=0.9, peek=0.3),
        row("channel", 4.0, accuracy=0.85, peek=0.25),
        row("channel", 16.0, accuracy=0.8, peek=0.05),
    ]
    assert cut_widest(rows, []) == Setting("channel", 8.0)
    assert cut_widest(rows, [Setting("channel", 8.0)]) == Setting("channel", 2.0)
    assert cut_widest(rows, [Setting("channel", 8.0), Setting("channel", 2.0)]) is None


def test_the_choice_counts_upper_ends_and_takes_the_most_accurate() -> None:
    tempting = row(accuracy=0.95, peek=0.09, half=0.02)  # its value is inside, its upper end is not
    fitting, worse = row(accuracy=0.9, peek=0.07, half=0.02), row(accuracy=0.8, peek=0.0)
    doubtful, unmeasured = row(accuracy=0.99, peek=0.0, sound=False), row(accuracy=0.99, peek=math.nan)
    rows = [tempting, worse, fitting, doubtful, unmeasured]
    assert choose(rows, {"peek": 0.1}) is fitting
    assert choose(rows, {"peek": 0.1, "matching": 0.5}) is None  # nobody measured that
    assert choose([tempting, doubtful, unmeasured], {"peek": 0.1}) is None


def test_the_nearest_is_told_by_its_worst_miss() -> None:
    near, far = row(peek=0.1, bits=20.0), row(peek=0.04, bits=40.0)
    budget = {"peek": 0.1, "bits": 16.0}
    assert nearest_row([far, near, row(peek=0.0), row(peek=0.0, bits=1.0, sound=False)], budget) is near
    assert misses(near, budget) == pytest.approx({"peek": 0.01, "bits": 4.0})
    assert nearest_row([row(peek=0.0)], budget) is None  # no certificate: no distance


def test_every_family_has_its_own_mark_and_its_tables() -> None:
    assert set(FAMILIES) == {*FAMILY, "none", "recipe"}
    assert len({mark(name, 0, 0) for name in FAMILIES}) == len(FAMILIES) - 1  # undefended: a circle that is hollow
    recipe = small_recipe(defense={"channel": {"width": 3, "projection": "pca"}, "adversary": {"width": 5}})
    for name, family in FAMILY.items():
        for strength in family.grid:
            made = recipe_of(recipe, Setting(name, strength), 7)
            assert made.seed == 7
            assert made.defense.channel is None or made.defense.channel.width == 3
            assert made.defense.adversary is None or made.defense.adversary.width == 5
    learned = recipe_of(recipe, Setting("channel", 0.5)).defense.channel
    fixed = recipe_of(recipe, Setting("random_projection", 0.5)).defense.channel
    assert learned is not None
    assert fixed is not None
    assert (learned.sigma, fixed.sigma, fixed.projection) == (0.5, 0.5, "random")
    assert learned.projection not in ("random", "pca")


def test_the_recipes_own_defense_is_a_cell_unless_a_family_has_it() -> None:
    both = small_recipe(defense={"channel": {"width": 3}, "adversary": {}})
    settings, notes = settings_of(both)
    assert settings[:2] == [UNDEFENDED, AS_IT_IS]
    assert notes == []
    assert recipe_of(both, AS_IT_IS).defense == both.defense
    of_a_family = small_recipe(defense={"nopeek": {"weight": 4.0}}, frontier={"families": ["recipe", "nopeek"]})
    assert AS_IT_IS not in settings_of(of_a_family)[0]
    assert AS_IT_IS not in settings_of(small_recipe())[0]


def test_a_certificate_that_is_asked_for_leaves_families_out_or_refuses_them() -> None:
    asked: dict[str, Any] = {"channel": {"width": 3}, "certified": True}
    settings, notes = settings_of(small_recipe(defense=asked))
    assert {setting.family for setting in settings} == {
        *("none", "recipe", "channel", "channel_entropy", "channel_nopeek", "random_projection", "pca")
    }
    assert any(note.startswith("NoPeek: left out") for note in notes)
    with pytest.raises(RecipeError, match="nopeek has none"):
        settings_of(small_recipe(defense=asked, frontier={"families": ["nopeek"]}))


def test_what_is_swept_is_no_part_of_what_is_agreed_or_of_a_cell() -> None:
    swept = small_recipe(frontier={"families": ["channel"], "strengths": {"channel": [0.1]}})
    assert swept.digest() == small_recipe().digest()
    for setting in settings_of(swept)[0]:
        assert recipe_of(swept, setting).frontier is None
        assert "frontier" not in recipe_of(swept, setting).to_toml()


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"families": ["chanel"]}, "did you mean 'channel'"),
        ({"families": ["channel", "channel"]}, "twice"),
        ({"strengths": {"no_peek": [1.0]}}, "did you mean 'nopeek'"),
        ({"strengths": {"channel": []}}, "one at least"),
        ({"strengths": {"channel": [0.3, 0.3]}}, "different numbers"),
        ({"strengths": {"channel": [0.0]}}, "greater than 0"),
        ({"strengths": {"channel": [math.inf]}}, "finite"),
        ({"strengths": {"none": [1.0]}}, "has none to set"),
        ({"bisections": 9}, "less than or equal to 8"),
        ({"bisection": 1}, "did you mean 'bisections'"),
    ],
)
def test_bad_sweeps_are_refused(section: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(words)):
        small_recipe(frontier=section)


# A sweep on disk, with stand-ins for the training and the audit.


@dataclass
class Bench:
    """Trainings and audits that take no time: a channel of sigma s shows 0.1 / s of the record, and costs s / 10."""

    records: str = "records"
    trained: list[str] = field(default_factory=list)
    audited: list[str] = field(default_factory=list)
    fails: Callable[[Recipe], MilkglassError | None] = lambda _: None
    verdict: Callable[[Recipe], str] = lambda _: "no budget set"

    def train(
        self, recipe: Recipe, out: Path, key: None = None, *, resume: bool = False, progress: Any = None
    ) -> dict[str, Any]:
        self.trained.append(out.name)
        folder = RunFolder.resume(out, recipe, self.records)
        error = self.fails(recipe)
        if error is not None:
            raise error
        sigma = _sigma(recipe)
        for name in ("bottom", "top"):
            folder.write_tensors(f"{name}.safetensors", {"w": torch.zeros(1)})
        folder.write_metrics([])
        summary = {
            "accuracy": 0.95 - sigma / 10,
            "defense": "none" if not sigma else f"channel, sigma {sigma:g}",
            "client_flops_share": 0.25,
            "records": {"test": 400},
        }
        folder.write_json("summary.json", summary)
        return summary

    def audit_run(
        self, run: Path, plan: Plan, *, reference: Path | None = None, training: object, watching: object
    ) -> tuple[None, dict[str, Any]]:
        self.audited.append(run.name)
        folder = RunFolder.open_finished(run)
        assert reference is None or RunFolder.open_finished(reference).recipe.digest() == (
            folder.recipe.undefended().digest()
        )
        sigma = _sigma(folder.recipe)
        exposures = {"fresh": _around(min(0.8, 0.1 / sigma if sigma else 0.8))}
        if not plan.fresh_only:
            exposures["repeated"] = _around(min(0.9, 0.3 / sigma if sigma else 0.9))
        measures = {"peek": max(exposures.values(), key=lambda value: value["high"])}
        if sigma:
            measures["bits"] = {"value": 10 / sigma, "low": 10 / sigma, "high": 10 / sigma}
        content = {
            "measures": measures,
            "exposures": exposures,
            "verdict": self.verdict(folder.recipe),
            "strength": plan.strength,
            "fresh_only": plan.fresh_only,
            "attacks_asked_for": None,
        }
        folder.write_json("audit.json", content)
        return None, content


def _sigma(recipe: Recipe) -> float:
    return 0.0 if recipe.defense.channel is None else recipe.defense.channel.sigma


def _around(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench()
    monkeypatch.setattr(frontier_files, "train", made.train)
    monkeypatch.setattr(frontier_files, "digest_of", lambda _: made.records)
    monkeypatch.setattr(frontier_files, "audit_run", made.audit_run)
    return made


def swept(**changes: Any) -> Recipe:
    """Three sigmas of a channel."""
    section = {"families": ["channel"], "strengths": {"channel": [0.5, 1.0, 4.0]}, "bisections": 1}
    return small_recipe(**{"frontier": section, **changes})


class Unwatched:
    """Nobody watches an audit."""

    def piece(self, done: int, total: int, what: str) -> None:
        """Do nothing."""

    def step(self, done: int, total: int) -> None:
        """Do nothing."""


def watching(lines: list[str]) -> Watching:
    return Watching(lambda *_: nullcontext(Silence()), lambda: nullcontext(Unwatched()), lines.append)


def run_sweep(
    recipe: Recipe, out: Path, budget: dict[str, float] | None = None, *, told: list[str] | None = None
) -> Frontier:
    return sweep(recipe, out, strength="quick", budget=budget, watching=watching([] if told is None else told))


def test_a_sweep_writes_what_it_found(bench: Bench, tmp_path: Path) -> None:
    told: list[str] = []
    run_sweep(swept(), tmp_path / "f", told=told)
    content = json.loads((tmp_path / "f" / "frontier.json").read_text())
    assert bench.trained == [  # 0.8, 0.2, 0.1, 0.025: the widest gap within the family is between 0.5 and 1
        *("none-seed0", "channel-0.5-seed0", "channel-1-seed0", "channel-4-seed0", "channel-0.707-seed0")
    ]
    assert bench.audited == bench.trained
    assert len(told) == 5
    by_strength = {each["strength"]: each for each in content["rows"]}
    one = by_strength[1.0]
    assert one["family"] == "channel"
    assert one["accuracy"]["value"] == pytest.approx(0.85)
    assert one["accuracy"]["low"] == pytest.approx(0.8112, abs=1e-3)  # 340 of 400, Clopper and Pearson
    assert one["accuracy"]["high"] == pytest.approx(0.8836, abs=1e-3)
    assert one["peek"] == pytest.approx(_around(0.1))
    assert one["bits"] == pytest.approx(10)
    assert one["client_flops_share"] == 0.25
    assert one["verdict"] == "no budget set"
    assert one["defense"] == "channel, sigma 1"
    assert (tmp_path / "f" / one["run"] / "audit.json").is_file()
    assert by_strength[None]["bits"] is None
    assert all(each["on_front"] for each in content["rows"])  # the stronger the more hidden, and the less accurate
    assert content["reference"]["value"] == pytest.approx(0.95)
    assert content["budget"] is None
    assert content["chosen"] is None
    assert content["finalists"] == []
    assert content["recipe_digest"] == swept().digest()


def test_a_finished_cell_is_not_made_again(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "f"

    def stop(recipe: Recipe) -> MilkglassError | None:
        if _sigma(recipe) == 4.0:
            raise KeyboardInterrupt
        return None

    bench.fails = stop
    with pytest.raises(KeyboardInterrupt):
        run_sweep(swept(), out)
    assert [each["strength"] for each in json.loads((out / "frontier.json").read_text())["rows"]] == [None, 0.5, 1.0]
    kept = {file: file.stat().st_mtime_ns for file in out.glob("cells/*/*.json")}
    assert len(kept) == 6
    bench.fails = lambda _: None
    bench.trained.clear()
    first = run_sweep(swept(), out)
    assert bench.trained == ["channel-4-seed0", "channel-0.707-seed0"]
    again = run_sweep(swept(), out)
    assert again.to_dict() == first.to_dict()
    assert len(bench.trained) == 2
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


def test_a_budget_is_met_by_bisection_and_held_by_finalists(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "f"
    run_sweep(swept(), out)
    bench.audited.clear()
    found = run_sweep(swept(), out, {"peek": 0.08})  # 0.1 / s + 0.01 <= 0.08: from s = 1.43 on
    assert found.chosen is not None
    assert found.chosen.setting == Setting("channel", 2.0)  # between 1, over, and 4, within
    assert bench.audited == ["channel-2-seed0", *(f"channel-2-seed{seed}" for seed in (1, 2, 3))]
    content = json.loads((out / "frontier.json").read_text())
    assert {each["strength"] for each in content["rows"]} == {None, 0.5, 0.707, 1.0, 2.0, 4.0}  # the earlier one too
    assert {each["strength"]: each["verdict"] for each in content["rows"]}[1.0] == "over budget"
    assert content["chosen"]["strength"] == 2.0
    assert content["finalists_verdict"] == "within budget"
    assert content["finalists_means"]["accuracy"] == pytest.approx(0.75)
    assert content["finalists_means"]["accuracy_lost"] == pytest.approx(0.2)
    assert content["finalists_means"]["exposures"]["repeated"]["mean"] == pytest.approx(0.15)
    assert [each["seed"] for each in content["finalists"]] == [1, 2, 3]
    for each in content["finalists"]:
        assert set(each["exposures"]) == {"fresh", "repeated"}
        assert RunFolder.open_finished(out / each["run"]).recipe.seed == each["seed"]
    chosen = load_recipe(out / "recipe.toml")
    assert chosen.frontier is None
    assert chosen.seed == swept().seed
    assert chosen.defense == recipe_of(swept(), Setting("channel", 2.0)).defense


@pytest.mark.usefixtures("bench")
def test_the_recipe_to_use_trains(tmp_path: Path) -> None:
    run_sweep(swept(), tmp_path / "f", {"peek": 0.08})
    recipe = load_recipe(tmp_path / "f" / "recipe.toml")
    summary = train(recipe, tmp_path / "run")
    assert "channel" in summary["defense"]
    assert summary["recipe_digest"] == recipe_of(swept(), Setting("channel", 2.0)).digest()


def test_finalists_that_do_not_hold_are_told(bench: Bench, tmp_path: Path) -> None:
    bench.verdict = lambda recipe: "inconclusive" if recipe.seed == 2 and _sigma(recipe) else "no budget set"
    assert run_sweep(swept(), tmp_path / "f", {"peek": 0.08}).held == "inconclusive"
    bench.fails = lambda recipe: MessageError("the gradient is not finite") if recipe.seed == 3 else None
    bench.verdict = lambda _: "no budget set"
    found = run_sweep(swept(), tmp_path / "g", {"peek": 0.08})
    assert found.finalists[2].failed == "the gradient is not finite"
    assert found.held == "inconclusive"
    assert found.to_dict()["finalists_means"]["accuracy"] == pytest.approx(0.75)


def test_a_cell_that_fails_is_kept_with_its_line(bench: Bench, tmp_path: Path) -> None:
    bench.fails = lambda recipe: MessageError("training has <b>diverged</b>") if _sigma(recipe) == 1.0 else None
    found = run_sweep(swept(), tmp_path / "f")
    assert [failure.why for failure in found.failures] == ["training has <b>diverged</b>"]
    content = json.loads((tmp_path / "f" / "frontier.json").read_text())
    assert content["failed"][0]["strength"] == 1.0
    assert 1.0 not in [each["strength"] for each in content["rows"]]
    shown = (tmp_path / "f" / "frontier.html").read_text()
    assert "training has &lt;b&gt;diverged&lt;/b&gt;" in shown
    bench.fails = lambda _: RunError("cannot write: no space left on device")
    with pytest.raises(RunError, match="no space"):
        run_sweep(swept(), tmp_path / "g")
    bench.fails = lambda recipe: None if _sigma(recipe) else MessageError("diverged")
    with pytest.raises(MessageError):  # without the reference nothing can be measured
        run_sweep(swept(), tmp_path / "h")


def test_another_recipe_and_other_files_are_refused(bench: Bench, tmp_path: Path) -> None:
    run_sweep(swept(), tmp_path / "f")
    made = len(bench.trained)
    with pytest.raises(RunError, match=r"another recipe: seed is 5 here and 0 there"):
        run_sweep(swept(seed=5), tmp_path / "f")
    wider = swept(frontier={"families": ["channel"], "strengths": {"channel": [0.5]}, "bisections": 0})
    assert len(run_sweep(wider, tmp_path / "f").rows) == 5  # what is swept may change; what was made stays
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "thesis.tex").write_text("")
    with pytest.raises(RunError, match="holds other files, such as thesis"):
        run_sweep(swept(), tmp_path / "g")
    (tmp_path / "f" / "frontier.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        run_sweep(swept(), tmp_path / "f")
    assert len(bench.trained) == made
    (tmp_path / "f" / "frontier.json").unlink()
    run_sweep(swept(), tmp_path / "f")
    assert len(bench.trained) == made  # the cells are enough


@pytest.mark.usefixtures("bench")
def test_a_folder_of_another_recipe_is_no_cell(tmp_path: Path) -> None:
    run_sweep(swept(), tmp_path / "f")
    (tmp_path / "f" / "frontier.json").unlink()
    cells = tmp_path / "f" / "cells"
    (cells / "none-seed0").rename(cells / "none-seed9")
    with pytest.raises(RunError, match="belongs to another recipe: seed"):
        run_sweep(swept(seed=9), tmp_path / "f")


def test_another_strength_audits_anew_and_trains_nothing(bench: Bench, tmp_path: Path) -> None:
    run_sweep(swept(), tmp_path / "f")
    trained, audited = len(bench.trained), len(bench.audited)
    sweep(swept(), tmp_path / "f", strength="default", budget=None, watching=watching([]))
    assert len(bench.trained) == trained
    assert len(bench.audited) == 2 * audited


def test_budgets_that_nothing_can_be_judged_by(bench: Bench, tmp_path: Path) -> None:
    no_certificate = swept(frontier={"families": ["nopeek"]})
    with pytest.raises(AuditError, match="a certificate asked of defenses that have none"):
        run_sweep(no_certificate, tmp_path / "f", {"bits": 16.0})
    with pytest.raises(AuditError, match="matching"):
        run_sweep(swept(), tmp_path / "f", {"matching": 0.1})  # no part of a quick audit
    vertical = swept(parties={"mode": "vertical", "clients": ["a", "b"]}, frontier={"families": ["nopeek"]})
    with pytest.raises(AuditError, match="not replayed"):
        run_sweep(vertical, tmp_path / "f")
    coupled = swept(**BATCH_NORM)
    with pytest.raises(
        AuditError, match=r"have none \(none, channel\): no certificate: BatchNorm \(stage.norm\)"
    ) as caught:
        run_sweep(coupled, tmp_path / "f", {"bits": 16.0})
    assert "\n" not in str(caught.value)
    assert bench.trained == []
    assert not (tmp_path / "f").exists()
    notes = run_sweep(swept(), tmp_path / "f", {"bits": 16.0}).notes
    assert notes[0] == "without a certificate, so outside any budget on bits: none"
    assert len(notes) == 2
    assert "drawn from the same records as those that the choice was made on" in notes[1]


def test_other_records_behind_the_same_recipe_are_refused(bench: Bench, tmp_path: Path) -> None:
    run_sweep(swept(), tmp_path / "f")
    bench.records = "other records"  # where they lie is no part of what a recipe agrees on
    with pytest.raises(RunError, match="the records are not those that the run began with"):
        run_sweep(swept(), tmp_path / "f")


def test_an_audit_by_a_few_attacks_is_made_again(bench: Bench, tmp_path: Path) -> None:
    found = run_sweep(swept(), tmp_path / "f")
    path = tmp_path / "f" / found.rows[1].run / "audit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attacks_asked_for": ["ridge"]}))
    bench.audited.clear()
    run_sweep(swept(), tmp_path / "f")
    assert bench.audited == [path.parent.name]


# The pictures.


def content_of(rows: Sequence[Row], budget: dict[str, float] | None = None) -> dict[str, Any]:
    found = Frontier(swept(), "quick", budget, list(rows))
    if budget is not None:
        found.chosen = choose(rows, budget)
    return found.to_dict()


@pytest.mark.parametrize("budget", [None, {"peek": 0.1}, {"peek": 0.1, "bits": 16.0}, {"matching": 0.5}])
def test_the_picture_is_xml_without_scripts(budget: dict[str, float] | None) -> None:
    rows = [row("none", None, accuracy=0.97, peek=0.8)]
    rows += [
        row(name, strength, accuracy=0.9 - 0.01 * k, peek=0.4 / (k + 1), bits=9.0 + k if "channel" in name else None)
        for k, (name, family) in enumerate(FAMILY.items())
        for strength in family.grid
    ]
    rows += [row("recipe", None, peek=-0.1), row("noise", 77.0, peek=math.nan), row("pca", 9.0, sound=False)]
    content = content_of(rows, budget)
    drawn = picture(content)
    root = ET.fromstring(drawn)
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert tags <= {"svg", "style", "rect", "text", "path", "g", "title", "circle"}
    assert not re.search(r"\son\w+=|href|url\(|@import|nan|inf", drawn)
    sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", drawn)]
    assert sizes
    assert min(sizes) >= 11
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for x, y in re.findall(r"M(-?[\d.]+) (-?[\d.]+)", drawn):
        assert 0 <= float(x) <= width
        assert 0 <= float(y) <= height
    assert all(family.words in drawn for family in FAMILY.values())
    shown = page(content, drawn)
    assert "<script" not in shown
    assert not re.search(r"(src|href)=", shown)
    assert shown.count("<svg") == 1


def test_a_mark_lies_where_its_figures_say() -> None:
    content = content_of([row("none", None, accuracy=0.95, peek=0.39), row(accuracy=0.9, peek=0.1, bits=10.0)])
    root = ET.fromstring(picture(content))
    space = "{http://www.w3.org/2000/svg}"
    ticks = {
        text.text: float(text.attrib["x"])
        for text in root.iter(f"{space}text")
        if text.attrib.get("text-anchor") == "middle" and re.fullmatch(r"[\d.]+", text.text or "")
    }
    dots = [group for group in root.iter(f"{space}g") if group.find(f"{space}title") is not None]
    assert [(dot.find(f"{space}title").text or "").split(":")[0] for dot in dots] == [  # type: ignore[union-attr]
        *("undefended", "channel, sigma 0.3", "channel, sigma 0.3")  # accuracy, then bits
    ]
    for dot in dots[1:]:
        whisker = dot.find(f"{space}path")
        assert whisker is not None
        left, right = map(float, re.match(r"M([\d.]+) [\d.]+H([\d.]+)", whisker.attrib["d"]).groups())  # type: ignore[union-attr]
        assert left < ticks["0.1"] < right


@pytest.mark.parametrize(("limit", "drawn"), [(9.0, "below"), (16.0, "above"), (400.0, "nowhere")])
def test_a_budget_on_bits_lies_where_it_says(limit: float, drawn: str) -> None:
    text = picture(content_of([row(bits=14.4)], {"bits": limit, "peek": 0.9}))
    level = re.search(r'class="budget" d="M[\d.]+ ([\d.]+)H', text)
    dots = re.findall(r'class="whisker" d="M[\d.]+ ([\d.]+)H', text)
    if drawn == "nowhere":
        assert level is None
    else:
        assert level is not None
        assert (float(level[1]) > float(dots[-1])) == (drawn == "below")  # SVG counts downward


def test_before_the_first_cell_there_is_a_frame() -> None:
    content = content_of([])
    ET.fromstring(picture(content))
    assert "none yet" in picture(content)
    page(content, picture(content))


# The command.


def write_recipe(path: Path, recipe: Recipe) -> str:
    path.write_text(recipe.to_toml())
    return str(path)


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code: object = 0
    try:
        main(["frontier", *arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert isinstance(code, int) or code is None
    return code or 0, captured.out, captured.err


def test_the_commands_exit_codes_and_words(bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, out = write_recipe(tmp_path / "r.toml", swept()), str(tmp_path / "f")
    code, printed, err = run_command(capsys, file, "--quick", "--out", out)
    assert code == 0
    assert "frontier: cell 3 of 4: channel, sigma 1: accuracy 0.850, peek 0.100 (0.090 to 0.110), 10.0 bits" in err
    assert "channel, sigma 4" in printed
    assert "frontier.svg" in printed

    code, printed, _ = run_command(capsys, file, "--quick", "--out", out, "--budget", "peek<=0.08, bits<=9")
    assert code == 0
    assert "chosen for peek<=0.08, bits<=9: channel, sigma 2" in printed
    assert "on seeds 1, 2, 3: accuracy 0.750, 0.200 less than undefended; peek (range): fresh 0.050" in printed
    assert "the finalists hold the budget" in printed

    code, printed, _ = run_command(capsys, file, "--quick", "--out", out, "--budget", "peek<=0.01")
    assert code == 3
    assert "nothing meets peek<=0.01; nearest: channel, sigma 4, accuracy 0.550: over in peek by 0.025" in printed
    content = json.loads((tmp_path / "f" / "frontier.json").read_text())
    assert content["nearest"]["strength"] == 4.0
    assert content["nearest"]["misses"] == pytest.approx({"peek": 0.025})

    bench.verdict = lambda recipe: "inconclusive" if recipe.seed else "no budget set"
    code, printed, _ = run_command(capsys, file, "--quick", "--out", str(tmp_path / "g"), "--budget", "peek<=0.08")
    assert code == 4
    assert "the finalists cannot be told to hold" in printed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--budget", "peak<=0.1"), "did you mean 'peek'"),
        (("--budget", "peek=0.1"), "is not understood"),
        (("--quick", "--thorough"), "expected one of them"),
        (("--set", "frontier.families=['noize']"), "did you mean 'noise'"),
        (("--set", "frontier.families=['nopeek']", "--budget", "bits<=3"), "a certificate asked of"),
        (("--set", "cut.at=hiden1"), "hidden1"),
    ],
)
def test_bad_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    file = write_recipe(tmp_path / "r.toml", swept())
    code, printed, err = run_command(capsys, file, "--out", str(tmp_path / "f"), *options)
    assert code == 2
    assert printed == ""
    assert words in err
    assert "Traceback" not in err
    assert not (tmp_path / "f" / "cells").exists()


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    section = {"families": ["nopeek", "channel"], "strengths": {"nopeek": [2.0], "channel": [1.0]}, "bisections": 0}
    attacker = {"auxiliary_share": 0.15, "validation_share": 0.1}
    file = write_recipe(tmp_path / "r.toml", swept(frontier=section, attacker=attacker))
    out = tmp_path / "f"
    command = [sys.executable, "-m", "milkglass", "frontier", file, "--quick", "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 300
        while not (out / "cells" / "nopeek-2-seed0" / "summary.json").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    kept = {file: file.stat().st_mtime_ns for file in out.glob("cells/*/summary.json")}
    kept |= {file: file.stat().st_mtime_ns for file in out.glob("cells/none-seed0/audit.json")}
    assert len(kept) == 3
    code, printed, _ = run_command(capsys, file, "--quick", "--out", str(out))
    assert code == 0
    assert {each: each.stat().st_mtime_ns for each in kept} == kept
    content = json.loads((out / "frontier.json").read_text())
    assert [each["family"] for each in content["rows"]] == ["none", "nopeek", "channel"]
    assert all(math.isfinite(each["peek"]["value"]) for each in content["rows"])
    assert content["rows"][2]["bits"] > 0
    assert "channel, sigma 1" in printed
    assert parse_recipe(content["recipe"]).digest() == content["recipe_digest"]
