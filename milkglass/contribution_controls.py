"""Contributions whose answer is known: an attack that fails on an open door is no strong lock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Final

import torch

from milkglass.attacks.gradients import GradientInversion, GradientView
from milkglass.contributions import Subject, contribution, rebuild
from milkglass.controls import IDENTITY_AT_LEAST, INDEPENDENT_AT_MOST, ControlResult
from milkglass.leakage.reconstruction import squared_errors
from milkglass.networks import build
from milkglass.randomness import public_source

_CONTRIBUTIONS: Final = 2
_DOORS: Final = 5
"""Of which most must be walked through: from one start the descent is caught before one in fifteen or so."""
_SHAPE: Final = (1, 8, 8)
_CLASSES: Final = 10


def controls_of(subject: Subject, attack: GradientInversion) -> dict[str, ControlResult]:
    """Peeks of the attack on two open doors, one for each of its ways, at least .95, and on a shut one, at most .05.

    closed_form: one test record, behind a fully connected network. descent: two pictures of 64 even random values,
    behind another one; the median of five such. random_gradient: random numbers of the same norms in place of what is
    sent at the start.

    They are drawn alike for every run, whatever its seed: a door that is known to be open.
    """
    source = public_source(0).derive("controls of contributions")
    x, y = subject.x[:_CONTRIBUTIONS], subject.y[:_CONTRIBUTIONS]
    classes = max(2, int(subject.y.max()) + 1)
    network = build("mlp", tuple(x.shape[1:]), classes, {}, source.generator("closed form"))
    closed_form = replace(subject, first=network, x=x, y=y)

    draws = source.generator("descent")
    network = build("mlp", _SHAPE, _CLASSES, {}, draws)
    doors = []
    for _ in range(_DOORS):
        even, labels = torch.rand(2, *_SHAPE, generator=draws), torch.randint(_CLASSES, (2,), generator=draws)
        door = replace(closed_form, first=network, x=even, y=labels, mean=torch.full(_SHAPE, 0.5))
        doors.append(_peek(door, 2, attack))

    noise = source.generator("random gradient")
    shut = _peek(replace(subject, x=x, y=y), _CONTRIBUTIONS, attack, lambda view: _replaced(view, noise))
    return {
        "closed_form": _open(_peek(closed_form, 1, attack)),
        "descent": _open(median(doors)),
        "random_gradient": ControlResult(shut, INDEPENDENT_AT_MOST, shut <= INDEPENDENT_AT_MOST),
    }


def _open(found: float) -> ControlResult:
    return ControlResult(found, IDENTITY_AT_LEAST, found >= IDENTITY_AT_LEAST)


def _peek(
    subject: Subject,
    size: int,
    attack: GradientInversion,
    sent: Callable[[GradientView], GradientView] = lambda view: view,
) -> float:
    """Of all the subject's records, in contributions of one size at the first weights."""
    rebuilt = []
    for x_B, y_B in zip(torch.split(subject.x, size), torch.split(subject.y, size), strict=True):
        view = contribution(subject.first, x_B, y_B, torch.Generator(), value_range=subject.value_range)
        rebuilt.append(rebuild(sent(view), attack, x_B, y_B, sparse=False).records)
    errors = squared_errors(torch.cat(rebuilt), subject.x).mean() / subject.mean_errors(subject.x).mean()
    return 1 - errors.item()


def _replaced(view: GradientView, generator: torch.Generator) -> GradientView:
    """With random numbers of the same norms, parameter by parameter."""
    drawn = [torch.randn(gradient.shape, generator=generator) for gradient in view.gradients]
    scaled = [each * gradient.norm() / each.norm() for each, gradient in zip(drawn, view.gradients, strict=True)]
    return replace(view, gradients=tuple(scaled))
