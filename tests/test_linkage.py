"""Owners agree on their records by keyed hashes, and the line for those that do not match tells no id."""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from milkglass.errors import DataError
from milkglass.linkage import hash_ids, match, sorted_by_hash
from milkglass.randomness import public_source

KEY, RUN = public_source(0), b"run"
NAMES = np.array(["zoë", "7", "", "a b", "Zoë", "07", "7 "])


def hashed(ids: NDArray[Any] | list[Any], run: bytes = RUN) -> NDArray[np.uint8]:
    return hash_ids(np.array(ids), KEY, run)


def test_a_hash_is_the_hmac_that_the_docstring_says() -> None:
    secret = KEY.derive("linkage").read(32)
    for name, row in zip(NAMES.tolist(), hashed(NAMES), strict=True):
        content = (3).to_bytes(8, "little") + b"run" + b"record id" + name.encode()
        assert row.tobytes() == hmac.new(secret, content, hashlib.sha256).digest()


@pytest.mark.parametrize("dtype", ["i1", "<u2", ">i4", "i8", "u8"])
def test_an_integer_and_its_decimal_text_are_one_id(dtype: str) -> None:
    highest = int(np.iinfo(dtype).max)
    texts = ["0", "7", str(highest)]
    assert np.array_equal(hash_ids(np.array([0, 7, highest], dtype), KEY, RUN), hashed(texts))
    assert np.array_equal(hash_ids(np.array(texts, ">U30"), KEY, RUN), hashed(texts))
    assert np.array_equal(hashed([-7]), hashed(["-7"]))


def test_no_two_ids_runs_or_keys_share_a_hash() -> None:
    rows = [
        *hashed(NAMES),
        *hashed(NAMES, b"other"),
        *hashed(NAMES, b""),
        *hash_ids(NAMES, public_source(1), RUN),
    ]
    assert len({row.tobytes() for row in rows}) == 4 * len(NAMES)
    # what ends a run's name cannot begin an id
    assert not np.array_equal(hashed(["record idx"], b"r"), hashed(["x"], b"rrecord id"))
    assert not np.array_equal(hash_ids(NAMES, KEY.derive("linkage"), RUN), hashed(NAMES))


def test_hashes_do_not_depend_on_the_order_or_the_company_of_the_ids() -> None:
    order = np.random.default_rng(0).permutation(100)
    hashes = hashed(np.arange(100))
    assert np.array_equal(hashed(np.arange(100)[order]), hashes[order])
    assert np.array_equal(hashed([42]), hashes[42:43])
    assert hashes.dtype == np.uint8
    assert hashes.flags.writeable, "torch takes no other array as it is"
    assert hashed(np.zeros(0, np.int64)).shape == (0, 32)


@pytest.mark.parametrize("ids", [np.array([0.5]), np.array([[1]]), np.array([b"7"]), np.array([True])])
def test_what_is_no_id_is_refused(ids: NDArray[Any]) -> None:
    with pytest.raises(DataError, match="expected an integer or a text for each record"):
        hash_ids(ids, KEY, RUN)


def test_sorted_by_hash_is_the_order_of_the_bytes() -> None:
    draw = np.random.default_rng(0)
    hashes = np.full((500, 32), 9, np.uint8)
    # rows differ in four bytes far apart: each of them decides some pairs, and 255 must come after 1
    hashes[:, [2, 8, 23, 31]] = draw.choice(np.array([0, 1, 128, 255], np.uint8), (500, 4))
    order = sorted_by_hash(hashes)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(500))
    assert [row.tobytes() for row in hashes[order]] == sorted(row.tobytes() for row in hashes)
    assert sorted_by_hash(hashes[:0]).shape == (0,)
    assert np.array_equal(sorted_by_hash(np.asfortranarray(hashes)), order)


