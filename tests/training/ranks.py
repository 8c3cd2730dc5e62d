"""What each process does that `test_sharded.py` starts with torchrun: `python -m tests.training.ranks FOLDER`.

`play` is one server's training, from the first message to the last. Rank 0 plays it with the others' help; the test
plays it alone. Every process writes what its own server knows at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from milkglass.errors import MessageError, MilkglassError
from milkglass.messages import Kind, Message
from milkglass.randomness import Source, drawing_from, public_source
from milkglass.rank_links import Links, linked
from milkglass.server import Server
from milkglass.sharding import Crew, Joint, follow
from milkglass.training.averaging import AdaptivePeriodicAverager
from milkglass.training.data_parallel import TopKState, gaussian_k_hook
from tests.helpers import KEY

WIDTH, CLASSES = 6, 4
Answers = dict[str, Tensor]


class Forgetful(nn.Module):
    """Has a parameter that no output follows from, and begins with a layer that works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.used = nn.ReLU(inplace=True), nn.Linear(WIDTH, CLASSES)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, z: Tensor) -> Tensor:
        return self.used(self.first(z))  # type: ignore[no-any-return]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 9), nn.Tanh(), nn.Linear(9, CLASSES))


def fixed() -> nn.Module:
    return nn.Flatten()


def dropping() -> nn.Module:
    return nn.Sequential(nn.Dropout(0.5), nn.Linear(WIDTH, CLASSES, bias=False))


def make(stage: Callable[[], nn.Module], *, u_shaped: bool = False) -> Server:
    with drawing_from(public_source(0).generator("weights")):
        made = stage()
    learned = list(made.parameters())
    optimizer = torch.optim.SGD(learned, lr=0.1, momentum=0.9, weight_decay=0.01) if learned else None
    loss = None if u_shaped else F.cross_entropy
    return Server(made, optimizer, loss=loss, cut_shape=(WIDTH,), source=Source(KEY))


def batches(kind: Kind, sizes: list[int], pieces: int = 1, *, labels: bool = True) -> Iterator[Message]:
    """Messages of a client, drawn from the sizes: each batch in pieces of that size."""
    for step, size in enumerate(sizes):
        for piece in range(pieces):
            generator = torch.Generator().manual_seed(1000 * step + piece)
            tensors = {"activations": torch.randn(size, WIDTH, generator=generator)}
            if labels:
                tensors["labels"] = torch.randint(0, CLASSES, (size,), generator=generator)
            yield Message(kind, "ann", step, tensors, piece, pieces)


def answer(server: Server, message: Message, answers: Answers) -> Message:
    given = server.reply(message)
    for name, tensor in given.tensors.items():
        answers[f"{len(answers)}.{given.kind}.{name}"] = tensor.detach().clone()
    return given


def whole_batches(server: Server, answers: Answers) -> None:
    """Uneven batches, one of fewer records than ranks; queries between them; a state that is gone back to."""
    queries = next(batches("queries", [5], labels=False))
    for number, message in enumerate(batches("activations", [8, 7, 1, 6])):
        answer(server, message, answers)
        answer(server, queries, answers)
        if number == 1:
            kept = {name: tensor.clone() for name, tensor in server.state().items()}
    server.load_state(kept)
    answer(server, queries, answers)
    for message in batches("activations", [4, 3]):
        answer(server, message, answers)


def steps_and_queries(server: Server, answers: Answers) -> None:
    """Even batches with queries between them, and nothing that an optimizer's memory is taken over for."""
    queries = next(batches("queries", [5], labels=False))
    for message in batches("activations", [6, 9, 3, 6, 12, 3]):
        answer(server, message, answers)
        answer(server, queries, answers)


def in_pieces(server: Server, answers: Answers) -> None:
    """Batches in pieces; before one of them comes what is refused only after its pass through the stage."""
    for message in batches("activations", [2, 5], pieces=3):
        if message.piece == 1:
            wrong = {**message.tensors, "labels": message.tensors["labels"] + CLASSES}
            try:
                server.reply(Message("activations", "ann", message.step, wrong, message.piece, message.pieces))
            except MessageError:
                answers[f"{len(answers)}.refused"] = torch.zeros(1)
        answer(server, message, answers)


