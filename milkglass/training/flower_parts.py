"""The parts of Flower that milkglass' own processes stand on between machines, in one place.

flwr 1.41 (Beutel et al. 2020, arXiv 2007.14390) is an extra, and importing it takes a second. What a party's own
process needs of it stands here; the processes beside it have `flower_children.py`.
"""

from __future__ import annotations

import logging

from milkglass.errors import MissingExtraError
from milkglass.flower import flower

flower()  # before anything of it is imported
try:
    import httpx
    from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
    from flwr.app.message import make_message
    from flwr.common.constant import ErrorCode, SubStatus
    from flwr.common.serde import context_from_proto, run_from_proto
    from flwr.proto.runtime_pb2 import (
        AcquireTaskRequest,
        PullTaskInputRequest,
        PushTaskOutputRequest,
        SendTaskHeartbeatRequest,
    )
    from flwr.supercore.heartbeat import HeartbeatSender
    from flwr.supercore.interceptors import (
        RuntimeTokenHttpInterceptor,
        RuntimeVersionHttpInterceptor,
        SuperExecAuthHttpInterceptor,
    )
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.superlink.grid import HttpGrid
    from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output
except ImportError:
    raise MissingExtraError("federated training", "federated") from None

logging.getLogger("httpx").setLevel(logging.WARNING)  # it writes a line for every request

__all__ = [
    "AcquireTaskRequest",
    "ConfigRecord",
    "Context",
    "Error",
    "ErrorCode",
    "HeartbeatSender",
    "HttpGrid",
    "Message",
    "PullTaskInputRequest",
    "PushTaskOutputRequest",
    "RecordDict",
    "RuntimeHttpClient",
    "RuntimeTokenHttpInterceptor",
    "RuntimeVersionHttpInterceptor",
    "SendTaskHeartbeatRequest",
    "SubStatus",
    "SuperExecAuthHttpInterceptor",
    "TaskIdentity",
    "context_from_proto",
    "httpx",
    "make_message",
    "pull_task_input",
    "push_message",
    "push_task_output",
    "run_from_proto",
]
