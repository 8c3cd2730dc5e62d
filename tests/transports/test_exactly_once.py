"""Every message has its effect once, whatever the wire, the disk and death do."""

from __future__ import annotations

import errno
import itertools
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from milkglass.codec import Limits, decode, encode
from milkglass.errors import MessageError, RunError
from milkglass.messages import Addressed, Message
from milkglass.transports.exactly_once import Sender, Taker
from tests.transports.unreliable import (
    LIMITS,
    RUN,
    Apart,
    Machine,
    Together,
    World,
    as_tensor,
    digest,
    random_events,
)

Make = Callable[[Sequence[str]], Machine]
WORLDS: dict[str, tuple[Make, list[str], int]] = {
    "one client": (Apart, ["ann"], 1),
    "one client, in pieces": (Apart, ["ann"], 3),
    "three apart, in pieces": (Apart, ["ann", "ben", "cas"], 2),
    "three together": (Together, ["ann", "ben", "cas"], 1),
    "two together, in pieces": (Together, ["ann", "ben"], 3),
}
STEPS = 6


def _world(folder: Path, which: str, **more: Any) -> World:
    make, names, pieces = WORLDS[which]
    return World(folder, make, names, steps=STEPS, pieces=pieces, **more)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], World]]:
    """How each world ends where nothing goes wrong."""
    done = {}
    for which in WORLDS:
        world = _world(tmp_path_factory.mktemp("undisturbed"), which)
        done[which] = world.run(iter(())), world
    return done


Undisturbed = dict[str, tuple[dict[str, Any], World]]


def _check(which: str, world: World, states: dict[str, Any], undisturbed: Undisturbed) -> None:
    """The same last states, each message once, and never two frames of one number."""
    expected, calm = undisturbed[which]
    assert states == expected
    counts = states["server"][1]
    assert counts == dict.fromkeys(world.names, STEPS * world.pieces)
    assert all(len(frames) == 1 for frames in calm.seen.values())
    assert world.seen == calm.seen, "the same bytes as the undisturbed run's, however often"


@pytest.mark.parametrize("which", WORLDS)
def test_the_undisturbed_run_is_a_plain_loop_over_the_service(which: str, undisturbed: Undisturbed) -> None:
    make, names, pieces = WORLDS[which]
    machine, states = make(names), dict.fromkeys(names, b"")
    for step in range(STEPS):
        answers: dict[str, list[bytes]] = {name: [] for name in names}
        for piece, name in itertools.product(range(pieces), names):
            content = {"z": as_tensor(digest(name, step, piece, states[name]))}
            for to, answer in machine.receive(Message("activations", name, step, content, piece, pieces)):
                answers[to].append(answer.tensors["g"].numpy().tobytes())
        states = {name: digest(states[name], step, answers[name]) for name in names}
    assert undisturbed[which][0] == {"server": machine.state(), **states}


