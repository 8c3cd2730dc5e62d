"""One contribution to an open collaboration, as strangers hold it, and what gradient inversion makes of it.

Each volunteer sends the mean gradient of its records to strangers. The attacker has the whole contribution (reducers
who put their parts together; in robust mode any two), the weights and the number of records, but no labels:
`attacks/gradients.py`, Geiping et al. 2020, arXiv 2003.14053. Where we differ: records come back in no order, so they
are assigned to the true ones at the least error; and numbers that Gaussian-k did not send are not compared.

Legend: B records of one contribution, D numbers of all parameters, K of them sent; trailing `...` is any shape.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, final

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.func import functional_call

from milkglass.attacks.base import Tick, silent
from milkglass.attacks.gradients import GradientInversion, GradientView, restore_labels, shared_gradients
from milkglass.compression.gaussian_k import GaussianK
from milkglass.errors import AuditError
from milkglass.leakage.reconstruction import squared_errors
from milkglass.randomness import drawing_from
from milkglass.verdict import RECONSTRUCTION_MEASURES

Share = Callable[[nn.Module, Tensor, Tensor, torch.Generator], tuple[Tensor, ...]]
"""(network, records (B, ...), labels (B,), generator of dropout) -> what a receiver takes for their mean gradients, one
a parameter; the network stays as it is."""
TABLE_RANGE: Final = (-3.0, 3.0)
"""Where the attacker looks for a table's values, in standard deviations; a picture's lie in [0, 1]."""


@final
@dataclass(frozen=True, eq=False)
class Subject:
    """What is audited. first, last: the network with its first and its last weights; records (N, ...) -> (N, classes).

    x (N, ...), y (N,): test records. mean (...): the mean training record. density: the share of a contribution that
    Gaussian-k sends; None: all is sent. shared: how a contribution is made; by default, the gradients at these weights.
    own_x, own_y: the attacker's own records, like these; it tries itself out on contributions that it makes of them.
    """

    first: nn.Module
    last: nn.Module
    x: Tensor
    y: Tensor
    mean: Tensor
    density: float | None = None
    shared: Share | None = None
    own_x: Tensor | None = None
    own_y: Tensor | None = None

    @property
    def is_pictures(self) -> bool:
        """Whether records are (C, H, W); else they are rows of a table."""
        return self.x.ndim == 4

    @property
    def value_range(self) -> tuple[float, float]:
        """Where the attacker looks for values."""
        return (0.0, 1.0) if self.is_pictures else TABLE_RANGE

    @property
    def measures(self) -> list[str]:
        """What is measured, and a budget may be set on."""
        alike = self.is_pictures and min(self.x.shape[2:]) >= 8
        return [name for name in RECONSTRUCTION_MEASURES if alike or name != "ssim"]

    def mean_errors(self, records: Tensor) -> Tensor:
        """Mean squared error (T,) that the mean record leaves of each of the records (T, ...)."""
        return squared_errors(self.mean.expand_as(records), records)


@final
@dataclass(frozen=True, eq=False)
class Rebuilt:
    """Records (B, ...) in the order of the true ones, and the seconds it took.

    labels_restored: the share of labels that are right, in any order; None where they could not be read and were given.
    """

    records: Tensor
    labels_restored: float | None
    seconds: float


def gradients_of(network: nn.Module, x_B: Tensor, y_B: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """The mean gradients of one batch, as `Share`."""
    with drawing_from(generator):
        return shared_gradients(copy.deepcopy(network).train(), x_B, y_B)


def contribution(
    network: nn.Module,
    x_B: Tensor,
    y_B: Tensor,
    generator: torch.Generator,
    *,
    shared: Share | None = None,
    density: float | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
) -> GradientView:
    """What strangers hold of a volunteer's contribution of records (B, ...) with labels (B,); the network unchanged.

    generator: of the volunteer's dropout, which the attacker does not know. shared: see Subject. density: of
    Gaussian-k, None without it; what earlier contributions left over is not in it. value_range: where the attacker
    looks for values.
    """
    gradients = (shared or gradients_of)(network, x_B, y_B, generator)
    known = copy.deepcopy(network).eval()
    with torch.no_grad():
        classes = known(x_B[:1]).shape[1]
    if density is not None:
        gradients = _selected(gradients, density)
    return GradientView(known, gradients, tuple(x_B.shape[1:]), classes, len(x_B), value_range=value_range)


def rebuild(
    view: GradientView, attack: GradientInversion, truth: Tensor, y_B: Tensor, tick: Tick = silent, *, sparse: bool
) -> Rebuilt:
    """Attack one contribution of the records `truth` (B, ...) with labels (B,).

    The attacker is not given these, but for labels that it has no way to read. sparse: what is zero was not sent.
    """
    try:
        labels_B, were_read = restore_labels(view), True
    except AuditError:
        labels_B, were_read = y_B, False
    attacked = replace(view, labels=labels_B)
    if sparse:
        sent = _Sent(view.model, view.gradients)
        attacked = replace(attacked, model=sent, gradients=(sent.pick(view.gradients),))
    made = attack.attack(attacked, tick)
    counts = [each.bincount(minlength=view.classes) for each in (labels_B, y_B)]
    right = torch.minimum(*counts).sum().item() / len(y_B)
    return Rebuilt(assigned(made.records, truth), right if were_read else None, made.seconds)


def trusted(rebuilt: Tensor, truth: Tensor, mean: Tensor) -> float:
    """How far, 0 to 1, an attacker should go from the mean record (...) towards what it rebuilds (B, ...).

    The share of the way that leaves the least squared error on contributions of its own, whose records it knows.
    """
    way, wanted = (rebuilt - mean).double(), (truth - mean).double()
    length = way.square().sum().item()
    return min(1.0, max(0.0, (way * wanted).sum().item() / length)) if length > 0 else 0.0


def assigned(records: Tensor, truth: Tensor) -> Tensor:
    """The records (B, ...) in that order in which the sum of their squared errors to `truth` (B, ...) is least."""
    cost_BB = torch.cdist(truth.flatten(1).double(), records.flatten(1).double()).square()
    return records[torch.from_numpy(linear_sum_assignment(cost_BB.numpy())[1])]


@final
class _Sent(nn.Module):
    """A network as a function of those numbers alone whose gradients were sent: so no others are compared."""

    def __init__(self, network: nn.Module, gradients: Sequence[Tensor]) -> None:
        super().__init__()
        self._network = (network,)  # in a tuple its parameters are not this module's
        self._flat_D = _flat([parameter.detach() for parameter in network.parameters()])
        self._places_K = _flat(gradients).nonzero().squeeze(1)
        self.numbers_K = nn.Parameter(self._flat_D[self._places_K])

    def pick(self, gradients: Sequence[Tensor]) -> Tensor:
        """Those that were sent, (K,)."""
        return _flat(gradients)[self._places_K]

    def forward(self, x_B: Tensor) -> Tensor:
        (network,) = self._network
        named = dict(network.named_parameters())
        flat_D = self._flat_D.index_copy(0, self._places_K, self.numbers_K)
        parts = dict(zip(named, _unflat(flat_D, list(named.values())), strict=True))
        logits_BK: Tensor = functional_call(network, parts, (x_B,))
        return logits_BK


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _unflat(flat_D: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    parts = torch.split(flat_D, [tensor.numel() for tensor in like])
    return tuple(part.view_as(tensor) for part, tensor in zip(parts, like, strict=True))


def _selected(gradients: Sequence[Tensor], density: float) -> tuple[Tensor, ...]:
    """What Gaussian-k sends of them; the rest is zero."""
    selector, left_D = GaussianK(density), _flat(gradients)
    sent_D = torch.zeros_like(left_D)
    selector.add_to(sent_D, selector.take(left_D).parts)
    return _unflat(sent_D, gradients)
