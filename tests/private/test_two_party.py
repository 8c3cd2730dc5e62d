"""Two-party inference: what each party's files hold, which layers are refused, and what happens to parties that fail.

SPU is in no environment of the tests, so a stand-in plays the worker: it keeps the same contract (command line, files,
ready, go, done) and hides nothing, since it sends activations and logits as they are. So these tests hold for what is
around the protocol. The last one runs the protocol itself, where its environment has been made.
"""

from __future__ import annotations

import ast
import os
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.cuts import cut
from milkglass.errors import CutError, DataError, LinkError, MissingExtraError
from milkglass.networks import ResidualBlock, build
from milkglass.private import two_party, two_party_environment, two_processes
from milkglass.private.two_party import describe, two_party_run, weights
from milkglass.randomness import drawing_from, public_source

STAND_IN = """
import json, os, shutil, signal, socket, sys, time
rank, folder, own, other = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
open({seen!r} + f"/pid{{rank}}", "w").write(str(os.getpid()))
shutil.copytree(folder, {seen!r} + f"/folder{{rank}}")
open({seen!r} + f"/mode{{rank}}", "w").write(str(os.stat(folder).st_mode))
def fault(at):
    kind, party, when = {fault!r}.split()
    if int(party) != rank or when != at: return
    if kind == "dies": sys.exit("a word before\\nSpuError: the lattice is broken")
    if kind == "deaf": signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("still thinking", file=sys.stderr, flush=True)
    time.sleep(60)
fault("early")
import numpy as np
def exactly(link, count):
    got = b""
    while len(got) < count: got += link.recv(count - len(got))
    return got
host, port = own.split(":")
listener = socket.create_server((host, int(port)))
out = socket.create_connection(other.split(":"))
link, _ = listener.accept()
out.sendall(bytes(100 + rank)); exactly(link, 101 - rank)
print("noise of a library"); print("ready", flush=True)
assert sys.stdin.readline() == "go\\n"
fault("late")
stage, arrays = json.load(open(folder + "/stage.json")), dict(np.load(folder + "/input.npz", allow_pickle=False))
records, classes = stage["input_shape"][0], stage["layers"][-1]["parameters"]["weight"][0]
if rank == 0:
    out.sendall(arrays["z"].tobytes())
    answers = np.frombuffer(exactly(link, 4 * records * classes), np.float32).reshape(records, classes)
    np.savez(folder + "/answers.npz", answers={answers})
else:
    z = np.frombuffer(exactly(link, 4 * int(np.prod(stage["input_shape"]))), np.float32).reshape(stage["input_shape"])
    for layer in stage["layers"]:
        name = layer["name"]
        z = np.maximum(z, 0) if layer["kind"] == "relu" else z @ arrays[name + ".weight"].T + arrays[name + ".bias"]
    out.sendall(z.astype(np.float32).tobytes())
print("done", flush=True)
"""


@pytest.fixture
def seen(tmp_path: Path) -> Path:
    """Where stand-ins leave what they saw."""
    (tmp_path / "seen").mkdir()
    return tmp_path / "seen"


@pytest.fixture
def run(tmp_path: Path, seen: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., two_party.TwoPartyRun]:
    """`two_party_run` with stand-ins; temporary folders lie in `tmp_path / "temporary"`."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def play(
        stage: nn.Module, z_BD: Tensor, fault: str = "none 0 0", answers: str = "answers", timeout_seconds: float = 30.0
    ) -> two_party.TwoPartyRun:
        script = tmp_path / "worker.py"
        script.write_text(STAND_IN.format(seen=str(seen), fault=fault, answers=answers))
        monkeypatch.setattr(two_party, "_WORKER", script)
        return two_party_run(stage, z_BD, python=Path(sys.executable), timeout_seconds=timeout_seconds)

    return play


def small_stage() -> tuple[nn.Module, Tensor]:
    """The server's stage of an mlp cut after its first layer, and activations (5, 16)."""
    generator = public_source(3).generator("two-party")
    model = build("mlp", (8,), 4, {"hidden": [16, 12]}, generator)
    return cut(model, "hidden1").top, torch.randn(5, 16, generator=generator)


