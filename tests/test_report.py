"""The report: read from a run folder, looked at in a real browser."""

from __future__ import annotations

import html
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
from milkglass.report import attack_strip, read_results, render, strip_png, strips, table, write_report
from tests.browser import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ARTIFACTS = Path(__file__).parent.parent / "artifacts"
SHOWN = 8
PICTURES = "pictures.safetensors"
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


def detail(run: Path, **changes: Any) -> Path:
    """Give a made-up run an audit with everything that may be in it; `changes` replace whole keys."""
    path = run / "audit.json"
    audit = json.loads(path.read_text())
    for row in audit["attacks"]:
        row |= {"records": 300, "peek_low": row["peek"] - 0.02, "peek_high": row["peek"] + 0.02}
    attacks = [*audit["attacks"], attack("fsha", 0.4, adversary="malicious", knows=["records", "training"])]
    attacks += [{**row, "exposure": "repeated", "peek": row["peek"] - 0.1} for row in audit["attacks"]]

    def guess(measure: str, name: str, value: float, **details: float) -> dict[str, Any]:
        who = {"name": name, "adversary": "honest-but-curious", "knows": ["pairs"], "exposure": "fresh"}
        return who | interval(value, 0.02) | {"measure": measure, "n": 300, "seconds": 0.4, "details": details}

    audit |= {
        "attacks": attacks,
        "exposures": {"fresh": audit["peek"], "repeated": interval(audit["peek"]["value"] - 0.1)},
        "measures": {
            "peek": audit["peek"],
            "match": interval(0.9),
            "attribute.sex": interval(0.12),
            "membership.auc": interval(0.51, 0.02),
            "tpr@1%": interval(0.06),
        },
        "budget": {"peek": 0.99, "attribute.sex": 0.05},
        "strength": "thorough",
        "inferences": [
            guess("attribute.sex", "linear probe", 0.12, prior=0.5),
            guess("attribute.sex", "linear probe, answer alone", 0.03),
            guess("membership.auc", "loss threshold", 0.51),
            guess(
                "tpr@1%",
                "loss threshold",
                0.06,
                false_positive_rate=0.013,
                false_positive_rate_low=0.002,
                false_positive_rate_high=0.034,
            ),
        ],
        "curves": [
            {
                "attack": name,
                "exposure": "fresh",
                "pairs": [50, 200, 400],
                "mse": mse,
                "peek": [1 - m / 0.04 for m in mse],
            }
            for name, mse in (("ridge", [0.05, 0.03, 0.02]), ("stack", [0.04, 0.02, 0.01]))
        ],
        "skipped": [{"attack": "lira", "why": "needs 99 outsiders; the view has 12"}],
    }
    path.write_text(json.dumps(audit | changes))
    return run


def interval(value: float, half: float = 0.01) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def attack(name: str, peek: float, half: float = 0.02, **changes: Any) -> dict[str, Any]:
    """A row of `attacks` with everything that may be in it."""
    row: dict[str, Any] = made_up_audit(0.5, "over budget")["attacks"][0]
    return (
        row | {"name": name, "peek": peek, "peek_low": peek - half, "peek_high": peek + half, "records": 64} | changes
    )


def words(page: str) -> str:
    """What a reader sees of a page, on one line."""
    body = re.sub(r"(?s)<style>.*?</style>|<[^>]*>", " ", page)
    return re.sub(r" +([.,:;])", r"\1", " ".join(html.unescape(body).split()))


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


@pytest.mark.parametrize("rows", [(SHOWN, 1, 7, 8), (SHOWN + 1, 1, 8, 8), (SHOWN, 64)])
def test_pictures_of_other_shapes_are_refused(demo: Path, rows: tuple[int, ...]) -> None:
    records, _ = digits()
    pictures = {"records": records, "stack": np.zeros(rows, np.float32)}
    safetensors.numpy.save_file(pictures, demo / "nopeek" / "pictures.safetensors")
    with pytest.raises(RunError, match="tensors of its shape"):
        read_results(demo)


