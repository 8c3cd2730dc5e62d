"""Feature-space hijacking: a hostile server that trains the client to send what it can read.

Legend: B batch, N auxiliary records, T targets, G values of the attribute.

After Pasquini, Ateniese and Bernaschi, "Unleashing the tiger: inference attacks on split learning" (CCS 2021, arXiv
2012.02670). The server has a *pilot*, a client of its own, and a *head* that reads records (or an attribute) from what
the pilot sends. Both are trained on auxiliary records. A *critic* learns to tell the pilot's activations from the
client's, and in place of the task's gradient the client is sent that of fooling the critic. Its activations move into
the pilot's space, and the head reads them as well. `loss_scale` multiplies that gradient: against a client that adds a
penalty's gradient (their appendix on defenses), a larger one drowns the penalty. Whoever knows the penalty can tell how
large: by default it is a hundred times the penalty's own pull at what the pilot sends.

Where we differ, for a result in hundreds of batches where theirs takes ten thousand:
- pilot and head are trained before the first batch, then stand still: the client follows a target that does not move;
- the pilot has the client's layers, with weights of its own (theirs are other layers), so what it sends can be learned;
- the critic's loss is the logistic one, its gradient at the pilot's activations penalized (R1: Mescheder, Geiger and
  Nowozin 2018, arXiv 1801.04406), and so hard that the critic hardly bends; theirs is a Wasserstein one with gradient
  penalty, which took longer here, as did a weaker penalty. Where activations are maps there is an opinion on every
  place beside the one on the whole;
- the gradient is brought to a set length before it is scaled, because a critic that hardly bends has a tiny one. In
  the second half that length falls: the client's own optimizer, Adam as well, then takes smaller and smaller steps;
- the head is trained through noise, so that what the client still does otherwise than the pilot does less harm.

The labels that cross are not looked at: the same server would do in a U-shaped training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.attacks.attributes import AttributeGuess, AttributeProbe
from milkglass.attacks.base import Attack, Reconstruction, Tick, silent
from milkglass.attacks.features import as_records
from milkglass.attacks.fsha_networks import classifier, critic_of, decoder
from milkglass.errors import AuditError, MessageError, nearest
from milkglass.messages import Message
from milkglass.randomness import drawing_from, public_source
from milkglass.transcript import Known, View

BATCH: Final = 64
HEAD_RATE: Final = 2e-3
CRITIC_RATE: Final = 1e-3
R1_EVERY: Final = 4
"""The critic's gradient is penalized every so many batches, so many times as hard (Karras et al., arXiv 1912.04958)."""
HEAD_BLUR: Final = 0.3
"""Standard deviation of the noise that the head learns to read through, in units of the activations' spread: a client
comes close to the pilot and never meets it."""
LAST_LENGTH: Final = 0.02
"""Over the second half of the batches the gradient falls to this part of its length."""
SURVIVED: Final = 0.02
"""How far a client that descends plainly may be pushed at a time; ten times as far, and none of its units were left."""
OVER_PENALTY: Final = 100.0
"""The hijacker's gradient over that of a penalty which the client is known to have."""


@dataclass(frozen=True)
class Plan:
    """How long and how hard a client is hijacked.

    iterations: batches that the client trains meanwhile. head_start: batches of 64 that pilot and head train before.
    loss_scale: multiplies the gradient that is sent; at 1 a record's is of length 1 / B (root mean square), no shorter
    than an honest one. None: 1, or as much as drowns the client's own penalty, where that is known; for a client that
    descends plainly as much as it survives. penalty: weight of the critic's squared gradient. width: channels of critic
    and head, an eighth of their units where there are no maps.
    """

    iterations: int = 1000
    head_start: int = 1200
    loss_scale: float | None = None
    penalty: float = 100.0
    width: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.iterations, self.head_start, self.width) < 1:
            raise AuditError(
                f"fsha: iterations = {self.iterations}, head_start = {self.head_start}, width = {self.width}; "
                "expected at least 1 of each"
            )
        scaled = self.loss_scale is None or 0 < self.loss_scale < math.inf
        if not (scaled and 0 <= self.penalty < math.inf):
            raise AuditError(
                f"fsha: loss_scale = {self.loss_scale}, penalty = {self.penalty}; "
                "expected a number above 0 or None, and one from 0 on"
            )


