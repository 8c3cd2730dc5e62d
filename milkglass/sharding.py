"""A server's stage over several processes: each computes its share of a batch's rows, and all take the same steps.

Legend: B records in a batch, `...` an activation's own shape.

Synchronous data parallelism with torch's DistributedDataParallel (Li et al. 2020, VLDB, arXiv 2006.15704). Rank 0 is
the server that clients talk to (`Crew`), the others do as it says (`follow`). It alone has the loss and a checkpoint.

- Every rank gets as many rows as the others: the last ones are filled up with copies of the first row, whose outputs
  are dropped and whose gradients are zero. So a batch may be smaller than the number of ranks.
- A rank's gradient is of its rows' part of the whole batch's loss; all ranks' add up to the whole batch's gradient.
  DistributedDataParallel takes the mean, so a rank first multiplies by the number of ranks.
- Gradients meet once a step, in the backward pass of its last piece. Each rank then steps its own optimizer, and as
  weights and optimizers were equal before, they are equal afterwards.
- Or, as a `Joint` says, compressed, or not at all: then each rank steps by itself, and weights are averaged after some
  steps, and before anybody reads them or asks for an answer.
- Dropout: for every pass rank 0 draws a key from the server's generator, and each rank derives its own numbers from it.
  So the bits depend on the number of ranks, and only rank 0 has a generator to keep.

We differ in the forward pass, which is the stage's own: DistributedDataParallel allows one forward pass for each
backward pass, and U-shaped several pieces are on their way at once. It is shown what a pass has made, no more.

What ranks tell each other is neither encrypted nor authenticated: they belong on one machine, or on one's own network.
Shards travel through main memory (gloo); where there is a GPU, stages lie there, and gradients travel with NCCL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, cast, final

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import ModelAverager
from torch.distributed.algorithms.model_averaging.utils import average_parameters
from torch.nn.parallel import DistributedDataParallel

from milkglass.errors import MilkglassError, RunError, first_line
from milkglass.randomness import KEY_BYTES, Source, drawing_from
from milkglass.rank_links import Links, dealt, gathered, shards_of
from milkglass.server import Server

_KEY_WORDS: Final = KEY_BYTES // 8
_MOST_DIMENSIONS: Final = 8
_WORDS: Final = 4 + _KEY_WORDS + _MOST_DIMENSIONS


class _Op(IntEnum):
    BEGIN, FORWARD, BACKWARD, STEP, AGREE, LOAD, STOP = range(7)


@dataclass(frozen=True)
class Joint:
    """How the ranks' stages stay one.

    attach: is given what gradients meet by, for a communication hook; bucket_mebibytes: of that. averager: made for
    the ranks' group; then gradients do not meet: each rank steps by itself, and weights are averaged.
    """

    attach: Callable[[DistributedDataParallel], None] = lambda _: None
    averager: Callable[[Any], ModelAverager] | None = None
    bucket_mebibytes: int | None = None


@dataclass(frozen=True)
class _Command:
    """What rank 0 says: `_WORDS` numbers. pieces: 0 in evaluation. key: for a pass's dropout. shape: of a shard."""

    op: _Op
    number: int = 0
    pieces: int = 0
    key: tuple[int, ...] = (0,) * _KEY_WORDS
    shape: tuple[int, ...] = ()

    def words(self) -> Tensor:
        shape = (*self.shape, *(0,) * (_MOST_DIMENSIONS - len(self.shape)))
        return torch.tensor([self.op, self.number, self.pieces, len(self.shape), *self.key, *shape])

    @staticmethod
    def of(words: Tensor) -> _Command:
        op, number, pieces, dimensions, *rest = words.tolist()
        key, shape = rest[:_KEY_WORDS], rest[_KEY_WORDS:][:dimensions]
        return _Command(_Op(op), number, pieces, tuple(key), tuple(shape))


