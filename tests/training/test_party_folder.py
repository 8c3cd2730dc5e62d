"""A party's folder: what a failed start left makes way, and nothing else does; a run keeps to its key."""

from __future__ import annotations

from pathlib import Path

import pytest

from milkglass.errors import RecipeError, RunError
from milkglass.randomness import Source
from milkglass.training.join import join
from milkglass.training.party_folder import PARTY, own_folder, private_source
from tests.helpers import KEY, small_recipe


def _started(out: Path, key: Path | None = None) -> Source:
    folder = own_folder(out, small_recipe(), "records", resume=False)
    return private_source(folder, key)


def _key(path: Path, content: bytes = KEY) -> Path:
    path.write_bytes(content)
    return path


def test_what_a_start_left_that_came_to_nothing_makes_way_for_another_recipe(tmp_path: Path) -> None:
    out = tmp_path / "run"
    _started(out)
    first = (out / "key").read_bytes()
    (out / "journal").mkdir()
    (out / "journal" / "000000000000.sent").touch()
    folder = own_folder(out, small_recipe(seed=1), "other records", resume=False)
    assert folder.recipe.seed == 1
    assert folder.records_digest == "other records"
    private_source(folder, None)
    assert (out / "key").read_bytes() != first


def test_a_run_that_has_sent_something_stays(tmp_path: Path) -> None:
    out = tmp_path / "run"
    _started(out)
    (out / "journal").mkdir()
    (out / "journal" / "000000000000.sent").write_bytes(b"a frame")
    with pytest.raises(RunError, match="go on with --resume"):
        own_folder(out, small_recipe(seed=1), "records", resume=False)
    assert own_folder(out, small_recipe(), "records", resume=True).recipe.seed == 0
    assert (out / "journal" / "000000000000.sent").read_bytes() == b"a frame"


def test_resume_takes_nothing_away_even_where_nothing_was_sent_yet(tmp_path: Path) -> None:
    out = tmp_path / "run"
    _started(out)
    (out / "run.json").write_text('{"run": 7}')
    key = (out / "key").read_bytes()
    private_source(own_folder(out, small_recipe(), "records", resume=True), None)
    assert (out / "run.json").read_text() == '{"run": 7}'
    assert (out / "key").read_bytes() == key


def test_files_that_no_party_made_are_never_touched(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(small_recipe().to_toml())
    key = _key(tmp_path / "key")
    with pytest.raises(RunError):
        join(small_recipe(), "client", "localhost:1", None, tmp_path, key=key)
    assert (tmp_path / "recipe.toml").read_text() == small_recipe().to_toml()
    assert key.read_bytes() == KEY


def test_a_key_that_was_named_is_kept_when_its_start_makes_way(tmp_path: Path) -> None:
    out = tmp_path / "run"
    _started(out, _key(tmp_path / "mine"))
    assert not (out / "key").exists()
    own_folder(out, small_recipe(seed=1), "records", resume=False)
    assert (tmp_path / "mine").read_bytes() == KEY


def test_a_run_goes_on_under_the_key_that_it_began_with_alone(tmp_path: Path) -> None:
    out, mine = tmp_path / "run", _key(tmp_path / "mine")
    _started(out, mine)
    folder = own_folder(out, small_recipe(), "records", resume=True)
    with pytest.raises(RunError, match="under another private key"):
        private_source(folder, _key(tmp_path / "other", bytes(32)))
    with pytest.raises(RunError, match="name it again with --key"):
        private_source(folder, None)
    assert private_source(folder, mine).read(8) == Source(KEY).read(8)
    assert KEY.hex() not in (out / PARTY).read_text()


def test_one_key_for_both_purposes_is_refused(tmp_path: Path) -> None:
    recipe = small_recipe(parties={"clients": ["a", "b"]})
    key = _key(tmp_path / "key")
    with pytest.raises(RecipeError, match="hold the same bytes"):
        join(recipe, "a", "localhost:1", None, tmp_path / "run", key=key, shared_key=key)
