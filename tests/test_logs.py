"""The logs of parties: a JSON object a line, with party, run and step; never a tensor, a record or a key."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from milkglass.certificates import make_certificates
from milkglass.codec import encode
from milkglass.logs import party_log
from milkglass.messages import Message
from tests.helpers import KEY, small_recipe
from tests.wire_server import until

ROOT = Path(__file__).parents[1]


def _lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_line_has_the_party_the_time_and_what_was_said(capfd: pytest.CaptureFixture[str]) -> None:
    party_log("cloud")("refused", why="unknown name", party="stranger", times=2, share=0.5, words="two\nlines")
    (line,) = _lines(capfd.readouterr().err)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        **{"event": "refused", "party": "cloud", "peer_party": "stranger", "why": "unknown name"},
        **{"times": 2, "share": 0.5, "words": "two\nlines"},
    }


@pytest.mark.parametrize(
    "secret",
    [
        KEY,
        bytearray(KEY),
        torch.tensor([0.123456]),
        np.array([0.123456]),
        [0.123456],
        {"x": 0.123456},
        Message("activations", "a", 0, {"x": torch.tensor([0.123456])}),
        ValueError("0.123456"),
    ],
)
def test_what_is_no_plain_value_does_not_get_into_a_log(secret: object, capfd: pytest.CaptureFixture[str]) -> None:
    party_log("cloud")("said", what=secret)
    text = capfd.readouterr().err
    assert "0.123456" not in text
    assert "\\x01" not in text
    assert _lines(text)[0]["what"] == f"<{type(secret).__name__}>"


def test_long_words_are_cut(capfd: pytest.CaptureFixture[str]) -> None:
    party_log("cloud")("said", what="x" * 1_000_000)
    assert len(capfd.readouterr().err) < 5000


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What two processes said while they trained under known keys, a stranger came, and Prometheus asked."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = small_recipe(parties={"clients": ["hospital-a"], "server": "cloud"}, defense={"noise": {"sigma": 0.5}})
    (folder / "recipe.toml").write_text(recipe.to_toml())
    make_certificates(folder / "pki", "localhost", ["hospital-a", "stranger"])
    for name, content in (("server", KEY), ("client", KEY[::-1])):
        (folder / name).touch(0o600)
        (folder / name).write_bytes(content)

    def start(*arguments: str) -> subprocess.Popen[str]:
        with (folder / f"{arguments[-1]}.log").open("w") as log:
            command = [sys.executable, "-m", "milkglass", *arguments[:-1]]
            return subprocess.Popen(command, stderr=log, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def said(name: str) -> str:
        return (folder / f"{name}.log").read_text()

    own, tls, key, out = str(folder / "recipe.toml"), str(folder / "pki" / "localhost"), str(folder / "server"), "--out"
    listen = ["--listen", "localhost:0", "--metrics", "0"]
    serving = start("serve", own, *listen, "--tls", tls, "--key", key, out, str(folder / "srv"), "serve")
    try:
        until(lambda: '"ready"' in said("serve"), 180)
        port = next(line["port"] for line in _lines(said("serve")) if line["event"] == "ready")
        numbers = next(line["address"] for line in _lines(said("serve")) if line["event"] == "metrics")
        server = f"localhost:{port}"
        stranger = start(
            *("join", own, "--server", server, "--tls", str(folder / "pki" / "stranger"), "--name", "hospital-a"),
            *(out, str(folder / "no"), "stranger"),
        )
        stranger.communicate(timeout=180)
        assert stranger.returncode == 2
        with socket.create_connection(("127.0.0.1", port), timeout=60) as garbage:
            garbage.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert garbage.recv(100) == b""
        with urllib.request.urlopen(numbers, timeout=60) as page:
            metrics = page.read().decode()
        tls, key = str(folder / "pki" / "hospital-a"), str(folder / "client")
        joining = start("join", own, "--server", server, "--tls", tls, "--key", key, out, str(folder / "cli"), "join")
        out_of_join, _ = joining.communicate(timeout=180)
        assert joining.returncode == 0, said("join")
        out_of_serve, _ = serving.communicate(timeout=180)
        assert serving.returncode == 0, said("serve")
    finally:
        serving.kill()
        serving.communicate()
    return {
        **{name: said(name) for name in ("serve", "join", "stranger")},
        **{"metrics": metrics, "out of join": out_of_join, "out of serve": out_of_serve, "folder": str(folder)},
    }


def test_a_servers_log_is_json_and_tells_what_happened(trained: dict[str, str]) -> None:
    lines = _lines(trained["serve"])
    assert all(line["party"] == "cloud" and line["timestamp"] for line in lines)
    events = [line["event"] for line in lines if line["event"] != "refused"]  # garbage is, when its time is over
    assert events[:2] == ["metrics", "ready"]
    assert events[-2:] == ["connected", "disconnected"]
    assert next(line for line in lines if line["event"] == "connected")["peer_party"] == "hospital-a"
    assert "trained with hospital-a" in trained["out of serve"]
    assert trained["stranger"].count("\n") == 1
    assert "the certificate is stranger's" in trained["stranger"]


def test_a_clients_log_tells_run_and_party(trained: dict[str, str]) -> None:
    lines = [json.loads(line) for line in trained["join"].splitlines() if line.startswith("{")]
    assert [line["event"] for line in lines] == ["connected"]
    assert (lines[0]["party"], len(lines[0]["run"])) == ("hospital-a", 16)


def test_no_log_holds_a_tensor_or_a_key(trained: dict[str, str]) -> None:
    folder = Path(trained["folder"])
    everything = "".join(text for name, text in trained.items() if name != "folder")
    private = [
        folder / "pki" / name / f"{role}.key" for name, role in (("localhost", "server"), ("hospital-a", "client"))
    ]
    for key in (KEY, KEY[::-1]):
        for words in (key.hex(), base64.b64encode(key).decode(), repr(key), str(list(key)), key.decode("latin1")):
            assert words[:12] not in everything
    for file in private:
        for line in file.read_text().splitlines()[1:-1]:
            assert line[:16] not in everything
    values = torch.cat(
        [
            tensor.flatten().float()
            for file in (folder / "cli" / "bottom.safetensors", folder / "srv" / "top.safetensors")
            for tensor in load_file(file).values()
        ]
    )
    told = set(json.loads((folder / "cli" / "summary.json").read_text()).values().__str__().split())
    for value in values.tolist():
        for words in (f"{value:.4f}", f"{value:.6g}"):
            if len(words.strip("-0.")) >= 4 and words not in str(told):
                assert words not in everything
    frame = encode(Message("activations", "hospital-a", 0, {"activations": values[:64]}))
    assert repr(frame[64:])[2:30] not in everything
    assert "tensor(" not in everything
