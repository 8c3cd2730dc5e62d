"""FSHA on digits: what it reads of a real client, what it sends, and that its loss scaling is what beats a penalty.

Legend: B batch, N records, T targets.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.attacks.fsha import FsAttribute, FsHijack, Hijacker, Plan
from milkglass.attacks.fsha_networks import critic_of, decoder
from milkglass.client import Client
from milkglass.cuts import cut
from milkglass.data import Deal
from milkglass.defenses.nopeek import NoPeek
from milkglass.errors import AuditError, MessageError, MissingKnowledgeError
from milkglass.leakage.classification import balanced_accuracy
from milkglass.leakage.reconstruction import squared_errors
from milkglass.messages import Message, Responder
from milkglass.networks import build, cnn
from milkglass.randomness import drawing_from, public_source, rehearsal_source
from milkglass.recipe import Recipe
from milkglass.replay import drive
from milkglass.training.shares import deal_records
from milkglass.transcript import Driven, HonestServer, Knowledge, Pairs, Release, View
from milkglass.transports.local import LocalTransport
from tests.helpers import small_recipe

PLAN = Plan(iterations=160, head_start=300, width=16)


def recipe_of(**changes: object) -> Recipe:
    """A client with twice as many activation values as a digit has pixels."""
    tables: dict[str, object] = {
        "data": {"name": "digits", "train_records": 700, "test_records": 200, "test_share": 0.15},
        "network": {"name": "cnn", "settings": {"width": 8}},
        "cut": {"at": "block1"},
        "attacker": {"auxiliary_share": 0.3, "validation_share": 0.05},
    }
    return small_recipe(**(tables | changes))


@pytest.fixture(scope="module")
def records() -> Deal:
    return deal_records(recipe_of())


def unused() -> HonestServer:
    raise AssertionError("a hostile server has no use for an honest one")


def view_of(records: Deal, recipe: Recipe) -> View:
    """Nothing but records (and whether the digit is above 4), the architecture, and the training of a real client."""

    def architecture(generator: torch.Generator) -> tuple[nn.Module, nn.Module]:
        network = recipe.network
        model = build(network.name, records.record_shape, records.classes, network.settings, generator)
        halves = cut(model, at=recipe.cut.at)
        return halves.bottom, halves.top

    def train(server: Responder, steps: int) -> Driven:
        return drive(recipe, records, rehearsal_source(recipe.seed, recipe.parties.clients[0]), server, steps)

    def nothing(x: Tensor) -> Tensor:
        return torch.full((len(x), 1), float("nan"))

    known, validation, target = (
        Pairs(nothing(part.x), part.x, nothing(part.x), attributes={"high": (part.y > 4).long()})
        for part in (records.auxiliary, records.validation, records.test)
    )
    return View(
        known,
        replace(validation, attributes={}),
        Release(target.activations, target.entitled),
        knowledge=Knowledge(architecture=architecture, train=train, honest_server=unused),
    )


def peek(made: Tensor, records: Deal) -> float:
    """Over the mean digit of the right class: who knows the label is entitled to that."""
    known, test = records.auxiliary, records.test
    means = torch.stack([known.x[known.y == digit].mean(0) for digit in range(10)])
    entitled = squared_errors(means[test.y], test.x).mean()
    return 1 - (squared_errors(made, test.x).mean() / entitled).item()


def changed(view: View, change: Callable[[Driven], Driven]) -> View:
    """The same view, whose trainings end otherwise."""
    train = view.knowledge.train
    assert train is not None
    return replace(view, knowledge=replace(view.knowledge, train=lambda server, steps: change(train(server, steps))))


def test_an_open_door_is_walked_through_but_not_by_other_records(records: Deal) -> None:
    ended: list[Driven] = []

    def keep(driven: Driven) -> Driven:
        ended.append(driven)
        return driven

    view = view_of(records, recipe_of())
    told: list[tuple[int, int]] = []
    made = FsHijack(PLAN).attack(changed(view, keep), lambda done, total: told.append((done, total)))
    assert peek(made.target, records) > FsHijack.open_door
    assert made.validation.shape == records.validation.x.shape
    assert ended[0].steps == PLAN.iterations
    assert told == sorted(told)
    assert told[-1] == (460, 460)

    def of_others(_: Responder, __: int) -> Driven:
        return replace(ended[0], target=ended[0].target.roll(1, dims=0), stopped="step 160: the server looks hostile")

    others = FsHijack(PLAN).attack(replace(view, knowledge=replace(view.knowledge, train=of_others)))
    assert peek(others.target, records) <= FsHijack.closed_door
    assert torch.equal(others.validation, made.validation)  # the same seed: the same bits


def test_loss_scaling_beats_a_penalty_that_stops_it_otherwise(records: Deal) -> None:
    view = view_of(records, recipe_of(defense={"nopeek": {"weight": 1e4}}))
    told = replace(view, knowledge=replace(view.knowledge, penalty=NoPeek(1e4).penalty))
    unscaled, scaled, by_itself = (
        peek(FsHijack(replace(PLAN, loss_scale=scale)).attack(seen).target, records)
        for scale, seen in ((1.0, told), (1e5, view), (None, told))
    )
    assert unscaled < 0
    assert scaled > FsHijack.open_door
    assert by_itself > FsHijack.open_door


def test_an_attribute_is_made_to_cross(records: Deal) -> None:
    guess = FsAttribute(PLAN).attack(view_of(records, recipe_of()), "high")
    assert guess.validation_N.shape == (len(records.validation),)
    assert set(guess.target_T.tolist()) == {0, 1}
    assert balanced_accuracy(guess.target_T, (records.test.y > 4).long()) > 0.8


def hijacker(sent: tuple[int, ...], dtype: torch.dtype = torch.float32, **settings: float) -> Hijacker:
    draws = public_source(0).generator("test")
    with drawing_from(draws):
        wanted, critic = torch.randn(50, *sent, dtype=dtype), critic_of(torch.Size(sent), 8).to(dtype)
    return Hijacker(wanted, critic, replace(PLAN, **settings), 0.0, draws, lambda _: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1, 8, 8), (12,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_its_answers_are_what_a_client_takes_and_of_the_length_it_asked_for(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    draws = public_source(1).generator("test")
    with drawing_from(draws):
        stage = (cnn(shape, 10, width=4)[:1] if len(shape) == 3 else nn.Sequential(nn.Linear(12, 5))).to(dtype)
        x_B = torch.rand(6, *shape, dtype=dtype)
        sent = stage(x_B)[0].shape
    server = hijacker(tuple(sent), loss_scale=30.0)
    optimizer = torch.optim.SGD(stage.parameters(), lr=1e-3)
    client = Client(stage, optimizer, LocalTransport(server), source=public_source(2))
    result = client.step(x_B, torch.zeros(6, dtype=torch.int64))
    assert 0 < result.loss < 2
    answer = server.reply(Message("activations", "client", 1, {"activations": stage(x_B).detach()}))
    assert answer.tensors["gradient"].dtype == dtype
    length = 6 * answer.tensors["gradient"].flatten(1).norm(dim=1).square().mean().sqrt().item()
    assert length == pytest.approx(30.0, rel=1e-4)


def test_its_gradient_grows_with_the_scale_and_shrinks_towards_the_end() -> None:
    z_B = torch.randn(8, 5, generator=torch.Generator().manual_seed(3))

    def lengths(scale: float) -> list[float]:
        server = hijacker((5,), loss_scale=scale, iterations=10)
        replies = [server.reply(Message("activations", "client", step, {"activations": z_B})) for step in range(10)]
        return [reply.tensors["gradient"].norm().item() for reply in replies]

    plain, scaled = lengths(1.0), lengths(1e4)
    assert scaled == pytest.approx([1e4 * length for length in plain], rel=1e-3)
    assert plain[:6] == pytest.approx(6 * plain[:1], rel=1e-4)
    assert plain[6:] == sorted(plain[6:], reverse=True)
    assert plain[-1] < 0.3 * plain[0]
    nopeek = NoPeek(1e4)
    z_B.requires_grad_()
    penalty = nopeek.penalty(torch.rand(8, 5, generator=torch.Generator().manual_seed(4)), z_B)
    assert penalty is not None
    (pull,) = torch.autograd.grad(penalty, z_B)
    assert plain[0] < 0.1 * pull.norm().item() < scaled[0]


def test_it_answers_nothing_but_training_batches_of_its_shape() -> None:
    server, z = hijacker((5,)), torch.zeros(3, 5)
    with pytest.raises(MessageError, match="'queries'"):
        server.reply(Message("queries", "client", 0, {"activations": z}))
    with pytest.raises(MessageError, match=r"activations \(4,\); expected \(5,\)"):
        server.reply(Message("activations", "client", 0, {"activations": z[:, :4]}))


def test_an_unbending_client_is_decoded_as_it_is() -> None:
    """A stage without weights is the pilot: nothing to hijack, and all to read."""
    draws = torch.Generator().manual_seed(0)
    x = torch.rand(400, 6, generator=draws)
    none = torch.zeros(400, 0)

    def driven(_: Responder, steps: int) -> Driven:
        return Driven(x[200:300] / 2, x[300:] / 2, steps)

    knowledge = Knowledge(architecture=lambda _: (Half(), nn.Identity()), train=driven, honest_server=unused)
    view = View(
        Pairs(none[:200], x[:200], none[:200]),
        Pairs(none[:100], x[200:300], none[:100]),
        Release(none[:100], none[:100]),
    )
    made = FsHijack(PLAN).attack(replace(view, knowledge=knowledge))
    assert F.mse_loss(made.target, x[300:]) < 0.1 * x.var()


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


@pytest.mark.parametrize("sent", [(4, 3, 3), (3, 16, 16), (7,)])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 12), (9,)])
def test_every_shape_is_decoded(sent: tuple[int, ...], shape: tuple[int, ...]) -> None:
    with drawing_from(torch.Generator().manual_seed(0)):
        made = decoder(torch.Size(sent), torch.zeros(shape), 4)(torch.randn(5, *sent))
        opinions = critic_of(torch.Size(sent), 4)(torch.randn(5, *sent))
    assert made.shape == (5, *shape)
    assert opinions[0].shape == (5, 1)


def test_what_it_must_know_and_what_it_may_be_told(records: Deal) -> None:
    view = view_of(records, recipe_of())
    blind = replace(view, knowledge=Knowledge())
    with pytest.raises(MissingKnowledgeError, match="'fsha' needs architecture, training"):
        FsHijack().attack(blind)
    with pytest.raises(MissingKnowledgeError, match="'fsha attribute' needs architecture, training"):
        FsAttribute().attack(blind, "high")
    with pytest.raises(AuditError, match="attribute 'hihg': the known pairs do not have it; did you mean 'high'"):
        FsAttribute().attack(view, "hihg")
    for wrong in (
        {"iterations": 0}, {"head_start": 0}, {"width": 0}, {"loss_scale": 0.0}, {"loss_scale": float("inf")},
        {"penalty": -1.0},
    ):  # fmt: skip
        with pytest.raises(AuditError, match=rf"fsha: .*{next(iter(wrong))} = "):
            Plan(**wrong)
    assert repr(FsHijack(PLAN)) == (
        "FsHijack(Plan(iterations=160, head_start=300, loss_scale=None, penalty=100.0, width=16, seed=0))"
    )


def test_a_client_under_plain_descent_survives_and_is_read(records: Deal) -> None:
    training = {"epochs": 2, "batch_size": 32, "optimizer": "sgd", "learning_rate": 0.05, "momentum": 0.9}
    view = view_of(records, recipe_of(training=training))
    pushed = FsHijack(replace(PLAN, loss_scale=25.0)).attack(view)
    assert "the client ended up sending the same for every record" in pushed.note
    told = replace(view, knowledge=replace(view.knowledge, stride=0.5))
    made = FsHijack(PLAN).attack(told)
    assert made.note == ""
    assert peek(made.target, records) > 0.25
    assert peek(made.target, records) > peek(pushed.target, records) + 0.25


def test_a_guard_that_stopped_it_is_told(records: Deal) -> None:
    guard = {"hijack": {"fake_share": 0.25, "warm_up": 3}}
    recipe = recipe_of(guard=guard, training={"epochs": 4, "batch_size": 32})
    note = FsHijack(PLAN).attack(view_of(records, recipe)).note
    assert re.match(
        r"the client stopped after \d+ batches, .* rests on its guard: .* hardly depend on the labels", note
    )


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_a_client_that_sends_the_same_for_every_record_is_told_through_its_noise_too(sigma: float) -> None:
    draws = torch.Generator().manual_seed(5)
    noise = sigma * torch.randn(200, 4, generator=draws)
    broken, whole = torch.full((200, 4), 0.1) + noise, 3 * torch.randn(200, 4, generator=draws) + noise
    assert "the same for every record" in Driven(broken, broken, 9).note(sigma)
    assert Driven(whole, whole, 9).note(sigma) == ""
