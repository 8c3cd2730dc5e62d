"""SDAR: a server that does all it agreed to, and learns a copy of the client on the side.

Legend: B batch, N records, A channels, h, w height and width of activation maps; C, H, W of a picture; K classes.

After Zhu, Luo, Wu, Jiang, Xiao and Ooi, "Passive inference attacks on split learning via adversarial regularization"
(NDSS 2025, arXiv 2310.10483), vanilla split learning. While the real client trains, the server trains
- a *simulator*, the client's layers with weights of its own: the server's stage must classify what it makes of
  auxiliary records, and a *critic*, told the label, must not tell that from what the real client sends;
- a *decoder* from the simulator's activations and the label back to the auxiliary records; a second critic must not
  tell what it makes of real activations from real records.
At the end the decoder is given what the real client releases.

It needs a long training (the authors': 20,000 batches): only as the server's stage settles does it tell one order of
the client's channels from another. In a short one the client stays mostly unread, and the critics must weigh more than
the authors' 0.02 (simulator's) and 1e-5 (decoder's) to help. On Fashion-MNIST (`cnn` cut after `block2`, undefended,
250 batches) the mean squared error is .055 at 0.02 and 0, .046 at 0.5 and 0, .040 at 0.5 and 0.1; the mean picture's is
.087, and what the answer tells .027. So a low score here is no protection.

Where we differ: layers are small enough for a CPU and normalized by GroupNorm, which sees one record at a time; the
decoder works at half the picture's size and adds to the mean record; its learning rate falls towards the end; critics
learn at a rate of their own (the authors' is the simulator's or decoder's times the critic's weight: 2e-5 and 5e-9,
which does not move in a short training); the simulator's step and the decoder's share their activations. The authors'
simulator of a client with NoPeek has the same penalty: here whatever penalty the client is known to add. Noise that it
is known to add is added to the simulator's activations too.

Nothing is sent that an honest server would not send, and nothing of the server moves: its stage is copied to be read.
"""

from __future__ import annotations

import math
import time
from typing import ClassVar, Final, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.attacks.base import Attack, Reconstruction, Tick, silent
from milkglass.attacks.features import as_records
from milkglass.errors import AuditError, MissingKnowledgeError
from milkglass.messages import Message
from milkglass.randomness import drawing_from, public_source
from milkglass.transcript import HonestServer, Known, View

BATCH: Final = 64
LABEL_WIDTH: Final = 50
SIDE_TO_FOLD: Final = 16
"""Pictures at least this wide and high, and even, are made at half size, with four times the channels."""


@final
class Sdar(Attack):
    """A simulator of the client, and a decoder of what it sends, learned from the seat of an honest server.

    iterations: batches that the client trains meanwhile. simulator_weight, decoder_weight: of the two critics; 0 leaves
    one out. width: channels of the decoder and the critics.
    """

    # open_door: where the record itself crosses, after 200 batches on digits. A client that mixes all values may go
    # unread in a training as short (peeks of -1.6 after 200 batches and -0.4 after 2,000 were seen).

    name: ClassVar[str] = "sdar"
    knows: ClassVar[tuple[Known, ...]] = ("records", "labels", "architecture", "training")
    paper: ClassVar[str] = "Zhu et al., NDSS 2025, arXiv 2310.10483"
    learned: ClassVar[bool] = True
    open_door: ClassVar[float] = 0.3

    def __init__(
        self,
        iterations: int = 500,
        simulator_weight: float = 0.5,
        decoder_weight: float = 0.1,
        simulator_rate: float = 1e-3,
        decoder_rate: float = 1e-3,
        critic_rate: float = 1e-4,
        width: int = 32,
        seed: int = 0,
    ) -> None:
        if iterations < 1 or width < 1:
            raise AuditError(f"sdar: iterations = {iterations}, width = {width}; expected at least 1 of each")
        if not all(0 <= weight < math.inf for weight in (simulator_weight, decoder_weight)):
            raise AuditError(
                f"sdar: simulator_weight = {simulator_weight}, decoder_weight = {decoder_weight}; "
                "expected numbers from 0 on"
            )
        if not all(0 < rate < math.inf for rate in (simulator_rate, decoder_rate, critic_rate)):
            raise AuditError(
                f"sdar: simulator_rate = {simulator_rate}, decoder_rate = {decoder_rate}, critic_rate = {critic_rate}; "
                "expected numbers above 0"
            )
        self._iterations, self._width, self._seed = iterations, width, seed
        self._simulator_weight, self._decoder_weight = simulator_weight, decoder_weight
        self._simulator_rate, self._decoder_rate, self._critic_rate = simulator_rate, decoder_rate, critic_rate

    def __repr__(self) -> str:
        return (
            f"Sdar(iterations={self._iterations}, simulator_weight={self._simulator_weight}, "
            f"decoder_weight={self._decoder_weight}, simulator_rate={self._simulator_rate}, "
            f"decoder_rate={self._decoder_rate}, critic_rate={self._critic_rate}, width={self._width}, "
            f"seed={self._seed})"
        )

    def attack(self, view: View, tick: Tick = silent) -> Reconstruction:
        """Watch a training as its server, then decode what the client releases. Higher fidelity = more leakage."""
        start = time.perf_counter()
        self.check(view)
        knows = view.knowledge
        assert knows.train is not None
        assert knows.honest_server is not None
        labels = [view.validation.labels, view.target.labels]
        if any(part is None for part in labels):
            raise MissingKnowledgeError(f"attack {self.name!r} needs labels of the validation records; there are none")
        learner = _Learner(self, view)
        driven = knows.train(_Curious(knows.honest_server(), learner, tick, self._iterations), self._iterations)
        made = [
            as_records(learner.decode(sent, cast(Tensor, y_N)).flatten(1), view)
            for sent, y_N in zip((driven.validation, driven.target), labels, strict=True)
        ]
        return Reconstruction(made[0], made[1], time.perf_counter() - start, driven.note(knows.noise_sigma))


