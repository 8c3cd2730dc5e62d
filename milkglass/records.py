"""Records for a network, and the raw records of a file that they are converted from: here is what is refused.

A file is kept as it is (bytes of pictures, 8-bit pixels); only the records that are taken become float32.

Legend: N records, n of them taken, B batch, C channels, H height, W width, F columns, G categorical columns, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from milkglass.errors import DataError

Array = NDArray[Any]
_MOST_CATEGORIES: Final = 1000
UNLABELED: Final = -1
"""The label of a record that has none."""


@final
@dataclass(frozen=True)
class Records:
    """Records ready for a network.

    x: pictures (N, C, H, W) float32 in [0, 1], or a table (N, F) float32 in standardized columns. y: (N,) int64, from 0
    to K - 1. attributes: the sensitive columns by name, (N,) int64 codes from 0; never an input by themselves.
    """

    x: Tensor
    y: Tensor
    attributes: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, values in (("labels", self.y), *self.attributes.items()):
            if len(self.x) != len(values):
                raise DataError(
                    f"{len(self.x)} records and {len(values)} {what}; expected as many of one as of the other"
                )

    def __len__(self) -> int:
        return len(self.y)

    def take(self, indices: Tensor) -> Records:
        """The records of these numbers (n,), in this order."""
        attributes = {name: values[indices] for name, values in self.attributes.items()}
        return Records(self.x[indices], self.y[indices], attributes)


@final
@dataclass(frozen=True)
class Columns:
    """How a table's columns become a network's: (value - mean) / scale of the numbers (F,), then categories one-hot.

    categories: how many codes each categorical column has.
    """

    mean: Array
    scale: Array
    categories: tuple[int, ...]


@dataclass(frozen=True)
class RawRecords(ABC):
    """A whole data set as its file holds it. `where` names it in errors; labels (N,) int64, none negative, or all
    UNLABELED where the file holds none and need not.

    class_names: the classes' names, in the order of the labels; None where the file names none. attributes: the
    sensitive columns by name, (N,) int64 codes from 0. ids: (N,) integers or text, no two alike; None where none were
    asked for, and then a record is known by its number.
    """

    where: str
    labels: Array
    class_names: tuple[str, ...] | None
    attributes: Mapping[str, Array] = field(default_factory=dict, kw_only=True)
    ids: Array | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    @abstractmethod
    def record_shape(self) -> tuple[int, ...]:
        """The shape of one converted record: (C, H, W) or (F,)."""

    @abstractmethod
    def rows(self, indices: Array) -> Tensor:
        """The records of these numbers (n,), converted: (n, C, H, W) or (n, F) float32."""

    def take(self, indices: Tensor) -> Records:
        """Convert the records of these numbers (n,), and no other."""
        chosen = indices.numpy()
        attributes = {name: torch.from_numpy(values[chosen]) for name, values in self.attributes.items()}
        return Records(self.rows(chosen), torch.from_numpy(self.labels[chosen]), attributes)

    def in_order(self, rows: Array) -> RawRecords:
        """The records of these numbers (n,), in this order, still unconverted; all that is kept beside them as well."""
        rows = np.arange(len(self))[rows]  # a copy, and every number checked: pictures are read only later
        return replace(
            self._contents_in_order(rows),
            labels=self.labels[rows],
            attributes={name: values[rows] for name, values in self.attributes.items()},
            ids=None if self.ids is None else self.ids[rows],
        )

    @abstractmethod
    def _contents_in_order(self, rows: Array) -> RawRecords:
        """The same with what its kind alone holds, columns or pictures, in this order."""


@final
@dataclass(frozen=True)
class RawPictures(RawRecords):
    """Pictures of shape (H, W, C). read: record numbers (n,) -> pixels (n, H, W, C), uint8 or float in [0, 1]."""

    read: Callable[[Array], Array]
    shape: tuple[int, ...]

    @property
    def record_shape(self) -> tuple[int, ...]:
        height, width, channels = self.shape
        return (channels, height, width)

    def rows(self, indices: Array) -> Tensor:
        pixels = self.read(indices)
        x_BHWC = torch.from_numpy(pixels.astype(np.float32))
        # `contiguous()` keeps a grey picture's channels-last strides, and with them other kernels and other last bits
        x_BCHW = x_BHWC.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
        return x_BCHW.div_(255) if pixels.dtype == np.uint8 else x_BCHW

    def _contents_in_order(self, rows: Array) -> RawPictures:
        return replace(self, read=lambda indices: self.read(rows[indices]))


@final
@dataclass(frozen=True)
class RawTable(RawRecords):
    """A table: numeric (N, F), categorical (N, G) codes from 0. `fitted` sets the columns' scale and one-hot widths."""

    numeric: Array
    categorical: Array
    mean: Array = field(default_factory=lambda: np.zeros(1))
    scale: Array = field(default_factory=lambda: np.ones(1))
    categories: tuple[int, ...] = ()

    @property
    def record_shape(self) -> tuple[int, ...]:
        return (self.numeric.shape[1] + sum(self.categories),)

    def rows(self, indices: Array) -> Tensor:
        scaled = (self.numeric[indices].astype(np.float64) - self.mean) / self.scale
        codes = torch.from_numpy(self.categorical[indices].astype(np.int64))
        hot = [torch.nn.functional.one_hot(codes[:, g], size) for g, size in enumerate(self.categories)]
        return torch.cat([torch.from_numpy(scaled), *hot], dim=1).to(torch.float32)

    def fitted(self, mean: Array, scale: Array, categories: tuple[int, ...]) -> RawTable:
        """The same table with columns (value - mean) / scale, and categories of these sizes one-hot after them."""
        return replace(self, mean=mean, scale=scale, categories=categories)

    def _contents_in_order(self, rows: Array) -> RawTable:
        return replace(self, numeric=self.numeric[rows], categorical=self.categorical[rows])