def u_shaped(server: Server, answers: Answers) -> None:
    """All pieces of a batch are on their way before the first gradient comes."""
    pieces = 3
    for step in range(3):
        made = [
            answer(server, message, answers)
            for message in batches("activations", [4, 1, 5], pieces, labels=False)
            if message.step == step
        ]
        for message in made:
            tensors = {"gradient": message.tensors["features"].cos() / pieces}
            answer(server, Message("returns", "ann", step, tensors, message.piece, pieces), answers)
    answer(server.snapshot(), next(batches("queries", [5], labels=False)), answers)


def dropouts(server: Server, answers: Answers) -> None:
    """Rows that are all alike, so that what differs between them is dropout's."""
    for step in range(2):
        tensors = {"activations": torch.ones(6, WIDTH)}
        made = answer(server, Message("activations", "ann", step, tensors), answers).tensors["features"]
        answer(server, Message("returns", "ann", step, {"gradient": torch.ones_like(made)}), answers)


PLAYS: Final[dict[str, tuple[Callable[[], Server], Callable[[Server, Answers], None]]]] = {
    "whole batches": (lambda: make(mlp), whole_batches),
    "pieces": (lambda: make(mlp), in_pieces),
    "U-shaped": (lambda: make(mlp, u_shaped=True), u_shaped),
    "unused parameter": (lambda: make(Forgetful), whole_batches),
    "nothing to learn": (lambda: make(fixed, u_shaped=True), u_shaped),
    "all sent": (lambda: make(mlp), whole_batches),
    "little sent": (lambda: make(mlp), whole_batches),
    "averaged always": (lambda: make(mlp), steps_and_queries),
    "averaged now and then": (lambda: make(mlp), whole_batches),
    "averaged in pieces": (lambda: make(mlp, u_shaped=True), u_shaped),
    "dropout": (lambda: make(dropping, u_shaped=True), dropouts),
    "dropout again": (lambda: make(dropping, u_shaped=True), dropouts),
}


def averaged(period: int) -> Joint:
    def averager(group: Any) -> AdaptivePeriodicAverager:
        return AdaptivePeriodicAverager(initial_period=period, floor=period, ceiling=period, process_group=group)

    return Joint(averager=averager)


def sparse(density: float) -> Joint:
    def attach(meeting: DistributedDataParallel) -> None:
        meeting.register_comm_hook(TopKState(density, group=meeting.process_group), gaussian_k_hook)

    return Joint(attach)


JOINTS: Final[dict[str, Callable[[], Joint]]] = {
    "all sent": lambda: sparse(1.0),
    "little sent": lambda: sparse(0.1),
    "averaged always": lambda: averaged(1),
    "averaged now and then": lambda: averaged(3),
    "averaged in pieces": lambda: averaged(2),
}
"""How the ranks of a play keep one stage; of other plays, as if there were nothing to choose."""


def play(name: str, links: Links | None = None) -> tuple[Server, Answers]:
    """The server at the end, and all its answers; with links, as the rank that this process is."""
    made, acts = PLAYS[name]
    answers: Answers = {}
    joint = JOINTS.get(name, Joint)()
    if links is not None and links.rank > 0:
        followed = follow(links, lambda _: made(), joint=joint)
        assert followed is not None
        return followed, answers
    server = made()
    crew = None if links is None else Crew(links, joint)
    if crew is not None:
        crew.lead(server)
    acts(server, answers)
    if crew is not None:
        crew.stop()
    return server, answers


def fall_out(links: Links) -> list[str]:
    """What is said where the others hold another recipe, and leave."""
    said = []
    if links.rank > 0:
        try:
            follow(links, lambda _: make(mlp), check=2)
        except MilkglassError as error:
            said.append(str(error))
        return said
    crew, server = Crew(links), make(mlp)
    for _ in range(2):
        try:
            crew.lead(server, check=1)
            server.reply(next(batches("activations", [8])))
        except MilkglassError as error:
            said.append(str(error))
    crew.stop()
    return said


def main(folder: Path) -> None:
    with linked() as links:
        for name in PLAYS:
            server, answers = play(name, links)
            state = {f"state.{key}": t.contiguous() for key, t in server.weights(with_optimizer=True).items()}
            save_file(state | answers | {"there": torch.ones(1)}, folder / f"{name}.{links.rank}.safetensors")
        said = fall_out(links)
    (folder / f"said.{links.rank}").write_text("\n".join(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
