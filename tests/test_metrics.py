"""A server's numbers, over HTTP on loopback alone."""

from __future__ import annotations

import re
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from milkglass.certificates import load_credentials, make_certificates
from milkglass.errors import LinkError
from milkglass.metrics import PrometheusWatch
from tests.wire_server import Doubling, ServerThread, asks, dial, hello, talk, until


@pytest.fixture
def watch() -> Iterator[PrometheusWatch]:
    watch = PrometheusWatch(0)
    yield watch
    watch.close()


def _numbers(watch: PrometheusWatch) -> dict[str, float]:
    """Name and labels -> value, as Prometheus itself reads the page."""
    with urllib.request.urlopen(f"http://127.0.0.1:{watch.port}/metrics", timeout=10) as page:
        families = list(text_string_to_metric_families(page.read().decode()))
    return {
        " ".join([sample.name, *(f"{key}={value}" for key, value in sorted(sample.labels.items()))]): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_a_server_counts_who_is_there_who_was_refused_and_what_came(watch: PrometheusWatch, tmp_path: Path) -> None:
    make_certificates(tmp_path / "pki", "localhost", ["hospital-a", "stranger"])
    own = {name: load_credentials(tmp_path / "pki" / name, "client") for name in ("hospital-a", "stranger")}
    theirs = load_credentials(tmp_path / "pki" / "localhost", "server")
    with ServerThread(theirs, tmp_path / "server", Doubling(), watch=watch) as server:
        client = dial(server.port, own["hospital-a"], tmp_path / "own")
        assert _numbers(watch)["milkglass_clients_connected"] == 0
        asks(client, "hospital-a", range(5), rows=100)
        for _ in range(2):
            talk(server.port, own["stranger"], [hello("stranger")])
        numbers = _numbers(watch)
        assert numbers["milkglass_clients_connected"] == 1
        assert numbers["milkglass_messages_total kind=activations party=hospital-a"] == 5
        sent = numbers["milkglass_received_bytes_total kind=activations party=hospital-a"]
        assert sent == client.traffic.wire_bytes("to server") > 5 * 100 * 3 * 4
        assert numbers["milkglass_message_seconds_count kind=activations"] == 5
        assert 0 < numbers["milkglass_message_seconds_sum kind=activations"] < 5
        assert {name: value for name, value in numbers.items() if "refused" in name} == {
            "milkglass_refused_total why=unknown name": 2
        }
        client.close()
        until(lambda: _numbers(watch)["milkglass_clients_connected"] == 0)


def test_metrics_are_on_loopback_alone(watch: PrometheusWatch) -> None:
    with socket.create_connection(("127.0.0.1", watch.port), timeout=5):
        pass
    with pytest.raises(ConnectionRefusedError):  # nor at this machine's other addresses: all of 127.0.0.0/8 are
        socket.create_connection(("127.0.0.2", watch.port), timeout=5)


@pytest.mark.parametrize("port", ["taken", 70_000])
def test_a_port_that_cannot_be_had_is_one_line(port: str | int, watch: PrometheusWatch) -> None:
    number = watch.port if port == "taken" else int(port)
    with pytest.raises(LinkError, match=re.escape(f"metrics at 127.0.0.1:{number}: ") + "[^\n]*$"):
        PrometheusWatch(number)
