"""The volunteer's training: add up gradients until all together have a batch, average, step; again and again.

DeDLOC (Diskin et al. 2021, arXiv 2106.10207) on hivemind's network and matchmaking; with any number of volunteers that
come and go it is large-batch training. hivemind's own optimizer is not used: it believes the largest epoch that anybody
claims, steps along its own gradients where an averaging fails, and averages weights again at every epoch to make up
for that. Here a step is made along the common average or not at all: an averaging that fails is done again with those
who are there, and whoever missed one takes over the state of the others.
"""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, final

from milkglass.collaboration.contribution import Gradients
from milkglass.collaboration.engine import get_dht_time
from milkglass.collaboration.group import Group
from milkglass.collaboration.identity import short_name
from milkglass.collaboration.parts import RoundFailedError
from milkglass.collaboration.progress import KEPT_STATES, Progress, Report
from milkglass.collaboration.reduction import Outcome
from milkglass.collaboration.replica import Replica
from milkglass.collaboration.session import Place, Session
from milkglass.errors import LinkError, MessageError, MilkglassError

LEAD_SECONDS: Final = 0.5
"""A group is looked for so long before the batch is expected to be full."""
_POLL_SECONDS: Final = 0.02
_LINGER_SECONDS: Final = 0.5
_RATE_MEMORY: Final = 0.8
_MOST_NOT_FINITE: Final = 20


@final
@dataclass
class Tally:
    """What a volunteer has done. wasted: records whose gradients went into no step."""

    samples: int = 0
    wasted: int = 0
    failed_rounds: int = 0
    downloads: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    epochs: int = 0
    seconds: float = 0.0


