"""Clients with files of their own: what each trains on, who may lack what, and the same bits wherever it is trained."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from milkglass.certificates import make_certificates
from milkglass.errors import AuditError, DataError, RecipeError
from milkglass.randomness import rehearsal_source
from milkglass.recipe import Recipe, parse_recipe
from milkglass.records import Records
from milkglass.replay import find_reference, replay
from milkglass.runs import RunFolder
from milkglass.training.join import join
from milkglass.training.rounds import Seat
from milkglass.training.serve import form_of
from milkglass.training.setup import make_client, make_desk
from milkglass.training.shares import deal_and_hash, deal_records, share_of, shared_rehearsal_key
from milkglass.training.split import Setup, set_up, train
from milkglass.transports.local import LocalHub, LocalTransport
from milkglass.transports.wrappers import RecordingTransport
from tests.network import Network, assert_same, goodbyes, play_to_end
from tests.training.whole import MLP, Whole, assert_same_bits, parties, recipe_of, training

NAMES = ["ann", "ben"]
NOTHING_ASIDE = {"auxiliary_share": 0.0, "validation_share": 0.0}
PICTURES = {"record_shape": [1, 8, 8], "classes": 10}
OWNERS = parties("vertical", NAMES, parts=[5, 3], owner_settings={"hidden": [8]})
PATIENTS = np.arange(1000, 1120)
Files = dict[str, Path]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder, "localhost", NAMES)
    return folder


def _pictures(folder: Path) -> Files:
    """Files of unequal sizes; ann's lacks the highest class."""
    draws = np.random.default_rng(0)
    files = {}
    for name, count, classes in (("ann", 90, 9), ("ben", 60, 10)):
        files[name] = folder / f"{name}.npz"
        pictures = draws.integers(0, 256, (count, 8, 8)).astype(np.uint8)
        np.savez(files[name], images=pictures, labels=np.arange(count) % classes)
    return files


def _columns(folder: Path, *, others: int = 0) -> Files:
    """Different columns of the same patients in different orders: ann knows them by number, ben by text.

    The first column of both is the patient's number. Ben has no labels. others: so many of his patients are others.
    """
    draws = np.random.default_rng(1)
    ann, ben = draws.permutation(PATIENTS), draws.permutation(PATIENTS)
    ben[:others] += 5000
    features = np.column_stack([ann, draws.normal(size=(len(ann), 4))])
    np.savez(folder / "ann.npz", features=features, labels=_label_of(ann), patient=ann)
    table: dict[str, Any] = {"number": ben.astype(np.float64), "code": [str(number) for number in ben]}
    table |= {"weight": draws.normal(size=len(ben)), "height": draws.normal(size=len(ben))}
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "ben.parquet")
    return {"ann": folder / "ann.npz", "ben": folder / "ben.parquet"}


def _label_of(patients: Any) -> Any:
    return patients % 3


def _server(**tables: Any) -> Recipe:
    """The recipe of a server, which names no records."""
    tables = {"data": PICTURES, "attacker": NOTHING_ASIDE, "training": training(batch_size=16), **tables}
    return recipe_of(**tables)


def _own(recipe: Recipe, path: Path, **data: Any) -> Recipe:
    """The same of a client with that file."""
    tables = recipe.model_dump(mode="json", exclude_none=True)
    tables["data"] |= {"path": str(path), **data}
    tables["client"]["own_records"] = True
    return parse_recipe(tables)


def _owners(folder: Path, **more: Any) -> tuple[Recipe, dict[str, Recipe]]:
    server = _server(data={"record_shape": [8], "classes": 3}, parties=OWNERS)
    files = _columns(folder, **more)
    return server, {"ann": _own(server, files["ann"], ids="patient"), "ben": _own(server, files["ben"], ids="code")}


def _clients(folder: Path, mode: str) -> tuple[Recipe, dict[str, Recipe]]:
    server = _server(parties=parties(mode, NAMES))
    return server, {name: _own(server, file) for name, file in _pictures(folder).items()}


def _by_hand(server: Recipe, recipes: dict[str, Recipe]) -> Setup:
    """All parties in this process, each client with its own recipe and file."""
    form, shared = form_of(server), shared_rehearsal_key(server)
    desk = make_desk(server, form.record_shape, form.classes, form.shapes, rehearsal_source(server.seed, "server"))
    hub = LocalHub(desk)
    seats = []
    for name, recipe in recipes.items():
        records, hashes = deal_and_hash(recipe, own=name, shared=shared)
        share = share_of(recipe, records, name, hashes)
        transport = RecordingTransport(LocalTransport(hub, name))
        client, _ = make_client(recipe, name, share, form.classes, rehearsal_source(recipe.seed, name), transport)
        seats.append(Seat(recipe, client, share, shared))
    return Setup(server, deal_records(recipes["ann"], own="ann", shared=shared), tuple(seats), {"server": desk}, ())


