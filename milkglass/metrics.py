"""What a server counts, for Prometheus: on a loopback port, by a flag."""

from __future__ import annotations

from typing import final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from milkglass.errors import LinkError


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
        try:
            self._server, self._thread = start_http_server(port, addr="127.0.0.1", registry=registry)
        except (OSError, OverflowError) as error:
            raise LinkError(f"metrics at 127.0.0.1:{port}: {error}; expected a free port, 0 for any") from None
        self.port = self._server.server_port

    def close(self) -> None:
        """Offer them no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def connected(self, parties: int) -> None:
        """So many clients are connected now."""
        self._connected.set(parties)

    def refused(self, reason: str, times: int = 1) -> None:
        """Somebody was turned away, or several were."""
        self._refused.labels(reason).inc(times)

    def message(self, party: str, kind: str, wire_bytes: int, seconds: float) -> None:
        """A message was taken, and computed in so many seconds."""
        self._messages.labels(party, kind).inc()
        self._bytes.labels(party, kind).inc(wire_bytes)
        self._seconds.labels(kind).observe(seconds)