def raw_pictures(images: Array, labels: Array, where: str) -> RawPictures:
    """Pictures from (N, H, W) or (N, H, W, C), uint8 or float in [0, 1]. Raises DataError for anything else."""
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or 0 in images.shape or images.shape[3] > 4:
        raise DataError(
            f"{where}: images of shape {images.shape}; expected (records, height, width) with 1 to 4 channels last"
        )
    _check_lengths(images, labels, "images", where)
    if images.dtype != np.uint8:
        if images.dtype.kind != "f":
            raise DataError(f"{where}: images are {images.dtype}; expected uint8, or float in [0, 1]")
        _check_finite(images, "images", where)
        if images.min() < 0 or images.max() > 1:
            raise DataError(
                f"{where}: images reach from {images.min():g} to {images.max():g}; expected [0, 1], or uint8"
            )
    shape = (images.shape[1], images.shape[2], images.shape[3])
    return RawPictures(where, labels, None, lambda indices: images[indices], shape)


def raw_table(numeric: Array, categorical: Array | None, labels: Array, where: str) -> RawTable:
    """A table from numbers (N, F) and category codes (N, G) from 0. Raises DataError for anything else."""
    categorical = np.zeros((len(labels), 0), np.int64) if categorical is None else categorical
    for name, array, kinds in (("numeric", numeric, "uifb"), ("categorical", categorical, "ui")):
        if array.ndim != 2 or array.dtype.kind not in kinds:
            raise DataError(
                f"{where}: {name} columns are {array.dtype} of shape {array.shape}; expected (records, columns) "
                f"of {'numbers' if 'f' in kinds else 'integer codes'}"
            )
        _check_lengths(array, labels, f"{name} columns", where)
    if numeric.shape[1] + categorical.shape[1] == 0:
        raise DataError(f"{where}: no column beside the labels; expected at least one")
    _check_finite(numeric, "numeric columns", where)
    if categorical.size and (categorical.min() < 0 or categorical.max() >= _MOST_CATEGORIES):
        raise DataError(
            f"{where}: category codes reach from {categorical.min()} to {categorical.max()}; "
            f"expected 0 to {_MOST_CATEGORIES - 1}"
        )
    return RawTable(where, labels, None, numeric, categorical)


def raw_labels(values: Array, where: str) -> Array:
    """Labels (N,) int64 from integers of any width, none negative. Raises DataError for anything else."""
    if values.ndim != 1 or len(values) == 0:
        raise DataError(f"{where}: labels of shape {values.shape}; expected one for each record, (records,)")
    if values.dtype.kind not in "ui":
        raise DataError(f"{where}: labels are {values.dtype}; expected integers from 0")
    labels = values.astype(np.int64)
    negative = np.flatnonzero(labels < 0)
    if len(negative):
        raise DataError(f"{where}: label {labels[negative[0]]} of record {negative[0]}; expected integers from 0")
    return labels


def raw_attribute(name: str, values: Array, labels: Array, where: str) -> Array:
    """A sensitive column (N,) int64 from integer codes from 0, at least two different ones. Raises DataError else."""
    what = f"sensitive column {name!r}"
    if values.ndim != 1 or values.dtype.kind not in "uib":
        raise DataError(
            f"{where}: {what} is {values.dtype} of shape {values.shape}; expected an integer for each record"
        )
    _check_lengths(values, labels, f"values of {what}", where)
    if values.min() < 0 or values.max() >= _MOST_CATEGORIES:
        raise DataError(
            f"{where}: {what} reaches from {values.min()} to {values.max()}; expected 0 to {_MOST_CATEGORIES - 1}"
        )
    if values.min() == values.max():
        raise DataError(f"{where}: {what} is {values[0]} in every record; expected at least two values")
    return values.astype(np.int64)


def raw_ids(name: str, values: Array, labels: Array, where: str) -> Array:
    """The records' ids (N,), integers or text as they come, no two alike. Raises DataError for anything else."""
    what = f"id column {name!r}"
    if values.ndim != 1 or values.dtype.kind not in "uiU":
        raise DataError(
            f"{where}: {what} is {values.dtype} of shape {values.shape}; expected an integer or a text for each record"
        )
    _check_lengths(values, labels, f"values of {what}", where)
    if values.dtype.kind == "U":
        try:
            "".join(values.tolist()).encode()
        except ValueError:
            raise DataError(f"{where}: {what} holds what is not Unicode text; expected integers or text") from None
    again = np.ones(len(values), bool)
    again[np.unique(values, return_index=True)[1]] = False
    if again.any():
        first = int(again.argmax())
        raise DataError(
            f"{where}: {what} gives {again.sum():,} of {len(values):,} records the id of an earlier one, first "
            f"{values[first].item()!r} in record {first}; expected another id for each record"
        )
    return values


def _check_lengths(values: Array, labels: Array, what: str, where: str) -> None:
    if len(values) != len(labels):
        raise DataError(
            f"{where}: {len(values)} {what} and {len(labels)} labels; expected as many of one as of the other"
        )


def _check_finite(values: Array, what: str, where: str) -> None:
    if not np.isfinite(values).all():
        record = np.argwhere(~np.isfinite(values))[0][0]
        raise DataError(f"{where}: {what} hold NaN or infinity, first in record {record}; expected finite numbers")
