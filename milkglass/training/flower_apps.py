"""Federated averaging as Flower's two apps: what a client answers, and how the server goes from round to round.

    query     the agreed recipe  ->  the client's name, its training records, its privacy; or what differs
    train     weights, epoch     ->  its own weights after a round, its loss, and how the received ones tested
    evaluate  weights            ->  how they tested

Where the recipe says secure aggregation, a `train` is four messages each way (`private/secure_aggregation.py`), and
what a client would tell beside its weights is summed with them. The averaging is Flower's own `FedAvg`; answers are
sorted by client before, for a sum's last bits depend on the order. Used by the simulation and between machines alike.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from milkglass.errors import LinkError, MessageError, MilkglassError, first_line, foreign_line
from milkglass.flower import flower
from milkglass.guards import finite
from milkglass.recipe import Recipe
from milkglass.training.federated import Member, OnBatch
from milkglass.training.federated_rounds import KEPT, Greeted, RoundResult, Rounds, told_privacy
from milkglass.training.flower_traffic import CountingGrid
from milkglass.transports.agreement import Agreement

_ARRAYS: Final = "arrays"
_ASKED: Final = "config"
_METRICS: Final = "metrics"
_RECORDS: Final = "num-examples"
_MOST_RECORDS: Final = 2**40

Weights = Mapping[str, Tensor]


def client_app(recipe: Recipe, member_of: Callable[[Context], Member], on_batch: OnBatch | None = None) -> ClientApp:
    """Flower's ClientApp of a recipe. member_of: the client that a node is, from its context.

    Whatever goes wrong at a client is one line in its answer. on_batch: called after each batch.
    """
    flower()
    app = ClientApp()

    @app.query(mods=[_telling])
    def greet(message: Message, context: Context) -> Message:
        member = member_of(context)
        theirs = str(message.content.config_records[_ASKED]["recipe"])
        difference = Agreement(recipe.agreed(), ()).difference(json.loads(theirs))
        if difference is not None:
            raise LinkError(f"{member.name} and the server do not agree: {difference}")
        privacy = "" if member.privacy is None else json.dumps(member.privacy)
        greeting: dict[str, Any] = {"name": member.name, "records": member.records, "privacy": privacy}
        return Message(RecordDict({_ASKED: ConfigRecord(greeting)}), reply_to=message)

    @app.evaluate(mods=[_telling])
    def evaluate(message: Message, context: Context) -> Message:
        member = member_of(context)
        right = member.right(message.content.array_records[_ARRAYS].to_torch_state_dict())
        told: dict[str, Any] = {_RECORDS: member.records, "right": right, "tested": len(member.share.test)}
        return Message(RecordDict({_METRICS: MetricRecord(told)}), reply_to=message)

    if recipe.federated.secure_aggregation is not None:
        _train_in_secret(app, recipe, member_of, on_batch)
        return app

    @app.train(mods=[_telling])
    def train(message: Message, context: Context) -> Message:
        member = member_of(context)
        received = message.content.array_records[_ARRAYS].to_torch_state_dict()
        right = member.right(received)
        result = member.round(received, _epoch(message.content.config_records[_ASKED], recipe), on_batch)
        told: dict[str, Any] = {
            _RECORDS: member.records,
            "loss": result.loss,
            "accuracy": result.accuracy,
            "right": right,
            "tested": len(member.share.test),
        }
        content = RecordDict({_ARRAYS: ArrayRecord(result.weights), _METRICS: MetricRecord(told)})
        return Message(content, reply_to=message)

    return app


def server_app(rounds: Rounds) -> ServerApp:
    """Flower's ServerApp that brings `rounds` to its end: from its next round to the closing test.

    Raises MilkglassError where too few clients are left, or one's recipe is another; the last checkpoint is kept.
    """
    flower()
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        counting = CountingGrid(grid, rounds.sent)
        _greet(rounds, counting)
        play = _secure_round if rounds.recipe.federated.secure_aggregation is not None else _plain_round
        while rounds.next <= rounds.all:
            rounds.done(play(rounds, counting))
        _close(rounds, counting)

    return app


def _greet(rounds: Rounds, grid: CountingGrid) -> None:
    """Learn which node is which client, and that all agree on the recipe."""
    told = Agreement(rounds.recipe.agreed(), ()).told().numpy().tobytes().decode()
    content = RecordDict({_ASKED: ConfigRecord({"recipe": told})})
    nodes = sorted(grid.get_node_ids())
    answers = grid.ask([Message(content, node, MessageType.QUERY) for node in nodes], _patience(rounds))
    for answer in answers:
        if answer.has_error():
            raise LinkError(grid.reason(answer.metadata.src_node_id))
        said: Mapping[str, Any] = answer.content.config_records[_ASKED]
        name, records = str(said["name"]), said["records"]
        if name not in rounds.sent or name in rounds.greeted:
            raise LinkError(
                f"a client calls itself {foreign_line(name)!r}: no client of the recipe, or one that is here"
            )
        if not isinstance(records, int) or not 0 < records < _MOST_RECORDS:
            raise LinkError(f"{name} says that it has {records} training records")
        rounds.greeted[name] = Greeted(records, told_privacy(str(said["privacy"])))
        grid.name(answer.metadata.src_node_id, name)
    rounds.check_enough("before the first round", grid.missing(rounds.greeted))


def _plain_round(rounds: Rounds, grid: CountingGrid) -> RoundResult:
    """All clients train from the weights that there are; Flower's FedAvg averages what they answer."""
    began, number = time.perf_counter(), rounds.next
    strategy = FedAvg(min_train_nodes=1, min_available_nodes=1, fraction_evaluate=0.0)
    config = ConfigRecord({"epoch": rounds.first_epoch(number)})
    rounds.check_enough(f"round {number}", grid.missing(grid.present()))
    messages = strategy.configure_train(number, ArrayRecord(dict(rounds.weights)), config, grid)
    answers = {grid.names[m.metadata.src_node_id]: m for m in grid.ask(messages, _patience(rounds)) if m.has_content()}
    fitting = {}
    for name in rounds.sent:
        if name in answers:
            wrong = _unfit(answers[name].content, rounds, name)
            if wrong is None:
                fitting[name] = answers[name]
            else:
                grid.refuse(name, wrong)
    missing = grid.missing(fitting)
    rounds.check_enough(f"round {number}", missing)
    mean, told = cast(tuple[ArrayRecord, Mapping[str, Any]], strategy.aggregate_train(number, list(fitting.values())))
    return RoundResult(
        _like(mean.to_torch_state_dict(), rounds.weights),
        float(told["loss"]),
        float(told["accuracy"]),
        _right_share(fitting.values()),
        missing,
        time.perf_counter() - began,
    )


