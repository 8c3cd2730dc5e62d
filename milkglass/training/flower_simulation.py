"""A federated training in one process, by Flower's simulation engine without Ray.

The engine (its in-memory SuperLink, its queues and its grid) is Flower's. What runs the clients is a `Backend` of ours
in place of Ray's: one thread, one client after the other, so that nothing is pickled, no daemon starts, and the same
recipe gives the same bits. Every message goes through Flower's own wire format, both ways, so that a client never
shares memory with the server.

`flwr.simulation.run_simulation` is deprecated and insists on Ray, so the engine is called one floor below, as that
function does it (flwr 1.41).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, Final, final

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.client_app import ClientAppException
from flwr.common.constant import RUN_ID_NUM_BYTES, SUPERLINK_NODE_ID, TASK_ID_NUM_BYTES
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.fleet.vce import vce_api
from flwr.server.superlink.fleet.vce.backend import Backend
from flwr.server.superlink.fleet.vce.metrics import VceMetrics
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
from flwr.server.superlink.linkstate.utils import generate_rand_int_from_bytes
from flwr.serverapp import ServerApp
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid

from milkglass.errors import first_line
from milkglass.flower import flower

_POLL_SECONDS: Final = 0.01


def simulate(server_app: ServerApp, client_app: ClientApp, clients: int) -> None:
    """Run a Flower ServerApp to its end, with so many nodes that run the ClientApp.

    A client's number, from 0, is its node's `partition-id`. What the ServerApp raises is raised here; what a client
    raises is an error in its answer. The engine's threads end by themselves within a second afterwards.
    """
    flower()
    run = Run.create_empty(generate_rand_int_from_bytes(RUN_ID_NUM_BYTES))
    run.primary_task_id = task = generate_rand_int_from_bytes(TASK_ID_NUM_BYTES)
    run.federation_id = NOOP_FEDERATION_ID
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run.run_id, SUPERLINK_NODE_ID
    factory, stop = _link_state(run, task), _Stop()
    nodes = vce_api._register_nodes(clients, factory)
    stores = vce_api._register_node_info_stores(nodes, run)
    engine = (lambda: client_app, lambda: _InProcess({}), nodes, factory, stores, stop, VceMetrics())
    threading.Thread(target=vce_api.run_api, args=engine, name="flower engine").start()
    try:
        grid = _PushingGrid(factory, stop)
        grid.set_run(run)
        server_app(grid=grid, context=Context(run.run_id, 0, {}, RecordDict(), {}))
    finally:
        stop.set()


def _link_state(run: Run, task: int) -> LinkStateFactory:
    """An in-memory SuperLink that knows the run."""
    factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
    state: Any = factory.state()
    state.run_ids[run.run_id] = RunRecord(run=run)
    state.task_store[task] = Task(task_id=task, run_id=run.run_id)
    return factory


@final
class _Stop(threading.Event):
    """Ends the engine, which looks for messages ten times a second as it waits on it; here as soon as one comes."""

    def __init__(self) -> None:
        super().__init__()
        self._pushed = threading.Event()

    def pushed(self) -> None:
        """There is a new message."""
        self._pushed.set()

    def set(self) -> None:
        """The engine is to end."""
        super().set()
        self._pushed.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until there is a new message, or the end; whether it is the end."""
        self._pushed.wait(timeout)
        self._pushed.clear()
        return self.is_set()


@final
class _PushingGrid(InMemoryGrid):
    """Flower's own, which tells the engine that there is something to do."""

    def __init__(self, factory: LinkStateFactory, stop: _Stop) -> None:
        super().__init__(factory, _POLL_SECONDS)
        self._stop = stop

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        numbers: Iterable[str] = super().push_messages(messages)
        self._stop.pushed()
        return numbers


@final
class _InProcess(Backend):
    """One client at a time, in the engine's own thread."""

    def build(self, app_fn: Callable[[], ClientApp]) -> None:
        self._app = app_fn()

    @property
    def num_workers(self) -> int:
        return 1

    def is_worker_idle(self) -> bool:
        return True

    def terminate(self) -> None:
        """There is nothing to end."""

    def process_message(self, message: Message, context: Context) -> tuple[Message, Context]:
        try:
            answer = self._app(_over_the_wire(message), context)
        except Exception as error:
            raise ClientAppException(first_line(error)) from error
        return _over_the_wire(answer), context


def _over_the_wire(message: Message) -> Message:
    return message_from_proto(ProtoMessage.FromString(message_to_proto(message).SerializeToString()))
