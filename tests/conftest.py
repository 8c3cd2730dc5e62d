"""Options and markers, and the folder of the shared data sets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# dcor compiles itself by numba as it is imported. Two workers that fill one cache leave one that aborts whoever reads
# it ("LLVM ERROR: Symbol not found"), so each has its own. numba looks when it is imported, which is later.
os.environ["NUMBA_CACHE_DIR"] = str(
    Path(__file__).parents[1] / ".pytest_cache" / "numba" / os.environ.get("PYTEST_XDIST_WORKER", "alone")
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the slow tests out, unless they are asked for by option, by `-m`, or by their own name."""
    if config.getoption("--run-slow") or config.getoption("-m") or any("::" in argument for argument in config.args):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of the shared data sets; a test that needs it skips where the variable does not name one."""
    folder = os.environ.get("MILKGLASS_DATA")
    if not folder:
        pytest.skip("MILKGLASS_DATA is not set: it names the folder of the shared data sets")
    return Path(folder)
