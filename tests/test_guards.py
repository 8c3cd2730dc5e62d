"""A client refuses to send what was not agreed, and to release its records oftener or more openly than it allows."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from milkglass.errors import DataError, EgressError, MilkglassError, RecipeError, RunError
from milkglass.guards import U_SHAPED, VANILLA, EgressGuard, LeakageGuard, ReleaseLedger, with_shapes
from milkglass.messages import Kind, Message

RECORDS = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.zeros(5, dtype=torch.int64)
X = torch.rand(64, 3, 4, generator=torch.Generator().manual_seed(4))
Z = torch.rand(64, 5, generator=torch.Generator().manual_seed(5))


def _check(kind: Kind, **tensors: Tensor) -> None:
    EgressGuard().check(Message(kind, "client", 0, tensors), RECORDS)


def test_what_was_agreed_passes() -> None:
    """None of these raises; the same guard does refuse the first of them with one tensor more."""
    _check("activations", activations=torch.rand(5, 3), labels=LABELS)
    with pytest.raises(EgressError, match="it holds activations, labels, records"):
        _check("activations", activations=torch.rand(5, 3), labels=LABELS, records=torch.rand(5, 3))
    _check("activations", activations=torch.rand(5, 16), labels=LABELS)  # as many values as a record, but other ones
    _check("activations", activations=torch.full((5, 3), 3e38), labels=LABELS)  # finite, though its sum is not
    _check("queries", activations=torch.rand(5, 2, 2, 2))
    empty = Message("queries", "client", 0, {"activations": torch.zeros(5, 16)})
    EgressGuard().check(empty, torch.zeros_like(RECORDS))  # all zeros tell nothing of an empty record


@pytest.mark.parametrize(
    ("kind", "tensors", "words"),
    [
        ("gradients", {"activations": torch.rand(5, 3)}, "may not send 'gradients'; agreed are activations, queries"),
        ("queries", {"activations": torch.rand(5, 3), "labels": LABELS}, "it holds activations, labels"),
        ("activations", {"activations": torch.rand(5, 3)}, "may hold activations, labels; it holds activations"),
        ("queries", {}, "it holds nothing"),
        ("queries", {"activations": torch.rand(6, 3)}, "6 rows of activations for 5 records"),
        ("queries", {"activations": torch.tensor(1.0)}, "one number of activations for 5 records"),
        ("queries", {"activations": (255 * RECORDS).to(torch.uint8)}, "uint8; agreed is a floating-point type"),
        ("activations", {"activations": torch.rand(5, 3), "labels": LABELS.int()}, "int32; agreed is torch.int64"),
        ("activations", {"activations": torch.rand(5, 3), "labels": LABELS[:, None]}, r"shape \(1,\); agreed is \(\)"),
        ("queries", {"activations": RECORDS}, "holds a record as it is"),
        ("queries", {"activations": RECORDS.flatten(1)}, "holds a record as it is"),
        ("queries", {"activations": torch.cat([torch.rand(4, 16), RECORDS[4].reshape(1, 16)])}, "a record as it is"),
        ("queries", {"activations": RECORDS.double().reshape(5, 2, 8)}, "holds a record as it is"),
        ("queries", {"activations": RECORDS.half()}, "holds a record as it is"),
        ("queries", {"activations": RECORDS.bfloat16().flatten(2)}, "holds a record as it is"),
        ("queries", {"activations": RECORDS.flip(0)}, "holds a record as it is"),
        ("queries", {"activations": torch.cat([torch.rand(4, 16), RECORDS[2].reshape(1, 16)])}, "a record as it is"),
        ("queries", {"activations": torch.tensor([[float("nan")]] * 5)}, "not finite"),
        ("queries", {"activations": torch.tensor([[float("inf")]] * 5)}, "not finite"),
    ],
)
def test_what_was_not_agreed_is_refused(kind: Kind, tensors: dict[str, Tensor], words: str) -> None:
    with pytest.raises(EgressError, match=words):
        _check(kind, **tensors)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(EgressError, match="0 rows of activations for 0 records"):
        EgressGuard().check(Message("queries", "client", 0, {"activations": torch.zeros(0, 16)}), RECORDS[:0])


def test_a_record_is_found_in_any_row_and_only_a_record() -> None:
    generator = torch.Generator().manual_seed(3)
    # rows whose bits have equal sums: the same values in another order, and records of few, equal values
    few = torch.eye(6)[torch.tensor([[0, 1], [2, 3]])].sum(1)
    for records in (torch.rand(8, 6, generator=generator), few, few * 0.5):
        for row in range(len(records)):
            for place in range(len(records)):
                sent = torch.cat([records, 1 - records], dim=1)[:, 3:9].contiguous()  # as many values, other ones
                EgressGuard().check(Message("queries", "client", 0, {"activations": sent}), records)
                sent[place] = records[row].roll(1)
                if not (sent[place] == records).all(1).any():
                    EgressGuard().check(Message("queries", "client", 0, {"activations": sent}), records)
                sent[place] = records[row]
                with pytest.raises(EgressError, match="a record as it is"):
                    EgressGuard().check(Message("queries", "client", 0, {"activations": sent}), records)


def test_a_record_is_found_whatever_the_sign_of_its_zeros_and_between_empty_rows() -> None:
    records = torch.tensor([[0.0, 0.0], [0.0, 1.0], [-0.0, 2.0]])
    for row in ([-0.0, 1.0], [0.0, 2.0]):
        sent = torch.tensor([[0.0, 0.0], row, [0.0, 0.0]])
        with pytest.raises(EgressError, match="a record as it is"):
            EgressGuard().check(Message("queries", "client", 0, {"activations": sent}), records)
    EgressGuard().check(Message("queries", "client", 0, {"activations": torch.zeros(3, 2)}), records)


def test_u_shaped_training_never_sends_labels() -> None:
    guard = EgressGuard(U_SHAPED)
    for kind, name in (("activations", "activations"), ("returns", "gradient"), ("queries", "activations")):
        guard.check(Message(kind, "client", 0, {name: torch.rand(5, 3)}), RECORDS)  # type: ignore[arg-type]
        message = Message(kind, "client", 0, {name: torch.rand(5, 3), "labels": LABELS})  # type: ignore[arg-type]
        with pytest.raises(EgressError, match=r"it holds .*labels"):
            guard.check(message, RECORDS)
    with pytest.raises(EgressError, match="'returns': gradient holds a record as it is"):
        guard.check(Message("returns", "client", 0, {"gradient": RECORDS.flip(0)}), RECORDS)
    with pytest.raises(EgressError, match="may not send 'returns'"):
        _check("returns", gradient=torch.rand(5, 3))


def test_shapes_and_types_are_those_agreed() -> None:
    guard = EgressGuard(with_shapes(U_SHAPED, activations=(2, 3), gradient=(7,)), torch.float32)

    def check(kind: Kind, name: str, tensor: Tensor) -> None:
        guard.check(Message(kind, "client", 0, {name: tensor}), RECORDS)

    check("activations", "activations", torch.rand(5, 2, 3))
    check("queries", "activations", torch.rand(5, 2, 3))
    check("returns", "gradient", torch.rand(5, 7))
    for kind, name, shape in (
        ("activations", "activations", (5, 6)),
        ("queries", "activations", (5, 3, 2)),
        ("returns", "gradient", (5, 2, 3)),
    ):
        with pytest.raises(EgressError, match=rf"a row of {name} has shape {re.escape(str(shape[1:]))}; agreed is \("):
            check(kind, name, torch.rand(shape))  # type: ignore[arg-type]
    with pytest.raises(EgressError, match=r"activations is torch.float64; agreed is torch.float32"):
        check("queries", "activations", torch.rand(5, 2, 3).double())
    assert U_SHAPED["activations"]["activations"] is None
    assert VANILLA["activations"]["labels"] == ()
    with pytest.raises(EgressError, match="a shape for 'z', which no message holds; known: activations, labels"):
        with_shapes(VANILLA, z=(3,))


# -- how often a record is released


def test_a_ledger_counts_every_release_of_every_record() -> None:
    ledger, generator = ReleaseLedger(20, None), torch.Generator().manual_seed(0)
    counts = [0] * 20
    for step in range(30):
        rows = torch.randint(20, (7,), generator=generator)
        ledger.charge(step, rows, times=1 + step % 2)
        for row in rows.tolist():
            counts[row] += 1 + step % 2
    assert ledger.state()["counts"].tolist() == counts
    assert ledger.summary() == {"largest": max(counts), "mean": sum(counts) / 20, "total": sum(counts)}


def test_a_release_beyond_the_limit_is_refused_and_charges_nobody() -> None:
    ledger = ReleaseLedger(6, 3)
    ledger.charge(0, torch.tensor([0, 1, 2]), times=3)
    before = ledger.state()
    words = "step 1: 2 of 4 records would be released up to 5 times; the client's limit is 3; this batch is not sent"
    for _ in range(2):
        with pytest.raises(EgressError, match=f"^{words}$"):
            ledger.charge(1, torch.tensor([1, 3, 2, 1, 4]))
        assert all(torch.equal(tensor, before[name]) for name, tensor in ledger.state().items())
    ledger.charge(1, torch.tensor([3, 3, 3]))  # each of the three counts
    with pytest.raises(EgressError, match="1 of 1 records would be released up to 4 times"):
        ledger.charge(2, torch.tensor([3]))
    ledger.charge(2, torch.tensor([4, 5]))


def test_a_repeated_step_costs_nothing_and_no_other_records_hide_behind_it() -> None:
    ledger = ReleaseLedger(6, 1)
    for step, rows in ((3, torch.tensor([0, 1])), (7, torch.tensor([2]))):
        for _ in range(3):
            ledger.charge(step, rows)
    ledger.charge(3, torch.tensor([0, 1]))
    for other, times in ((torch.tensor([4]), 1), (torch.tensor([2]), 2)):
        with pytest.raises(EgressError, match="step 7 was charged for other records"):
            ledger.charge(7, other, times)
    assert ledger.summary() == {"largest": 1, "mean": 0.5, "total": 3}


def test_a_ledger_goes_on_from_its_state() -> None:
    stopped, resumed = ReleaseLedger(4, 2), ReleaseLedger(4, 2)
    stopped.charge(0, torch.tensor([0, 1]))
    stopped.charge(1, torch.tensor([1, 2]))
    state = stopped.state()
    resumed.load_state(state)
    resumed.charge(1, torch.tensor([1, 2]))  # the step that was under way
    assert resumed.state()["counts"].tolist() == [1, 2, 1, 0]
    with pytest.raises(EgressError, match="1 of 2 records would be released up to 3 times"):
        resumed.charge(2, torch.tensor([1, 3]))
    resumed.charge(2, torch.tensor([3]))
    assert state["counts"].tolist() == [1, 2, 1, 0], "a state is a copy"
    lowered = ReleaseLedger(4, 1)
    lowered.load_state(state)
    lowered.charge(2, torch.tensor([3]))
    with pytest.raises(EgressError, match="the client's limit is 1"):
        lowered.charge(3, torch.tensor([0]))
    with pytest.raises(RunError, match="counts 4 records; this client has 5"):
        ReleaseLedger(5, 2).load_state(state)
    resumed.load_state({})
    assert resumed.summary() == {"largest": 0, "mean": 0.0, "total": 0}
    resumed.charge(0, torch.tensor([1]))
    assert resumed.summary()["total"] == 1


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ReleaseLedger(3, 0), RecipeError, "a limit of 0 releases"),
        (lambda: ReleaseLedger(3, 1).charge(0, torch.tensor([3])), DataError, "a row outside 0 to 2"),
        (lambda: ReleaseLedger(3, 1).charge(0, torch.tensor([-1])), DataError, "a row outside 0 to 2"),
        (lambda: ReleaseLedger(3, 1).charge(0, torch.tensor([1]), 0), DataError, "or 0 releases of it"),
        (lambda: ReleaseLedger(3, 1).charge(0, torch.tensor([True])), DataError, "expected a list of int64"),
        (lambda: LeakageGuard(0.0), RecipeError, "a leakage limit of 0.0"),
        (lambda: LeakageGuard(1.1), RecipeError, "a leakage limit of 1.1"),
        (lambda: LeakageGuard(float("nan")), RecipeError, "a leakage limit of nan"),
        (lambda: LeakageGuard(0.5, 3), RecipeError, "a leakage window of 3 records; at least 4"),
        (lambda: LeakageGuard(0.5).observe(0, X, Z[:3]), DataError, "64 records, but activations of 3"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], object], error: type[MilkglassError], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


# -- how much of the records shows in what is sent

ROTATION = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(6))).Q


def _batch(step: int, *, share: float = 0.0, size: int = 64) -> tuple[Tensor, Tensor]:
    """Records, and what is sent for them: a rotation of them to that share, noise for the rest."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 3, 4, generator=generator)
    noise = torch.randn(size, 12, generator=generator)
    return x, share * x.flatten(1) @ ROTATION + (1 - share) * noise


