"""What contributions to an open collaboration show: of one, of many, and of a volunteer's run folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from milkglass import contribution_audit
from milkglass.attacks.gradients import GradientInversion
from milkglass.cli import main
from milkglass.collaboration_audit import PRIVATE, is_collaboration
from milkglass.contribution_audit import Effort, audit_contributions
from milkglass.contributions import Subject, assigned, contribution, rebuild
from milkglass.errors import AuditError
from milkglass.leakage.reconstruction import squared_errors
from milkglass.networks import build
from milkglass.randomness import public_source
from milkglass.recipe import Recipe, parse_recipe
from milkglass.runs import RunFolder, tensors_as_bytes
from milkglass.training.shares import deal_records
from milkglass.training.split import digest_of

SHAPE = (1, 8, 8)
FAST = Effort((1, 2), 8, 80, 1, 4)
SHORT = Effort((1, 2), 8, 2, 1, 4)
FACTORY = f"{__name__}:unreadable"


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contribution_audit, "EFFORTS", {"quick": FAST, "default": FAST})


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attack has no time to find anything: for what does not depend on it."""
    monkeypatch.setattr(contribution_audit, "EFFORTS", {"quick": SHORT, "default": SHORT})


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


def network(name: str = "mlp", seed: int = 0) -> nn.Module:
    return build(name, SHAPE, 10, {}, public_source(seed).generator("network"))


def unreadable(shape: Sequence[int], classes: int) -> nn.Module:
    """Its last layer has no bias, so labels of several records cannot be read."""
    size = int(np.prod(shape))
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 32), nn.ReLU(), nn.Linear(32, classes, bias=False))


def subject(**changes: Any) -> Subject:
    x, y = digits()
    given: dict[str, Any] = {
        "first": network(),
        "last": network(seed=1),
        "x": x[:40],
        "y": y[:40],
        "mean": x[40:].mean(0),
    }
    return Subject(**(given | changes))


def draws() -> torch.Generator:
    return public_source(3).generator("test")


def norm(gradients: Sequence[Tensor]) -> float:
    return float(torch.cat([gradient.flatten() for gradient in gradients]).norm())


# One contribution.