@final
class _Curious:
    """An honest server, and somebody who looks over its shoulder after every training batch."""

    def __init__(self, server: HonestServer, learner: _Learner, tick: Tick, total: int) -> None:
        self._server, self._learner, self._tick, self._total = server, learner, tick, total
        self._done = 0

    def reply(self, message: Message) -> Message:
        """The honest answer, unchanged."""
        answer = self._server.reply(message)
        if message.kind == "activations":
            self._learner.learn(self._server.stage, message.tensors["activations"], message.tensors["labels"])
            self._done += 1
            self._tick(self._done, self._total)
        return answer


@final
class _Learner:
    """Simulator, decoder and their critics. All that they draw comes from a generator of their own."""

    def __init__(self, settings: Sdar, view: View) -> None:
        source = public_source(settings._seed).derive("sdar")
        knows = view.knowledge
        assert knows.architecture is not None
        assert view.known.labels is not None
        self._settings, self._sigma, self._penalty = settings, knows.noise_sigma, knows.penalty
        self._x_N, self._y_N = view.known.records, view.known.labels
        self._simulator, self._top = knows.architecture(source.generator("simulator"))
        self._generator = source.generator("training")
        with torch.no_grad(), drawing_from(source.generator("weights")):
            z_B = self._simulator(self._x_N[:2])
            classes = self._top(z_B).shape[1]
            sent, record, width = z_B.shape[1:], self._x_N.shape[1:], settings._width
            self._decoder = _decoder(sent, self._x_N.mean(0), classes, width)
            self._critics = _critic(sent, classes, width), _critic(record, classes, width)
        self._top.requires_grad_(False)
        slow, quick = (0.9, 0.999), (0.5, 0.999)  # a critic's opponent moves: it must forget quickly
        trains = any(parameter.requires_grad for parameter in self._simulator.parameters())
        self._simulator_step = _adam(self._simulator, settings._simulator_rate, slow) if trains else None
        self._decoder_step = _adam(self._decoder, settings._decoder_rate, slow)
        self._critic_steps = [_adam(critic, settings._critic_rate, quick) for critic in self._critics]
        self._steps = 0

    def learn(self, stage: nn.Module, sent_B: Tensor, labels_B: Tensor) -> None:
        """One step beside the client's: `stage` is the server's, `sent_B` (B, ...) and `labels_B` (B,) crossed."""
        self._top.load_state_dict(stage.state_dict())
        self._top.eval()
        rows_B = torch.randint(len(self._x_N), (BATCH,), generator=self._generator)
        real = sent_B[:BATCH], labels_B[:BATCH]
        with drawing_from(self._generator), torch.enable_grad():
            z_B = self._simulate(self._x_N[rows_B], self._y_N[rows_B], *real)
            self._decode(z_B.detach(), self._x_N[rows_B], self._y_N[rows_B], *real)
        self._steps += 1

    def _simulate(self, x_B: Tensor, y_B: Tensor, real_B: Tensor, real_y_B: Tensor) -> Tensor:
        """Bring the simulator closer to the client; what it made of `x_B`."""
        z_B: Tensor = self._simulator(x_B)
        if self._sigma:
            z_B = z_B + self._sigma * torch.randn_like(z_B)
        if self._simulator_step is None:
            return z_B  # a stage without weights: the simulator is the client
        loss = F.cross_entropy(self._top(z_B), y_B)
        penalty = self._penalty(x_B, z_B)
        if penalty is not None:
            loss = loss + penalty
        weight, critic = self._settings._simulator_weight, self._critics[0]
        if weight:
            loss = loss + weight * _fools(critic, z_B, y_B)
        _descend(self._simulator_step, loss)
        if weight:
            _descend(self._critic_steps[0], _tells(critic, (real_B, real_y_B), (z_B.detach(), y_B)))
        return z_B

    def _decode(self, z_B: Tensor, x_B: Tensor, y_B: Tensor, real_B: Tensor, real_y_B: Tensor) -> None:
        """Bring the decoder closer to the auxiliary records `x_B`."""
        falling = 0.5 + 0.5 * math.cos(math.pi * min(1.0, self._steps / self._settings._iterations))
        self._decoder_step.param_groups[0]["lr"] = self._settings._decoder_rate * max(falling, 0.02)
        loss = F.mse_loss(self._decoder(z_B, y_B), x_B)
        weight, critic = self._settings._decoder_weight, self._critics[1]
        if not weight:
            _descend(self._decoder_step, loss)
            return
        guess_B = self._decoder(real_B, real_y_B)
        _descend(self._decoder_step, loss + weight * _fools(critic, guess_B, real_y_B))
        _descend(self._critic_steps[1], _tells(critic, (x_B, y_B), (guess_B.detach(), real_y_B)))

    @torch.no_grad()
    def decode(self, sent_N: Tensor, labels_N: Tensor) -> Tensor:
        """(N, ...) activations and (N,) labels -> (N, ...) records."""
        parts = zip(torch.split(sent_N, 8 * BATCH), torch.split(labels_N, 8 * BATCH), strict=True)
        return torch.cat([self._decoder(z_B, y_B) for z_B, y_B in parts])