@final
class _Meeting(nn.Module):
    """What DistributedDataParallel is given: the stage's parameters, and what a pass through it has made already."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.learned = nn.ParameterList(stage.parameters())

    def forward(self, made: Tensor) -> Tensor:
        return made


@final
class _Part:
    """One rank's part of the work, of rank 0 as of any other."""

    def __init__(self, server: Server, links: Links, joint: Joint) -> None:
        self.server, self.links = server, links
        server.stage.to(links.device)
        self._joint = joint
        self._averager = None if joint.averager is None else joint.averager(links.gradients)
        self._open: dict[int, tuple[Tensor, Tensor]] = {}  # piece -> its rows, and what was made of them
        self._meeting: DistributedDataParallel | None = None

    def forward(self, z: Tensor, command: _Command) -> Tensor:
        """The pass of own rows; in training kept for the backward pass. What it returns has no graph."""
        training = command.pieces > 0
        if training and command.number == 0:
            self._open.clear()  # of a piece that was refused after its pass
        z = z.to(self.links.device).requires_grad_(training)
        if training and self._meeting is None and self._averager is None and self.server.optimizer is not None:
            self._meeting = self._meet(z)
        self.server.stage.train(training)
        with torch.set_grad_enabled(training), self._drawing(command.key):
            out: Tensor = self.server.stage(z.clone())  # the stage may begin with an in-place layer
        if training:
            self._open[command.number] = z, out
        return out.detach().cpu().contiguous()

    def made(self, piece: int) -> Tensor:
        """As large as what was made of own rows: room for its gradient."""
        return torch.empty_like(self._open[piece][1], device="cpu", memory_format=torch.contiguous_format)

    def backward(self, gradient: Tensor, command: _Command) -> Tensor:
        """From the gradient of what was made of own rows to theirs; at a step's last piece all ranks' add up."""
        z, out = self._open.pop(command.number)
        if command.number == command.pieces - 1 and self._meeting is not None:
            with torch.enable_grad():
                out = self._meeting(out)
        out.backward(gradient.to(self.links.device) * self.links.ranks)  # type: ignore[no-untyped-call]
        return (cast(Tensor, z.grad) / self.links.ranks).cpu().contiguous()

    def step(self) -> None:
        """Of a rank other than 0, whose server takes its own."""
        if self.server.optimizer is not None:
            self.server.optimizer.step()
            self.stepped()
            self.server.optimizer.zero_grad(set_to_none=True)

    def stepped(self) -> None:
        """Of any rank: weights meet, where it is time."""
        optimizer = self.server.optimizer
        if self._averager is not None and optimizer is not None:
            self._averager.average_parameters(optimizer.param_groups)  # type: ignore[no-untyped-call]

    def agree(self) -> None:
        """Weights meet at once; where they are to meet next does not change."""
        average_parameters(self.server.stage.parameters(), self.links.gradients)

    def _meet(self, z: Tensor) -> DistributedDataParallel:
        """Where ranks add up their gradients. A first pass shows whether all parameters have a part in the output."""
        learned = [tensor for tensor in self.server.stage.parameters() if tensor.requires_grad]
        with torch.enable_grad():
            out = self.server.stage.eval()(z.clone()).sum()
            found = torch.autograd.grad(out, learned, allow_unused=True)
        meeting = DistributedDataParallel(
            _Meeting(self.server.stage),
            process_group=self.links.gradients,
            bucket_cap_mb=self._joint.bucket_mebibytes,
            find_unused_parameters=any(gradient is None for gradient in found),
        )
        self._joint.attach(meeting)
        return meeting

    @contextmanager
    def _drawing(self, key: tuple[int, ...]) -> Iterator[None]:
        raw = b"".join(word.to_bytes(8, "little", signed=True) for word in key)
        own = Source(raw).derive("rank", self.links.rank)
        cuda = self.links.device.type == "cuda"
        with (
            drawing_from(own.generator("stage")),
            torch.random.fork_rng([self.links.device]) if cuda else nullcontext(),
        ):
            if cuda:
                torch.cuda.manual_seed(int.from_bytes(own.derive("cuda").read(7)))
            yield