def test_a_contribution_is_the_mean_of_its_records_gradients() -> None:
    x, y = digits()
    model = network("cnn")
    before = copy.deepcopy(model.state_dict())
    whole = contribution(model, x[:4], y[:4], draws())
    single = [contribution(model, x[i : i + 1], y[i : i + 1], draws()).gradients for i in range(4)]
    for number, gradient in enumerate(whole.gradients):
        mean = torch.stack([each[number] for each in single]).mean(0)
        torch.testing.assert_close(gradient, mean, atol=1e-6, rtol=1e-4)
    assert whole.count == 4
    assert whole.classes == 10
    assert whole.labels is None  # the attacker is not told
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_dropout_is_the_volunteers_and_moves_no_one_elses_numbers() -> None:
    x, y = digits()
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
    state = torch.get_rng_state()
    one, other = (contribution(model, x[:2], y[:2], public_source(n).generator("dropout")) for n in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(one.gradients[0], other.gradients[0])
    assert torch.equal(one.model(x[:2]), one.model(x[:2]))  # the attacker's own network drops nothing
    assert model.training


@pytest.mark.parametrize("density", [0.01, 0.1])
def test_gaussian_k_leaves_the_largest_numbers_as_they_are(density: float) -> None:
    x, y = digits()
    dense, sparse = (contribution(network(), x[:1], y[:1], draws(), density=d).gradients for d in (None, density))
    dense_D, sparse_D = (torch.cat([each.flatten() for each in gradients]) for gradients in (dense, sparse))
    sent = sparse_D != 0
    assert 2 / 3 <= sent.sum().item() / (density * len(dense_D)) <= 4 / 3
    assert torch.equal(sparse_D[sent], dense_D[sent])
    assert dense_D[sent].abs().min() >= dense_D[~sent].abs().max()


def test_what_was_not_sent_is_not_compared() -> None:
    x, y = digits()
    view = contribution(network(), x[:1], y[:1], draws(), density=0.01)
    attack = GradientInversion(150, 1, rate=0.3)
    made = [rebuild(view, attack, x[:1], y[:1], sparse=sparse) for sparse in (True, False)]
    errors = [squared_errors(each.records, x[:1]).item() for each in made]
    alone = squared_errors(x[40:].mean(0, keepdim=True), x[:1]).item()
    assert errors[0] < 0.3 * alone < errors[1]  # who takes zeros for gradients finds nothing


def test_records_are_assigned_at_the_least_error_whatever_their_order() -> None:
    truth = digits()[0][:6]
    noisy = truth + 0.01 * torch.randn(truth.shape, generator=draws())
    for _ in range(5):
        order = torch.randperm(6, generator=draws())
        assert torch.equal(assigned(noisy[order], truth), noisy)


def test_labels_that_cannot_be_read_are_given() -> None:
    x, y = digits()
    model = build(FACTORY, SHAPE, 10, {}, draws())
    attack = GradientInversion(1, 1)
    assert rebuild(contribution(model, x[:1], y[:1], draws()), attack, x[:1], y[:1], sparse=False).labels_restored == 1
    several = rebuild(contribution(model, x[:3], y[:3], draws()), attack, x[:3], y[:3], sparse=False)
    assert several.labels_restored is None
    assert several.records.shape == (3, *SHAPE)


# The audit of contributions.


def test_one_record_behind_a_fully_connected_layer_is_shown() -> None:
    found = audit_contributions(subject(), "quick", budget={"peek": 0.1})
    assert [(score.contribution_records, score.moment) for score in found.scores] == [
        (size, moment) for moment in ("at the start", "at the end") for size in (1, 2)
    ]
    one = found.scores[0]
    assert one.peek.value > 0.999
    assert (one.shown, one.match_top1, one.labels_restored, one.records) == (1, 1, 1, 8)
    assert one.others_peek < 0.1  # against another's records the same pictures are worth nothing
    assert one.others_shown == 0
    assert one.mse < 1e-6 < one.mean_record_mse
    assert found.peek.high == max(score.peek.high for score in found.scores)
    assert all(control.passed for control in found.controls.values())
    assert found.verdict == "over budget"
    torch.testing.assert_close(found.pictures["gradient inversion"], found.pictures["records"], atol=1e-3, rtol=0)
    assert torch.equal(found.pictures["entitled"][0], subject().mean)


@pytest.mark.usefixtures("hurried")
def test_the_records_of_the_run_s_own_size_are_attacked_up_to_a_size() -> None:
    for own, expected in ((None, [1, 2]), (2, [1, 2]), (3, [1, 2, 3]), (700, [1, 2, 4])):
        content = audit_contributions(subject(), "quick", own_size=own).to_dict()
        assert content["contributions"] == expected
    few = subject(x=subject().x[:7], y=subject().y[:7])  # three are compared with three others
    found = audit_contributions(few, "quick", own_size=4)
    assert found.to_dict()["contributions"] == [1, 2]
    assert found.verdict == "inconclusive"
    assert any("too few" in note for note in found.notes)


def test_an_attack_that_fails_on_an_open_door_gives_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contribution_audit, "EFFORTS", {"quick": Effort((1, 2), 8, 1, 1, 0)})
    found = audit_contributions(subject(), "quick", budget={"peek": 1.0})
    assert found.controls["closed_form"].passed
    assert not found.controls["descent"].passed
    assert found.verdict == "inconclusive"
    assert any("control descent failed" in note for note in found.notes)


def test_random_gradients_show_nothing_and_two_numbers_show_little() -> None:
    found = audit_contributions(subject(density=1e-4), "quick")
    assert found.controls["random_gradient"].value <= 0.05
    assert max(score.shown for score in found.scores) <= 0.25