def make_recorded(folder: Path, *, entitled: bool = False, **changes: Any) -> Path:
    """What an audit of arrays that were recorded elsewhere leaves: audit.json and the pictures alone."""
    run = make_run(folder)
    for name in ("summary.json", "metrics.jsonl", "recipe.toml"):
        (run / name).unlink()
    records, means = digits()
    if not entitled:
        means = np.broadcast_to(means.mean(0), means.shape).copy()
    safetensors.numpy.save_file({"records": records, "entitled": means, "stack": 0.9 * records}, run / PICTURES)
    audit = json.loads((run / "audit.json").read_text())
    audit.pop("reference_accuracy")
    sources = {"activations": "elsewhere/A<b>.npy", "records": "elsewhere/X.npy"}
    (run / "audit.json").write_text(json.dumps(audit | sources | changes))
    return run


def test_recorded_arrays_get_a_report_without_what_needs_a_run(tmp_path: Path) -> None:
    run = make_recorded(tmp_path / "scan", inferences=[], notes=[])
    (results,) = read_results(run)
    assert (results.summary, results.recipe, results.epochs, results.defense) == (None, "", (), None)
    page = write_report(run).read_text()
    shown = words(page)
    assert "Activations: elsewhere/A<b>.npy; records: elsewhere/X.npy." in shown
    assert "<b>.npy" not in page
    assert "removed 86 % of the error that the mean record leaves" in shown
    assert "nearest to the right one of the records held back from it" in shown
    assert "scan: it is entitled to nothing that tells these records apart." in shown
    # Neither an answer nor a training is known, so the page names none.
    untold = ("the answer", "Accuracy", "accuracy", "Bytes", "Seconds per", "Recipe", "recipe", "By epoch", "the wire")
    assert [word for word in untold if word in page.partition("</style>")[2]] == []
    assert [(row.label, row.detail) for row in attack_strip(results)] == [
        ("records", "held back"),
        ("stack", "fresh records"),
        ("entitled baseline", "the mean record"),
    ]


def test_entitled_values_that_came_with_the_arrays_are_the_baseline(tmp_path: Path) -> None:
    run = make_recorded(tmp_path / "scan", entitled=True)
    page = words(render(read_results(run)))
    assert "of the error that the entitled baseline leaves" in page
    assert "scan: it is entitled to the values that were given as such" in page
    (run / PICTURES).unlink()  # nothing tells any more whether there were entitled values
    page = words(render(read_results(run)))
    assert "the entitled baseline leaves" in page
    assert "or to the mean record where none were" in page


def test_recorded_arrays_stand_beside_runs(demo: Path) -> None:
    detail(make_recorded(demo / "a-scan", entitled=True))
    results = read_results(demo)
    assert [run.name for run in results] == ["undefended", "a-scan", "nopeek"]
    lines = printed(table(results), 200).splitlines()
    assert re.search(r"^a-scan +not known +– +– +0\.86 \[0\.84, 0\.87\] +– +– +–", lines[3])
    (strip,) = strips(results)
    assert [row.label for row in strip] == ["test records", "undefended", "a-scan", "nopeek", "entitled baseline"]
    page = render(results)
    shown = words(page)
    assert "a-scan not known – – 0.86 (0.84 to 0.87) – – –" in shown
    assert "Recipe of nopeek" in shown
    assert "Recipe of a-scan" not in shown
    assert page.count('aria-label="Messages of ') == 2
    assert "It is entitled to the answer. In vanilla training: what an undefended network of the same recipe" in shown
    assert "(its accuracy: 96.3 %)" in shown


def test_an_audit_that_was_written_elsewhere_is_shown_alone(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "audits").mkdir()
    for name in ("audit.json", PICTURES):
        (demo / "nopeek" / name).rename(tmp_path / "audits" / name)
    damage(tmp_path / "audits" / "audit.json", '"certificate": null', '"defense": "noise", "accuracy": 0.9')
    (results,) = read_results(tmp_path / "audits")
    assert results.defense == "noise"
    page = words(render([results]))
    assert "audits noise over budget" in page.replace(" ! ", " ")
    assert "Only the audit is here" in page
    assert "a guess from the answer alone leaves" in page


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no finished run; expected summary\.json"):
        read_results(tmp_path / "nowhere")


