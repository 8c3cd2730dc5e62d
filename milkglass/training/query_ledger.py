"""How often each record was released for a prediction: kept in a file, written before anything leaves.

A line of 16 bytes for every release: a keyed digest (HMAC-SHA-256, cut short) of the record's values, so that the file
alone tells nobody which records were asked about. Values that differ in anything are another record.

Legend: B records in a message.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
from collections import Counter
from pathlib import Path
from typing import Final, final

from torch import Tensor

from milkglass.defenses.base import content_digest
from milkglass.errors import EgressError, RunError
from milkglass.randomness import Source

DIGEST_BYTES: Final = 16


@final
class QueryLedger:
    """Counts releases by record in the file `path`; refuses one beyond `most`. source: what digests are keyed with."""

    def __init__(self, path: Path, most: int, source: Source) -> None:
        self._path, self._most = path, most
        self._key = source.derive("query ledger").read(32)
        self._counts: Counter[bytes] = Counter()
        self._read = 0

    def charge(self, x: Tensor, *, kept: bool = False) -> None:
        """Count a release of each of the records `x` (B, ...), and write it down, before they leave.

        kept: a record always gives the same release, so it counts once. Raises EgressError, and charges nobody, where a
        record would be released too often; RunError where the file cannot be written or is damaged.
        """
        digests = [self._digest(row) for row in x]
        try:
            with self._path.open("ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # two predictions at once count together
                self._catch_up(file.fileno())
                new = Counter(digests)
                if kept:
                    new = Counter(digest for digest in new if not self._counts[digest])
                too_often = [digest for digest, count in new.items() if self._counts[digest] + count > self._most]
                if too_often:
                    worst = max(self._counts[digest] + new[digest] for digest in too_often)
                    raise EgressError(
                        f"{len(too_often)} of {len(x)} records would be released up to {worst} times; the client's "
                        f"limit is client.most_queries = {self._most}; this message is not sent"
                    )
                file.write(b"".join(new.elements()))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"cannot write {self._path}: {error.strerror or error}; nothing was sent") from None

    def _digest(self, row: Tensor) -> bytes:
        content = f"{row.dtype} {tuple(row.shape)} {content_digest(row + 0.0)}"
        return hmac.digest(self._key, content.encode(), hashlib.sha256)[:DIGEST_BYTES]

    def _catch_up(self, descriptor: int) -> None:
        """Read what was written since this object last looked."""
        size = os.fstat(descriptor).st_size
        if size % DIGEST_BYTES:  # a write that was cut off: nothing had left for it
            size -= size % DIGEST_BYTES
            os.ftruncate(descriptor, size)
        if size < self._read:
            raise RunError(
                f"{self._path}: damaged, it has become shorter; expected {DIGEST_BYTES} bytes for each release"
            )
        content = os.pread(descriptor, size - self._read, self._read)
        self._counts.update(content[at : at + DIGEST_BYTES] for at in range(0, len(content), DIGEST_BYTES))
        self._read = size
