"""Record linkage: whose records are the same ones, told by keyed hashes of their ids.

Owners that hold different columns of the same records need one common order. They share a key that the server lacks.
Each hashes its ids under it (HMAC-SHA256) and sorts its records by the hash; the server sees the hashes alone.

The server learns how many records each owner has, and which hashes are equal within one run: whose records are the
same ones, and which of its messages tell of the same record. It does not learn an id, and cannot ask whether a record
of a known id takes part. Hashes made for two values of `run` have nothing in common for it, though the records may be
the same; those made for one value under one key are equal.

This holds as long as the key is secret. Ids are easy to list (numbers, names, dates of birth), so who has the key can
hash them all: an owner that sees another's hashes learns which records the other has. Where all owners have the same
records, which `match` asks for, that tells it nothing new; where they do not, it does. To find the common records
without it (private set intersection) is out of scope.

Legend: N records of an owner.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from functools import reduce
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from milkglass.errors import DataError
from milkglass.randomness import Source

HASH_BYTES: Final = 32
_TAG: Final = b"record id"

Hashes = NDArray[np.uint8]
"""(N, 32), one hash a row."""


def hash_ids(ids: NDArray[Any], key: Source, run: bytes) -> Hashes:
    """The hash (N, 32) of each id (N,), integers or text, under the owners' `key`, for this `run` alone.

    HMAC-SHA256 over the run's length (8 bytes, little-endian), the run, a tag, and the id in UTF-8. An integer is its
    decimal text: 7 and "7" are the same id, for one owner's file may hold numbers where another's holds text. Nothing
    else is made alike: "07", " 7" and two Unicode spellings of one name are different ids.

    run: what only the hashes of one set of records in one run share. Give training and test records different ones,
    where records are known by their numbers: else the server could match number 7 of both.
    """
    if ids.ndim != 1 or ids.dtype.kind not in "uiU":
        raise DataError(f"ids are {ids.dtype} of shape {ids.shape}; expected an integer or a text for each record")
    secret = key.derive("linkage").read(HASH_BYTES)
    head = len(run).to_bytes(8, "little") + run + _TAG
    texts = ids.tolist() if ids.dtype.kind == "U" else map(str, ids.tolist())
    rows = [hmac.digest(secret, head + text.encode(), hashlib.sha256) for text in texts]
    return np.frombuffer(bytearray().join(rows), np.uint8).reshape(-1, HASH_BYTES)


def sorted_by_hash(hashes: Hashes) -> NDArray[np.int64]:
    """The numbers (N,) of an owner's records in the order of their hashes: owners of the same records agree on it."""
    words = np.ascontiguousarray(hashes).view(">u8")
    return np.lexsort(words.T[::-1]).astype(np.int64)  # lexsort's last key counts first


def match(hashes_by_owner: Mapping[str, Hashes]) -> None:
    """Raise DataError unless all owners have the same records, each of them once.

    The line counts, for each owner, its records that not all others have, and those with the id of another one of its
    own. It holds no id and no hash.
    """
    if len(hashes_by_owner) < 2:
        raise DataError(f"owners {', '.join(hashes_by_owner) or 'none'}: nothing to match; expected at least two")
    for owner, hashes in hashes_by_owner.items():
        if hashes.dtype != np.uint8 or hashes.ndim != 2 or hashes.shape[1] != HASH_BYTES:
            raise DataError(
                f"{owner}: hashes are {hashes.dtype} of shape {hashes.shape}; expected uint8 (records, {HASH_BYTES})"
            )
    held = {owner: np.unique(_as_items(hashes), return_counts=True) for owner, hashes in hashes_by_owner.items()}
    common = reduce(np.intersect1d, (items for items, _ in held.values()))
    wrong, told = 0, []
    for owner, (items, counts) in held.items():
        unmatched = int(counts[~np.isin(items, common)].sum())
        repeated = int(counts.sum()) - len(items)
        wrong += unmatched + repeated
        told.append(f"{owner}: {unmatched:,} of {counts.sum():,} records are not matched")
        told[-1] += f", {repeated:,} have the id of an earlier one" if repeated else ""
    if wrong:
        raise DataError(
            f"{'; '.join(told)}; expected the same records of every owner, each once: agree on them first, "
            "private set intersection is out of scope"
        )


def _as_items(hashes: Hashes) -> NDArray[np.bytes_]:
    """Each hash (N, 32) as one item (N,); numpy drops zeros at an item's end, but all are equally long."""
    return np.ascontiguousarray(hashes).view(f"S{HASH_BYTES}").reshape(-1)