def all_gone(seen: Path) -> bool:
    """Whether no process of those that began is left."""
    for file in seen.glob("pid*"):
        try:
            os.kill(int(file.read_text()), 0)
        except ProcessLookupError:
            continue
        return False
    return True


def twin(layers: list[dict[str, Any]], parameters: dict[str, Any], z: Tensor) -> Tensor:
    """The stage by its description alone, in torch: slow and obvious."""
    for layer in layers:
        own = {key: torch.from_numpy(parameters[f"{layer['name']}.{key}"]) for key in layer["parameters"]}
        kind = layer["kind"]
        if kind == "linear":
            z = F.linear(z, own["weight"], own.get("bias"))
        elif kind == "conv2d":
            z = F.conv2d(z, own["weight"], own.get("bias"), layer["stride"], layer["padding"])
        elif kind == "max_pool2d":
            z = F.max_pool2d(z, layer["kernel_size"], layer["stride"])
        elif kind == "avg_pool2d":
            z = F.avg_pool2d(z, layer["kernel_size"], layer["stride"])
        elif kind == "global_avg_pool2d":
            z = z.mean((2, 3), keepdim=True)
        else:
            z = F.relu(z) if kind == "relu" else z.flatten(1)
    return z


def convolutional() -> nn.Module:
    """Every layer that is offered."""
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Dropout(0.5), nn.Identity()),
        nn.Sequential(nn.Conv2d(4, 6, (3, 1), stride=(2, 1), bias=False, padding=(1, 0)), nn.AvgPool2d(2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5, bias=False)),
    )


@pytest.mark.parametrize(
    ("stage", "shape"),
    [
        pytest.param(lambda: small_stage()[0], (3, 16), id="mlp"),
        pytest.param(
            lambda: cut(build("cnn", (1, 8, 8), 3, {"width": 8}, public_source(0).generator("cnn")), "block2").top,
            (3, 8, 2, 2),
            id="cnn",
        ),
        pytest.param(convolutional, (3, 3, 17, 16), id="every layer"),
    ],
)
def test_description_and_weights_are_the_whole_stage(stage: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = stage().eval()
    z = torch.randn(shape, generator=public_source(1).generator("z"))
    told, held = describe(model), weights(model)
    shapes = {f"{layer['name']}.{key}": s for layer in told for key, s in layer["parameters"].items()}
    assert shapes == {name: list(values.shape) for name, values in held.items()}
    with torch.no_grad():
        torch.testing.assert_close(twin(told, held, z), model(z))


def hooked() -> nn.Module:
    layer = nn.Linear(4, 2)
    layer.register_forward_hook(lambda _module, _given, got: 2 * got)
    return layer


class OwnLinear(nn.Linear):
    """Whose forward could be anything."""


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.GroupNorm(2, 4), "square root"),
        (nn.BatchNorm2d(4), "fold it"),
        (nn.Tanh(), "not among them"),
        (OwnLinear(4, 2), "not among them"),
        (ResidualBlock(4, 4, 1), "not among them"),
        (nn.Conv2d(4, 4, 3, dilation=2), "no dilation"),
        (nn.Conv2d(4, 4, 3, groups=2), "one group"),
        (nn.Conv2d(4, 4, 3, padding="same"), "in numbers"),
        (nn.MaxPool2d(2, padding=1), "without padding"),
        (nn.AvgPool2d(2, ceil_mode=True), "ceil_mode"),
        (nn.Flatten(2), "all but the batch"),
        (nn.AdaptiveAvgPool2d(2), "size 1"),
        (hooked(), "hook"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value,
)
def test_other_layers_are_refused_by_name_with_reason_and_way_out(layer: nn.Module, words: str) -> None:
    stage = nn.Sequential()
    stage.add_module("inner", nn.Sequential(nn.ReLU(), layer))
    with pytest.raises(CutError, match=r"layer 'inner\.1'") as caught:
        describe(stage)
    line = str(caught.value)
    assert words in line
    assert type(layer).__name__ in line
    assert "cut after 'inner.1'" in line
    assert "\n" not in line


