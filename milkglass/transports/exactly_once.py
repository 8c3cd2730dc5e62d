"""Every message has its effect once, whatever happens on the way or to either process.

A client's messages are numbered. What it sends is in its outbox before it leaves, what it receives in its inbox before
it is used; a retry sends the very same bytes. A server keeps what it has taken in its own inbox before it answers; a
number that it has taken already gets the answer it got, and nothing is computed again. A party that died goes on from
its checkpoint: it computes again what followed, from its journals, and so arrives where it was; nobody else goes back.

Nothing here waits or talks to a network: `Sender` is the client's half, `Taker` the server's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, final

import torch
from torch import Tensor

from milkglass.codec import Limits, decode, encode, glance, peek_header
from milkglass.errors import MessageError, RunError
from milkglass.messages import Message, Service
from milkglass.transports.journal import Journal

Frames = list[tuple[str, bytes]]
"""Frames, each with the party that it is for."""


class Taking(Protocol):
    """Who takes the clients' frames: a `Taker`, or where a message changes nothing, a `QueryTaker`."""

    def owes(self, party: str) -> bool:
        """Whether a message of that client waits for others before it is answered."""
        ...

    def check(self, party: str, frame: bytes) -> Message:
        """The message in a frame from `party`. Raises MessageError unless it is one that may come from there now."""
        ...

    def again(self, party: str, message: Message, frame: bytes) -> bytes | None:
        """The answer that it got before; b"" if that is still to come; None if it is new."""
        ...

    def take(self, party: str, message: Message, frame: bytes) -> Frames:
        """Take a new one: the frames that are due now."""
        ...


_FIRST: Final = 0


@final
class Sender:
    """A client's messages: numbered, kept before they leave, and matched with their answers.

    folder: where the journals lie. number: of the first message since the checkpoint that the client went on from.
    """

    def __init__(self, folder: Path, number: int = _FIRST) -> None:
        self._folder = folder
        self._next = self._expected = number
        self._outbox = Journal(self._path("sent", number))
        self._inbox = Journal(self._path("received", number))
        self._unanswered: dict[int, bytes] = {}
        self._answers: dict[int, tuple[Message, int]] = {}
        self._sent_before = deque(self._outbox.frames())
        self._answered_before = {peek_header(frame).number: frame for frame in self._inbox.frames()}
        _remove_others(folder, number)

    @property
    def number(self) -> int:
        """Of the next message."""
        return self._next

    @property
    def awaited(self) -> int | None:
        """The number of the oldest message that has no answer yet; None if there is none."""
        return self._expected if self._expected < self._next else None

    @property
    def caught_up(self) -> bool:
        """Whether a resumed client has said again all that it said before: until then its journals must stay."""
        return not self._sent_before and not self._answered_before

    @property
    def size_bytes(self) -> int:
        """What the journals take on the disk."""
        return self._outbox.size_bytes + self._inbox.size_bytes

    def send(self, message: Message, run: int) -> tuple[bytes, bool]:
        """Number and keep a message: its frame, and whether that must leave now: its answer may be here already.

        Raises RunError where a resumed client does not say again what it said before.
        """
        number = self._next
        if self._sent_before:
            frame = self._sent_before.popleft()
            said = peek_header(frame)
            if (said.number, said.kind, said.step, said.piece) != (number, message.kind, message.step, message.piece):
                raise RunError(
                    f"{self._outbox.path}: message {said.number} was {said.kind!r} of step {said.step}; this client is "
                    f"at {message.kind!r} of step {message.step}, message {number}: it is another run's"
                )
        else:
            frame = encode(_numbered(message, number), run)
            self._outbox.append(frame)
        self._next += 1
        if number in self._answered_before:
            answer = self._answered_before.pop(number)
            self._answers[number] = decode(answer), len(answer)
            return frame, False
        self._unanswered[number] = frame
        return frame, True

    def again(self) -> list[bytes]:
        """What must be sent again over a new connection, in order: the same bytes."""
        return list(self._unanswered.values())

    def received(self, frame: bytes, limits: Limits, run: int) -> None:
        """Take an answer as it came in. One that is here already, or that nobody asked for, changes nothing.

        Raises MessageError for one that is damaged, of another run, or not what was agreed.
        """
        _, number, _ = glance(frame)
        if number in self._unanswered:
            message = decode(frame, limits, run)
            self._inbox.append(frame)
            del self._unanswered[number]
            self._answers[number] = message, len(frame)

    def answer(self) -> tuple[Message, int] | None:
        """The answer to the oldest message, once it is here, and how many bytes it had on the wire."""
        found = self._answers.pop(self._expected, None)
        if found is not None:
            self._expected += 1
        return found

    def rotate(self) -> None:
        """A checkpoint was written, with every message answered: begin the journals anew."""
        if self.awaited is not None:
            raise RunError(f"message {self.awaited} is not answered yet: no time for a checkpoint")
        if not self.caught_up:
            raise RunError(f"{self._outbox.path} holds more than was said again: no time for a checkpoint")
        if self._outbox.path == self._path("sent", self._next):
            return  # nothing was said since the last one
        self._outbox.begin_anew(self._path("sent", self._next))
        self._inbox.begin_anew(self._path("received", self._next))

    def close(self) -> None:
        """Close the files."""
        self._outbox.close()
        self._inbox.close()

    def _path(self, what: str, number: int) -> Path:
        return self._folder / f"{number:012d}.{what}"