def _adam(module: nn.Module, rate: float, betas: tuple[float, float]) -> torch.optim.Adam:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.Adam(trained, lr=rate, betas=betas, fused=True)


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of the optimizer's own parameters: a critic that is fooled must not learn from it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        parameter.grad = gradient
    optimizer.step()


def _fools(critic: nn.Module, made_B: Tensor, y_B: Tensor) -> Tensor:
    """Low where the critic takes what was made for real: scalar."""
    return F.softplus(-critic(made_B, y_B)).mean()


def _tells(critic: nn.Module, real: tuple[Tensor, Tensor], made: tuple[Tensor, Tensor]) -> Tensor:
    """Low where the critic tells real from made (values, labels): scalar."""
    return F.softplus(-critic(*real)).mean() + F.softplus(critic(*made)).mean()


def _decoder(sent: torch.Size, mean: Tensor, classes: int, width: int) -> nn.Module:
    if len(sent) == 3 and mean.ndim == 3:
        return _PictureDecoder(sent, mean, classes, width)
    return _FlatDecoder(sent, mean, classes, 8 * width)


def _critic(shape: torch.Size, classes: int, width: int) -> nn.Module:
    return _MapCritic(shape, classes, width) if len(shape) == 3 else _FlatCritic(shape, classes, 4 * width)


@final
class _Labeled(nn.Module):
    """(B, A, h, w) maps and (B,) labels -> (B, A + 1, h, w): the label as one more map, learned."""

    def __init__(self, shape: torch.Size, classes: int) -> None:
        super().__init__()
        self.label = nn.Embedding(classes, LABEL_WIDTH)
        self.plane = nn.Linear(LABEL_WIDTH, shape[1] * shape[2])

    def forward(self, maps_BAhw: Tensor, y_B: Tensor) -> Tensor:
        plane_B1hw = self.plane(self.label(y_B)).reshape(len(y_B), 1, *maps_BAhw.shape[2:])
        return torch.cat([maps_BAhw, plane_B1hw], dim=1)