def _counted(*parts: Records) -> Counter[tuple[bytes, int]]:
    """How often each picture is there with each label."""
    pixels = [(part.x * 255).round().to(torch.uint8) for part in parts]
    return Counter(
        (picture.numpy().tobytes(), int(label))
        for pictures, part in zip(pixels, parts, strict=True)
        for picture, label in zip(pictures, part.y, strict=True)
    )


@pytest.mark.parametrize("way", ["relay", "splitfed1", "vertical"])
def test_between_machines_own_files_end_in_the_bits_of_one_process(
    tmp_path: Path, way: str, certificates: Path
) -> None:
    server, recipes = _owners(tmp_path) if way == "vertical" else _clients(tmp_path, way)
    setup = _by_hand(server, recipes)
    expected, crossed = play_to_end(setup)
    with Network(tmp_path / "network", server, certificates) as network:
        for name, recipe in recipes.items():
            network.write_recipe(recipe, name)
        assert_same(network.run(), expected)
        assert network.frames() == crossed | goodbyes(crossed)
        found = [network.ended().summaries[name]["records"] for name in NAMES]
    assert found == [{"train": len(seat.share.train), "test": len(seat.share.test)} for seat in setup.seats]


@pytest.mark.parametrize("mode", ["relay", "splitfed1"])
def test_a_client_trains_on_its_own_file_alone_and_on_all_of_it_but_its_tests(tmp_path: Path, mode: str) -> None:
    setup = _by_hand(*_clients(tmp_path, mode))
    for seat, count in zip(setup.seats, (90, 60), strict=True):
        with np.load(tmp_path / f"{seat.client.name}.npz") as file:
            held = Counter(zip((row.tobytes() for row in file["images"]), file["labels"].tolist(), strict=True))
        assert _counted(seat.share.train, seat.share.test) == held
        assert len(seat.share.test) == round(0.2 * count)
        rows = torch.cat(seat.batches(1))
        assert len(set(rows.tolist())) == len(rows) == len(seat.share.train) // 16 * 16
    assert setup.seats[0].share.train.y.max() == 8
    assert setup.seats[1].share.train.y.max() == 9


def test_of_an_own_file_pairs_are_set_aside_as_well_by_default(tmp_path: Path) -> None:
    recipe = _own(_server(parties=parties("relay", NAMES), attacker={}), _pictures(tmp_path)["ann"])
    records = deal_records(recipe, own="ann")
    sizes = {"test": 18, "auxiliary": 18, "validation": 9}
    assert {part: len(getattr(records, part)) for part in sizes} == sizes
    assert len(records.train["ann"]) == 90 - sum(sizes.values())


def test_owners_of_columns_train_on_the_same_patients_row_by_row(tmp_path: Path) -> None:
    server, recipes = _owners(tmp_path)
    setup, shared = _by_hand(server, recipes), shared_rehearsal_key(server)
    for part in ("train", "test"):
        patients = {}
        for seat in setup.seats:
            columns = deal_records(recipes[seat.client.name], own=seat.client.name, shared=shared).columns
            assert columns is not None
            first = getattr(seat.share, part).x[:, 0].double().numpy()
            patients[seat.client.name] = (first * columns.scale[0] + columns.mean[0]).round().astype(int)
        assert patients["ann"].tolist() == patients["ben"].tolist()
        assert getattr(setup.seats[0].share, part).y.tolist() == _label_of(patients["ann"]).tolist()
        assert len(set(patients["ann"])) == {"train": 96, "test": 24}[part]
        assert set(patients["ann"]) <= set(PATIENTS)
    assert [seat.share.train.x.shape[1] for seat in setup.seats] == [5, 3]


def test_owners_of_files_end_in_the_bits_of_a_network_in_one_place(tmp_path: Path) -> None:
    setup = _by_hand(*_owners(tmp_path))
    whole = Whole(setup.seats, setup.server)
    for epoch in (1, 2):
        for rows in setup.seats[0].batches(epoch):
            xs = [seat.share.train.x[rows] for seat in setup.seats]
            whole.train(xs, setup.seats[0].share.train.y[rows])
    play_to_end(setup)
    for seat, bottom in zip(setup.seats, whole.bottoms, strict=True):
        assert_same_bits(seat.client.stage, bottom)
    assert_same_bits(setup.server.stage, whole.top)


def test_labels_of_a_later_owner_change_nothing(tmp_path: Path) -> None:
    server, recipes = _owners(tmp_path)
    expected, crossed = play_to_end(_by_hand(server, recipes))
    labeled = pyarrow.parquet.read_table(tmp_path / "ben.parquet")
    column = pyarrow.array(np.arange(len(PATIENTS)) % 7)  # more classes than there are
    pyarrow.parquet.write_table(labeled.append_column("label", column), tmp_path / "ben.parquet")
    again, crossed_again = play_to_end(_by_hand(server, recipes))
    assert_same(again, expected)
    assert crossed_again == crossed


