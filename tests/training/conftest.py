"""Two ranks of a gloo group, for all tests of this folder that need some."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.training.gloo_ranks import Ranks


@pytest.fixture(scope="package")
def two_ranks() -> Iterator[Ranks]:
    """They keep nothing from one test to the next but their process group."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()
