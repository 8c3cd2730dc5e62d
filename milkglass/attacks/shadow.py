"""Query-free inversion: a stand-in for the client's stage, fitted to the known server stage, and then inverted.

Legend: N auxiliary records, T target rows, B batch, D activation values a record, K classes.

He, Zhang and Lee, "Model Inversion Attacks Against Collaborative Inference" (ACSAC 2019), the query-free setting: a
shadow of the client's stage is trained on auxiliary records so that the server's stage, frozen, classifies shadow(x)
right; a decoder is then fitted on (shadow(x), x). Where we differ: the server has also seen the target's activations,
with their labels, so the shadow's must have the same mean for each class, and the same mean and spread over all; and
several shadows are fitted, from other first weights: the decoder is fitted on some and its settings are chosen on
the last one, so that it reads what shadows have in common and not the one it was shown.
"""

from __future__ import annotations

import time
from typing import ClassVar, Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.attacks.base import Attack, Reconstruction, Tick, silent
from milkglass.attacks.decoder import Decoder
from milkglass.errors import AuditError
from milkglass.randomness import drawing_from, public_source
from milkglass.transcript import Known, Pairs, Release, View

BATCH: Final = 128
LEARNING_RATE: Final = 3e-3


@final
class Shadow(Attack):
    """Shadow stages, then the ridge-and-network decoder on what they send; no queries, no pairs.

    shadows: at least 2; the last is for choosing the decoder's settings. steps: batches of 128 a shadow is fitted on.
    moments: weight of the mismatch in means and spread against the server's cross-entropy. decoder: the inverter.
    """

    name: ClassVar[str] = "shadow"
    knows: ClassVar[tuple[Known, ...]] = ("records", "labels", "architecture", "server weights")
    paper: ClassVar[str] = "He, Zhang and Lee, ACSAC 2019 (query-free)"
    learned: ClassVar[bool] = True

    def __init__(
        self, shadows: int = 3, steps: int = 200, moments: float = 10.0, decoder: Decoder | None = None, seed: int = 0
    ) -> None:
        if shadows < 2 or steps < 1 or moments < 0:
            raise AuditError(
                f"shadow: shadows = {shadows}, steps = {steps}, moments = {moments}; "
                "expected at least 2 shadows, 1 step, and no negative weight"
            )
        self._shadows, self._steps, self._moments, self._seed = shadows, steps, moments, seed
        self._decoder = Decoder(seed=seed) if decoder is None else decoder

    def __repr__(self) -> str:
        return (
            f"Shadow(shadows={self._shadows}, steps={self._steps}, moments={self._moments}, "
            f"decoder={self._decoder!r}, seed={self._seed})"
        )

    def attack(self, view: View, tick: Tick = silent) -> Reconstruction:
        """Fit shadows, invert them; of the view's pairs only records, labels and entitled values are used."""
        self.check(view)
        start = time.perf_counter()
        moments = Moments(view.target)
        shadows = []
        for number in range(self._shadows):
            shadows.append(self._shadow(view, moments, number))
            tick(number + 1, self._shadows + 1)
        made = self._decoder.attack(in_shadow(view, shadows))
        both = torch.split(made.target, [len(view.validation), len(view.target)])
        tick(self._shadows + 1, self._shadows + 1)
        return Reconstruction(both[0], both[1], time.perf_counter() - start)

    def _shadow(self, view: View, moments: Moments, number: int) -> nn.Module:
        architecture, server, labels = view.knowledge.architecture, view.knowledge.server, view.known.labels
        assert architecture is not None  # all three were checked
        assert server is not None
        assert labels is not None
        source = public_source(self._seed).derive("shadow", number)
        shadow, _ = architecture(source.generator("weights"))
        weights = [weight for weight in shadow.parameters() if weight.requires_grad]
        if not weights:  # nothing to learn: the client's stage only reshapes
            return shadow.eval()
        optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self._steps)
        generator, draws = source.generator("batches"), source.generator("training")
        for _ in range(self._steps):
            rows_B = torch.randint(len(labels), (BATCH,), generator=generator)
            with drawing_from(draws):  # dropout
                z_B = shadow(view.known.records[rows_B])
            loss = F.cross_entropy(server(z_B), labels[rows_B])
            loss = loss + self._moments * moments.mismatch(z_B, labels[rows_B])
            for weight, slope in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.grad = slope
            optimizer.step()
            schedule.step()
        return shadow.eval()


@final
class Moments:
    """Mean of each class, and mean and spread over all, of the activations (T, ...) that the server saw, by label."""

    def __init__(self, seen: Release) -> None:
        assert seen.labels is not None  # a shadow attack's view has them
        z_TD, labels_T = seen.activations.flatten(1), seen.labels
        classes = int(labels_T.max()) + 1
        self._unit = z_TD.var().clamp_min(torch.finfo(z_TD.dtype).tiny)
        self._spread_D = z_TD.std(0)
        self._present_K = torch.bincount(labels_T, minlength=classes) > 0
        self._mean_D = z_TD.mean(0)
        self._means_KD = _class_means(z_TD, labels_T, classes)

    def mismatch(self, z_B: Tensor, labels_B: Tensor) -> Tensor:
        """How far a batch's moments are from those seen, in units of the variance seen; lower = more alike."""
        z_BD = z_B.flatten(1)
        spread_D = (z_BD.var(0) + 1e-8 * self._unit).sqrt()  # the root has no slope at 0
        overall = (z_BD.mean(0) - self._mean_D).square().mean() + (spread_D - self._spread_D).square().mean()
        classes = len(self._present_K)
        seen_B = labels_B < classes
        means_KD = _class_means(z_BD[seen_B], labels_B[seen_B], classes)
        here_K = self._present_K & (torch.bincount(labels_B[seen_B], minlength=classes) > 0)
        by_class = (means_KD - self._means_KD)[here_K].square().mean() if bool(here_K.any()) else z_BD.new_zeros(())
        return (overall + by_class) / self._unit


def _class_means(z_BD: Tensor, labels_B: Tensor, classes: int) -> Tensor:
    one_of_BK = F.one_hot(labels_B, classes).to(z_BD.dtype)
    return one_of_BK.T @ z_BD / one_of_BK.sum(0).clamp_min(1)[:, None]


@torch.no_grad()
def in_shadow(view: View, shadows: list[nn.Module]) -> View:
    """The decoder's view: pairs of the first shadows to fit on, of the last to choose by; targets are the real ones.

    The real activations of validation records come before those of the targets.
    """

    def sent(shadow: nn.Module, pairs: Pairs) -> Tensor:
        parts = [shadow(part) for part in torch.split(pairs.records, 8 * BATCH)]
        return torch.cat(parts).reshape(len(pairs), *view.target.activations.shape[1:])

    known, validation, target = view.known, view.validation, view.target
    fitted = len(shadows) - 1
    return View(
        known=Pairs(
            torch.cat([sent(shadow, known) for shadow in shadows[:-1]]),
            known.records.repeat(fitted, *[1] * (known.records.ndim - 1)),
            known.entitled.repeat(fitted, 1),
        ),
        validation=Pairs(sent(shadows[-1], validation), validation.records, validation.entitled),
        target=Release(
            torch.cat([validation.activations, target.activations]), torch.cat([validation.entitled, target.entitled])
        ),
    )
