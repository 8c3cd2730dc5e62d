"""DP-SGD at one party (Abadi et al. 2016, arXiv 1607.00133), by Opacus (Yousefpour et al. 2021, arXiv 2109.12298).

A record takes part in each step by chance (Poisson sampling); its gradient is clipped, the sum noised, and divided by
the batch size that is expected. Accountants: Gopi et al. 2021 (arXiv 2106.02848, `prv`), Mironov 2017 (arXiv
1702.07476, `rdp`). Here an optimizer's noise comes from the party's own cipher (`private_optimizer.py`).

Neighbors differ in one record, added or removed. How many records a party has is taken as known.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from milkglass.cuts import couples_records
from milkglass.errors import CutError, MissingExtraError, RecipeError, first_line
from milkglass.federated_section import DifferentialPrivacy
from milkglass.randomness import Source, drawing_from, public_source

SPLIT_COVERS: Final = (
    "epsilon covers the client's released weights only, for the server's answers as they were: the server's stage has "
    "seen activations without noise of this kind, and its answers depend on them. It does NOT cover the activations "
    "that the server sees in training and inference, nor labels and gradients sent with them, nor the figures in this "
    "folder"
)
"""What DP-SGD at the client of a split training proves, and what it does not."""

FEDERATED_COVERS: Final = (
    "epsilon covers all weights that the client sends, in all rounds together; it does not cover the number of its "
    "records, nor the losses and accuracies that it reports"
)
"""What DP-SGD at a client of federated training proves, and what it does not."""


@final
@dataclass(frozen=True)
class Mechanism:
    """DP-SGD as it is run, and what it spends: (epsilon, delta) of a whole training; lower epsilon = more private.

    clip: the largest norm of one record's gradient. noise_multiplier: the noise's standard deviation on the sum of
    clipped gradients, in units of `clip`. sampling_rate: the chance of a record to be in a step's batch. batch_size:
    the expected one, sampling_rate x records: a step's noised sum is divided by it, not by the number that came.
    """

    epsilon: float
    delta: float
    clip: float
    noise_multiplier: float
    sampling_rate: float
    steps: int
    accountant: str
    batch_size: int

    @property
    def words(self) -> str:
        """The guarantee in one sentence; whose weights it is about must be said beside it."""
        return (
            f"({self.epsilon:.3g}, {self.delta:g})-differential privacy for one record added or removed: "
            f"{self.steps:,} steps of DP-SGD, each record in a batch by a chance of {self.sampling_rate:.3g}, "
            f"gradients clipped to {self.clip:g}, noise of {self.noise_multiplier:.3g} x that ({self.accountant} "
            "accountant)"
        )

    def to_dict(self) -> dict[str, Any]:
        """For summaries: every field, and `words`."""
        return asdict(self) | {"words": self.words}


def mechanism_of(section: DifferentialPrivacy, records: int, batch_size: int, epochs: int) -> Mechanism:
    """DP-SGD with the least noise that keeps a training of so many `epochs` within the section's budget.

    Raises RecipeError where no noise does, or where delta says nothing; MissingExtraError without `milkglass[dp]`.
    """
    if not 0 < batch_size <= records:
        raise RecipeError(f"dp: {records} training records make no batch of {batch_size}; lower training.batch_size")
    if section.delta * records >= 1:
        raise RecipeError(
            f"dp.delta is {section.delta:g}; expected below 1 / {records} = {1 / records:.2g}, one by the number of "
            "training records: at that chance one of them may be published as it is"
        )
    rate, steps = batch_size / records, epochs * (records // batch_size)
    noise, spent = _least_noise(section.epsilon, section.delta, rate, steps, section.accountant)
    return Mechanism(spent, section.delta, section.clip, noise, rate, steps, section.accountant, batch_size)


def check_network(*modules: nn.Module) -> None:
    """Raise CutError, which names the layer, where a record's gradient depends on others, or Opacus cannot find it."""
    _need_opacus()
    from opacus import layers
    from opacus.validators import ModuleValidator

    for module in modules:
        for name in couples_records(module):
            raise CutError(
                f"dp: BatchNorm ({name or 'the stage'}) makes a record's gradient depend on the other records of its "
                "batch, so that no bound holds for one of them: use nn.GroupNorm"
            )
        for name, layer in module.named_modules():
            where = f"dp: {type(layer).__name__} ({name or 'the stage'})"
            found = ModuleValidator.VALIDATORS.get(type(layer))
            errors = [] if found is None else found(layer)
            if errors:
                other = f"DP{type(layer).__name__}"
                way_out = f"opacus.layers.{other}" if hasattr(layers, other) else "it without running statistics"
                reason = " ".join(str(errors[0]).split()).split(". ")[0]
                raise CutError(f"{where}: Opacus says: {reason}; use {way_out}, or another layer")
            trained = [parameter for parameter in layer.parameters(recurse=False) if parameter.requires_grad]
            if trained and any(True for _ in layer.buffers()):
                raise CutError(
                    f"{where} keeps buffers beside its weights, which no noise protects: use a layer without them"
                )


