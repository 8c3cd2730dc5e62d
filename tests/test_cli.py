"""The commands, as a person types them: what they print and write, and one line with exit code 2 on bad input."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from milkglass.cli import main
from milkglass.recipe import fields

ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "examples" / "digits.toml")
SMALL = [
    *("--set", "training.epochs=1", "--set", "data.train_records=128", "--set", "data.test_share=0.05"),
    *("--set", "network.settings.width=4", "--set", "training.batch_size=64"),
]


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit code, standard output, error stream) of a command."""
    code: object = 0
    try:
        main(arguments)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert isinstance(code, int) or code is None
    return code or 0, captured.out, captured.err


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a refused command prints on the error stream."""
    code, out, err = _run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("milkglass: ")
    return err


def test_help_is_quick_and_lists_the_commands() -> None:
    seconds: list[float] = []
    while len(seconds) < 10 and min(seconds, default=1.0) >= 0.5:  # a busy machine gets more tries, a slow one none
        before = resource.getrusage(resource.RUSAGE_CHILDREN)  # what others compute meanwhile is not ours
        done = subprocess.run([sys.executable, "-m", "milkglass", "--help"], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert all(command in done.stdout for command in ("train", "audit", "cuts", "report"))
    assert min(seconds) < 0.5


def test_help_loads_no_torch() -> None:
    code = "import sys; sys.argv = ['milkglass', '--help']\nfrom milkglass.cli import main\ntry:\n    main()\n" + (
        "except SystemExit:\n    pass\nassert 'torch' not in sys.modules and 'pydantic' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_train_help_lists_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, "train", "--help")
    assert code == 0
    for key, _, _, _ in fields():
        assert key in out


def test_train_cuts_and_their_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = _run(capsys, "train", DIGITS, *SMALL, "--out", str(tmp_path / "run"))
    assert code == 0
    assert "defense NoPeek, weight 2, biased estimator; accuracy" in out
    assert "epoch 1 of 1: loss" in err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert f"{summary['bytes_sent']:,} bytes sent" in out

    code, out, _ = _run(capsys, "cuts", DIGITS, "--json", str(tmp_path / "cuts.json"))
    assert code == 0
    costs = json.loads((tmp_path / "cuts.json").read_text())["cuts"]
    assert [cost["name"] for cost in costs] == ["block1", "block2", "hidden"]
    assert costs[1]["bytes_per_record"] == 16 * 2 * 2 * 4
    assert all(f"{cost['client_flops']:,}" in out for cost in costs)


def test_a_key_that_others_can_read_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(bytes(range(32)))
    key.chmod(0o644)
    code, _, err = _run(capsys, "train", DIGITS, *SMALL, "--out", str(tmp_path / "run"), "--key", str(key))
    assert code == 0
    assert "can be read by others" in err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["keys"] == "the client's key came from a file"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.epochs=many"], "training.epochs: input should be a valid integer, got 'many'"),
        (["training.epoch=3"], "did you mean 'epochs'?"),
        (["cut.at=blok2"], "'block2'"),
        (["cut.at=classifier"], "classifier"),
        (["network.name=resent"], "'resnet'"),
        (["network.name=no_such_module:make"], "no_such_module"),
        (["network.settings.widht=3"], "'width'"),
        (["data.name=digit"], "'digits'"),
        (["training.batch_size=3"], "at least 4 records"),
        (["training.batch_size=5000"], "make no batch of 5000"),
        (["training.batch_size=127", "training.drop_last_batch=false", "data.train_records=128"], "at least 4"),
        (["attacker.auxiliary_share=0.9"], "records"),
        (
            [
                "parties.mode=vertical",
                "parties.clients=['a', 'b']",
                "defense={clipping={clip=1.0}, noise={sigma=0.5}, certified=true}",
            ],
            "defense.certified asks for a certificate, and with parties.mode vertical there is none",
        ),
    ],
)
def test_bad_recipes(capsys: pytest.CaptureFixture[str], tmp_path: Path, overrides: list[str], words: str) -> None:
    options = [word for override in overrides for word in ("--set", override)]
    assert words in _refused(capsys, "train", DIGITS, *options, "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def _npz(path: Path, **arrays: np.ndarray) -> str:
    rng = np.random.default_rng(0)
    whole = {"images": rng.random((200, 8, 8, 1), dtype=np.float32), "labels": rng.integers(0, 3, 200)} | arrays
    np.savez(path, **{name: array for name, array in whole.items() if array is not None})  # type: ignore[arg-type]
    return str(path)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"labels": np.full(200, -1)}, "labels"),
        ({"labels": np.zeros(200, dtype=np.int64)}, "class"),
        ({"labels": np.linspace(0, 2, 200)}, "labels"),
        ({"labels": np.arange(100) % 3}, "200"),
        ({"images": np.full((200, 8, 8, 1), np.nan, dtype=np.float32)}, "not finite|NaN"),
        ({"images": np.zeros((200, 8), dtype=np.float32)}, "shape"),
        ({"images": np.array([{}] * 200, dtype=object)}, "pickle|object"),
    ],
)
def test_bad_data(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arrays: dict[str, np.ndarray], words: str
) -> None:
    path = _npz(tmp_path / "data.npz", **arrays)
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'[data]\npath = "{path}"\n[network]\nname = "cnn"\n[cut]\nat = "block2"\n')
    line = _refused(capsys, "train", str(recipe), "--out", str(tmp_path / "run"))
    assert any(word in line for word in words.split("|")), line
    assert not (tmp_path / "run").exists()


def test_missing_and_truncated_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = Path(_npz(tmp_path / "data.npz"))
    recipe = tmp_path / "r.toml"
    recipe.write_text('[data]\npath = "date.npz"\n[network]\nname = "cnn"\n[cut]\nat = "block2"\n')
    assert "data.npz" in _refused(capsys, "train", str(recipe))
    path.write_bytes(path.read_bytes()[:500])
    assert "data.npz" in _refused(capsys, "train", str(recipe), "--set", f"data.path={path}")


def test_run_folders_that_are_in_the_way(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    assert _run(capsys, "train", DIGITS, *SMALL, "--set", "defense={}", "--out", out)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert "finished run" in _refused(capsys, "train", DIGITS, *SMALL, "--out", out)
    assert "another recipe: seed is 9 here and 0 there" in _refused(
        capsys, "train", DIGITS, *SMALL, "--set", "defense={}", "--set", "seed=9", "--out", out, "--resume"
    )
    (tmp_path / "run" / "top.safetensors").write_bytes(b"torn")
    assert "top.safetensors: damaged" in _refused(capsys, "audit", out, "--reference", out)
    for path, content in before.items():
        if path.name != "top.safetensors":
            assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "none.toml"], "none.toml: No such file"),
        (["train", DIGITS, "--set", "seed"], "expected KEY=VALUE"),
        (["train", DIGITS, "--key", "none.key"], "none.key"),
        (["audit", "none"], "none: no such folder"),
        (["audit", "none", "--budget", "peek<0.3"], "peek<=0.3"),
        (["audit", "none", "--budget", "peak<=0.3"], "did you mean 'peek'"),
        (["audit", "none", "--quick", "--thorough"], "expected one of them"),
        (["audit"], "nothing to audit"),
        (["audit", "none", "--activations", "a.npy", "--records", "x.npy", "--out", "o"], "expected one of them"),
        (["audit", "--activations", "a.npy", "--out", "o"], "expected --activations and --records"),
        (["audit", "--activations", "a.npy", "--records", "x.npy"], "--out DIR is missing"),
        (["audit", "--activations", "a.npy", "--records", "x.npy", "--out", "o"], "a.npy: No such file"),
        (
            ["audit", "--activations", "a.npy", "--records", "x.npy", "--out", "o", "--reference", "r"],
            "--reference goes",
        ),
        (["report", "none"], "none"),
        (["cuts", "none.toml"], "none.toml: No such file"),
    ],
)
def test_bad_arguments(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in _refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["file", "file/run", "file/a/run"])
def test_places_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("mine")
    _refused(capsys, "train", DIGITS, *SMALL, "--out", str(tmp_path / out))
    assert (tmp_path / "file").read_text() == "mine"


def test_an_audit_tells_before_its_work_that_it_cannot_write(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = str(tmp_path / "run")
    assert _run(capsys, "train", DIGITS, *SMALL, "--set", "defense={}", "--out", run)[0] == 0
    (tmp_path / "file").write_text("mine")
    assert "cannot write" in _refused(capsys, "audit", run, "--out", str(tmp_path / "file"))
    assert "which this audit does not measure" in _refused(capsys, "audit", run, "--budget", "attribute.sex<=0.1")
    (tmp_path / "run" / "summary.json").write_text("{}")
    assert "accuracy is None; expected a number" in _refused(capsys, "audit", run)


def test_unknown_commands_and_options_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(capsys, "trian", DIGITS)[0] == 2
    assert _run(capsys, "train", DIGITS, "--epochs", "3")[0] == 2


@pytest.mark.parametrize(("budget", "code", "verdict"), [("1", 0, "within budget"), ("0.3", 3, "over budget")])
def test_arrays_from_elsewhere_are_audited_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, budget: str, code: int, verdict: str
) -> None:
    draws = np.random.default_rng(0)
    records = draws.normal(size=(400, 6))
    np.save(tmp_path / "records.npy", records)
    np.save(tmp_path / "activations.npy", records @ draws.normal(size=(6, 5)))
    np.save(tmp_path / "entitled.npy", (records[:, 0] > 0).astype(np.int64))
    arguments = ["--attacks", "kernel ridge", "--budget", f"peek<={budget}", "--quick", "--out", str(tmp_path / "out")]
    found, out, _ = _run(capsys, "audit", str(tmp_path), *arguments)
    assert found == code
    assert f"{tmp_path}: {verdict} (peek<={budget})" in out
    written = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert written["verdict"] == verdict
    assert written["entitled"] == str(tmp_path / "entitled.npy")
    assert written["peek"]["value"] > 0.7  # five of six directions cross
    assert _run(capsys, "report", str(tmp_path / "out"))[0] == 0
    three = [
        word for name in ("activations", "records", "entitled") for word in (f"--{name}", f"{tmp_path}/{name}.npy")
    ]
    assert _run(capsys, "audit", *three, *arguments)[0] == code
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["peek"] == written["peek"]


def test_arrays_that_do_not_pair_up_leave_nothing_behind(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(200, 3)))
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(199, 3)))
    files = ["--activations", str(tmp_path / "a.npy"), "--records", str(tmp_path / "x.npy")]
    line = _refused(capsys, "audit", *files, "--out", str(tmp_path / "out"))
    assert "a.npy has 200 rows and" in line
    assert "x.npy 199; expected them to pair up row by row" in line
    assert not (tmp_path / "out").exists()
