"""Loading, dealing, and every kind of bad data file: one clear line.

Legend: N records, C channels, H height, W width, F columns.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.preprocessing import StandardScaler

from milkglass.data import MINIMUM_PART, Deal, RawRecords, Records, deal, load, owners_part
from milkglass.errors import DataError, MissingExtraError
from milkglass.randomness import public_source
from milkglass.records import UNLABELED, RawPictures, RawTable

Array = NDArray[Any]
SHARES: dict[str, Any] = {"auxiliary_share": 0.2, "validation_share": 0.1, "test_share": 0.2}


def pictures(count: int, size: int = 4, channels: int = 1) -> Array:
    """Pictures (N, H, W, C) uint8 whose first pixel counts the records: no two are equal."""
    x_NHWC = np.random.default_rng(0).integers(0, 256, (count, size, size, channels), dtype=np.uint8)
    x_NHWC[:, 0, 0, 0] = np.arange(count) % 256
    x_NHWC[:, 0, 1, 0] = np.arange(count) // 256
    return x_NHWC


def some_labels(count: int) -> Array:
    return np.arange(count) % 3


def npz(path: Path, **arrays: Array) -> Path:
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    return path


def png(pixels: Array) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def class_folder(root: Path, x_NHWC: Array, labels: Array) -> Path:
    for index, (pixels, label) in enumerate(zip(x_NHWC, labels, strict=True)):
        folder = root / f"class-{label}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:04}.png").write_bytes(png(pixels.squeeze()))
    return root


def parquet(path: Path, x_NHWC: Array, labels: Array) -> Path:
    rows = [{"bytes": png(pixels.squeeze()), "path": None} for pixels in x_NHWC]
    pyarrow.parquet.write_table(pyarrow.table({"image": rows, "label": labels}), path)
    return path


def dealt(pool: RawRecords, test_file: RawRecords | None = None, seed: int = 0, **changes: Any) -> Deal:
    settings: dict[str, Any] = {"clients": ["a"], "train_records": None, "test_records": None, **SHARES, **changes}
    return deal(pool, test_file, source=public_source(seed), **settings)


def parts(result: Deal) -> dict[str, tuple[Records, torch.Tensor]]:
    """Every set with its record numbers."""
    return {
        **{f"train {name}": (records, result.train_indices[name]) for name, records in result.train.items()},
        "auxiliary": (result.auxiliary, result.auxiliary_indices),
        "validation": (result.validation, result.validation_indices),
        "test": (result.test, result.test_indices),
    }


# Reading: whatever the source, the same pictures come out.


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("form", ["npz", "npz float", "parquet", "parquet folder", "image folder", "hub"])
def test_every_source_gives_the_pixels_that_were_stored(
    form: str, channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_NHWC, labels = pictures(12, 4, channels), some_labels(12)
    if form == "hub":
        stored = datasets.Dataset.from_dict(
            {"img": [Image.fromarray(x.squeeze()) for x in x_NHWC], "label": labels.tolist()},
            features=datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])}),
        )
        asked: list[tuple[str, str]] = []

        def load_dataset(name: str, *, split: str) -> datasets.Dataset:
            asked.append((name, split))
            return stored

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        raw = load(hub="owner/name", split="test")
        assert asked == [("owner/name", "test")]
    elif form == "npz":
        raw = load(path=npz(tmp_path / "x.npz", images=x_NHWC, labels=labels))
    elif form == "npz float":
        raw = load(path=npz(tmp_path / "x.npz", images=x_NHWC.astype(">f8") / 255, labels=labels.astype(np.uint8)))
    elif form == "image folder":
        raw = load(path=class_folder(tmp_path, x_NHWC, labels))
        order = np.argsort(labels, kind="stable")
        x_NHWC, labels = x_NHWC[order], labels[order]
    else:
        parquet(tmp_path / "a.parquet", x_NHWC[:7], labels[:7])
        parquet(tmp_path / "b.parquet", x_NHWC[7:], labels[7:])
        raw = load(path=tmp_path if form == "parquet folder" else parquet(tmp_path / "c.parquet", x_NHWC, labels))
    chosen = torch.tensor([11, 0, 5, 5])
    records = raw.take(chosen)
    assert len(raw) == 12
    assert raw.record_shape == (channels, 4, 4)
    assert records.x.dtype == torch.float32
    torch.testing.assert_close(
        records.x, torch.from_numpy(x_NHWC[chosen].transpose(0, 3, 1, 2).astype(np.float32) / 255)
    )
    assert records.y.tolist() == labels[chosen].tolist()


def test_the_embedded_digits_are_scikit_learns() -> None:
    raw = load(name="digits")
    records = raw.take(torch.arange(len(raw)))
    assert records.x.shape == (1797, 1, 8, 8)
    assert records.y.tolist() == load_digits().target.tolist()
    assert torch.equal(records.x[:, 0] * 16, torch.from_numpy(load_digits().images).float())


def test_grey_pictures_without_a_channel_axis(tmp_path: Path) -> None:
    assert load(path=npz(tmp_path / "x.npz", images=pictures(9)[..., 0], labels=some_labels(9))).record_shape == (
        1,
        4,
        4,
    )


def test_classes_go_by_their_names_where_a_test_folder_lacks_one(tmp_path: Path) -> None:
    x, labels = pictures(120), some_labels(120)
    train = load(path=class_folder(tmp_path / "train", x, labels))
    lacking = load(path=class_folder(tmp_path / "test", x[labels != 1], labels[labels != 1]))
    assert set(lacking.labels) == {0, 1}  # its own numbers: class-0, class-2
    found = dealt(train, lacking, test_records=None)
    assert set(found.test.y.tolist()) == {0, 2}
    strange = load(path=class_folder(tmp_path / "strange", x, labels + 1))
    with pytest.raises(DataError, match="class 'class-3' is not one of"):
        dealt(train, strange)


def test_a_parquet_folder_is_read_by_split(tmp_path: Path) -> None:
    parquet(tmp_path / "train-00000-of-00001.parquet", pictures(9), some_labels(9))
    parquet(tmp_path / "test-00000-of-00001.parquet", pictures(6), some_labels(6))
    assert (len(load(path=tmp_path)), len(load(path=tmp_path, split="test"))) == (9, 6)
    with pytest.raises(DataError, match=r"no file named valid-\*\.parquet .* holds: test-0"):
        load(path=tmp_path, split="valid")


def test_only_dealt_pictures_are_decoded() -> None:
    decoded: list[int] = []

    def read(indices: Array) -> Array:
        decoded.extend(indices.tolist())
        return np.zeros((len(indices), 2, 2, 1), np.uint8)

    raw = RawPictures("many", some_labels(1_000_000), ("a", "b", "c"), read, (2, 2, 1))
    shares: dict[str, Any] = {"auxiliary_share": 1e-4, "validation_share": 1e-4, "test_share": 1e-4}
    assert len(dealt(raw, train_records=50, **shares).train["a"]) == 50
    assert len(decoded) == 350


def test_what_needs_an_extra_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    sources: list[dict[str, Any]] = [
        {"hub": "owner/name"},
        {"path": parquet(tmp_path / "a.parquet", pictures(3), some_labels(3))},
    ]
    for source in sources:
        with pytest.raises(MissingExtraError, match=r"pip install 'milkglass\[data\]'"):
            load(**source)


# Tables.


def test_tables_are_standardized_with_the_training_part_alone(tmp_path: Path) -> None:
    numeric = np.random.default_rng(1).normal([5, -3], [1e6, 0.1], (200, 2)).astype(np.float32)
    numeric = np.column_stack([numeric, np.full(200, 7.0)])
    categorical = np.random.default_rng(2).integers(0, [4, 2], (200, 2)).astype(np.int16)
    raw = load(path=npz(tmp_path / "x.npz", numeric=numeric, categorical=categorical, labels=some_labels(200)))
    test_categorical = np.column_stack([np.full(20, 5), np.zeros(20, int)])  # code 5 is in the test file only
    test = load(
        path=npz(tmp_path / "t.npz", numeric=numeric[:20], categorical=test_categorical, labels=some_labels(20))
    )
    result = dealt(raw, test, clients=["a", "b"], train_records=80)
    assert result.record_shape == (3 + 6 + 2,)
    train = torch.cat(list(result.train_indices.values())).numpy()
    assert len(train) == 80
    scaler = StandardScaler().fit(numeric[train])
    for pool, codes, (records, indices) in [
        (numeric, categorical, parts(result)["train b"]),
        (numeric, categorical, parts(result)["validation"]),
        (numeric[:20], test_categorical, parts(result)["test"]),
    ]:
        hot = np.concatenate([np.eye(6)[codes[indices, 0]], np.eye(2)[codes[indices, 1]]], axis=1)
        expected = np.concatenate([scaler.transform(pool[indices]), hot], axis=1)
        torch.testing.assert_close(records.x, torch.from_numpy(expected.astype(np.float32)), rtol=1e-5, atol=1e-5)
    assert (records.x[:, 2] == 0).all(), "a constant column stays finite"


@pytest.mark.parametrize("value", [0.1, 1e6 / 3, -1e-12])
def test_a_column_that_is_constant_but_for_rounding_counts_as_constant(value: float, tmp_path: Path) -> None:
    """A test record that differs from it by its own size is at a distance of that, not of 1e16."""
    numeric = np.column_stack([np.full(1000, value), np.arange(1000.0), 1e6 + np.arange(1000) % 2])
    labels = some_labels(1000)
    raw = load(path=npz(tmp_path / "x.npz", numeric=numeric, labels=labels))
    test = load(path=npz(tmp_path / "t.npz", numeric=numeric * [2, 1, 1], labels=labels))
    result = dealt(raw, test)
    assert result.train["a"].x[:, 0].abs().max() < 1e-9 * max(1, abs(value))
    assert result.test.x[:, 0] == pytest.approx(value, rel=1e-5)
    for column in (1, 2):  # a large mean does not make a column constant
        assert result.train["a"].x[:, column].std() == pytest.approx(1, rel=0.01)


def test_tables_of_bytes_and_of_parquet_columns(tmp_path: Path) -> None:
    features = np.random.default_rng(3).integers(0, 101, (90, 5), dtype=np.uint8)
    raw = load(path=npz(tmp_path / "x.npz", features=features, labels=some_labels(90)))
    columns = {f"column {f}": features[:, f] for f in range(5)} | {"label": some_labels(90)}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    same = load(path=tmp_path / "x.parquet")
    assert isinstance(raw, RawTable)
    assert torch.equal(dealt(raw).train["a"].x, dealt(same).train["a"].x)


# Sensitive columns.


def test_sensitive_columns_are_dealt_along_and_change_no_record(tmp_path: Path) -> None:
    """A named categorical column stays an input; an array of its own never is one. A digest tells them apart."""
    draw = np.random.default_rng(4)
    arrays: dict[str, Array] = {
        "numeric": draw.normal(size=(200, 2)),
        "categorical": draw.integers(0, [4, 2], (200, 2)).astype(np.int16),
        "categorical_names": np.array(["job", "sex"]),
        "labels": some_labels(200),
        "region": draw.integers(0, 5, 200).astype(np.uint8),
    }
    path = npz(tmp_path / "x.npz", **arrays)
    plain, named = dealt(load(path=path)), dealt(load(path=path, sensitive=["sex", "region"]), clients=["a", "b"])
    for name, (records, indices) in parts(named).items():
        assert records.attributes["sex"].tolist() == arrays["categorical"][indices, 1].tolist(), name
        assert records.attributes["region"].tolist() == arrays["region"][indices].tolist()
        assert {values.dtype for values in records.attributes.values()} == {torch.int64}
    chosen = named.test.take(torch.tensor([3, 1]))
    assert chosen.attributes["region"].tolist() == named.test.attributes["region"][[3, 1]].tolist()
    assert plain.record_shape == named.record_shape == (2 + 4 + 2,)
    assert torch.equal(plain.test.x, named.test.x)
    assert plain.test.attributes == {}


def test_a_sensitive_parquet_column(tmp_path: Path) -> None:
    columns = {"age": np.arange(90.0), "sex": np.arange(90) % 2, "label": some_labels(90)}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    table = load(path=tmp_path / "x.parquet", sensitive=["sex"])
    assert table.attributes["sex"].tolist() == columns["sex"].tolist()
    assert isinstance(table, RawTable)
    assert table.numeric.shape == (90, 2), "a column that is an input stays one"
    rows = [{"bytes": png(pixels.squeeze()), "path": None} for pixels in pictures(90)]
    pyarrow.parquet.write_table(pyarrow.table({"image": rows, **columns}), tmp_path / "p.parquet")
    shown = load(path=tmp_path / "p.parquet", sensitive=["sex"])
    assert shown.take(torch.tensor([5, 2])).attributes["sex"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("column", "name", "words"),
    [
        (np.arange(60) % 2, "sexx", "no sensitive column 'sexx'; did you mean 'sex'? known: sex"),
        (np.arange(60) % 2, "labels", "no sensitive column 'labels'; known: sex"),
        (np.zeros(60, int), "sex", "'sex' is 0 in every record; expected at least two values"),
        (np.arange(60) / 2, "sex", "'sex' is float64 of shape (60,); expected an integer for each record"),
        (np.zeros((60, 2), int), "sex", "'sex' is int64 of shape (60, 2); expected an integer for each record"),
        (np.arange(59) % 2, "sex", "59 values of sensitive column 'sex' and 60 labels"),
        (np.arange(60) - 1, "sex", "reaches from -1 to 58; expected 0 to 999"),
    ],
)
def test_bad_sensitive_columns(column: Array, name: str, words: str, tmp_path: Path) -> None:
    path = images(tmp_path, sex=column)
    load(path=path)  # what nobody names is not looked at
    with pytest.raises(DataError) as caught:
        load(path=path, sensitive=[name])
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_sources_without_columns_and_names_without_a_column(tmp_path: Path) -> None:
    sources: list[dict[str, Any]] = [
        {"name": "digits"},
        {"path": class_folder(tmp_path / "c", pictures(9), some_labels(9))},
    ]
    for source in sources:
        with pytest.raises(DataError, match="no sensitive column 'sex'; its records have no column that could be one"):
            load(**source, sensitive=["sex"])
    arrays: dict[str, Array] = {
        "numeric": np.ones((60, 1)),
        "categorical": np.ones((60, 2), int),
        "labels": some_labels(60),
    }
    path = npz(tmp_path / "x.npz", **arrays, categorical_names=np.array(["sex"]))
    with pytest.raises(DataError, match="expected a name for each column"):
        load(path=path, sensitive=["sex"])
    assert len(load(path=path)) == 60


# Ids.


def id_file(folder: Path, form: str, ids: Any, count: int = 60) -> dict[str, Any]:
    """A file of that form with a column `key`, as `load` is told of it."""
    labels, numbers = some_labels(count), np.arange(2.0 * count).reshape(count, 2)
    if form.startswith("npz"):
        inputs = {"features": numbers} if form == "npz table" else {"images": pictures(count)}
        return {"path": npz(folder / "x.npz", **inputs, labels=labels, key=np.array(ids))}
    rows = [{"bytes": png(pixels.squeeze()), "path": None} for pixels in pictures(count)]
    inputs_of_columns: dict[str, Any] = {"a": numbers[:, 0], "b": numbers[:, 1]}
    table = pyarrow.table(
        {"key": ids, **(inputs_of_columns if form == "parquet table" else {"image": rows}), "label": labels}
    )
    if form == "parquet folder":
        pyarrow.parquet.write_table(table[:20], folder / "a.parquet")
        pyarrow.parquet.write_table(table[20:], folder / "b.parquet")
        return {"path": folder}
    pyarrow.parquet.write_table(table, folder / "x.parquet")
    return {"path": folder / "x.parquet"}


ID_FORMS = ["npz table", "npz pictures", "parquet table", "parquet pictures", "parquet folder"]


@pytest.mark.parametrize("form", ID_FORMS)
@pytest.mark.parametrize("kind", ["integer", "large", "text"])
def test_ids_are_read_as_they_are_and_are_never_an_input(form: str, kind: str, tmp_path: Path) -> None:
    ids: Array = np.random.default_rng(5).permutation(60)
    if kind == "large":
        ids = ids.astype(np.uint64) + np.uint64(2**63)  # as float64, all of them would be one
    if kind == "text":
        ids = np.array([f"é {number}" for number in ids])
    raw = load(**id_file(tmp_path, form, ids), ids="key")
    assert raw.ids is not None
    assert raw.ids.tolist() == ids.tolist()
    assert raw.record_shape == ((2,) if "table" in form else (1, 4, 4))
    plain = load(**id_file(tmp_path, form, np.arange(60)))
    assert plain.ids is None
    if isinstance(raw, RawTable):
        assert raw.numeric.tolist() == np.arange(120.0).reshape(60, 2).tolist()
    else:
        assert torch.equal(raw.rows(np.arange(60)), plain.rows(np.arange(60)))


def test_ids_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    columns: dict[str, Any] = {"a": [0.5, 1.5], "key": ["y", "x"], "label": [0, 1]}
    stored = datasets.Dataset.from_dict(columns)
    monkeypatch.setattr(datasets, "load_dataset", lambda _, **__: stored)
    raw = load(hub="owner/name", ids="key")
    assert raw.ids is not None
    assert raw.ids.tolist() == ["y", "x"]


def test_an_id_column_is_not_a_sensitive_one(tmp_path: Path) -> None:
    columns = {"sex": np.arange(60) % 2, "key": np.arange(60), "label": some_labels(60)}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    both = load(path=tmp_path / "x.parquet", ids="key", sensitive=["sex"])
    assert (list(both.attributes), both.record_shape) == (["sex"], (1,))
    path = images(tmp_path, key=np.arange(60), sex=np.arange(60) % 2)
    for file in (path, tmp_path / "x.parquet"):
        with pytest.raises(DataError, match=r"no sensitive column 'key'; .*known: sex$"):
            load(path=file, ids="key", sensitive=["key"])


@pytest.mark.parametrize("form", ID_FORMS)
def test_an_id_that_comes_again_is_counted_and_the_first_is_named(form: str, tmp_path: Path) -> None:
    for ids, name in ((np.arange(60), "3"), (np.arange(60).astype(str), "'3'")):
        ids[[9, 40, 20]] = ids[[3, 3, 5]]
        with pytest.raises(DataError) as refused:
            load(**id_file(tmp_path, form, ids), ids="key")
        assert f"'key' gives 3 of 60 records the id of an earlier one, first {name} in record 9;" in str(refused.value)
        assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    ("form", "ids", "name", "words"),
    [
        ("npz table", np.arange(60), "keys", "no id column 'keys'; did you mean 'key'? known: key"),
        ("npz table", np.arange(60), "labels", "no id column 'labels'; known: key"),
        ("npz table", np.arange(60), "features", "no id column 'features'; known: key"),
        ("npz table", np.arange(60) / 2, "key", "'key' is float64 of shape (60,); expected an integer or a text"),
        ("npz table", np.arange(60)[:, None], "key", "'key' is int64 of shape (60, 1); expected"),
        ("npz table", np.arange(60).astype("S2"), "key", "'key' is |S2 of shape (60,); expected"),
        ("npz table", np.arange(59), "key", "59 values of id column 'key' and 60 labels"),
        ("npz table", np.arange(60).astype(object), "key", "pickled Python objects, which are never loaded"),
        ("npz table", [chr(0xD800 + n) for n in range(60)], "key", "'key' holds what is not Unicode text"),
        ("parquet table", np.arange(60), "keys", "no id column 'keys'; did you mean 'key'? known: key"),
        ("parquet table", np.arange(60).astype(str), "keys", "no id column 'keys'; did you mean 'key'? known: key"),
        ("parquet table", np.arange(60), "label", "no id column 'label'; known: key"),
        ("parquet table", np.arange(60), "a", "id column 'a' is Value('float64'); expected integers or text"),
        ("parquet pictures", np.arange(60), "image", "expected integers or text"),
        ("parquet table", [*range(57), None, None, 3], "key", "'key' lacks 2 ids; expected one for each record"),
        ("parquet table", ["x", *[None] * 59], "key", "'key' lacks 59 ids; expected one for each record"),
    ],
)
def test_bad_ids(form: str, ids: Any, name: str, words: str, tmp_path: Path) -> None:
    source = id_file(tmp_path, form, ids)
    with pytest.raises(DataError) as refused:
        load(**source, ids=name)
    assert words in str(refused.value)
    assert str(source["path"]) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_has_no_columns_has_no_ids(tmp_path: Path) -> None:
    sources: list[dict[str, Any]] = [
        {"name": "digits"},
        {"path": class_folder(tmp_path / "c", pictures(9), some_labels(9))},
    ]
    for source in sources:
        with pytest.raises(DataError, match="no id column 'key'; its records have no column that could be one"):
            load(**source, ids="key")


def test_a_table_of_ids_alone_has_no_input(tmp_path: Path) -> None:
    other_columns(tmp_path, {"key": [5, 6, 7], "label": [0, 1, 1]})
    with pytest.raises(DataError, match="no column beside the labels"):
        load(path=tmp_path / "x.parquet", ids="key")


@pytest.mark.parametrize("form", ID_FORMS)
def test_records_in_another_order_are_the_same_records(form: str, tmp_path: Path) -> None:
    raw = load(**id_file(tmp_path, form, np.arange(60) + 100), ids="key")
    raw = replace(raw, attributes={"sex": np.arange(60) // 7})
    if isinstance(raw, RawTable):
        raw = replace(raw, categorical=np.arange(60)[:, None]).fitted(np.ones(2), np.full(2, 3.0), (60,))
    rows = np.random.default_rng(6).permutation(60)[:50]
    # a second time, in the order that came out of the first
    for ordered, expected in ((raw.in_order(rows), rows), (raw.in_order(rows).in_order(rows[:0:-1] % 50), None)):
        numbers = rows[rows[:0:-1] % 50] if expected is None else expected
        assert (len(ordered), ordered.where, ordered.record_shape) == (len(numbers), raw.where, raw.record_shape)
        assert ordered.ids is not None
        assert ordered.ids.tolist() == (numbers + 100).tolist()
        chosen = torch.tensor([7, 0, 48])
        found, same = ordered.take(chosen), raw.take(torch.from_numpy(numbers)[chosen])
        assert torch.equal(found.x, same.x)
        assert torch.equal(found.y, same.y)
        assert torch.equal(found.attributes["sex"], same.attributes["sex"])


def test_an_order_is_checked_and_kept(tmp_path: Path) -> None:
    raw = load(path=images(tmp_path))
    rows = np.array([5, 3])
    ordered = raw.in_order(rows)
    rows[:] = 0  # the pictures are read later
    assert torch.equal(ordered.rows(np.array([0, 1])), raw.rows(np.array([5, 3])))
    assert ordered.ids is None
    with pytest.raises(IndexError):
        raw.in_order(np.array([60]))


def test_a_deal_of_ordered_files_is_the_same_for_both_owners(tmp_path: Path) -> None:
    """Each owner's file in its own order: once in the order of the ids, every dealt record is one of both."""
    order = np.random.default_rng(7).permutation(600)
    columns = np.random.default_rng(8).normal(size=(600, 4))
    one = npz(tmp_path / "a.npz", features=columns[:, :2], labels=some_labels(600), key=np.arange(600))
    two = npz(tmp_path / "b.npz", features=columns[order, 2:], labels=some_labels(600)[order], key=order.astype(str))
    whole = dealt(load(path=npz(tmp_path / "w.npz", features=columns, labels=some_labels(600))))
    halves = []
    for path in (one, two):
        raw = load(path=path, ids="key")
        assert raw.ids is not None
        halves.append(dealt(raw.in_order(np.argsort(raw.ids.astype(int)))))
    for name, (records, _) in parts(whole).items():
        left, right = (parts(half)[name][0] for half in halves)
        assert torch.equal(torch.cat([left.x, right.x], dim=1), records.x)
        assert torch.equal(left.y, right.y)


