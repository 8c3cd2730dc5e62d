"""The parts of hivemind that milkglass stands on, in one place: peer-to-peer daemon, DHT, matchmaking, messages.

hivemind (Learning@home; Ryabinin and Gusev 2020, arXiv 2002.04013; DeDLOC: Diskin et al. 2021, arXiv 2106.10207) is an
extra, and importing it takes seconds: no other file imports it, and none that imports this one is imported early. Its
`DHT`, `DecentralizedAverager` and `Optimizer` start a process each and speak to it in pickles over pipes; the classes
here run inside one event loop of ours (`node.py`), beside the training and its one daemon.
"""

from __future__ import annotations

import logging
import warnings

from milkglass.errors import MissingExtraError

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script, in a part of hivemind that nothing here uses
        from hivemind.averaging.matchmaking import Matchmaking
        from hivemind.compression import (
            CompressionBase,
            CompressionInfo,
            Float16Compression,
            NoCompression,
            deserialize_torch_tensor,
        )
        from hivemind.dht.node import DHTNode
        from hivemind.dht.protocol import ValidationError
        from hivemind.dht.validation import DHTRecord, RecordValidatorBase
        from hivemind.p2p import P2P, P2PContext, P2PDaemonError, P2PHandlerError, PeerID, ServicerBase
        from hivemind.proto import averaging_pb2, crypto_pb2, runtime_pb2
        from hivemind.utils import MSGPackSerializer, get_dht_time
        from hivemind.utils.multiaddr import Multiaddr
except ImportError:
    raise MissingExtraError("open collaboration", "collab") from None

for _name in ("hivemind", "asyncio"):  # what matters is said by milkglass, in its own words
    logging.getLogger(_name).setLevel(logging.CRITICAL)

__all__ = [
    "CompressionBase",
    "CompressionInfo",
    "DHTNode",
    "DHTRecord",
    "Float16Compression",
    "MSGPackSerializer",
    "Matchmaking",
    "Multiaddr",
    "NoCompression",
    "P2P",
    "P2PContext",
    "P2PDaemonError",
    "P2PHandlerError",
    "PeerID",
    "RecordValidatorBase",
    "ServicerBase",
    "ValidationError",
    "averaging_pb2",
    "crypto_pb2",
    "deserialize_torch_tensor",
    "get_dht_time",
    "runtime_pb2",
]
