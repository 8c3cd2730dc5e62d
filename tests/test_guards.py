"""A client refuses to send what was not agreed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from milkglass.errors import EgressError
from milkglass.guards import EgressGuard
from milkglass.messages import Kind, Message

RECORDS = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.zeros(5, dtype=torch.int64)


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
        ("queries", {"activations": RECORDS}, "holds a record as it is"),
        ("queries", {"activations": RECORDS.flatten(1)}, "holds a record as it is"),
        ("queries", {"activations": torch.cat([torch.rand(4, 16), RECORDS[4].reshape(1, 16)])}, "a record as it is"),
        ("queries", {"activations": RECORDS.double().reshape(5, 2, 8)}, "holds a record as it is"),
        ("queries", {"activations": torch.tensor([[float("nan")]] * 5)}, "not finite"),
        ("queries", {"activations": torch.tensor([[float("inf")]] * 5)}, "not finite"),
    ],
)
def test_what_was_not_agreed_is_refused(kind: Kind, tensors: dict[str, Tensor], words: str) -> None:
    with pytest.raises(EgressError, match=words):
        _check(kind, **tensors)
