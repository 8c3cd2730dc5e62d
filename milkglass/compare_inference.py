"""Rows of protections for answers: encrypted and two-party inference with a trained network's own stages.

Training is not protected by these: bytes and seconds are of the answers to so many test records, and what the server
saw in training stands in the undefended row.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final

import torch
from torch import Tensor

from milkglass.compare import MEASURED, MODELLED, Cell, Row
from milkglass.compare_place import Place
from milkglass.errors import MissingExtraError
from milkglass.leakage.classification import clopper_pearson
from milkglass.leakage.estimate import Estimate
from milkglass.randomness import KEY_BYTES, Source
from milkglass.replay import load_parties, release_all
from milkglass.runs import RunFolder
from milkglass.training.split import Setup, computing_with


def inference_row(cell: Cell, place: Place, records: int) -> Row:
    """The row of a protection of answers. place: of the undefended cell, which is trained. Raises MilkglassError."""
    folder = RunFolder.open_finished(place.run)
    with computing_with(folder.recipe.threads):
        setup = load_parties(folder)
        test = setup.records.test
        x, y = test.x[:records], test.y[:records]
        return _MAKERS[cell.protection](cell, setup, release_all(setup.client, x), y)


def _homomorphic(cell: Cell, setup: Setup, z_BD: Tensor, y_B: Tensor) -> Row:
    from milkglass.private.homomorphic import GUARANTEE, homomorphic_run

    found = homomorphic_run(setup.server.stage, z_BD)
    answers = found.answers_BK.to(z_BD.dtype)
    with torch.no_grad():
        plain = setup.server.stage.eval()(z_BD)
        logits_BK = answers if setup.client.head is None else setup.client.head.eval()(answers.reshape(plain.shape))
    return _measured(
        cell,
        logits_BK,
        y_B,
        GUARANTEE,
        {**_numbers(asdict(found)), "server_seconds_ratio": found.server_seconds / max(found.plain_seconds, 1e-9)},
        bytes_up=found.bytes_up,
        bytes_down=found.bytes_down,
        seconds=found.client_seconds + found.server_seconds,
        note=f"top-1 as without encryption for {found.top1_equal:.1%} of {found.records} records, largest error of an "
        f"answer {found.largest_logit_error:.2g}; before: {found.key_bytes:,} bytes of keys, once",
    )


def _two_party(cell: Cell, setup: Setup, z_BD: Tensor, y_B: Tensor) -> Row:
    from milkglass.private.two_party import GUARANTEE, two_party_run

    found = two_party_run(setup.server.stage, z_BD)
    return _measured(
        cell,
        found.answers_BK,
        y_B,
        GUARANTEE,
        _numbers(asdict(found)),
        bytes_up=found.bytes_up,
        bytes_down=found.bytes_down,
        seconds=found.seconds,
        note=f"top-1 as in the clear for {found.top1_equal:.1%} of {found.records} records, largest error of an answer "
        f"{found.largest_logit_error:.2g}; before: {found.setup_bytes:,} bytes, {found.setup_seconds:.1f} s",
    )


def _garbled(cell: Cell, setup: Setup, z_BD: Tensor, y_B: Tensor) -> Row:
    """Measured where the garbling library is installed, else modelled from published costs."""
    from milkglass.private.garbled_circuits import GUARANTEE, MOST_GATES, garbled_argmax_cost, garbled_argmax_run

    with torch.no_grad():
        logits_BK = setup.server.stage.eval()(z_BD)
    most = MOST_GATES // garbled_argmax_cost(logits_BK.shape[1]).and_gates
    try:
        found = garbled_argmax_run(logits_BK[:most], Source(os.urandom(KEY_BYTES)))
    except MissingExtraError as error:
        cost = garbled_argmax_cost(logits_BK.shape[1])
        return Row(
            cell,
            MODELLED,
            bytes_up=float(cost.bytes_up * len(y_B)),
            bytes_down=float(cost.bytes_down * len(y_B)),
            rounds=cost.rounds,
            guarantee=GUARANTEE,
            inference=True,
            records=len(y_B),
            notes=(f"half gates, from published costs: {cost.and_gates:,} AND gates a record; to measure it: {error}",),
            details=asdict(cost),
        )
    right = int((found.classes_B == y_B[: found.records]).sum())
    return Row(
        cell,
        MEASURED,
        accuracy=_accuracy(right, found.records),
        bytes_up=float(found.bytes_up),
        bytes_down=float(found.bytes_down),
        seconds=found.seconds,
        guarantee=GUARANTEE,
        inference=True,
        records=found.records,
        notes=(
            f"the greatest logit alone, of shares of the logits: the class of the plain ones for {found.equal:.1%}; "
            f"{found.and_gates:,} AND gates, set up in {found.setup_seconds:.1f} s",
        ),
        details=_numbers(asdict(found)),
    )


_MAKERS: Final[dict[str, Callable[[Cell, Setup, Tensor, Tensor], Row]]] = {
    "homomorphic": _homomorphic,
    "two_party": _two_party,
    "garbled": _garbled,
}


def _measured(
    cell: Cell,
    logits_BK: Tensor,
    y_B: Tensor,
    guarantee: str,
    details: dict[str, Any],
    *,
    bytes_up: float,
    bytes_down: float,
    seconds: float,
    note: str,
) -> Row:
    right = int((logits_BK.argmax(1) == y_B).sum())
    return Row(
        cell,
        MEASURED,
        accuracy=_accuracy(right, len(y_B)),
        bytes_up=float(bytes_up),
        bytes_down=float(bytes_down),
        seconds=seconds,
        guarantee=guarantee,
        inference=True,
        records=len(y_B),
        notes=(note,),
        details=details,
    )


def _accuracy(right: int, count: int) -> Estimate:
    around = clopper_pearson(right, count)
    return Estimate(right / count, around.low, around.high)


def _numbers(table: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in table.items() if isinstance(value, int | float)}
