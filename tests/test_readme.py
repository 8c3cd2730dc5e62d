"""What the README prints runs."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from milkglass.networks import build
from milkglass.randomness import public_source

ROOT = Path(__file__).parents[1]


def test_the_five_line_diff_trains() -> None:
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    lines = [line for line in diff.splitlines() if line and line[0] in "+ "]
    assert sum(line[0] == "+" for line in lines) == 5
    generator = public_source(0).generator("records")
    x, y = torch.rand(64, 1, 8, 8, generator=generator), torch.arange(64) % 2
    x[y == 1, :, :4] = 0  # something to learn
    names = {
        "torch": torch,
        "model": build("cnn", (1, 8, 8), 2, {"width": 8}, generator),
        "loader": [(x, y)] * 60,
    }
    losses: list[float] = []
    names["losses"] = losses
    exec("\n".join([*(line[1:] for line in lines), "    losses.append(loss)"]), names)
    assert losses[-1] < 0.5 * losses[0]


def test_every_link_leads_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
