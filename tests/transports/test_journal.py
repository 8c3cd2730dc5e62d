"""A journal holds whole frames, whatever cut its last write short."""

from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milkglass.codec import encode
from milkglass.errors import RunError
from milkglass.messages import Message
from milkglass.transports.journal import Journal

FRAMES = [
    encode(Message("activations", "hospital-a", 0, {"z": torch.arange(3.0), "labels": torch.arange(3)}, number=0), 7),
    encode(Message("goodbye", "b" * 200, 2**40, number=2**32 - 1), 2**64 - 1),
    encode(Message("queries", "c", 2, {"z": torch.rand(100, generator=torch.Generator().manual_seed(0))}), 7),
]


def _frames(path: Path) -> list[bytes]:
    journal = Journal(path)
    found = list(journal.frames())
    journal.close()
    return found


def _journal_of(path: Path, frames: list[bytes]) -> Journal:
    journal = Journal(path)
    assert list(journal.frames()) == []
    for frame in frames:
        journal.append(frame)
    return journal


def test_what_was_appended_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal"
    for count in range(3):
        journal = Journal(path)
        assert list(journal.frames()) == FRAMES * count
        for frame in FRAMES:
            journal.append(frame)
        assert journal.size_bytes == path.stat().st_size == sum(map(len, FRAMES)) * (count + 1)
        assert list(journal.frames()) == FRAMES * (count + 1)
        journal.close()
    assert path.read_bytes() == b"".join(FRAMES * 3)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    journal = Journal(path)
    journal.remove()
    assert not path.exists()


def test_a_write_that_was_cut_short_anywhere_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    content = b"".join(FRAMES)
    ends = [0, *(sum(map(len, FRAMES[:count])) for count in (1, 2, 3))]
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        whole = max(index for index, end in enumerate(ends) if end <= size)
        journal = Journal(path)
        assert list(journal.frames()) == FRAMES[:whole]
        assert path.stat().st_size == ends[whole] == journal.size_bytes
        journal.append(FRAMES[1])
        journal.close()
        assert _frames(path) == [*FRAMES[:whole], FRAMES[1]]


def test_what_an_interrupted_write_left_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = _journal_of(path, FRAMES[:1])
    with path.open("ab") as file:
        file.write(FRAMES[2][:-1])  # as a signal in the middle of `append` leaves it
    journal.append(FRAMES[1])
    assert path.stat().st_size > len(FRAMES[0]) + len(FRAMES[1])
    journal.append(FRAMES[0])
    journal.close()
    assert _frames(path) == [*FRAMES[:2], FRAMES[0]]