@pytest.mark.parametrize("which", WORLDS)
def test_whatever_goes_wrong_ends_like_the_undisturbed_run(
    tmp_path: Path, which: str, undisturbed: Undisturbed
) -> None:
    _disturb(tmp_path, which, range(25), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("which", WORLDS)
def test_whatever_goes_wrong_many_times(tmp_path: Path, which: str, undisturbed: Undisturbed) -> None:
    _disturb(tmp_path, which, range(25, 325), undisturbed)


def _disturb(folder: Path, which: str, seeds: range, undisturbed: Undisturbed) -> None:
    killed = 0
    for seed in seeds:
        world = _world(folder / str(seed), which)
        states = world.run(random_events(random.Random(seed), 800))
        _check(which, world, states, undisturbed)
        killed += world.killed
        assert world.left_on_disk() == dict.fromkeys(world.names, 2) | {"server": 1}
        shutil.rmtree(folder / str(seed))
    assert killed > len(seeds) * 5


_PLACES = st.integers(0, 20).map(str)
_WAYS = st.sampled_from(["to_server", "to_clients"])
_EVENTS = st.one_of(
    _PLACES.map("work {}".format),
    st.tuples(_PLACES, _WAYS).map("arrive {0[0]} {0[1]}".format),
    st.tuples(_PLACES, _WAYS).map("arrive {0[0]} {0[1]} again".format),
    st.tuples(_PLACES, _WAYS).map("lose {0[0]} {0[1]}".format),
    _PLACES.map("retry {}".format),
    _PLACES.map("keep {}".format),
    _PLACES.map("kill {}".format),
    st.tuples(st.integers(0, 5), st.sampled_from(["before", "half", "after"])).map("fuse {0[0]} {0[1]}".format),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.sampled_from(sorted(WORLDS)), events=st.lists(_EVENTS, max_size=120))
def test_any_sequence_of_events_ends_like_the_undisturbed_run(
    undisturbed: Undisturbed, which: str, events: list[str]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = _world(Path(folder), which)
        _check(which, world, world.run(iter(events)), undisturbed)


def _turns(which: str) -> Iterator[str]:
    """A run in which everybody keeps its state now and then, with a frame or two on the wire."""
    parties = len(WORLDS[which][1]) + 1
    for turn in range(STEPS * 4):
        for place in range(parties - 1):
            for _ in range(3):
                yield f"work {place}"
        yield from ("arrive 0 to_server", "arrive 0 to_server", f"keep {parties - 1}")
        yield from (f"arrive 0 {way}" for way in ["to_server", "to_clients"] * 4)
        yield from (f"keep {turn + place}" for place in range(2))


@pytest.mark.parametrize("way", ["before", "half", "after"])
@pytest.mark.parametrize("which", WORLDS)
def test_death_at_every_operation_of_the_disk(tmp_path: Path, which: str, way: str, undisturbed: Undisturbed) -> None:
    quiet = _world(tmp_path / "quiet", which)
    _check(which, quiet, quiet.run(_turns(which)), undisturbed)
    assert quiet.killed == 0
    assert quiet.disk.operations > 30
    for operation in range(quiet.disk.operations):
        world = _world(tmp_path / str(operation), which)
        states = world.run(itertools.chain([f"fuse {operation} {way}"], _turns(which)))
        _check(which, world, states, undisturbed)
        assert world.killed == 1
        shutil.rmtree(tmp_path / str(operation))


def test_what_was_drawn_for_a_message_is_never_drawn_again(tmp_path: Path) -> None:
    """A client whose every draw is another one: what left once is what counts, and is all that ever leaves."""
    for seed, which in itertools.product(range(8), WORLDS):
        draws = itertools.count()
        world = _world(tmp_path / f"{seed} {which}", which, draw=lambda *_, draws=draws: digest(next(draws)))
        states = world.run(random_events(random.Random(seed), 600))
        assert all(len(frames) == 1 for frames in world.seen.values())
        make, names, _ = WORLDS[which]
        machine = make(names)
        sent = sorted((number, party) for way, party, number in world.seen if way == "to server")
        for number, party in sent:
            (frame,) = world.seen["to server", party, number]
            for to, answer in machine.receive(decode(frame)):
                (told,) = world.seen["to client", to, number]
                assert decode(told).tensors["g"].tolist() == answer.tensors["g"].tolist()
        assert states["server"] == machine.state()


# -- one thing at a time


def _message(step: int, piece: int = 0, pieces: int = 1, content: object = None, party: str = "ann") -> Message:
    return Message("activations", party, step, {"z": as_tensor(digest(content or step))}, piece, pieces)


def _taker(folder: Path, service: Any = None, window: int = 2, limits: Limits = LIMITS) -> Taker:
    machine = service or Apart(["ann", "ben"])
    return Taker(machine, {"ann": limits, "ben": limits}, run=RUN, window=window, folder=folder)


def _take(taker: Taker, party: str, frame: bytes) -> list[tuple[str, bytes]]:
    """What a server tells whom: of a new message what is due, of one that it knows its answer, if that is there."""
    message = taker.check(party, frame)
    answer = taker.again(party, message, frame)
    if answer is None:
        return taker.take(party, message, frame)
    return [(party, answer)] if answer else []


def _numbered(message: Message, number: int, run: int = RUN) -> bytes:
    return encode(Message(**{**vars(message), "number": number}), run)


def test_a_retry_gets_the_answer_that_it_got(tmp_path: Path) -> None:
    machine = Apart(["ann", "ben"])
    taker = _taker(tmp_path, machine)
    frames = [_numbered(_message(step), step) for step in range(3)]
    answers = [_take(taker, "ann", frame) for frame in frames]
    before = machine.state()
    for number in (2, 1, 2):
        assert _take(taker, "ann", frames[number]) == answers[number]
    assert machine.state() == before
    assert taker.messages == taker.count == 3


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (_numbered(_message(4), 4), "message 4 of ann; expected 3: some are missing"),
        (_numbered(_message(2, content="other"), 2), "message 2 of ann was another one when it came first"),
        (_numbered(_message(0), 0), "message 0 of ann came long ago, the next is 3: its run folder is older than the"),
        (_numbered(_message(3), 3, RUN + 1), "frame of another run: 8000000000000006; this one is 8000000000000005"),
        (_numbered(_message(3, party="ben"), 3), "a frame of 'ben' came from 'ann': that is the name in its certi"),
        (_numbered(Message("goodbye", "ann", 0), 3), "frame of kind 'goodbye' from 'ann'; expected activations, gra"),
    ],
    ids=["a gap", "another frame under its number", "too old", "another run", "another's name", "not agreed"],
)
def test_what_is_refused_changes_nothing(tmp_path: Path, frame: bytes, words: str) -> None:
    machine = Apart(["ann", "ben"])
    taker = _taker(tmp_path, machine)
    for step in range(3):
        _take(taker, "ann", _numbered(_message(step), step))
    before, size = (machine.state(), taker.state()), taker.size_bytes
    with pytest.raises(MessageError, match=re.escape(words)) as caught:
        _take(taker, "ann", frame)
    assert "\n" not in str(caught.value)
    assert machine.state() == before[0]
    assert taker.state()[1] == before[1][1]
    assert taker.size_bytes == size
    assert _take(taker, "ann", _numbered(_message(3), 3))


