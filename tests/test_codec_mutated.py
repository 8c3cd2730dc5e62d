"""Whatever bytes arrive, the decoder answers with a message or a MessageError, and takes no memory for mere claims."""

from __future__ import annotations

import random
import resource
import struct
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64

from milkglass.codec import DTYPES, Allowed, Limits, decode, encode, frame_bound, peek_header
from milkglass.errors import MessageError
from milkglass.messages import Message

FIXED = 48
EXTREMES = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1)
FIELDS = ((5, 1), (6, 1), (7, 1), (8, 8), (16, 8), (24, 2), (26, 2), (28, 4), (32, 8))
"""(offset, bytes) of the fixed part's fields, from the kind to the frame's length."""

ANY_FLOAT = frozenset({torch.float32, torch.float64, torch.bfloat16})
AGREED = {
    "activations": {"z": Allowed((None, 3), ANY_FLOAT), "labels": Allowed((None,), frozenset({torch.int64}))},
    "collect": {},
}
LIMITS = Limits(frame_bound(AGREED, rows=6), AGREED, rows=6)


def _frames() -> list[bytes]:
    """Small frames, so that many bytes are the header's."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4, 3, generator=generator)
    one_of_each = {str(code): torch.randint(0, 2, (2,), generator=generator).to(t) for code, t in enumerate(DTYPES)}
    messages = (
        Message("activations", "hospital-a", 3, {"z": z, "labels": torch.arange(4)}),
        Message("activations", "päivi", 2**40, {"z": z.double()[:1], "labels": torch.arange(1)}, 1, 3),
        Message("collect", "c", 0),
        Message(
            "queries",
            "",
            1,
            {"": torch.tensor(1.5), "empty": torch.zeros(2, 0, 3), "b": torch.ones(100, dtype=torch.bool)},
        ),
        Message("gradients", "s", 5, one_of_each),
        Message("gradients", "s", 6, {"z": torch.zeros((1,) * 8)}),
    )
    return [encode(message, run=7) for message in messages]


def _mended(frame: bytearray) -> bytearray:
    """With a length and a checksum that fit, so that the checks behind these are reached."""
    if len(frame) >= FIXED:
        frame[32:40] = struct.pack("<Q", len(frame))
        checksum = xxh3_64(frame[: FIXED - 8])
        checksum.update(frame[FIXED:])
        frame[FIXED - 8 : FIXED] = struct.pack("<Q", checksum.intdigest())
    return frame


def _mutated(generator: random.Random, frames: list[bytes]) -> bytearray:
    frame = bytearray(generator.choice(frames))
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        way = generator.randrange(6)
        if way == 0:
            for _ in range(generator.randrange(1, 5)):
                if frame:
                    frame[generator.randrange(len(frame))] ^= 1 << generator.randrange(8)
        elif way == 1:
            del frame[generator.randrange(len(frame) + 1) :]
        elif way == 2:
            frame += generator.randbytes(generator.randrange(1, 100))
        elif way == 3:
            offset, size = generator.choice(FIELDS)
            frame[offset : offset + size] = (generator.choice(EXTREMES) % 256**size).to_bytes(size, "little")
        elif way == 4:  # somewhere in what is said of the tensors
            offset, size = generator.randrange(FIXED, 2 * FIXED), generator.choice((1, 8))
            frame[offset : offset + size] = (generator.choice(EXTREMES) % 256**size).to_bytes(size, "little")
        else:
            other = generator.choice(frames)
            frame[generator.randrange(len(frame) + 1) :] = other[generator.randrange(len(other) + 1) :]
    return _mended(frame) if generator.random() < 0.5 else frame


ERRORS = (
    "says that it has",
    "checksum does not fit",
    "the fixed part alone has",
    "header and tensors have",
    "; expected activations, collect",
    "known are 0 to",
    "longer than the frame",
    "were agreed",
    "other than zeros",
    "is cut off",
    "not a milkglass frame",
    "dtype code",
    "not UTF-8",
    "two tensors of one name",
    "expected one from 0 on",
    "of version",
    "other than 0 and 1",
    "; expected bfloat16 or float32 or float64 (up to 6)x3",
    " holds ",
    "; expected int64 (up to 6)",
    " lacks ",
)


def _judge(frame: bytes | bytearray, limits: Limits | None) -> str:
    """How the decoder took a frame: "message", or words of its error. Anything but a MessageError goes through."""
    try:
        message = decode(frame, limits)
    except MessageError as error:
        line = str(error)
        return line if "\n" in line else next((words for words in ERRORS if words in line), line)
    assert encode(message, peek_header(frame).run) == frame
    return "message"


def _judge_many(seed: int, count: int) -> Counter[str]:
    generator, frames = random.Random(seed), _frames()
    outcomes: Counter[str] = Counter()
    for index in range(count):
        outcomes[_judge(_mutated(generator, frames), LIMITS if index % 2 else None)] += 1
    return outcomes


def _check_depth(outcomes: Counter[str]) -> None:
    """Every check of the decoder has found something, and some mutations make another good message."""
    assert outcomes.keys() == {"message", *ERRORS}
    assert outcomes["message"] > outcomes.total() / 100


def test_the_frames_that_are_mutated_are_good_ones() -> None:
    assert [_judge(frame, None) for frame in _frames()] == ["message"] * len(_frames())
    assert [_judge(_mended(bytearray(frame)), None) for frame in _frames()] == ["message"] * len(_frames())


def test_mutated_frames_are_messages_or_message_errors() -> None:
    _check_depth(_judge_many(seed=0, count=20_000))


@pytest.mark.slow
def test_a_million_mutated_frames_are_messages_or_message_errors() -> None:
    _check_depth(_judge_many(seed=1, count=1_000_000))


@given(st.sampled_from(_frames()), st.data(), st.booleans(), st.booleans())
@settings(max_examples=500, deadline=None, database=None, derandomize=True)
def test_frames_that_hypothesis_mutates_are_messages_or_message_errors(
    frame: bytes, data: st.DataObject, mended: bool, limited: bool
) -> None:
    start = data.draw(st.integers(0, len(frame)))
    end = data.draw(st.integers(start, len(frame)))
    mutated = bytearray(frame[:start] + data.draw(st.binary(max_size=40)) + frame[end:])
    _judge(_mended(mutated) if mended else mutated, LIMITS if limited else None)


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None, database=None, derandomize=True)
def test_any_bytes_are_messages_or_message_errors(noise: bytes) -> None:
    _judge(noise, None)
    _judge(_mended(bytearray(b"MGLS\x02" + noise)), None)


@contextmanager
def _memory_within(bytes_more: int) -> Iterator[None]:
    """Address space for this process, whoever asks for it: Python, numpy or torch."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + bytes_more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _claims(size: int) -> Iterator[bytearray]:
    """A frame with three sizes, all of them or one replaced by `size`, the last one by 0 or not."""
    frame = encode(Message("activations", "c", 3, {"z": torch.zeros(1, 1, 1)}))
    at = FIXED + 1 + 3 + 1
    for sizes in ((size, 1, 1), (1, 1, size), (size, size, size), (size, 0, 1), (size, size, 0), (0, size, size)):
        claiming = bytearray(frame)
        claiming[at : at + 24] = struct.pack("<QQQ", *sizes)
        yield _mended(claiming)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the size of the process from /proc")
@pytest.mark.parametrize("size", [2**30, 2**36, 2**41, 2**60, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("limits", [None, LIMITS], ids=["unlimited", "limited"])
def test_no_memory_is_taken_for_a_claim(size: int, limits: Limits | None) -> None:
    for claim in _claims(size):
        with _memory_within(2**26):
            _judge(claim, limits)
        tracemalloc.start()
        try:
            _judge(claim, limits)
            assert tracemalloc.get_traced_memory()[1] < 2**16
        finally:
            tracemalloc.stop()


def test_a_claim_of_many_tensors_takes_memory_only_as_the_frame_is_long() -> None:
    many = {f"{index:03}": torch.zeros(0) for index in range(255)}
    frame = encode(Message("activations", "c", 3, many))
    tracemalloc.start()
    try:
        assert _judge(frame, None) == "message"
        with pytest.raises(MessageError, match="holds '000'"):
            decode(frame, Limits(len(frame), AGREED, 6))
        assert tracemalloc.get_traced_memory()[1] < 100 * len(frame)
    finally:
        tracemalloc.stop()
