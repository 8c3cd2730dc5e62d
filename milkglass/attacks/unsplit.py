"""UnSplit: from activations and the client's layers alone, rebuild records and a clone of the client's stage together.

Legend: N validation rows, T target rows, B rows that are rebuilt (both together), C channels, H height, W width.

Erdogan, Kupcu and Cicek, "UnSplit: Data-Oblivious Model Inversion, Model Stealing, and Label Inference Attacks Against
Split Learning" (WPES 2022, arXiv 2108.09033): find records and a clone with clone(records) = activations, by turns.
Where we differ: all
records are rebuilt at once, so that one clone must explain them all (theirs takes one record after the other); the two
take turns step by step; total variation is of absolute differences, which keeps edges, and in units of the records'
own spread: behind a layer that normalizes, a fainter picture explains the activations as well, and a plain penalty
would fade them all to grey; no penalty on the records' size, since theirs (weight 1) draws every picture towards black;
records are held within their range and start at a dark grey; steps are larger and fewer; and several clones are tried
and their pictures averaged, since one alone may settle on a wrong picture, even the negative, and explain the
activations as well as the right one. Without pictures (C, H, W) there is no smoothness to ask for, and records are then
found only up to what the clone can undo.
"""

from __future__ import annotations

import time
from typing import ClassVar, Final, final

import torch
from torch import Tensor
from torch.nn import functional as F

from milkglass.attacks.base import Attack, Reconstruction, Tick, silent
from milkglass.attacks.features import as_records
from milkglass.errors import AuditError
from milkglass.randomness import drawing_from, public_source
from milkglass.transcript import Known, View

RECORD_RATE: Final = 0.02
"""In units of the records' range."""
CLONE_RATE: Final = 3e-3
START: Final = 0.25
"""Where all values start, as a share of the records' range: between the middle and the dark ground of most scans."""
CHECK_EVERY: Final = 10


def total_variation(x_BCHW: Tensor) -> Tensor:
    """Mean absolute difference of neighboring pixels, down and across: (B, C, H, W) -> scalar. Lower = smoother."""
    down, across = x_BCHW.diff(dim=2).abs().mean(), x_BCHW.diff(dim=3).abs().mean()
    return down + across


@final
class UnSplit(Attack):
    """Descent by turns on records and on a clone of the client's stage; no pairs, no queries, no data.

    records: how many validation and how many target records are rebuilt, the first of each. clones: how many are tried,
    one after the other. steps: of each clone and of its records. smoothness: weight of total variation against the
    mismatch of activations, in units of their variance.
    """

    name: ClassVar[str] = "unsplit"
    knows: ClassVar[tuple[Known, ...]] = ("architecture",)
    paper: ClassVar[str] = "Erdogan, Kupcu and Cicek, WPES 2022, arXiv 2108.09033"

    def __init__(
        self, records: int = 64, clones: int = 3, steps: int = 200, smoothness: float = 0.1, seed: int = 0
    ) -> None:
        if min(records, clones, steps) < 1 or smoothness < 0:
            raise AuditError(
                f"unsplit: records = {records}, clones = {clones}, steps = {steps}, smoothness = {smoothness}; "
                "expected at least one record, clone and step, and no negative smoothness"
            )
        self._records, self._clones, self._steps = records, clones, steps
        self._smoothness, self._seed = smoothness, seed

    def __repr__(self) -> str:
        return (
            f"UnSplit(records={self._records}, clones={self._clones}, steps={self._steps}, "
            f"smoothness={self._smoothness}, seed={self._seed})"
        )

    def attack(self, view: View, tick: Tick = silent) -> Reconstruction:
        """Rebuild the first validation and target records; of the view's records only shape and range are used."""
        self.check(view)
        start = time.perf_counter()
        sent = view.validation.activations[: self._records], view.target.activations[: self._records]
        tries = [self._descend(view, torch.cat(sent), number, tick) for number in range(self._clones)]
        x_B = torch.stack(tries).mean(0)
        validation, target = torch.split(as_records(x_B.flatten(1), view), [len(part) for part in sent])
        return Reconstruction(validation, target, time.perf_counter() - start)

    def _descend(self, view: View, sent_B: Tensor, number: int, tick: Tick) -> Tensor:
        architecture = view.knowledge.architecture
        assert architecture is not None  # checked before
        source = public_source(self._seed).derive("unsplit", number)
        clone, _ = architecture(source.generator("clone"))
        draws = source.generator("training")
        known = view.known.records
        low, high = known.min().item(), known.max().item()
        shape = known.shape[1:]
        faint_B = 0.01 * torch.randn(len(sent_B), *shape, generator=source.generator("records"), dtype=known.dtype)
        x_B = (low + (high - low) * (START + faint_B)).requires_grad_()
        weights = [weight for weight in clone.parameters() if weight.requires_grad]
        optimizer = torch.optim.Adam(
            [{"params": [x_B], "lr": RECORD_RATE * (high - low)}, {"params": weights, "lr": CLONE_RATE}]
        )
        unit = sent_B.var().clamp_min(torch.finfo(sent_B.dtype).tiny)
        for step in range(1, self._steps + 1):
            with drawing_from(draws):  # dropout
                loss = F.mse_loss(clone(x_B), sent_B) / unit
            if len(shape) == 3:
                spread = x_B.std().clamp_min(1e-3 * (high - low))
                loss = loss + self._smoothness * total_variation(x_B) / spread
            slopes = torch.autograd.grad(loss, [x_B, *weights])
            for tensor, slope in zip((x_B, *weights), slopes, strict=True):
                tensor.grad = slope
            optimizer.step()
            with torch.no_grad():
                x_B.clamp_(low, high)
            if step % CHECK_EVERY == 0 or step == self._steps:
                tick(number * self._steps + step, self._clones * self._steps)
        return x_B.detach()
