"""The page of a comparison: everything that compare.json holds is on it, nothing else is fetched, nothing runs."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from milkglass.charts import svg
from milkglass.compare import MEASURED, MODELLED, PROTECTIONS, WAYS, Cell, Row, cells_of
from milkglass.compare_advice import advise
from milkglass.compare_page import ordered, page, panels
from milkglass.compare_section import CompareSection
from milkglass.figures import chart
from milkglass.leakage.estimate import Estimate
from tests.browser import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ARTIFACTS = Path(__file__).parent.parent / "artifacts"
HOSTILE = "<script>document.title = 'owned'</script><img src=x onerror=alert(1)>"
NEEDS = CompareSection(labels_stay=True, peek_at_most=0.3, uplink_mbit_per_second=20.0, accuracy_lost_at_most=0.05)
OVERFLOW = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
UNSCROLLED = """() => [...document.querySelectorAll("table")].filter(e => !e.closest(".scroll")).length"""
SPILLED = """() => [...document.querySelectorAll(".track i, .funnel i")].filter(e => {
  const [own, around] = [e, e.parentElement].map(each => each.getBoundingClientRect());
  return own.width > 0 && (own.right > around.right + 1 || own.left < around.left - 1);
}).length"""
TOUCHING = """() => [...document.querySelectorAll(".axis-line")].some(axis => {
  const boxes = [...axis.querySelectorAll("i")].map(e => e.getBoundingClientRect()).filter(box => box.width);
  return boxes.some((box, k) => k > 0 && box.left < boxes[k - 1].right);
})"""


def estimate(value: float, half: float = 0.02) -> Estimate:
    return Estimate(value, value - half, value + half)


def made_rows() -> list[Row]:
    """A row for every cell that there is by default, made up; some modelled, one unsound, two that were not run."""
    rows = []
    for index, cell in enumerate(cells_of(NEEDS)):
        shield, kind = PROTECTIONS[cell.protection], WAYS[cell.training].kind
        peek = {"whole": 1.0, "split": 0.6, "update": 0.2}[kind] * {"none": 1.0, "dp": 0.05}.get(cell.protection, 0.3)
        if cell.protection == "garbled" or cell.name == "collaboration-none-10":
            rows.append(Row(cell, f"nothing to run it with, {cell.name}", inference=shield.inference))
            continue
        rows.append(
            Row(
                cell,
                MEASURED,
                accuracy=estimate(0.7 if cell.protection == "dp" else 0.96 - 0.001 * (index % 7)),
                client_flops=0.0 if kind == "whole" else 1e9 * (1 + index % 30) / cell.clients,
                client_memory=1_000_000 + 10_000 * index,
                bytes_up=3e5 * (1 + index) ** 1.6,
                bytes_down=2e5 * (1 + index),
                rounds=10 + index,
                seconds=3.0 + index,
                peek=None if cell.protection == "secure_aggregation" else estimate(peek + 0.003 * (index % 9)),
                membership=estimate(0.53),
                attribute=estimate(0.1) if kind == "split" else None,
                gradient_inversion=estimate(peek) if kind == "update" else None,
                sound=cell.name != "adaptive-none-2",
                guarantee="(8, 1e-5)-DP of a record" if cell.protection == "dp" else None,
                inference=shield.inference,
                records=100 if shield.inference else None,
                notes=(f"a note on {cell.name}",),
                run=f"cells/{cell.name}",
            )
        )
    rows += [Row(Cell(way, "none", 500), MODELLED, bytes_up=4e4, client_flops=7e6) for way in ("split", "federated")]
    return rows


def made_content(rows: list[Row], needs: CompareSection = NEEDS, **changes: Any) -> dict[str, Any]:
    """As compare.json holds it, read back from there."""
    drawn = chart("Bytes by formula", "per client and epoch", {"split": [(2, 9.0), (100, 1.0)]}, across="clients")
    assert drawn is not None
    table = {
        "training": "split",
        "clients": 2,
        "formula_bytes": 8.8e6,
        "overheads": {"labels": 65e3, "left_out": -220e3},
    }
    content = {
        "recipe_digest": "0123abcd",
        "recipe": {"data": {"name": "digits"}},
        "seed": 7,
        "strength": "quick",
        "sort": "peek",
        "train_records": 1_077,
        "test_records": 360,
        "cut_values": 512,
        "parameters": 51_850,
        "client_share": 0.031,
        "machine": "two cores",
        "needs": needs.model_dump(mode="json"),
        "rows": [row.to_dict() for row in rows],
        "advice": [advice.to_dict() for advice in advise(rows, needs)],
        "formulas": {
            "svg": [svg([drawn], "Lines: formulas.")],
            "rows": [table | {"expected_bytes": 8.645e6, "counted_bytes": 8.7e6, "ratio": 1.0064}],
            "break_even": "Even at 10.6 clients.",
        },
        "survey": [
            {"table": "compute", "entry": "split, 100 clients", "published": 0.1548, "ours": 0.00246, "ratio": 63.0}
            | {"implied": [62.6, 63.1], "words": "cut after the first layer"},
            {"table": "compute", "entry": "verdict", "words": "The table agrees with itself."},
        ],
        "notes": ["Three took part where two would not do."],
    }
    back: dict[str, Any] = json.loads(json.dumps(content | changes))
    return back


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return made_rows()


@pytest.fixture(scope="module")
def shown(rows: list[Row]) -> str:
    return page(made_content(rows))


def text_of(shown: str) -> str:
    """The words between the tags, one space between two."""
    bare = re.sub(r"<style>.*?</style>", " ", shown, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", bare)))


def section_of(shown: str, heading: str) -> str:
    """A section's mark-up, by the start of its heading."""
    return next(part for part in shown.split("<section>")[1:] if f"<h2>{heading}" in part)


