"""Activations and records that were recorded elsewhere, with any framework -> a trial.

Two arrays are enough: row by row, what was sent and the record it was sent for.

Legend: N rows, R different records, C channels, H height, W width, F values of a flat record, P values of any record,
E entitled values a record.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from milkglass.errors import DataError
from milkglass.randomness import public_source
from milkglass.transcript import Pairs, Release, Trial, View

Array = NDArray[Any]

TARGET_SHARE: Final = 0.3
VALIDATION_SHARE: Final = 0.1
MOST_TARGETS: Final = 2000
FEWEST_ROWS: Final = 100
MOST_CHANNELS: Final = 4
LARGEST: Final = 1e30
NAMES: Final = ("activations.npy", "records.npy", "entitled.npy")


def read_trial(activations: Path, records: Path, entitled: Path | None = None, seed: int = 0) -> Trial:
    """The trial in two or three `.npy` files. Raises DataError, which names the file, for anything not expected."""
    arrays = [_read(path) for path in (activations, records, *([] if entitled is None else [entitled]))]
    names = [str(path) for path in (activations, records, entitled)]
    return trial_from(*arrays, seed=seed, where=names)


def trial_from(
    activations: Array,
    records: Array,
    entitled: Array | None = None,
    *,
    seed: int = 0,
    where: list[str] | tuple[str, ...] = ("activations", "records", "entitled"),
) -> Trial:
    """A trial from arrays of N rows: the attacker knows 60 % of them, chooses on 10 %, and rebuilds up to 2,000 more.

    Rows of one and the same record, such as its releases in several epochs, stay together: who knows a record's pair
    has nothing left to rebuild. Of a record that is to be rebuilt there is one row, the first.

    activations: (N, ...) numbers. records: pictures (N, H, W), (N, H, W, C) or (N, C, H, W), bytes or numbers, put into
    [0, 1]; or (N, F) numbers, whose columns are standardized. entitled: (N, E) numbers that the receiver was meant to
    learn, such as class probabilities, or (N,) labels. Raises DataError.
    """
    given = [activations, records] if entitled is None else [activations, records, entitled]
    for name, array in zip(where, given, strict=False):
        _check(array, name)
    for name, array in zip(where[1:], given[1:], strict=False):
        if len(array) != len(activations):
            raise DataError(
                f"{where[0]} has {len(activations)} rows and {name} {len(array)}; expected them to pair up row by row"
            )
    if len(activations) < FEWEST_ROWS:
        raise DataError(f"{where[0]}: {len(activations)} rows are too few to audit; expected at least {FEWEST_ROWS}")
    if (records == records[:1]).all():
        raise DataError(f"{where[1]}: every row is the same; expected different records")
    record_of_N = _same_records(records)
    different = int(record_of_N.max()) + 1
    if different < FEWEST_ROWS:
        raise DataError(
            f"{where[1]}: {different} different records are too few to audit; expected at least {FEWEST_ROWS}"
        )

    order_R = torch.randperm(different, generator=public_source(seed).generator("recorded"))
    targets, validation = round(TARGET_SHARE * different), round(VALIDATION_SHARE * different)
    place_N = order_R.argsort()[record_of_N]
    rows_N = place_N.argsort(stable=True)
    ends = [int((place_N < end).sum()) for end in (targets, targets + validation)]
    target_T, validation_N, known_N = torch.tensor_split(rows_N, ends)
    # one row of each record to rebuild: its other releases would pass for more records, and the interval be too narrow
    first_T = place_N[target_T].diff(prepend=torch.tensor([-1])) != 0
    target_T = target_T[first_T][:MOST_TARGETS]
    z = _centered(activations, known_N)
    if bool((z == z[:1]).all()):
        raise DataError(f"{where[0]}: every row is the same; expected activations that depend on the record")
    x = _records(records, known_N)
    e = _entitled(entitled, len(z))

    def pairs(rows_N: Tensor) -> Pairs:
        return Pairs(z[rows_N], x[rows_N], e[rows_N])

    return Trial(View(pairs(known_N), pairs(validation_N), Release(z[target_T], e[target_T])), x[target_T])


def _read(path: Path) -> Array:
    try:
        with path.open("rb") as file:  # numpy leaves it open where it is no archive after all
            array = np.load(file, allow_pickle=False)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or 'cannot be read'}; expected a .npy file") from None
    except (ValueError, EOFError, BadZipFile, MemoryError) as error:
        if "Object arrays" in str(error) or "pickle" in str(error).lower():
            raise DataError(f"{path}: not a plain .npy array (pickled Python objects are never loaded)") from None
        raise DataError(f"{path}: cannot be read, truncated or not a .npy file") from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: an archive of several arrays; expected a .npy file of one")
    return array


def _check(array: Array, where: str) -> None:
    if array.dtype.kind not in "uifb":
        raise DataError(f"{where}: values of type {array.dtype}; expected numbers")
    if array.ndim == 0 or 0 in array.shape:
        raise DataError(f"{where}: shape {array.shape}; expected a row for each record, and at least one value in it")
    if array.dtype.kind == "f":
        bad = np.argwhere(~np.isfinite(array).reshape(len(array), -1).all(axis=1))
        if len(bad):
            raise DataError(f"{where}: row {bad[0][0]} holds NaN or infinity; expected finite numbers")
        largest = float(np.abs(array).max())
        if largest > LARGEST:
            raise DataError(f"{where}: values up to {largest:.3g}; expected at most {LARGEST:g}")


def _same_records(records: Array) -> Tensor:
    """For each row the number of its record, from 0, equal for equal records: (N,)."""
    flat_NP = np.ascontiguousarray(records.reshape(len(records), -1))
    if flat_NP.dtype.kind == "f":
        flat_NP = flat_NP + 0  # -0 is 0
    _, record_of_N = np.unique(flat_NP.view(np.dtype((np.void, flat_NP[0].nbytes))).ravel(), return_inverse=True)
    return torch.from_numpy(record_of_N.astype(np.int64))


def _centered(activations: Array, known_N: Tensor) -> Tensor:
    """In float32, around the known rows' mean: what all have in common would cost the digits that tell them apart."""
    z = torch.from_numpy(np.ascontiguousarray(activations, dtype=np.float64))
    z = z - z[known_N].mean(0)
    return (z / (z.abs().max().item() or 1.0)).float()


