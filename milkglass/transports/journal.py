"""What a party sent and received since its last checkpoint, on disk: so that a process that dies loses nothing.

A journal is frames, one after the other, as they were on the wire: each says how long it is and has its checksum, so a
write that the process's death cut short is found, and forgotten. Written to the operating system before a frame leaves,
and not waited for until the disk has it: it survives the death of the process, not of the power.

A journal that begins anew overwrites its own file: memory that the system has at hand for it costs a tenth of new
memory. What it held before ends where zeros stand in place of a frame, and they are written before the frame is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, final

from milkglass.codec import decode, peek_header
from milkglass.errors import MessageError, RunError

_END: Final = bytes(64)  # longer than what a frame says of itself: nothing older can show through a write cut short


@final
class Journal:
    """Frames in a file, whole ones only. `frames` reads what is there, `append` adds to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self.size_bytes = os.fstat(self._file).st_size
            self._old_bytes = 0  # the file's length, where something older lies behind what it holds
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}") from None

    def frames(self) -> Iterator[bytes]:
        """The frames that are there, in order; what a cut-short write left at the end is removed."""
        position = 0
        while position < self.size_bytes:
            try:
                length = peek_header(os.pread(self._file, 512, position)).frame_bytes
                frame = os.pread(self._file, length, position) if length <= self.size_bytes - position else b""
                decode(frame)
            except MessageError:
                self._cut(position)
                return
            position += length
            yield frame

    def append(self, frame: bytes) -> None:
        """Add a frame, whole or not at all. Raises RunError, such as for a full disk."""
        written = 0
        try:
            if self.size_bytes + len(frame) < self._old_bytes:
                os.pwrite(self._file, _END, self.size_bytes + len(frame))
            while written < len(frame):
                part = memoryview(frame)[written:] if written else frame
                written += os.pwrite(self._file, part, self.size_bytes + written)
        except OSError as error:
            self._cut(self.size_bytes)
            raise RunError(
                f"cannot write {self.path}: {error.strerror or error}; what was written before is whole"
            ) from None
        self.size_bytes += len(frame)

    def begin_anew(self, path: Path) -> None:
        """Hold nothing, and be called `path`: a checkpoint holds what it held."""
        try:
            os.pwrite(self._file, _END, 0)  # first: under the new name it must never seem to hold anything
            os.rename(self.path, path)  # noqa: PTH104 - by `os`, as all that is done to the file
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}") from None
        self._old_bytes = max(self._old_bytes, self.size_bytes, len(_END))
        self.path, self.size_bytes = path, 0

    def close(self) -> None:
        """No more; the disk gets back what lies behind what it holds."""
        if self._old_bytes:
            self._cut(self.size_bytes)
        os.close(self._file)

    def remove(self) -> None:
        """Close it, and remove the file: a checkpoint holds what it held."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _cut(self, size_bytes: int) -> None:
        try:
            os.ftruncate(self._file, size_bytes)
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror or error}") from None
        self.size_bytes, self._old_bytes = size_bytes, 0
