"""An adversary in the loop: a decoder at the client learns to rebuild the records from what is sent, and the stage
learns to make it fail.

After ResSFL (Li, Rakin, Chen, He, Fan and Chakrabarti, CVPR 2022, arXiv 2205.04007), whose feature extractor is trained
against a simulated inversion model in a min-max game. Recalled, not read again: they do so in a pre-training at an
expert's, transfer the extractor, and score the rebuilt pictures by SSIM. DeepObfuscator (Li et al., arXiv 1909.04126)
plays the same game. Where we differ:

- It runs in the split training itself, by turns: the stage takes a step against the decoder as it stands, then the
  decoder takes `steps` on the same batch.
- What counts is the share of the records' variance that is explained; where the client has labels, of the variance
  within a class, for a class's mean picture follows from the label alone. At or below 0 there is no penalty: a beaten
  decoder is not run away from.
- A stage outruns a decoder that learns by small steps: it turns its activations, and hides nothing. So there is a
  second adversary that cannot be outrun, since it is fitted afresh to every batch in closed form: ridge regression,
  scored on each record by the fit to all the others (Allen 1974). The penalty is on the better of the two.

It certifies nothing. The stage learns to beat these two, and another decoder may see more: audit what it leaves.
Do-nothing twin: a weight of 0.

Legend: B records in a batch, K classes in it, C channels, H height, W width of a picture, A maps of h by w activations,
D activations, P values a record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, cast, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from milkglass.defenses.base import Defense
from milkglass.errors import RecipeError, RunError
from milkglass.randomness import Source, drawing_from

MEMORY: Final = 0.9
"""How much of the running means and the running scale is kept from one decoder step to the next."""
LEAST: Final = 1e-8
"""Records of a variance about as small as this, or smaller, leave nothing to explain."""
RIDGE_PENALTIES: Final = (0.01, 0.1, 1.0)
"""In units of the activations' mean square length, classes' means taken off."""


def decoder_success(rebuilt: Tensor, x: Tensor, y_B: Tensor | None = None) -> Tensor:
    """The share of the variance of records `x` (B, ...) that `rebuilt` (B, ...) explains: a scalar from 0 to 1.

    y_B: labels; with them, of the variance within a class. Without bias, though the means are the batch's own. 0 where
    there is nothing to explain. Higher = less private.
    """
    classes_BK = _classes(x, y_B)
    flat_BP = x.flatten(1)
    free = len(x) - classes_BK.shape[1]
    variance = (flat_BP - classes_BK @ (classes_BK.T @ flat_BP)).square().mean() * len(x) / max(free, 1)
    return _share((rebuilt - x).square().mean(), variance)


def ridge_success(x: Tensor, z: Tensor, y_B: Tensor | None = None) -> Tensor:
    """The same of ridge regression from `z` (B, ...), with a constant for each class, by leave-one-out predictions.

    The best of a few penalties counts. The gradient is exact: it knows that the regression follows `z`.
    """
    classes_BK = _classes(x, y_B)
    free_B = 1 - classes_BK.square().sum(1)
    scored_B = free_B > 1e-6  # who is alone in a class has nobody to be predicted from
    if not scored_B.any():
        return z.new_zeros(())
    flat_BP, z_BD = x.flatten(1), z.flatten(1)
    records_BP = flat_BP - classes_BK @ (classes_BK.T @ flat_BP)
    centered_BD = z_BD - classes_BK @ (classes_BK.T @ z_BD)
    kernel_BB = centered_BD @ centered_BD.T
    kernel_BB = kernel_BB / kernel_BB.diagonal().mean().clamp_min(torch.finfo(z.dtype).tiny)
    variance = (records_BP[scored_B] / free_B[scored_B, None]).square().mean()
    eye_BB = torch.eye(len(z), dtype=z.dtype)
    shares = []
    for penalty in RIDGE_PENALTIES:
        inverse_BB = torch.linalg.inv(kernel_BB + penalty * eye_BB)
        inverse_BB = inverse_BB - classes_BK @ (classes_BK.T @ inverse_BB)  # the constants are fitted, not shrunk
        inverse_BB = inverse_BB - (inverse_BB @ classes_BK) @ classes_BK.T
        errors_BP = (inverse_BB @ records_BP)[scored_B] / inverse_BB.diagonal()[scored_B, None]
        shares.append(_share(errors_BP.square().mean(), variance))
    return torch.stack(shares).amax()


def _share(error: Tensor, variance: Tensor) -> Tensor:
    return F.relu(1 - (error + LEAST) / (variance + LEAST))


def _classes(x: Tensor, y_B: Tensor | None) -> Tensor:
    """(B, K): who is in which class, columns of length 1. All in one where there are no labels, or all differ."""
    index_B = torch.zeros(len(x), dtype=torch.int64)
    if y_B is not None:
        found_K, inverse_B = torch.unique(y_B, return_inverse=True)
        index_B = inverse_B if len(found_K) < len(x) else index_B
    member_BK = F.one_hot(index_B).to(x.dtype)
    return member_BK / member_BK.sum(0).sqrt()


@final
class Adversary(Defense):
    """`weight` times the success of the better of two decoders in the loop, added to the client's loss.

    learning_rate: the trained decoder's, of Adam. width: of that decoder; its time grows with it. steps: its own, for
    each batch. Weight 0 does nothing.
    """

    def __init__(self, weight: float = 1.0, learning_rate: float = 1e-3, width: int = 16, steps: int = 1) -> None:
        if not 0 <= weight < math.inf:
            raise RecipeError(f"adversary: weight is {weight}; expected a number from 0 on")
        if not 0 < learning_rate < math.inf:
            raise RecipeError(f"adversary: learning_rate is {learning_rate}; expected a positive number")
        if width < 1 or steps < 1:
            raise RecipeError(f"adversary: width = {width}, steps = {steps}; expected at least 1 of each")
        self.weight = weight
        self.learning_rate = learning_rate
        self.width = width
        self.steps = steps
        self._decoder: Decoder | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._pending: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        return (
            f"Adversary(weight={self.weight}, learning_rate={self.learning_rate}, width={self.width}, "
            f"steps={self.steps})"
        )

    def describe(self) -> str:
        often = "" if self.steps == 1 else f", {self.steps} steps a batch"
        return f"adversary in the loop, weight {self.weight:g}, decoder of width {self.width}{often}"

    def begin(self, x: Tensor, z: Tensor, source: Source) -> None:
        """Build the decoder for records shaped like `x` and activations like `z`; a second call changes nothing.

        Raises RunError where a state loaded before does not fit.
        """
        if self.weight == 0 or self._decoder is not None:
            return
        with drawing_from(source.generator("adversary")):
            self._decoder = Decoder(x, z.detach(), self.width).to(z.dtype)
        self._optimizer = torch.optim.Adam(self._decoder.parameters(), lr=self.learning_rate)
        if self._pending:
            self._load(self._decoder, self._optimizer)

    def penalty(self, x: Tensor, z: Tensor, y_B: Tensor | None = None) -> Tensor | None:
        """`weight` times the better adversary's success; the decoder's weights get no gradient. None before `begin`."""
        if self._decoder is None:
            return None
        rebuilt = functional_call(self._decoder, self._decoder.state_dict(), (z,))  # a state dict is detached
        trained, fitted = decoder_success(cast(Tensor, rebuilt), x, y_B), ridge_success(x, z, y_B)
        return self.weight * torch.maximum(trained, fitted)

    @torch.enable_grad()
    def learn(self, x: Tensor, z: Tensor) -> None:
        """`steps` steps of the decoder towards rebuilding `x` from `z`."""
        if self._decoder is None or self._optimizer is None:
            return
        z = z.detach()
        for _ in range(self.steps):
            self._decoder.follow(x, z)
            self._optimizer.zero_grad()
            F.mse_loss(self._decoder(z), x).backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """The decoder's weights and what Adam remembers of them; empty before `begin`."""
        if self._decoder is None or self._optimizer is None:
            return dict(self._pending)
        slots = self._optimizer.state_dict()["state"]
        remembered = {f"optimizer.{index}.{name}": t for index, slot in slots.items() for name, t in slot.items()}
        learned = {f"decoder.{name}": t for name, t in self._decoder.state_dict().items()}
        return {name: t.clone() for name, t in (learned | remembered).items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken; before `begin`, which is when the decoder is built, it waits for that."""
        self._pending = {name: t.clone() for name, t in state.items()}
        if self._pending and self._decoder is not None and self._optimizer is not None:
            self._load(self._decoder, self._optimizer)

    def _load(self, decoder: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in self._pending.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                slots.setdefault(int(index), {})[name] = value
        weights = {key.removeprefix("decoder."): t for key, t in self._pending.items() if key.startswith("decoder.")}
        try:
            decoder.load_state_dict(weights)
        except RuntimeError:
            raise RunError(
                f"adversary: the checkpoint's decoder is not one of width {self.width} for this cut and these records"
            ) from None
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
        self._pending = {}


@final
class Decoder(nn.Module):
    """Activations (B, ...) -> records (B, ...): the mean record, plus a linear map and a correction of what was sent.

    Activations are centered and divided by one scale for all, both running: else a stage could hide by shrinking. It
    starts at the mean record. Maps for pictures are decoded by convolutions, all else by a perceptron.
    """

    def __init__(self, x: Tensor, z: Tensor, width: int) -> None:
        super().__init__()
        self.record: Tensor
        self.center: Tensor
        self.scale: Tensor
        self.register_buffer("record", x.mean(0))
        self.register_buffer("center", z.mean(0))
        self.register_buffer("scale", _scale(z - z.mean(0)))
        make = _Convolutions if x.dim() == z.dim() == 4 else _Perceptron
        self.network: nn.Module = make(x.shape[1:], z.shape[1:], width)

    def forward(self, z: Tensor) -> Tensor:
        return self.record + cast(Tensor, self.network((z - self.center) / self.scale))

    @torch.no_grad()
    def follow(self, x: Tensor, z: Tensor) -> None:
        """Let the running means and scale take in a batch."""
        self.record.lerp_(x.mean(0), 1 - MEMORY)
        self.center.lerp_(z.mean(0), 1 - MEMORY)
        self.scale.lerp_(_scale(z - self.center), 1 - MEMORY)


@final
class _Convolutions(nn.Module):
    """Maps (B, A, h, w) -> pictures (B, C, H, W), at the maps' size; every place then gives a square of pixels."""

    def __init__(self, record: torch.Size, sent: torch.Size, width: int) -> None:
        super().__init__()
        self._size = record[1:]
        self._square = math.ceil(max(record[1] / sent[1], record[2] / sent[2]))
        hidden, pixels = width * self._square, record[0] * self._square**2
        self.linear = nn.Conv2d(sent[0], pixels, 3, padding=1)
        self.first = nn.Conv2d(sent[0], hidden, 3, padding=1)
        self.last = nn.Conv2d(hidden, pixels, 3, padding=1)
        _silence(self.linear, self.last)

    def forward(self, z_BAhw: Tensor) -> Tensor:
        pixels = self.linear(z_BAhw) + self.last(F.gelu(self.first(z_BAhw)))
        x_BCHW = F.pixel_shuffle(pixels, self._square)
        return x_BCHW if x_BCHW.shape[2:] == self._size else F.interpolate(x_BCHW, self._size, mode="bilinear")


@final
class _Perceptron(nn.Module):
    """Activations (B, ...) -> records (B, ...) of any shapes."""

    def __init__(self, record: torch.Size, sent: torch.Size, width: int) -> None:
        super().__init__()
        self._record = record
        values, hidden = sent.numel(), 8 * width
        self.linear = nn.Linear(values, record.numel())
        self.first, self.second = nn.Linear(values, hidden), nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, record.numel())
        _silence(self.linear, self.last)

    def forward(self, z: Tensor) -> Tensor:
        z_BD = z.flatten(1)
        x_BP: Tensor = self.linear(z_BD) + self.last(F.gelu(self.second(F.gelu(self.first(z_BD)))))
        return x_BP.reshape(len(z), *self._record)


def _silence(*layers: nn.Conv2d | nn.Linear) -> None:
    """Layers that give nothing at first."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _scale(centered: Tensor) -> Tensor:
    """Root mean square; never 0."""
    return centered.square().mean().sqrt().clamp_min(1e-12)
