"""The report: read from a run folder, looked at in a real browser."""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

from milkglass.errors import RunError
from milkglass.report import number, read_results, render, strip_png, strips, table, ticks, write_report
from tests.browser import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ARTIFACTS = Path(__file__).parent.parent / "artifacts"
SHOWN = 8
HOSTILE = "<script>document.title = 'owned'</script><img src=x onerror=alert(1)> [red]"


def digits() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Test records (P, 1, 8, 8) in [0, 1] of scikit-learn's digits, and the mean picture of each one's class."""
    pictures, labels = load_digits(return_X_y=True)
    pictures = (pictures / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    means = np.stack([pictures[labels == k].mean(0) for k in range(10)])
    return pictures[-SHOWN:], means[labels[-SHOWN:]]


def make_run(
    folder: Path, *, defense: str = "none", kept: float = 0.62, verdict: str = "over budget", audit: bool = True
) -> Path:
    """A made-up run; an attacker rebuilds the share `kept` of what tells a record from its class' mean picture."""
    folder.mkdir(parents=True)
    peek = 1 - (1 - kept) ** 2
    noise = np.random.default_rng(7)

    def correlation(value: float) -> dict[str, float]:
        return {"squared_unbiased": value, "biased": 0.4 + value / 2, "n": 256, "permutation_floor": 0.011}

    epochs = [
        {
            "epoch": epoch,
            "loss": (2.6 - kept) * math.exp(-epoch / 5) + 0.08 + 0.03 * float(noise.random()),
            "train_accuracy": 0.98,
            "accuracy": 0.93 + kept / 20 - 0.5 * math.exp(-epoch / 3),
            "distance_correlation": correlation(kept * (0.6 + 0.3 * math.exp(-epoch / 4))),
            "seconds": 1.0,
        }
        for epoch in range(1, 21)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in epochs))
    (folder / "recipe.toml").write_text(
        f"seed = 0\n\n[defense]\nname = {json.dumps(defense)}\n\n[network]\nname = 'cnn'\n"
    )
    wire = [
        {"direction": "to server", "kind": "activations", "messages": 640, "bytes": 21_234_567},
        {"direction": "to client", "kind": "gradients", "messages": 620, "bytes": 20_123_456},
        {"direction": "to client", "kind": "predictions", "messages": 20, "bytes": 43_210},
    ]
    summary = {
        "accuracy": 0.957,
        "distance_correlation": correlation(kept * 0.6),
        "bytes_sent": 21_234_567,
        "bytes_received": 20_166_666,
        "messages": 1_280,
        "seconds": 20.4,
        "seconds_per_epoch": 1.02,
        "client_flops_per_sample": 73_728,
        "seed": 0,
        "defense": defense,
        "keys": "derived from the seed: a rehearsal",
        "wire": wire,
        "records": {"train": {"hospital-a": 897}, "auxiliary": 400, "validation": 200, "test": 300},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    if audit:
        (folder / "audit.json").write_text(json.dumps(made_up_audit(peek, verdict)))
        records, means = digits()
        pictures = {"records": records, "entitled": means}
        for name, share in (("ridge", 0.8), ("kernel ridge", 0.9), ("decoder", 0.95), ("stack", 1.0)):
            pictures[name] = means + share * kept * (records - means)
        safetensors.numpy.save_file(pictures, folder / "pictures.safetensors")
    return folder


def made_up_audit(peek: float, verdict: str) -> dict[str, Any]:
    interval = {"value": peek, "low": peek - 0.02, "high": peek + 0.015}
    attacks = [
        {
            "name": name,
            "adversary": "honest-but-curious",
            "knows": ["auxiliary pairs", "entitled values"],
            "exposure": "fresh",
            "mse": 0.034 * (1 - share * peek),
            "psnr_db": -10 * math.log10(0.034 * (1 - share * peek)),
            "ssim": None if name == "ridge" else 0.5 + share * peek / 3,
            "peek": share * peek,
            "match_top1": share * 0.9,
            "seconds": 3.2,
            "undertrained": name == "decoder",
        }
        for name, share in (("ridge", 0.8), ("kernel ridge", 0.9), ("decoder", 0.7), ("stack", 1.0))
    ]
    return {
        "peek": interval,
        "exposures": {"fresh": interval},
        "verdict": verdict,
        "error_entitled": 0.034,
        "controls": {
            "identity": {"value": 0.998, "limit": 0.95, "passed": True},
            "independent": {"value": 0.012, "limit": 0.05, "passed": verdict != "inconclusive"},
            "gaussian": {"value": 1.042, "limit": 1.1, "passed": True},
        },
        "certificate": None,
        "attacks": attacks,
        "best_attack": "stack",
        "reference_accuracy": 0.963,
        "budget": None if verdict == "no budget set" else 0.3,
        "notes": ["300 test records, 1,000 bootstrap draws."],
    }


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """Two runs in one folder, as the demo leaves them."""
    make_run(
        tmp_path / "demo" / "nopeek", defense="NoPeek, weight 2, biased estimator", kept=0.45, verdict="over budget"
    )
    make_run(tmp_path / "demo" / "undefended")
    return tmp_path / "demo"


def damage(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_undefended_runs_come_first_then_by_name(demo: Path) -> None:
    make_run(demo / "a-noise", defense="noise, sigma 1", audit=False)
    (demo / "half-written").mkdir()
    assert [run.name for run in read_results(demo)] == ["undefended", "a-noise", "nopeek"]
    assert [run.name for run in read_results(demo / "nopeek")] == ["nopeek"]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("summary.json", b"{", "summary.json: damaged"),
        ("summary.json", b"{}", "summary.json: damaged: accuracy: Field required"),
        ("audit.json", b"\xff\xfe", "audit.json: missing or damaged, expected UTF-8"),
        ("audit.json", b'{"peek": "high"}', "audit.json: damaged: peek"),
        ("metrics.jsonl", b'\n{"epoch": 1, "lo', "metrics.jsonl, line 2: damaged"),
        ("metrics.jsonl", None, "metrics.jsonl: missing"),
        ("metrics.jsonl", b"", "metrics.jsonl: empty; expected a line for each epoch"),
        ("recipe.toml", None, "recipe.toml: missing"),
        ("pictures.safetensors", b"half", "pictures.safetensors: damaged"),
    ],
)
def test_a_damaged_file_is_one_clear_line(demo: Path, file: str, content: bytes | None, words: str) -> None:
    path = demo / "nopeek" / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(RunError, match=re.escape(words)) as caught:
        read_results(demo)
    assert "\n" not in str(caught.value)
    assert str(path.parent) in str(caught.value)


