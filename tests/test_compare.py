"""Which rows there are, and the recipe of each: everything but the way and the protection is the same."""

from __future__ import annotations

import json
from typing import Any

import pytest

from milkglass.compare import (
    MEASURED,
    PROTECTIONS,
    WAYS,
    Cell,
    Row,
    cells_of,
    check_comparable,
    extras_of,
    read_row,
    recipe_of,
    section_of,
    sorted_rows,
)
from milkglass.compare_cells import MAKERS
from milkglass.compare_section import PROTECTIONS as PROTECTION_NAMES
from milkglass.compare_section import TRAININGS, CompareSection
from milkglass.errors import RecipeError
from milkglass.leakage.estimate import Estimate
from milkglass.recipe import Recipe, parse_recipe

TABLES: dict[str, Any] = {
    "data": {"name": "digits"},
    "network": {"name": "mlp", "settings": {"hidden": [32, 16]}},
    "cut": {"at": "hidden1"},
    "training": {"epochs": 4, "batch_size": 16},
}


def recipe(**tables: Any) -> Recipe:
    return parse_recipe(TABLES | tables)


def of(training: str, protection: str = "none", clients: int = 2) -> Recipe:
    return recipe_of(recipe(), Cell(training, protection, clients), train_records=800, back_at="hidden2")


def test_every_name_of_the_recipe_is_a_way_or_a_protection_with_a_maker() -> None:
    assert tuple(WAYS) == TRAININGS
    assert tuple(PROTECTIONS) == PROTECTION_NAMES
    assert MAKERS.keys() == WAYS.keys()
    assert all(way in WAYS for protection in PROTECTIONS.values() for way in protection.ways)


def test_undefended_comes_before_what_is_compared_with_it() -> None:
    cells = cells_of(CompareSection())
    for cell in cells:
        if cell.training != "federated" and not PROTECTIONS[cell.protection].inference:
            assert cells.index(cell.undefended) <= cells.index(cell)


def test_cells_are_all_that_go_together_and_no_other() -> None:
    cells = cells_of(CompareSection())
    assert len(set(cells)) == len(cells)
    assert {cell.training for cell in cells} == set(WAYS)
    assert {cell.clients for cell in cells if cell.training == "whole"} == {1}
    assert {cell.clients for cell in cells if cell.protection == "secure_aggregation"} == {3, 10}
    assert {cell.clients for cell in cells if PROTECTIONS[cell.protection].inference} == {2}
    assert all(cell.training in PROTECTIONS[cell.protection].ways for cell in cells)


def test_only_names_ways_and_an_unknown_one_is_told_with_the_nearest() -> None:
    cells = cells_of(section_of(recipe(), only=["split", "federated"], clients=[3]))
    assert {cell.training for cell in cells} == {"split", "federated"}
    assert {cell.clients for cell in cells} == {3}
    with pytest.raises(RecipeError, match=r"--only: no way of training is called 'federate'; did you mean 'federated'"):
        section_of(recipe(), only=["federate"])
    with pytest.raises(RecipeError, match=r"compare.clients.*greater than or equal to 1"):
        section_of(recipe(), clients=[0])


@pytest.mark.parametrize(
    ("training", "protection"), [(way, name) for name, each in PROTECTIONS.items() for way in each.ways]
)
def test_all_rows_have_the_same_records_network_seed_and_epochs(training: str, protection: str) -> None:
    clients = 3 if protection == "secure_aggregation" else 2
    made, base = of(training, protection, clients), recipe()
    assert (made.data, made.network, made.seed, made.attacker) == (base.data, base.network, base.seed, base.attacker)
    assert made.training == base.training
    assert len(made.parties.clients) == clients
    assert made.compare is None
    assert (made.dp is not None) == (protection == "dp")
    assert (made.defense.nopeek is not None) == (protection == "nopeek")
    assert (made.defense.channel is not None) == (protection == "channel")
    assert (made.federated.secure_aggregation is not None) == (protection == "secure_aggregation")
    assert (made.cut.back_at is not None) == (training == "u_shaped")
    assert made.parties.is_split == (WAYS[training].kind == "split")