@final
class Volunteer:
    """One volunteer's training. recipe_digest: of what all agreed on. epochs: the run's end.

    longest_batch_seconds: who computes one batch for longer is left out by the others. first_peers: so many that train
    take the run's first step together.

    told: is given a line of metrics.jsonl after each epoch. note: is given a sentence now and then.
    """

    def __init__(
        self,
        replica: Replica,
        gradients: Gradients,
        place: Place,
        recipe_digest: bytes,
        epochs: int,
        *,
        longest_batch_seconds: float,
        first_peers: int = 1,
        told: Callable[[dict[str, Any]], None],
        note: Callable[[str], None],
        withdrawn: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._replica, self._gradients, self._place, self._epochs = replica, gradients, place, epochs
        self._digest, self._told, self._note, self._withdrawn = recipe_digest, told, note, withdrawn
        self.tally = Tally()
        self._rate = 0.0
        self._not_finite = 0
        self._longest_batch_seconds, self._told_of_long_batches = longest_batch_seconds, False
        self._first_peers = first_peers
        self._states: list[tuple[int, bytes]] = []
        self._frozen: Report | None = None
        self._epoch_began = time.monotonic()
        self._matching: concurrent.futures.Future[Group | None] | None = None
        self._ready_since: float | None = None
        self.remember()

    def report(self) -> Report:
        """What this volunteer says of itself now."""
        if (frozen := self._frozen) is not None:
            return replace(frozen, time=get_dht_time())
        return Report(
            epoch=self._replica.epoch,
            samples=self._gradients.samples,
            rate=self._rate,
            time=get_dht_time(),
            reachable=self._place.reachable,
            trains=self._place.trains,
            recipe=self._digest,
            history=self._replica.history,
            states=tuple(self._states),
            loss=self._gradients.loss,
        )

    def remember(self) -> None:
        """Note what the state hashes to, for others who download it."""
        version = self._replica.version
        self._states = [*self._states, (version.epoch, version.digest)][-KEPT_STATES:]

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return self._replica.epoch >= self._epochs

    def train(self, session: Session) -> None:
        """To the run's end. Raises LinkError where the daemon ends or the admission is withdrawn."""
        session.look()
        session.measure_first()
        session.board.is_newcomer = not self._is_first(session)
        while self._is_early(session):
            self._check(session)
            time.sleep(_POLL_SECONDS)
        while not self.finished:
            self._check(session)
            self._turn(session)

    def _check(self, session: Session) -> None:
        withdrawn = self._withdrawn()
        if withdrawn is not None:
            raise LinkError(withdrawn)
        if not session.node.alive:
            raise ConnectionError("the peer-to-peer daemon has ended")

    def _is_first(self, session: Session) -> bool:
        """Whether nobody has taken a step yet."""
        return self._replica.epoch == 0 and all(report.epoch == 0 for report in session.others.values())

    def _is_early(self, session: Session) -> bool:
        """Whether the run has not begun, and more are expected before it does."""
        here = sum(report.trains for report in session.others.values()) + self._place.trains
        return here < self._first_peers and self._is_first(session)

    def wait_for_others(self, session: Session, most_seconds: float) -> None:
        """After the end: stay while others are not there yet, for they may need our part, or the state."""
        begun = time.monotonic()
        time.sleep(_LINGER_SECONDS)
        while time.monotonic() - begun < most_seconds and session.node.alive:
            if all(report.epoch >= self._epochs for report in session.others.values()):
                return
            time.sleep(_POLL_SECONDS)

    def _turn(self, session: Session) -> None:
        progress = session.progress()
        if self._is_behind(progress):
            self._catch_up(session)
            return
        session.board.is_newcomer = False
        session.board.hurry = progress.peers > 1 and progress.seconds_left <= LEAD_SECONDS
        if session.board.hurry and self._matching is None:
            self._matching = session.find_group(progress.here)
        if not progress.ready:
            self._ready_since = None
            if self._place.trains:
                self._compute()
            else:
                time.sleep(_POLL_SECONDS)
        elif progress.peers == 1:
            self._step_alone()
        else:
            self._average(session)

    def _is_behind(self, progress: Progress) -> bool:
        """Whether others are further, or most of those at this epoch have come here another way."""
        if progress.epoch > self._replica.epoch:
            return True
        return progress.history != self._replica.history

    def _compute(self) -> None:
        begun, before = time.perf_counter(), self._gradients.samples
        self._gradients.add()
        seconds = time.perf_counter() - begun
        if seconds > self._longest_batch_seconds and not self._told_of_long_batches:
            self._told_of_long_batches = True
            self._note(
                f"a batch takes {seconds:.0f} s here, and others wait {self._longest_batch_seconds:.0f} s for who is "
                "in the middle of one: lower training.batch_size here, or raise collaboration.timeout_seconds for all"
            )
        rate = (self._gradients.samples - before) / seconds
        self._rate = rate if not self._rate else _RATE_MEMORY * self._rate + (1 - _RATE_MEMORY) * rate

    def _catch_up(self, session: Session) -> None:
        """Take over the state of the others; what was added up by now was for another one."""
        self._stop_matching()
        self.tally.wasted += self._gradients.samples
        self._gradients.forget()
        was = self._replica.epoch
        try:
            found = session.catch_up()
        except MessageError as error:
            self._note(f"behind, and no state to be had: {error}")
            time.sleep(1)
            session.look()
            return
        session.board.is_newcomer = False  # from now on others wait for this one
        self.tally.downloads += 1
        self.tally.bytes_received += found.bytes_received
        self.remember()
        checked = "" if found.checked else ", which too few others know to compare it"
        self._note(f"epoch {was}: took over the state of epoch {found.epoch} from {short_name(found.donor)}{checked}")
        self._begin_epoch()

    def _step_alone(self) -> None:
        """Nobody else is there: the mean of this volunteer's own records."""
        self._stop_matching()
        mean_D = self._mean()
        if mean_D is not None and self._gradients.samples:
            loss = self._gradients.loss or 0.0
            sent_D = self._gradients.chosen(mean_D)
            self._finish(Outcome(sent_D, self._gradients.samples, loss, 1, 0, 0), 0.0, 0.0)

    def _average(self, session: Session) -> None:
        """The batch is full: wait for the group, average with it, step."""
        now = time.monotonic()
        self._ready_since = self._ready_since or now
        if self._matching is None:
            self._matching = session.find_group(session.progress().here)
        if not self._matching.done():
            time.sleep(_POLL_SECONDS)
            return
        matching, self._matching = self._matching, None
        group = None if matching.cancelled() or matching.exception() is not None else matching.result()
        if group is None:
            self.tally.failed_rounds += 1
            return
        waited = time.monotonic() - self._ready_since
        mean_D = self._mean() if self._gradients.samples else None
        sent_D = None if mean_D is None else self._gradients.chosen(mean_D)
        samples, begun = self._gradients.samples if sent_D is not None else 0, time.monotonic()
        try:
            found = session.average(group, sent_D, samples, self._gradients.loss or 0.0, mean_D)
        except RoundFailedError as error:
            if sent_D is not None:
                self._gradients.not_sent()
            self.tally.failed_rounds += 1
            self._note(f"epoch {self._replica.epoch}: the averaging failed, and is tried again: {error}")
            return
        for peer in sorted(found.caught):
            words = "lied, or was far from all others for long: it is kept out"
            self._note(f"epoch {self._replica.epoch}: {short_name(peer)} {words}")
        if mean_D is not None:
            self._gradients.averaged(mean_D, found.vector_D)
        self._finish(found, waited, time.monotonic() - begun)

    def _mean(self) -> Any:
        mean_D = self._gradients.mean()
        if mean_D is not None:
            self._not_finite = 0
            return mean_D
        self._not_finite += 1
        if self._not_finite >= _MOST_NOT_FINITE:
            raise MilkglassError(
                f"epoch {self._replica.epoch}: gradients are not finite, {self._not_finite} times in a row; training "
                "has diverged: lower training.learning_rate"
            )
        return None

    def _finish(self, found: Outcome, waited: float, averaging_seconds: float) -> None:
        own = self._gradients.samples
        self._frozen = (
            self.report()
        )  # the event loop tells the others meanwhile: never the new epoch with the old batch
        self._replica.step(found.vector_D)
        self.remember()
        self._gradients.forget()
        self._frozen = None
        self.tally.samples += own
        self.tally.bytes_sent += found.sent
        self.tally.bytes_received += found.received
        line = {
            "epoch": self._replica.epoch,
            "loss": found.loss,
            "peers": found.members,
            "samples": own,
            "group_samples": found.samples,
            "seconds": time.monotonic() - self._epoch_began,
            "matchmaking_seconds": waited,
            "averaging_seconds": averaging_seconds,
            "bytes_sent": found.sent,
            "bytes_received": found.received,
        }
        self.tally.epochs += 1
        self.tally.seconds += line["seconds"]
        self._begin_epoch()
        self._told(line)

    def _begin_epoch(self) -> None:
        self._epoch_began = time.monotonic()
        self._ready_since = None

    def _stop_matching(self) -> None:
        if self._matching is not None:
            self._matching.cancel()
            self._matching = None
