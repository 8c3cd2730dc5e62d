"""Defenses in a training: split equals unsplit with all of them at once, and a stopped run ends in the same bits.

The unsplit twin is an ordinary loop, with copies of the stages and of the defenses that hold on to them.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.defenses.base import NoiseStream
from milkglass.defenses.certificate import certify
from milkglass.errors import AuditError, EgressError, MilkglassError, RecipeError, RunError
from milkglass.messages import Message
from milkglass.randomness import drawing_from
from milkglass.recipe import Recipe
from milkglass.runs import RunFolder
from milkglass.training.defended import defenses
from milkglass.training.predict import predict
from milkglass.training.split import Setup, Silence, play_epoch, set_up, train, train_epoch
from milkglass.training.summary import certificate_ahead, certificate_of
from milkglass.transports.local import LocalTransport
from milkglass.transports.wrappers import RecordingTransport
from tests.training.whole import (
    BATCH_NORM,
    CLIENTS,
    DROPOUTS,
    EVERY_DEFENSE,
    MLP,
    U_SHAPED,
    parties,
    recipe_of,
    training,
)

CHANNEL: dict[str, Any] = {"channel": {"width": 4, "sigma": 0.3}}
CLIPPED: dict[str, Any] = {"clipping": {"clip": 1.0}, "noise": {"sigma": 0.5}}
SETS: dict[str, dict[str, Any]] = {
    "channel": CHANNEL,
    "channel, linear": {"channel": {"width": 4, "projection": "linear"}},
    "channel, random": {"channel": {"width": 4, "projection": "random"}},
    "channel, pca": {"channel": {"width": 4, "projection": "pca"}},
    "learned noise": {"learned_noise": {}},
    "adversary": {"adversary": {"weight": 2.0}},
    "entropy on noise": {"noise": {"sigma": 0.3}, "entropy": {"weight": 0.1}},
    "everything": EVERY_DEFENSE,
}


def _train_unsplit(setup: Setup, epochs: int) -> tuple[nn.Module, nn.Module]:
    """The two stages after an ordinary training of the whole."""
    client, seat = setup.client, setup.seats[0]
    bottom, chosen = copy.deepcopy((client.stage, client.defenses))
    top = copy.deepcopy(setup.server.stage)
    draws = client.source.generator("stage"), setup.server.source.generator("stage")
    noise = NoiseStream(client.source.derive("noise"))
    rate = setup.recipe.training.learning_rate
    optimizers = [torch.optim.Adam(part.parameters(), lr=rate) for part in (bottom, top)]
    begun = False
    for epoch in range(1, epochs + 1):
        for rows in seat.batches(epoch):
            x, y = seat.share.train.x[rows], seat.share.train.y[rows]
            with drawing_from(draws[0]):
                z = bottom(x)
            for defense in chosen:
                z = defense.release(z, noise)
            for index, defense in enumerate(chosen if not begun else ()):
                defense.begin(x, z.detach(), client.source.derive("defense", index))
            begun = True
            sent = z.detach().requires_grad_()
            with drawing_from(draws[1]):
                logits = top(sent.clone())
            for optimizer in optimizers:
                optimizer.zero_grad()
            F.cross_entropy(logits, y).backward()  # type: ignore[no-untyped-call]
            penalties = [penalty for d in chosen if (penalty := d.penalty(x, z, y)) is not None]
            torch.autograd.backward([z, *penalties], [sent.grad, *[None for _ in penalties]])
            for optimizer in optimizers:
                optimizer.step()
            for defense in chosen:
                defense.learn(x, z.detach())
    return bottom, top


def _same(found: nn.Module, expected: nn.Module) -> None:
    for (name, one), (other_name, other) in zip(found.state_dict().items(), expected.state_dict().items(), strict=True):
        assert name == other_name
        assert torch.equal(one, other), name


@pytest.mark.parametrize("chosen", SETS)
def test_split_equals_unsplit(chosen: str) -> None:
    recipe = recipe_of(**DROPOUTS, training=training(optimizer="adam", batch_size=16), defense=SETS[chosen])
    setup = set_up(recipe)
    bottom, top = _train_unsplit(setup, 2)
    before = {name: t.clone() for name, t in setup.client.stage.state_dict().items()}
    for epoch in (1, 2):
        play_epoch(setup, epoch, test=False)
    _same(setup.client.stage, bottom)
    _same(setup.server.stage, top)
    learned = dict(setup.client.stage.named_parameters())
    assert all(not torch.equal(t, before[name]) for name, t in learned.items())  # the defenses' own among them


def test_a_decaying_rate_is_that_of_an_ordinary_schedule() -> None:
    recipe = recipe_of(training=training(optimizer="adam", decay_steps=6, learning_rate=0.05))
    setup = set_up(recipe)
    seat = setup.seats[0]
    whole = copy.deepcopy(nn.Sequential(setup.client.stage, setup.server.stage))
    optimizer = torch.optim.Adam(whole.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    for epoch in (1, 2):
        for rows in seat.batches(epoch):
            optimizer.zero_grad()
            F.cross_entropy(whole(seat.share.train.x[rows]), seat.share.train.y[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        play_epoch(setup, epoch, test=False)
    trained = nn.Sequential(setup.client.stage, setup.server.stage)
    for one, other in zip(trained.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)  # the schedule multiplies up, ours computes anew


class _StopAfterOne(Silence):
    def epoch(self, line: dict[str, Any]) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("chosen", SETS)
def test_a_stopped_run_ends_in_the_same_bits(chosen: str, tmp_path: Path) -> None:
    recipe = recipe_of(**DROPOUTS, training=training(optimizer="adam"), defense=SETS[chosen])
    train(recipe, tmp_path / "through")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "stopped", progress=_StopAfterOne())
    train(recipe, tmp_path / "stopped", resume=True)
    for file in ("bottom.safetensors", "top.safetensors"):
        one, other = (load_file(tmp_path / run / file) for run in ("through", "stopped"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_order_is_the_stated_one() -> None:
    table = {name: EVERY_DEFENSE[name] for name in reversed(EVERY_DEFENSE)}
    acting = [type(defense).__name__ for defense in defenses(recipe_of(defense={**table, "labels": {}}, **U_SHAPED))]
    assert acting == [
        "Clipping",
        "Channel",
        "Noise",
        "LearnedNoise",
        "NoPeek",
        "Adversary",
        "ConditionalEntropy",
        "MaxNorm",
    ]


def test_a_recipe_from_before_keeps_its_digest() -> None:
    # the digest of this recipe as milkglass 0.1 computed it before there were more defenses than two
    recipe = recipe_of(defense={"noise": {"sigma": 0.5}, "nopeek": {"weight": 1.0}})
    assert set(recipe.agreed()["defense"]) == {"noise", "nopeek"}
    assert recipe.agreed()["defense"]["noise"] == {"sigma": 0.5}
    assert recipe.digest() != recipe_of(defense={"noise": {"sigma": 0.5, "kind": "laplace"}}).digest()


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        (
            {"defense": {"channel": {"sigma": 0.0}, "certified": True}},
            "channel.sigma is 0: without noise there is none",
        ),
        ({"defense": {"nopeek": {}, "certified": True}}, "nopeek has none; expected channel, or clipping and noise"),
        ({"defense": {"certified": True}}, "no defense has none"),
        (
            {"defense": {"clipping": {"clip": 1.0}, "noise": {"sigma": 1.0, "kind": "laplace"}, "certified": True}},
            "clipping, noise has none",
        ),
        ({"defense": {"entropy": {}}}, "a sigma that is fixed; expected channel or noise"),
        ({"defense": {"channel": {"width": 0}}}, "defense.channel.width"),
        ({"defense": {"channel": {"clip": 0.0}}}, "defense.channel.clip"),
        ({"defense": {"channel": {"sigma": -1.0}}}, "defense.channel.sigma"),
        ({"defense": {"chanel": {}}}, "did you mean 'channel'?"),
        ({"defense": {"labels": {}}}, "expected cut.back_at (U-shaped) or parties.mode vertical"),
        ({"defense": CHANNEL, "parties": parties("vertical", CLIENTS[:2])}, "go with whole records"),
        (
            {"defense": {**CLIPPED, "certified": True}, "parties": parties("vertical", CLIENTS[:2])},
            "defense.certified asks for a certificate, and with parties.mode vertical there is none",
        ),
        ({"training": training(client_learns="ends")}, "network.start must say which"),
        ({"training": training(client_learns="nothing"), "parties": parties("splitfed2")}, "expected one client"),
        ({"defense": {"channel": {"sigma": 1e-9}}}, "sigma is 1e-09; expected 0, or 1e-06 and more"),
        ({"defense": {"channel": {"clip": 1e200}}}, "defense.channel.clip"),
        ({"defense": {"noise": {"sigma": 1e200}}}, "defense.noise.sigma"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(tables: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_of(**tables)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_batch_norm_has_no_certificate_and_is_refused_where_one_is_asked_for() -> None:
    set_up(recipe_of(**BATCH_NORM, defense=CHANNEL))  # without a certificate it may train
    with pytest.raises(AuditError, match=r"no certificate: BatchNorm \(stage.norm\) in the client's stage"):
        set_up(recipe_of(**BATCH_NORM, defense={**CHANNEL, "certified": True}))


def test_what_is_said_ahead_of_a_client_is_what_is_said_of_it() -> None:
    for defense in (CHANNEL, CLIPPED, {**CLIPPED, **CHANNEL}):
        setup = set_up(recipe_of(defense=defense))
        shape, classes = setup.records.record_shape, setup.records.classes
        found = certificate_of(setup.recipe, setup.client, shape, classes)
        assert certificate_ahead(setup.recipe, shape, classes) == found
    refused: list[tuple[dict[str, Any], str]] = [
        ({**BATCH_NORM, "defense": CHANNEL}, "BatchNorm"),
        ({"parties": parties("vertical", CLIENTS[:2]), "defense": CLIPPED}, "every owner sends"),
    ]
    for tables, words in refused:
        with pytest.raises(AuditError, match=words):
            certificate_ahead(recipe_of(**tables), (1, 8, 8), 10)


def test_with_a_channel_it_is_the_projected_coordinates_that_are_clipped() -> None:
    setup = set_up(recipe_of(defense={"clipping": {"clip": 1e-3}, "channel": {"width": 4, "sigma": 0.0}}))
    client, x = setup.client, setup.records.test.x[:8]
    released = client.released_by(x, client.defenses)
    assert released.shape == (8, 4)
    assert torch.allclose(released.norm(dim=1), torch.full((8,), 1e-3), rtol=1e-3)


def test_a_channel_wider_than_the_cut_is_refused() -> None:
    with pytest.raises(RecipeError, match="width is 40, and the cut has 16 values a record"):
        set_up(recipe_of(defense={"channel": {"width": 40}}))


def test_marvell_refuses_ten_classes_before_anything_is_sent() -> None:
    with pytest.raises(MilkglassError, match="marvell, which is for two classes, and the records have 10"):
        set_up(recipe_of(defense={"labels": {"kind": "marvell"}}, **U_SHAPED))


# What is written of it.


def test_the_summary_tells_the_certificate_and_what_a_training_came_to(tmp_path: Path) -> None:
    recipe = recipe_of(defense=CHANNEL)
    found = train(recipe, tmp_path / "run")["certificate"]
    assert found["bits_per_release"] == certify(defenses(recipe), (16,)).bits_per_release
    assert found["training"]["releases"] == 2 * (96 + 40)  # and the test records after every epoch
    assert found["training"]["joint_bits"] == pytest.approx(272 * found["bits_per_release"])
    assert "do not add up per record" in found["training"]["words"]
    assert train(recipe_of(), tmp_path / "bare")["certificate"] is None


def test_every_owner_of_columns_sends_so_there_is_no_certificate(tmp_path: Path) -> None:
    pictures = {"network": {"name": "cnn", "settings": {"width": 8}}, "cut": {"at": "block1"}}
    owners = parties("vertical", CLIENTS[:2])
    recipe = recipe_of(**pictures, parties=owners, defense=CLIPPED)
    assert train(recipe, tmp_path / "run")["certificate"] is None


def test_a_start_of_another_deal_is_told(home: Path, tmp_path: Path) -> None:
    one, other = (
        train(recipe_of(network=_network(home), defense=CHANNEL, seed=seed), tmp_path / f"seed{seed}")
        for seed in (0, 1)
    )
    assert not any("trained on another deal" in caution for caution in one["cautions"])
    assert any("trained on another deal of records" in caution for caution in other["cautions"])


# Label protection.


def _recorded(recipe: Recipe) -> tuple[Setup, list[RecordingTransport]]:
    transports: list[RecordingTransport] = []

    def wrap(transport: Any) -> RecordingTransport:
        transports.append(RecordingTransport(transport))
        return transports[-1]

    setup = set_up(recipe, wrap=wrap)
    train_epoch(setup, 1)
    return setup, transports


def _gradients(transport: RecordingTransport, direction: str, kind: str) -> list[Tensor]:
    messages: list[Message] = [c.message for c in transport.transcript if c.direction == direction]
    return [message.tensors["gradient"] for message in messages if message.kind == kind]


def test_u_shaped_gradients_leave_protected() -> None:
    _, (bare,) = _recorded(recipe_of(**U_SHAPED))
    _, (protected,) = _recorded(recipe_of(**U_SHAPED, defense={"labels": {}}))
    first, hidden = (_gradients(t, "to server", "returns")[0] for t in (bare, protected))
    assert first.shape == hidden.shape
    assert not torch.equal(first, hidden)
    cosine = torch.cosine_similarity(first.flatten(1), hidden.flatten(1)).abs()
    assert cosine == pytest.approx(torch.ones(len(first)), abs=1e-4)  # along each one's own direction, either way


def test_owners_without_labels_get_protected_gradients_and_the_one_with_labels_its_own() -> None:
    owners = parties("vertical", CLIENTS[:2], owner_settings={"hidden": [8]})
    recipe = recipe_of(parties=owners, defense={"labels": {}})
    setup, bare = set_up(recipe), set_up(recipe).desk
    vars(bare)["_protection"] = None
    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (32,), generator=draws)
    sent = [torch.rand(32, 8, generator=draws) for _ in owners["clients"]]
    gradients: list[dict[str, Tensor]] = []
    for desk in (bare, setup.desk):
        desk.receive(Message("activations", "ann", 0, {"activations": sent[0], "labels": labels}))
        answers = desk.receive(Message("activations", "ben", 0, {"activations": sent[1]}))
        gradients.append({name: message.tensors["gradient"] for name, message in answers})
    assert torch.equal(gradients[0]["ann"], gradients[1]["ann"])
    assert not torch.equal(gradients[0]["ben"], gradients[1]["ben"])
    for name, tensor in setup.desk.servers["ann"].stage.state_dict().items():
        assert torch.equal(tensor, bare.servers["ann"].stage.state_dict()[name])  # the server learns as before


# A network trained at home, defended now.


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("home") / "run"
    train(recipe_of(training=training(epochs=6)), run)
    return run


def _network(home: Path) -> dict[str, Any]:
    return {**MLP["network"], "start": str(home)}


def test_a_run_begins_with_the_weights_of_another(home: Path) -> None:
    weights = load_file(home / "bottom.safetensors")
    setup = set_up(recipe_of(network=_network(home), defense=CHANNEL))
    stage = setup.client.stage.get_submodule("stage").state_dict()
    assert all(torch.equal(stage[name], tensor) for name, tensor in weights.items())
    top = setup.server.stage.get_submodule("stage").state_dict()
    assert all(torch.equal(top[name], tensor) for name, tensor in load_file(home / "top.safetensors").items())


def test_a_run_begins_with_a_defended_one_of_other_defenses(home: Path, tmp_path: Path) -> None:
    train(recipe_of(network=_network(home), defense=EVERY_DEFENSE), tmp_path / "first")
    weights = load_file(tmp_path / "first" / "bottom.safetensors")
    for table in ({}, {"channel": {"width": 3}}):
        setup = set_up(recipe_of(network=_network(tmp_path / "first"), defense=table))
        stage = setup.client.stage
        while hasattr(stage, "stage"):
            stage = stage.get_submodule("stage")
        for name, tensor in stage.state_dict().items():
            assert torch.equal(tensor, weights[f"stage.stage.{name}"])
    whole = set_up(recipe_of(network=_network(tmp_path / "first"), defense=EVERY_DEFENSE)).client.stage
    assert all(torch.equal(tensor, weights[name]) for name, tensor in whole.state_dict().items())


def test_the_start_of_another_network_is_refused(home: Path, tmp_path: Path) -> None:
    other = {"name": "mlp", "settings": {"hidden": [20, 12, 8]}, "start": str(home)}
    with pytest.raises(RunError, match="safetensors does not fit the recipe's network and cut"):
        set_up(recipe_of(network=other))
    with pytest.raises(RunError, match="no such folder"):
        set_up(recipe_of(network={**other, "start": str(tmp_path / "nowhere")}))


def test_where_the_start_lies_is_no_part_of_what_is_agreed() -> None:
    here, there = (recipe_of(network={**MLP["network"], "start": start}) for start in ("/a", "/b"))
    assert here.digest() == there.digest() != recipe_of().digest()


def test_a_frozen_client_stays_and_its_kept_releases_are_the_same_in_every_epoch(home: Path) -> None:
    recipe = recipe_of(
        network=_network(home),
        defense=CHANNEL,
        training=training(client_learns="nothing"),
        client={"keep_releases": True, "most_releases": 1},
    )
    setup, (transport,) = _recorded(recipe)
    before = {name: t.clone() for name, t in setup.client.stage.state_dict().items()}
    train_epoch(setup, 2)
    assert all(torch.equal(t, before[name]) for name, t in setup.client.stage.state_dict().items())
    crossed = [c.message.tensors for c in transport.transcript if c.message.kind == "activations"]
    by_epoch = [torch.cat([tensors["activations"] for tensors in crossed[at : at + 3]]) for at in (0, 3)]
    rows = [torch.cat(setup.seats[0].batches(epoch)) for epoch in (1, 2)]
    sorted_by_record = [sent[row.argsort()] for sent, row in zip(by_epoch, rows, strict=True)]
    assert torch.equal(*sorted_by_record)


def test_only_the_ends_learn_where_that_is_asked_for(home: Path) -> None:
    setup = set_up(recipe_of(network=_network(home), defense=CHANNEL, training=training(client_learns="ends")))
    before = {name: t.clone() for name, t in setup.client.stage.state_dict().items()}
    train_epoch(setup, 1)
    changed = {name for name, t in setup.client.stage.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {name for name in before if name.startswith("channel.")}


def test_without_keeping_the_ledger_stops_the_second_epoch(home: Path) -> None:
    recipe = recipe_of(network=_network(home), defense=CHANNEL, client={"most_releases": 1})
    setup = set_up(recipe)
    train_epoch(setup, 1)
    with pytest.raises(EgressError, match="the client's limit is 1"):
        train_epoch(setup, 2)


# Predictions: one release a record, or a ledger that stops.


def _asked(run: Path, records: Path, tmp_path: Path) -> str:
    predict(run, records, out=tmp_path / "answers.csv")
    return (tmp_path / "answers.csv").read_text()


def _told(run: Path, **client: Any) -> None:
    """The client's own settings of a finished run, changed by its owner."""
    folder = RunFolder.open_finished(run)
    changed = folder.recipe.client.model_copy(update=client)
    (run / "recipe.toml").write_text(folder.recipe.model_copy(update={"client": changed}).to_toml())


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Path]:
    """A run with a channel, and a file of records."""
    import numpy as np

    run, records = tmp_path / "run", tmp_path / "records.npz"
    train(recipe_of(defense=CHANNEL), run)
    rng = np.random.default_rng(0)
    np.savez(records, images=rng.integers(0, 17, (30, 8, 8)).astype(np.uint8))
    return run, records


