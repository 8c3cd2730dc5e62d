"""Evaluation crosses the same cut as training: records are released, the server classifies what it receives.

Legend: N records, K classes.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from milkglass.client import Client
from milkglass.leakage.distance_correlation import DistanceCorrelation, measure
from milkglass.parties import run_to_end

BATCH: Final = 256
MOST_MEASURED: Final = 512  # distance correlation takes n^2 time, and its floor two hundred times that


@dataclass(frozen=True)
class Evaluation:
    """accuracy: share of records classified right (0..1). dependence: distance correlation of records and releases."""

    accuracy: float
    dependence: DistanceCorrelation


def evaluate(client: Client, x: Tensor, y_N: Tensor, generator: torch.Generator) -> Evaluation:
    """Classify records `x` (N, ...) with labels `y_N` across the cut, and measure what was sent for them."""
    return run_to_end(evaluating(client, x, y_N, generator))


def evaluating(client: Client, x: Tensor, y_N: Tensor, generator: torch.Generator) -> Generator[None, None, Evaluation]:
    """`evaluate`, which pauses where the client waits. Who is told no logits has an accuracy of 0."""
    right, released = 0, []
    for x_part, y_part in zip(torch.split(x, BATCH), torch.split(y_N, BATCH), strict=True):
        logits_BK, z = yield from client.predicting(x_part)
        if logits_BK.shape[1]:
            right += int((logits_BK.argmax(dim=1) == y_part).sum())
        released.append(z)
    n = min(len(x), MOST_MEASURED)
    return Evaluation(right / len(x), measure(x[:n], torch.cat(released)[:n], generator))