def _secure_round(rounds: Rounds, grid: CountingGrid) -> RoundResult:
    """The same by SecAgg+: the server sees the sum alone."""
    from milkglass.private.secure_aggregation import secure_round, settings_of

    section = rounds.recipe.federated.secure_aggregation
    assert section is not None
    began, number = time.perf_counter(), rounds.next
    grid.forget()
    present = set(grid.present())
    rounds.check_enough(f"round {number}", grid.missing(present))
    records = {name: greeted.records for name, greeted in rounds.greeted.items()}
    try:
        result = secure_round(
            grid,
            settings_of(section, len(rounds.sent)),
            [node for node, name in grid.in_order() if name in present],
            [tensor.numpy() for tensor in rounds.weights.values()],
            largest=max(records.values()),
            least=rounds.least,
            round_=number,
            config={"epoch": rounds.first_epoch(number)},
            timeout_seconds=_patience(rounds),
        )
    except LinkError as error:
        gone = "; ".join(f"{name} ({reason})" for name, reason in grid.failed.items())
        raise LinkError(f"{error}; without {gone or 'anybody missing'}; {KEPT}") from None
    names = [grid.names[node] for node in result.nodes]
    missing = grid.missing(names)
    rounds.check_enough(f"round {number}", missing)
    loss, accuracy, right, tested = (float(value) for value in result.told)
    seen = sum(records[name] for name in names)
    summed = {name for name, tensor in rounds.weights.items() if tensor.is_floating_point()}
    means = iter(result.arrays)
    weights = {
        name: torch.from_numpy(np.array(next(means))).to(tensor.dtype) if name in summed else tensor
        for name, tensor in rounds.weights.items()
    }
    counts = round(right * seen), round(tested * seen)
    return RoundResult(weights, loss, accuracy, _share(*counts), missing, time.perf_counter() - began)