@final
class Crew:
    """Rank 0: it says what is done, and does its part of it. The server's `Sharing`."""

    def __init__(self, links: Links, joint: Joint | None = None) -> None:
        self._links, self._joint = links, joint or Joint()
        self._part: _Part | None = None
        self._apart = False  # each rank has stepped by itself since all had the same weights
        self._broken: str | None = None

    @property
    def ranks(self) -> int:
        """How many processes there are."""
        return self._links.ranks

    def lead(self, server: Server, *, number: int = 0, check: int = 0) -> None:
        """From now on all compute this server's stage.

        number: tells the others which stage they must make. check: must be the same as theirs.
        """
        with self._together():
            self._say(_Command(_Op.BEGIN, number, key=(check, 0, 0, 0)))
            self._part = _Part(server, self._links, self._joint)
        server.sharing = self
        self.load()

    def forward(self, z: Tensor, piece: tuple[int, int] | None) -> Tensor:
        """What the stage makes of z (B, ...): in training, where `piece` is (its index, of how many), with a graph."""
        if piece is None:
            return self.pass_on(z, 0, 0)
        return cast(Tensor, _Pass.apply(z, self, *piece))  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """The others take the step; the server takes its own."""
        with self._together():
            self._say(_Command(_Op.STEP))

    def stepped(self) -> None:
        """Weights meet, where they do and it is time."""
        with self._together() as part:
            part.stepped()
            self._apart = self._joint.averager is not None

    def agree(self) -> None:
        """All take the mean of their weights, unless they are the same."""
        if self._apart:
            with self._together() as part:
                self._say(_Command(_Op.AGREE))
                part.agree()
                self._apart = False

    def load(self) -> None:
        """The others take over the server's weights, and what its optimizer remembers."""
        self._apart = False
        with self._together() as part:
            weights = part.server.weights(with_optimizer=True)
            raw = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()})
            self._say(_Command(_Op.LOAD, len(raw)))
            dist.broadcast(torch.frombuffer(bytearray(raw), dtype=torch.uint8), 0, self._links.shards)

    def stop(self) -> None:
        """The others are done, and agree once more. Nothing hangs on whether they hear it."""
        if self._broken is None:
            try:
                self.agree()
                self._say(_Command(_Op.STOP))
            except (RuntimeError, MilkglassError):  # they are gone already
                self._broken = "stopped"

    def pass_on(self, z: Tensor, number: int, pieces: int) -> Tensor:
        """A forward pass of all; what it returns has no graph."""
        with self._together() as part:
            key = torch.randint(-(2**63), 2**63 - 1, (_KEY_WORDS,), generator=part.server.generator).tolist()
            shards = shards_of(z.detach(), self.ranks, z[:1].detach())
            command = _Command(_Op.FORWARD, number, pieces, tuple(key), tuple(shards[0].shape))
            self._say(command)
            made = part.forward(dealt(self._links, shards[0], shards), command)
            return gathered(self._links, made)[: len(z)]

    def pass_back(self, gradient: Tensor, number: int, pieces: int) -> Tensor:
        """A backward pass of all: the gradient at what a forward pass of that number took."""
        with self._together() as part:
            shards = shards_of(gradient, self.ranks, torch.zeros_like(gradient[:1]))
            command = _Command(_Op.BACKWARD, number, pieces, shape=tuple(shards[0].shape))
            self._say(command)
            back = part.backward(dealt(self._links, shards[0], shards), command)
            return gathered(self._links, back)[: len(gradient)]

    def _say(self, command: _Command) -> None:
        dist.broadcast(command.words(), 0)

    @contextmanager
    def _together(self) -> Iterator[_Part]:
        """Who fails inside leaves the ranks in different places: then nothing more is possible."""
        if self._broken is None:
            try:
                yield cast(_Part, self._part)
                return
            except (RuntimeError, ValueError, MilkglassError) as error:
                self._broken = first_line(error)
        raise MilkglassError(
            f"the {self.ranks} processes that share the server's stage no longer work together ({self._broken}); "
            "nothing is lost: start torchrun again with --resume, and the clients go on"
        )


@final
class _Pass(torch.autograd.Function):
    """A pass through the stages of all ranks, as a node of the graph of rank 0."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, crew: Crew, number: int, pieces: int) -> Tensor:
        ctx.crew, ctx.number, ctx.pieces = crew, number, pieces
        return crew.pass_on(z, number, pieces)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.crew.pass_back(gradients[0], ctx.number, ctx.pieces), None, None, None


def follow(
    links: Links, make_server: Callable[[int], Server], *, check: int = 0, joint: Joint | None = None
) -> Server | None:
    """Be a rank other than 0, until that one says that all is done; the server as it is then.

    make_server: from the number that rank 0 leads with, a server whose stage and optimizer are like that one's.
    """
    part: _Part | None = None
    try:
        while True:
            words = torch.zeros(_WORDS, dtype=torch.int64)
            dist.broadcast(words, 0)
            command = _Command.of(words)
            if command.op is _Op.STOP:
                return None if part is None else part.server
            if command.op is _Op.BEGIN:
                if command.key[0] != check:
                    raise RunError(f"rank {links.rank} was started with another recipe than rank 0")
                part = _Part(make_server(command.number), links, joint or Joint())
            else:
                assert part is not None
                _obey(part, command)
    except RuntimeError as error:
        raise MilkglassError(
            f"rank {links.rank}: the processes that share the server's stage no longer work together "
            f"({first_line(error)})"
        ) from None


def _obey(part: _Part, command: _Command) -> None:
    if command.op is _Op.FORWARD:
        gathered(part.links, part.forward(dealt(part.links, torch.empty(command.shape)), command))
    elif command.op is _Op.BACKWARD:
        gathered(part.links, part.backward(dealt(part.links, part.made(command.number)), command))
    elif command.op is _Op.STEP:
        part.step()
    elif command.op is _Op.AGREE:
        part.agree()
    else:
        raw = torch.empty(command.number, dtype=torch.uint8)
        dist.broadcast(raw, 0, part.links.shards)
        part.server.load_weights(load(raw.numpy().tobytes()), with_optimizer=True)
