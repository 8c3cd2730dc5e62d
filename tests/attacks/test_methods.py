"""What every attack states of itself: who attacks, knowing what, after which paper, and what to expect of it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import get_args

import pytest

import milkglass.attacks
from milkglass.attacks.base import Adversary, Method
from milkglass.attacks.stack import Stack
from milkglass.transcript import Known

FOLDER = Path(milkglass.attacks.__file__).parent
WEAK = ("mean record", "nearest neighbor", "gradient norm")  # baselines, whose open door promises nothing
DOCS = Path(__file__).parents[2] / "docs" / "auditing.md"


def methods() -> list[type[Method]]:
    """All that are not abstract, of all files of the folder."""
    found = []
    for module in pkgutil.iter_modules([str(FOLDER)]):
        name = f"milkglass.attacks.{module.name}"
        classes = vars(importlib.import_module(name)).values()
        found += [
            kind
            for kind in classes
            if inspect.isclass(kind) and issubclass(kind, Method) and kind.__module__ == name
            if kind is not Method and not inspect.isabstract(kind)
        ]
    return found


def test_no_attack_is_missing() -> None:
    assert len(methods()) == 25
    words = [kind.name for kind in methods()]
    assert len(words) == len(set(words))


@pytest.mark.parametrize("kind", methods(), ids=lambda kind: kind.__name__)
def test_an_attack_says_what_it_is(kind: type[Method]) -> None:
    assert re.fullmatch(r"[a-z][a-z -]*", kind.name)
    assert kind.adversary in get_args(Adversary)
    assert kind.knows
    assert set(kind.knows) <= set(get_args(Known))
    assert re.search(r"\d{4}", kind.paper) or kind.name == "mean record", "a paper has a year"
    assert kind.closed_door <= 0.5
    assert kind.closed_door < kind.open_door or kind.name in WEAK
    made = kind([kind.__new__(kind)]) if kind is Stack else kind()
    assert kind is Stack or (repr(made).startswith(f"{kind.__name__}(") and " at 0x" not in repr(made))
    assert getattr(kind, "__final__", False), "classes are abstract or final"


def test_every_malicious_one_is_told_in_the_docs() -> None:
    malicious = [kind.name for kind in methods() if kind.adversary == "malicious"]
    assert malicious == ["fsha", "fsha attribute"]
    (row,) = [line for line in DOCS.read_text().splitlines() if "**malicious**, during training" in line]
    assert all(name in row for name in malicious)
