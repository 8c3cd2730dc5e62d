"""What a gap proves and a certificate rules out: losses of known laws, and the command on small runs."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.attacks.mean_record import MeanRecord
from milkglass.attacks.ridge import Ridge
from milkglass.bounds import (
    Losses,
    best_threshold,
    certified_bounds,
    gap_of,
    losses_of,
    membership_bound,
    prove,
    successes,
)
from milkglass.bounds_files import bounds_of_run, bounds_over_sizes, parse_sizes
from milkglass.cli import main
from milkglass.client import StepResult
from milkglass.cuts import cut
from milkglass.defenses.certificate import certificate
from milkglass.errors import AuditError, RunError
from milkglass.leakage.information import clipped_gap_bound
from milkglass.networks import build
from milkglass.randomness import public_source
from milkglass.recipe import Recipe, parse_recipe
from milkglass.runs import RunFolder
from milkglass.training.shares import deal_records
from milkglass.training.split import train
from milkglass.transcript import Knowledge, MembershipTrial, MembershipView, Pairs, Release
from tests.helpers import small_recipe


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def losses(loss_N: Tensor, surest_N: Tensor | None = None) -> Losses:
    """Made-up ones: the Brier score is the cross-entropy, at most 2."""
    loss_N = loss_N.double()
    surest = torch.exp(-loss_N) if surest_N is None else surest_N.double()
    return Losses(loss_N.clamp(max=2), loss_N, surest, (loss_N < 0.7).double())


def exponential(mean: float, count: int, seed: int) -> Tensor:
    return -mean * torch.rand(count, generator=generator(seed), dtype=torch.float64).clamp_min(1e-12).log()


def test_losses_are_the_textbook_ones() -> None:
    logits_NK = 3 * torch.randn(50, 4, generator=generator())
    labels_N = torch.randint(4, (50,), generator=generator(1))
    found = losses_of(logits_NK, labels_N)
    for n in range(50):
        p = logits_NK[n].double().softmax(0)
        assert found.brier[n].item() == pytest.approx(sum((p[k].item() - int(k == labels_N[n])) ** 2 for k in range(4)))
        assert found.surest[n].item() == pytest.approx(p.max().item())
    torch.testing.assert_close(found.cross_entropy, F.cross_entropy(logits_NK.double(), labels_N, reduction="none"))
    assert found.accuracy == (logits_NK.argmax(1) == labels_N).double().mean()
    sure = losses_of(torch.tensor([[50.0, 0.0], [60.0, 0.0]]), torch.tensor([0, 0]))
    assert 0 < sure.cross_entropy[1] < sure.cross_entropy[0] < 1e-20  # still told apart
    wrong = losses_of(torch.tensor([[90.0, 0.0]]), torch.tensor([1]))
    assert wrong.brier.item() == pytest.approx(2)
    for logits in (torch.zeros(3, 2), torch.full((2, 2), torch.nan)):
        with pytest.raises(AuditError, match="expected a finite row each"):
            losses_of(logits, torch.tensor([0, 1]))


def test_a_known_gap_proves_what_the_formulas_say() -> None:
    member = losses(torch.full((20,), 0.2))
    other = losses(torch.full((300,), 1.0))
    proof = prove(member, other)
    assert (proof.members, proof.others) == (20, 300)
    brier, entropy = proof.gaps
    assert (brier.value, brier.low, brier.high, brier.limit) == pytest.approx((0.8, 0.8, 0.8, 2.0))
    assert (entropy.value, entropy.limit) == pytest.approx((0.8, 1.0))
    published, sound, clipped = proof.bounds
    assert (published.value, published.low) == pytest.approx((0.6, 0.6))
    assert (sound.value, sound.low) == pytest.approx((0.7, 0.7))
    assert clipped.value == pytest.approx(0.9)
    assert clipped.low == pytest.approx(0.9 - (math.sqrt(math.log(40) / 40) + math.sqrt(math.log(40) / 600)) / 2)
    assert "at least 0.600 of the time" in published.words
    assert "does not certify privacy" in clipped.words
    assert [each.value for each in proof.attacks[1::2]] == [1.0, 1.0]
    json.dumps(proof.to_dict(), allow_nan=False)


def test_a_gap_the_other_way_round_is_proof_as_well_but_not_for_a_threshold() -> None:
    proof = prove(losses(torch.full((20,), 1.0)), losses(torch.full((30,), 0.2)))
    published, sound, clipped = proof.bounds
    assert proof.gaps[0].value == pytest.approx(-0.8)
    assert (published.low, sound.low, clipped.value) == pytest.approx((0.6, 0.7, 0.5))
    assert "proves nothing" in clipped.words
    assert all(math.isfinite(gap.limit) for gap in proof.gaps)


def test_bounds_stay_under_the_best_attack() -> None:
    """Exponential losses of means 1 and 3: the best attack says "member" below a threshold that is known."""
    at = math.log(3) / (1 - 1 / 3)
    best = 0.5 + (math.exp(-at / 3) - math.exp(-at)) / 2
    for seed in range(10):
        proof = prove(losses(exponential(1, 800, seed)), losses(exponential(3, 4000, 100 + seed)), seed)
        for bound in proof.bounds:
            assert bound.kind == "lower"
            assert bound.low is not None
            assert 0.5 < bound.low < bound.value < best + 0.02
        threshold = proof.attacks[1]
        assert threshold.value == pytest.approx(best, abs=0.03)
        assert proof.attacks[3].value == pytest.approx(0.75, abs=0.03)  # P(member's loss is the smaller)


def test_where_there_is_no_gap_nothing_is_proved_and_attacks_guess() -> None:
    covered, lows = 0, []
    for seed in range(40):
        proof = prove(losses(exponential(1, 20, seed)), losses(exponential(1, 20, 100 + seed)), seed)
        lows.append(proof.bounds[2].low)
        covered += proof.attacks[1].low <= 0.5 <= proof.attacks[1].high
    assert lows == [0.5] * 40
    assert covered >= 35
    # a threshold that was chosen on the records it is judged by would look better than a coin
    found = [
        successes(losses(exponential(1, 20, s)), losses(exponential(1, 20, 99 + s)), s)[1].value for s in range(200)
    ]
    assert sum(found) / 200 == pytest.approx(0.5, abs=0.02)


def test_the_published_attack_is_a_threshold_on_the_largest_probability() -> None:
    member = losses(torch.rand(10, generator=generator()), torch.tensor([0.9] * 7 + [0.79] * 3))
    other = losses(torch.rand(20, generator=generator(1)), torch.tensor([0.81] * 4 + [0.5] * 16))
    told = successes(member, other)[0]
    assert told.measure == "balanced accuracy"
    assert told.value == pytest.approx((0.7 + 0.8) / 2)
    assert told.low < told.value < told.high


def test_the_best_threshold_is_the_best_of_all() -> None:
    for seed in range(20):
        member_M = torch.randint(6, (9,), generator=generator(seed)).double()
        other_O = torch.randint(2, 8, (11,), generator=generator(50 + seed)).double()

        def right(threshold: float, member_M: Tensor = member_M, other_O: Tensor = other_O) -> float:
            return float((member_M <= threshold).double().mean() + (other_O > threshold).double().mean())

        brute = max(right(threshold / 2 - 1) for threshold in range(20))
        assert right(best_threshold(member_M, other_O)) == pytest.approx(brute)
    assert best_threshold(torch.ones(3), torch.zeros(3)) == -math.inf


def test_the_gaps_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(200):
        member_M, other_O = exponential(0.5, 30, seed), exponential(0.8, 60, 1000 + seed).clamp(max=50)
        found = gap_of("loss", 50.0, member_M, other_O)
        held += found.low <= 0.8 - 0.5 <= found.high
    assert 180 <= held <= 199


def test_a_network_that_learned_nothing_proves_nothing_of_its_few_members() -> None:
    """Members and others of one law: however many others, whose error is then nothing, few members say little."""
    wrong, trials = [0, 0, 0], 200
    for seed in range(trials):
        proof = prove(losses(exponential(1, 20, seed)), losses(exponential(1, 5000, 1000 + seed)))
        wrong = [count + ((bound.low or 0.0) > 0.5) for count, bound in zip(wrong, proof.bounds, strict=True)]
    assert max(wrong) <= 0.05 * trials + 3 * math.sqrt(0.05 * 0.95 * trials)


def test_too_few_records_are_refused() -> None:
    for counts in ((7, 100), (100, 7)):
        with pytest.raises(AuditError, match="expected at least 8 of each"):
            prove(losses(torch.rand(counts[0])), losses(torch.rand(counts[1])))


def test_what_a_certificate_rules_out() -> None:
    claimed = certificate(8, 1.0, 1.0)
    found = certified_bounds(claimed, {"fresh": 256, "repeated": 256}, {"fresh": 1, "repeated": 10})
    assert [(bound.measure, bound.exposure, bound.kind, bound.low) for bound in found] == [
        ("matching", "fresh", "upper", None),
        ("attribute", "fresh", "upper", None),
        ("matching", "repeated", "upper", None),
        ("attribute", "repeated", "upper", None),
    ]
    assert found[0].value == claimed.reidentification[0].bound
    assert found[0].value < found[2].value < 1
    assert f"at most {claimed.bits_per_release:.2f} bits" in found[0].words
    # ten releases are one with a tenth of the variance
    assert found[2].value == certificate(8, 1.0, 10**-0.5).reidentification[0].bound
    assert "vacuous" in found[3].words
    assert found[3].value == 1
    assert [bound.measure for bound in certified_bounds(claimed, {}, {"fresh": 1})] == ["attribute"]


def test_nobody_tells_a_fair_bit_better_than_the_bound() -> None:
    """Two records at the two ends of the clip, one coordinate: the best attack is the sign."""
    for sigma in (1.0, 2.0, 5.0):
        (bound,) = certified_bounds(certificate(1, 1.0, sigma), {}, {"fresh": 1})
        best = 0.5 * math.erfc(-1 / sigma / math.sqrt(2))
        assert best < bound.value < best + 0.1


def membership_trial(server: nn.Module | None) -> MembershipTrial:
    """Members' first activation is the label's logit, 2 higher than others'."""
    draws = generator()
    z_TD, z_ND = torch.randn(200, 3, generator=draws), torch.randn(150, 3, generator=draws)
    z_TD[:100, 0] += 2
    candidates = Release(z_TD, torch.zeros(200, 0), torch.zeros(200, dtype=torch.int64))
    outsiders = Pairs(z_ND, z_ND, torch.zeros(150, 0), torch.zeros(150, dtype=torch.int64))
    view = MembershipView(candidates, outsiders, Knowledge(server=server))
    return MembershipTrial(view, torch.arange(200) < 100)


