"""Deal a data set out to clients; set aside the auxiliary, validation and test records.

`milkglass.formats` reads the files, `milkglass.records` says what a record is; all are used from here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, final

import numpy as np
import torch
from torch import Tensor

from milkglass.errors import DataError, nearest
from milkglass.formats import load
from milkglass.randomness import Source
from milkglass.records import UNLABELED, Columns, RawRecords, RawTable, Records

__all__ = ["MINIMUM_PART", "Columns", "Deal", "RawRecords", "Records", "deal", "load", "owners_part", "with_labels_of"]

MINIMUM_PART: Final = 8  # fewer records than this in one part, and nothing can be said about it


@final
@dataclass(frozen=True)
class Deal:
    """Who got which records. No record number is in two sets.

    train: by client. The `*_indices` are record numbers (n,) in the file dealt from; `test_indices` count in the test
    file where `test_is_separate`. classes: K. record_shape: (C, H, W) or (F,). columns: of a table,
    how its raw columns were converted. class_names: in the order of the labels, where the file names them.
    """

    train: Mapping[str, Records]
    auxiliary: Records
    validation: Records
    test: Records
    train_indices: Mapping[str, Tensor]
    auxiliary_indices: Tensor
    validation_indices: Tensor
    test_indices: Tensor
    test_is_separate: bool
    classes: int
    record_shape: tuple[int, ...]
    columns: Columns | None = None
    class_names: tuple[str, ...] | None = None

    def candidates(self, client: str) -> Candidates:
        """As many private training records of a client as others, for who guesses which are which.

        The others are test records; where these come from a source of their own, records of the pool that the members
        come from: else two sources would be told apart, not members.
        """
        members = self.train[client]
        outside_x = torch.cat([self.auxiliary.x, self.validation.x])
        outside_y = torch.cat([self.auxiliary.y, self.validation.y])
        others_x, others_y = self.test.x, self.test.y
        if self.test_is_separate:
            taken = min(len(members), len(outside_x) // 3)
            others_x, outside_x = outside_x[:taken], outside_x[taken:]
            others_y, outside_y = outside_y[:taken], outside_y[taken:]
        first = torch.arange(count := min(len(members), len(others_x)))
        x, y = torch.cat([members.x[first], others_x[first]]), torch.cat([members.y[first], others_y[first]])
        return Candidates(x, y, torch.arange(len(x)) < count, outside_x, outside_y)


@dataclass(frozen=True)
class Candidates:
    """x, y: T records of which `member` (T,) says which were trained on. outside_x, outside_y: an attacker's own."""

    x: Tensor
    y: Tensor
    member: Tensor
    outside_x: Tensor
    outside_y: Tensor


def deal(
    pool: RawRecords,
    test_file: RawRecords | None,
    *,
    clients: Sequence[str],
    train_records: int | None,
    auxiliary_share: float,
    validation_share: float,
    test_share: float,
    test_records: int | None,
    source: Source,
    classes: int | None = None,
) -> Deal:
    """Deal the pool out: one public permutation, cut into consecutive slices.

    Shares are of the whole pool; what no share takes is for training, at most `train_records` of it. Test records come
    from `test_file` where there is one, else from the pool by `test_share`; at most `test_records` of them. The slices
    lie in the order test, validation, auxiliary, training, so none of the first three moves with the training set's
    size or the number of clients. Tables are standardized with the training part's mean and standard deviation.

    classes: how many there are, where the pool need not show it: it may lack some of them, or all labels. An auxiliary
    or validation share of 0 leaves that part empty.

    Disjoint means record numbers: whether a file holds one record twice is a separate question, not asked here.
    Raises DataError for too few records, fewer than two classes, labels out of range, files that do not match.
    """
    classes = _classes(pool, classes)
    names = list(clients)
    if not names or len(set(names)) != len(names):
        raise DataError(f"clients {names}: expected at least one name, and no name twice")
    sizes = [_size(share, len(pool)) for share in (test_share, validation_share, auxiliary_share)]
    if test_file is not None:
        test_file = with_labels_of(test_file, pool.class_names, pool.where)
        _check_alike(pool, test_file, classes)
        sizes[0] = 0
    left = len(pool) - sum(sizes)
    kept = left if train_records is None else min(left, train_records)
    set_aside = sizes[0] if test_file is None else len(test_file)
    kept_test = set_aside if test_records is None else min(set_aside, test_records)
    parts = {"test": kept_test}
    parts |= {"validation": sizes[1]} if validation_share else {}
    parts |= {"auxiliary": sizes[2]} if auxiliary_share else {}
    parts["training" if len(names) == 1 else f"training (each of {len(names)} clients)"] = kept // len(names)
    _check_enough(pool, parts)

    order = torch.randperm(len(pool), generator=source.generator("deal", "pool"))
    test, validation, auxiliary, train = torch.split(order, [*sizes, left])
    if test_file is not None:
        test = torch.randperm(len(test_file), generator=source.generator("deal", "test"))
    test, train = test[:kept_test], train[:kept]

    pool, test_pool = _standardized(pool, pool if test_file is None else test_file, train)
    by_client = dict(zip(names, train.tensor_split(len(names)), strict=True))
    return Deal(
        train=MappingProxyType({client: pool.take(indices) for client, indices in by_client.items()}),
        auxiliary=pool.take(auxiliary),
        validation=pool.take(validation),
        test=test_pool.take(test),
        train_indices=MappingProxyType(by_client),
        auxiliary_indices=auxiliary,
        validation_indices=validation,
        test_indices=test,
        test_is_separate=test_file is not None,
        classes=classes,
        record_shape=pool.record_shape,
        columns=Columns(pool.mean, pool.scale, pool.categories) if isinstance(pool, RawTable) else None,
        class_names=pool.class_names,
    )