def test_a_stage_is_refused_before_anything_is_started(run: Callable[..., object], seen: Path) -> None:
    with pytest.raises(CutError):
        run(nn.Sequential(nn.Linear(4, 4), nn.Softmax(1)), torch.zeros(2, 4))
    assert not list(seen.iterdir())


@pytest.mark.parametrize(
    ("z_BD", "scale", "words"),
    [
        (torch.full((2, 16), torch.nan), 1.0, "the activations"),
        (torch.full((2, 16), 1e8), 1.0, "the activations"),
        (torch.ones(2, 16), 1e9, "the weights hidden2.0.weight"),
        (torch.full((2, 16), 1e5), 1e5, "what layer 'hidden2.0' gives"),
        (torch.ones(2, 7), 1.0, "do not fit"),
        (torch.ones(0, 16), 1.0, "no records"),
    ],
    ids=["not finite", "large activations", "large weights", "large on the way", "wrong width", "no records"],
)
def test_numbers_that_fixed_point_cannot_hold_are_refused(
    run: Callable[..., object], z_BD: Tensor, scale: float, words: str
) -> None:
    stage, _ = small_stage()
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.fill_(scale)
    with pytest.raises(DataError, match=words):
        run(stage, z_BD)


def test_a_run_counts_every_byte_and_compares_with_the_plain_stage(
    run: Callable[..., two_party.TwoPartyRun], tmp_path: Path, seen: Path
) -> None:
    stage, z_BD = small_stage()
    stage.train()
    found = run(stage, z_BD)
    assert stage.training
    with torch.no_grad():
        torch.testing.assert_close(found.answers_BK, stage(z_BD))
    assert (found.records, found.top1_equal) == (5, 1.0)
    assert found.largest_logit_error < 1e-5
    assert found.bytes_up == 4 * 5 * 16
    assert found.bytes_down == 4 * 5 * 4
    assert found.setup_bytes == 100 + 101
    assert found.seconds > 0
    assert found.setup_seconds > 0
    assert all_gone(seen)
    assert not list((tmp_path / "temporary").iterdir())


def test_each_party_is_given_its_own_input_alone(run: Callable[..., object], seen: Path) -> None:
    stage, z_BD = small_stage()
    run(stage, z_BD)
    held = [b"".join(file.read_bytes() for file in sorted((seen / f"folder{rank}").iterdir())) for rank in (0, 1)]
    rows = [row.numpy().tobytes() for row in z_BD]
    parameters = [parameter.detach().numpy().tobytes() for parameter in stage.parameters()]
    assert all(row in held[0] for row in rows)
    assert all(parameter in held[1] for parameter in parameters)
    assert not any(row in held[1] for row in rows)
    assert not any(parameter in held[0] for parameter in parameters)
    for rank in (0, 1):
        assert stat.S_IMODE(int((seen / f"mode{rank}").read_text())) == 0o700


def test_wrong_answers_show_in_the_comparison(run: Callable[..., two_party.TwoPartyRun]) -> None:
    stage, z_BD = small_stage()
    with torch.no_grad():
        plain_BK = stage(z_BD)
    worst = int(plain_BK[0].argmin())
    changed = f"answers + 100 * np.eye({len(z_BD)}, 1, dtype=np.float32) * np.eye(1, 4, {worst}, dtype=np.float32)"
    found = run(stage, z_BD, answers=changed)
    assert found.top1_equal == pytest.approx(0.8)
    assert found.largest_logit_error == pytest.approx(100, rel=1e-3)