@final
class _PictureDecoder(nn.Module):
    """(B, A, h, w) activations and (B,) labels -> (B, C, H, W): the mean record, and what the activations add to it."""

    def __init__(self, sent: torch.Size, mean: Tensor, classes: int, width: int) -> None:
        super().__init__()
        channels, height, side = mean.shape
        self.fold = 2 if min(height, side) >= SIDE_TO_FOLD and height % 2 == 0 and side % 2 == 0 else 1
        self.size = height // self.fold, side // self.fold
        self.labeled = _Labeled(sent, classes)
        self.first = _convolution(sent[0] + 1, width)
        self.middle = nn.ModuleList(_convolution(width, width) for _ in range(2))
        self.last = nn.Conv2d(width, channels * self.fold**2, 3, padding=1)
        self.mean = nn.Buffer(mean)

    def forward(self, z_BAhw: Tensor, y_B: Tensor) -> Tensor:
        h = self.first(self.labeled(z_BAhw, y_B))
        h = h + self.middle[0](h)
        if h.shape[2:] != self.size:
            h = F.interpolate(h, size=self.size)
        h = h + self.middle[1](h)
        picture_BCHW: Tensor = self.mean + F.pixel_shuffle(self.last(h), self.fold)
        return picture_BCHW


def _convolution(before: int, after: int) -> nn.Sequential:
    norm = nn.GroupNorm(math.gcd(after, 8), after)
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), norm, nn.ReLU())


@final
class _FlatDecoder(nn.Module):
    """(B, ...) activations and (B,) labels -> (B, ...) records: the mean record, and what the activations add to it."""

    def __init__(self, sent: torch.Size, mean: Tensor, classes: int, hidden: int) -> None:
        super().__init__()
        self.label = nn.Embedding(classes, LABEL_WIDTH)
        self.first = nn.Linear(sent.numel() + LABEL_WIDTH, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, mean.numel())
        self.mean = nn.Buffer(mean)

    def forward(self, z_B: Tensor, y_B: Tensor) -> Tensor:
        joined = torch.cat([z_B.flatten(1), self.label(y_B)], dim=1)
        h = F.relu(self.second(F.relu(self.first(joined))))
        record_B: Tensor = self.mean + self.last(h).reshape(len(z_B), *self.mean.shape)
        return record_B


@final
class _MapCritic(nn.Module):
    """(B, A, h, w) maps and (B,) labels -> (B,): higher = taken for real."""

    def __init__(self, shape: torch.Size, classes: int, width: int) -> None:
        super().__init__()
        self.labeled = _Labeled(shape, classes)
        self.first = nn.Conv2d(shape[0] + 1, width, 3, stride=2, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.last = nn.Linear(
            2 * width * math.ceil(math.ceil(shape[1] / 2) / 2) * math.ceil(math.ceil(shape[2] / 2) / 2), 1
        )

    def forward(self, maps_BAhw: Tensor, y_B: Tensor) -> Tensor:
        h = F.leaky_relu(self.first(self.labeled(maps_BAhw, y_B)), 0.2)
        h = F.leaky_relu(self.second(h), 0.2)
        real_B: Tensor = self.last(h.flatten(1))[:, 0]
        return real_B


@final
class _FlatCritic(nn.Module):
    """(B, ...) values and (B,) labels -> (B,): higher = taken for real."""

    def __init__(self, shape: torch.Size, classes: int, hidden: int) -> None:
        super().__init__()
        self.label = nn.Embedding(classes, LABEL_WIDTH)
        self.first = nn.Linear(shape.numel() + LABEL_WIDTH, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, 1)

    def forward(self, values_B: Tensor, y_B: Tensor) -> Tensor:
        joined = torch.cat([values_B.flatten(1), self.label(y_B)], dim=1)
        h = F.leaky_relu(self.first(joined), 0.2)
        real_B: Tensor = self.last(F.leaky_relu(self.second(h), 0.2))[:, 0]
        return real_B
