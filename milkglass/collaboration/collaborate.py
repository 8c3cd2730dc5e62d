"""One volunteer from start to end: what `milkglass collab` does.

The run folder holds the recipe, a line per epoch in metrics.jsonl, and at the end the network and the summary. A
volunteer that keeps checkpoints tests the network as well: any may, the run needs none that must. One that is stopped
keeps a checkpoint in any case, to go on from.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import torch

from milkglass.collaboration.admission import Admission, OpenDoor
from milkglass.collaboration.contribution import Gradients
from milkglass.collaboration.engine import P2P, P2PDaemonError
from milkglass.collaboration.identity import Identity, new_identity
from milkglass.collaboration.reduction import NOT_BEGUN
from milkglass.collaboration.replica import Replica
from milkglass.collaboration.session import Agreed, Place, connected
from milkglass.collaboration.tasks import Task, task_of
from milkglass.collaboration.token_admission import TokenAdmission, read_pass
from milkglass.collaboration.volunteer import Volunteer
from milkglass.errors import LinkError, MessageError, RecipeError, RunError, first_line
from milkglass.parties import Party
from milkglass.randomness import Source
from milkglass.recipe import Recipe
from milkglass.runs import Checkpoint, RunFolder, damaged
from milkglass.training.setup import optimizer, rate
from milkglass.training.split import computing_with

NETWORK: Final = "network.safetensors"
_MOST_RESTARTS: Final = 3
"""Of the daemon, in an hour."""
_RESTART_SECONDS: Final = 3600.0
_STATE: Final = "volunteer"
_BLANK: Final = ("recipe.toml", "records.sha256")


@final
@dataclass(frozen=True)
class Membership:
    """Who a volunteer is, and by what right. renew, keep_renewing: of its token, given the daemon; None: no need."""

    identity: Identity
    admission: Admission
    addresses: tuple[str, ...] = ()
    renew: Callable[[P2P], Awaitable[None]] | None = None
    keep_renewing: Callable[[P2P], Awaitable[None]] | None = None
    withdrawn: Callable[[], str | None] = lambda: None


def membership(folder: Path | None, run: str) -> Membership:
    """By the folder that an authority gave out; None: the door is open, and the key is new."""
    if folder is None:
        return Membership(new_identity(), OpenDoor())
    own = read_pass(folder)
    admission = TokenAdmission(own, run)
    return Membership(
        own.identity,
        admission,
        own.addresses,
        admission.renew,
        admission.keep_renewing,
        lambda: admission.withdrawn,
    )


@final
class Diary:
    """What a volunteer writes into its run folder. checkpoints: keep states and test them, now and then."""

    def __init__(
        self, folder: RunFolder, task: Task, replica: Replica, note: Callable[[str], None], *, checkpoints: bool
    ):
        self._folder, self._task, self._replica, self._note, self._checkpoints = (
            folder,
            task,
            replica,
            note,
            checkpoints,
        )
        self._cannot_write = False
        self._seconds = folder.recipe.client.checkpoint_seconds
        self._kept_at, self._kept_epoch = time.monotonic(), replica.epoch
        self._lines = self._length_bytes = 0  # of metrics.jsonl
        self._unwritten: list[dict[str, Any]] = []

    def resume(self) -> None:
        """Go on from the newest checkpoint, where there is one. Raises RunError for a damaged one, or metrics.jsonl."""
        checkpoint = self._folder.load_checkpoint()
        if checkpoint is None:
            self._note("no checkpoint here: beginning at epoch 0")
            self._folder.cut_metrics(0)
            return
        try:
            content = checkpoint.parties[_STATE]["state"].numpy().tobytes()
            self._lines = checkpoint.progress["lines"]
            self._replica.load(content)
            self._length_bytes = self._folder.cut_metrics(self._lines)
        except Exception as error:
            raise damaged(checkpoint, error) from None
        self._kept_epoch = self._replica.epoch

    def epoch(self, line: dict[str, Any]) -> dict[str, Any]:
        """Note an epoch; what was tested is in the line that comes back."""
        due = self._checkpoints and time.monotonic() - self._kept_at >= self._seconds
        if due:
            line = line | {f"test_{name}": value for name, value in self._task.test().items()}
        self._unwritten.append(line)
        try:
            self._write_lines()
            if due:
                self._keep()
        except RunError as error:  # a full disk, say: the others need this volunteer's work all the same
            self._checkpoints = False
            if not self._cannot_write:
                self._note(f"{error}; going on without checkpoints")
            self._cannot_write = True
        return line

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """The network and the summary. Raises RunError where they cannot be written."""
        self._write_lines()
        self._folder.write_tensors(NETWORK, self._task.network.state_dict())
        tested = self._task.test()
        content = {"accuracy": tested["accuracy"], "test": tested, **summary}
        self._folder.write_json("summary.json", content)
        return content

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever ends the training inside before its end: keep a checkpoint first, where there is anything new."""
        try:
            yield
        except BaseException:
            if self._replica.epoch != self._kept_epoch:
                try:
                    self._write_lines()
                    self._keep()
                except (RunError, MessageError) as error:
                    self._note(f"{error}; stopping without a new checkpoint")
            raise

    def _write_lines(self) -> None:
        """Those of the last epoch, and those that a full disk had no room for."""
        self._length_bytes = self._folder.append_metrics(self._unwritten, self._length_bytes)
        self._lines += len(self._unwritten)
        self._unwritten = []

    def _keep(self) -> None:
        """Raises RunError where it cannot be written, MessageError within a step."""
        known = self._replica.version
        version, content = self._replica.save()
        if version != known:
            raise MessageError(f"stopped in the middle of step {version.epoch + 1}")
        state = {"state": torch.frombuffer(bytearray(content), dtype=torch.uint8)}
        self._folder.save_checkpoint(Checkpoint(version.epoch, {_STATE: state}, {"lines": self._lines}))
        self._kept_at, self._kept_epoch = time.monotonic(), version.epoch