def test_an_audits_bound_is_that_of_its_candidates_losses() -> None:
    trial = membership_trial(nn.Identity())
    found = membership_bound(trial)
    z_ND = torch.cat([trial.view.candidates.activations, trial.view.outsiders.activations])
    loss_N = F.cross_entropy(z_ND.double(), torch.zeros(350, dtype=torch.int64), reduction="none")
    expected = clipped_gap_bound(loss_N[:100], loss_N[100:])
    assert found is not None
    assert (found.value, found.low) == pytest.approx((expected.value, expected.low))
    assert expected.low > 0.5
    assert membership_bound(membership_trial(None)) is None

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.nan

    assert membership_bound(membership_trial(Broken())) is None


# The command.


def trained(path: Path, recipe: Recipe) -> Path:
    train(recipe, path)
    return path


@contextlib.contextmanager
def unwatched(_: int, __: str) -> Iterator[Any]:
    yield None


def over_sizes(run: Path, sizes: tuple[int, ...], out: Path, training: Any = unwatched) -> list[dict[str, Any]]:
    bounds_over_sizes(run, sizes, out, training=training, tell=lambda _: None)
    return list(json.loads((out / "bounds.json").read_text())["sizes"])


def test_a_run_is_measured_on_its_members_and_on_records_it_never_saw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = small_recipe(training={"epochs": 20, "batch_size": 32, "learning_rate": 1e-2})
    run = trained(tmp_path / "run", recipe)
    main_ends(["bounds", str(run)])
    out = capsys.readouterr().out
    written = json.loads((run / "bounds.json").read_text())
    assert set(written) == {
        *("run", "records", "epochs", "batch_size", "members", "others", "accuracy_on_members", "accuracy_on_others"),
        *("gaps", "bounds", "attacks", "audit", "notes"),
    }
    records, folder = deal_records(recipe), RunFolder.open_finished(run)
    assert (written["members"], written["audit"]) == (96, None)
    model = build("mlp", records.record_shape, records.classes, {"hidden": [16, 8]}, public_source(0).generator("w"))
    bottom, top = cut(model, "hidden1")
    bottom.load_state_dict(folder.read_tensors("bottom.safetensors"))
    top.load_state_dict(folder.read_tensors("top.safetensors"))
    (members,) = records.train.values()
    parts = (records.auxiliary, records.validation, records.test)

    def brier(x: Tensor, y: Tensor) -> Any:
        return (top(bottom(x)).double().softmax(1) - F.one_hot(y, 10)).square().sum(1).mean().item()

    other = brier(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))
    assert written["others"] == sum(map(len, parts))
    assert written["gaps"][0]["value"] == pytest.approx(other - brier(members.x, members.y), abs=1e-6)
    assert written["gaps"][0]["value"] > 0.05
    assert f"gap of the Brier score (0 to 2) {written['gaps'][0]['value']:.3f}" in out
    for bound in written["bounds"]:
        assert bound["words"] in out
        assert max(attack["high"] for attack in written["attacks"]) >= bound["low"]
    assert "A small one is no sign of safety" in out


