"""What a client refuses to do, whatever the recipe or the server says.

Legend: N records, P values a record; B records in a batch; `...` is any shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, final

import torch
from torch import Tensor

from milkglass.errors import DataError, EgressError, RecipeError, RunError
from milkglass.leakage.distance_correlation import MINIMUM_RECORDS, u_distance_correlation_sqr
from milkglass.messages import Message

Agreed = Mapping[str, Mapping[str, tuple[int, ...] | None]]
"""What a client may send: kind -> the tensors of such a message -> the shape of a row, without the batch; None: any."""

VANILLA: Final[Agreed] = {"activations": {"activations": None, "labels": ()}, "queries": {"activations": None}}
"""Training where the server holds the loss."""
U_SHAPED: Final[Agreed] = {
    "activations": {"activations": None},
    "returns": {"gradient": None},
    "queries": {"activations": None},
}
"""Training where labels and loss stay with the client."""

_NO_FLOATS: Final = {"labels": torch.int64}
_BITS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def with_shapes(agreed: Agreed, **shapes: tuple[int, ...]) -> Agreed:
    """The same, with the shape of a row for every tensor of these names: `with_shapes(VANILLA, activations=(16, 4))`.

    Raises EgressError for a name that no message holds.
    """
    known = {name for tensors in agreed.values() for name in tensors}
    for name in shapes:
        if name not in known:
            raise EgressError(f"a shape for {name!r}, which no message holds; known: {', '.join(sorted(known))}")
    return {
        kind: {name: shapes.get(name, shape) for name, shape in tensors.items()} for kind, tensors in agreed.items()
    }


@final
class EgressGuard:
    """Lets a message pass only if it is of an agreed kind, holds the agreed tensors, and no raw record.

    Every tensor has a row for each record. Labels are int64, the rest floating point; dtype: of which type, None: any.
    """

    def __init__(self, agreed: Agreed = VANILLA, dtype: torch.dtype | None = None) -> None:
        self._agreed = agreed
        self._dtype = dtype

    def check(self, message: Message, records: Tensor) -> None:
        """Raise EgressError if `message` is not what was agreed, or carries one of `records` (N, ...) unchanged.

        A record is found in any row, in any shape, and in any type that the message's tensor may have.
        """
        expected = self._agreed.get(message.kind)
        if expected is None:
            raise EgressError(f"a client may not send {message.kind!r}; agreed are {', '.join(sorted(self._agreed))}")
        if message.tensors.keys() != expected.keys():
            found = ", ".join(sorted(message.tensors)) or "nothing"
            raise EgressError(f"{message.kind!r} may hold {', '.join(sorted(expected))}; it holds {found}")
        flat = records.flatten(1)
        for name, tensor in message.tensors.items():
            self._check_form(message.kind, name, tensor, len(records), expected[name])
            same_size = tensor.dim() > 1 and tensor[0].numel() == flat.shape[1]
            if same_size and _holds_one_of(flat, tensor.flatten(1)):
                raise EgressError(
                    f"{message.kind!r}: {name} holds a record as it is; cut the network behind a layer that computes"
                )
            if tensor.is_floating_point() and not finite(tensor):
                raise EgressError(f"{message.kind!r}: {name} is not finite (NaN or infinity); training has diverged")

    def _check_form(self, kind: str, name: str, tensor: Tensor, rows: int, shape: tuple[int, ...] | None) -> None:
        if tensor.dim() == 0 or not rows or len(tensor) != rows:
            found = f"{len(tensor)} rows" if tensor.dim() else "one number"
            raise EgressError(f"{kind!r}: {found} of {name} for {rows} records")
        if shape is not None and tensor.shape[1:] != shape:
            raise EgressError(f"{kind!r}: a row of {name} has shape {tuple(tensor.shape[1:])}; agreed is {shape}")
        dtype = _NO_FLOATS.get(name, self._dtype)
        if tensor.dtype != dtype if dtype is not None else not tensor.is_floating_point():
            raise EgressError(f"{kind!r}: {name} is {tensor.dtype}; agreed is {dtype or 'a floating-point type'}")


@final
class ReleaseLedger:
    """How often each of a client's own training records was released; refuses a release beyond the client's limit.

    records: N, of the client's training part. most_per_record: None only counts.
    """

    def __init__(self, records: int, most_per_record: int | None) -> None:
        if most_per_record is not None and most_per_record < 1:
            raise RecipeError(f"a limit of {most_per_record} releases a record; expected 1 or more, or none")
        self._most = most_per_record
        self._counts_N = torch.zeros(records, dtype=torch.int64)
        self._step = -1  # the last one charged
        self._rows_B = torch.zeros(0, dtype=torch.int64)  # its rows, each as often as it was charged

    def charge(self, step: int, rows_B: Tensor, times: int = 1, *, kept: bool = False) -> None:
        """Count `times` releases of the records in these rows (B,), before they leave.

        kept: what is sent of a record is always the same release, so it counts once.

        A step up to the last one charged costs nothing: a retry, or a resumed run, sends the same again. Raises
        EgressError, and charges nobody, where a record would be released too often, or where the last step comes again
        with other records.
        """
        self._check_rows(rows_B, times)
        rows_B = rows_B.repeat(times)
        if step < self._step:
            return
        if step == self._step:
            if not torch.equal(rows_B, self._rows_B):
                raise EgressError(f"step {step} was charged for other records; a step may be repeated, not replaced")
            return
        added_N = torch.bincount(rows_B, minlength=len(self._counts_N))
        if kept:
            added_N = ((added_N > 0) & (self._counts_N == 0)).long()
        counts_N = self._counts_N + added_N
        # only those of this batch: others may be over a limit that was lowered since
        too_often = counts_N[(added_N > 0) & (counts_N > self._most)] if self._most is not None else counts_N[:0]
        if len(too_often):
            raise EgressError(
                f"step {step}: {len(too_often)} of {int((added_N > 0).sum())} records would be released up to "
                f"{int(too_often.max())} times; the client's limit is {self._most}; this batch is not sent"
            )
        self._counts_N, self._step, self._rows_B = counts_N, step, rows_B

    def summary(self) -> dict[str, float]:
        """Releases of the most released record (`largest`), of an average one (`mean`), and of all (`total`)."""
        total = int(self._counts_N.sum())
        n = len(self._counts_N)
        return {"largest": int(self._counts_N.max()) if n else 0, "mean": total / n if n else 0.0, "total": total}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep: flat, named tensors."""
        return {"counts": self._counts_N.clone(), "step": torch.tensor(self._step), "rows": self._rows_B.clone()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken; an empty one, of a run that had no ledger yet, begins anew."""
        if not state:
            self._counts_N, self._rows_B, self._step = torch.zeros_like(self._counts_N), self._rows_B[:0], -1
            return
        if state["counts"].shape != self._counts_N.shape:
            raise RunError(
                f"the checkpoint's ledger counts {len(state['counts'])} records; this client has {len(self._counts_N)}"
            )
        self._counts_N, self._rows_B = state["counts"].clone(), state["rows"].clone()
        self._step = int(state["step"])

    def _check_rows(self, rows_B: Tensor, times: int) -> None:
        n = len(self._counts_N)
        if rows_B.dim() != 1 or rows_B.dtype != torch.int64:
            raise DataError(f"ledger: rows {rows_B.dtype} {tuple(rows_B.shape)}; expected a list of int64 row numbers")
        if times < 1 or (rows_B.numel() and (rows_B.min() < 0 or rows_B.max() >= n)):
            raise DataError(f"ledger: a row outside 0 to {n - 1}, or {times} releases of it; expected 1 or more")


@final
class LeakageGuard:
    """Stops sending where what is sent depends on the records more than the client allows.

    It measures the bias-corrected squared distance correlation (Szekely and Rizzo 2014) of records and what is sent for
    them: about 0 where they are independent, 1 where one is a rotation of the other. Windows of `window` records follow
    each other without overlap, and each is judged once, when it is full and before the batch that fills it is sent: up
    to window - 1 of its records have left by then. A window takes time as window^2 (at 256 and 784 values, about 2 ms)
    and memory as its records and activations, which are in `state` too: as private as the records. At 256, independent
    data scatter around 0 with a standard deviation of about 0.006; smaller windows scatter as 1 / window.

    limit: above 0, at most 1; the client's own: nothing that a server sends is used.
    """

    def __init__(self, limit: float, window: int = 256) -> None:
        if not 0 < limit <= 1:
            raise RecipeError(f"a leakage limit of {limit}; expected a number above 0, at most 1")
        if window < MINIMUM_RECORDS:
            raise RecipeError(f"a leakage window of {window} records; at least {MINIMUM_RECORDS} are needed")
        self._limit = limit
        self._window = window
        self._step = -1  # the last one observed
        self._kept: list[Tensor] = []  # records and activations of the window that is not full
        self._estimate: float | None = None
        self._judged_step, self._judged_n = -1, 0

    @property
    def estimate(self) -> float | None:
        """Of the last full window, -1 to 1, higher = more leakage; None until there is one."""
        return self._estimate

    def observe(self, step: int, x: Tensor, z: Tensor) -> None:
        """Take in records `x` (B, ...) and what is about to be sent for them, `z` (B, ...).

        A step up to the last one observed is not taken in again. Raises EgressError, once and for all, when a window is
        over the limit.
        """
        self.check()
        if step <= self._step:
            return
        self._check_batch(x, z)
        self._step = step
        batch = (x.detach(), z.detach())
        self._kept = [torch.cat(pair) for pair in zip(self._kept or [t[:0] for t in batch], batch, strict=True)]
        while len(self._kept[0]) >= self._window:
            x_full, z_full = (kept[: self._window] for kept in self._kept)
            self._kept = [kept[self._window :].clone() for kept in self._kept]
            self._judge(step, x_full, z_full)

    def check(self) -> None:
        """Raise EgressError if a window was over the limit: from then on nothing leaves."""
        if self._estimate is not None and not self._estimate <= self._limit:
            raise EgressError(
                f"step {self._judged_step}: what is sent depends on the records: squared distance correlation "
                f"{self._estimate:.3f} over the last {self._judged_n} records, the client's limit is {self._limit:g}; "
                "nothing more is sent; use a stronger defense before you go on"
            )

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep: flat, named tensors; records of the window that is not full are among them."""
        judged = [] if self._estimate is None else [self._estimate, self._judged_step, self._judged_n]
        return {
            "step": torch.tensor(self._step),
            "judged": torch.tensor(judged, dtype=torch.float64),
            **{name: kept.clone() for name, kept in zip(("x", "z"), self._kept, strict=False)},
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken, also after an alarm, unless the client has raised its limit since.

        An empty one, of a run that had no guard yet, begins anew.
        """
        self._step = int(state["step"]) if state else -1
        self._kept = [state[name].clone() for name in ("x", "z") if name in state]
        judged = state["judged"].tolist() if state else []
        self._estimate = judged[0] if judged else None
        self._judged_step, self._judged_n = (int(judged[1]), int(judged[2])) if judged else (-1, 0)

    def _check_batch(self, x: Tensor, z: Tensor) -> None:
        if len(x) != len(z):
            raise DataError(f"leakage guard: {len(x)} records, but activations of {len(z)}")
        for kept, given in zip(self._kept, (x, z), strict=False):
            if kept.shape[1:] != given.shape[1:] or kept.dtype != given.dtype:
                raise DataError(
                    f"leakage guard: rows {given.dtype} {tuple(given.shape[1:])} after {kept.dtype} "
                    f"{tuple(kept.shape[1:])}; expected one shape and type"
                )

    def _judge(self, step: int, x: Tensor, z: Tensor) -> None:
        z = z if z.dtype in (torch.float32, torch.float64) else z.float()
        self._estimate = min(u_distance_correlation_sqr(x, z).item(), 1.0)  # rounding may lift it above
        self._judged_step, self._judged_n = step, len(x)
        self.check()


def _holds_one_of(records_NP: Tensor, sent_BP: Tensor) -> bool:
    """Whether any sent row equals any record. Rows are sorted out by a sum of their bits, then compared for real."""
    # as integers, sums are exact in any order, and of equal rows equal; + 0.0 makes 0 of -0
    bits = _BITS[sent_BP.dtype.itemsize]
    records_NP, sent_BP = ((rows.to(sent_BP.dtype) + 0.0).view(bits) for rows in (records_NP, sent_BP))
    sums_N, sums_B = (rows.sum(1, dtype=torch.int64) for rows in (records_NP, sent_BP))
    near_B = torch.isin(sums_B, sums_N)
    if not near_B.any():
        return False
    near_N = torch.isin(sums_N, sums_B)
    records = {row.tobytes() for row in records_NP[near_N].numpy() if row.any()}  # all zeros tell nothing
    return any(row.tobytes() in records for row in sent_BP[near_B].numpy())


def finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # a sum is finite only if its terms are, and costs a sixtieth of asking each; only an overflowing sum must ask
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
