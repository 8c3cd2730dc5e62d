"""An attacker with far more than an audit gives it: every picture that is not private, a large decoder, a GPU.

    python -m benchmarks.strong_decoder RUN --reference RUN [--steps 4000] [--device cuda] [--out FILE]

An audit's attacker has 6,000 pairs, some hundred steps and a small network. This one has all pictures of the training
file but the private ones and 1,000 to validate on, moved about; the client's weights and the law of its noise, so that
no two batches are alike; and a decoder of some 20 million weights on top of ridge regression. RUN is a finished run on
pictures; the reference is its undefended twin, whose answers the attacker is entitled to. One decoder for each thing
that may be seen: the answer alone, one release, the mean of ten releases, what crosses before any noise; and, as the
open door that a strong attacker has to walk through, the picture itself behind a random rotation.

Decoders are chosen by their error on validation records and scored on the run's test records. `peek` is as in an audit,
with the answer alone decoded by the same network. Random numbers come from generators on the device: figures repeat on
one machine, and differ between machines.

Legend: B records in a batch, N records, C channels, H height, W width, F features seen, D coordinates at the cut.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.setting import command_line, machine_line, write_result
from milkglass.attacks.defense_aware import shifted
from milkglass.attacks.features import SMALLEST_PROBABILITY
from milkglass.data import load
from milkglass.leakage.reconstruction import peek, squared_errors
from milkglass.replay import load_parties
from milkglass.runs import RunFolder
from milkglass.training.split import Setup

BATCH: Final = 512
LEARNING_RATE: Final = 1e-3
CHECKS: Final = 10
AVERAGED: Final = 0.998
"""Of the decoder's weights a mean over about 1 / (1 - this) steps is kept; it is what rebuilds."""
WIDE: Final = 1024
MAPS: Final = (256, 128)
RIDGE: Final = 1e-5
"""Of the mean of the features' squares, added to each."""
SIGHTS: Final = ("the answer alone", "one release", "ten releases", "no noise", "the picture, rotated")
OPEN_DOOR: Final = SIGHTS[-1]
Sight = Callable[[Tensor, Tensor], Tensor]
"""(records (B, C, H, W), labels (B,)) -> all that the attacker sees, (B, F)."""


@final
class Client:
    """What a run's client sends, and the reference's answers, on a device."""

    def __init__(self, defended: Setup, reference: Setup, device: torch.device) -> None:
        self._stage = defended.client.stage.eval().to(device)
        self._defenses = defended.client.defenses
        self._answering = nn.Sequential(reference.client.stage, reference.server.stage).eval().to(device)
        self._classes = defended.records.classes
        self.noise_sigma = sum(defense.noise_sigma**2 for defense in self._defenses) ** 0.5

    def noise_free(self, x_BCHW: Tensor) -> Tensor:
        """What crosses, before any noise."""
        z: Tensor = self._stage(x_BCHW)
        for defense in self._defenses:
            z = defense.transform(z)
        return z.flatten(1)

    def answer(self, x_BCHW: Tensor, y_B: Tensor) -> Tensor:
        """The reference's class probabilities, their logarithms, and the label."""
        log_BK = self._answering(x_BCHW).log_softmax(dim=1).clamp_min(math.log(SMALLEST_PROBABILITY))
        return torch.cat([log_BK.exp(), log_BK, F.one_hot(y_B, self._classes)], dim=1)


def sight(what: str, client: Client, values: int, generator: torch.Generator) -> Sight:
    """One of SIGHTS; `values`: of a picture."""
    if what == OPEN_DOOR:
        square = torch.randn(values, values, generator=generator, device=generator.device)
        rotation, _ = torch.linalg.qr(square)
        return lambda x, _: x.flatten(1) @ rotation
    releases = {"the answer alone": 0.0, "one release": 1.0, "ten releases": 10.0, "no noise": math.inf}[what]

    def seen(x_BCHW: Tensor, y_B: Tensor) -> Tensor:
        answer_BF = client.answer(x_BCHW, y_B)
        if releases == 0:
            return answer_BF
        z_BD = client.noise_free(x_BCHW)
        noise_BD = torch.randn(z_BD.shape, generator=generator, device=z_BD.device)
        return torch.cat([z_BD + client.noise_sigma / releases**0.5 * noise_BD, answer_BF], dim=1)

    return seen