def main_ends(arguments: list[str]) -> None:
    with contextlib.suppress(SystemExit):
        main(arguments)


def test_the_audits_membership_rows_stand_beside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path / "run", small_recipe())
    row: dict[str, Any] = {"measure": "membership.auc", "name": "loss threshold", "adversary": "honest-but-curious"}
    row |= {"exposure": "fresh", "value": 0.61, "low": 0.55, "high": 0.67, "n": 80, "seconds": 0.1}
    (run / "audit.json").write_text(json.dumps({"inferences": [row, row | {"measure": "matching"}]}))
    main_ends(["bounds", str(run), "--out", str(tmp_path / "out")])
    assert "audit: loss threshold, membership.auc" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "bounds.json").read_text())
    assert [(each["measure"], each["value"]) for each in written["audit"]] == [("membership.auc", 0.61)]
    assert not (run / "bounds.json").exists()
    (run / "audit.json").write_text('{"inferences": [{"measure": 3}]}')
    with pytest.raises(RunError, match=r"audit\.json: damaged: inferences"):
        bounds_of_run(run)


def test_sizes_train_the_same_recipe_as_long_by_either_yardstick(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path / "run", small_recipe())
    main_ends(["bounds", str(run), "--sizes", "200,10,96", "--out", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    written = json.loads((tmp_path / "out" / "bounds.json").read_text())
    assert [(each["records"], each["batch_size"], each["epochs"], each["members"]) for each in written["sizes"]] == [
        (10, 10, 6, 10),  # 2 epochs of 3 batches are 6 of one
        (96, 32, 2, 96),
        (200, 32, 2, 200),
    ]
    assert [each["run"] for each in written["sizes"]] == [
        str(tmp_path / "out" / "size-10"),
        str(run),  # the same recipe: not trained anew
        str(tmp_path / "out" / "size-200"),
    ]
    assert RunFolder.open_finished(tmp_path / "out" / "size-10").recipe.data.train_records == 10
    assert "10 records" in err
    assert "batches of 10 (lowered from 32: there are no more records)" in err
    picture = (tmp_path / "out" / "bounds.svg").read_text()
    assert picture.startswith("<svg ")
    assert "training records (log scale)" in picture
    for each in written["sizes"]:
        assert f"{each['gaps'][0]['value']:.3f}" in out
        value = f"{each['gaps'][0]['value']:.3f}".replace("-", "−")
        assert f"Brier score, training records {each['records']}: {value}" in picture


class StoppedError(Exception):
    """Somebody pulled the plug."""


class StopsAfter:
    """Watches a training, and ends it after so many epochs."""

    def __init__(self, epochs: int) -> None:
        self._left = epochs

    def batch(self, epoch: int, step: int, steps: int, result: StepResult) -> None:
        pass

    def epoch(self, line: dict[str, Any]) -> None:
        self._left -= 1
        if not self._left:
            raise StoppedError


def test_sizes_go_on_where_they_were_stopped(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", small_recipe())
    through = over_sizes(run, (10, 32), tmp_path / "through")

    @contextlib.contextmanager
    def stopping(_: int, what: str) -> Iterator[Any]:
        yield StopsAfter(3) if what.startswith("32") else None

    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        over_sizes(run, (10, 32), out, stopping)
    assert [each["records"] for each in json.loads((out / "bounds.json").read_text())["sizes"]] == [10]
    finished = (out / "size-10" / "summary.json").stat().st_mtime_ns
    assert not (out / "size-32" / "summary.json").exists()
    resumed = over_sizes(run, (10, 32), out)
    assert [each | {"run": ""} for each in resumed] == [each | {"run": ""} for each in through]
    assert (out / "size-10" / "summary.json").stat().st_mtime_ns == finished
    other = trained(tmp_path / "other", small_recipe(seed=1))
    with pytest.raises(RunError, match="size-10: belongs to another recipe: seed"):
        over_sizes(other, (10,), out)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ("ten", "'ten' is no size"),
        ("10,0", "'0' is no size"),
        ("10,-3", "'-3' is no size"),
        ("7", "expected whole numbers of 8 or more"),
        ("10,", "'' is no size"),
        ("1e3", "'1e3' is no size"),
        ("²0", "'²0' is no size"),
        ("5000", "5,000 training records; the data have 1,257"),
    ],
)
def test_bad_sizes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sizes: str, words: str, small_run: Path
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bounds", str(small_run), "--sizes", sizes, "--out", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "run", small_recipe())


def test_sizes_are_sorted_and_each_there_once() -> None:
    assert parse_sizes(" 200, 10,200") == (10, 200)


def test_several_clients_share_a_size(tmp_path: Path) -> None:
    recipe = small_recipe(parties={"clients": ["a", "b"]})
    run = trained(tmp_path / "run", recipe)
    (found,) = over_sizes(run, (32,), tmp_path / "out")
    assert (found["records"], found["members"], found["batch_size"]) == (32, 16, 16)
    assert found["notes"] == ["members are the records of a; other clients' records are neither"]
    with pytest.raises(AuditError, match="15 records for 2 clients; expected 8 or more for each"):
        over_sizes(run, (15,), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cut": {"at": "hidden1", "back_at": "hidden2"}}, "in a U-shaped run the server has neither labels"),
        (
            {
                "parties": {
                    "clients": ["a", "b"],
                    "mode": "vertical",
                    "vertical": {"owner_settings": {"hidden": [8, 8]}},
                }
            },
            "a vertical run is not replayed yet",
        ),
        ({"cut": {"at": "hidden1", "hops": ["hidden2"]}, "parties": {"hops": ["hop"]}}, "a multi-hop run is not"),
        (
            {"attacker": {"auxiliary_share": 0.1, "validation_share": 0}, "client": {"own_records": True}},
            "set no pairs aside",
        ),
    ],
)
def test_runs_without_a_loss_to_ask_for_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    run = trained(tmp_path / "run", small_recipe(**changes))
    with pytest.raises(AuditError, match=words) as caught:
        bounds_of_run(run)
    assert "\n" not in str(caught.value)
    with pytest.raises(AuditError, match=words):
        over_sizes(run, (10,), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_audit_tells_bounds_and_the_certificates_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milkglass.audit_files.attacks_of", lambda *_: (MeanRecord(), Ridge()))
    run = trained(tmp_path / "run", small_recipe(defense={"channel": {"width": 2, "sigma": 4.0}}))
    main_ends(["audit", str(run), "--quick"])
    out = capsys.readouterr().out
    written = json.loads((run / "audit.json").read_text())
    assert written["certificate"]["words"]
    for line in written["certificate"]["words"]:
        assert f"{run}: certificate: {line}\n" in out
    assert f"{run}: bits " not in out
    assert [(bound["measure"], bound["kind"], bound["exposure"]) for bound in written["bounds"]] == [
        ("membership", "lower", "fresh"),
        ("attribute", "upper", "fresh"),
        ("attribute", "upper", "repeated"),
    ]
    for bound in written["bounds"]:
        assert f"{run}: {bound['measure']}, {bound['exposure']} records: {bound['words']}\n" in out
    assert 0.5 < written["bounds"][1]["value"] < written["bounds"][2]["value"] < 1


def test_few_others_are_told(tmp_path: Path) -> None:
    tables = {"data": {"name": "digits", "train_records": 900, "test_records": 40, "test_share": 0.1}}
    tables["attacker"] = {"auxiliary_share": 0.02, "validation_share": 0.02}
    found = bounds_of_run(trained(tmp_path / "run", small_recipe(**tables)))
    assert found.notes == (
        "only 112 records are no members, fewer than there are members (900): the intervals are theirs",
    )
    began = found.run / "bottom.safetensors"
    assert began.exists()


def test_a_network_that_began_elsewhere_is_told(tmp_path: Path, small_run: Path) -> None:
    tables = small_recipe().model_dump(mode="json", exclude_none=True)
    tables["network"]["start"] = str(small_run)
    found = bounds_of_run(trained(tmp_path / "run", parse_recipe(tables)))
    assert "began with another run's weights" in found.notes[0]
    assert replace(found, notes=()).to_dict()["notes"] == []
