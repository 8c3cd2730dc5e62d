"""Which records are whose: dealt from one file, or a party's own, and in vertical training in an order all agree on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from milkglass.data import Deal, RawRecords, Records, deal, load, owners_part
from milkglass.errors import RecipeError
from milkglass.linkage import hash_ids, sorted_by_hash
from milkglass.randomness import Source, public_source, rehearsal_source
from milkglass.recipe import Recipe
from milkglass.records import UNLABELED


@dataclass(frozen=True)
class Share:
    """One client's own records: to train on, to test on; hashes (N, 32) of their ids where owners match them."""

    train: Records
    test: Records
    hashes: torch.Tensor | None = None


def shared_rehearsal_key(recipe: Recipe) -> Source:
    """What the clients share, where one process plays all of them: it follows from the seed, so it hides nothing."""
    return rehearsal_source(recipe.seed, "shared by the clients")


def deal_records(recipe: Recipe, *, own: str | None = None, shared: Source | None = None) -> Deal:
    """The recipe's records, dealt to its clients, the attacker and the audit: public, from the seed.

    own: the client whose own records the file holds. shared: the owners' key in vertical training, where all of them
    deal records that lie in the order of their hashed ids.
    """
    return deal_and_hash(recipe, own=own, shared=shared)[0]


def deal_and_hash(
    recipe: Recipe, *, own: str | None = None, shared: Source | None = None
) -> tuple[Deal, torch.Tensor | None]:
    """`deal_records`, and in vertical training the hashes (N, 32) of all ids, which the server compares."""
    if not recipe.parties.is_vertical:
        return _deal(recipe, _raw(recipe, own), own), None
    key = shared or shared_rehearsal_key(recipe)
    run = bytes.fromhex(recipe.digest())
    parts: list[RawRecords | None] = []
    hashes = []
    for what, raw in zip((b"train", b"test"), _raw(recipe, own), strict=True):
        if raw is None:
            parts.append(None)
            continue
        if own is not None and raw.ids is None:
            raise RecipeError("data.ids is missing: owners with files of their own match records by ids, not by rows")
        hashed = hash_ids(np.arange(len(raw)) if raw.ids is None else raw.ids, key, run + what)
        order = sorted_by_hash(hashed)
        parts.append(raw.in_order(order))
        hashes.append(hashed[order])
    train, test = parts
    assert train is not None
    return _deal(recipe, (train, test), own), torch.from_numpy(np.concatenate(hashes))


def share_of(recipe: Recipe, records: Deal, name: str, hashes: torch.Tensor | None = None) -> Share:
    """What of a deal is the client's of that name.

    Test records are parted as well, so that each is tested once; owners of columns have theirs of every record.
    """
    clients = recipe.parties.clients
    index, count = clients.index(name), len(clients)
    train, test = records.train[name], records.test
    if recipe.parties.is_vertical:
        if recipe.client.own_records:
            return Share(train, test, hashes)
        way = recipe.parties.vertical
        train, test = (
            replace(part, x=owners_part(part.x, index, count, way.axis, way.parts)) for part in (train, test)
        )
        return Share(train, test, hashes)
    if count > 1 and not recipe.client.own_records:
        test = test.take(torch.arange(len(test)).tensor_split(count)[index])
    return Share(train, test)


def owner_shapes(recipe: Recipe, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The shape of one record as each client holds it, where one of the whole is `shape`."""
    clients = recipe.parties.clients
    if not recipe.parties.is_vertical:
        return dict.fromkeys(clients, tuple(shape))
    way, example = recipe.parties.vertical, torch.zeros(1, *shape)
    parts = [owners_part(example, i, len(clients), way.axis, way.parts) for i in range(len(clients))]
    return {name: tuple(part.shape[1:]) for name, part in zip(clients, parts, strict=True)}


def _raw(recipe: Recipe, own: str | None) -> tuple[RawRecords, RawRecords | None]:
    """The training file, and the test file if there is one; of an owner whose labels nobody uses, without them."""
    data = recipe.data
    if data.name is None and data.path is None and data.hub is None:
        raise RecipeError("the recipe names no records; expected data.path, data.name or data.hub where they are")
    bare = own is not None and recipe.parties.is_vertical and own != recipe.parties.clients[0]
    if bare and data.classes is None:
        raise RecipeError(
            f"data.classes is missing: {own}'s own file has no labels that count, so the recipe must say how many "
            "classes there are"
        )

    def read(*, name: str | None = None, path: str | None = None, hub: str | None = None, split: str) -> RawRecords:
        where = None if path is None else Path(path)
        raw = load(
            name=name,
            path=where,
            hub=hub,
            split=split,
            sensitive=data.sensitive,
            ids=data.ids,
            may_lack_labels=bare,
        )
        return replace(raw, labels=np.full_like(raw.labels, UNLABELED), class_names=None) if bare else raw

    train = read(name=data.name, path=data.path, hub=data.hub, split="train")
    if data.test_path is not None:
        return train, read(path=data.test_path, split="train")
    if data.test_split is not None:
        return train, read(hub=data.hub, split=data.test_split)
    return train, None


def _deal(recipe: Recipe, raw: tuple[RawRecords, RawRecords | None], own: str | None) -> Deal:
    data = recipe.data
    vertical = recipe.parties.is_vertical
    for share in ("auxiliary_share", "validation_share"):
        needless = recipe.client.own_records or not recipe.parties.is_split  # of who is not attacked
        if getattr(recipe.attacker, share) == 0 and not needless:
            raise RecipeError(
                f"attacker.{share} is 0; expected more than 0, or a client's own file (client.own_records = true)"
            )
    clients: tuple[str, ...] = recipe.parties.clients[:1] if vertical else recipe.parties.clients
    records = deal(
        *raw,
        clients=(own,) if own is not None else clients,
        train_records=data.train_records,
        test_records=data.test_records,
        auxiliary_share=recipe.attacker.auxiliary_share,
        validation_share=recipe.attacker.validation_share,
        test_share=data.test_share,
        source=public_source(recipe.seed).derive("deal"),
        classes=data.classes,
    )
    if vertical and own is None:
        part, indices = records.train[clients[0]], records.train_indices[clients[0]]
        names = recipe.parties.clients
        records = replace(records, train=dict.fromkeys(names, part), train_indices=dict.fromkeys(names, indices))
    return records