@pytest.mark.parametrize(
    ("answers", "words"),
    [("answers[:, :3]", "shape"), ("np.array([{1: 2}], dtype=object)", "cannot be read|can be read")],
    ids=["wrong shape", "a pickle"],
)
def test_answers_of_another_form_are_refused(run: Callable[..., object], answers: str, words: str) -> None:
    with pytest.raises(LinkError, match=words):
        run(*small_stage(), answers=answers)


@pytest.mark.parametrize("party", [0, 1], ids=["client", "server"])
@pytest.mark.parametrize("when", ["early", "late"])
def test_a_party_that_dies_is_named_with_its_last_words(
    run: Callable[..., object], tmp_path: Path, seen: Path, party: int, when: str
) -> None:
    with pytest.raises(LinkError) as caught:
        run(*small_stage(), fault=f"dies {party} {when}")
    line = str(caught.value)
    assert f"the {two_processes.PARTIES[party]} ended" in line
    assert "exit code 1" in line
    assert line.endswith("SpuError: the lattice is broken")
    assert all_gone(seen)
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("kind", ["hangs", "deaf"])
def test_a_party_that_hangs_is_late_and_both_are_ended(
    run: Callable[..., object], tmp_path: Path, seen: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(two_processes, "_GRACE_SECONDS", 0.3)
    with pytest.raises(LinkError, match=r"not ready within 1\.5 s: .*the server: its last words: still thinking"):
        run(*small_stage(), fault=f"{kind} 1 early", timeout_seconds=1.5)
    assert (seen / "pid0").exists()
    assert (seen / "pid1").exists()
    assert all_gone(seen)
    assert not list((tmp_path / "temporary").iterdir())


def test_an_interpreter_that_cannot_be_run_is_one_clear_line(tmp_path: Path) -> None:
    stage, z_BD = small_stage()
    with pytest.raises(LinkError, match="no interpreter at"):
        two_party_run(stage, z_BD, python=tmp_path / "none")
    (tmp_path / "text").write_text("")
    with pytest.raises(LinkError, match="the client's process cannot be started"):
        two_party_run(stage, z_BD, python=tmp_path / "text")


def test_without_the_environment_the_one_command_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_party_environment, "environment_folder", lambda: tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()  # as an installation that was interrupted leaves it
    with pytest.raises(MissingExtraError, match=r"python -m milkglass\.private\.two_party_environment") as caught:
        two_party_run(*small_stage())
    assert "\n" not in str(caught.value)


def test_an_unknown_way_to_transfer_is_refused_with_the_nearest() -> None:
    with pytest.raises(DataError, match="did you mean 'ferret'"):
        two_party_run(*small_stage(), python=Path(sys.executable), transfers="feret")


def test_the_worker_imports_what_its_environment_has_and_no_pickle() -> None:
    tree = ast.parse(two_party._WORKER.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots = {name.partition(".")[0] for name in names}
    assert roots - sys.stdlib_module_names == {"jax", "numpy", "spu"}
    assert not roots & {"pickle", "cloudpickle", "dill", "marshal"}


@pytest.mark.slow
@pytest.mark.parametrize("transfers", sorted(two_party.TRANSFERS))
def test_the_protocol_agrees_with_the_plain_stage(transfers: str) -> None:
    try:
        two_party.find_environment()
    except MissingExtraError as error:
        pytest.skip(str(error))
    generator = public_source(2).generator("protocol")
    with drawing_from(generator):
        pictures = convolutional(), torch.randn(2, 3, 17, 16)
    for stage, z in (small_stage(), pictures):
        found = two_party_run(stage, z, transfers=transfers, timeout_seconds=120)
        assert found.top1_equal == 1
        assert found.largest_logit_error < 1e-3
        assert found.bytes_up > z.numel() * 8  # a share of each number, of 64 bits
        assert found.bytes_down > 0