@final
class FsHijack(Attack):
    """Rebuilds records from what a hijacked client sends.

    An adaptive optimizer feels `loss_scale` only against a penalty; plain gradient descent takes it for a learning
    rate, and a client that is pushed too hard sends the same for every record. The settings are those of `Plan`.
    """

    name: ClassVar[str] = "fsha"
    adversary = "malicious"
    knows: ClassVar[tuple[Known, ...]] = ("records", "architecture", "training")
    paper: ClassVar[str] = "Pasquini, Ateniese and Bernaschi, CCS 2021, arXiv 2012.02670"
    learned: ClassVar[bool] = True
    open_door: ClassVar[float] = 0.5

    def __init__(self, plan: Plan = Plan()) -> None:
        self._plan = plan

    def __repr__(self) -> str:
        return f"FsHijack({self._plan!r})"

    def attack(self, view: View, tick: Tick = silent) -> Reconstruction:
        """Train the real client towards the pilot, and decode what it then releases. Higher fidelity = more leakage."""
        start = time.perf_counter()
        self.check(view)
        records = view.known.records
        validation, target, note = hijack(
            view,
            self._plan,
            lambda sent: decoder(sent, records.mean(0), self._plan.width),
            lambda guess_B, rows_B: F.mse_loss(guess_B, records[rows_B]),
            tick,
        )
        made = [as_records(rows.flatten(1), view) for rows in (validation, target)]
        return Reconstruction(made[0], made[1], time.perf_counter() - start, note)


@final
class FsAttribute(AttributeProbe):
    """Makes a hijacked client send a named attribute: the head tells its value in place of the record."""

    name: ClassVar[str] = "fsha attribute"
    adversary = "malicious"
    knows: ClassVar[tuple[Known, ...]] = FsHijack.knows
    paper: ClassVar[str] = FsHijack.paper

    def __init__(self, plan: Plan = Plan()) -> None:
        self._plan = plan

    def __repr__(self) -> str:
        return f"FsAttribute({self._plan!r})"

    def attack(self, view: View, attribute: str, tick: Tick = silent) -> AttributeGuess:
        """Train the real client towards the pilot, and classify what it then releases."""
        start = time.perf_counter()
        self.check(view)
        if attribute not in view.known.attributes:
            hint = nearest(attribute, view.known.attributes)
            raise AuditError(f"attribute {attribute!r}: the known pairs do not have it; {hint or 'they have none'}")
        values_G, of_N = torch.unique(view.known.attributes[attribute], return_inverse=True)
        validation, target, note = hijack(
            view,
            self._plan,
            lambda sent: classifier(sent, len(values_G), self._plan.width),
            lambda logits_BG, rows_B: F.cross_entropy(logits_BG, of_N[rows_B]),
            tick,
        )
        guesses = [values_G[logits_NG.argmax(1)] for logits_NG in (validation, target)]
        return AttributeGuess(guesses[0], guesses[1], time.perf_counter() - start, note)


def hijack(
    view: View,
    plan: Plan,
    head_of: Callable[[torch.Size], nn.Module],
    loss: Callable[[Tensor, Tensor], Tensor],
    tick: Tick,
) -> tuple[Tensor, Tensor, str]:
    """What the head reads from the hijacked client's releases of the validation (N, ...) and target records (T, ...).

    head_of: a head for activations of that shape. loss: (what the head says of a batch, rows of the auxiliary records)
    -> scalar. A client whose guard stops the training is read as it was then, and the third value says so.
    """
    knows, records = view.knowledge, view.known.records
    assert knows.architecture is not None
    assert knows.train is not None
    source = public_source(plan.seed).derive("fsha")
    pilot, _ = knows.architecture(source.generator("pilot"))
    with torch.no_grad(), drawing_from(source.generator("weights")):
        sent = pilot(records[:2]).shape[1:]
        head, critic = head_of(sent), critic_of(sent, plan.width)
    total = plan.head_start + plan.iterations
    generator = source.generator("training")
    with drawing_from(generator):
        wanted_N = fit_head(pilot, head, records, loss, knows.noise_sigma, plan.head_start, lambda at: tick(at, total))
    scale = plan.loss_scale or (
        scale_over(knows.penalty, records, wanted_N) if knows.stride is None else SURVIVED / knows.stride
    )
    server = Hijacker(
        wanted_N,
        critic,
        replace(plan, loss_scale=scale),
        knows.noise_sigma,
        generator,
        lambda done: tick(plan.head_start + done, total),
    )
    driven = knows.train(server, plan.iterations)
    return _in_parts(head, driven.validation), _in_parts(head, driven.target), driven.note(knows.noise_sigma)


def scale_over(penalty: Callable[[Tensor, Tensor], Tensor | None], records_N: Tensor, wanted_N: Tensor) -> float:
    """What makes an unscaled gradient a hundred times as long as the penalty's at these activations; at least 1.

    Early on the client sends smaller values than the pilot, and a penalty that does not feel their scale pulls harder.
    """
    z_B = wanted_N[:BATCH].clone().requires_grad_()
    with torch.enable_grad():
        value = penalty(records_N[:BATCH], z_B)
    if value is None or not value.requires_grad:
        return 1.0
    (pull_B,) = torch.autograd.grad(value, z_B)
    return max(1.0, float(OVER_PENALTY * pull_B.norm() * len(z_B) ** 0.5))


