"""Formula and stated overheads agree with the bytes that ranks received, to 2 %: here, where two ranks are at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from milkglass.costs_wire import ring_bytes
from tests.training.gloo_ranks import Ranks
from tests.training.together import recipe, whole

TWO_PERCENT = 0.02


@pytest.mark.parametrize("hidden", [(256, 128), (600, 500)], ids=["one bucket", "two buckets"])
def test_ranks_send_what_is_stated(two_ranks: Ranks, hidden: tuple[int, int], tmp_path: Path) -> None:
    """What was received is compared: a packet that is sent again counts as sent, and comes once."""
    told = recipe(network={"name": "mlp", "settings": {"hidden": list(hidden)}}, training={"epochs": 2})
    assert two_ranks.run(whole, told, str(tmp_path / "run")) == [None, None]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    numbers = 64 * hidden[0] + hidden[0] + hidden[0] * hidden[1] + hidden[1] + hidden[1] * 10 + 10
    flows = ring_bytes(numbers, 2, summary["steps"], epochs=2)
    assert summary["steps"] == 2 * 256 // 32
    for sent, received in summary["bytes_by_rank"]:
        assert received == pytest.approx(flows.down.total, rel=TWO_PERCENT)
        assert sent > (1 - TWO_PERCENT) * flows.up.total
        overheads = flows.down.total - flows.down.formula
        assert received - flows.down.formula > 0.9 * overheads  # heartbeats of a slow machine come on top