@dataclass
class _Line:
    """What a server knows of one client's messages: how many it has taken and answered, and the last ones."""

    taken: int = 0
    answered: int = 0
    prints: dict[int, int] = field(default_factory=dict)  # of the frames taken last, to tell a retry from a forgery
    answers: dict[int, bytes] = field(default_factory=dict)  # the frames answered last


@final
class Taker:
    """The server's side: takes each client's numbered frames once, and gives each the same answer for ever.

    service: what computes the answers. limits: what each client may send. window: at most so many messages of a client
    may be unanswered. folder: where the journal lies; count: frames taken before the checkpoint that it went on from.
    """

    def __init__(
        self, service: Service, limits: Mapping[str, Limits], *, run: int, window: int, folder: Path, count: int = 0
    ) -> None:
        self._service = service
        self._limits = limits
        self._run = run
        self._window = window
        self._folder = folder
        self._lines = {party: _Line() for party in limits}
        self._unanswered: dict[tuple[str, int], bytes] = {}  # in the order in which they were taken
        self.count = count
        self._inbox = Journal(self._path())
        self._broken: Exception | None = None

    @property
    def size_bytes(self) -> int:
        """What the journal takes on the disk."""
        return self._inbox.size_bytes

    @property
    def messages(self) -> int:
        """All that were taken, of all clients."""
        return sum(line.taken for line in self._lines.values())

    def owes(self, party: str) -> bool:
        """Whether a message of that client has no answer yet."""
        return self._lines[party].answered < self._lines[party].taken

    def replay(self) -> None:
        """Take again, without a word to anybody, what was taken since the checkpoint."""
        for frame in self._inbox.frames():
            message = decode(frame)
            self._apply(message.party, message, frame)
            self.count += 1
        _remove_others(self._folder, int(self._inbox.path.stem))

    def check(self, party: str, frame: bytes) -> Message:
        """The message in a frame from `party`. Raises MessageError unless it is one that may come from there now."""
        self._check_whole()
        message = decode(frame, self._limits[party], self._run)
        if message.party != party:
            raise MessageError(f"a frame of {message.party!r} came from {party!r}: that is the name in its certificate")
        line = self._lines[party]
        if message.number > line.taken:
            raise MessageError(f"message {message.number} of {party}; expected {line.taken}: some are missing")
        if line.taken - line.answered >= self._window and message.number == line.taken:
            raise MessageError(f"{party} has {line.taken - line.answered} messages unanswered; at most {self._window}")
        return message

    def again(self, party: str, message: Message, frame: bytes) -> bytes | None:
        """The answer that a message got when it was taken; b"" if that is still to come; None if it is new.

        Raises MessageError for one that came too long ago, or was another one when it came first.
        """
        line = self._lines[party]
        if message.number == line.taken:
            return None
        if message.number not in line.prints:
            raise MessageError(
                f"message {message.number} of {party} came long ago, the next is {line.taken}: its run folder is older "
                "than the server's; nothing is taken twice"
            )
        if line.prints[message.number] != glance(frame)[2]:
            raise MessageError(f"message {message.number} of {party} was another one when it came first")
        return line.answers.get(message.number, b"")

    def take(self, party: str, message: Message, frame: bytes) -> Frames:
        """Take a new message: the frames that are due now. It is kept before anything is answered.

        Raises MessageError where the service refuses it, which changes nothing. After any other error nothing more is
        taken: what is in memory may be ahead of the journal, and is not to be built upon.
        """
        self._check_whole()
        try:
            due = self._apply(party, message, frame)
            self._inbox.append(frame)
        except MessageError:
            raise
        except Exception as error:
            self._broken = error
            raise
        self.count += 1
        return due

    def state(self) -> tuple[dict[str, Tensor], dict[str, dict[str, int]]]:
        """For a checkpoint, while the service rests: the last answers (bytes), and how many messages were answered.

        Those without an answer count as not taken: `rotate` puts them into the new journal.
        """
        answers = {
            f"{party}/{number}": torch.frombuffer(bytearray(frame), dtype=torch.uint8)
            for party, line in self._lines.items()
            for number, frame in line.answers.items()
        }
        prints = {
            f"{party}/{number}": torch.tensor(print_ - 2**63)
            for party, line in self._lines.items()
            for number, print_ in line.prints.items()
            if number < line.answered
        }
        told = {party: {"answered": line.answered} for party, line in self._lines.items()}
        return {
            **{f"answer.{name}": tensor for name, tensor in answers.items()},
            **{f"print.{name}": tensor for name, tensor in prints.items()},
        }, told

    def load_state(self, tensors: Mapping[str, Tensor], told: Mapping[str, Mapping[str, int]]) -> None:
        """Go on where `state` was taken; then `replay`."""
        for party, line in self._lines.items():
            line.taken = line.answered = int(told[party]["answered"])
        for name, tensor in tensors.items():
            what, _, place = name.partition(".")
            party, _, number = place.rpartition("/")
            if what == "answer":
                self._lines[party].answers[int(number)] = tensor.numpy().tobytes()
            else:
                self._lines[party].prints[int(number)] = int(tensor) + 2**63

    def rotate(self) -> None:
        """A checkpoint was written: begin the journal anew, with what has no answer yet.

        Whoever dies before that is written has not taken it, and is sent it again.
        """
        self._check_whole()
        if self._inbox.path == self._path():
            return  # nothing came since the last one
        self._inbox.begin_anew(self._path())
        for frame in self._unanswered.values():
            self._inbox.append(frame)

    def close(self) -> None:
        """Close the file."""
        self._inbox.close()

    def _path(self) -> Path:
        return self._folder / f"{self.count:012d}.received"

    def _check_whole(self) -> None:
        if self._broken is not None:
            raise RunError(f"nothing more is taken, after: {self._broken}") from self._broken

    def _apply(self, party: str, message: Message, frame: bytes) -> Frames:
        answers = self._service.receive(message)
        line = self._lines[party]
        line.prints[message.number] = glance(frame)[2]  # `check` has found that it is this frame's
        line.prints.pop(message.number - self._window, None)
        line.taken += 1
        self._unanswered[party, message.number] = frame
        return [(to, self._answer(to, answer)) for to, answer in answers]

    def _answer(self, to: str, answer: Message) -> bytes:
        """The frame of an answer, which is to the oldest message of that client that has none."""
        line = self._lines[to]
        frame = encode(_numbered(answer, line.answered), self._run)
        self._unanswered.pop((to, line.answered))
        line.answers[line.answered] = frame
        line.answers.pop(line.answered - self._window, None)
        line.answered += 1
        return frame


def _numbered(message: Message, number: int) -> Message:
    """As `dataclasses.replace` would make it, in less time."""
    return Message(message.kind, message.party, message.step, message.tensors, message.piece, message.pieces, number)


def _remove_others(folder: Path, number: int) -> None:
    """Journals of other checkpoints than the one gone on from: older ones, or of one that was never finished."""
    for file in folder.iterdir():
        if file.stem.isdecimal() and int(file.stem) != number:
            file.unlink(missing_ok=True)