def table_rows(shown: str) -> list[str]:
    """The words of each row of the main table."""
    body = section_of(shown, "Every way").split("<tbody>")[1].split("</tbody>")[0]
    return [text_of(line).strip() for line in body.split("<tr ")[1:]]


def test_every_row_is_on_the_page_where_it_belongs(shown: str, rows: list[Row]) -> None:
    unrun, answers = text_of(section_of(shown, "What was not run")), section_of(shown, "Answers afterwards")
    costs = section_of(shown, "What each costs")
    table = table_rows(shown)
    for row in rows:
        started = (MEASURED, MODELLED)
        if row.status not in started:
            assert f"{row.cell.words}: {row.status}" in unrun
        elif row.inference:
            assert f"{PROTECTIONS[row.cell.protection].words}</td>" in answers
            assert row.cell.words not in costs  # bytes of answers are not beside those of trainings
        else:
            assert f">{row.cell.words}" in costs
        if row.notes:
            assert row.notes[0] in shown
    trained = [row for row in rows if row.status in (MEASURED, MODELLED) and not row.inference]
    told = sorted((WAYS[r.cell.training].words, PROTECTIONS[r.cell.protection].words, r.cell.clients) for r in trained)
    tags = r"( recommended| modelled| audit inconclusive)*"
    for way, protection, clients in told:
        pattern = rf"{re.escape(way)}{tags} {re.escape(protection)} {clients} "
        assert sum(bool(re.search(pattern, line)) for line in table) == 1, (way, protection, clients)
    assert len(table) == len(trained)
    assert sum(" modelled " in line for line in table) == 2
    assert sum(" audit inconclusive " in line for line in table) == 1
    assert sum(" recommended " in line for line in table) == 2


@pytest.mark.parametrize("sort", ["peek", "accuracy", "bytes_up", "seconds", "client_flops", "training"])
def test_the_table_and_the_bars_are_sorted_as_asked_for(rows: list[Row], sort: str) -> None:
    content = made_content(rows, sort=sort)
    trained = [row for row in content["rows"] if row["status"] in (MEASURED, MODELLED) and not row["inference"]]
    expected = ordered(trained, sort)
    if sort != "training":
        values = [row[sort] for row in expected]
        there = [value for value in values if value is not None]
        assert there == sorted(there, reverse=sort == "accuracy")
        assert values[len(there) :] == [None] * (len(values) - len(there))
    shown = page(content)
    bars = re.findall(r'<span class="who">([^<]+?)(?: <span|</span>)', section_of(shown, "What each costs"))
    assert bars == [row["words"] for row in expected]
    clients = [re.search(r" (\d+) ", line.split(PROTECTIONS[row["protection"]].words, 1)[1]) for line, row in
               zip(table_rows(shown), expected, strict=True)]  # fmt: skip
    assert [int(found[1]) for found in clients if found] == [row["clients"] for row in expected]
    assert shown.count("aria-sort=") == 1


def test_the_recommendation_and_what_each_rule_dropped_are_told(shown: str, rows: list[Row]) -> None:
    told = text_of(section_of(shown, "Recommendation"))
    for advice in advise(rows, NEEDS):
        assert advice.headline in told
        assert advice.why in told
        for rule in advice.rules:
            assert rule.words in told
            for row, why in rule.dropped:
                assert f"{row.cell.words}: {why}" in told
        for row in advice.afterwards:
            assert row.cell.words in told
    nothing = page(made_content(rows, CompareSection(peek_at_most=0.0, guarantee=True)))
    assert "nothing fits, with 10 clients ; nearest: " in text_of(section_of(nothing, "Recommendation"))


