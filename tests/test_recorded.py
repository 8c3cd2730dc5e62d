"""Arrays from elsewhere: what becomes of them, and what is refused in one clear line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from milkglass.errors import DataError
from milkglass.recorded import FEWEST_ROWS, read_trial, trial_from

ROWS = 200


def draws(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def flat() -> np.ndarray:
    return draws().normal(size=(ROWS, 6))


def test_rows_stay_together_and_nobody_is_in_two_parts() -> None:
    records = np.arange(ROWS, dtype=np.float64)[:, None] @ np.ones((1, 3))
    trial = trial_from(records[:, :2] * 7, records, np.arange(ROWS) % 4)
    parts = [
        (trial.view.known.activations, trial.view.known.records),
        (trial.view.validation.activations, trial.view.validation.records),
        (trial.view.target.activations, trial.truth),
    ]
    assert [len(rows) for rows, _ in parts] == [120, 20, 60]
    assert len(set(torch.cat([rows[:, 0] for rows, _ in parts]).tolist())) == ROWS  # each of them once
    for sent, record in parts:  # a line through both, whatever the scale
        assert torch.corrcoef(torch.stack([sent[:, 0], record[:, 0]]))[0, 1] > 1 - 1e-6
    assert trial.view.known.entitled.shape == (120, 4)
    assert set(trial.view.known.entitled.flatten().tolist()) == {0.0, 1.0}


def test_columns_of_tables_are_standardized_by_the_known_rows() -> None:
    table = flat() * np.array([1, 10, 100, 1e-3, 1, 0]) + 5
    known = trial_from(flat(), table).view.known.records
    assert torch.allclose(known[:, :5].mean(0), torch.zeros(5), atol=1e-5)
    assert torch.allclose(known[:, :5].std(0, correction=0), torch.ones(5), atol=1e-5)
    assert torch.equal(known[:, 5], torch.zeros(len(known)))


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((ROWS, 8, 9), np.uint8, (1, 8, 9)),
        ((ROWS, 8, 9, 3), np.uint8, (3, 8, 9)),
        ((ROWS, 3, 8, 9), np.uint8, (3, 8, 9)),
        ((ROWS, 3, 8, 9), np.float32, (3, 8, 9)),
    ],
)
def test_pictures_end_up_in_zero_to_one(
    shape: tuple[int, ...], dtype: type[np.generic], expected: tuple[int, ...]
) -> None:
    pictures = draws().integers(0, 256, size=shape).astype(dtype)
    truth = trial_from(flat(), pictures).truth
    assert truth.shape[1:] == expected
    assert truth.min() >= 0
    assert truth.max() <= 1
    assert truth.max() > 0.9


def test_normalized_pictures_are_put_into_zero_to_one_and_others_left() -> None:
    inside = draws().uniform(0.2, 0.8, size=(ROWS, 1, 4, 4))
    kept = trial_from(flat(), inside).truth.double().flatten(1)
    distances = torch.cdist(kept, torch.from_numpy(inside).flatten(1))
    assert distances.amin(1).max() < 1e-6  # each is one of those given, as it was
    outside = trial_from(flat(), inside * 4 - 2).truth
    assert 0 <= outside.min() <= outside.max() <= 1


BAD = [
    (flat()[:-1], flat(), None, "199 rows and records 200; expected them to pair up"),
    (flat(), flat(), flat()[:-2], "entitled 198; expected them to pair up"),
    (np.ones((ROWS, 4)), flat(), None, "activations: every row is the same"),
    (flat(), np.ones((ROWS, 4)), None, "records: every row is the same"),
    (np.where(flat() > 2, np.nan, flat()), flat(), None, "holds NaN or infinity"),
    (flat(), np.where(flat() > 2, np.inf, flat()), None, "records: row"),
    (flat()[: FEWEST_ROWS - 1], flat()[: FEWEST_ROWS - 1], None, "99 rows are too few"),
    (flat() * 1e31, flat(), None, "expected at most 1e+30"),
    (flat().astype(str), flat(), None, "expected numbers"),
    (flat()[:, :0], flat(), None, "at least one value"),
]


@pytest.mark.parametrize(("activations", "records", "entitled", "words"), BAD)
def test_bad_arrays_are_one_clear_line(
    activations: np.ndarray, records: np.ndarray, entitled: np.ndarray | None, words: str
) -> None:
    with pytest.raises(DataError) as error:
        trial_from(activations, records, entitled)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.npy", tmp_path / "bad.npy"
    np.save(good, flat())
    with pytest.raises(DataError, match=r"bad.npy: No such file"):
        read_trial(bad, good)
    bad.write_bytes(b"\x93NUMPY nonsense")
    with pytest.raises(DataError, match=r"bad.npy: "):
        read_trial(bad, good)
    np.save(bad, np.array([{"a": 1}] * ROWS), allow_pickle=True)
    with pytest.raises(DataError, match=r"bad.npy: not a plain .npy array .pickled Python objects are never loaded"):
        read_trial(bad, good)
    np.savez(tmp_path / "bad.npz", a=flat())
    with pytest.raises(DataError, match=r"an archive of several arrays"):
        read_trial(tmp_path / "bad.npz", good)
    assert len(read_trial(good, good).truth) == 60


def test_what_all_activations_have_in_common_hides_nothing() -> None:
    records = draws().normal(size=(ROWS, 4))
    plain, lifted = trial_from(records, records), trial_from(records + 1e9, records)
    spread = plain.view.known.activations.std(0)
    assert torch.allclose(plain.view.known.activations / spread, lifted.view.known.activations / spread, atol=1e-4)


def test_rows_of_one_record_stay_together() -> None:
    """A random code book tells nothing of a record whose pair is not known, however often it was sent."""
    records = np.repeat(draws(1).normal(size=(ROWS, 4)), 5, axis=0)
    codes = np.repeat(draws(2).normal(size=(ROWS, 8)), 5, axis=0) + draws(3).normal(scale=0.1, size=(5 * ROWS, 8))
    order = draws(4).permutation(5 * ROWS)
    trial = trial_from(codes[order], records[order])
    parts = [trial.view.known.records, trial.view.validation.records, trial.truth]
    distinct = [set(map(tuple, part.tolist())) for part in parts]
    assert [len(part) for part in parts] == [600, 100, 60]
    assert [len(part) for part in distinct] == [120, 20, 60]
    assert not distinct[0] & distinct[2]
    assert not distinct[1] & distinct[2]
    signs = np.where(np.arange(5 * ROWS)[:, None] % 2, -0.0, 0.0) + np.zeros((5 * ROWS, 1))
    with_zeros = trial_from(codes[order], np.concatenate([records, signs], axis=1)[order])
    assert len(with_zeros.truth) == 60  # -0 is 0
    with pytest.raises(DataError, match="records: 40 different records are too few"):
        trial_from(codes, np.repeat(draws(1).normal(size=(40, 4)), 25, axis=0))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nonsense"])
def test_an_empty_file_and_a_broken_archive_are_one_line(content: bytes, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.npy", tmp_path / "bad.npy"
    np.save(good, flat())
    bad.write_bytes(content)
    with pytest.raises(DataError, match=r"bad.npy: cannot be read, truncated or not a .npy file"):
        read_trial(bad, good)
