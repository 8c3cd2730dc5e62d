"""A party's work for its own SuperLink or SuperNode: take a task on loopback, keep it alive, hand in what came of it.

What Flower does in `flwr-serverapp` and `flwr-clientapp`, but for one thing: it unpacks the app bundle and imports what
it finds; here the app is already there, and a bundle other than our stub is refused unopened.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from milkglass.errors import LinkError, first_line
from milkglass.training import flower_parts as flower
from milkglass.training.flower_processes import FlowerProcess, stub_hash

GREETING: Final = "query.milkglass_greeting"
"""The first message: what the server's recipe is."""
GOODBYE: Final = "query.milkglass_goodbye"
"""The last one; with a reason where the run ended before its time."""
RECORD: Final = "milkglass"
SERVER_TASK: Final = "flwr-serverapp"
CLIENT_TASK: Final = "flwr-clientapp"
_CALL_SECONDS: Final = 30.0
_ACQUIRE: Final = "/flwr.proto.Runtime/AcquireTask"


def runtime_client(private: str, *, secret: bytes | None = None, token: str | None = None) -> Any:
    """Of a Runtime API on loopback: with the process's `secret` to take tasks, with a task's `token` to work at one."""
    interceptors: list[Any] = [flower.RuntimeVersionHttpInterceptor(component_name="milkglass")]
    if secret is not None:
        interceptors.append(
            flower.SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=[_ACQUIRE]),
        )
    if token is not None:
        interceptors.append(flower.RuntimeTokenHttpInterceptor(token))
    # no retries: Flower's end the process at a refusal
    return direct(flower.RuntimeHttpClient.from_server_address(private, True, None, interceptors, retry_invoker=None))


def direct(client: Any) -> Any:
    """The same Runtime client, which goes through no proxy that the environment names: it is for loopback."""
    client._client.close()
    client._client = flower.httpx.Client(trust_env=False, timeout=_CALL_SECONDS)
    return client


def await_task(client: Any, kind: str, process: FlowerProcess, pause_seconds: float = 0.3) -> str:
    """The token of the next task of that kind; no other kind is ever taken. Raises LinkError where the process ends."""
    while True:
        with linked(process):
            answer = client.AcquireTask(flower.AcquireTaskRequest(supported_task_types=[kind]))
        if answer.HasField("task") and answer.token and answer.task.type == kind:
            return str(answer.token)
        time.sleep(pause_seconds)


@contextmanager
def linked(process: FlowerProcess) -> Iterator[None]:
    """Inside, an error of the way to the process beside this one is a LinkError: what that process said last."""
    if not process.alive:
        raise LinkError(process.last_words())
    try:
        yield
    except flower.httpx.HTTPError as error:
        raise LinkError(first_line(error) if process.alive else process.last_words()) from None


@contextmanager
def kept_alive(client: Any) -> Iterator[None]:
    """Inside, say now and then that the task is worked at; it would be given up otherwise."""

    def beat() -> bool:
        with suppress(flower.httpx.HTTPError):
            return bool(client.SendTaskHeartbeat(flower.SendTaskHeartbeatRequest()).success)
        return False

    sender = flower.HeartbeatSender(beat)
    sender.start()
    try:
        yield
    finally:
        if sender.is_running:
            sender.stop()


def check_bundle(content: bytes) -> None:
    """Raise LinkError for an app bundle that is not our stub. It is not opened."""
    found = hashlib.sha256(content).hexdigest()
    if found != stub_hash():
        raise LinkError(
            f"the server sent code (a Flower app bundle, SHA-256 {found[:16]}...); nothing of it was run, and this "
            f"client leaves; expected milkglass' own stub, {stub_hash()[:16]}..."
        )


def words(message: Any, key: str) -> str:
    """A text of one of our own messages, "" where it has none."""
    record = message.content.config_records.get(RECORD) if message.has_content() else None
    said = None if record is None else record.get(key)
    return said if isinstance(said, str) else ""


def saying(**said: str) -> Any:
    """The content of one of our own messages."""
    return flower.RecordDict({RECORD: flower.ConfigRecord(dict(said))})


App = Callable[[Any, Any], Any]
"""Flower's ServerApp, (grid, context) -> None, or ClientApp, (message, context) -> message."""