def test_hostile_words_are_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b>run", defense=HOSTILE)
    for name in ("audit.json", "summary.json"):
        damage(run / name, '"stack"' if name == "audit.json" else '"activations"', json.dumps(HOSTILE))
    skipped = [{"attack": HOSTILE, "why": HOSTILE}]
    attacks = [attack(HOSTILE, 0.5, adversary=HOSTILE, knows=[HOSTILE], exposure=HOSTILE)]
    detail(run, skipped=skipped, attacks=attacks, budget={HOSTILE: 0.1}, measures={HOSTILE: interval(0.5)})
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


def test_beside_a_picture_stands_the_peek_of_its_own_exposure(demo: Path) -> None:
    """Private training records are never shown: the worst exposure may be theirs, and the pictures another's."""
    fresh = interval(0.5)
    worst = attack("decoder", 0.95, exposure="trained-on")
    changes = {"best_attack": "decoder", "pictures_of": "fresh", "peek": interval(0.95), "exposures": {"fresh": fresh}}
    for run in ("undefended", "nopeek"):
        path = demo / run / "audit.json"
        audit = json.loads(path.read_text())
        path.write_text(json.dumps(audit | changes | {"attacks": [*audit["attacks"], worst]}))
    results = read_results(demo)
    (strip,) = strips(results)
    assert [(row.detail, row.peek) for row in strip[1:3]] == [
        ("rebuilt by stack", "0.86"),
        ("rebuilt by stack", "0.70"),
    ]
    assert "0.95" not in [row.peek for row in attack_strip(results[0])]
    assert "is nearest to the right one of the training records that were tried" in words(render(results))


def test_a_run_has_a_row_for_each_attack_best_first(tmp_path: Path) -> None:
    run = detail(make_run(tmp_path / "run"))
    path = run / "pictures.safetensors"
    pictures = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(pictures | {"fsha": pictures["records"][:3], "none": pictures["records"][:0]}, path)
    rows = attack_strip(read_results(run)[0])
    names = ["stack", "kernel ridge", "ridge", "decoder", "fsha"]
    assert [row.label for row in rows] == ["test records", *names, "entitled baseline"]
    assert [row.peek for row in rows] == ["1", "0.86", "0.77", "0.68", "0.60", "0.40", "0"]
    assert [len(row.records) for row in rows] == [8, 8, 8, 8, 8, 3, 8]  # fsha rebuilt the first three only
    assert {row.detail for row in rows[1:-1]} == {"fresh records"}  # the worst exposure, as the pictures are
    page = render(read_results(run))
    shown = [html.unescape(alt) for alt in re.findall(r'alt="Record 1: ([^,"]*),', page)]
    assert shown == [row.label for row in rows]


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


def told(tmp_path: Path, **changes: Any) -> tuple[str, str, str]:
    """What the page says in words that an attacker could do, could not do, and what was not tried."""
    page = words(render(read_results(detail(make_run(tmp_path / "run"), **changes))))
    section = page[page.index("What an attacker could do") : page.index("What an attacker sees")]
    could, _, rest = section.partition("What these attacks could not do")
    if not rest:
        could, _, rest = could.partition("What was not tried")
        return could, "", rest
    could_not, _, not_tried = rest.partition("What was not tried")
    return could, could_not, not_tried


def test_plain_words_say_what_an_attacker_could_do(tmp_path: Path) -> None:
    attacks = [
        attack("stack", 0.854, knows=["records", "pairs"], match_top1=0.934),
        attack("ridge", 0.7, knows=["pairs"]),
        attack("fsha", 0.4, adversary="malicious", knows=["records", "training"], match_top1=0.002),
    ]
    could, could_not, not_tried = told(tmp_path, attacks=attacks)
    assert (
        "An honest-but-curious server that knows 400 pairs of a record and what the client sends for it rebuilt more "
        "than the answer alone tells. It removed 85 % of the error that a guess from the answer alone leaves, and in "
        "93 of 100 cases what it rebuilt is nearest to the right one of 300 test records. stack, fresh records: "
        "peek 0.85, interval 0.83 to 0.87"
    ) in could
    assert (
        "A malicious server that knows 400 records of the same kind and every message of a training: 40 % of that "
        "error, and the right record in fewer than 1 of 100 cases."
    ) in could
    assert "ridge" not in could  # the same attacker has a better attack
    assert "An attacker could tell sex better than a blind guess, and better than from the answer alone." in could
    assert "named 1.3 %) found 6.0 % of those that were trained on. Interval 5.0 % to 7.0 %" in could
    assert "could not tell a record that was trained on from another one better than a coin toss" in could_not
    assert "Right in 51 of 100 comparisons, interval 49 to 53" in could_not
    assert "malicious server" not in not_tried
    assert "The trained-on exposure: all that the server saw" in not_tried
    assert "repeated" not in not_tried
    assert "A server that holds the weights of the client's stage." in not_tried
    assert "Skipped: lira. needs 99 outsiders; the view has 12" in not_tried