@final
class Decoder(nn.Module):
    """Features (B, F) -> pictures (B, C, H, W), sides divisible by 4: the ridge image, and a correction learned on top.

    The correction is a perceptron, then convolutions at a quarter and at half of the size; zero at the start.
    """

    def __init__(self, ridge_FP: Tensor, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = shape
        self._shape, self._coarse = shape, (MAPS[0], height // 4, width // 4)
        self.ridge_FP: Tensor
        self.register_buffer("ridge_FP", ridge_FP)
        features = len(ridge_FP) - 1
        self.first = nn.Sequential(nn.BatchNorm1d(features, affine=False), nn.Linear(features, WIDE), nn.GELU())
        self.wide = nn.ModuleList(_wide_block() for _ in range(2))
        self.spread = nn.Linear(WIDE, math.prod(self._coarse))
        last = nn.Conv2d(MAPS[1], channels * 4, 3, padding=1)
        nn.init.zeros_(last.weight)
        self.picture = nn.Sequential(
            *(_Residual(MAPS[0]) for _ in range(2)),
            nn.Conv2d(MAPS[0], MAPS[1] * 4, 1),
            nn.PixelShuffle(2),
            *(_Residual(MAPS[1]) for _ in range(2)),
            nn.BatchNorm2d(MAPS[1]),
            nn.GELU(),
            last,
            nn.PixelShuffle(2),
        )

    def forward(self, seen_BF: Tensor) -> Tensor:
        image = ridge_image(self.ridge_FP, seen_BF).reshape(-1, *self._shape)
        hidden = self.first(seen_BF)
        for block in self.wide:
            hidden = hidden + block(hidden)
        maps = self.spread(hidden).reshape(-1, *self._coarse)
        correction: Tensor = self.picture(maps.contiguous(memory_format=torch.channels_last))
        return image + correction


def _wide_block() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(WIDE), nn.Linear(WIDE, WIDE), nn.GELU(), nn.Linear(WIDE, WIDE))


@final
class _Residual(nn.Module):
    def __init__(self, maps: int) -> None:
        super().__init__()
        layers = [[nn.BatchNorm2d(maps), nn.GELU(), nn.Conv2d(maps, maps, 3, padding=1)] for _ in range(2)]
        self.layers = nn.Sequential(*layers[0], *layers[1])

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        made: Tensor = maps_BCHW + self.layers(maps_BCHW)
        return made


def with_one(seen_BF: Tensor) -> Tensor:
    """A column of ones behind the features."""
    return torch.cat([seen_BF, seen_BF.new_ones(len(seen_BF), 1)], dim=1)


def ridge_image(ridge_FP: Tensor, seen_BF: Tensor) -> Tensor:
    """Flat pictures (B, P) by ridge regression, in float32."""
    with torch.autocast(seen_BF.device.type, enabled=False):
        return with_one(seen_BF.float()) @ ridge_FP


@torch.no_grad()
def ridge(seen: Sight, known: Pictures) -> Tensor:
    """Weights (F + 1, P) of the least squared error on all known records, each seen once."""
    gram: Tensor | float = 0.0
    cross: Tensor | float = 0.0
    for start in range(0, len(known), BATCH):
        x, y = known.take(slice(start, start + BATCH))
        one_BF = with_one(seen(x, y)).double()
        gram, cross = gram + one_BF.T @ one_BF, cross + one_BF.T @ x.flatten(1).double()
    assert isinstance(gram, Tensor)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    weights_FP: Tensor = torch.linalg.solve(gram, cross)
    return weights_FP.float()


@final
class Pictures:
    """Pictures (N, C, H, W) and labels (N,) on a device; 8 bits a value, as in their file."""

    def __init__(self, x_NCHW: Tensor, y_N: Tensor, device: torch.device) -> None:
        self._bytes_NCHW = (x_NCHW * 255).round().to(torch.uint8).to(device)
        self._y_N = y_N.to(device)

    def __len__(self) -> int:
        return len(self._y_N)

    def take(self, rows_B: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Records (B, C, H, W) in [0, 1], and labels."""
        return self._bytes_NCHW[rows_B].float() / 255, self._y_N[rows_B]


def known_to_all(run: Setup, device: torch.device) -> Pictures:
    """Every record of the training file that is neither private nor for validation."""
    path = run.recipe.data.path
    if path is None or len(run.records.record_shape) != 3:
        raise SystemExit("expected a run on pictures from a file")
    pool = load(path=Path(path))
    known_N = torch.ones(len(pool), dtype=torch.bool)
    for taken in (*run.records.train_indices.values(), run.records.validation_indices):
        known_N[taken] = False
    records = pool.take(known_N.nonzero()[:, 0])
    return Pictures(records.x, records.y, device)


@torch.no_grad()
def rebuilt(decoder: nn.Module, seen: Sight, pictures: Pictures) -> Tensor:
    """Pictures (N, C, H, W) in [0, 1], on the CPU."""
    parts = []
    for start in range(0, len(pictures), BATCH):
        x, y = pictures.take(slice(start, start + BATCH))
        parts.append(decoder(seen(x, y)).clamp(0, 1).float().cpu())
    return torch.cat(parts)


def record_errors(decoder: nn.Module, seen: Sight, pictures: Pictures) -> Tensor:
    """Mean squared error of each record."""
    truth = pictures.take(slice(None))[0].cpu()
    return squared_errors(rebuilt(decoder, seen, pictures), truth)


def train(seen: Sight, known: Pictures, validation: Pictures, steps: int, generator: torch.Generator) -> nn.Module:
    """The decoder, averaged over its last steps, that is best on validation records."""
    device = generator.device
    _, *shape = known.take(slice(0, 1))[0].shape
    decoder: nn.Module = Decoder(ridge(seen, known), (shape[0], shape[1], shape[2])).to(device)
    decoder = decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    mean = AveragedModel(decoder, multi_avg_fn=get_ema_multi_avg_fn(AVERAGED))  # type: ignore[no-untyped-call]
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    best, best_error = decoder, math.inf
    for step in range(1, steps + 1):
        x, y = known.take(torch.randint(len(known), (BATCH,), generator=generator, device=device))
        x = shifted(x, generator, flips=True)
        with torch.no_grad():
            what = seen(x, y)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            made = decoder(what)
        loss = F.mse_loss(made.float(), x)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        mean.update_parameters(decoder)
        if step % max(1, steps // CHECKS) == 0:
            error = record_errors(mean.eval(), seen, validation).mean().item()
            if error < best_error:
                best, best_error = copy.deepcopy(mean.module), error
    return best.eval()


def main() -> None:
    """Train one decoder for each thing seen; print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="also as JSON")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_float32_matmul_precision("high")
    run, reference = (load_parties(RunFolder.open_finished(each)) for each in (arguments.run, arguments.reference))
    client, known = Client(run, reference, device), known_to_all(run, device)
    validation, test = (Pictures(p.x, p.y, device) for p in (run.records.validation, run.records.test))
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"<!-- {command_line()}; {machine_line()}, {where} -->\n")
    print(f"{len(known):,} pairs, scored on {len(test):,} records; {run.defense}\n")
    print("| seen | error | peek (95 %) | minutes |")
    print("|---|---|---|---|")
    answer_errors: Tensor | None = None
    rows = []
    for what in SIGHTS:
        torch.manual_seed(arguments.seed)  # first weights
        generator = torch.Generator(device).manual_seed(arguments.seed)
        start = time.perf_counter()
        seen = sight(what, client, math.prod(run.records.record_shape), generator)
        decoder = train(seen, known, validation, arguments.steps, generator)
        errors = record_errors(decoder, seen, test)
        answer_errors = errors if answer_errors is None else answer_errors
        shown = peek(errors, answer_errors, torch.Generator().manual_seed(0))
        seconds = time.perf_counter() - start
        mse = errors.mean().item()
        rows.append({"seen": what, "mse": mse, "peek": [shown.value, shown.low, shown.high], "seconds": seconds})
        interval = f"{shown.value:.3f} ({shown.low:.3f} to {shown.high:.3f})"
        print(f"| {what} | {mse:.5f} | {interval} | {seconds / 60:.1f} |", flush=True)
    if arguments.out is not None:
        write_result(arguments.out, rows)


if __name__ == "__main__":
    main()