def collaborate(
    recipe: Recipe,
    out: Path,
    place: Place,
    *,
    pass_folder: Path | None = None,
    key: Source | None = None,
    checkpoints: bool = False,
    resume: bool = False,
    ready: Callable[[list[str]], None],
    told: Callable[[dict[str, Any]], None],
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Take part in a run to its end; what summary.json holds.

    pass_folder: from the authority. key: private: order of records and dropout; None: a new one. ready: is given the
    addresses, once others can come. told: a line for each epoch. note: a sentence now and then.

    Raises MilkglassError, one line.
    """
    if not recipe.parties.is_collaboration:
        raise RecipeError(f"parties.mode is {recipe.parties.mode!r}; `milkglass collab` needs 'collaboration'")
    own = membership(pass_folder, recipe.collaboration.run)
    place = replace(place, peers=(*place.peers, *own.addresses))
    with computing_with(recipe.threads):
        task = task_of(recipe)
        source = key or Source(os.urandom(32))
        party = Party(task.network, optimizer(recipe, task.network), source, rate=rate(recipe))
        section = recipe.collaboration
        digest = hashlib.sha256(f"{recipe.digest()} {task.agreement}".encode()).digest()
        replica = Replica(party, digest, robust=section.robust)
        gradients = Gradients(
            task,
            replica,
            source,
            recipe.training.batch_size,
            density=section.density if section.compress == "gaussian_k" else None,
            mixed=section.precision == "bfloat16",
            robust=section.robust,
        )
        folder = _folder(out, recipe, task.digest, resume=resume)
        with folder.locked():
            diary = Diary(folder, task, replica, note, checkpoints=checkpoints)
            if resume:
                diary.resume()
            volunteer = Volunteer(
                replica,
                gradients,
                place,
                digest,
                section.epochs,
                longest_batch_seconds=NOT_BEGUN * section.timeout_seconds,
                first_peers=section.first_peers,
                told=lambda line: told(diary.epoch(line)),
                note=note,
                withdrawn=own.withdrawn,
            )
            agreed = Agreed(recipe, task.agreement, digest)
            with diary.kept(), _in_one_line():
                session = _to_the_end(agreed, own, replica, place, volunteer, ready, note)
            return diary.finish(_summary(recipe, volunteer, session))


def _folder(out: Path, recipe: Recipe, records_digest: str, *, resume: bool) -> RunFolder:
    """The run folder. One that waits for its first epoch, as where nobody answered, is made anew."""
    if not resume and (out / "recipe.toml").is_file() and {file.name for file in out.iterdir()} <= set(_BLANK):
        with RunFolder(out, recipe).locked():
            for name in _BLANK:
                (out / name).unlink(missing_ok=True)
    return (RunFolder.resume if resume else RunFolder.create)(out, recipe, records_digest)


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Inside, a call of a daemon that lives may fail: that raises LinkError."""
    try:
        yield
    except (ConnectionError, P2PDaemonError, asyncio.IncompleteReadError) as error:
        raise LinkError(
            f"the peer-to-peer daemon runs, but a call of it failed ({first_line(error)}); start the volunteer again"
        ) from None


def _to_the_end(
    agreed: Agreed,
    own: Membership,
    replica: Replica,
    place: Place,
    volunteer: Volunteer,
    ready: Callable[[list[str]], None],
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Train, in a new session where the daemon of the old one has died; what the sessions sent in all."""
    known, restarts, sent = place.peers, 0, 0
    ended: list[float] = []
    while True:
        here = replace(place, peers=known)
        with connected(agreed, own.identity, own.admission, replica, here, volunteer.report, own.renew) as session:
            if own.keep_renewing is not None:
                session.node.begin(own.keep_renewing(session.node.p2p))  # type: ignore[arg-type]
            ready(session.node.addresses)
            try:
                volunteer.train(session)
                if session.others:
                    volunteer.wait_for_others(session, agreed.recipe.collaboration.timeout_seconds)
                return {"state_bytes_sent": sent + session.states.bytes_sent, "daemon_restarts": restarts}
            except (ConnectionError, LinkError):
                restarts, sent = restarts + 1, sent + session.states.bytes_sent
                if session.node.alive:
                    raise
                ended = _within_an_hour([*ended, time.monotonic()])
                if len(ended) > _MOST_RESTARTS:
                    raise LinkError(
                        f"the peer-to-peer daemon has ended {len(ended)} times in an hour; expected one that lasts"
                    ) from None
                known = tuple(dict.fromkeys([*place.peers, *session.known]))
        note("the peer-to-peer daemon has ended; starting another, to go on where it was")


def _within_an_hour(times: list[float]) -> list[float]:
    """Those in the hour up to the last."""
    return [each for each in times if times[-1] - each < _RESTART_SECONDS]


def _summary(recipe: Recipe, volunteer: Volunteer, session: dict[str, Any]) -> dict[str, Any]:
    tally = volunteer.tally
    return {
        "epochs": recipe.collaboration.epochs,
        "distance_correlation": None,
        "defense": "none",
        "samples": tally.samples,
        "wasted_samples": tally.wasted,
        "failed_averagings": tally.failed_rounds,
        "state_downloads": tally.downloads,
        "bytes_sent": tally.bytes_sent,
        "bytes_received": tally.bytes_received,
        **session,
        "messages": 0,
        "wire": [],
        "seconds": tally.seconds,
        "seconds_per_epoch": tally.seconds / max(tally.epochs, 1),
        "certificate": None,
        "seed": recipe.seed,
        "keys": "the volunteer's own key",
        "cautions": ["gradients go to strangers: private data do not belong into an open collaboration"],
        "recipe_digest": recipe.digest(),
        "state": volunteer.report().states[-1][1].hex(),
    }
