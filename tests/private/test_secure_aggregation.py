"""Secure aggregation gives the mean, as exactly as it says, through drop-outs, and shows no client's own weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from milkglass.errors import LinkError, RecipeError
from milkglass.federated_section import SecureAggregation
from milkglass.flower import flower
from milkglass.randomness import Source
from milkglass.training.federated import train
from tests.training.test_federated import failing, recipe, same

flower()

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.common import bytes_to_ndarray  # noqa: E402
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, RECORD_KEY_STATE, Key, Stage  # noqa: E402

from milkglass.private import secure_aggregation  # noqa: E402
from milkglass.private.secure_aggregation import (  # noqa: E402
    GUARANTEE,
    SecureRound,
    Settings,
    answer,
    client_mods,
    received,
    secure_round,
    settings_of,
)
from milkglass.training.flower_simulation import simulate  # noqa: E402

Array = NDArray[np.float64]
STAGES = (Stage.SETUP, Stage.SHARE_KEYS, Stage.COLLECT_MASKED_VECTORS, Stage.UNMASK)
RECORDS = [5, 90, 37, 61, 12]


def vectors(clients: int, size: int = 400) -> list[Array]:
    """A client's weights each, of very different sizes, up to 7."""
    generator = np.random.default_rng(1)
    return [generator.uniform(-7, 7, size) * 10.0 ** -generator.integers(0, 4, size) for _ in range(clients)]


def stage_of(message: Message) -> str:
    return str(message.content.config_records[RECORD_KEY_CONFIGS][Key.STAGE])


