"""Classification as a volunteer's task, and which task a recipe asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.collaboration.tasks import Batch, Classification, Passes, evaluating, task_of
from milkglass.errors import DataError, RecipeError
from milkglass.randomness import Source, drawing_from
from milkglass.recipe import Recipe, load_recipe, parse_recipe
from milkglass.training.shares import deal_records

HERE = __name__
EXAMPLES = Path(__file__).parents[2] / "examples"


def recipe(**changes: Any) -> Recipe:
    """Digits and a tiny network; `changes` replace whole tables."""
    tables: dict[str, Any] = {
        "data": {"name": "digits", "train_records": 100, "test_records": 300},
        "network": {"name": "mlp", "settings": {"hidden": [16]}},
        "parties": {"mode": "data_parallel"},
    }
    return parse_recipe(tables | changes)


def made_here(function: str) -> Recipe:
    return recipe(network={"name": f"{HERE}:{function}"})


def private(number: int) -> torch.Generator:
    return Source(bytes([number]) * 32).generator("volunteer")


def with_layer(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), layer, nn.Linear(16, 10))


def batch_norm(_shape: Sequence[int], _classes: int) -> nn.Module:
    return with_layer(nn.BatchNorm1d(16))


def batch_norm_without_statistics(_shape: Sequence[int], _classes: int) -> nn.Module:
    return with_layer(nn.BatchNorm1d(16, track_running_stats=False))


class _RunningMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))
        self.mean: Tensor

    def forward(self, x_BF: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(x_BF.detach().mean(0), alpha=0.1)
        return x_BF - self.mean


def running_mean(_shape: Sequence[int], _classes: int) -> nn.Module:
    return with_layer(_RunningMean())


class _Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((16,), 0.5))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.scale: Tensor
        self.calls: Tensor

    def forward(self, x_BF: Tensor) -> Tensor:
        self.calls.add_(1)
        return x_BF * self.scale


def constant_buffer(_shape: Sequence[int], _classes: int) -> nn.Module:
    return with_layer(_Constant())


def dropout(_shape: Sequence[int], _classes: int) -> nn.Module:
    return with_layer(nn.Dropout(0.5))


def frozen_in_evaluation(_shape: Sequence[int], _classes: int) -> nn.Module:
    network = with_layer(nn.Dropout(0.5))
    network.get_submodule("2").eval()
    return network


class _Widen(nn.Module):
    def forward(self, x_BF: Tensor) -> Tensor:
        return x_BF.to(torch.float64)


def in_float64(_shape: Sequence[int], _classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), _Widen(), nn.Linear(16, 10, dtype=torch.float64))


def nothing_to_learn(_shape: Sequence[int], _classes: int) -> nn.Module:
    return with_layer(nn.Identity()).requires_grad_(False)


class _FailsInTraining(nn.Module):
    def forward(self, x_BF: Tensor) -> Tensor:
        if self.training:
            raise ValueError("no such thing\nsecond line")
        return x_BF


def fails_in_training(_shape: Sequence[int], _classes: int) -> nn.Module:
    return with_layer(_FailsInTraining())


def test_volunteers_begin_with_the_same_weights() -> None:
    global_state = torch.get_rng_state()
    one, two, other = task_of(recipe()), task_of(recipe()), task_of(recipe(seed=1))
    assert torch.equal(torch.get_rng_state(), global_state)
    weights = [torch.cat([p.flatten() for p in task.network.parameters()]) for task in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert {parameter.dtype for parameter in one.network.parameters()} == {torch.float32}
    assert one.records == 100


def test_trying_a_network_out_draws_nothing_from_the_global_generator() -> None:
    global_state = torch.get_rng_state()
    task_of(made_here("dropout"))
    assert torch.equal(torch.get_rng_state(), global_state)


def test_batches_follow_from_the_private_generator() -> None:
    batches = [task_of(recipe()).draw(private(number), 32) for number in (1, 1, 2)]
    assert torch.equal(batches[0].inputs, batches[1].inputs)
    assert not torch.equal(batches[0].inputs, batches[2].inputs)
    assert len(batches[0]) == 32


def test_a_pass_is_all_training_records_with_their_labels() -> None:
    task, generator = task_of(recipe()), private(1)
    batches = [task.draw(generator, size) for size in (32, 1, 67)]
    drawn = torch.cat([torch.cat([batch.inputs.flatten(1), batch.targets[:, None]], 1) for batch in batches])
    dealt = deal_records(recipe()).train["client"]
    expected = torch.cat([dealt.x.flatten(1), dealt.y[:, None]], 1)
    assert sorted(drawn.tolist()) == sorted(expected.tolist())


def test_parts_of_several_clients_are_all_trained_on() -> None:
    parties = {"mode": "data_parallel", "clients": ["a", "b", "c"]}
    assert task_of(recipe(parties=parties)).records == 100


@pytest.mark.parametrize("size", [1, 3, 7, 10, 23])
def test_every_record_comes_once_before_any_comes_again(size: int) -> None:
    passes, generator = Passes(10), private(1)
    numbers = torch.cat([passes.next(generator, size) for _ in range(10)])
    whole = numbers[: len(numbers) // 10 * 10].view(-1, 10)
    assert torch.equal(whole.sort(dim=1).values, torch.arange(10).expand_as(whole))
    if len(whole) > 1:
        assert not torch.equal(whole[0], whole[1])


def test_the_loss_is_the_mean_cross_entropy() -> None:
    task = task_of(recipe())
    batch = task.draw(private(1), 9)
    each = [-F.log_softmax(task.network(x[None]), 1)[0, y] for x, y in zip(batch.inputs, batch.targets, strict=True)]
    loss = task.loss(batch)
    assert loss.shape == ()
    torch.testing.assert_close(loss, torch.stack(each).mean())
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in task.network.parameters())


def test_the_test_is_that_of_the_dealt_test_records() -> None:
    task = task_of(recipe())
    test = deal_records(recipe()).test
    with torch.no_grad():
        logits = task.network(test.x)
    measured = task.test()
    assert len(test) > 256, "more than one batch of the test"
    assert measured["loss"] == pytest.approx(float(F.cross_entropy(logits, test.y)), rel=1e-5)
    assert measured["accuracy"] == pytest.approx(float((logits.argmax(1) == test.y).double().mean()))


def test_the_test_depends_on_no_private_draw_and_on_no_dropout() -> None:
    one, two = task_of(made_here("dropout")), task_of(made_here("dropout"))
    two.draw(private(2), 50)
    global_state = torch.get_rng_state()
    assert one.test() == two.test() == two.test()
    assert torch.equal(torch.get_rng_state(), global_state)


def test_after_a_test_every_layer_is_in_the_mode_it_was_in() -> None:
    network = task_of(made_here("frozen_in_evaluation")).network
    before = [layer.training for layer in network.modules()]
    assert not all(before)
    assert any(before)
    with evaluating(network):
        assert not any(layer.training for layer in network.modules())
    assert [layer.training for layer in network.modules()] == before


def test_dropout_draws_from_the_generator_given() -> None:
    task = task_of(made_here("dropout"))
    batch = task.draw(private(1), 16)
    losses = []
    for number in (1, 1, 2):
        with drawing_from(private(number)):
            losses.append(task.loss(batch).item())
    assert losses[0] == losses[1] != losses[2]


def test_a_few_steps_lower_the_loss() -> None:
    task, generator = task_of(recipe(data={"name": "digits"})), private(1)
    adam = torch.optim.Adam(task.network.parameters(), 1e-2)
    before = task.test()
    for _ in range(150):
        adam.zero_grad()
        task.loss(task.draw(generator, 64)).backward()  # type: ignore[no-untyped-call]
        adam.step()
    after = task.test()
    assert after["loss"] < 0.5 * before["loss"]
    assert after["accuracy"] > 0.8


def test_a_batch_in_pieces_is_the_same_records() -> None:
    whole = Batch(torch.arange(7), torch.arange(7) + 10)
    pieces = list(whole.split(3))
    assert [len(piece) for piece in pieces] == [3, 3, 1]
    assert torch.equal(torch.cat([piece.targets - piece.inputs for piece in pieces]), torch.full((7,), 10))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("batch_norm", r"BatchNorm \(2\) takes its statistics .*; use nn.GroupNorm$"),
        ("batch_norm_without_statistics", r"BatchNorm \(2\) takes its statistics .*; use nn.GroupNorm$"),
        ("running_mean", r"training changes 2.mean, .* such as nn.GroupNorm$"),
        ("in_float64", r"3.weight is torch.float64; expected torch.float32$"),
        ("nothing_to_learn", r"has nothing to learn$"),
        ("fails_in_training", r"fails in training on records of shape \(1, 8, 8\): no such thing$"),
    ],
)
def test_networks_that_volunteers_cannot_agree_on_are_refused(function: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        task_of(made_here(function))


def test_buffers_that_stay_are_no_hindrance_and_counters_are_put_back() -> None:
    task = task_of(made_here("constant_buffer"))
    assert isinstance(task, Classification)
    again = constant_buffer((1, 8, 8), 10)
    with torch.no_grad():
        again(torch.zeros(2, 1, 8, 8))  # what networks.build does
    assert torch.equal(task.network.get_buffer("2.calls"), again.get_buffer("2.calls"))


def test_a_text_and_albert_go_together(tmp_path: Path) -> None:
    text = tmp_path / "a.TXT"
    text.write_text("some text")
    with pytest.raises(RecipeError, match=r"a.TXT is a text; network is 'mlp', expected 'albert'$"):
        task_of(recipe(data={"path": str(text)}))
    with pytest.raises(RecipeError, match=r"network 'albert' reads a text; data is digits; expected .* end with .txt$"):
        task_of(recipe(network={"name": "albert"}))


def test_the_examples_are_tasks() -> None:
    assert task_of(load_recipe(EXAMPLES / "collaboration.toml")).records > 500
    with pytest.raises(DataError, match=r"text.txt: No such file or directory; expected a text in UTF-8$"):
        task_of(load_recipe(EXAMPLES / "collaboration_albert.toml"))


def test_a_text_is_no_file_of_records(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("some text")
    with pytest.raises(DataError, match=r"a.txt: a text is for parties.mode collaboration with network albert; exp"):
        deal_records(recipe(data={"path": str(text)}))


def test_an_untrained_network_knows_nothing() -> None:
    assert task_of(recipe()).test()["loss"] == pytest.approx(math.log(10), rel=0.1)