def test_plain_words_say_what_these_attacks_could_not_do(tmp_path: Path) -> None:
    attacks = [attack("stack", 0.01, knows=["client weights"]), attack("unsplit", -0.9, knows=["architecture"])]
    measures = {"peek": interval(0.01), "attribute.sex": interval(0.0)}
    could, could_not, not_tried = told(tmp_path, attacks=attacks, measures=measures, inferences=[])
    assert "None of these attacks showed more than the answer alone tells. A better one may." in could
    assert "knows the weights of the client's stage rebuilt nothing that this test could show beyond what" in could_not
    assert "Did worse than a guess from the answer alone: unsplit (peek −0.90). So weak an attack says" in could_not
    assert "An attacker could not tell sex better than a blind guess. Balanced accuracy over the blind" in could_not
    assert "A malicious server" in not_tried
    assert "holds the weights" not in not_tried
    assert "Telling whose records were trained on." in not_tried
    assert "Guessing a sensitive fact" in not_tried


def test_more_false_alarms_than_were_set_make_luck_of_a_find(tmp_path: Path) -> None:
    row = {
        **interval(0.03),
        "measure": "tpr@1%",
        "name": "loss threshold",
        "adversary": "honest-but-curious",
        "exposure": "fresh",
        "n": 100,
        "seconds": 1,
        "details": {"false_positive_rate": 0.025},
    }
    measures = {"peek": interval(0.5), "tpr@1%": interval(0.03)}
    could, _, _ = told(tmp_path / "unknown", measures=measures, inferences=[])
    assert "all other records wrongly found 3.0 % of those that were trained on. Interval 2.0 % to 4.0 %" in could
    could, could_not, _ = told(tmp_path, measures=measures, inferences=[row])
    assert "trained on" not in could
    assert "here it named 2.5 %) found 3.0 % of those that were trained on, no more than luck would." in could_not


def test_an_attribute_that_the_answer_tells_is_not_blamed_on_the_activations(tmp_path: Path) -> None:
    could, _, _ = told(tmp_path, measures={"peek": interval(0.5), "attribute.sex": interval(0.035)})
    assert "better than a blind guess, but not clearly better than from the answer alone." in could


@pytest.mark.parametrize("verdict", ["within budget", "inconclusive"])
def test_no_page_calls_anything_safe(tmp_path: Path, verdict: str) -> None:
    attacks = [attack("stack", 0.0)]
    page = words(render(read_results(detail(make_run(tmp_path / "run", verdict=verdict), attacks=attacks))))
    assert re.search(r"(?i)\b(safe|secure|protected)\b", page) is None
    assert "Each attack is a lower bound" in page
    assert ("what was not found says nothing" in page) == (verdict == "inconclusive")


def test_every_measure_stands_beside_its_budget(tmp_path: Path) -> None:
    page = words(render(read_results(detail(make_run(tmp_path / "run", verdict="over budget")))))
    assert "The upper end of the interval of attribute.sex, 0.13, is above the budget of 0.05" in page
    assert "interval of peek" not in page  # 0.87 is within 0.99
    assert "attribute.sex 0.12 (0.11 to 0.13) ✗ over 0.05 Balanced accuracy of guessing sex" in page
    assert "peek 0.86 (0.84 to 0.87) ✓ within 0.99" in page
    assert "membership.auc 0.51 (0.49 to 0.53) How often" in page
    assert "false positive rate 0.013 (0.002 to 0.034)" in page