def check_gradients(module: nn.Module, x: Tensor) -> None:
    """Try `module` on records `x` (2 or more, ...), of which it takes two; nothing of it moves.

    Raises CutError unless every weight has a gradient for each record that depends on that record alone.
    """
    _need_opacus()
    from milkglass.private.private_optimizer import RecordHooks

    tried = copy.deepcopy(module).train()
    trained = {name: parameter for name, parameter in tried.named_parameters() if parameter.requires_grad}
    if not trained:
        return
    hooks = RecordHooks(tried)

    def passed(x_2: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor | None, Tensor | None]]]:
        """What comes out (2, ...), and by weight its gradient (of the mean; of each record: (2, ...))."""
        tried.zero_grad(set_to_none=True)
        hooks.forget()
        with drawing_from(_TRIAL.generator("dropout")):
            z = tried(x_2.clone())
        z.backward(torch.randn(z.shape, generator=_TRIAL.generator("gradient"), dtype=z.dtype) / 2)
        return z.detach(), {name: (weight.grad, hooks.taken(weight)) for name, weight in trained.items()}

    try:
        (z, both), (z_other, other) = passed(x[:2]), passed(x[:1].repeat(2, *[1] * (x.dim() - 1)))
    except (RuntimeError, ValueError, NotImplementedError, AttributeError, TypeError) as error:
        raise CutError(f"dp: Opacus cannot take each record's gradient in this network: {first_line(error)}") from error
    alone = _near(z_other[0], z[0])
    for name, (mean, each) in both.items():
        if mean is None or each is None or each.shape != (2, *mean.shape) or not _near(each.mean(dim=0), mean):
            raise CutError(
                f"dp: Opacus cannot take each record's gradient of {name}: use it in a layer of its own, whose input "
                "has one row for each record"
            )
        elsewhere = other[name][1]
        alone = alone and elsewhere is not None and _near(elsewhere[0], each[0])
    if not alone:
        raise CutError(
            "dp: what this network makes of a record depends on the other records of its batch, so that no bound holds "
            "for one of them: use layers that treat each record by itself"
        )


def make_private(
    modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer, mechanism: Mechanism, source: Source
) -> torch.optim.Optimizer:
    """An optimizer in place of `optimizer` whose `step` clips each record's gradient, adds noise, and steps.

    modules: what holds the parameters, as they are: they stay the same objects, under the same names. source: the
    party's private one; the noise is drawn from it.

    Use: `zero_grad()`, forward in training mode, backward of a loss that is a *mean* over the batch, `step()`. Without
    a forward pass between them (an empty batch) the step is noise alone. Its `block`, the steps so far, must be kept
    with a checkpoint; its `mechanism` is what was given.
    """
    _need_opacus()
    from milkglass.private.private_optimizer import PrivateOptimizer

    return PrivateOptimizer(modules, optimizer, mechanism, source)


def poisson_batches(records: int, sampling_rate: float, steps: int, generator: torch.Generator) -> list[Tensor]:
    """The row numbers (B,) of each step's batch: every record in every batch by chance; a batch may be empty.

    In a drawn order, so that a row's place in its batch tells nothing of its number.
    """
    batches = []
    for _ in range(steps):
        chance = torch.rand(records, generator=generator, dtype=torch.float64)
        rows = (chance < sampling_rate).nonzero()[:, 0]
        batches.append(rows[torch.randperm(len(rows), generator=generator)])
    return batches


def most_records(batch_size: int) -> int:
    """So many records a Poisson batch has at most, but for a chance below 2^-50, whatever their number: for a limit."""
    # Bennett: the chance of B + t or more is at most exp(-t^2 / (2 B + 2 t / 3))
    return batch_size + math.ceil(9 * math.sqrt(batch_size) + 30)


_TRIAL: Final = public_source(0).derive("dp trial")


def _near(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= 1e-3 * expected.norm() + 1e-6)


def _need_opacus() -> None:
    if importlib.util.find_spec("opacus") is None:
        raise MissingExtraError("differential privacy", "dp")


@functools.lru_cache(maxsize=64)  # a search takes a second, and every replay of a run asks again
def _least_noise(epsilon: float, delta: float, rate: float, steps: int, accountant: str) -> tuple[float, float]:
    """(noise multiplier, the epsilon that it spends): Opacus' search; for `prv` narrowed by what `rdp` finds.

    `prv` takes minutes where the noise is far too small, and Opacus' search begins with none.
    """
    _need_opacus()
    from opacus.accountants.utils import MAX_SIGMA, get_noise_multiplier

    tolerance = 0.005 * epsilon
    budget = {"target_epsilon": epsilon, "target_delta": delta, "sample_rate": rate, "steps": steps}
    for name in ("rdp", accountant):
        try:
            with _quiet():
                noise = get_noise_multiplier(**budget, accountant=name, epsilon_tolerance=tolerance)
            break
        except ValueError:
            continue
    else:
        least = _spent(MAX_SIGMA, delta, rate, steps, accountant)
        raise RecipeError(
            f"dp.epsilon is {epsilon:g}; with delta {delta:g} the {accountant} accountant proves no less than "
            f"{least:.3g}, whatever the noise: raise dp.epsilon or dp.delta"
            + (", or take accountant prv" if accountant == "rdp" else "")
        )
    spent = _spent(noise, delta, rate, steps, accountant)
    step = noise / 20
    while accountant != "rdp" and epsilon - spent > tolerance and step > noise / 1000:
        found = _spent(noise - step, delta, rate, steps, accountant)
        if found <= epsilon:
            noise, spent = noise - step, found
        else:
            step /= 2
    return noise, spent


def _spent(noise: float, delta: float, rate: float, steps: int, accountant: str) -> float:
    from opacus.accountants import create_accountant

    counted = create_accountant(mechanism=accountant)
    counted.history = [(noise, rate, steps)]
    with _quiet():
        return float(counted.get_epsilon(delta=delta))


@contextmanager
def _quiet() -> Iterator[None]:
    """Opacus warns where an order of its list is the best one, the last included, and divides by 0 at a rate of 1.

    Neither makes an epsilon too small: a longer list could only lower it, and log(0) is the limit that it should be.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is the", UserWarning)
        warnings.filterwarnings("ignore", "divide by zero encountered in log", RuntimeWarning)
        yield