def owners_part(
    x: Tensor, owner: int, owners: int, axis: int | None = None, parts: Sequence[int] | None = None
) -> Tensor:
    """What owner number `owner`, from 0, of `owners` holds of records (N, ...), where one file rehearses several.

    A run of the columns of a table (axis 1), of the rows of pictures (axis 2; 3 for their columns). parts: how many
    each owner has; by default the first have one more where they cannot all have as many. A category's one-hot columns
    may lie with two owners.

    Raises DataError where there is not one for each owner, or `parts` does not come to all of them.
    """
    axis = (2 if x.dim() == 4 else 1) if axis is None else axis
    if not 1 <= axis < x.dim():
        raise DataError(f"records of shape {tuple(x.shape[1:])}: no axis {axis}; expected 1 to {x.dim() - 1}")
    if not 0 <= owner < owners:
        raise DataError(f"owner {owner} of {owners}: no such owner; they count from 0")
    size = x.shape[axis]
    if size < owners:
        raise DataError(
            f"records of shape {tuple(x.shape[1:])}: {size} columns along axis {axis} for {owners} owners; "
            "expected at least one for each"
        )
    if parts is None:
        return x.tensor_split(owners, dim=axis)[owner].clone(memory_format=torch.contiguous_format)
    if sum(parts) != size or len(parts) != owners:
        raise DataError(f"owners' parts {list(parts)} come to {sum(parts)}; records have {size} along axis {axis}")
    return x.narrow(axis, sum(parts[:owner]), parts[owner]).clone(memory_format=torch.contiguous_format)


# Dealing: checks and scales.


def _size(share: float, total: int) -> int:
    if not 0 <= share < 1:
        raise DataError(f"a share of {share} of the data: expected a number from 0 up to, not including, 1")
    return math.floor(share * total + 0.5)


def _check_enough(pool: RawRecords, parts: Mapping[str, int]) -> None:
    if min(parts.values()) < MINIMUM_PART:
        asked = ", ".join(f"{max(size, 0)} {part}" for part, size in parts.items())
        raise DataError(
            f"{pool.where}: {len(pool)} records are too few for what is asked; it comes to {asked}, expected at least "
            f"{MINIMUM_PART} of each"
        )


def _classes(pool: RawRecords, known: int | None) -> int:
    seen, names = np.unique(pool.labels), pool.class_names
    if known is not None:
        if names is not None and len(names) != known:
            raise DataError(
                f"{pool.where}: it names {len(names)} classes; expected all {known}, also those without a record: "
                "a class has the number of its place among them"
            )
        _check_range(pool, known)
        return known
    if seen[0] == UNLABELED:
        raise DataError(f"{pool.where}: no labels; expected some, or to be told how many classes there are")
    classes = len(seen) if names is None else len(names)
    if classes < 2 or len(seen) < 2:
        raise DataError(f"{pool.where}: all labels are {seen[0]}; expected at least two classes")
    _check_range(pool, classes)
    return classes


def _check_range(raw: RawRecords, classes: int) -> None:
    outside = np.flatnonzero(raw.labels >= classes)
    if len(outside):
        raise DataError(
            f"{raw.where}: label {raw.labels[outside[0]]} of record {outside[0]} is out of range; "
            f"expected 0 to {classes - 1} for {classes} classes"
        )


def with_labels_of(file: RawRecords, names: tuple[str, ...] | None, where: str) -> RawRecords:
    """The file with its classes numbered as in `names`, those of `where`, if both name them: it may lack a class."""
    own = file.class_names
    if names is None or own is None or names == own:
        return file
    for name in own:
        if name not in names:
            raise DataError(f"{file.where}: class {name!r} is not one of {where}; {nearest(name, names)}")
    numbers = np.array([names.index(name) for name in own])
    return replace(file, labels=numbers[file.labels], class_names=names)


def _check_alike(pool: RawRecords, test_file: RawRecords, classes: int) -> None:
    if test_file.where == pool.where:
        raise DataError(f"{pool.where}: given as the test data and as the training data; expected two different sets")

    def form(raw: RawRecords) -> str:
        if isinstance(raw, RawTable):
            return f"tables of {raw.numeric.shape[1]} numeric and {raw.categorical.shape[1]} categorical columns"
        return f"pictures of (channels, height, width) {raw.record_shape}"

    if form(pool) != form(test_file):
        raise DataError(f"{test_file.where} holds {form(test_file)}; expected {form(pool)}, as in {pool.where}")
    _check_range(test_file, classes)


def _standardized(pool: RawRecords, test_pool: RawRecords, train: Tensor) -> tuple[RawRecords, RawRecords]:
    """Tables with the training part's scale, the codes of both files as categories; pictures as they are."""
    if not (isinstance(pool, RawTable) and isinstance(test_pool, RawTable)):
        return pool, test_pool
    numbers = pool.numeric[train.numpy()].astype(np.float64)
    spread = numbers.std(axis=0)
    # a constant column stays constant, at 0; its computed spread is rounding, such as 1e-17 for a column of 0.1
    scale = np.where(spread > 1e-9 * np.abs(numbers).max(axis=0), spread, 1.0)
    highest = np.maximum(pool.categorical.max(axis=0), test_pool.categorical.max(axis=0))
    categories = tuple(int(code) + 1 for code in highest)
    return (
        pool.fitted(numbers.mean(axis=0), scale, categories),
        test_pool.fitted(numbers.mean(axis=0), scale, categories),
    )
