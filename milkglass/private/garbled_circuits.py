"""Garbled circuits for a comparison layer: which of K secret-shared logits is the greatest, told to the client alone.

After `two_party.py` the logits could stay shared, so that the client learns the class and not the logits. The circuit
adds both shares of each logit and compares (Kolesnikov, Sadeghi and Schneider 2009, eprint 2009/411: free XOR, w - 1
AND gates to add, w to compare or to choose). It costs twice:

- MEASURED, `garbled_argmax_run`: emp-wasm 0.3.2 on Node, a process for each party. That is *authenticated* garbling
  (Wang, Ranellucci and Katz 2017, eprint 2017/189), whose design withstands parties that deviate; hence many times the
  bytes. Its authors rewrote parts of emp-toolkit and say themselves that this "needs some checking": a yardstick, not
  something to protect records with. Both parties see the circuit's output, so the client's own random bits mask it.
- MODELLED, `garbled_argmax_cost`: half gates (Zahur, Rosulek and Evans 2015, eprint 2014/756), for curious parties that
  follow the protocol: two ciphertexts of 128 bits per AND gate, none for XOR; the client's inputs by correlated
  oblivious transfers (Asharov, Lindell, Schneider and Zohner 2013, eprint 2013/552: 128 bits each way). Counted from
  these papers, not run.

Shapes: B batch, K classes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import numpy as np
import torch
from torch import Tensor

from milkglass.errors import DataError, LinkError
from milkglass.private.two_party_environment import MissingEnvironmentError, find_garbling
from milkglass.private.two_processes import party_folders, run_pair
from milkglass.randomness import Source

GUARANTEE: Final = (
    "Garbled argmax of logits that both hold shares of, the comparison layer alone: the server learns nothing of them "
    "or of the class, the client the class alone. Whoever computed the logits in the clear knows them. Authenticated "
    "garbling is made to hold against a party that deviates, but the build measured here has had no review: figures "
    "from it are costs, not protection."
)
BITS: Final = 32
FRACTION_BITS: Final = 16
MOST_GATES: Final = 50_000
_LABEL_BYTES: Final = 16
_WORKER: Final = Path(__file__).with_name("garbled_worker.mjs")


@final
@dataclass(frozen=True)
class Circuit:
    """A boolean circuit in Bristol format; inputs are the client's bits, then the server's."""

    text: str
    and_gates: int
    client_bits: int
    server_bits: int
    output_bits: int


@final
@dataclass(frozen=True)
class GarbledCost:
    """What one record costs with half gates: modelled from published costs, not measured.

    The server garbles. `bytes_up` go from client to server (its side of the transfers), `bytes_down` back (tables,
    labels, decoding); `rounds` are round trips. The base transfers, once per link, are left out.
    """

    and_gates: int
    bytes_up: int
    bytes_down: int
    rounds: int


@final
@dataclass(frozen=True)
class GarbledRun:
    """What authenticated garbling cost, measured: all records in one circuit.

    `classes_B`: what the client learned. `equal`: the share of records with the class of the plain logits (0..1, higher
    = closer). Bytes of TCP's payload, base transfers among them; `seconds` from `go` to the client's answer.
    """

    classes_B: Tensor
    records: int
    and_gates: int
    bytes_up: int
    bytes_down: int
    seconds: float
    setup_seconds: float
    equal: float


def garbled_argmax_cost(classes: int, bits: int = BITS) -> GarbledCost:
    """The cost per record of the greatest of `classes` logits of `bits` bits each, which both parties hold shares of.

    Raises DataError for fewer than two classes or bits.
    """
    gates = argmax_circuit(classes, bits).and_gates
    inputs = classes * bits  # of either party
    decoding = -(-_index_bits(classes) // 8)
    down = 2 * _LABEL_BYTES * gates + _LABEL_BYTES * inputs + _LABEL_BYTES * inputs + decoding
    return GarbledCost(and_gates=gates, bytes_up=_LABEL_BYTES * inputs, bytes_down=down, rounds=1)


def argmax_circuit(classes: int, bits: int = BITS, records: int = 1) -> Circuit:
    """The place of the greatest of `classes` signed numbers of `bits` bits, the first of equals; for each record.

    Per record the client's input is its shares (additive, modulo 2^bits; least bit first) and a mask; the server's its
    shares; the output is the place, least bit first, XOR the mask.
    """
    if classes < 2 or bits < 2 or records < 1:
        raise DataError(
            f"garbled argmax: {classes} classes of {bits} bits, {records} records; expected at least 2 classes, 2 bits "
            f"and 1 record"
        )
    index_bits = _index_bits(classes)
    client_bits, server_bits = records * (classes * bits + index_bits), records * classes * bits
    maker = _Maker(client_bits + server_bits)
    masked: list[tuple[int, int]] = []
    for record in range(records):
        first, other = record * (classes * bits + index_bits), client_bits + record * classes * bits
        numbers = [
            maker.sum(_wires(first + place * bits, bits), _wires(other + place * bits, bits))
            for place in range(classes)
        ]
        place = maker.greatest(numbers)
        masked += zip(place, _wires(first + classes * bits, index_bits), strict=True)
    for wire, mask in masked:  # the output is the last wires, in order
        maker.xor(wire, mask)
    head = f"{len(maker.gates)} {maker.wires}\n{client_bits} {server_bits} {len(masked)}\n\n"
    return Circuit(head + "\n".join(maker.gates) + "\n", maker.and_gates, client_bits, server_bits, len(masked))


def garbled_argmax_run(
    logits_BK: Tensor,
    source: Source,
    *,
    node: Path | None = None,
    module: Path | None = None,
    timeout_seconds: float = 600.0,
) -> GarbledRun:
    """Share `logits_BK` between two processes (by `source`, which must be private) and let them find the greatest.

    Logits are rounded to 16 bits behind the point. `node` and `module` (emp-wasm's index.js) default to those of the
    environment. Raises DataError for logits out of range or too many, MissingExtraError, and LinkError as
    `two_party_run`.
    """
    values_BK = _fixed_point(logits_BK)
    records, classes = values_BK.shape
    gates = records * argmax_circuit(classes, BITS).and_gates if records else 0
    if gates > MOST_GATES:
        raise DataError(
            f"garbled argmax: {records} records make {gates} AND gates; expected {MOST_GATES} or fewer: split the batch"
        )
    circuit = argmax_circuit(classes, BITS, records)
    module = find_garbling() if module is None else module
    interpreter = _node() if node is None else node
    client_BI, server_BI, mask_BJ = _shared(values_BK, source)
    inputs = (np.concatenate([client_BI, mask_BJ], axis=1), server_BI)
    with party_folders() as folders:
        for folder, bits in zip(folders, inputs, strict=True):
            (folder / "circuit.txt").write_text(circuit.text)
            told = {"bits": bits.ravel().tolist(), "bits_per_party": [circuit.client_bits, circuit.server_bits]}
            (folder / "input.json").write_text(json.dumps(told))

        def command(rank: int, own: str, other: str) -> list[str]:
            return [str(interpreter), str(_WORKER), str(rank), str(folders[rank]), own, other, str(module)]

        pair = run_pair(command, folders, timeout_seconds=timeout_seconds)
        output_BJ = _output(folders[0] / "output.json", mask_BJ.shape)
    classes_B = torch.from_numpy((output_BJ ^ mask_BJ) @ (1 << np.arange(mask_BJ.shape[1])))
    plain_B = torch.from_numpy(values_BK.argmax(axis=1))
    return GarbledRun(
        classes_B=classes_B,
        records=records,
        and_gates=circuit.and_gates,
        bytes_up=pair.bytes_up,
        bytes_down=pair.bytes_down,
        seconds=pair.seconds,
        setup_seconds=pair.setup_seconds,
        equal=float((classes_B == plain_B).double().mean()),
    )


@final
class _Maker:
    """Writes gates down, one by one."""

    def __init__(self, inputs: int) -> None:
        self.wires = inputs
        self.gates: list[str] = []
        self.and_gates = 0

    def xor(self, a: int, b: int) -> int:
        return self._gate(a, b, "XOR")

    def both(self, a: int, b: int) -> int:
        self.and_gates += 1
        return self._gate(a, b, "AND")

    def sum(self, a: Sequence[int], b: Sequence[int]) -> list[int]:
        """Modulo 2^width: width - 1 AND gates."""
        out, carry = [self.xor(a[0], b[0])], self.both(a[0], b[0])
        for at in range(1, len(a)):
            with_carry = self.xor(b[at], carry)
            out.append(self.xor(a[at], with_carry))
            if at < len(a) - 1:
                carry = self.xor(carry, self.both(self.xor(a[at], carry), with_carry))
        return out

    def greater(self, a: Sequence[int], b: Sequence[int]) -> int:
        """a > b, signed: width AND gates."""
        result = self.xor(a[0], self.both(a[0], b[0]))
        for at in range(1, len(a)):
            x, y = (a[at], b[at]) if at < len(a) - 1 else (b[at], a[at])  # a sign counts the other way
            result = self.xor(x, self.both(self.xor(x, result), self.xor(y, result)))
        return result

    def chosen(self, bit: int, a: int, b: int) -> int:
        """`a` where `bit`, else `b`."""
        return self.xor(b, self.both(bit, self.xor(a, b)))

    def greatest(self, numbers: Sequence[Sequence[int]]) -> list[int]:
        """The bits of its place. One that has been 0 so far is no wire yet (None), and choosing is free."""
        best: Sequence[int] = numbers[0]
        place: list[int | None] = [None] * _index_bits(len(numbers))
        for candidate in range(1, len(numbers)):
            wins = self.greater(numbers[candidate], best)
            if candidate < len(numbers) - 1:
                best = [self.chosen(wins, new, old) for new, old in zip(numbers[candidate], best, strict=True)]
            for at, old in enumerate(place):
                one = bool(candidate >> at & 1)
                if old is None:
                    place[at] = wins if one else None
                else:
                    kept = self.xor(old, self.both(old, wins))
                    place[at] = self.xor(kept, wins) if one else kept
        return [wire for wire in place if wire is not None]

    def _gate(self, a: int, b: int, kind: str) -> int:
        self.gates.append(f"2 1 {a} {b} {self.wires} {kind}")
        self.wires += 1
        return self.wires - 1


def _wires(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


def _index_bits(classes: int) -> int:
    return (classes - 1).bit_length()


def _fixed_point(logits_BK: Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    if logits_BK.ndim != 2:
        raise DataError(f"garbled argmax: logits of shape {tuple(logits_BK.shape)}; expected (B, K)")
    scaled_BK = (logits_BK.detach().double() * 2**FRACTION_BITS).round()
    if not bool((scaled_BK.abs() < 2 ** (BITS - 1)).all()):
        raise DataError(f"garbled argmax: logits must lie within +-{2 ** (BITS - 1 - FRACTION_BITS)}; scale them down")
    values_BK: np.ndarray[tuple[int, int], np.dtype[np.int64]] = scaled_BK.cpu().numpy().astype(np.int64)
    return values_BK


def _shared(
    values_BK: np.ndarray[tuple[int, int], np.dtype[np.int64]], source: Source
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bits of the client's shares (B, K * bits), of the server's, and of the client's mask (B, index bits)."""
    records, classes = values_BK.shape
    raw = source.derive("garbled shares").read(4 * values_BK.size)
    client_BK = np.frombuffer(raw, dtype="<u4").reshape(values_BK.shape).astype(np.int64)
    server_BK = (values_BK - client_BK) % 2**BITS
    mask = np.frombuffer(source.derive("garbled mask").read(records * _index_bits(classes)), dtype=np.uint8) & 1
    client_BI, server_BI = (
        ((share_BK[:, :, None] >> np.arange(BITS)) & 1).reshape(records, -1) for share_BK in (client_BK, server_BK)
    )
    return client_BI, server_BI, mask.reshape(records, -1).astype(np.int64)


def _node() -> Path:
    found = shutil.which("node")
    if found is None:
        raise MissingEnvironmentError("garbled circuits need Node, which is not on the path: install Node 20")
    return Path(found)


def _output(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The bits that the client's process wrote."""
    try:
        return np.asarray(json.loads(file.read_text()), dtype=np.int64).reshape(shape)
    except (OSError, ValueError) as error:
        raise LinkError(f"two parties: the client left no output that can be read: {error}") from None
