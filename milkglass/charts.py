"""Charts side by side as one SVG that stands alone: it brings its own paper, follows a dark screen, fetches nothing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Final

from jinja2 import Environment, StrictUndefined, Template

from milkglass.figures import BOTTOM, LEFT, RIGHT, WIDTH, Chart

_APART: Final = 40.0  # SVG units
_LINE: Final = 20.0  # of the legend


def svg(charts: Sequence[Chart], words: str) -> str:
    """The picture. words: a line below the charts."""
    return _template().render(
        charts=charts,
        width=len(charts) * (WIDTH + _APART) + _APART,
        height=BOTTOM + 2 * _APART + 70 + _LINE * max(len(each.lines) for each in charts),
        step=WIDTH + _APART,
        edge=_APART,
        line=_LINE,
        left=LEFT,
        right=RIGHT,
        bottom=BOTTOM,
        words=words,
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(resources.files("milkglass").joinpath("charts.svg.jinja").read_text("utf-8"))