def _close(rounds: Rounds, grid: CountingGrid) -> None:
    """Have the last weights tested."""
    content = RecordDict({_ARRAYS: ArrayRecord(dict(rounds.weights))})
    present = set(grid.present())
    messages = [Message(content, node, MessageType.EVALUATE) for node, name in grid.in_order() if name in present]
    answers = [answer for answer in grid.ask(messages, _patience(rounds)) if answer.has_content()]
    rounds.check_enough("the closing test", grid.missing([grid.names[each.metadata.src_node_id] for each in answers]))
    rounds.closed(_right_share(answers))


def _train_in_secret(
    app: ClientApp, recipe: Recipe, member_of: Callable[[Context], Member], on_batch: OnBatch | None
) -> None:
    """Register the client's training, masked by Flower's SecAgg+."""
    from milkglass.private.secure_aggregation import answer, client_mods, received, settings_of

    section = recipe.federated.secure_aggregation
    assert section is not None
    settings = settings_of(section, len(recipe.parties.clients))
    mods = client_mods(settings, lambda context: member_of(context).source)

    @app.train(mods=[_telling, *mods])
    def train(message: Message, context: Context) -> Message:
        member = member_of(context)
        arrays, asked = received(message)
        own = member.network.state_dict()
        weights = {name: torch.from_numpy(np.array(array)) for name, array in zip(own, arrays, strict=True)}
        right = member.right(weights)
        result = member.round(weights, _epoch(asked, recipe), on_batch)
        counts = right / member.records, len(member.share.test) / member.records
        summed = [tensor.numpy() for tensor in result.weights.values() if tensor.is_floating_point()]
        content = answer(settings, context, summed, [result.loss, result.accuracy, *counts], member.records)
        return Message(content, reply_to=message)


def _telling(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """What a client raises is its answer, in one line; of what milkglass did not say itself the kind alone, no more."""
    try:
        return call_next(message, context)
    except MilkglassError as error:
        words = first_line(error)
    except Exception as error:
        words = f"{type(error).__name__}, whose words stay with the client"
        logging.getLogger(__name__).error("milkglass: %s: %s", type(error).__name__, first_line(error))
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, words), reply_to=message)


def _epoch(asked: Mapping[str, Any], recipe: Recipe) -> int:
    epoch, epochs = asked.get("epoch"), recipe.training.epochs
    if not isinstance(epoch, int) or epoch not in range(1, epochs + 1, recipe.federated.local_epochs):
        raise MessageError(f"the server asks for a round from epoch {epoch!r}, and the recipe has no such round")
    return epoch


def _unfit(content: RecordDict, rounds: Rounds, name: str) -> str | None:
    """Why a client's answer is no use; None for one that is."""
    arrays, metrics = content.get(_ARRAYS), content.get(_METRICS)
    if not isinstance(arrays, ArrayRecord) or not isinstance(metrics, MetricRecord):
        return "its answer holds no weights"
    try:
        weights = arrays.to_torch_state_dict()
    except (ValueError, TypeError, KeyError, EOFError) as error:
        return f"its weights cannot be read: {first_line(error)}"
    if {key: (t.shape, t.dtype) for key, t in weights.items()} != {
        key: (t.shape, t.dtype) for key, t in rounds.weights.items()
    }:
        return "its weights are another network's"
    if not all(finite(tensor) for tensor in weights.values() if tensor.is_floating_point()):
        return "its weights are not finite (NaN or infinity)"
    told = {key: metrics.get(key) for key in (_RECORDS, "loss", "accuracy", "right", "tested")}
    if set(metrics) != set(told) or not all(isinstance(value, int | float) for value in told.values()):
        return "it does not tell its loss, its accuracy and how many records it trained on and tested"
    if told[_RECORDS] != rounds.greeted[name].records:
        return f"it has {told[_RECORDS]} training records, and said {rounds.greeted[name].records} at first"
    return None


def _like(found: Weights, before: Weights) -> dict[str, Tensor]:
    """In the types of `before`: Flower's mean of whole numbers, such as BatchNorm's counter, is a float."""
    return {
        name: found[name].to(tensor.dtype) if tensor.is_floating_point() else found[name].round().to(tensor.dtype)
        for name, tensor in before.items()
    }


def _right_share(answers: Iterable[Message]) -> float | None:
    """Of all test records that these clients have tested."""
    told: list[Mapping[str, Any]] = [answer.content.metric_records[_METRICS] for answer in answers]
    return _share(sum(each["right"] for each in told), sum(each["tested"] for each in told))


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _patience(rounds: Rounds) -> float:
    return rounds.recipe.federated.round_seconds