def test_kept_releases_give_the_same_answers_again(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, records = trained
    assert _asked(run, records, tmp_path) != _asked(run, records, tmp_path)
    _told(run, keep_releases=True, most_queries=1)
    assert _asked(run, records, tmp_path) == _asked(run, records, tmp_path)
    assert (run / "noise.key").stat().st_mode & 0o777 == 0o600


def _messages(monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    """All messages that leave a client from now on."""
    crossed: list[Message] = []
    send = LocalTransport.send

    def watched(self: LocalTransport, message: Message) -> None:
        crossed.append(message)
        send(self, message)

    monkeypatch.setattr(LocalTransport, "send", watched)
    return crossed


def test_the_ledger_of_queries_stops_before_anything_is_sent(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, records = trained
    _told(run, most_queries=2)
    _asked(run, records, tmp_path)
    _asked(run, records, tmp_path)
    crossed = _messages(monkeypatch)
    with pytest.raises(EgressError, match="30 of 30 records would be released up to 3 times; the client's"):
        _asked(run, records, tmp_path)
    assert crossed == []
    assert (run / "queries.ledger").stat().st_size == 2 * 30 * 16
    (run / "noise.key").rename(tmp_path / "noise.key")
    with pytest.raises(RunError, match=r"noise\.key is missing: without it queries\.ledger counts nothing"):
        _asked(run, records, tmp_path)
    (tmp_path / "noise.key").rename(run / "noise.key")
    # a write that was cut off: nothing had left for it
    (run / "queries.ledger").write_bytes((run / "queries.ledger").read_bytes()[: 30 * 16] + b"half")
    _asked(run, records, tmp_path)
    assert (run / "queries.ledger").stat().st_size == 2 * 30 * 16


def test_a_ledger_of_kept_releases_is_nothing_without_their_key(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, records = trained
    _told(run, keep_releases=True, most_queries=1)
    _asked(run, records, tmp_path)
    _asked(run, records, tmp_path)
    (run / "noise.key").unlink()
    with pytest.raises(RunError, match=r"noise\.key is missing"):
        _asked(run, records, tmp_path)
    assert not (run / "noise.key").exists()