def test_pictures_of_unequal_shapes_are_refused(demo: Path) -> None:
    records, means = digits()
    safetensors.numpy.save_file({"records": records, "stack": means[1:]}, demo / "nopeek" / "pictures.safetensors")
    with pytest.raises(RunError, match="tensors of its shape"):
        read_results(demo)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no finished run; expected summary\.json"):
        read_results(tmp_path / "nowhere")


def test_hostile_words_are_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b>run", defense=HOSTILE)
    for name in ("audit.json", "summary.json"):
        damage(run / name, '"stack"' if name == "audit.json" else '"activations"', json.dumps(HOSTILE))
    page = write_report(run).read_text()
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "<b>run" not in page
    assert page.count("&lt;script&gt;") >= 4  # defense, recipe, attack, kind of message


def printed(shown: Table, width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(shown)
    return file.getvalue()


def test_the_table_prints_the_numbers_and_no_markup(demo: Path) -> None:
    make_run(demo / "odd", defense="noise [red]", audit=False)
    wide, narrow = (printed(table(read_results(demo)), width).splitlines() for width in (200, 80))
    assert len(wide) == 2 + 3
    figures = r"95\.7 % +0\.37 +0\.86 \[0\.84, 0\.87\] +21\.2 MB +20\.2 MB +20\.4 s"
    assert re.search(rf"^undefended +none +{figures}", wide[2])
    assert "noise [red]" in wide[4]
    assert "not audited" in wide[4]
    assert any(re.search(figures, line) for line in narrow)  # on a small terminal only words are wrapped


def test_the_strip_stacks_records_reconstructions_and_the_baseline(demo: Path) -> None:
    (strip,) = strips(read_results(demo))
    assert [(row.label, row.peek) for row in strip] == [
        ("test records", "1"),
        ("undefended", "0.86"),
        ("nopeek", "0.70"),
        ("entitled baseline", "0"),
    ]
    records, means = digits()
    errors = [float(((row.records - records) ** 2).mean()) for row in strip]
    assert errors == sorted(errors)
    np.testing.assert_array_equal(strip[-1].records, means)


def test_runs_on_other_records_get_their_own_strip(demo: Path) -> None:
    path = demo / "nopeek" / "pictures.safetensors"
    safetensors.numpy.save_file({k: 1 - v for k, v in safetensors.numpy.load_file(path).items()}, path)
    assert [[row.label for row in strip][1] for strip in strips(read_results(demo))] == ["undefended", "nopeek"]


def test_the_strip_as_png_shows_the_records_and_repeats(demo: Path) -> None:
    results = read_results(demo)
    png = strip_png(results)
    assert png == strip_png(results)
    image = Image.open(io.BytesIO(png))
    records, _ = digits()
    first = np.asarray(image.convert("L"))[16:88, -16 - SHOWN * 80 + 8 :][:, :72]  # the first record, 72 pixels a side
    np.testing.assert_allclose(first[4::9, 4::9] / 255, records[0, 0], atol=1 / 255)
    label_column = np.asarray(image)[:, : -16 - SHOWN * 80]
    assert label_column.min() < 80  # ink of the labels


def test_no_pictures_no_strip(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no strip to draw"):
        strip_png(read_results(make_run(tmp_path / "run", audit=False)))


def test_a_run_without_audit_says_so(tmp_path: Path) -> None:
    page = render(read_results(make_run(tmp_path / "run", audit=False)))
    assert "not audited yet" in page
    assert "no run has been audited with its pictures kept" in page


def test_flat_records_are_shown_as_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    rows = {"records": np.full((5, 12), -1.25), "stack": np.full((5, 12), 0.75), "entitled": np.zeros((5, 12))}
    safetensors.numpy.save_file(rows, run / "pictures.safetensors")
    page = render(read_results(run))
    assert page.count("<td>−1.25</td>") == 3 * 8
    assert "<img" not in page


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        ("within budget", "stays within the budget of 0.30"),
        ("over budget", "above the budget of 0.30"),
        ("inconclusive", "not a sign of safety"),
        ("no budget set", "nothing was passed or failed"),
    ],
)
def test_the_verdict_is_told_in_words(tmp_path: Path, verdict: str, words: str) -> None:
    page = render(read_results(make_run(tmp_path / "run", verdict=verdict)))
    assert words in " ".join(page.split())
    assert ("(control: independent)" in page) == (verdict == "inconclusive")