def _records(records: Array, known_N: Tensor) -> Tensor:
    if records.ndim == 3:
        records = records[:, None]
    if records.ndim != 4:
        flat_NF = torch.from_numpy(records.reshape(len(records), -1).astype(np.float64))
        mean_F, spread_F = flat_NF[known_N].mean(0), flat_NF[known_N].std(0, correction=0)
        return ((flat_NF - mean_F) / torch.where(spread_F > 1e-9 * mean_F.abs(), spread_F, 1.0)).float()
    if records.shape[1] > MOST_CHANNELS >= records.shape[3]:
        records = records.transpose(0, 3, 1, 2)
    pixels = torch.from_numpy(np.ascontiguousarray(records).astype(np.float32))
    if records.dtype == np.uint8:
        return pixels / 255
    low, high = pixels.min(), pixels.max()
    return pixels if low >= 0 and high <= 1 else (pixels - low) / (high - low)


def _entitled(entitled: Array | None, rows: int) -> Tensor:
    if entitled is None:
        return torch.zeros(rows, 0)
    if entitled.ndim == 1 and entitled.dtype.kind in "uib":
        _, codes = np.unique(entitled, return_inverse=True)
        return torch.nn.functional.one_hot(torch.from_numpy(codes.astype(np.int64))).float()
    return torch.from_numpy(entitled.reshape(rows, -1).astype(np.float32))
