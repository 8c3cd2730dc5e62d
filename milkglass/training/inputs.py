"""Records that come after a training, in the very form in which the network learned: what is kept of it, and readers.

A run folder has records.json: the shape of a record, the classes, and of a table how its raw columns were converted.
The means and scales in it are the training records' own: it stays with the client.

Legend: N records, C channels, H height, W width, F numeric columns, G categorical columns, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from milkglass.data import Columns, Deal, RawRecords, load, with_labels_of
from milkglass.errors import DataError, RunError, first_line
from milkglass.records import UNLABELED, Array, RawTable, raw_pictures, raw_table
from milkglass.runs import RunFolder

RECORDS: Final = "records.json"


@final
@dataclass(frozen=True)
class RecordForm:
    """What a run's records are like.

    shape: (C, H, W), or the converted columns. classes: K. class_names: by label, where the data named them. columns:
    of a table.
    """

    shape: tuple[int, ...]
    classes: int
    class_names: tuple[str, ...] | None
    columns: Columns | None


def told(records: Deal) -> dict[str, Any]:
    """What records.json says of these records."""
    columns = None
    if records.columns is not None:
        columns = {
            "mean": records.columns.mean.tolist(),
            "scale": records.columns.scale.tolist(),
            "categories": list(records.columns.categories),
        }
    return {
        "record_shape": list(records.record_shape),
        "classes": records.classes,
        "class_names": records.class_names,
        "columns": columns,
    }


def form_in(folder: RunFolder) -> RecordForm:
    """What a run folder keeps of its records' form. Raises RunError where it is missing or damaged."""
    content = folder.read_json(RECORDS)
    try:
        names, columns = content["class_names"], content["columns"]
        found = None
        if columns is not None:
            mean, scale = (np.array(columns[key], np.float64) for key in ("mean", "scale"))
            found = Columns(mean, scale, tuple(int(size) for size in columns["categories"]))
            if mean.ndim != 1 or mean.shape != scale.shape:
                raise ValueError("as many scales as means")
        shape = tuple(int(size) for size in content["record_shape"])
        return RecordForm(shape, int(content["classes"]), None if names is None else tuple(map(str, names)), found)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{folder.path / RECORDS}: damaged ({type(error).__name__}: {error})") from None


def read_input(path: Path, form: RecordForm, ids: str | None = None) -> RawRecords:
    """The records in a file, to be converted as the run's were. Labels are UNLABELED where there are none.

    A `.npy` holds pictures (N, C, H, W), (N, H, W, C) or (N, H, W), or a table (N, F + G): numbers as the data had
    them, before any scale, then category codes. Else it is what a recipe's data.path may be. ids: the name of the
    column of ids, which is no input.
    Raises DataError for what the network cannot take.
    """
    if path.suffix.lower() == ".npy":
        raw = _from_npy(path, form)
    else:
        named = ids if path.is_dir() or path.suffix.lower() == ".parquet" else None
        raw = load(path=path, ids=named, may_lack_labels=True)
    if len(raw) == 0:
        raise DataError(f"{path}: no records")
    raw = _fitted(with_labels_of(raw, form.class_names, "the run's classes"), form)
    if raw.record_shape != form.shape:
        raise DataError(f"{raw.where}: records of shape {raw.record_shape}; expected {form.shape}, as the run's")
    if raw.labels.max() >= form.classes:
        raise DataError(f"{raw.where}: label {raw.labels.max()} is out of range; expected 0 to {form.classes - 1}")
    return raw


def _from_npy(path: Path, form: RecordForm) -> RawRecords:
    where = str(path)
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read, or no .npy file of plain numbers ({first_line(error)})") from None
    if not isinstance(array, np.ndarray) or array.ndim < 2 or len(array) == 0:
        raise DataError(f"{path}: expected an array of records, (records, ...)")
    unlabeled = np.full(len(array), UNLABELED, np.int64)
    if form.columns is None:
        first = array.shape[1:] == form.shape  # channels first, as in the network
        return raw_pictures(np.moveaxis(array, 1, -1) if first else array, unlabeled, where)
    numbers, codes = len(form.columns.mean), len(form.columns.categories)
    if array.ndim != 2 or array.shape[1] != numbers + codes or array.dtype.kind not in "uifb":
        raise DataError(
            f"{where}: {array.dtype} of shape {array.shape}; expected (records, {numbers + codes}): {numbers} numeric "
            f"columns as the data had them, then {codes} columns of category codes"
        )
    categorical = array[:, numbers:]
    if not (np.isfinite(categorical) & (categorical == np.floor(categorical))).all():
        raise DataError(f"{where}: category codes that are no whole numbers, in the last {codes} columns")
    return raw_table(array[:, :numbers], categorical.astype(np.int64), unlabeled, where)


def _fitted(raw: RawRecords, form: RecordForm) -> RawRecords:
    """A table with the run's scale, and its categories; pictures as they are."""
    columns = form.columns
    if (columns is None) == isinstance(raw, RawTable):
        kinds = ("a table", "pictures") if columns is None else ("pictures", "a table")
        raise DataError(f"{raw.where}: {kinds[0]}; the run's records are {kinds[1]}")
    if columns is None or not isinstance(raw, RawTable):
        return raw
    found, expected = (raw.numeric.shape[1], raw.categorical.shape[1]), (len(columns.mean), len(columns.categories))
    if found != expected:
        raise DataError(
            f"{raw.where}: {found[0]} numeric and {found[1]} categorical columns; expected {expected[0]} and "
            f"{expected[1]}, as the run's"
        )
    too_high = np.argwhere(raw.categorical >= np.array(columns.categories, np.int64))
    if len(too_high):
        record, column = too_high[0]
        raise DataError(
            f"{raw.where}: category code {raw.categorical[record, column]} in categorical column {column} of record "
            f"{record}; the run's data had 0 to {columns.categories[column] - 1}"
        )
    return raw.fitted(columns.mean, columns.scale, columns.categories)
