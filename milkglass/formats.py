"""Read a data set from where it lies: an embedded one, a file, a folder, the hub.

Legend: n records taken, H height, W width, C channels.
"""

from __future__ import annotations

import difflib
import io
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from milkglass.errors import DataError, MissingExtraError, first_line, nearest
from milkglass.records import (
    UNLABELED,
    Array,
    RawPictures,
    RawRecords,
    raw_attribute,
    raw_ids,
    raw_labels,
    raw_pictures,
    raw_table,
)

EMBEDDED: Final = ("digits",)
_PICTURE_SUFFIXES: Final = (".png", ".jpg", ".jpeg")
_NPZ_ARRAYS: Final = ("images", "features", "numeric", "categorical", "labels", "numeric_names", "categorical_names")
_LABEL_COLUMNS: Final = ("label", "labels", "fine_label")
# What numpy and zipfile raise on a truncated or forged file.
_DAMAGE: Final = (OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


@final
@dataclass(frozen=True)
class _Asked:
    """The columns to keep beside the records, by name."""

    sensitive: tuple[str, ...]
    ids: str | None
    may_lack_labels: bool


def load(
    *,
    name: str | None = None,
    path: Path | None = None,
    hub: str | None = None,
    split: str = "train",
    sensitive: Sequence[str] = (),
    ids: str | None = None,
    may_lack_labels: bool = False,
) -> RawRecords:
    """Read a data set from exactly one source.

    name: an embedded one (`digits`). path: a `.npz`, a `.parquet` file, a folder of them, or a folder with a subfolder
    of PNG or JPEG pictures per class. hub: "owner/name" on the Hugging Face hub; nothing else here touches the network.
    split: the part to take from the hub, or from a parquet folder whose files are named `SPLIT-*.parquet`.
    sensitive: names of integer columns to keep beside the records: an array of a `.npz` with a value per record, one of
    its `categorical_names`, or a column of a parquet file. A column that is an input stays one.
    ids: the name of the records' ids, integers or text: an array of a `.npz`, or a column of a parquet file. No input.
    may_lack_labels: a file without them is read as well; folders of pictures always have some.

    Raises DataError; MissingExtraError where parquet or the hub needs `milkglass[data]`.
    """
    given = [key for key, value in (("name", name), ("path", path), ("hub", hub)) if value is not None]
    if len(given) != 1:
        raise DataError(f"data: {' and '.join(given) or 'nothing'} given; expected exactly one of name, path, hub")
    asked = _Asked(tuple(sensitive), ids, may_lack_labels)
    if name is not None:
        return _without_columns(_embedded(name), asked)
    if hub is not None:
        return _from_hub(hub, split, asked)
    assert path is not None
    if path.is_dir():
        files = sorted(path.glob("*.parquet"))
        if files:
            return _from_parquet_folder(path, files, split, asked)
        return _without_columns(_from_image_folder(path), asked)
    if not path.exists():
        raise DataError(_missing(path))
    if path.suffix.lower() == ".npz":
        return _from_npz(path, asked)
    if path.suffix.lower() == ".parquet":
        return _from_parquet([path], str(path), asked)
    kind = "not a kind of file that is read here"
    if path.suffix.lower() == ".txt":
        kind = "a text is for parties.mode collaboration with network albert"
    raise DataError(f"{path}: {kind}; expected .npz, .parquet, or a folder")


def _embedded(name: str) -> RawRecords:
    if name not in EMBEDDED:
        raise DataError(f"data set {name!r} is not embedded; {nearest(name, EMBEDDED)}")
    from sklearn.datasets import load_digits

    digits = load_digits()
    return raw_pictures((digits.images / 16).astype(np.float32), raw_labels(digits.target, name), name)


def _check_known(name: str, what: str, known: Collection[str], where: str) -> None:
    if name not in known:
        rest = nearest(name, known) if known else "its records have no column that could be one"
        raise DataError(f"{where}: no {what} {name!r}; {rest}")


def _without_columns(raw: RawRecords, asked: _Asked) -> RawRecords:
    """These records, which have no columns to ask for."""
    if asked.ids is not None:
        _check_known(asked.ids, "id column", (), raw.where)
    return _with_columns(raw, asked, {}, None)


def _with_columns(raw: RawRecords, asked: _Asked, columns: Mapping[str, Array], ids: Array | None) -> RawRecords:
    """The same records with their ids, and with those of the `columns`, by name, that are sensitive."""
    columns = {name: values for name, values in columns.items() if name != asked.ids}
    for name in asked.sensitive:
        _check_known(name, "sensitive column", columns, raw.where)
    attributes = {name: raw_attribute(name, columns[name], raw.labels, raw.where) for name in asked.sensitive}
    return replace(raw, attributes=attributes, ids=ids)


def _from_npz(path: Path, asked: _Asked) -> RawRecords:
    where = str(path)
    arrays = _npz_arrays(path)
    if "labels" not in arrays and not asked.may_lack_labels:
        raise DataError(f"{where}: no array `labels`; {nearest('labels', arrays)}")
    records = next((arrays[key] for key in _NPZ_ARRAYS[:3] if key in arrays), np.zeros(1))
    labels = raw_labels(arrays.get("labels", np.zeros(records.shape[:1], np.int64)), where)
    if "labels" not in arrays:
        labels = np.full_like(labels, UNLABELED)
    columns = _npz_columns(arrays, where) if asked.sensitive else {}
    ids = None
    if asked.ids is not None:
        _check_known(asked.ids, "id column", [name for name in arrays if name not in _NPZ_ARRAYS], where)
        ids = raw_ids(asked.ids, arrays[asked.ids], labels, where)
    if "images" in arrays:
        return _with_columns(raw_pictures(arrays["images"], labels, where), asked, columns, ids)
    key = "features" if "features" in arrays else "numeric"
    if key not in arrays:
        raise DataError(f"{where}: no array `images`, `features` or `numeric`; it holds: {', '.join(arrays)}")
    categorical = arrays.get("categorical") if key == "numeric" else None
    return _with_columns(raw_table(arrays[key], categorical, labels, where), asked, columns, ids)


def _npz_columns(arrays: Mapping[str, Array], where: str) -> dict[str, Array]:
    """What may be named sensitive: the categorical columns that have a name, and arrays of the user's own."""
    columns: dict[str, Array] = {}
    if "categorical_names" in arrays and "categorical" in arrays:
        names, codes = arrays["categorical_names"], arrays["categorical"]
        if names.shape != codes.shape[1:]:
            raise DataError(
                f"{where}: categorical_names of shape {names.shape} for categorical columns of shape {codes.shape}; "
                "expected a name for each column"
            )
        columns = {str(name): codes[:, index] for index, name in enumerate(names)}
    return columns | {name: values for name, values in arrays.items() if name not in _NPZ_ARRAYS}


def _npz_arrays(path: Path) -> dict[str, Array]:
    try:
        with path.open("rb") as stream:
            if not zipfile.is_zipfile(stream):
                raise ValueError("not an archive, or its end is missing")
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except _DAMAGE as error:
        if "Object arrays" in str(error):
            raise DataError(
                f"{path}: holds pickled Python objects, which are never loaded; expected plain arrays"
            ) from error
        raise DataError(f"{path}: cannot be read, truncated or not an .npz file ({first_line(error)})") from error


def _from_parquet_folder(folder: Path, files: Sequence[Path], split: str, asked: _Asked) -> RawRecords:
    of_split = [file for file in files if file.stem.split("-")[0] == split]
    if of_split:
        return _from_parquet(of_split, f"{folder} ({split})", asked)
    if split != "train":
        held = ", ".join(file.name for file in files[:5])
        raise DataError(f"{folder}: no file named {split}-*.parquet in it; it holds: {held}")
    return _from_parquet(files, str(folder), asked)


def _from_parquet(files: Sequence[Path], where: str, asked: _Asked) -> RawRecords:
    datasets = _datasets(where)
    import pyarrow
    import pyarrow.parquet

    try:
        tables = [pyarrow.parquet.read_table(file) for file in files]
        # Straight from the table: `datasets` would write a second copy into its cache.
        dataset = datasets.Dataset(pyarrow.concat_tables(tables))
        return _from_dataset(dataset, where, asked, may_name_files=False)
    except (OSError, ValueError, TypeError, KeyError, pyarrow.ArrowException) as error:
        raise DataError(f"{where}: cannot be read, truncated or not parquet ({first_line(error)})") from error


def _from_hub(hub: str, split: str, asked: _Asked) -> RawRecords:
    where = f"hub data set {hub!r}, split {split!r}"
    datasets = _datasets(where)
    try:
        return _from_dataset(datasets.load_dataset(hub, split=split), where, asked, may_name_files=True)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{where}: cannot be loaded ({first_line(error)})") from error


def _from_dataset(dataset: Any, where: str, asked: _Asked, *, may_name_files: bool) -> RawRecords:
    """A `datasets.Dataset` with labels and a column of pictures, or with labels and numeric columns.

    may_name_files: pictures may be names of files, as `datasets` downloads them. A file from elsewhere may not: it
    could name any file of this machine.
    """
    import datasets

    features = dataset.features
    columns = list(features)
    named = [column for column in columns if isinstance(features[column], datasets.ClassLabel)]
    label = next((c for c in _LABEL_COLUMNS if c in columns), named[0] if len(named) == 1 else None)
    if label is None and not asked.may_lack_labels:
        raise DataError(
            f"{where}: no label column; expected one of {', '.join(_LABEL_COLUMNS)} among {', '.join(columns)}"
        )
    unlabeled = np.zeros(len(dataset), np.int64)
    labels = raw_labels(dataset.with_format("numpy")[label][:] if label and len(dataset) else unlabeled, where)
    labels = labels if label else np.full_like(labels, UNLABELED)
    classes = tuple(features[label].names) if label in named else None
    whole = [c for c in columns if c != label and getattr(features[c], "dtype", "").startswith(("int", "uint", "bool"))]
    extra = {c: np.asarray(dataset.with_format("numpy")[c][:]) for c in whole} if asked.sensitive else {}
    ids = None if asked.ids is None else _dataset_ids(dataset, asked.ids, label or "", labels, where)
    pictures = [c for c in columns if isinstance(features[c], datasets.Image) or _holds_bytes(features[c])]
    if len(pictures) > 1:
        raise DataError(f"{where}: columns {', '.join(pictures)} all hold pictures; expected one")
    if pictures:
        column = dataset.cast_column(pictures[0], datasets.Image(decode=False)).select_columns(pictures)

        def fetch(indices: list[int]) -> list[tuple[str, bytes | str]]:
            called = [f"{where}: record {index}" for index in indices]
            items = column[indices][pictures[0]]
            return [(name, _stored(item, name, may_name_files)) for name, item in zip(called, items, strict=True)]

        return _with_columns(_encoded(fetch, labels, where, classes), asked, extra, ids)
    rest = [column for column in columns if column not in (label, asked.ids)]
    return _with_columns(_dataset_table(dataset, rest, named, labels, where, classes), asked, extra, ids)


def _dataset_ids(dataset: Any, ids: str, label: str, labels: Array, where: str) -> Array:
    import datasets

    def may_be(feature: Any) -> bool:
        kind = getattr(feature, "dtype", "")
        return kind.startswith(("int", "uint", "string", "large_string")) and not isinstance(
            feature, datasets.ClassLabel
        )

    others = {column: feature for column, feature in dataset.features.items() if column != label}
    if ids in others and not may_be(others[ids]):
        raise DataError(f"{where}: id column {ids!r} is {others[ids]}; expected integers or text")
    _check_known(ids, "id column", [column for column, feature in others.items() if may_be(feature)], where)
    column = dataset.with_format("arrow")[ids][:]
    if column.null_count:
        raise DataError(f"{where}: id column {ids!r} lacks {column.null_count:,} ids; expected one for each record")
    text = not others[ids].dtype.startswith(("int", "uint"))
    return raw_ids(ids, np.array(column.to_pylist(), str) if text else column.to_numpy(), labels, where)


def _dataset_table(
    dataset: Any, rest: Sequence[str], named: Sequence[str], labels: Array, where: str, classes: tuple[str, ...] | None
) -> RawRecords:
    """The columns `rest`: those that are `named` hold categories, all others numbers."""
    for column in rest:
        feature = dataset.features[column]
        if not getattr(feature, "dtype", "").startswith(("int", "uint", "float", "bool")):
            raise DataError(f"{where}: column {column!r} is {feature}; expected a picture or numbers")
    frame = dataset.to_pandas()
    numeric = frame[[column for column in rest if column not in named]].to_numpy(dtype=np.float64)
    categorical = frame[[column for column in rest if column in named]].to_numpy(dtype=np.int64)
    return replace(raw_table(numeric, categorical, labels, where), class_names=classes)


def _stored(item: Any, called: str, may_name_files: bool) -> bytes | str:
    if item and item["bytes"] is not None:
        return bytes(item["bytes"])
    if item and item["path"] is not None and may_name_files:
        return str(item["path"])
    raise DataError(f"{called}: holds no picture; expected the bytes of a PNG or JPEG")


def _from_image_folder(folder: Path) -> RawRecords:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = sorted(file for file in (folder / name).iterdir() if file.suffix.lower() in _PICTURE_SUFFIXES)
        if not found:
            raise DataError(f"{folder / name}: no PNG or JPEG in it; expected the pictures of class {name!r}")
        files += found
        labels += [label] * len(found)
    if not files:
        raise DataError(
            f"{folder}: no .parquet file and no subfolder in it; expected a subfolder of pictures per class"
        )
    _check_sizes(files)

    def fetch(indices: list[int]) -> list[tuple[str, bytes | str]]:
        return [(str(files[index]), str(files[index])) for index in indices]

    return _encoded(fetch, np.array(labels), str(folder), tuple(names))


def _check_sizes(files: Sequence[Path]) -> None:
    """Every picture's header tells the size of the first one: the odd file shows before training, taken or not."""
    from PIL import Image

    first = None
    for file in files:
        try:
            with Image.open(file) as image:
                size = image.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(_unreadable(str(file), error)) from error
        first = first or size
        if size != first:
            raise DataError(_odd_size(str(file), size, first))


def _encoded(
    fetch: Callable[[list[int]], list[tuple[str, bytes | str]]],
    labels: Array,
    where: str,
    classes: tuple[str, ...] | None,
) -> RawPictures:
    """Pictures as PNG or JPEG, decoded only when taken; the first one sets size and color.

    fetch: record numbers -> for each, what to call it in an error, and its bytes or its file's name.
    """
    ((called, picture),) = fetch([0])
    shape = _decode(picture, called, None).shape

    def read(indices: Array) -> Array:
        if not len(indices):
            return np.zeros((0, *shape), np.uint8)
        return np.stack([_decode(picture, called, shape) for called, picture in fetch(indices.tolist())])

    return RawPictures(where, labels, classes, read, shape)


def _decode(picture: bytes | str, called: str, shape: tuple[int, ...] | None) -> Array:
    """Pixels (H, W, C) uint8: C is 1 where the first picture is grey, else 3. Nothing is resized or cropped."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            if image.mode not in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"):
                raise DataError(f"{called}: a picture of mode {image.mode}; expected 8 bits a channel")
            grey = image.mode in ("1", "L", "LA")
            if shape is not None and shape[2] == 1 and not grey:
                raise DataError(f"{called}: a color picture, where the first one is grey; expected all of one kind")
            pixels = np.asarray(image.convert("L" if grey and (shape is None or shape[2] == 1) else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(_unreadable(called, error)) from error
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if shape is not None and pixels.shape != shape:
        raise DataError(_odd_size(called, pixels.shape[1::-1], shape[1::-1]))
    return pixels


def _unreadable(called: str, error: BaseException) -> str:
    return f"{called}: cannot be read as a PNG or JPEG ({first_line(error)})"


def _odd_size(called: str, size: Sequence[int], first: Sequence[int]) -> str:
    return f"{called}: {size[0]} x {size[1]} pixels; expected {first[0]} x {first[1]}, as in the first picture"


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path}: no such file, and no folder {path.parent}"
    close = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1, cutoff=0.5)
    return f"{path}: no such file" + (f"; did you mean {close[0]!r}?" if close else f" in {path.parent}")


def _holds_bytes(feature: Any) -> bool:
    """A struct with the bytes of a picture, as the Hugging Face hub stores it, also where the file does not say so."""
    return isinstance(feature, dict) and set(feature) == {"bytes", "path"}


def _datasets(where: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError(where, "data") from None
    return datasets