def test_nothing_behind_a_damaged_frame_is_taken_for_whole(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    content, begin, end = b"".join(FRAMES), len(FRAMES[0]), len(FRAMES[0]) + len(FRAMES[1])
    for position in range(begin, end):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        assert _frames(path) == FRAMES[:1]
        assert path.stat().st_size == begin


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 3))
def test_whatever_lies_behind_whole_frames_only_they_are_found(rest: bytes, count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        path.write_bytes(b"".join(FRAMES[:count]) + rest)
        assert _frames(path) == FRAMES[:count]
        assert path.stat().st_size == sum(map(len, FRAMES[:count]))


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes so many bytes more, for every number of bytes."""
    path = tmp_path / "journal"
    pwrite = os.pwrite
    journal = _journal_of(path, FRAMES[:1])
    before = path.read_bytes()
    for room in range(len(FRAMES[2])):
        left = room

        def to_a_full_disk(file: int, content: bytes, offset: int) -> int:
            nonlocal left
            if not left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = pwrite(file, content[: min(left, 100)], offset)  # a write may also do less than it was asked for
            left -= written
            return written

        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", to_a_full_disk)
            with pytest.raises(RunError, match=r"cannot write .*journal: No space left on device; what was written"):
                journal.append(FRAMES[2])
        assert path.read_bytes() == before
    journal.append(FRAMES[2])  # there is room again
    journal.close()
    assert _frames(path) == [FRAMES[0], FRAMES[2]]


_TO_THE_LIMIT = """
import resource, signal, sys
from pathlib import Path
from milkglass.errors import RunError
from milkglass.transports.journal import Journal

frames = [bytes.fromhex(line) for line in sys.stdin]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
most = len(frames[0]) + len(frames[1]) - 1
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
journal = Journal(Path(sys.argv[1]))
journal.append(frames[0])
try:
    journal.append(frames[1])
except RunError as error:
    print(error)
assert list(journal.frames()) == frames[:1]
"""


def test_a_file_that_may_not_grow_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    done = subprocess.run(
        [sys.executable, "-c", _TO_THE_LIMIT, str(path)],
        input="\n".join(frame.hex() for frame in FRAMES),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"cannot write {path}: File too large; what was written before is whole\n"
    assert _frames(path) == FRAMES[:1]


def test_a_folder_that_cannot_be_written_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "journal", tmp_path):
        with pytest.raises(RunError, match=rf"^cannot write {path}: [A-Z][a-z ]+$"):
            Journal(path)


def test_a_random_life_of_appends_deaths_and_openings(tmp_path: Path) -> None:
    path, generator = tmp_path / "journal", random.Random(0)
    expected: list[bytes] = []
    for _ in range(200):
        journal = Journal(path)
        assert list(journal.frames()) == expected
        for _ in range(generator.randrange(4)):
            frame = generator.choice(FRAMES)
            journal.append(frame)
            expected.append(frame)
        journal.close()
        if expected and generator.random() < 0.5:  # it dies while it writes the last one
            os.truncate(path, path.stat().st_size - generator.randrange(1, len(expected[-1])))
            expected.pop()


def test_a_journal_begun_anew_holds_what_came_since(tmp_path: Path) -> None:
    """Each time in the place of what it held before, which may have been longer or shorter."""
    path, generator = tmp_path / "0", random.Random(0)
    path.touch()
    for turn in range(300):
        journal, expected = Journal(path), _frames(path)
        assert list(journal.frames()) == expected
        for _ in range(generator.randrange(4)):
            path = tmp_path / f"{turn}.{len(expected)}.{generator.random()}"
            journal.begin_anew(path)
            assert journal.size_bytes == 0
            expected = generator.choices(FRAMES, k=generator.randrange(6))
            for frame in expected:
                journal.append(frame)
        if generator.random() < 0.5:  # else it dies
            journal.close()
            assert path.read_bytes() == b"".join(expected)
        assert _frames(path) == expected
        assert [file.name for file in tmp_path.iterdir()] == [path.name]


def _alike(party: str, number: int) -> bytes:
    """Frames that say the same of themselves but for the party and the checksum."""
    return encode(Message("activations", party, 0, {"z": torch.full((16,), number)}), 7)


@pytest.mark.parametrize("newer", [_alike("ben", 2), *FRAMES], ids=["alike", "0", "1", "2"])
@pytest.mark.parametrize("older", [_alike("ann", 1), *FRAMES], ids=["alike", "0", "1", "2"])
def test_nothing_older_shows_through_a_write_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bytes, newer: bytes
) -> None:
    """The process dies after any number of bytes, of the frame or of the zeros behind it."""
    pwrite = os.pwrite
    for room in range(64 + len(newer)):
        left = room

        def until_it_dies(file: int, content: bytes, offset: int) -> int:
            nonlocal left
            written = pwrite(file, content[:left], offset)
            left -= written
            if written < len(content):
                raise KeyboardInterrupt
            return written

        path = tmp_path / "journal"
        journal = _journal_of(tmp_path / "before", [older] * 8)
        journal.begin_anew(path)
        journal.append(older)
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", until_it_dies)
            with pytest.raises(KeyboardInterrupt):
                journal.append(newer)
        journal.close()
        assert _frames(path) in ([older], [older, newer])  # the last bytes may be those that lay there
        path.unlink()