def test_a_table_has_no_likeness_of_pictures() -> None:
    draw = draws()
    x, y = torch.randn(40, 6, generator=draw), torch.randint(3, (40,), generator=draw)
    model = build("mlp", (6,), 3, {}, draw)
    found = audit_contributions(subject(first=model, last=model, x=x, y=y, mean=x.mean(0)), "quick")
    assert set(found.measures) == {"peek", "match", "psnr_db"}
    assert found.scores[0].ssim is None
    assert found.peek.value > 0.99
    with pytest.raises(AuditError, match="which this audit does not measure"):
        audit_contributions(subject(x=x), "quick", budget={"ssim": 0.1})


def test_a_network_that_cannot_be_attacked_is_one_line() -> None:
    class Refusing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.requires_grad:
                raise RuntimeError("no derivative for records")
            return x

    model = nn.Sequential(Refusing(), nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 10))
    with pytest.raises(AuditError, match=r"broke, contributions of 1 record at the start: .*no derivative"):
        audit_contributions(subject(first=model, last=model), "quick")


# A run folder.


def recipe(**changes: Any) -> Recipe:
    tables: dict[str, Any] = {
        "data": {"name": "digits", "train_records": 200, "test_records": 60},
        "network": {"name": "mlp"},
        "parties": {"mode": "collaboration"},
    }
    return parse_recipe(tables | changes)


