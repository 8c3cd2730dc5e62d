"""One server and its clients: who is answered when, what several send together, what they leave for each other.

Ways for several clients, each with its paper:

relay       in turn, each on from the weights of the one before (Gupta and Raskar 2018, arXiv 1810.06060)
splitfed1   in parallel, the server with a stage for each; all averaged after every epoch (Thapa et al. 2022, AAAI,
            arXiv 2004.12088, SFLV1)
splitfed2   in parallel, one stage at the server, one step of each client after another in a drawn order; the clients
            averaged after every epoch (the same, SFLV2)
vertical    owners of different columns of the same records, one joint step (Ceballos et al. 2020, arXiv 2008.04137)

We differ: weights are handed on and averaged by the clients themselves, sealed from the server, where the papers trust
a server with them. SFLV2 draws its order for every step, not for every epoch, so that clients overlap.

The desk does no input or output: it takes a message and gives back the answers that are due. One client's messages come
in order; between clients any order gives the same bits. After an epoch queries are answered by a copy of the server's
stage as it was then, for a faster client may be training on already.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, final

import torch
from torch import Tensor

from milkglass.defenses.protection import Protection
from milkglass.errors import MessageError
from milkglass.handover import average
from milkglass.hop import Hop
from milkglass.linkage import match
from milkglass.messages import Addressed, Message
from milkglass.randomness import Source
from milkglass.sections import Mode
from milkglass.server import Server

_TRAINING: Final = ("activations", "returns")


@final
class Desk:
    """Answers the messages of all clients.

    servers: for each client the server that trains with it: one and the same, or in splitfed1 one each. public: draws
    the order in splitfed2. axis: along which vertical activations are joined. In vertical training the first client
    holds the labels; the others learn no loss. hop: where this server is one in the middle of the way, the rest of it.
    protection: what hides labels in the gradients of owners who have none.
    """

    def __init__(
        self,
        servers: Mapping[str, Server],
        mode: Mode = "relay",
        *,
        public: Source,
        axis: int = 1,
        hop: Hop | None = None,
        protection: Protection | None = None,
    ) -> None:
        self.servers = dict(servers)
        self.clients = list(servers)
        self.mode = mode
        self._batches: dict[str, int] = {}  # training batches of each in an epoch
        self._public = public
        self._axis = axis
        self._hop = hop
        self._protection = protection
        self._alone = len(self.clients) == 1
        self._name = next(iter(servers.values())).name
        self._asked: Server | None = None  # answers queries, once an epoch is over
        self._round = 1
        self._left: dict[tuple[int, str], Tensor] = {}
        self._collecting: dict[str, Message] = {}
        self._trained = dict.fromkeys(self.clients, 0)  # records of each in this round
        self._done = dict.fromkeys(self.clients, 0)  # and steps
        self._order = self._turns()
        self._turn: str | None = None
        self._turns_done: list[str] = []  # whose steps they were
        self._waiting: dict[str, deque[Message]] = {client: deque() for client in self.clients}
        self._matching: dict[str, Message] = {}
        self._gone: set[str] = set()

    @property
    def resting(self) -> bool:
        """Whether no training step is half done: then `state` is all that must be kept, beside `held`."""
        return all(server.resting for server in self.servers.values())

    @property
    def finished(self) -> bool:
        """Whether every client has said goodbye."""
        return len(self._gone) == len(self.clients)

    def awaited(self) -> list[str]:
        """Those for whom an answer that is due to another client waits."""
        if self._alone:
            return [] if self._hop is None else ["the next party"]
        if self._collecting:
            return [client for client in self.clients if (self._round, client) not in self._left][:1]
        if self._matching:
            return [client for client in self.clients if client not in self._matching]
        if self.mode == "vertical":
            return [client for client in self.clients if not self._waiting[client]]
        if len(self._batches) < len(self.clients):
            return [client for client in self.clients if client not in self._batches]
        return [] if self._turn is None else [self._turn]

    def held(self) -> list[Message]:
        """Messages that were taken and have had no effect so far, because others must come first."""
        waiting = [message for messages in self._waiting.values() for message in messages]
        return [*waiting, *self._collecting.values(), *self._matching.values()]

    def receive(self, message: Message) -> list[Addressed]:
        """Take a message of one client; the answers that are now due, to whom they may be.

        Raises MessageError for what was not agreed, to whoever sent it and before it has any effect; DataError where
        vertical owners' records do not match.
        """
        if message.party not in self.servers:
            raise MessageError(f"{message.party!r} takes no part; those who do: {', '.join(self.clients)}")
        if message.kind == "weights":
            return self._leave(message)
        if message.kind == "collect":
            self._check_collect(message)
            self._collecting[message.party] = message
            return self._handed()
        if message.kind == "hashes":
            return self._match(message)
        if message.kind == "enters":
            return self._enter(message)
        if message.kind == "goodbye":
            self._gone.add(message.party)
            return [(message.party, Message("receipt", self._name, message.step))]
        if self.mode == "vertical" and not self._alone:
            return self._joint(message)
        if self._hop is not None:
            return [(message.party, self._hop.reply(message))]
        if message.kind == "queries":
            self._check_no_step(message.party)
            server = self.servers[message.party] if self._asked is None else self._asked
            return [(message.party, server.reply(message))]
        if message.kind not in _TRAINING:
            raise MessageError(f"a server does not answer {message.kind!r}")
        if self._alone:
            return [(message.party, self.servers[message.party].reply(message))]
        self._check_turn(message)
        if self.mode == "splitfed2":
            self._check_held(message)
            self._waiting[message.party].append(message)
            return list(self._in_turn())
        return [(message.party, self._train(message))]

    # Training: each at once, in a drawn order, or all together.

    def _train(self, message: Message) -> Message:
        answer = self.servers[message.party].reply(message)
        if message.kind == "activations":
            self._trained[message.party] += len(message.tensors["activations"])
        if self.servers[message.party].resting:
            self._done[message.party] += 1
        return answer

    def _check_no_step(self, party: str) -> None:
        """Queries in the middle of a step would keep the server from ever resting."""
        if not self.servers[party].resting and (self.mode != "splitfed2" or self._turn == party):
            raise MessageError(f"'queries' of {party}: a training step of its is half done")

    def _check_turn(self, message: Message) -> None:
        if (self._round, message.party) in self._left:
            raise MessageError(f"{message.kind!r} of {message.party}: it has left its weights in epoch {self._round}")
        posted = sum(1 for round_, _ in self._left if round_ == self._round)
        if self.mode == "relay" and self.clients[posted] != message.party:
            raise MessageError(f"{message.kind!r} of {message.party}: it is the turn of {self.clients[posted]}")

    def _turns(self) -> Iterator[str]:
        """splitfed2: whose step is next, in this round: a permutation of the clients for each step."""
        for index in range(max(self._batches.values())):
            generator = self._public.generator("turns", self._round, index)
            order = torch.randperm(len(self.clients), generator=generator).tolist()
            yield from (self.clients[i] for i in order if self._batches[self.clients[i]] > index)

    def _check_held(self, message: Message) -> None:
        """splitfed2: refuse what could not be served when its turn comes, which another client brings about."""
        server, waiting = self.servers[message.party], self._waiting[message.party]
        if self._turn == message.party and not waiting:
            return  # it is served now, and refused now
        before = waiting[-1] if waiting else None
        if before is not None and before.piece + 1 < before.pieces:
            expected = (before.step, before.piece + 1, before.pieces)
        else:
            expected = (message.step, 0, message.pieces)
        done = before is not None and before.piece + 1 == before.pieces
        if message.kind == "returns" or (done and not server.holds_labels):
            raise MessageError(f"{message.kind!r} of {message.party}: its features of step {message.step} are not out")
        if (message.step, message.piece, message.pieces) != expected:
            raise MessageError(
                f"step {message.step} of {message.party}: piece {message.piece} of {message.pieces}; "
                f"expected piece {expected[1]} of {expected[2]}, of step {expected[0]}"
            )
        server.check(message)

    def _in_turn(self) -> Iterator[Addressed]:
        while len(self._batches) == len(self.clients):
            self._turn = self._turn or next(self._order, None)
            if self._turn is None or not self._waiting[self._turn]:
                return
            party = self._turn
            yield party, self._train(self._waiting[party].popleft())
            if self.servers[party].resting:
                self._turn = None
                self._turns_done.append(party)

    def _joint(self, newest: Message) -> list[Addressed]:
        """vertical: once each owner has sent something, answer what they sent together."""
        if newest.kind not in ("activations", "queries"):
            raise MessageError(f"a server of several owners does not answer {newest.kind!r}")
        labels = newest.kind == "activations" and newest.party == self.clients[0]
        self.servers[newest.party].check(newest, part=True, labels=labels)
        self._waiting[newest.party].append(newest)
        if not all(self._waiting.values()):
            return []
        try:
            answers = self._join([self._waiting[client][0] for client in self.clients])
        except MessageError:
            self._waiting[newest.party].pop()  # the others' stay: they do not fit what this one sent
            raise
        for waiting in self._waiting.values():
            waiting.popleft()
        return answers

    def _join(self, messages: Sequence[Message]) -> list[Addressed]:
        first = messages[0]
        what = {(m.kind, m.step, m.piece, m.pieces, len(m.tensors["activations"])) for m in messages}
        if len(what) > 1:
            told = "; ".join(f"{m.party}: {m.kind!r} of step {m.step}, piece {m.piece}" for m in messages)
            raise MessageError(f"the owners do not send the same batch: {told}")
        parts = [message.tensors["activations"] for message in messages]
        axis = self._axis if all(part.dim() > self._axis for part in parts) else 1
        try:
            joined = torch.cat(parts, dim=axis)
        except RuntimeError:
            shapes = ", ".join("x".join(map(str, part.shape[1:])) for part in parts)
            raise MessageError(f"activations of {shapes} cannot be joined along dimension {axis}") from None
        answer = self.servers[first.party].reply(
            Message(
                first.kind, first.party, first.step, {**first.tensors, "activations": joined}, first.piece, first.pieces
            )
        )
        if first.kind == "queries":
            others = [(client, Message("receipt", self._name, first.step)) for client in self.clients[1:]]
            return [(self.clients[0], answer), *others]
        gradients = torch.split(answer.tensors["gradient"], [part.shape[axis] for part in parts], dim=axis)
        answers: list[Addressed] = []
        for client, gradient in zip(self.clients, gradients, strict=True):
            told_all = dict(answer.tensors) if client == self.clients[0] else {}
            safe = gradient.contiguous()
            if client != self.clients[0] and self._protection is not None:
                safe = self._protection.protect(client, safe, first.tensors["labels"])
            tensors = {**told_all, "gradient": safe}
            answers.append((client, Message("gradients", self._name, first.step, tensors, first.piece, first.pieces)))
        return answers

    # What clients leave for each other.

    def _enter(self, message: Message) -> list[Addressed]:
        batches = message.tensors.get("batches")
        if batches is None or batches.dtype != torch.int64 or batches.numel() != 1 or not 0 < int(batches) < 2**40:
            raise MessageError(f"'enters' of {message.party}: expected how many batches it has in an epoch")
        if message.party in self._batches:
            raise MessageError(f"'enters' of {message.party}: it has said so already")
        self._batches[message.party] = int(batches)
        receipt: Addressed = (message.party, Message("receipt", self._name, message.step))
        return [receipt, *(self._in_turn() if self.mode == "splitfed2" else ())]

    def _leave(self, message: Message) -> list[Addressed]:
        sealed = message.tensors.get("sealed")
        place = (message.step, message.party)
        if sealed is None or sealed.dtype != torch.uint8 or len(message.tensors) != 1 or sealed.dim() != 1:
            raise MessageError(f"'weights' of {message.party}: expected sealed bytes and nothing else")
        if message.step != self._round:
            raise MessageError(f"'weights' of {message.party}: of epoch {message.step}, expected {self._round}")
        self._check_turn(message)
        if self.mode != "splitfed2" and not self.servers[message.party].resting:
            raise MessageError(f"'weights' of {message.party}: a training step of its is half done")
        done, said = self._done[message.party], self._batches.get(message.party)
        if self.mode == "splitfed2" and (self._waiting[message.party] or done != said):
            raise MessageError(f"'weights' of {message.party}: it still has batches in epoch {message.step}")
        if (said is not None and done > said) or (self.mode == "splitfed1" and not done):
            raise MessageError(
                f"'weights' of {message.party}: it has trained {done} batches in epoch {message.step}; it said {said}"
            )
        self._left[place] = sealed.clone()
        answers: list[Addressed] = [(message.party, Message("receipt", self._name, message.step))]
        if all((self._round, client) in self._left for client in self.clients):
            self._end_round()
        return answers + self._handed()

    def _end_round(self) -> None:
        """All have left their weights: average the server's own stages, and keep what queries are answered by."""
        if self.mode == "splitfed1":
            stages = [self.servers[client].weights() for client in self.clients]
            mean = average(stages, [self._trained[client] for client in self.clients])
            for server in self.servers.values():
                server.load_weights(mean)
        self._asked = self.servers[self.clients[0]].snapshot()
        self._left = {place: sealed for place, sealed in self._left.items() if place[0] == self._round}
        self._trained = dict.fromkeys(self.clients, 0)
        self._done = dict.fromkeys(self.clients, 0)
        self._round += 1
        self._order, self._turn, self._turns_done = self._turns(), None, []

    def _check_collect(self, message: Message) -> None:
        wanted = message.tensors.get("of")
        if wanted is None or wanted.dtype != torch.int64 or wanted.dim() != 1 or not len(wanted):
            raise MessageError(f"'collect' of {message.party}: expected the numbers of clients")
        if wanted.min() < 0 or wanted.max() >= len(self.clients) or len(wanted) > len(self.clients):
            raise MessageError(f"'collect' of {message.party}: expected numbers from 0 to {len(self.clients) - 1}")
        if not self._round - 1 <= message.step <= self._round:
            raise MessageError(f"'collect' of {message.party}: of epoch {message.step}, expected {self._round}")

    def _handed(self) -> list[Addressed]:
        """Answers to those whose wanted weights are all there by now."""
        answers: list[Addressed] = []
        for party, message in list(self._collecting.items()):
            names = [self.clients[int(index)] for index in message.tensors["of"]]
            if all((message.step, name) in self._left for name in names):
                del self._collecting[party]
                tensors = {str(place): self._left[message.step, name] for place, name in enumerate(names)}
                answers.append((party, Message("handed", self._name, message.step, tensors)))
        return answers

    def _match(self, message: Message) -> list[Addressed]:
        hashes = message.tensors.get("hashes")
        if self.mode != "vertical" or hashes is None or hashes.dtype != torch.uint8 or hashes.dim() != 2:
            raise MessageError(f"'hashes' of {message.party}: not expected here, or not bytes")
        self._matching[message.party] = message
        if len(self._matching) < len(self.clients):
            return []
        match({client: self._matching[client].tensors["hashes"].numpy() for client in self.clients})
        self._matching = {}
        return [(client, Message("receipt", self._name, 0)) for client in self.clients]

    # Checkpoints.

    def state(self) -> dict[str, Tensor]:
        """All that must be kept beside the messages in `held`: flat, named tensors. Only while `resting`."""
        state = {
            "round": torch.tensor(self._round),
            "trained": torch.tensor([self._trained[client] for client in self.clients]),
            "done": torch.tensor([self._done[client] for client in self.clients]),
            "turns_done": torch.tensor(len(self._turns_done)),
            "gone": torch.tensor([client in self._gone for client in self.clients]),
            "batches": torch.tensor([self._batches.get(client, 0) for client in self.clients]),
        }
        for index, server in enumerate(self._different()):
            state |= {f"server{index}.{name}": tensor for name, tensor in server.state().items()}
        if self._protection is not None:
            state |= {f"protection.{name}": tensor for name, tensor in self._protection.state().items()}
        if self._asked is not None:
            state |= {f"asked.{name}": tensor for name, tensor in self._asked.weights().items()}
        state |= {f"left.{round_}.{self.clients.index(name)}": t for (round_, name), t in self._left.items()}
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken, with nothing held: the messages that were come again."""
        self._round = int(state["round"])
        self._trained = dict(zip(self.clients, state["trained"].tolist(), strict=True))
        self._done = dict(zip(self.clients, state["done"].tolist(), strict=True))
        self._batches = {c: n for c, n in zip(self.clients, state["batches"].tolist(), strict=True) if n}
        self._gone = {client for client, gone in zip(self.clients, state["gone"].tolist(), strict=True) if gone}
        if self._protection is not None:
            self._protection.load_state(_below("protection.", state))
        for index, server in enumerate(self._different()):
            server.load_state(_below(f"server{index}.", state))
        asked = _below("asked.", state)
        if asked:
            self._asked = self.servers[self.clients[0]].snapshot()
            self._asked.load_weights(asked)
        self._left = {}
        for name, tensor in _below("left.", state).items():
            round_, number = name.split(".")
            self._left[int(round_), self.clients[int(number)]] = tensor
        self._order, self._turn = self._turns(), None
        self._turns_done = [next(self._order) for _ in range(int(state["turns_done"]))]

    def _different(self) -> list[Server]:
        return list({id(server): server for server in self.servers.values()}.values())


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
