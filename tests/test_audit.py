"""The audit judges itself: doors that are open, closed and half open, and attacks that are broken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, final

import pytest
import torch
from torch import Tensor

from milkglass.attacks.base import Attack, Reconstruction, Tick, silent
from milkglass.attacks.decoder import Decoder
from milkglass.attacks.features import as_records, features
from milkglass.attacks.kernel_ridge import KernelRidge
from milkglass.attacks.mean_record import MeanRecord
from milkglass.attacks.ridge import Ridge, fit_ridge
from milkglass.attacks.suite import STRENGTHS, attacks_of, attribute_probes, membership_attacks
from milkglass.audit import Audit, audit
from milkglass.audit_work import Left, Work
from milkglass.defenses.certificate import ReleaseCheck, certificate
from milkglass.errors import AuditError, MissingKnowledgeError
from milkglass.inference import InferenceScore, Skipped
from milkglass.kept import Kept
from milkglass.transcript import Knowledge, MembershipTrial, MembershipView, Pairs, Release, Trial, View

QUICK: tuple[Attack, ...] = (MeanRecord(), Ridge(), KernelRidge(), Decoder(steps=20, width=8))
COUNT, CLASSES = 600, 4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def world() -> tuple[Tensor, Tensor]:
    """Pictures of 8 x 8 in four classes, and soft class probabilities as entitled values."""
    draws = generator()
    labels = torch.randint(CLASSES, (COUNT,), generator=draws)
    patterns = torch.rand(CLASSES, 1, 8, 8, generator=draws)
    records = (0.5 * patterns[labels] + 0.5 * torch.rand(COUNT, 1, 8, 8, generator=draws)).clamp(0, 1)
    logits = 4 * torch.nn.functional.one_hot(labels, CLASSES) + torch.randn(COUNT, CLASSES, generator=draws)
    return records, logits.softmax(1)


def trial_of(activations: Tensor, exposure: str = "fresh") -> Trial:
    records, entitled = world()

    def pairs(rows: slice) -> Pairs:
        return Pairs(activations[rows], records[rows], entitled[rows])

    view = View(pairs(slice(300)), pairs(slice(300, 400)), Release(activations[400:], entitled[400:]))
    return Trial(replace(view, exposure=exposure), records[400:])  # type: ignore[arg-type]


def half_open() -> Tensor:
    """Every second pixel crosses, in disorder."""
    return world()[0].flatten(1)[:, torch.randperm(64, generator=generator(3))[:32]]


@final
class Noise(Attack):
    """A broken attack."""

    name: ClassVar[str] = "noise"
    learned: ClassVar[bool] = True

    def attack(self, view: View, tick: Tick = silent) -> Reconstruction:
        draws = generator(9)
        validation, target = (
            torch.rand(len(rows), *view.known.records.shape[1:], generator=draws)
            for rows in (view.validation, view.target)
        )
        return Reconstruction(validation, target, 0.0)


@final
class Returns(Attack):
    """An attack that returns a constant, in whatever shape."""

    name: ClassVar[str] = "returns"

    def __init__(self, value: float, *shape: int) -> None:
        self._value, self._shape = value, shape

    def attack(self, view: View, tick: Tick = silent) -> Reconstruction:
        shape = self._shape or tuple(view.known.records.shape[1:])
        return Reconstruction(
            torch.full((len(view.validation), *shape), self._value),
            torch.full((len(view.target), *shape), self._value),
            0.0,
        )


@pytest.fixture(scope="module")
def half() -> Audit:
    return audit([trial_of(half_open())], attacks=QUICK, budget={"peek": 0.3})


def test_all_controls_pass_for_the_suite(half: Audit) -> None:
    assert set(half.controls) == {"identity", "identity_rotated", "faint", "independent", "gaussian"}
    assert all(result.passed for result in half.controls.values())
    assert half.controls["identity"].value > 0.99
    assert half.controls["identity_rotated"].value > 0.99
    assert half.controls["faint"].value > 0.99
    assert -0.02 < half.controls["independent"].value <= 0.05
    assert 0.9 <= half.controls["gaussian"].value <= 1.1


def test_half_of_the_pixels_is_about_half_of_the_peek(half: Audit) -> None:
    assert half.peek.low < half.peek.value < half.peek.high
    assert half.peek.value == pytest.approx(0.5, abs=0.06)
    assert half.verdict == "over budget"
    assert half.error_entitled == pytest.approx(0.25 / 12, rel=0.15)  # what the class leaves of a pixel's variance


def test_the_best_attack_is_the_one_that_does_best_on_validation(half: Audit) -> None:
    best = next(score for score in half.attacks if score.name == half.best_attack)
    assert best.peek.to_dict() == half.peek.to_dict()
    assert [score.name for score in half.attacks] == [*(attack.name for attack in QUICK), "stack"]
    assert half.attacks[0].peek.high < 0
    assert half.attacks[1].match_top1 > 0.9
    assert not any(score.undertrained for score in half.attacks)


def test_the_file_has_the_keys_that_readers_expect(half: Audit) -> None:
    held = json.loads(json.dumps(half.to_dict(), allow_nan=False))
    assert set(held) == {
        "peek", "measures", "exposures", "verdict", "budget", "strength", "best_attack", "error_entitled", "controls",
        "pictures_of", "certificate", "attacks", "inferences", "bounds", "curves", "skipped", "notes",
    }  # fmt: skip
    assert held["peek"] == held["exposures"]["fresh"] == {
        "value": half.peek.value, "low": half.peek.low, "high": half.peek.high,
    }  # fmt: skip
    assert set(held["attacks"][0]) == {
        "name", "adversary", "knows", "exposure", "mse", "psnr_db", "ssim", "peek", "peek_low", "peek_high",
        "match_top1", "seconds", "records", "undertrained",
    }  # fmt: skip
    assert set(held["controls"]["gaussian"]) == {"value", "limit", "passed"}
    assert held["certificate"] is None
    assert held["bounds"] == []
    assert held["attacks"][4]["peek"] == half.attacks[4].peek.value


def test_bounds_stand_beside_what_was_guessed() -> None:
    draws, classes_T = generator(4), torch.arange(120) % CLASSES
    # the server's logits: of members sure of the label, of others not
    logits_TK = 6.0 * torch.nn.functional.one_hot(classes_T, CLASSES) * (torch.arange(120) < 60)[:, None]
    own_NK, classes_N = torch.randn(40, CLASSES, generator=draws), torch.arange(40) % CLASSES
    members = MembershipTrial(
        MembershipView(
            Release(logits_TK + torch.randn(120, CLASSES, generator=draws), torch.zeros(120, 0), classes_T),
            Pairs(own_NK, own_NK, torch.zeros(40, 0), classes_N),
            Knowledge(server=torch.nn.Identity()),
        ),
        torch.arange(120) < 60,
    )
    trials = [trial_of(torch.randn(COUNT, 4, generator=draws), exposure) for exposure in ("fresh", "trained-on")]
    claimed = certificate(4, 1.0, 2.0)
    agrees, disagrees = ReleaseCheck(2.0, 1.0, 0.5, 0.5, 1.9, 1.0), ReleaseCheck(2.0, 1.0, 0.5, 0.5, 0.25, 0.0)

    def found(check: ReleaseCheck) -> Audit:
        return audit(trials, attacks=QUICK[:2], membership=members, certificate=claimed, check=check, strength="quick")

    below, above = found(agrees).bounds
    assert (below.measure, below.kind) == ("membership", "lower")
    area = max(row.value for row in found(agrees).inferences if row.measure == "membership.auc")
    assert below.low is not None
    assert 0.6 < below.low < below.value <= area
    # of training records the client's stage is not independent, so its certificate says nothing of them one by one
    assert (above.measure, above.kind, above.exposure, above.low) == ("attribute", "upper", "fresh", None)
    assert 0.5 < above.value < 1
    assert [bound.kind for bound in found(disagrees).bounds] == ["lower"]  # what is void rules nothing out
    assert found(disagrees).verdict == "inconclusive"
    (void,) = [note for note in found(disagrees).notes if "certificate" in note]
    assert void.startswith("releases that the audit made anew with the run's own client speak against")
    assert "noise of sigma 2, of one record 0.25, mean releases up to 1 long; it is void" in void
    json.dumps(found(agrees).to_dict(), allow_nan=False)


def test_pictures_are_the_first_targets_and_their_reconstructions(half: Audit) -> None:
    truth = trial_of(half_open()).truth[:12]
    assert torch.equal(half.pictures["records"], truth)
    assert set(half.pictures) == {"records", "entitled", *(score.name for score in half.attacks)}
    assert {picture.shape for picture in half.pictures.values()} == {truth.shape}
    stack, entitled = ((half.pictures[name] - truth).square().mean() for name in ("stack", "entitled"))
    assert stack < 0.7 * entitled


def test_an_open_cut_is_seen_through_and_a_closed_one_is_not() -> None:
    opened = audit([trial_of(world()[0])], attacks=QUICK[:2], budget={"peek": 0.9})
    assert opened.peek.low > 0.99
    assert opened.verdict == "over budget"
    noise = torch.randn(COUNT, 32, generator=generator(8))
    closed = audit([trial_of(noise)], attacks=QUICK[:3], budget={"peek": 0.05})
    assert closed.verdict == "within budget"
    assert closed.peek.high <= 0.05
    assert closed.peek.high > -0.02  # the entitled-only decoders are in the stack
    assert audit([trial_of(noise)], attacks=QUICK[:2]).verdict == "no budget set"


def test_the_upper_end_of_the_interval_has_to_be_within_the_budget(half: Audit) -> None:
    between = (half.peek.value + half.peek.high) / 2
    trial = trial_of(half_open())
    assert audit([trial], attacks=QUICK, budget={"peek": between}).verdict == "over budget"
    assert audit([trial], attacks=QUICK, budget={"peek": half.peek.high}).verdict == "within budget"


def test_the_worst_exposure_decides_whatever_the_order() -> None:
    mild, bad = trial_of(torch.randn(COUNT, 8, generator=generator(8))), trial_of(half_open(), "repeated")
    results = [audit(trials, attacks=QUICK[:2], budget={"peek": 0.3}) for trials in ([mild, bad], [bad, mild])]
    for result in results:
        assert result.verdict == "over budget"
        assert result.peek == result.exposures["repeated"]
        assert result.exposures["fresh"].high < 0.05
        assert {score.exposure for score in result.attacks} == {"fresh", "repeated"}
    assert results[0].exposures == results[1].exposures


def test_a_broken_attack_is_not_the_best_and_is_named(half: Audit) -> None:
    result = audit([trial_of(half_open())], attacks=[Noise(), *QUICK[:2]], budget={"peek": 0.3})
    assert result.best_attack in ("ridge", "stack")
    assert [score.name for score in result.attacks if score.undertrained] == ["noise"]
    assert any("noise is undertrained" in note for note in result.notes)
    assert result.peek.value == pytest.approx(half.peek.value, abs=0.05)


def test_a_suite_of_broken_attacks_is_inconclusive_and_never_within_budget() -> None:
    for broken in (Noise(), Returns(0.5), MeanRecord()):
        result = audit([trial_of(half_open())], attacks=[broken], budget={"peek": 1.0})
        assert result.verdict == "inconclusive"
        assert not result.controls["identity"].passed
        assert not result.controls["gaussian"].passed
        assert any("control identity failed" in note for note in result.notes)


def test_an_attack_that_is_astray_from_test_records_is_inconclusive() -> None:
    """Good on validation, far off on the target: the interval lies wholly below zero."""

    @final
    class Astray(Attack):
        name: ClassVar[str] = "astray"

        def attack(self, view: View, tick: Tick = silent) -> Reconstruction:
            if not view.known.activations[0].numel():
                return MeanRecord().attack(view)
            made = Ridge().attack(view)
            is_the_cut = view.known.activations.shape[1:] == (32,) and view.known.records.ndim == 4
            return replace(made, target=torch.zeros_like(made.target)) if is_the_cut else made

    result = audit([trial_of(half_open())], attacks=[Astray()], budget={"peek": 1.0})
    assert result.controls["identity"].passed
    assert result.peek.high < -0.02
    assert result.verdict == "inconclusive"
    assert any("clearly worse" in note for note in result.notes)


def test_values_that_are_not_finite_leave_an_attack_out() -> None:
    result = audit([trial_of(half_open())], attacks=[Returns(float("nan")), *QUICK[:2]])
    assert "returns" not in {score.name for score in result.attacks}
    assert any("returns is left out" in note for note in result.notes)
    assert result.verdict == "inconclusive"
    assert all(control.passed for control in result.controls.values())  # so that is not the reason
    with pytest.raises(AuditError, match="no attack gave"):
        audit([trial_of(half_open())], attacks=[Returns(float("nan"))])


def test_a_peek_that_is_not_finite_is_never_within_budget() -> None:
    """Good on validation records, so large on the target that squares overflow: the peek would be minus infinity."""

    @final
    class Overflows(Attack):
        name: ClassVar[str] = "overflows"

        def attack(self, view: View, tick: Tick = silent) -> Reconstruction:
            made = Ridge().attack(view)
            wild = made.target.double().clone().fill_(1e200)
            return replace(made, target=wild) if view.exposure == "repeated" else made

    closed = torch.randn(COUNT, 8, generator=generator(8))
    result = audit([trial_of(closed), trial_of(closed, "repeated")], attacks=[Overflows()], budget={"peek": 0.3})
    assert result.verdict == "inconclusive"
    assert "repeated: overflows is left out, its reconstruction has values that are not finite" in result.notes
    json.dumps(result.to_dict(), allow_nan=False)


def test_few_target_records_have_no_verdict() -> None:
    trial = trial_of(torch.randn(COUNT, 8, generator=generator(8)))

    def first(count: int) -> Trial:
        target = Release(trial.view.target.activations[:count], trial.view.target.entitled[:count])
        return Trial(replace(trial.view, target=target), trial.truth[:count])

    few, enough = (audit([first(count)], attacks=QUICK[:2], budget={"peek": 1.0}) for count in (29, 30))
    assert (few.verdict, enough.verdict) == ("inconclusive", "within budget")
    assert any("29 target records are too few for a verdict; it takes 30" in note for note in few.notes)
    assert not any("too few" in note for note in enough.notes)
    assert audit([first(8)], attacks=QUICK[:2]).verdict == "inconclusive"
    with pytest.raises(AuditError, match="7 target records; expected at least 8"):
        audit([first(7)], attacks=QUICK[:2])


def test_what_was_seen_in_training_is_said_not_to_be_covered(half: Audit) -> None:
    assert sum(note.startswith("trained-on: not covered") for note in half.notes) == 1
    trained_on = audit([trial_of(half_open(), "trained-on")], attacks=QUICK[:2])
    assert not any("not covered" in note for note in trained_on.notes)


@pytest.mark.parametrize("scale", [0.03, 1e-3, 1e-8])
def test_a_door_open_at_a_tiny_scale_is_over_budget(scale: float) -> None:
    sent = torch.cat([scale * world()[0].flatten(1), torch.randn(COUNT, 64, generator=generator(8))], dim=1)
    result = audit([trial_of(sent)], attacks=QUICK[:3], budget={"peek": 0.3})
    assert result.peek.low > 0.95
    assert result.verdict == "over budget"


def test_a_suite_that_knows_one_scale_alone_is_inconclusive() -> None:
    @final
    class OneScale(Attack):
        name: ClassVar[str] = "one scale"

        def attack(self, view: View, tick: Tick = silent) -> Reconstruction:
            fit = fit_ridge(view, features(view))
            return Reconstruction(as_records(fit.validation_NP, view), as_records(fit.target_TP, view), 0.0)

    result = audit([trial_of(half_open())], attacks=[MeanRecord(), OneScale()], budget={"peek": 1.0})
    assert [name for name, control in result.controls.items() if not control.passed] == ["faint"]
    assert result.controls["faint"].value < 0.1
    assert result.verdict == "inconclusive"


def test_an_attack_is_never_handed_the_truth() -> None:
    trial = trial_of(half_open())
    seen: list[View] = []

    @final
    class Watches(Attack):
        name: ClassVar[str] = "watches"

        def attack(self, view: View, tick: Tick = silent) -> Reconstruction:
            seen.append(view)
            return Ridge().attack(view)

    audit([trial], attacks=[Watches()], strength="quick")
    # answer alone, the cut, independent, identity, rotated, faint, gaussian
    assert len(seen) == 7
    truth = trial.truth.flatten(1)
    told = [view for view in seen if any(_holds(part, truth) for part in _tensors(view))]
    assert len(told) == 1  # the identity control: there the records cross the cut, that is its point
    assert torch.equal(told[0].target.activations, trial.truth)


def _tensors(view: View) -> list[Tensor]:
    parts = (view.known, view.validation, view.target)
    return [
        tensor for part in parts for tensor in vars(part).values() if isinstance(tensor, Tensor) and tensor.ndim > 1
    ]


def _holds(tensor: Tensor, truth: Tensor) -> bool:
    """Whether any row is one of the true records."""
    rows = tensor.flatten(1)
    return rows.shape[1] == truth.shape[1] and bool((rows[:, None] == truth[None]).all(2).any())


@final
class Watch:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, int, str]] = []
        self.steps: list[tuple[int, int]] = []

    def piece(self, done: int, total: int, what: str) -> None:
        self.pieces.append((done, total, what))

    def step(self, done: int, total: int) -> None:
        self.steps.append((done, total))


def test_the_same_seed_gives_the_same_audit_and_progress_ends() -> None:
    watch = Watch()
    trial = trial_of(half_open())
    one = audit([trial], attacks=QUICK[:2], seed=3, progress=watch)
    two, other = (audit([trial], attacks=QUICK[:2], seed=seed) for seed in (3, 4))
    assert (one.peek, one.controls) == (two.peek, two.controls)
    assert one.peek != other.peek
    assert [done for done, _, _ in watch.pieces] == list(range(watch.pieces[0][1] + 1))


def test_bad_trials_and_suites_are_refused() -> None:
    trial = trial_of(half_open())
    infinite = replace(trial, truth=torch.full_like(trial.truth, float("inf")))
    with pytest.raises(AuditError, match="no trials"):
        audit([])
    with pytest.raises(AuditError, match="no attacks"):
        audit([trial], attacks=[])
    with pytest.raises(AuditError, match="one per exposure"):
        audit([trial, trial], attacks=QUICK)
    with pytest.raises(AuditError, match="different names"):
        audit([trial], attacks=[Ridge(), Ridge()])
    with pytest.raises(AuditError, match="all values finite"):
        audit([infinite], attacks=QUICK)
    with pytest.raises(AuditError, match=r"'returns': its validation .* \(100, 3\); expected \(100, 1, 8, 8\)"):
        audit([trial], attacks=[Returns(0.0, 3)])


class FirstFew(Attack):
    """Knows the first records as they are; a far worse guess of the rest is never asked for."""

    name: ClassVar[str] = "first few"
    knows = ("labels",)
    paper: ClassVar[str] = "none"

    def __init__(self, truth: Tensor, rows: int) -> None:
        self._truth, self._rows = truth, rows

    def __repr__(self) -> str:
        return f"FirstFew({self._rows})"

    def attack(self, view: View, tick: Tick = silent) -> Reconstruction:
        return Reconstruction(view.validation.records[: self._rows].clone(), self._truth[: self._rows].clone(), 0.0)


def test_an_attack_on_the_first_records_alone_is_compared_on_these() -> None:
    trial = trial_of(torch.randn(COUNT, 8, generator=generator(8)))
    known = replace(trial.view.known, labels=torch.zeros(300, dtype=torch.int64))
    target = replace(trial.view.target, labels=torch.zeros(200, dtype=torch.int64))
    trial = Trial(replace(trial.view, known=known, target=target), trial.truth)
    found = audit(trial, attacks=[*QUICK[:2], FirstFew(trial.truth, 40)], strength="quick", budget={"peek": 0.5})
    score = next(score for score in found.attacks if score.name == "first few")
    assert (found.best_attack, score.records) == ("first few", 40)
    assert found.peek.value == pytest.approx(1, abs=1e-6)
    assert score.match_top1 == 1.0
    assert found.verdict == "over budget"
    stack = next(score for score in found.attacks if score.name == "stack")
    assert stack.peek.value < 0.1  # it holds only what speaks of every record


def test_a_lucky_attack_on_few_records_never_stands_in_for_a_strong_one_on_all() -> None:
    """It does best on validation records, and badly on the target: the strong one still counts."""

    class Lucky(FirstFew):
        name: ClassVar[str] = "lucky"

    trial = trial_of(half_open())
    known = replace(trial.view.known, labels=torch.zeros(300, dtype=torch.int64))
    target = replace(trial.view.target, labels=torch.zeros(200, dtype=torch.int64))
    trial = Trial(replace(trial.view, known=known, target=target), trial.truth)
    wrong = Lucky(trial.truth.flip(0), 40)
    found = audit(trial, attacks=[*QUICK[:2], wrong], strength="quick", budget={"peek": 0.3})
    plain = audit(trial, attacks=QUICK[:2], strength="quick", budget={"peek": 0.3})
    assert found.verdict == plain.verdict == "over budget"
    assert found.peek.high >= plain.peek.high - 0.01
    assert found.best_attack == plain.best_attack


def test_an_attribute_that_cannot_be_guessed_leaves_the_rest_standing() -> None:
    trial = trial_of(half_open())
    one = torch.zeros(COUNT, dtype=torch.int64)
    view = replace(
        trial.view,
        known=replace(trial.view.known, attributes={"rare": one[:300]}),
        validation=replace(trial.view.validation, attributes={"rare": one[300:400]}),
    )
    trial = Trial(view, trial.truth, attributes={"rare": one[400:]})
    found = audit(trial, attacks=QUICK[:2], strength="quick", budget={"attribute.rare": 0.5, "peek": 1.0})
    assert found.verdict == "inconclusive"
    assert [left.attack for left in found.skipped] == ["attribute rare"]
    assert any("attribute.rare is in the budget and could not be measured" in note for note in found.notes)


def test_a_bare_view_and_an_unknown_strength_are_refused() -> None:
    with pytest.raises(AuditError, match=r"expected Trial\(view, truth\)"):
        audit(trial_of(half_open()).view)  # type: ignore[arg-type]
    with pytest.raises(AuditError, match="did you mean 'quick'"):
        audit(trial_of(half_open()), strength="quik")  # type: ignore[arg-type]


@final
class Astounded(Attack):
    """Cannot be run here, and would be stronger than all others."""

    name: ClassVar[str] = "astounded"
    knows = ("client weights",)
    paper: ClassVar[str] = "none"

    def attack(self, view: View, tick: Tick = silent) -> Reconstruction:
        raise AssertionError("an attack that lacks knowledge is not run")


def test_an_attack_that_must_know_more_is_left_out_by_name_and_the_rest_goes_on(half: Audit) -> None:
    found = audit(trial_of(half_open()), attacks=[*QUICK[:2], Astounded()], strength="quick")
    (left,) = found.skipped
    assert left == Left("astounded", "fresh", "attack 'astounded' needs client weights; the view has none")
    assert [score.name for score in found.attacks] == ["mean record", "ridge", "stack"]
    assert found.to_dict()["skipped"] == [{"attack": "astounded", "exposure": "fresh", "why": left.why}]
    assert [left.attack for left in half.skipped] == ["matching game"]  # recorded arrays come without weights


def test_a_budget_on_what_cannot_be_measured_is_refused_before_any_attack() -> None:
    with pytest.raises(AuditError, match=r"'attribute.sex', which this audit does not measure"):
        audit(trial_of(half_open()), attacks=[Astounded(), *QUICK], budget={"attribute.sex": 0.1})


def test_what_leaks_of_an_attribute_counts_with_its_upper_end() -> None:
    trial = trial_of(half_open())
    bright = (world()[0].flatten(1)[:, :32].mean(1) > 0.5).long()
    view = trial.view
    view = replace(
        view,
        known=replace(view.known, attributes={"bright": bright[:300]}),
        validation=replace(view.validation, attributes={"bright": bright[300:400]}),
    )
    trial = Trial(view, trial.truth, attributes={"bright": bright[400:]})
    kinds = [audit(trial, attacks=QUICK[:2], strength="quick", budget={"attribute.bright": b}) for b in (0.05, 0.5)]
    assert [found.verdict for found in kinds] == ["over budget", "within budget"]
    measured = kinds[0].measures["attribute.bright"]
    assert 0.1 < measured.low < measured.value < measured.high <= 0.5
    assert {row.measure for row in kinds[0].inferences} == {"attribute.bright"}


@final
class Breaks(Attack):
    """Ridge regression that breaks on one kind of view."""

    name: ClassVar[str] = "breaks"
    paper: ClassVar[str] = "none"

    def __init__(self, error: Exception, pairs: int | None = None, values: int | None = None) -> None:
        self._error, self._pairs, self._values = error, pairs, values

    def attack(self, view: View, tick: Tick = silent) -> Reconstruction:
        sent = view.known.activations[0].numel()
        if self._pairs in (None, len(view.known)) and self._values in (None, sent):
            raise self._error
        return Ridge().attack(view, tick)


@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory\nand more"), ValueError("no"), MemoryError(), ZeroDivisionError("zero")]
)
def test_an_attack_that_breaks_on_the_real_view_leaves_no_verdict(error: Exception) -> None:
    found = audit(
        trial_of(half_open()), attacks=[MeanRecord(), Ridge(), Breaks(error, values=32)], budget={"peek": 0.9}
    )
    assert found.verdict == "inconclusive"
    assert "fresh: breaks broke, so there is no verdict" in found.notes
    assert [left.attack for left in found.skipped] == ["breaks", "matching game"]
    assert "\n" not in found.skipped[0].why


def test_an_attack_that_does_not_apply_is_left_out_and_the_verdict_stands() -> None:
    attacks = [MeanRecord(), Ridge(), Breaks(AuditError("not for pictures"), values=32)]
    found = audit(trial_of(half_open()), attacks=attacks, budget={"peek": 0.9})
    assert found.verdict == "within budget"
    assert found.skipped[0].why == "not for pictures"


def test_an_attack_that_breaks_on_a_control_or_on_few_pairs_ends_nothing() -> None:
    broken = Breaks(RuntimeError("breaks"), values=64)  # the identity and the Gaussian door
    found = audit(trial_of(half_open()), attacks=[broken, Ridge()], budget={"peek": 0.9})
    assert found.controls["identity"].passed  # by the other one
    alone = audit(trial_of(half_open()), attacks=[broken], budget={"peek": 0.9})
    assert alone.verdict == "inconclusive"
    assert not alone.controls["identity"].passed

    few = audit(trial_of(half_open()), attacks=[Breaks(RuntimeError("breaks"), pairs=50), Ridge()])
    points = {curve.attack: curve.pairs for curve in few.curves}
    assert points["ridge"][0] == 50
    assert points["breaks"] == points["ridge"][1:]


def test_curves_fall_with_the_number_of_pairs_and_end_at_the_attack_itself(half: Audit) -> None:
    by_attack = {curve.attack: curve for curve in half.curves}
    assert set(by_attack) == {"ridge", "kernel ridge"}  # decoders are drawn when thorough
    ridge = by_attack["ridge"]
    assert ridge.pairs[0] == 50
    assert ridge.pairs[-1] == 300
    assert ridge.mse[-1] < ridge.mse[0]
    score = next(score for score in half.attacks if score.name == "ridge")
    assert ridge.mse[-1] == pytest.approx(score.mse)
    assert ridge.peek[-1] == pytest.approx(score.peek.value)


def test_an_empty_budget_is_none() -> None:
    assert audit(trial_of(half_open()), attacks=QUICK[:2], budget={}).verdict == "no budget set"


@pytest.mark.parametrize("part", ["known", "validation", "target"])
@pytest.mark.parametrize("what", ["activations", "entitled"])
def test_values_that_are_not_finite_are_named(part: str, what: str) -> None:
    trial = trial_of(half_open())
    rows = getattr(trial.view, part)
    holed = getattr(rows, what).clone()
    holed[3, 0] = float("nan")
    view = replace(trial.view, **{part: replace(rows, **{what: holed})})
    with pytest.raises(AuditError, match=f"{part} {what}: not all values are finite"):
        audit(replace(trial, view=view), attacks=QUICK[:2])


def test_constant_activations_show_nothing_beyond_the_answer() -> None:
    found = audit(trial_of(torch.ones(COUNT, 3)), attacks=QUICK[:2], budget={"peek": 0.05})
    assert abs(found.peek.value) < 0.02
    assert found.verdict == "within budget"


def test_strengths_hold_what_they_promise() -> None:
    quick, default, thorough = ([attack.name for attack in attacks_of(strength)] for strength in STRENGTHS)
    assert quick == ["mean record", "nearest neighbor", "ridge", "kernel ridge", "decoder"]
    assert {*quick, "defense-aware decoder", "likelihood from ridge"} == set(default)
    assert {"likelihood from grey", "deep image prior", "shadow", "unsplit", "sdar", "fsha"} <= set(thorough)
    assert {name for name in thorough if name.startswith("decoder")} == {
        "decoder", "decoder of width 8", "decoder of width 64"
    }  # fmt: skip
    assert set(default) < set(thorough)
    assert [attack.name for attack in membership_attacks("default")] == ["class distance", "loss threshold"]
    assert membership_attacks("thorough")[-1].name == "lira"
    assert [probe.name for probe in attribute_probes("quick")] == ["linear probe", "mlp probe"]
    assert attribute_probes("thorough")[-1].name == "fsha attribute"
    with pytest.raises(AuditError, match="did you mean 'thorough'"):
        attacks_of("thorogh")  # type: ignore[arg-type]


def test_an_attack_that_breaks_on_the_answer_alone_leaves_no_verdict() -> None:
    attacks = [MeanRecord(), Ridge(), Breaks(RuntimeError("out of memory"), values=0)]
    found = audit(trial_of(half_open()), attacks=attacks, budget={"peek": 0.9})
    assert found.verdict == "inconclusive"
    assert "fresh: breaks broke, so there is no verdict" in found.notes


def test_what_was_left_out_is_told_again_where_results_are_kept(tmp_path: Path) -> None:
    row = InferenceScore("matching", "game", "malicious", ("pairs",), "fresh", 0.1, 0.0, 0.2, 9, 0.0, {})

    def compute(skipped: Skipped) -> list[InferenceScore]:
        skipped("other", MissingKnowledgeError("attack 'other' needs a training; the view has none"))
        return [row]

    def never(_: Skipped) -> list[InferenceScore]:
        raise AssertionError("it is kept")

    trial = trial_of(half_open())
    for asked in (compute, never):
        work = Work(None, Kept(tmp_path), 0, 1)
        assert [found.to_dict() for found in work.rows("game", "fresh", trial, asked, ["matching"])] == [row.to_dict()]
        assert [left.attack for left in work.left] == ["other"]
        assert not work.failed

    def breaks(skipped: Skipped) -> list[InferenceScore]:
        skipped("other", RuntimeError("out of memory"))
        return [row]

    for _ in range(2):  # what broke is tried again
        work = Work(None, Kept(tmp_path), 0, 1)
        assert len(work.rows("another", "fresh", trial, breaks, ["matching"])) == 1
        assert work.failed == {"matching"}