def fit_head(
    pilot: nn.Module,
    head: nn.Module,
    records_N: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    sigma: float,
    steps: int,
    done: Callable[[int], None],
) -> Tensor:
    """Train pilot and head together; returns what the pilot sends for each of the records (N, ...), without noise.

    sigma: standard deviation of the noise that the client adds to what it sends; the head learns to read through it.
    Draws from torch's global generator.
    """
    trained = [parameter for parameter in (*pilot.parameters(), *head.parameters()) if parameter.requires_grad]
    bends = any(parameter.requires_grad for parameter in pilot.parameters())  # else the client is the pilot
    optimizer = torch.optim.Adam(trained, lr=HEAD_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        rows_B = torch.randint(len(records_N), (BATCH,))
        z_B = pilot(records_N[rows_B])
        blur = math.hypot(sigma, HEAD_BLUR * z_B.detach().std().item()) if bends else sigma
        wrong = loss(head(z_B + blur * torch.randn_like(z_B)), rows_B)
        optimizer.zero_grad()
        wrong.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % R1_EVERY == 0:
            done(step)
    head.eval()
    return _in_parts(pilot.eval(), records_N)


@final
class Hijacker:
    """A server that answers every training batch with the gradient of passing for the pilot.

    wanted: what the pilot sends for auxiliary records, (N, ...). critic: (B, ...) -> opinions, each (B, any number),
    higher = the pilot's. sigma: standard deviation of the client's noise. It says that the loss is the critic's, and
    that as many records were classified right as pass for the pilot's.
    """

    def __init__(
        self,
        wanted: Tensor,
        critic: nn.Module,
        plan: Plan,
        sigma: float,
        generator: torch.Generator,
        done: Callable[[int], None],
    ) -> None:
        self._wanted, self._critic, self._plan, self._sigma = wanted, critic, plan, sigma
        self._generator, self._done = generator, done
        self._spread = math.hypot(wanted.std().item(), sigma) or 1.0
        self._optimizer = torch.optim.Adam(critic.parameters(), lr=CRITIC_RATE, betas=(0.5, 0.99))
        self._batches = 0

    def reply(self, message: Message) -> Message:
        """Learn from one batch of the client's, and answer it. Raises MessageError for anything else."""
        sent = message.tensors.get("activations")
        if message.kind != "activations" or sent is None:
            raise MessageError(f"a hijacking server answers training batches, not {message.kind!r}")
        if sent.shape[1:] != self._wanted.shape[1:]:
            raise MessageError(
                f"activations {tuple(sent.shape[1:])}; expected {tuple(self._wanted.shape[1:])}, as the pilot's"
            )
        sent_B = sent.to(self._wanted.dtype)
        with torch.enable_grad():
            self._teach_critic(sent_B)
            z_B = sent_B.clone().requires_grad_()
            opinions = self._critic(z_B / self._spread)
            loss = _doubt(opinions)
            (dz_B,) = torch.autograd.grad(loss, z_B)
        length = self._length() / (dz_B.norm().item() * math.sqrt(len(dz_B)) or 1.0)
        self._batches += 1
        self._done(self._batches)
        passing = (opinions[0].detach().mean(1) > 0).sum()
        gradient = (length * dz_B).to(sent.dtype)
        return Message(
            "gradients", "server", message.step, {"gradient": gradient, "loss": loss.detach(), "right": passing}
        )

    def _length(self) -> float:
        """Of a record's gradient, times the batch size."""
        left = 2 * (1 - self._batches / self._plan.iterations)
        return (self._plan.loss_scale or 1.0) * min(1.0, max(LAST_LENGTH, left))

    def _teach_critic(self, sent_B: Tensor) -> None:
        """One step towards telling the pilot's activations from the client's."""
        rows_B = torch.randint(len(self._wanted), (len(sent_B),), generator=self._generator)
        wanted_B = self._wanted[rows_B]
        if self._sigma:
            wanted_B = wanted_B + self._sigma * torch.randn(wanted_B.shape, generator=self._generator)
        pilots_B = (wanted_B / self._spread).requires_grad_()
        opinions = self._critic(pilots_B)
        loss = _doubt(opinions) + _doubt([-opinion for opinion in self._critic(sent_B / self._spread)])
        if self._batches % R1_EVERY == 0:
            total = sum((opinion.mean(1).sum() for opinion in opinions), torch.zeros(()))
            (slope_B,) = torch.autograd.grad(total, pilots_B, create_graph=True)
            loss = loss + R1_EVERY * self._plan.penalty / 2 * slope_B.flatten(1).square().sum(1).mean()
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()


def _doubt(opinions: list[Tensor]) -> Tensor:
    """Low where the critic is sure of the pilot's: scalar."""
    return torch.stack([F.softplus(-opinion).mean() for opinion in opinions]).mean()


@torch.no_grad()
def _in_parts(module: nn.Module, rows: Tensor) -> Tensor:
    return torch.cat([module(part) for part in torch.split(rows, 8 * BATCH)])