def test_records_without_a_match_are_counted(tmp_path: Path) -> None:
    server, recipes = _owners(tmp_path, others=2)
    with pytest.raises(DataError, match="ann: 2 of 120 records are not matched; ben: 2 of 120 records are not matched"):
        play_to_end(_by_hand(server, recipes))


def test_between_machines_every_owner_is_told_how_many_have_no_match(tmp_path: Path, certificates: Path) -> None:
    server, recipes = _owners(tmp_path, others=3)
    with Network(tmp_path / "network", server, certificates) as network:
        for name, recipe in recipes.items():
            network.write_recipe(recipe, name)
        processes = [network.start(name) for name in network.names]
        for process in processes:
            line = process.failure()
            assert "3 of 120 records are not matched" in line, process.name
            assert "\n" not in line


def test_rows_of_two_files_are_never_taken_for_the_same_patient_by_their_number(tmp_path: Path) -> None:
    server, recipes = _owners(tmp_path)
    ann = recipes["ann"]
    without = ann.model_copy(update={"data": ann.data.model_copy(update={"ids": None})})
    with pytest.raises(RecipeError, match=r"data\.ids is missing"):
        deal_and_hash(without, own="ann", shared=shared_rehearsal_key(server))


def test_a_later_owner_without_labels_must_be_told_the_classes(tmp_path: Path) -> None:
    _, recipes = _owners(tmp_path)
    data = recipes["ben"].data.model_copy(update={"classes": None})
    with pytest.raises(RecipeError, match=r"^data\.classes is missing: ben's own file"):
        deal_records(recipes["ben"].model_copy(update={"data": data}), own="ben")


def test_the_first_owner_needs_labels(tmp_path: Path) -> None:
    server, recipes = _owners(tmp_path)
    with pytest.raises(DataError, match="no label column"):
        deal_records(_own(server, tmp_path / "ben.parquet", ids="code"), own="ann")
    assert len(deal_records(recipes["ben"], own="ben").train["ben"]) == 96


def test_a_label_beyond_the_recipes_classes_is_refused(tmp_path: Path) -> None:
    server = _server(data=PICTURES | {"classes": 9}, parties=parties("relay", NAMES))
    files = _pictures(tmp_path)
    assert deal_records(_own(server, files["ann"]), own="ann").classes == 9
    with pytest.raises(DataError, match="label 9 of record 9 is out of range; expected 0 to 8 for 9 classes"):
        deal_records(_own(server, files["ben"]), own="ben")


def test_a_file_that_names_fewer_classes_is_refused_for_its_numbers_are_others(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "own" / name).mkdir(parents=True)
        for number in range(20):
            Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / "own" / name / f"{number}.png")
    server = _server(data=PICTURES | {"classes": 3}, parties=parties("relay", NAMES))
    with pytest.raises(DataError, match="names 2 classes; expected all 3"):
        deal_records(_own(server, tmp_path / "own"), own="ann")
    two = _server(data=PICTURES | {"classes": 2}, parties=parties("relay", NAMES))
    records = deal_records(_own(two, tmp_path / "own"), own="ann")
    assert len(records.auxiliary) == 0  # also where pictures are decoded only when they are taken


def test_one_process_makes_its_network_for_the_recipes_classes() -> None:
    data = {"name": "digits", "train_records": 96, "test_records": 40, "classes": 12}
    setup = set_up(recipe_of(data=data))
    assert setup.records.classes == 12
    assert list(setup.server.stage.state_dict().values())[-1].shape == (12,)


def test_commands_that_need_records_refuse_a_servers_recipe(tmp_path: Path) -> None:
    server = _server(**MLP)
    assert form_of(server).record_shape == (1, 8, 8)
    with pytest.raises(RecipeError, match=r"^the recipe names no records"):
        train(server, tmp_path / "run")
    with pytest.raises(RecipeError, match=r"^the recipe names no records"):
        join(server, "client", "localhost:1", None, tmp_path / "run")
    with pytest.raises(RecipeError, match=r"^the recipe names no records"):
        deal_records(server)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("share", ["auxiliary_share", "validation_share"])
def test_pairs_may_stay_away_only_of_own_files_and_then_no_audit_is_made(tmp_path: Path, share: str) -> None:
    recipe = recipe_of(attacker={"auxiliary_share": 0.1, "validation_share": 0.1} | {share: 0.0})
    with pytest.raises(RecipeError, match=rf"^attacker\.{share} is 0"):
        set_up(recipe)
    own = recipe.model_copy(update={"client": recipe.client.model_copy(update={"own_records": True})})
    train(own, tmp_path / "run")
    run = RunFolder.open_finished(tmp_path / "run")
    with pytest.raises(AuditError, match="set no pairs aside"):
        replay(run, run)
    with pytest.raises(AuditError, match="set no pairs aside"):
        find_reference(run)  # before it trains one