# Dealing.


@pytest.mark.parametrize("clients", [["a"], ["a", "b", "c"]])
@pytest.mark.parametrize("separate", [False, True])
def test_the_sets_are_disjoint_and_hold_the_records_of_their_numbers(
    clients: list[str], separate: bool, tmp_path: Path
) -> None:
    x_NHWC, labels = pictures(600), some_labels(600)
    raw = load(path=npz(tmp_path / "x.npz", images=x_NHWC, labels=labels))
    test = load(path=npz(tmp_path / "t.npz", images=255 - x_NHWC, labels=labels)) if separate else None
    result = dealt(raw, test, clients=clients)
    assert result.test_is_separate == separate
    assert result.classes == 3
    sets = parts(result)
    for name, (records, indices) in sets.items():
        pool = 255 - x_NHWC if separate and name == "test" else x_NHWC
        assert torch.equal(records.x, torch.from_numpy(pool[indices].transpose(0, 3, 1, 2).astype(np.float32) / 255))
        assert records.y.tolist() == labels[indices].tolist()
    numbers = torch.cat([indices for name, (_, indices) in sets.items() if not (separate and name == "test")])
    assert sorted(numbers.tolist()) == list(range(600)), "every record of the pool is in one set, and in one alone"
    # And by content: no two pictures of the pool are equal, so no set shows one that is in another.
    seen = [tuple(x.flatten().tolist()) for records, _ in sets.values() for x in records.x]
    assert len(set(seen)) == len(seen)
    assert [len(sets[name][0]) for name in ("auxiliary", "validation", "test")] == [120, 60, 600 if separate else 120]