def test_a_bar_is_as_long_as_its_figure_says() -> None:
    rows = [Row(Cell("split", "none", k), MEASURED, seconds=s, bytes_up=b).to_dict() for k, s, b in
            [(1, 10.0, 1e3), (2, 20.0, 1e5), (3, 0.0, 1e7), (4, None, 0.0)]]  # fmt: skip
    sent, time = panels(rows)
    assert (sent.log, time.log) == (True, False)
    ends = [end for end, _ in time.bars]
    assert ends[1] == pytest.approx(2 * (ends[0] or 0), abs=0.02)
    assert ends[2:] == [0.0, None]
    logs = [end or 0.0 for end, _ in sent.bars]
    assert logs[2] - logs[1] == pytest.approx(logs[1] - logs[0], abs=0.02)
    assert sent.bars[3] == (None, "0 B")
    assert {words: x for x, words in sent.ticks}["1 kB"] == logs[0]
    assert panels([]) == []


def test_hostile_words_stay_words(rows: list[Row]) -> None:
    content = made_content(rows, machine=HOSTILE, recipe={HOSTILE: HOSTILE}, notes=[HOSTILE], strength=HOSTILE)
    content["recipe_digest"] = HOSTILE
    for row in content["rows"][:3]:
        row |= {"training": HOSTILE, "protection": HOSTILE, "words": HOSTILE, "notes": [HOSTILE], "run": HOSTILE}
        row |= {"guarantee": HOSTILE}
    content["rows"][4] |= {"status": HOSTILE, "words": HOSTILE}
    for advice in content["advice"]:
        advice |= {"headline": HOSTILE, "why": HOSTILE}
        advice["rules"][0] |= {"words": HOSTILE}
        advice["rules"][0]["dropped"][0] |= {"words": HOSTILE, "why": HOSTILE}
    content["formulas"]["rows"][0] |= {"training": HOSTILE, "overheads": {HOSTILE: 1.0}}
    content["formulas"]["break_even"] = HOSTILE
    content["survey"][0] |= {"table": HOSTILE, "entry": HOSTILE, "words": HOSTILE, "implied": HOSTILE}
    shown = page(content)
    assert "<script" not in shown
    assert "<img" not in shown
    assert shown.count(html.escape(HOSTILE).replace("&#x27;", "&#39;")) >= 25


def test_the_page_refers_to_nothing_outside(shown: str) -> None:
    assert "<script" not in shown
    assert not re.search(r"\son\w+=|url\(|@import|\ssrc=", shown)
    assert re.findall(r'href="([^"]*)"', shown) == ["data:,"]
    assert "default-src 'none'" in shown
    assert not re.search(r"\b(nan|inf|None|Undefined)\b", shown)


def test_what_is_not_there_is_left_out(rows: list[Row]) -> None:
    content = made_content(rows)
    for name in ("formulas", "survey"):
        del content[name]
    told = text_of(page(content))
    assert "Formulas beside" not in told
    assert "The survey" not in told
    assert "What was not run" not in text_of(page(made_content([row for row in rows if row.is_measured])))


@pytest.mark.parametrize("status", [None, MODELLED, "not installed"], ids=["no rows", "modelled", "not run"])
def test_there_is_a_page_before_the_first_row(status: str | None) -> None:
    rows = [] if status is None else [Row(Cell("split", "none", 2), status)]
    shown = page(made_content(rows, CompareSection(), formulas={"rows": [], "svg": []}, survey=[]))
    assert "nothing fits, with 2 clients" in text_of(shown)
    assert "<svg viewBox" not in section_of(shown, "Every way")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.mark.browser
def test_the_page_in_a_real_browser(shown: str, browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "compare.html"
    path.write_text(shown)
    requests: list[str] = []
    console: list[str] = []
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: console.append(message.text))
    tab.on("pageerror", lambda error: console.append(str(error)))
    tab.goto(path.as_uri())
    ARTIFACTS.mkdir(exist_ok=True)
    tab.screenshot(path=ARTIFACTS / "compare.png", full_page=True)
    tab.evaluate("() => document.querySelectorAll('details').forEach(each => each.open = true)")
    assert tab.evaluate(UNSCROLLED) == 0
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        for width in (390, 800, 1280):
            tab.set_viewport_size({"width": width, "height": 844})
            assert tab.evaluate(OVERFLOW) <= 0, (scheme, width)
            assert tab.evaluate(SPILLED) == 0, (scheme, width)
            assert not tab.evaluate(TOUCHING), (scheme, width)
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    assert console == []