def certified(**check: Any) -> dict[str, Any]:
    """What audit.json says of a certificate, and the bounds that it and a gap prove."""

    def bound(measure: str, kind: str, value: float, low: float | None, words: str) -> dict[str, Any]:
        row = {"measure": measure, "kind": kind, "name": "made up", "value": value, "low": low}
        return row | {"exposure": "fresh", "words": words}

    checked = {"sigma": 0.5, "longest": 1.9, "p_noise": 0.4, "p_clip": 1.0, "agrees": True} | check
    return {
        "certificate": {
            **{"dimensions": 8, "clip": 2.0, "sigma": 0.5, "bits_per_release": 6.34, "epsilon": None, "delta": 1e-5},
            **{"reidentification": [], "words": ["tells at most 6.34 bits <b>"], "check": checked},
        },
        "bounds": [
            bound("membership", "lower", 0.58, 0.545, "members are told at least 0.545 of the time"),
            bound("matching", "upper", 0.412, None, "nobody names the right one"),
            bound("attribute", "upper", 1.0, None, "vacuous: enough to tell"),
        ],
    }


def test_bounds_stand_beside_the_attacks_they_bound_and_the_certificate_in_its_words(tmp_path: Path) -> None:
    run = detail(make_run(tmp_path / "run"), **certified())
    page = render(read_results(run))
    shown = words(page)
    assert "membership fresh ≥ 0.545 0.510 AUC, not the bound's unit; loss threshold members are told at least" in shown
    assert "matching fresh ≤ 0.412 – nobody names the right one" in shown
    told = "0.620 balanced accuracy on sex, with what it is entitled to; linear probe vacuous: enough to tell"
    assert f"attribute fresh vacuous {told}" in shown
    assert shown.index("What was guessed") < shown.index("≥ 0.545") < shown.index("Can the attacks be trusted?")
    assert "6.34 bits per release, at most tells at most 6.34 bits <b>" in shown
    assert "6.34 bits &lt;b&gt;" in page
    assert "8 coordinates, norm at most 2.00, noise of sigma 0.500 on each." in shown
    assert "✓ agrees with releases that the audit made anew with the run's own client: noise of sigma 0.500" in shown
    assert "mean releases up to 1.90 long. A client that sends otherwise in the field is not seen" in shown
    assert "Peek is no certificate." in shown


def test_a_bound_on_fair_facts_stands_beside_facts_with_two_values_alone(tmp_path: Path) -> None:
    run = detail(make_run(tmp_path / "run"), **certified())
    path = run / "audit.json"
    audit = json.loads(path.read_text())
    sex = next(row for row in audit["inferences"] if row["measure"] == "attribute.sex")
    many = sex | {"measure": "attribute.country", "value": 0.4, "details": {"prior": 0.1}}
    older = sex | {"value": 0.3, "exposure": "repeated"}
    alone = sex | {"value": 0.2, "name": "linear probe, answer alone"}

    def beside(*rows: dict[str, Any]) -> str:
        path.write_text(json.dumps(audit | {"inferences": rows}))
        shown = words(render(read_results(run)))
        return shown[shown.index("attribute fresh") :].split("vacuous")[1].strip()

    assert beside(many, older, alone) == "–"
    assert beside(many, older, alone, sex | {"value": 0.1}, sex).startswith("0.620 balanced accuracy on sex")


def test_a_certificate_that_releases_speak_against_is_called_void(tmp_path: Path) -> None:
    run = detail(make_run(tmp_path / "run"), **certified(agrees=False, sigma=0.25))
    shown = words(render(read_results(run)))
    assert (
        "✗ void: releases that the audit made anew with the run's own client speak against it: noise of sigma 0.250"
        in shown
    )
    assert "✓ agrees" not in shown
    unchecked = certified()
    unchecked["certificate"]["check"] = None
    run = detail(make_run(tmp_path / "unchecked"), **unchecked)
    assert "Whether releases agree with it was not looked at." in words(render(read_results(run)))


def test_bits_have_no_interval(tmp_path: Path) -> None:
    bits = {"value": 6.34, "low": 6.34, "high": 6.34}
    run = detail(make_run(tmp_path / "run"), measures={"bits": bits}, budget={"bits": 5.0}, **certified())
    shown = words(render(read_results(run)))
    assert "bits 6.34 ✗ over 5.00 What one release tells of its record at most" in shown
    assert "The certificate's bits, 6.34, are above the budget of 5.00" in shown


def test_without_a_certificate_the_page_says_so(tmp_path: Path) -> None:
    shown = words(render(read_results(detail(make_run(tmp_path / "run")))))
    assert "No certificate." in shown
    assert "What is certified" not in shown
    assert "what is proved of such attacks" not in shown