def aggregate(
    settings: Settings,
    records: list[int],
    *,
    fails: Callable[[str, int], bool] | None = None,
    seen: list[tuple[str, int, RecordDict]] | None = None,
    told: float = 1.5,
    least: int = 1,
) -> tuple[SecureRound, list[int]]:
    """A round of clients that answer with `vectors`; and the numbers of those whose mean it is.

    fails: whether that client does, in that stage. seen: what arrives at the server.
    """
    found: list[SecureRound] = []
    numbers: dict[int, int] = {}

    def failing_mod(message: Message, context: Context, call_next: Any) -> Message:
        client = int(context.node_config["partition-id"])
        numbers[context.node_id] = client
        stage = stage_of(message)
        if fails is not None and fails(stage, client):
            raise OSError("gone")
        reply: Message = call_next(message, context)
        if seen is not None:
            seen.append((stage, client, reply.content))
        return reply

    app = ClientApp()

    @app.train(mods=[failing_mod, *client_mods(settings, lambda _: Source(bytes(32)))])
    def fit(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        arrays, config = received(message)
        assert config == {"epoch": 7}
        assert len(arrays) == 2
        own = vectors(len(records))[client]
        return Message(answer(settings, context, [own, own[:3]], [told], records[client]), reply_to=message)

    def server(grid: Any, context: Context) -> None:
        del context
        arrays = [np.zeros(400, np.float32), np.zeros(3, np.float32)]
        more: dict[str, Any] = {
            "largest": max(records),
            "least": least,
            "round_": 3,
            "config": {"epoch": 7},
            "timeout_seconds": 60.0,
        }
        found.append(secure_round(grid, settings, sorted(grid.get_node_ids()), arrays, **more))

    simulate(server, app, len(records))  # type: ignore[arg-type]
    return found[0], sorted(numbers[node] for node in found[0].nodes)


def mean_of(clients: list[int], records: list[int]) -> Array:
    weights = np.array([records[client] for client in clients], np.float64)
    return np.average([vectors(len(records))[client] for client in clients], axis=0, weights=weights)


@pytest.mark.parametrize("clients", [3, 5])
def test_the_mean_is_as_exact_as_it_says(clients: int) -> None:
    settings, records = settings_of(SecureAggregation(), clients), RECORDS[:clients]
    found, whose = aggregate(settings, records)
    apart = np.abs(found.arrays[0] - mean_of(whose, records)).max()
    assert whose == list(range(clients))
    assert apart <= settings.bound(records) < 1e-6
    assert apart > 1e-3 * settings.bound(records)  # or the bound says nothing
    np.testing.assert_array_equal(found.arrays[1].shape, (3,))
    assert found.told == pytest.approx([1.5], abs=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_the_rest_of_the_clients_have_their_mean_whenever_one_drops_out(stage: str) -> None:
    settings = settings_of(SecureAggregation(), 5)
    found, whose = aggregate(settings, RECORDS, fails=lambda now, client: (now, client) == (stage, 1))
    assert whose == ([0, 1, 2, 3, 4] if stage == Stage.UNMASK else [0, 2, 3, 4])  # it was in the sum already
    assert np.abs(found.arrays[0] - mean_of(whose, RECORDS)).max() <= settings.bound(RECORDS)


def test_one_after_the_other_may_drop_out_down_to_the_threshold() -> None:
    settings = settings_of(SecureAggregation(threshold=3), 5)
    gone = {Stage.SHARE_KEYS: 4, Stage.COLLECT_MASKED_VECTORS: 1}
    found, whose = aggregate(settings, RECORDS, fails=lambda now, client: gone.get(now) == client)
    assert whose == [0, 2, 3]
    assert np.abs(found.arrays[0] - mean_of(whose, RECORDS)).max() <= 2 * settings.bound(RECORDS)


def test_with_shares_among_neighbors_alone_it_is_the_same_mean() -> None:
    settings = settings_of(SecureAggregation(shares=3, threshold=2), 5)
    found, whose = aggregate(settings, RECORDS)
    assert whose == [0, 1, 2, 3, 4]
    assert np.abs(found.arrays[0] - mean_of(whose, RECORDS)).max() <= settings.bound(RECORDS)


@pytest.mark.parametrize(("stage", "left"), [(stage, 2) for stage in STAGES], ids=STAGES)
def test_below_the_threshold_there_is_no_sum(stage: str, left: int) -> None:
    settings = settings_of(SecureAggregation(), 5)
    with pytest.raises(LinkError, match=r"round 3: secure aggregation failed.* of 5 clients too few") as raised:
        aggregate(settings, RECORDS, fails=lambda now, client: now == stage and client >= left)
    assert "\n" not in str(raised.value)


def test_a_sum_of_two_is_not_unmasked() -> None:
    """Each of them would know the other's weights."""
    settings = settings_of(SecureAggregation(), 3)
    assert settings.threshold == 2
    with pytest.raises(LinkError, match="at least 3 must stay"):
        aggregate(settings, RECORDS[:3], fails=lambda now, client: (now, client) == (Stage.COLLECT_MASKED_VECTORS, 0))


def test_a_sum_of_fewer_than_the_recipe_wants_is_not_unmasked() -> None:
    """Repeated with all of them, it would show the one that was missing."""
    seen: list[tuple[str, int, RecordDict]] = []
    settings = settings_of(SecureAggregation(threshold=3), 5)
    with pytest.raises(LinkError, match="at least 5 must stay"):
        aggregate(
            settings,
            RECORDS,
            fails=lambda now, client: (now, client) == (Stage.COLLECT_MASKED_VECTORS, 1),
            seen=seen,
            least=5,
        )
    assert Stage.COLLECT_MASKED_VECTORS in {stage for stage, _, _ in seen}
    assert Stage.UNMASK not in {stage for stage, _, _ in seen}


def test_what_arrives_at_the_server_shows_no_clients_weights() -> None:
    """It is uniform noise, which correlates with anybody's weights, and with the others' noise, by chance alone."""
    seen: list[tuple[str, int, RecordDict]] = []
    aggregate(settings_of(SecureAggregation(), 4), RECORDS[:4], seen=seen)
    masked: dict[int, NDArray[np.int64]] = {}
    for stage, client, content in seen:
        assert not any(len(record) for record in content.array_records.values())
        configs = content.config_records[RECORD_KEY_CONFIGS]
        if stage == Stage.COLLECT_MASKED_VECTORS:
            _, masked[client], _, told = map(bytes_to_ndarray, configs[Key.MASKED_PARAMETERS])  # type: ignore[arg-type]
            assert told.shape == (1,)
    assert sorted(masked) == [0, 1, 2, 3]
    size = len(masked[0])
    for client, vector in masked.items():
        assert len(np.unique(vector)) == size
        assert abs(vector.mean() / 2**32 - 0.5) < 5 / np.sqrt(12 * size)
        for own in vectors(4):
            assert abs(np.corrcoef(vector.astype(float), own)[0, 1]) < 5 / np.sqrt(size)
        for other in range(client):
            assert abs(np.corrcoef(vector.astype(float), masked[other].astype(float))[0, 1]) < 5 / np.sqrt(size)


def test_a_mask_follows_from_all_of_its_key() -> None:
    """Flower's own follows from the exclusive or of its 4-byte words: 32 bits that can be tried one by one."""
    key, folded_alike = bytes(32), b"\x01\x00\x00\x00" * 2 + bytes(24)
    shapes: list[tuple[int, ...]] = [(1,), (50, 2), ()]
    one, other, again = (secure_aggregation._mask(each, 2**32, shapes) for each in (key, folded_alike, key))
    assert [part.shape for part in one] == shapes
    assert not np.array_equal(one[1], other[1])
    assert np.array_equal(one[1], again[1])
    assert one[1].max() > 2**31 > one[1].min() >= 0


def test_flower_masks_by_it_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bytes] = []
    whole = secure_aggregation._mask

    def watched(seed: bytes, *rest: Any) -> Any:
        made.append(seed)
        return whole(seed, *rest)

    monkeypatch.setattr(secure_aggregation, "_mask", watched)
    aggregate(settings_of(SecureAggregation(), 3), RECORDS[:3])
    monkeypatch.undo()
    secure_aggregation._with_secure_masks()
    assert len(made) == 3 + 3 * 2 + 3  # clients' own, each of two neighbors; and those that the server takes out
    assert len(set(made)) == 3 + 3


def ask(configs: dict[str, Any], settings: Settings) -> Message:
    """What the first of a client's mods makes of a request."""
    content = RecordDict({RECORD_KEY_CONFIGS: ConfigRecord(configs)} if configs else {})
    context = Context(0, 1, {}, RecordDict(), {})
    checking = client_mods(settings, lambda _: Source(bytes(32)))[0]
    reply: Message = checking(Message(content, 1, MessageType.TRAIN), context, lambda asked, _: asked)
    return reply


SETTINGS = Settings(clients=5, shares=5, threshold=4, clip=8.0, levels=2**28)
SETUP: dict[str, Any] = {
    Key.STAGE: Stage.SETUP,
    Key.SHARE_NUMBER: 5,
    Key.THRESHOLD: 4,
    Key.CLIPPING_RANGE: 8.0,
    Key.TARGET_RANGE: 2**28,
    Key.MOD_RANGE: 2**32,
}
UNMASK: dict[str, Any] = {Key.STAGE: Stage.UNMASK, Key.DEAD_NODE_ID_LIST: [4, 5]}


@pytest.mark.parametrize(
    ("configs", "words"),
    [
        (SETUP | {Key.THRESHOLD: 2}, "threshold is 4 by the recipe, and the server says 2"),
        (SETUP | {Key.CLIPPING_RANGE: 1e-6}, "clipping_range is 8.0 by the recipe"),
        ({}, "asks for weights without it"),
        (UNMASK | {Key.ACTIVE_NODE_ID_LIST: [1, 2, 3, 4]}, "single client"),
        (UNMASK | {Key.ACTIVE_NODE_ID_LIST: [1, 2]}, "single client"),
    ],
    ids=["threshold", "clip", "no protocol", "key and seed of one", "two alone"],
)  # fmt: skip
def test_a_client_refuses_what_an_honest_server_would_not_ask(configs: dict[str, Any], words: str) -> None:
    flower_task_identity()
    assert ask(SETUP, SETTINGS).has_content()
    with pytest.raises(Exception, match=words):
        ask(configs, SETTINGS)


def flower_task_identity() -> None:
    """A message can be made in a process that plays somebody."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


@pytest.mark.parametrize(
    ("own", "told", "records", "words"),
    [
        ([8.5], [1.0], 5, "a weight is too large, or not finite; federated.secure_aggregation.clip is 8.0"),
        ([float("nan")], [1.0], 5, "a weight is too large, or not finite"),
        ([1.0], [float("nan")], 5, "its loss, or a count, is not finite or too large"),
        ([1.0], [65.0], 5, "at most 64"),
        ([1.0], [1.0], 91, "91 training records, and the server takes 90 for the most"),
    ],
    ids=["too large", "not finite", "no loss", "a large loss", "too many records"],
)
def test_what_would_not_come_out_as_it_went_in_is_refused(
    own: list[float], told: list[float], records: int, words: str
) -> None:
    context = Context(0, 1, {}, RecordDict(), {})
    context.state.config_records[RECORD_KEY_STATE] = ConfigRecord({Key.MAX_WEIGHT: 90.0})
    with pytest.raises(Exception, match=words):
        answer(SETTINGS, context, [np.array(own)], told, records)


@pytest.mark.parametrize(
    ("section", "clients", "words"),
    [
        (SecureAggregation(), 2, "needs 3 clients or more; there are 2"),
        (SecureAggregation(shares=5), 4, "needs 5 clients or more"),
        (SecureAggregation(shares=4), 5, "shares is 4; expected an odd number"),
        (SecureAggregation(threshold=5), 5, "threshold is 5; expected 2 or more, and fewer than shares, 5"),
    ],
    ids=["two clients", "more shares", "even shares", "threshold"],
)
def test_what_flower_cannot_do_is_refused_before(section: SecureAggregation, clients: int, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        settings_of(section, clients)


def test_the_sum_of_all_clients_stays_below_the_modulus() -> None:
    for clients in range(3, 65):
        assert 2**29 < clients * settings_of(SecureAggregation(), clients).levels <= 2**31
    assert "no single client's weights" in GUARANTEE


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with four clients and secure aggregation."""
    out = tmp_path_factory.mktemp("secure") / "run"
    train(four(), out)
    return out


def four(**changes: Any) -> Any:
    federated = {"secure_aggregation": {}} | changes.pop("federated", {})
    return recipe(names=("north", "east", "south", "west"), federated=federated, **changes)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "network.safetensors")


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_secure_federated_training_is_federated_training(secure: Path, tmp_path: Path) -> None:
    """Within the rounding of each round's mean, which training carries on. The server still learns how it goes."""
    train(four(federated={"secure_aggregation": None}), tmp_path / "open")
    for name, tensor in weights(tmp_path / "open").items():
        torch.testing.assert_close(weights(secure)[name], tensor, rtol=1e-4, atol=1e-5)
    for found, expected in zip(lines(secure), lines(tmp_path / "open"), strict=True):
        assert found["accuracy"] == expected["accuracy"]
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-4)
    summary = json.loads((secure / "summary.json").read_text())
    assert summary["secure_aggregation"] is True
    kinds: dict[Any, int] = {(flow["direction"], flow["kind"]): flow["payload_bytes"] for flow in summary["wire"]}
    numbers: int = summary["parameters"]
    assert kinds["to client", "weights"] == 3 * 4 * 4 * numbers
    assert kinds["to server", "weights"] == 3 * 4 * 8 * (numbers + 4 + 1)  # what is told, and the client's weight
    assert all(kinds[way, kind] == 0 for way in ("to client", "to server") for kind in ("keys", "shares", "unmasking"))