@pytest.mark.parametrize("shapes", [((784,), (500,)), ((1,), (1,)), ((12,), (16, 3, 3))])
def test_independent_data_stay_below_a_limit_of_a_tenth(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    guard, generator = LeakageGuard(0.1, 256), torch.Generator().manual_seed(0)
    estimates = []
    for step in range(200):
        guard.observe(step, *(torch.randn(64, *shape, generator=generator) for shape in shapes))
        if step % 4 == 3:
            assert guard.estimate is not None
            estimates.append(guard.estimate)
    assert len(set(estimates)) == 50
    assert max(abs(estimate) for estimate in estimates) < 0.05
    assert abs(sum(estimates) / 50) < 0.01, "no bias"


def test_a_rotation_of_the_records_is_refused_before_the_window_is_full() -> None:
    guard = LeakageGuard(0.9, 256)
    for step in range(3):
        guard.observe(step, *_batch(step, share=1.0))
        guard.check()
    words = (
        r"^step 3: what is sent depends on the records: squared distance correlation (1\.000|0\.999) over the last 256 "
        r"records, the client's limit is 0\.9; nothing more is sent; use a stronger defense before you go on$"
    )
    calls: tuple[Callable[[], None], ...] = (
        lambda: guard.observe(3, *_batch(3, share=1.0)),
        guard.check,
        lambda: guard.observe(4, *_batch(4)),
    )
    for call in calls:
        with pytest.raises(EgressError, match=words):
            call()
    for seed in range(8):  # as large as it gets; rounding would lift some above
        x = torch.rand(64, 12, generator=torch.Generator().manual_seed(seed)).double()
        LeakageGuard(1.0, 64).observe(0, x, 3 * x)


def test_every_window_is_judged_alone_and_a_large_batch_holds_several() -> None:
    for leaking in (0, 1, 2):
        guard, parts = LeakageGuard(0.5, 32), [_batch(step, size=32, share=step == leaking) for step in range(3)]
        x, z = (torch.cat(tables) for tables in zip(*parts, strict=True))
        with pytest.raises(EgressError, match="over the last 32 records"):
            guard.observe(0, x, z)
    guard = LeakageGuard(0.5, 32)
    guard.observe(0, *_batch(0, size=31, share=1.0))
    assert guard.estimate is None
    guard.observe(0, *_batch(0, size=31, share=1.0))  # a retry is no second batch
    assert guard.estimate is None


def test_half_precision_is_judged_and_values_that_are_not_finite_are_no_way_around() -> None:
    guard = LeakageGuard(0.5, 64)
    with pytest.raises(EgressError, match=r"correlation 1\.000"):
        guard.observe(0, X, X.half())
    with pytest.raises(MilkglassError, match="finite"):
        LeakageGuard(0.5, 64).observe(0, X, torch.full_like(Z, torch.nan))
    guard = LeakageGuard(0.5)
    guard.observe(0, X, Z.clone().requires_grad_())
    assert not guard.state()["z"].requires_grad, "no graph is kept alive"
    for other in (Z[:, :4], Z.double()):
        with pytest.raises(DataError, match="expected one shape and type"):
            guard.observe(1, X, other)


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_leakage_guard_comes_to_the_same_verdict_from_any_state(share: float) -> None:
    def play(guard: LeakageGuard, steps: range) -> list[float | str | None]:
        seen: list[float | str | None] = []
        for step in steps:
            try:
                guard.observe(step, *_batch(step, share=share if step > 4 else 0.0, size=40))
                seen.append(guard.estimate)
            except EgressError as error:
                seen.append(str(error))
        return seen

    whole = play(LeakageGuard(0.5, 96), range(12))
    assert any(isinstance(verdict, str) for verdict in whole) == (share == 0.8)
    for stop in range(12):
        stopped, resumed = LeakageGuard(0.5, 96), LeakageGuard(0.5, 96)
        play(stopped, range(stop))
        state = {name: tensor.clone() for name, tensor in stopped.state().items()}
        resumed.load_state(stopped.state())
        assert play(resumed, range(max(stop - 2, 0), 12))[-(12 - stop) :] == whole[stop:]
        assert {name: tensor.tolist() for name, tensor in stopped.state().items()} == {
            name: tensor.tolist() for name, tensor in state.items()
        }


def test_an_alarm_survives_a_checkpoint_and_ends_when_the_client_raises_its_limit() -> None:
    guard = LeakageGuard(0.5, 64)
    with pytest.raises(EgressError):
        guard.observe(0, X, X)
    resumed, raised = LeakageGuard(0.5, 64), LeakageGuard(1.0, 64)
    for other in (resumed, raised):
        other.load_state(guard.state())
    with pytest.raises(EgressError, match=r"step 0: .* over the last 64 records"):
        resumed.check()
    raised.check()
    raised.observe(0, X, X)
    resumed.load_state({})
    resumed.check()
    assert resumed.estimate is None
    resumed.observe(0, X, Z)
    assert resumed.estimate is not None