def test_no_more_than_the_window_may_be_unanswered(tmp_path: Path) -> None:
    taker = _taker(tmp_path, Together(["ann", "ben"]), window=2)
    for step in range(2):
        assert _take(taker, "ann", _numbered(_message(step), step)) == []
    for step in range(2):
        assert _take(taker, "ann", _numbered(_message(step), step)) == [], "it is still to come"
    with pytest.raises(MessageError, match="ann has 2 messages unanswered; at most 2"):
        _take(taker, "ann", _numbered(_message(2), 2))
    assert taker.owes("ann")
    assert not taker.owes("ben")
    assert len(_take(taker, "ben", _numbered(_message(0, party="ben"), 0))) == 2
    assert _take(taker, "ann", _numbered(_message(2), 2)) == []


def test_a_message_that_the_service_refuses_is_not_taken(tmp_path: Path) -> None:
    taker = _taker(tmp_path)
    for frame in (_numbered(_message(0, 1, 2), 0), _numbered(_message(0, 1, 3), 0)):
        with pytest.raises(MessageError, match="does not follow"):
            _take(taker, "ann", frame)
    assert taker.count == taker.size_bytes == 0
    assert _take(taker, "ann", _numbered(_message(0), 0)), "the same number, with what may come"


def test_a_client_with_an_old_folder_is_refused_with_one_line(tmp_path: Path) -> None:
    """Or goes on, where it is so little older that the server still has all it asks for; nothing is taken twice."""
    machine = Apart(["ann", "ben"])
    taker = _taker(tmp_path / "server", machine)
    sender = Sender(tmp_path / "ann")

    def step(sender: Sender, number: int) -> None:
        frame, leaves = sender.send(_message(number), RUN)
        if leaves:
            ((_, answer),) = _take(taker, "ann", frame)
            sender.received(answer, LIMITS, RUN)
        assert sender.answer() is not None

    for number in range(6):
        step(sender, number)
        shutil.copytree(tmp_path / "ann", tmp_path / f"after {number}")
    before = machine.state()
    for number in (4, 5):
        old = Sender(tmp_path / f"after {number}")
        for again in range(6):
            step(old, again)
        assert machine.state() == before
    for number in (0, 2):
        old = Sender(tmp_path / f"after {number}")
        for again in range(number + 1):
            step(old, again)
        with pytest.raises(MessageError, match=rf"message {number + 1} of ann came long ago, the next is 6: its run "):
            step(old, number + 1)
        assert machine.state() == before


def test_a_resumed_client_that_says_something_else_is_another_runs(tmp_path: Path) -> None:
    sender = Sender(tmp_path)
    sender.send(_message(0), RUN)
    sender.close()
    for other in (_message(1), _message(0, 0, 2)):
        resumed = Sender(tmp_path)
        if other.step == 0:
            assert resumed.send(other, RUN)[0] == _numbered(_message(0), 0), "the bytes that were kept"
            continue
        words = "message 0 was 'activations' of step 0; this client is at 'activations' of step 1, message 0"
        with pytest.raises(RunError, match=words):
            resumed.send(other, RUN)


def test_answers_come_in_order_once_and_only_to_what_was_asked(tmp_path: Path) -> None:
    sender = Sender(tmp_path)
    frames = [sender.send(_message(0, piece, 3), RUN)[0] for piece in range(3)]
    answers = [
        _numbered(Message("gradients", "server", 0, {"g": as_tensor(digest(piece))}), piece) for piece in range(4)
    ]
    assert sender.again() == frames
    for number in (2, 3, 1, 2):
        sender.received(answers[number], LIMITS, RUN)
        assert sender.answer() is None
    assert sender.again() == frames[:1]
    assert sender.awaited == 0
    for bad, words in (
        (answers[0][:-1], "truncated"),
        (_numbered(decode(answers[0]), 0, RUN + 1), "frame of another run"),
        (_numbered(Message("gradients", "server", 0, {"g": torch.zeros(16)}), 0), "expected uint8 16"),
        (b"no frame at all, but as long as the fixed part of one is", "not a milkglass frame"),
    ):
        with pytest.raises(MessageError, match=words):
            sender.received(bad, LIMITS, RUN)
        assert sender.again() == frames[:1]
    sender.received(answers[0], LIMITS, RUN)
    for answer in answers[:3]:
        found = sender.answer()
        assert found is not None
        assert (encode(found[0], RUN), found[1]) == (answer, len(answer))
    assert sender.answer() is None
    assert sender.awaited is None