def test_a_secure_run_that_lost_too_many_goes_on_in_the_same_bits(
    secure: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as for_now:
        failing(for_now, "east", 2)
        failing(for_now, "west", 2)
        with pytest.raises(LinkError, match=r"round 2: secure aggregation failed.*without .*east \(ZeroDivisionError"):
            train(four(federated={"least_clients": 2}), tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint" / "0001").is_dir()
    train(four(federated={"least_clients": 2}), tmp_path / "run", resume=True)
    assert same(weights(tmp_path / "run"), weights(secure))


def test_a_secure_round_goes_on_without_a_client_where_the_recipe_lets_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failing(monkeypatch, "east", 2)
    with pytest.raises(LinkError, match=r"at least 4 must stay until its end; without east \(ZeroDivisionError, whose"):
        train(four(), tmp_path / "all")
    for name, section in (("secure", {}), ("open", None)):
        train(four(federated={"least_clients": 3, "secure_aggregation": section}), tmp_path / name)
        assert [list(line["missing"]) for line in lines(tmp_path / name)] == [[], ["east"], []]
    for key, tensor in weights(tmp_path / "open").items():
        torch.testing.assert_close(weights(tmp_path / "secure")[key], tensor, rtol=1e-4, atol=1e-5)


def test_the_rounding_moves_nobody_elses_numbers(tmp_path: Path) -> None:
    np.random.seed(3)
    before = np.random.get_state(legacy=False)["state"]["key"]
    train(four(training={"epochs": 1}), tmp_path / "run")
    np.testing.assert_array_equal(before, np.random.get_state(legacy=False)["state"]["key"])
