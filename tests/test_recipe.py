"""A recipe says what it means; a wrong one says in one line what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from milkglass.errors import RecipeError
from milkglass.recipe import Recipe, fields, first_difference, load_recipe, parse_recipe, reference_page

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "examples" / "digits.toml"


def test_the_example_is_what_the_readme_says() -> None:
    recipe = load_recipe(DIGITS)
    assert recipe.parties.clients == ("hospital-a",)
    assert recipe.defense.nopeek is not None
    assert recipe.undefended().defense.nopeek is None


def test_toml_round_trip(tmp_path: Path) -> None:
    recipe = load_recipe(DIGITS)
    (tmp_path / "again.toml").write_text(recipe.to_toml())
    assert load_recipe(tmp_path / "again.toml") == recipe


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("training.epochs=3", "training.epochs", 3),
        ("training.learning_rate=1", "training.learning_rate", 1.0),
        ("network.name=mlp", "network.name", "mlp"),
        ('network.name="mlp"', "network.name", "mlp"),
        ("network.settings.width=8", "network.settings.width", 8),
        ("network.settings={ hidden = [8, 8] }", "network.settings.hidden", [8, 8]),
        ("defense.noise.sigma=0.5", "defense.noise.sigma", 0.5),
        ("training.drop_last_batch=false", "training.drop_last_batch", False),
        ('parties.clients=["a"]', "parties.clients", ("a",)),
    ],
)
def test_overrides(override: str, key: str, value: object) -> None:
    found: object = load_recipe(DIGITS, [override])
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value


def test_a_whole_table_can_be_overridden() -> None:
    assert load_recipe(DIGITS, ["defense={}"]).defense == load_recipe(DIGITS).undefended().defense


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.epoch=3", "unknown key 'training.epoch'; did you mean 'epochs'? known: epochs, batch_size"),
        ("trainin.epochs=3", "unknown key 'trainin'; did you mean 'training'?"),
        ("defense.nopek.weight=1", "did you mean 'nopeek'?"),
        ("defense.nopeek.wieght=1", "did you mean 'weight'?"),
        ("training.epochs=many", "training.epochs: input should be a valid integer, got 'many'"),
        ("training.epochs=0", "training.epochs: input should be greater than or equal to 1, got 0"),
        ("training.optimizer=lbfgs", "input should be 'sgd' or 'adam', got 'lbfgs'"),
        ("defense.nopeek.weight=nan", "defense.nopeek.weight: input should be a finite number"),
        ("data.path=x.npz", "exactly one of name, path and hub says where the records are; found name and path"),
        ("training.batch_size=3", "NoPeek's penalty needs at least 4 records in a batch"),
        ("attacker.auxiliary_share=1.5", "attacker.auxiliary_share: input should be less than 1"),
        ("parties.clients=['../a']", "parties.clients.0"),
        ("parties.clients=[]", "parties.clients"),
        ("parties.mode=vertical", "mode vertical needs two clients"),
        ("parties.mode=splitfed", "parties.mode: input should be 'relay', 'splitfed1'"),
        ("training.micro_batches=7", "it must divide batch_size"),
        ("parties.server=Hospital-A", "every party needs a name of its own"),
        ("threads=100000", "threads: input should be less than or equal to 1024"),
        ("data.test_split=test", "test_split goes with hub"),
        ("seed", "expected KEY=VALUE"),
        ("seed.x=1", "seed is a value, not a table"),
    ],
)
def test_wrong_overrides(override: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(DIGITS, [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed = ", "not valid TOML"),
        ("seed = 1", "'data' is missing"),
        ("\x00\xff", "not valid TOML"),
        ('[data]\n[network]\nname="cnn"\n[cut]\nat="x"', "found none of them"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"r\.toml") as caught:
        load_recipe(path)
    assert words in str(caught.value)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="No such file"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not a text file"):
        load_recipe(tmp_path / "binary.toml")


def test_paths_are_relative_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.toml").write_text('[data]\npath="a.npz"\n[network]\nname="cnn"\n[cut]\nat="x"\n')
    assert load_recipe(tmp_path / "r.toml").data.path == str(tmp_path / "a.npz")
    monkeypatch.chdir(tmp_path.parent)
    for override in ("data.path=b.npz", 'data={path="b.npz"}'):
        assert load_recipe(tmp_path / "r.toml", [override]).data.path == str(tmp_path.parent / "b.npz")
    assert load_recipe(tmp_path / "r.toml", ["seed=3"]).data.path == str(tmp_path / "a.npz")


@pytest.mark.parametrize("given", [{}, {"record_shape": [8]}, {"classes": 3}])
def test_only_a_server_that_says_what_records_are_like_need_not_name_any(given: dict[str, object]) -> None:
    assert _recipe(data={"record_shape": [8], "classes": 3}).digest() == _recipe().digest()
    with pytest.raises(RecipeError, match="found none of them, nor both record_shape and classes"):
        _recipe(data=given)


def test_the_page_tells_lists_of_numbers_from_lists_of_names() -> None:
    kinds = {key: kind for key, kind, _, _ in fields()}
    numbers = ("parties.vertical.parts", "data.record_shape")
    assert {kinds[key] for key in numbers} == {"list of whole numbers"}
    assert {kinds[key] for key in ("parties.clients", "cut.hops", "data.sensitive")} == {"list of names"}


def _recipe(**changes: object) -> Recipe:
    tables: dict[str, object] = {"data": {"path": "/a.npz"}, "network": {"name": "cnn"}, "cut": {"at": "x"}}
    return parse_recipe(tables | changes)


def test_the_digest_covers_what_is_agreed_and_nothing_local() -> None:
    same = [_recipe(data={"path": "/elsewhere/b.npz"}), _recipe(versions={"torch": "0"}), _recipe(guard={"hijack": {}})]
    assert {recipe.digest() for recipe in same} == {_recipe().digest()}
    other = _recipe(seed=1)
    assert other.digest() != _recipe().digest()
    assert first_difference(_recipe(), other) == "seed is 0 here and 1 there"
    assert first_difference(_recipe(), same[0]) is None


def test_sensitive_columns_are_agreed_on_and_a_recipe_without_keeps_its_digest() -> None:
    named = _recipe(data={"path": "/a.npz", "sensitive": ["sex", "race"]})
    assert named.data.sensitive == ("sex", "race")
    assert _recipe(data={"path": "/a.npz", "sensitive": []}).digest() == _recipe().digest()
    # what this recipe hashed to before there was the key: references and stopped runs of then stay valid
    assert _recipe().digest() == "155ef22e210f1a8182aea9cfea13ebda13b773a8ae4dcc31037353ee123c1bfa"
    assert first_difference(named, _recipe()) == "data.sensitive is ['sex', 'race'] here and None there"
    with pytest.raises(RecipeError, match="data: sensitive names a column twice: sex, sex"):
        _recipe(data={"path": "/a.npz", "sensitive": ["sex", "sex"]})


def test_every_field_is_described_and_the_page_is_current() -> None:
    assert all(text for _, _, _, text in fields())
    assert (ROOT / "docs" / "recipes.md").read_text() == reference_page(), "run `make docs`"