def test_a_row_takes_its_protection_from_the_recipe_and_nothing_else_of_it() -> None:
    base = recipe(defense={"nopeek": {"weight": 3.0}, "channel": {"sigma": 0.7}, "noise": {"sigma": 1.0}})
    nopeek, channel, none = (
        recipe_of(base, Cell("split", name, 2), train_records=800).defense for name in ("nopeek", "channel", "none")
    )
    assert nopeek.nopeek is not None
    assert (nopeek.nopeek.weight, nopeek.channel, nopeek.noise) == (3.0, None, None)
    assert channel.channel is not None
    assert (channel.channel.sigma, channel.nopeek, channel.noise) == (0.7, None, None)
    assert none == recipe().defense


def test_a_collaboration_sees_as_many_records_as_the_others() -> None:
    made = of("collaboration", clients=4)
    assert made.collaboration.target_batch == 4 * 16
    assert made.collaboration.epochs == 4 * 800 // 64


def test_defenses_do_not_change_an_agreed_digest_of_the_base() -> None:
    assert recipe(compare={"clients": [5]}).digest() == recipe().digest()


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"client": {"own_records": True}}, "client.own_records"),
        ({"parties": {"mode": "vertical", "clients": ["a", "b"]}}, "parties.mode vertical"),
        ({"training": {"at_home": True}}, "training.at_home"),
        ({"training": {"drop_last_batch": False}}, "training.drop_last_batch = false"),
        ({"parties": {"mode": "data_parallel"}, "cut": {}}, "'cut.at' is missing"),
    ],
)
def test_what_cannot_be_the_same_in_every_way_is_refused(tables: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        check_comparable(recipe(**tables))


def test_extras_are_those_of_the_way_and_of_the_protection() -> None:
    assert extras_of(Cell("split", "none", 2)) == []
    assert extras_of(Cell("federated", "dp", 2)) == ["federated", "dp"]
    assert extras_of(Cell("federated", "secure_aggregation", 3)) == ["federated"]
    assert extras_of(Cell("split", "homomorphic", 2)) == ["he"]


def test_rows_are_sorted_best_first_and_what_lacks_the_figure_comes_last() -> None:
    def row(accuracy: float | None, sent: float | None) -> Row:
        found = None if accuracy is None else Estimate(accuracy, accuracy, accuracy)
        return Row(Cell("split", "none", 2), MEASURED, accuracy=found, bytes_up=sent)

    rows = [row(0.5, 3.0), row(None, 1.0), row(0.9, None)]
    assert sorted_rows(rows, "accuracy") == [rows[2], rows[0], rows[1]]
    assert sorted_rows(rows, "bytes_up") == [rows[1], rows[0], rows[2]]
    assert sorted_rows(rows, "training") == rows


def test_a_row_is_told_as_numbers() -> None:
    found = Row(Cell("split", "channel", 2), MEASURED, accuracy=Estimate(0.9, 0.8, 0.95), peek=Estimate(0.1, 0.0, 0.2))
    told = found.to_dict()
    assert (told["training"], told["protection"], told["clients"], told["status"]) == (
        "split",
        "channel",
        2,
        "measured",
    )
    assert (told["accuracy"], told["peek"], told["peek_interval"]) == (0.9, 0.1, [0.0, 0.2])
    assert {"client_flops", "bytes_up", "bytes_down", "seconds", "guarantee"} <= told.keys()


def test_a_row_is_read_as_it_was_told() -> None:
    found = Row(
        Cell("federated", "dp", 10),
        MEASURED,
        accuracy=Estimate(0.9, 0.8, 0.95),
        client_flops=1e9,
        bytes_up=3.0,
        rounds=4,
        guarantee="epsilon 3",
        guarantee_covers=True,
        sound=False,
        notes=("a", "b"),
        run="federated-dp-10",
        details={"wire": [1]},
    )
    assert read_row(json.loads(json.dumps(found.to_dict()))) == found
    with pytest.raises(ValueError, match="no such row: spilt-none-2"):
        read_row(found.to_dict() | {"training": "spilt", "protection": "none", "clients": 2})


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"trainings": ["splits"]}, "nothing is called 'splits'; did you mean 'split'"),
        ({"protections": []}, "expected different names, one at least"),
        ({"trainings": ["split", "split"]}, "expected different names"),
        ({"clients": []}, "compare.clients"),
        ({"peek_at_most": 1.5}, "compare.peek_at_most"),
    ],
)
def test_a_wrong_table_is_refused_in_one_line(table: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words) as told:
        recipe(compare=table)
    assert "\n" not in str(told.value)
