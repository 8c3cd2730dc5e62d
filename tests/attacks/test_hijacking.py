"""A hijacking server: the real client accepts what it says and is driven by it; scaling its gradient does just that."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from milkglass.attacks.fsha import FsAttribute, FsHijack, Plan
from milkglass.errors import AuditError, MissingKnowledgeError
from milkglass.messages import Message, Responder
from milkglass.replay import find_reference, replay
from milkglass.runs import RunFolder
from milkglass.training.split import train
from milkglass.transcript import Driven, Knowledge, Trial
from tests.helpers import small_recipe

QUICK = Plan(iterations=12, head_start=20, width=4)


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    path = tmp_path_factory.mktemp("run") / "run"
    train(small_recipe(), path)
    run = RunFolder.open_finished(path)
    return replay(run, find_reference(run)).trials[0]


def test_it_rebuilds_every_record_and_the_same_seed_gives_the_same_bits(trial: Trial) -> None:
    one, two = (FsHijack(QUICK).attack(trial.view) for _ in range(2))
    other = FsHijack(replace(QUICK, seed=1)).attack(trial.view)
    assert one.target.shape == trial.truth.shape
    assert one.validation.shape == trial.view.validation.records.shape
    assert torch.equal(one.target, two.target)
    assert not torch.equal(one.target, other.target)
    assert 0 <= one.target.min() <= one.target.max() <= 1


def test_loss_scale_scales_the_gradient_and_nothing_else(trial: Trial) -> None:
    answers: dict[float, list[Message]] = {1.0: [], 50.0: []}
    knows = trial.view.knowledge
    assert knows.train is not None
    really = knows.train

    class Tap:
        def __init__(self, server: Responder, heard: list[Message]) -> None:
            self._server, self._heard = server, heard

        def reply(self, message: Message) -> Message:
            self._heard.append(self._server.reply(message))
            return self._heard[-1]

    for scale, heard in answers.items():

        def listening(server: Responder, steps: int, heard: list[Message] = heard) -> Driven:
            return really(Tap(server, heard), steps)

        view = replace(trial.view, knowledge=replace(knows, train=listening))
        FsHijack(replace(QUICK, loss_scale=scale)).attack(view)
    plain, scaled = (heard[0].tensors for heard in answers.values())  # later on the clients differ
    torch.testing.assert_close(scaled["gradient"], 50 * plain["gradient"])
    assert torch.equal(scaled["loss"], plain["loss"])
    assert len(answers[1.0]) == QUICK.iterations


def test_an_attribute_is_guessed_by_the_same_server(trial: Trial) -> None:
    def bright(records: Tensor) -> Tensor:
        return (records.flatten(1).mean(1) > 0.3).long()

    view = replace(trial.view, known=replace(trial.view.known, attributes={"bright": bright(trial.view.known.records)}))
    made = FsAttribute(replace(QUICK, iterations=40, head_start=100)).attack(view, "bright")
    assert made.target_T.shape == (len(trial.truth),)
    assert set(made.target_T.tolist()) <= {0, 1}
    with pytest.raises(AuditError, match="did you mean 'bright'"):
        FsAttribute(QUICK).attack(view, "brihgt")


def test_without_a_training_it_says_what_is_missing(trial: Trial) -> None:
    view = replace(trial.view, knowledge=Knowledge())
    with pytest.raises(MissingKnowledgeError, match="attack 'fsha' needs architecture, training; the view has none"):
        FsHijack(QUICK).attack(view)


@pytest.mark.parametrize("wrong", [{"iterations": 0}, {"loss_scale": 0.0}, {"loss_scale": float("inf")}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(AuditError, match="expected"):
        Plan(**wrong)  # type: ignore[arg-type]
