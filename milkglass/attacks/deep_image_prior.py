"""Deep image prior: each record is the output of an untrained network whose weights are fitted to the activations.

Legend: B records, V validation records, D activation values, S channels of the fixed noise, C channels, H height, W
width of a record.

Ulyanov, Vedaldi and Lempitsky, "Deep image prior" (CVPR 2018): a convolutional network takes to the shapes of natural
pictures long before it takes to noise, so its structure is the prior, and stopping early its only weight. They stop by
eye, here validation records tell when. Their hourglass is cut down to its decoding half, as in Heckel and Hand, "Deep
decoder" (ICLR 2019), for pictures of 28 x 28 and 32 x 32. All records' networks are fitted at once, by torch.func.vmap.
"""

from __future__ import annotations

import time
from typing import ClassVar, Final, final

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from milkglass.attacks.base import Attack, Reconstruction, Tick, silent
from milkglass.attacks.features import as_records
from milkglass.attacks.likelihood import best_check, descend, even_misfit, first_rows
from milkglass.errors import AuditError
from milkglass.randomness import drawing_from, public_source
from milkglass.transcript import Known, View

RATE: Final = 0.01
NOISE_CHANNELS: Final = 16
DOUBLINGS: Final = 2
"""The noise has a quarter of the picture's height and width, rounded up."""


@final
class DeepImagePrior(Attack):
    """Untrained convolutional networks fitted to the activations of the first `records` validation and target records.

    steps: of Adam, the best moment among 15 chosen on validation records. width: channels of each network. Slow: meant
    for a thorough audit. As with every descent, that it fails is no proof of privacy.
    """

    name: ClassVar[str] = "deep image prior"
    knows: ClassVar[tuple[Known, ...]] = ("client weights",)
    paper: ClassVar[str] = "Ulyanov, Vedaldi and Lempitsky, CVPR 2018"

    def __init__(self, steps: int = 600, records: int = 32, width: int = 32, seed: int = 0) -> None:
        if min(steps, records, width) < 1:
            raise AuditError(
                f"deep image prior: steps = {steps}, records = {records}, width = {width}; expected at least 1 of each"
            )
        self._steps, self._records, self._width, self._seed = steps, records, width, seed

    def __repr__(self) -> str:
        return f"DeepImagePrior(steps={self._steps}, records={self._records}, width={self._width}, seed={self._seed})"

    def attack(self, view: View, tick: Tick = silent) -> Reconstruction:
        """Fit one network a record. Raises AuditError for flat rows: the prior is one of pictures."""
        start = time.perf_counter()
        self.check(view)
        shape = view.known.records.shape[1:]
        if len(shape) != 3:
            raise AuditError(f"attack {self.name!r} rebuilds pictures (C, H, W); the records have shape {tuple(shape)}")
        z_BD = torch.cat(first_rows(view, self._records))
        low, high = view.known.records.min().item(), view.known.records.max().item()
        source, misfit = public_source(self._seed).derive("deep image prior"), even_misfit(view)
        with drawing_from(source.generator("weights")):
            networks = [_Decoder(self._width, shape) for _ in z_BD]
        weights, _ = stack_module_state(list(networks))
        side = [-(-length // 2**DOUBLINGS) for length in shape[1:]]
        noise_BSHW = torch.randn(len(z_BD), NOISE_CHANNELS, *side, generator=source.generator("noise"))

        def one(weights: dict[str, Tensor], noise_SHW: Tensor) -> Tensor:
            made: Tensor = functional_call(networks[0], weights, (noise_SHW[None],))
            return made[0]

        def rebuild() -> Tensor:
            made: Tensor = torch.func.vmap(one)(weights, noise_BSHW)
            return (low + (high - low) * made).to(view.known.records.dtype)

        seen = descend(list(weights.values()), rebuild, lambda x: misfit(x, z_BD), RATE, self._steps, tick)
        truth = view.validation.records[: self._records]
        made = seen[best_check(seen, truth)[1]].flatten(1)
        validation, target = as_records(made[: len(truth)], view), as_records(made[len(truth) :], view)
        return Reconstruction(validation, target, time.perf_counter() - start)


@final
class _Decoder(nn.Module):
    """Noise (1, S, h, w) -> a picture (1, C, H, W) in (0, 1): convolutions and doublings, then cut to size."""

    def __init__(self, width: int, shape: torch.Size) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = NOISE_CHANNELS
        for _ in range(DOUBLINGS):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.GroupNorm(1, width), nn.LeakyReLU(0.2)]
            layers += [nn.Upsample(scale_factor=2, mode="bilinear")]
            before = width
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.GroupNorm(1, width), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, shape[0], 1), nn.Sigmoid())
        self.height, self.side = shape[1:]

    def forward(self, noise_BSHW: Tensor) -> Tensor:
        made_BCHW: Tensor = self.layers(noise_BSHW)
        return made_BCHW[:, :, : self.height, : self.side]
