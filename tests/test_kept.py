"""Results are brought back for the same view and settings, and for no others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar, final

import pytest
import torch

from milkglass.attacks.base import Attack, Reconstruction, Tick, silent
from milkglass.attacks.ridge import Ridge
from milkglass.audit import audit
from milkglass.kept import Kept
from milkglass.transcript import Knowledge, MembershipTrial, MembershipView, Pairs, Release, Trial, View


def trial(seed: int = 0) -> Trial:
    draws = torch.Generator().manual_seed(seed)

    def pairs(count: int) -> Pairs:
        records = torch.rand(count, 4, generator=draws)
        return Pairs(records @ torch.rand(4, 3, generator=draws), records, torch.zeros(count, 0))

    known, validation, target = pairs(60), pairs(20), pairs(40)
    return Trial(View(known, validation, Release(target.activations, target.entitled)), target.records)


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path / "attacks")


def test_what_was_kept_comes_back_to_the_bit(kept: Kept) -> None:
    view = trial().view
    made = Ridge().attack(view)
    assert kept.reconstruction(view, Ridge()) is None
    kept.keep_reconstruction(view, Ridge(), made)
    back = kept.reconstruction(trial().view, Ridge())  # another object of the same content
    assert back is not None
    assert torch.equal(back.target, made.target)
    assert torch.equal(back.validation, made.validation)
    assert back.seconds == made.seconds


def test_another_view_or_setting_is_another_result(kept: Kept) -> None:
    view = trial().view
    kept.keep_json(view, "what", 1.5)
    assert kept.json(view, "what") == 1.5
    flipped = view.known.activations.clone()
    flipped[0, 0] += 1e-6
    others = [
        replace(view, exposure="repeated"),
        replace(view, release=lambda x: x),
        replace(view, knowledge=Knowledge(fingerprint="other weights")),
        replace(view, known=replace(view.known, activations=flipped)),
        replace(view, known=replace(view.known, labels=torch.zeros(60, dtype=torch.int64))),
        replace(view, target=replace(view.target, entitled=torch.zeros(40, 1))),
    ]
    assert all(kept.json(other, "what") is None for other in others)
    assert kept.json(view, "what else") is None


def test_a_damaged_result_is_made_again(kept: Kept, tmp_path: Path) -> None:
    view = trial().view
    kept.keep_reconstruction(view, Ridge(), Ridge().attack(view))
    kept.keep_json(view, "what", [1.5, 2.5, 3.5])
    for file in (tmp_path / "attacks").iterdir():
        file.write_bytes(file.read_bytes()[:7])
    assert kept.reconstruction(view, Ridge()) is None
    assert kept.json(view, "what") is None


@final
class Counts(Attack):
    """Ridge regression that counts its calls, and may be interrupted at one of them."""

    name: ClassVar[str] = "counts"
    paper: ClassVar[str] = "none"

    def __init__(self, stop_at: int | None = None) -> None:
        self.calls, self._stop_at = 0, stop_at

    def __repr__(self) -> str:
        return "Counts()"

    def attack(self, view: View, tick: Tick = silent) -> Reconstruction:
        self.calls += 1
        if self.calls == self._stop_at:
            raise KeyboardInterrupt
        return Ridge().attack(view, tick)


def test_an_interrupted_audit_goes_on_at_the_next_attack(kept: Kept) -> None:
    whole = audit(trial(), attacks=[Counts()], strength="quick")
    first = Counts(stop_at=2)  # the answer alone is done, the trial is not
    with pytest.raises(KeyboardInterrupt):
        audit(trial(), attacks=[first], strength="quick", kept=kept)
    second, third = Counts(), Counts()
    resumed = audit(trial(), attacks=[second], strength="quick", kept=kept)
    assert resumed.to_dict() | {"attacks": []} == whole.to_dict() | {"attacks": []}
    again = audit(trial(), attacks=[third], strength="quick", kept=kept, budget={"peek": 1.0})
    # of the controls numbers are kept, of attacks what they rebuilt: the second run did all but one, the third nothing
    assert (first.calls, third.calls) == (2, 0)
    assert second.calls > 1
    assert again.measures == resumed.measures


def test_nothing_is_kept_where_nothing_tells_two_results_apart(kept: Kept) -> None:
    class Nameless(Attack):
        name: ClassVar[str] = "nameless"
        paper: ClassVar[str] = "none"

        def attack(self, view: View, tick: Tick = silent) -> Reconstruction:
            return Ridge().attack(view, tick)

    view = trial().view
    made = Ridge().attack(view)
    asks = replace(view, release=lambda x: x)
    for seen, attack in ((view, Nameless()), (asks, Ridge())):
        kept.keep_reconstruction(seen, attack, made)
        assert kept.reconstruction(seen, attack) is None
    named = replace(asks, knowledge=Knowledge(fingerprint="weights"))
    kept.keep_reconstruction(named, Ridge(), made)
    assert kept.reconstruction(named, Ridge()) is not None


def test_a_number_is_not_kept_either_where_nothing_tells_two_servers_apart(kept: Kept) -> None:
    nothing = torch.zeros(20, 0)
    candidates, own = Release(nothing, nothing), Pairs(nothing, nothing, nothing)
    for knows, expected in ((Knowledge(server=torch.nn.Identity()), None), (Knowledge(fingerprint="weights"), 1.0)):
        game = MembershipTrial(MembershipView(candidates, own, knows), torch.arange(20) < 10)
        kept.keep_json(game, "auc", 1.0)
        assert kept.json(game, "auc") == expected


def test_what_a_reader_has_to_know_is_kept_with_the_result(kept: Kept) -> None:
    view = trial().view
    kept.keep_reconstruction(view, Ridge(), replace(Ridge().attack(view), note="the client stopped – why?"))
    back = kept.reconstruction(view, Ridge())
    assert back is not None
    assert back.note == "the client stopped – why?"