def test_the_sets_follow_from_the_seed_and_not_from_the_clients_or_the_cap() -> None:
    raw = load(name="digits")
    one, again, other = dealt(raw), dealt(raw), dealt(raw, seed=1)
    many = dealt(raw, clients=["a", "b", "c"], train_records=300, auxiliary_share=0.3)
    assert torch.equal(one.train["a"].x, again.train["a"].x)
    assert not torch.equal(one.train_indices["a"], other.train_indices["a"])
    assert [len(records) for records in many.train.values()] == [100, 100, 100]
    for name in ("test_indices", "validation_indices"):
        assert torch.equal(getattr(one, name), getattr(many, name))
    three = dealt(raw, clients=["x", "y", "z"])
    assert torch.equal(torch.cat(list(three.train_indices.values())), one.train_indices["a"])


def test_caps_are_at_most() -> None:
    raw = load(name="digits")
    assert len(dealt(raw, train_records=10_000).train["a"]) == len(dealt(raw).train["a"])
    assert len(dealt(raw, replace(raw, where="test"), test_records=50).test) == 50
    assert len(dealt(raw, test_records=50).test) == 50


# One file for several owners.


@pytest.mark.parametrize("owners", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("shape", "axis", "along"), [((6, 5), None, 1), ((6, 2, 5, 7), None, 2), ((6, 2, 4, 5), 3, 3), ((6, 5, 3), None, 1)]
)
def test_the_owners_parts_make_up_the_records(
    owners: int, shape: tuple[int, ...], axis: int | None, along: int
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    held = [owners_part(x, owner, owners, axis) for owner in range(owners)]
    assert torch.equal(torch.cat(held, dim=along), x)
    sizes = [part.shape[along] for part in held]
    assert max(sizes) - min(sizes) <= 1
    assert all(part.is_contiguous() for part in held)
    held[0].zero_()
    assert x.count_nonzero() == x.numel(), "a part is a copy"
    channels_last = torch.rand(6, 4, 4, 2).permute(0, 3, 1, 2)
    assert owners_part(channels_last, 1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("shape", "owner", "owners", "axis", "line"),
    [
        ((6, 3), 0, 4, None, r"shape \(3,\): 3 columns along axis 1 for 4 owners; expected at least one for each"),
        ((6, 1, 2, 9), 0, 3, None, r"2 columns along axis 2 for 3 owners"),
        ((6, 3), 0, 2, 0, r"no axis 0; expected 1 to 1"),
        ((6, 3), 0, 2, 2, r"no axis 2; expected 1 to 1"),
        ((6, 3), 2, 2, None, r"owner 2 of 2: no such owner"),
        ((6, 3), -1, 2, None, r"owner -1 of 2: no such owner"),
    ],
)
def test_a_part_that_nobody_can_hold(
    shape: tuple[int, ...], owner: int, owners: int, axis: int | None, line: str
) -> None:
    with pytest.raises(DataError, match=line):
        owners_part(torch.zeros(shape), owner, owners, axis)


# Bad input: each is one line that says what, where, and what was expected.


def truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def bent(path: Path) -> Path:
    """The same file with some bytes in the middle changed."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 3
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(content)
    return path


def images(folder: Path, count: int = 60, **changes: Array) -> Path:
    return npz(folder / "x.npz", **{"images": pictures(count), "labels": some_labels(count), **changes})


def with_value(array: Array, value: float) -> Array:
    changed = array.astype(np.float32) / 255
    changed[7, 0, 0] = value
    return changed


def odd_folder(folder: Path, odd: Array, name: str = "odd.png") -> Path:
    class_folder(folder, pictures(90), some_labels(90))
    (folder / "class-1" / name).write_bytes(png(odd))
    return folder


def text_file(path: Path) -> Path:
    path.write_text("hello, world")
    return path


def with_empty_class(folder: Path) -> Path:
    class_folder(folder, pictures(90), some_labels(90))
    (folder / "empty").mkdir()
    return folder


def named_file(folder: Path) -> Path:
    """A parquet file that gives the name of a file instead of a picture."""
    (folder / "secret.png").write_bytes(png(pictures(1)[0, ..., 0]))
    rows = [{"bytes": None, "path": str(folder / "secret.png")}]
    schema = pyarrow.schema(
        [
            ("image", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])),
            ("label", pyarrow.int64()),
        ]
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pydict({"image": rows, "label": [0]}, schema), folder / "x.parquet")
    return folder / "x.parquet"


BAD_FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda f: images(f).with_name("xx.npz"), r"xx\.npz: no such file; did you mean 'x\.npz'\?"),
    "missing folder": (lambda f: f / "no" / "x.npz", r"no folder .*no$"),
    "unknown kind": (lambda f: bent(images(f)).rename(f / "x.csv"), r"expected \.npz, \.parquet, or a folder"),
    "truncated npz": (lambda f: truncated(images(f)), r"x\.npz: cannot be read, truncated or not an \.npz"),
    "damaged npz": (lambda f: bent(images(f)), r"x\.npz: cannot be read"),
    "empty npz": (lambda f: truncated(truncated(npz(f / "x.npz"))), r"x\.npz: cannot be read"),
    "text npz": (lambda f: text_file(f / "x.npz"), r"x\.npz: cannot be read"),
    "pickled": (lambda f: images(f, labels=np.array([{}] * 60)), r"pickled Python objects, which are never loaded"),
    "no labels": (lambda f: npz(f / "x.npz", images=pictures(9), label=some_labels(9)), r"did you mean 'label'\?"),
    "no records": (lambda f: npz(f / "x.npz", pixels=pictures(9), labels=some_labels(9)), r"it holds: pixels, labels"),
    "channels first": (lambda f: images(f, images=pictures(60, 8).transpose(0, 3, 1, 2)), r"1 to 4 channels last"),
    "flat pictures": (lambda f: images(f, images=pictures(60).reshape(60, -1)), r"shape \(60, 16\); expected"),
    "int pictures": (lambda f: images(f, images=pictures(60).astype(int)), r"images are int64; expected uint8"),
    "float 0 to 255": (lambda f: images(f, images=with_value(pictures(60), 255)), r"reach from 0 to 255"),
    "NaN": (lambda f: images(f, images=with_value(pictures(60), np.nan)), r"NaN or infinity, first in record 7"),
    "infinity": (lambda f: images(f, images=with_value(pictures(60), np.inf)), r"NaN or infinity, first in record 7"),
    "lengths": (lambda f: images(f, labels=some_labels(59)), r"60 images and 59 labels"),
    "labels by two": (lambda f: images(f, labels=some_labels(60)[:, None]), r"labels of shape \(60, 1\)"),
    "float labels": (lambda f: images(f, labels=some_labels(60) / 1), r"labels are float64; expected integers"),
    "text labels": (lambda f: images(f, labels=some_labels(60).astype(str)), r"labels are <U.*; expected integers"),
    "negative": (lambda f: images(f, labels=some_labels(60) - 1), r"label -1 of record 0; expected"),
    "out of range": (lambda f: images(f, labels=some_labels(60) + 1), r"label 3 of record 2 .* 0 to 2 for 3 classes"),
    "one class": (lambda f: images(f, labels=np.zeros(60, int)), r"all labels are 0; expected at least two classes"),
    "no rows": (lambda f: images(f, count=0), r"labels of shape \(0,\)"),
    "table NaN": (
        lambda f: npz(f / "x.npz", features=np.full((60, 2), np.nan), labels=some_labels(60)),
        r"NaN or infinity, first in record 0",
    ),
    "table shape": (
        lambda f: npz(f / "x.npz", features=np.ones(60), labels=some_labels(60)),
        r"shape \(60,\); expected",
    ),
    "category codes": (
        lambda f: npz(
            f / "x.npz", numeric=np.ones((60, 1)), categorical=-np.eye(60, 2, dtype=int), labels=some_labels(60)
        ),
        r"category codes reach from -1 to 0",
    ),
    "truncated parquet": (
        lambda f: truncated(parquet(f / "x.parquet", pictures(60), some_labels(60))),
        r"x\.parquet: cannot be read, truncated or not parquet",
    ),
    "truncated in a folder": (
        lambda f: truncated(parquet(f / "x.parquet", pictures(60), some_labels(60))).parent,
        r"cannot be read, truncated or not parquet",
    ),
    "file named in parquet": (named_file, r"record 0: holds no picture"),
    "no label column": (
        lambda f: parquet(f / "x.parquet", pictures(60), some_labels(60)) and other_columns(f, {"a": [1]}),
        r"no label column; expected one of label, labels, fine_label among a",
    ),
    "text column": (lambda f: other_columns(f, {"a": ["x"], "label": [0]}), r"column 'a' is .*string.*; expected"),
    "odd size": (lambda f: odd_folder(f, pictures(1, 5)[0, ..., 0]), r"odd\.png: 5 x 5 pixels; expected 4 x 4"),
    "odd color": (lambda f: odd_folder(f, pictures(1, 4, 3)[0]), r"odd\.png: a color picture, where the first one is"),
    "16 bits": (lambda f: odd_folder(f, pictures(1)[0, ..., 0].astype(np.uint16)), r"odd\.png: a picture of mode I;16"),
    "truncated picture": (
        lambda f: truncated(odd_folder(f, pictures(1)[0, ..., 0]) / "class-1" / "odd.png").parent.parent,
        r"odd\.png: cannot be read as a PNG or JPEG",
    ),
    "class without pictures": (
        with_empty_class,
        r"empty: no PNG or JPEG in it",
    ),
    "empty folder": (lambda f: f, r"expected a subfolder of pictures per class"),
}


def other_columns(folder: Path, columns: dict[str, list[Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "x.parquet")
    return folder / "x.parquet"


@pytest.mark.parametrize(("make", "line"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_refused_in_one_line(make: Callable[[Path], Path], line: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    with pytest.raises(DataError, match=line) as refused:
        dealt(load(path=path))
    assert "\n" not in str(refused.value)
    assert str(path.parent) in str(refused.value), "the line says where"


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ({"name": "digit"}, r"'digit' is not embedded; did you mean 'digits'\?"),
        ({}, r"nothing given; expected exactly one of name, path, hub"),
        ({"name": "digits", "hub": "a/b"}, r"name and hub given; expected exactly one"),
    ],
)
def test_a_source_that_is_not_one(source: dict[str, Any], line: str) -> None:
    with pytest.raises(DataError, match=line):
        load(**source)


def test_a_hub_name_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, *, split: str) -> datasets.Dataset:
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset {name!r} doesn't exist on the Hub\nor {split}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"hub data set 'a/b', split 'train': cannot be loaded .* on the Hub\)$"):
        load(hub="a/b")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"auxiliary_share": 0.5, "validation_share": 0.5},
            r"digits: 1797 records are too few .* 0 training, expected",
        ),
        ({"validation_share": 0.001}, r"2 validation, 359 auxiliary"),
        ({"clients": [f"c{i}" for i in range(300)]}, r"2 training \(each of 300 clients\), expected at least 8"),
        ({"train_records": MINIMUM_PART - 1}, r"7 training, expected at least 8"),
        ({"test_share": 1.5}, r"a share of 1\.5 of the data"),
        ({"test_share": float("nan")}, r"a share of nan of the data"),
        ({"clients": []}, r"expected at least one name"),
        ({"clients": ["a", "a"]}, r"no name twice"),
    ],
)
def test_a_deal_that_cannot_be_made(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(DataError, match=line):
        dealt(load(name="digits"), **changes)


def test_where_the_classes_are_known_a_file_may_lack_some(tmp_path: Path) -> None:
    raw = load(path=images(tmp_path, 90))
    assert dealt(raw).classes == 3
    assert dealt(raw, classes=5).classes == 5
    one = load(path=images(tmp_path, 90, labels=np.full(90, 2)))
    assert set(dealt(one, classes=3).train["a"].y.tolist()) == {2}
    with pytest.raises(DataError, match=r"x\.npz: label 2 of record 0 is out of range; expected 0 to 1 for 2 classes"):
        dealt(one, classes=2)


def test_records_without_labels_are_dealt_where_the_classes_are_known(tmp_path: Path) -> None:
    bare = load(path=npz(tmp_path / "x.npz", images=pictures(90)), may_lack_labels=True)
    labeled = load(path=images(tmp_path, 90))
    found, expected = dealt(bare, classes=3), dealt(labeled)
    assert torch.equal(found.train["a"].x, expected.train["a"].x)
    assert set(found.train["a"].y.tolist()) == {UNLABELED}
    with pytest.raises(DataError, match=r"x\.npz: no labels; expected some"):
        dealt(bare)


def test_a_share_of_nothing_leaves_its_part_empty_and_its_records_to_the_training(tmp_path: Path) -> None:
    result = dealt(load(path=images(tmp_path)), auxiliary_share=0.0, validation_share=0.0)
    assert {name: len(indices) for name, (_, indices) in parts(result).items()} == {
        "train a": 48,
        "auxiliary": 0,
        "validation": 0,
        "test": 12,
    }
    assert result.auxiliary.x.shape == (0, 1, 4, 4)


def test_a_test_file_must_match_the_training_file(tmp_path: Path) -> None:
    raw = load(path=images(tmp_path))
    other = load(path=npz(tmp_path / "t.npz", images=pictures(60, 5), labels=some_labels(60)))
    table = load(path=npz(tmp_path / "t.npz", features=np.ones((60, 2)), labels=some_labels(60)))
    more = load(path=npz(tmp_path / "t.npz", images=pictures(60), labels=some_labels(60) + 1))
    with pytest.raises(DataError, match=r"t\.npz holds pictures .*\(1, 5, 5\); expected .*\(1, 4, 4\), as in .*x\.npz"):
        dealt(raw, other)
    with pytest.raises(
        DataError, match=r"t\.npz holds tables of 2 numeric and 0 categorical columns; expected pictures"
    ):
        dealt(raw, table)
    with pytest.raises(DataError, match=r"t\.npz: label 3 of record 2 is out of range; expected 0 to 2"):
        dealt(raw, more)
    with pytest.raises(DataError, match=r"as the test data and as the training data"):
        dealt(raw, load(path=tmp_path / "x.npz"))


# The real files.


@pytest.mark.parametrize(
    ("name", "ending", "records", "shape", "classes"),
    [
        ("fashion-mnist", "npz", 60_000, (1, 28, 28), 10),
        ("cifar10", "parquet", 50_000, (3, 32, 32), 10),
        ("adult", "npz", 32_561, (108,), 2),
        ("pendigits", "npz", 7_494, (16,), 10),
    ],
)
def test_the_shared_data_sets(
    name: str, ending: str, records: int, shape: tuple[int, ...], classes: int, data_folder: Path
) -> None:
    pool, test = (load(path=data_folder / f"{name}-{part}.{ending}") for part in ("train", "test"))
    result = dealt(pool, test, train_records=500, test_records=200, auxiliary_share=0.01, validation_share=0.002)
    assert len(pool) == records
    assert (result.record_shape, result.classes) == (shape, classes)
    assert result.train["a"].x.shape == (500, *shape)
    if len(shape) == 3:
        assert 0 <= result.test.x.min() < 0.05
        assert 0.9 < result.test.x.max() <= 1