def test_a_checkpoint_must_wait_for_answers_and_for_what_was_said_before(tmp_path: Path) -> None:
    sender = Sender(tmp_path)
    frame, _ = sender.send(_message(0), RUN)
    with pytest.raises(RunError, match="message 0 is not answered yet"):
        sender.rotate()
    taker = _taker(tmp_path / "server")
    ((_, answer),) = _take(taker, "ann", frame)
    sender.received(answer, LIMITS, RUN)
    assert sender.answer() is not None
    sender.send(_message(1), RUN)
    sender.close()
    resumed = Sender(tmp_path)
    assert not resumed.caught_up
    resumed.send(_message(0), RUN)
    assert resumed.answer() is not None
    assert not resumed.caught_up
    with pytest.raises(RunError, match=r"sent holds more than was said again: no time for a checkpoint"):
        resumed.rotate()
    resumed.send(_message(1), RUN)
    assert resumed.caught_up


def test_a_checkpoint_right_after_another_changes_nothing(tmp_path: Path) -> None:
    sender, taker = Sender(tmp_path / "ann"), _taker(tmp_path / "server", Together(["ann", "ben"]))
    _take(taker, "ben", _numbered(_message(0, party="ben"), 0))
    for _ in range(3):
        sender.rotate()
        taker.rotate()
    frame, _ = sender.send(_message(0), RUN)
    sender.close()
    again = Sender(tmp_path / "ann")
    assert again.send(_message(0, content="drawn anew"), RUN) == (frame, True)
    taker.close()
    resumed = Taker(
        Together(["ann", "ben"]),
        dict.fromkeys(("ann", "ben"), LIMITS),
        run=RUN,
        window=2,
        folder=tmp_path / "server",
        count=taker.count,
    )
    resumed.replay()
    assert len(_take(resumed, "ann", frame)) == 2, "what was held is there"


# -- a disk that is full


def _full(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fails)


def test_after_a_full_disk_a_server_takes_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in its memory is ahead of its journal: what came after would build on what a restart forgets."""
    taker = _taker(tmp_path)
    _take(taker, "ann", _numbered(_message(0), 0))
    with monkeypatch.context() as patched:
        _full(patched)
        with pytest.raises(RunError, match=r"cannot write .*: No space left on device; what was written before is"):
            _take(taker, "ann", _numbered(_message(1), 1))
    for party, number in (("ann", 1), ("ann", 2), ("ben", 0)):
        with pytest.raises(RunError, match=r"nothing more is taken, after: cannot write .* No space left on device"):
            _take(taker, party, _numbered(_message(number, party=party), number))
    with pytest.raises(RunError, match="nothing more is taken"):
        taker.rotate()
    resumed = _taker(tmp_path)
    resumed.replay()
    calm = _taker(tmp_path / "calm")
    for number in range(3):
        frame = _numbered(_message(number), number)
        assert _take(resumed, "ann", frame) == _take(calm, "ann", frame)


def test_after_any_other_fault_of_the_service_nothing_more_is_taken(tmp_path: Path) -> None:
    class Fails:
        def receive(self, message: Message) -> list[Addressed]:
            raise ZeroDivisionError("as a stage of a user's own may")

    taker = _taker(tmp_path, Fails())
    with pytest.raises(ZeroDivisionError):
        _take(taker, "ann", _numbered(_message(0), 0))
    with pytest.raises(RunError, match="nothing more is taken, after: as a stage of a user's own may"):
        _take(taker, "ben", _numbered(_message(0, party="ben"), 0))
    assert taker.size_bytes == 0


def test_after_a_full_disk_a_client_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sender, taker = Sender(tmp_path / "ann"), _taker(tmp_path / "server")
    frame, _ = sender.send(_message(0), RUN)
    ((_, answer),) = _take(taker, "ann", frame)
    with monkeypatch.context() as patched:
        _full(patched)
        with pytest.raises(RunError, match="No space left on device"):
            sender.received(answer, LIMITS, RUN)
        with pytest.raises(RunError, match="No space left on device"):
            sender.send(_message(1), RUN)
    assert sender.again() == [frame]
    assert sender.number == 1
    resumed = Sender(tmp_path / "ann")
    assert resumed.send(_message(0, content="drawn anew"), RUN) == (frame, True)
    assert _take(taker, "ann", frame) == [("ann", answer)]
    resumed.received(answer, LIMITS, RUN)
    assert resumed.answer() is not None
