"""The circuit against arithmetic, its gates against the papers' formulas, and the run itself where it is installed."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from milkglass.errors import DataError, MissingExtraError
from milkglass.private.garbled_circuits import (
    BITS,
    FRACTION_BITS,
    Circuit,
    _fixed_point,
    _shared,
    argmax_circuit,
    garbled_argmax_cost,
    garbled_argmax_run,
)
from milkglass.private.two_party_environment import find_garbling
from milkglass.randomness import public_source


def evaluate(circuit: Circuit, client_IB: np.ndarray, server_IB: np.ndarray) -> np.ndarray:
    """Bristol format read by the letter: the output's bits (J, B) for input bits of many records at once."""
    head, sizes, blank, *gates = circuit.text.rstrip("\n").split("\n")
    assert blank == ""
    count, wires = map(int, head.split())
    assert [circuit.client_bits, circuit.server_bits, circuit.output_bits] == list(map(int, sizes.split()))
    assert count == len(gates)
    values: list[np.ndarray | None] = [*client_IB, *server_IB]
    values += [None] * (wires - len(values))
    for gate in gates:
        *numbers, kind = gate.split()
        inputs, outputs, a, b, out = map(int, numbers)
        assert (inputs, outputs) == (2, 1)
        left, right = values[a], values[b]
        assert left is not None
        assert right is not None
        assert values[out] is None  # each wire is written once, after those it reads
        values[out] = left ^ right if kind == "XOR" else left & right
    answers = values[-circuit.output_bits :]
    assert all(value is not None for value in values)
    return np.array(answers)


def bits_of(numbers_KB: np.ndarray, bits: int) -> np.ndarray:
    """(K * bits, B), least bit first."""
    return np.concatenate([(row >> np.arange(bits)[:, None]) & 1 for row in numbers_KB])


@pytest.mark.parametrize(("classes", "bits"), [(2, 2), (2, 8), (3, 5), (5, 3), (8, 4), (10, 32), (17, 6)])
def test_the_circuit_is_the_masked_argmax_of_the_sum_of_shares(classes: int, bits: int) -> None:
    generator = np.random.default_rng(classes * 100 + bits)
    values_KB = generator.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (classes, 300))
    values_KB[:, 0] = -(2 ** (bits - 1))  # all equal, and the ends of the range
    values_KB[-1, 1], values_KB[0, 1] = 2 ** (bits - 1) - 1, -(2 ** (bits - 1))
    client_KB = generator.integers(0, 2**bits, values_KB.shape)
    mask_JB = generator.integers(0, 2, ((classes - 1).bit_length(), 300))
    circuit = argmax_circuit(classes, bits)
    client_IB = np.concatenate([bits_of(client_KB, bits), mask_JB])
    output_JB = evaluate(circuit, client_IB, bits_of((values_KB - client_KB) % 2**bits, bits))
    place_B = ((output_JB ^ mask_JB) << np.arange(len(mask_JB))[:, None]).sum(axis=0)
    assert place_B.tolist() == values_KB.argmax(axis=0).tolist()


def test_all_inputs_of_a_small_circuit() -> None:
    shares = np.array(np.meshgrid(*[np.arange(4)] * 4, [0, 1])).reshape(5, -1)  # two classes of two bits, and the mask
    client_IB = np.concatenate([bits_of(shares[:2], 2), shares[4:]])
    output_B = evaluate(argmax_circuit(2, 2), client_IB, bits_of(shares[2:4], 2))[0]
    first_B, second_B = (((shares[at] + shares[2 + at] + 2) % 4) - 2 for at in (0, 1))
    assert output_B.tolist() == ((second_B > first_B) ^ shares[4]).astype(int).tolist()


def test_records_of_one_circuit_do_not_know_each_other() -> None:
    classes, bits, records = 3, 4, 5
    generator = np.random.default_rng(0)
    one, many = argmax_circuit(classes, bits), argmax_circuit(classes, bits, records)
    client_IB = generator.integers(0, 2, (one.client_bits, records))
    server_IB = generator.integers(0, 2, (one.server_bits, records))
    together = evaluate(many, client_IB.T.reshape(-1, 1), server_IB.T.reshape(-1, 1)).reshape(records, -1)
    assert together.tolist() == evaluate(one, client_IB, server_IB).T.tolist()
    assert many.and_gates == records * one.and_gates


@pytest.mark.parametrize(("classes", "bits"), [(2, 8), (3, 32), (10, 32), (100, 16)])
def test_gates_and_bytes_follow_the_published_formulas(classes: int, bits: int) -> None:
    cost = garbled_argmax_cost(classes, bits)
    add, compare, choose = classes * (bits - 1), (classes - 1) * bits, (classes - 2) * bits
    index = sum(classes - 1 - 2**bit for bit in range((classes - 1).bit_length()))
    assert cost.and_gates == add + compare + choose + index
    inputs = classes * bits
    assert cost.bytes_up == 16 * inputs  # 128 bits for each transfer
    answer = -(-(classes - 1).bit_length() // 8)
    assert cost.bytes_down == 2 * 16 * cost.and_gates + 2 * 16 * inputs + answer
    assert argmax_circuit(classes, bits).text.count("AND") == cost.and_gates


def test_shares_add_up_and_follow_the_source() -> None:
    values_BK = _fixed_point(torch.tensor([[-1.5, 0.25, 3.0], [0.0, -32767.5, 32767.5]]))
    assert values_BK[0].tolist() == [-1.5 * 2**FRACTION_BITS, 2**FRACTION_BITS // 4, 3 * 2**FRACTION_BITS]
    client_BI, server_BI, mask_BJ = _shared(values_BK, public_source(1))
    powers = 1 << np.arange(BITS)
    total = (client_BI.reshape(2, 3, BITS) @ powers + server_BI.reshape(2, 3, BITS) @ powers) % 2**BITS
    assert total.tolist() == (values_BK % 2**BITS).tolist()
    again, other = _shared(values_BK, public_source(1)), _shared(values_BK, public_source(2))
    assert (again[0] == client_BI).all()
    assert (again[2] == mask_BJ).all()
    assert (other[0] != client_BI).any()


@pytest.mark.parametrize(
    ("logits_BK", "words"),
    [
        (torch.zeros(3), "expected"),
        (torch.full((1, 3), 40_000.0), "scale them down"),
        (torch.full((1, 3), torch.nan), "scale them down"),
        (torch.zeros(2, 1), "at least 2 classes"),
        (torch.zeros(0, 4), "1 record"),
        (torch.zeros(500, 10), "split the batch"),
    ],
    ids=["no batch", "too large", "not finite", "one class", "no records", "too many"],
)
def test_what_the_circuit_cannot_hold_is_refused(logits_BK: torch.Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        garbled_argmax_run(logits_BK, public_source(0))


@pytest.mark.slow
def test_two_processes_find_the_classes() -> None:
    try:
        find_garbling()
    except MissingExtraError as error:
        pytest.skip(str(error))
    if shutil.which("node") is None:
        pytest.skip("garbled circuits need Node")
    logits_BK = torch.randn(2, 4, generator=public_source(5).generator("logits"))
    found = garbled_argmax_run(logits_BK, public_source(0), timeout_seconds=60)
    assert found.classes_B.tolist() == logits_BK.argmax(1).tolist()
    assert found.equal == 1
    assert min(found.bytes_up, found.bytes_down) > 32 * found.and_gates  # more than half gates