def test_a_run_that_diverged_is_still_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[10]["loss"] = math.nan
    path.write_text("\n".join(map(json.dumps, lines)))
    page = render(read_results(run))
    path_of_loss = re.findall(r'class="line" d="(M[^"]*L[^"]*)"', page)[0]
    assert path_of_loss.count("M") == 2  # the line is broken at the epoch that is no number
    assert "nan" not in path_of_loss
    path.write_text("\n".join(json.dumps({**line, "loss": math.nan}) for line in lines))
    assert "Line chart of loss" not in render(read_results(run))


def test_one_epoch_is_a_chart(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().splitlines()[0])
    assert "epochs 1 to 1" in render(read_results(run))


def test_large_pictures_keep_the_page_under_three_megabytes(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).random((10, 3, 224, 224), dtype=np.float32)
    for index in range(12):
        run = make_run(tmp_path / "sweep" / f"run-{index}", defense=f"noise {index}")
        safetensors.numpy.save_file({"records": noise, "stack": 1 - noise}, run / "pictures.safetensors")
    assert write_report(tmp_path / "sweep").stat().st_size < 3_000_000


def test_a_report_that_cannot_be_written_leaves_the_old_one(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_report(demo).read_text()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        write_report(demo)
    assert (demo / "report.html").read_text() == before
    assert sorted(path.name for path in demo.iterdir()) == ["nopeek", "report.html", "undefended"]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.83, 0.97), (-0.01, 0.4), (0, 1234), (3e-5, 4e-5), (0, 0), (5, 5), (-2, -1), (1, 20)]
)
def test_ticks_are_even_and_reach_both_ends(low: float, high: float) -> None:
    marks = ticks(low, high)
    steps = np.diff(marks)
    assert 2 <= len(marks) <= 8
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    assert marks[0] <= low + 1e-9
    assert marks[-1] >= high - 1e-9


def test_numbers_in_words() -> None:
    values = (0.5, -0.004, -0.02, 12345.6, math.inf, -math.inf, math.nan)
    assert [number(v) for v in values] == ["0.50", "0.00", "−0.02", "12,346", "∞", "−∞", "not a number"]


PIXELS = """() => Promise.all([...document.images].map(async image => {
  await image.decode();
  const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight).getContext("2d");
  canvas.drawImage(image, 0, 0);
  const values = canvas.getImageData(0, 0, image.naturalWidth, image.naturalHeight).data;
  return [image.naturalWidth, new Set(values).size, image.alt];
}))"""
UNTOLD = (
    """() => [...document.querySelectorAll("img, svg")].filter(e => !(e.alt || e.getAttribute("aria-label"))).length"""
)
INJECT = """() => document.body.append(Object.assign(document.createElement("script"), {text: "window.owned = 1"}))"""
OVERFLOW = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.mark.browser
def test_the_page_in_a_real_browser(demo: Path, browser: Browser) -> None:
    path = write_report(demo)
    assert path.stat().st_size < 3_000_000
    requests: list[str] = []
    console: list[str] = []
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: console.append(message.text))
    page.on("pageerror", lambda error: console.append(str(error)))
    page.goto(path.as_uri())
    pictures = page.evaluate(PIXELS)
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / "report.png", full_page=True)
    assert page.evaluate(UNTOLD) == 0
    assert page.locator("svg[role=img]").count() == 2 + 3  # a gauge a run, and three charts
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for width in (390, 800, 1280):
            page.set_viewport_size({"width": width, "height": 844})
            assert page.evaluate(OVERFLOW) <= 0, (scheme, width)
    assert len(pictures) == 4 * SHOWN
    assert all(width == 8 and colors > 2 and alt for width, colors, alt in pictures)
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    assert console == []


@pytest.mark.browser
def test_a_hostile_page_runs_nothing(tmp_path: Path, browser: Browser) -> None:
    run = make_run(tmp_path / "run", defense=HOSTILE)
    page = browser.new_page()
    page.goto(write_report(run).as_uri())
    assert page.title() == "milkglass: run"
    assert page.evaluate("() => document.scripts.length") == 0
    page.evaluate(INJECT)  # even a script that got into the page is refused by its policy
    assert page.evaluate("() => window.owned") is None
