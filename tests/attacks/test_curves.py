"""Fewer pairs, and nothing else about the view changes."""

from __future__ import annotations

import itertools

import pytest
import torch

from milkglass.attacks.curves import pair_counts, subview
from milkglass.errors import AuditError
from milkglass.transcript import Pairs, Release, View


@pytest.mark.parametrize("total", [100, 137, 250, 359, 800, 6000, 50_000])
def test_counts_go_from_fifty_to_all_evenly_on_a_log_scale(total: int) -> None:
    counts = pair_counts(total)
    assert (counts[0], counts[-1]) == (50, total)
    assert 2 <= len(counts) <= 6
    ratios = [after / before for before, after in itertools.pairwise(counts)]
    assert min(ratios) >= 1.95
    assert max(ratios) / min(ratios) < 1.1
    assert len(counts) == 6 or total / 50 < 2 ** len(counts)  # one more would lie too near


@pytest.mark.parametrize("total", [8, 50, 99])
def test_few_pairs_give_one_point(total: int) -> None:
    assert pair_counts(total) == [total]


def view() -> View:
    draws = torch.Generator().manual_seed(0)

    def pairs(count: int) -> Pairs:
        return Pairs(
            torch.rand(count, 3, generator=draws),
            torch.rand(count, 2, generator=draws),
            torch.rand(count, 1, generator=draws),
            labels=torch.arange(count),
            attributes={"sex": torch.arange(count) % 2},
            repeats=torch.rand(4, count, 3, generator=draws),
        )

    return View(pairs(20), pairs(10), Release(torch.rand(5, 3), torch.rand(5, 1)), "repeated", lambda x: x)


def test_a_subview_knows_the_first_pairs_with_all_that_belongs_to_them() -> None:
    whole = view()
    part = subview(whole, 9)
    known, first = whole.known, part.known
    for name in ("activations", "records", "entitled", "labels"):
        assert torch.equal(getattr(first, name), getattr(known, name)[:9])
    assert torch.equal(first.attributes["sex"], known.attributes["sex"][:9])
    assert first.repeats is not None
    assert known.repeats is not None
    assert torch.equal(first.repeats, known.repeats[:, :9])
    assert (part.validation, part.target, part.release) == (whole.validation, whole.target, whole.release)
    assert (part.exposure, part.knowledge) == (whole.exposure, whole.knowledge)


@pytest.mark.parametrize("pairs", [0, 7, 21])
def test_too_few_or_too_many_pairs_are_refused(pairs: int) -> None:
    with pytest.raises(AuditError, match=f"pairs = {pairs}; expected from 8 to 20"):
        subview(view(), pairs)
