"""What a server counts, for Prometheus: on a loopback port, by a flag."""

from __future__ import annotations

from typing import final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server


@final
class PrometheusWatch:
    """Counts what happens at a server's door and offers it at http://127.0.0.1:PORT/metrics (port 0: a free one)."""

    def __init__(self, port: int) -> None:
        registry = CollectorRegistry()
        self._connected = Gauge("milkglass_clients_connected", "Clients that are connected", registry=registry)
        self._refused = Counter("milkglass_refused", "Streams that were refused", ["why"], registry=registry)
        self._messages = Counter("milkglass_messages", "Messages taken", ["party", "kind"], registry=registry)
        self._bytes = Counter("milkglass_received_bytes", "Bytes of them", ["party", "kind"], registry=registry)
        self._seconds = Histogram("milkglass_message_seconds", "Time to answer one", ["kind"], registry=registry)
        server, _ = start_http_server(port, addr="127.0.0.1", registry=registry)
        self.port = server.server_port

    def connected(self, parties: int) -> None:
        """So many clients are connected now."""
        self._connected.set(parties)

    def refused(self, reason: str) -> None:
        """Somebody was turned away."""
        self._refused.labels(reason).inc()

    def message(self, party: str, kind: str, wire_bytes: int, seconds: float) -> None:
        """A message was taken, and computed in so many seconds."""
        self._messages.labels(party, kind).inc()
        self._bytes.labels(party, kind).inc(wire_bytes)
        self._seconds.labels(kind).observe(seconds)