def test_the_exposures_and_the_curves_are_shown(tmp_path: Path) -> None:
    page = render(read_results(detail(make_run(tmp_path / "run"))))
    shown = words(page)
    assert re.search(r"run 0\.86 \(0\.84 to 0\.87\) 0\.76 \(0\.75 to 0\.77\) not attacked", shown)
    assert "Line chart of error, fresh records" in page
    assert "number of pairs 50 to 400. ridge: first 0.050, last 0.020." in page
    assert "answer alone: 0.040." in page
    bars = re.findall(r'class="who">([^<]*) <span class="soft">([^<]*)</span>', page)
    assert len(bars) == 9
    assert bars[:3] == [("stack", "fresh"), ("kernel ridge", "fresh"), ("stack", "repeated")]
    assert bars[-1] == ("fsha", "fresh")


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
    assert "epoch 1 to 1" in render(read_results(run))


def test_large_pictures_keep_the_page_under_three_megabytes(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).random((10, 3, 64, 64), dtype=np.float32)
    names = [f"attack {index}" for index in range(16)]
    for index in range(6):
        run = make_run(tmp_path / "sweep" / f"run-{index}", defense=f"noise {index}")
        detail(run, attacks=[attack(name, 0.3) for name in names], best_attack=names[0])
        pictures: dict[str, Any] = {"records": noise, "entitled": noise / 2, **dict.fromkeys(names, 1 - noise)}
        safetensors.numpy.save_file(pictures, run / "pictures.safetensors")
    page = write_report(tmp_path / "sweep")
    assert page.stat().st_size < 3_000_000
    assert page.read_text().count("<img") > 6 * 18 * 9


def test_a_report_that_cannot_be_written_leaves_the_old_one(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_report(demo).read_text()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        write_report(demo)
    assert (demo / "report.html").read_text() == before
    assert sorted(path.name for path in demo.iterdir()) == ["nopeek", "report.html", "undefended"]


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
BARS = """() => [...document.querySelectorAll(".ranks li")].map(row => {
  const [plot, fill] = [".plot", ".fill"].map(name => row.querySelector(name).getBoundingClientRect());
  const value = Number(row.querySelector(".figure b").textContent);
  return [value, (fill.right - plot.left) / plot.width, (fill.left - plot.left) / plot.width];
})"""
INJECT = """() => document.body.append(Object.assign(document.createElement("script"), {text: "window.owned = 1"}))"""
OVERFLOW = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.mark.browser
def test_the_page_in_a_real_browser(demo: Path, browser: Browser) -> None:
    for run in demo.iterdir():
        detail(run)
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
    assert page.locator("svg[role=img]").count() == 2 + 3 + 2  # a gauge a run, three charts, curves a run
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for width in (390, 800, 1280):
            page.set_viewport_size({"width": width, "height": 844})
            assert page.evaluate(OVERFLOW) <= 0, (scheme, width)
            for value, end, zero in page.evaluate(BARS):
                assert abs(value - (end - zero)) < 0.012, (scheme, width)
    assert len(page.evaluate(BARS)) == 2 * 9
    assert len(pictures) == (4 + 2 * 6) * SHOWN
    assert all(width == 8 and colors > 2 and alt for width, colors, alt in pictures)
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    assert console == []


@pytest.mark.browser
def test_recorded_arrays_in_a_real_browser(tmp_path: Path, browser: Browser) -> None:
    long = "recorded/" + 12 * "with-a-long-name-" + "activations.npy"
    path = write_report(make_recorded(tmp_path / "scan", activations=long))
    page = browser.new_page()
    page.goto(path.as_uri())
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate(OVERFLOW) <= 0, width
    assert "0, the mean record" in (page.locator("svg.gauge").text_content() or "")


@pytest.mark.browser
def test_a_hostile_page_runs_nothing(tmp_path: Path, browser: Browser) -> None:
    run = make_run(tmp_path / "run", defense=HOSTILE)
    page = browser.new_page()
    page.goto(write_report(run).as_uri())
    assert page.title() == "milkglass: run"
    assert page.evaluate("() => document.scripts.length") == 0
    page.evaluate(INJECT)  # even a script that got into the page is refused by its policy
    assert page.evaluate("() => window.owned") is None