def run_folder(path: Path, made: Recipe, samples: Sequence[tuple[int, int]] = ((64, 2), (32, 2), (500, 1))) -> Path:
    """As a volunteer leaves it. samples: records and volunteers of each step."""
    records = deal_records(made)
    weights = public_source(made.seed).generator("weights")
    model = build(made.network.name, records.record_shape, records.classes, made.network.settings, weights)
    folder = RunFolder.create(path, made, digest_of(records))
    lines = [{"epoch": n, "loss": 2.0, "samples": s, "peers": p} for n, (s, p) in enumerate(samples, start=1)]
    folder.write_metrics(lines)
    folder.write_tensors("network.safetensors", model.state_dict())
    summary = {"accuracy": 0.25, "samples": sum(s for s, _ in samples), "defense": "none", "wire": [], "messages": 0}
    summary |= {"distance_correlation": None, "bytes_sent": 10, "bytes_received": 10, "seconds": 1.0, "seed": 0}
    folder.write_json("summary.json", summary | {"seconds_per_epoch": 0.5, "keys": "the volunteer's own key"})
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_folder(tmp_path / "run", recipe())


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code: object = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert isinstance(code, int) or code is None
    return code or 0, captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code, out, err = command(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err


def test_the_audit_of_a_run_and_its_report(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    assert is_collaboration(run)
    assert command(capsys, "report", run)[0] == 0
    assert "Nobody has attacked this volunteer" in (run / "report.html").read_text()

    code, out, _ = command(capsys, "audit", run, "--budget", "peek<=0.1", "--quick")
    assert code == 3
    assert f"{run}: a contribution of 1 record at the start shows it: peek 1.000" in out
    assert f"{run}: over budget (peek<=0.1): peek " in out
    assert out.endswith(f"{run}: {PRIVATE}\n")
    content = json.loads((run / "audit.json").read_text())
    assert content["verdict"] == "over budget"
    assert content["contributions"] == [1, 2, 4]
    assert content["own_contributions"] == {"count": 2, "mean": 48.0, "least": 32}  # one step was made alone
    assert any("48 records on average, 32 the smallest" in note for note in content["notes"])
    assert set(content["controls"]) == {"closed_form", "descent", "random_gradient"}
    assert content["exposures"].keys() == {attack["exposure"] for attack in content["attacks"]}
    assert content["certificate"] is None
    for attack in content["attacks"]:
        assert attack["knows"] == ["gradients", "weights"]
        assert attack["peek"] == pytest.approx(1 - attack["mse"] / attack["mean_record_mse"])
    assert f"{content['peek']['value']:.3f}" in out

    code, out, _ = command(capsys, "report", run)
    assert code == 0
    page = (run / "report.html").read_text()
    assert "25.0 %" in out
    assert "An honest-but-curious volunteer" in page
    assert "the network&#39;s weights" in page
    assert "private data do not belong" in page
    assert "at the start records" not in page
    assert "An honest-but-curious server" not in page
    assert page.count("data:image/png") >= 24  # records, rebuilt ones, the mean


def test_both_ends_of_the_run_are_attacked(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path) -> None:
    trained = RunFolder(run, recipe()).read_tensors("network.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in trained.items()}  # no gradient reaches its first layer
    (run / "network.safetensors").write_bytes(tensors_as_bytes(zeros))
    assert command(capsys, "audit", run, "--quick", "--out", tmp_path / "out")[0] == 0
    assert not (run / "audit.json").exists()
    by_moment: dict[str, list[float]] = {}
    for attack in json.loads((tmp_path / "out" / "audit.json").read_text())["attacks"]:
        by_moment.setdefault(attack["moment"], []).append(attack["peek"])
    assert max(by_moment["at the start"]) > 0.99
    assert max(by_moment["at the end"]) < 0.1
    assert command(capsys, "report", tmp_path / "out")[0] == 0  # an audit alone


@pytest.mark.usefixtures("hurried")
def test_compression_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for compress, words in (("gaussian_k", "Gaussian-k was applied"), ("int8", "before int8 rounds them")):
        run = run_folder(tmp_path / compress, recipe(collaboration={"compress": compress}))
        code, out, _ = command(capsys, "audit", run, "--quick")
        assert code == 4
        assert words in out
        assert PRIVATE in out


def test_a_text_is_refused_and_not_called_safe(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a text")
    text = recipe(data={"path": str(tmp_path / "text.txt")}, network={"name": "albert"})
    (run / "recipe.toml").write_text(text.to_toml())
    said = refused(capsys, "audit", run)
    assert "pictures and tables" in said
    assert "not thereby safe" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--reference", "other"], "--reference goes with a run of split training"),
        (["--attacks", "ridge"], "one attack, gradient inversion"),
        (["--budget", "matching<=0.1"], "which this audit does not measure"),
    ],
)
def test_what_does_not_go_with_contributions(
    capsys: pytest.CaptureFixture[str], run: Path, arguments: list[str], words: str
) -> None:
    assert words in refused(capsys, "audit", run, *arguments)
    assert not (run / "audit.json").exists()


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("network.safetensors", None, "network.safetensors is missing"),
        ("network.safetensors", b"", "damaged, not a safetensors file"),
        ("network.safetensors", tensors_as_bytes({"other": torch.zeros(1)}), "not the recipe's network"),
        ("metrics.jsonl", b"{}\n", "expected samples and peers in each line"),
        ("metrics.jsonl", b"[1]\n", "expected samples and peers in each line"),
        ("metrics.jsonl", b"no\n", "expected samples and peers in each line"),
        ("summary.json", b"{}", "accuracy is None; expected a number"),
        ("records.sha256", b"other", "the records are not those"),
    ],
)
def test_a_damaged_run_is_one_line(
    capsys: pytest.CaptureFixture[str], run: Path, file: str, content: bytes | None, words: str
) -> None:
    if content is None:
        (run / file).unlink()
    else:
        (run / file).write_bytes(content)
    code, _, err = command(capsys, "audit", run, "--quick")
    assert code == 2
    assert words in err


@pytest.mark.usefixtures("hurried")
def test_a_volunteer_who_contributed_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", recipe(), samples=[(0, 3), (0, 3)])
    assert command(capsys, "audit", run, "--quick")[0] == 4
    content = json.loads((run / "audit.json").read_text())
    assert content["own_contributions"] is None
    assert content["contributions"] == [1, 2]