def test_owners_of_the_same_records_come_to_one_order() -> None:
    numbers = np.arange(1000)
    texts = np.random.default_rng(1).permutation(numbers).astype(str)
    one, two = hashed(numbers), hashed(texts)
    match({"hospital": one, "bank": two, "shop": one[::-1]})
    common = numbers[sorted_by_hash(one)]
    assert common.tolist() == texts[sorted_by_hash(two)].astype(int).tolist()
    assert common.tolist() != numbers.tolist()


def test_ids_that_are_not_matched_are_counted_for_each_owner() -> None:
    numbers = np.arange(2000)
    with pytest.raises(DataError) as refused:
        match({"hospital-a": hashed(numbers[:1000]), "bank": hashed(numbers[12:1003])})
    line = str(refused.value)
    assert line.startswith("hospital-a: 12 of 1,000 records are not matched; bank: 3 of 991 records are not matched; ")
    assert "private set intersection is out of scope" in line
    assert "agree on them first" in line


def test_what_two_owners_of_three_have_is_not_matched() -> None:
    three = {"a": hashed([1, 2, 3]), "b": hashed([2, 3, 1]), "c": hashed([3, 1])}
    with pytest.raises(DataError, match=r"a: 1 of 3 .*; b: 1 of 3 .*; c: 0 of 2 records are not matched;"):
        match(three)


def test_records_of_one_id_are_counted_too() -> None:
    with pytest.raises(DataError, match=r"^a: 0 of 5 records are not matched, 3 have .* earlier one; b: 0 of 2 "):
        match({"a": hashed([1, 1, 2, 1, 2]), "b": hashed([1, 2])})
    both = hashed([1, 1, 2])
    with pytest.raises(DataError, match=r"a: 0 of 3 .*, 1 have .*; b: 0 of 3 .*, 1 have "):
        match({"a": both, "b": both})
    with pytest.raises(DataError, match=r"a: 2 of 3 records are not matched, 1 have "):
        match({"a": hashed([5, 5, 1]), "b": hashed([1])})


def test_other_runs_do_not_match() -> None:
    with pytest.raises(DataError, match=r"a: 9 of 9 .*; b: 9 of 9 "):
        match({"a": hashed(np.arange(9)), "b": hashed(np.arange(9), b"other")})
    with pytest.raises(DataError, match=r"a: 9 of 9 .*; b: 0 of 0 "):
        match({"a": hashed(np.arange(9)), "b": hashed(np.zeros(0, int))})


def test_hashes_that_differ_in_their_last_zeros_are_told_apart() -> None:
    one = np.zeros((2, 32), np.uint8)
    one[0, 30] = one[1, 29] = 1
    match({"a": one, "b": one[::-1]})
    with pytest.raises(DataError, match=r"a: 1 of 2 .*; b: 1 of 2 "):
        match({"a": one, "b": one * np.array([[1], [0]], np.uint8)})


def test_the_line_holds_no_id_and_no_hash() -> None:
    hashes = hashed(["patient-4711", "patient-4712"])
    with pytest.raises(DataError) as refused:
        match({"a": hashes, "b": hashes[[0, 0]]})
    line = str(refused.value)
    assert "\n" not in line
    assert "patient" not in line
    assert re.sub(r"\b[012]\b", "", line) == re.sub(r"\d", "", line), "no number but the counts"
    assert not any(row.tobytes().hex()[:6] in line for row in hashes)


@pytest.mark.parametrize(
    ("hashes", "words"),
    [
        (np.zeros((3, 31), np.uint8), r"^b: hashes are uint8 of shape \(3, 31\); expected uint8 \(records, 32\)$"),
        (np.zeros((3, 32), np.int64), r"^b: hashes are int64 "),
        (np.zeros(32, np.uint8), r"^b: hashes are uint8 of shape \(32,\)"),
    ],
)
def test_what_are_no_hashes_is_refused(hashes: NDArray[Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        match({"a": hashed([1, 2, 3]), "b": hashes})


def test_one_owner_has_nothing_to_match() -> None:
    with pytest.raises(DataError, match="owners a: nothing to match; expected at least two"):
        match({"a": hashed([1])})
    with pytest.raises(DataError, match="owners none"):
        match({})
