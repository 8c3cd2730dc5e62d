"""One party of two-party inference. It runs in the other environment: numpy, jax, spu and the standard library alone.

    python two_party_worker.py RANK FOLDER OWN_ADDRESS OTHER_ADDRESS TIMEOUT_SECONDS

RANK 0 is the client, 1 the server. FOLDER belongs to this party: `stage.json` (the layers, known to both), `input.npz`
(the client's activations, or the server's weights), and at the client's, in the end, `answers.npz`. It says `ready` on
its standard output once both parties are linked, waits for `go` on its input, computes, and says `done`; all else that
it or its libraries say goes to its error output. `two_party.py` starts both and says what this hides from whom.

Shapes: B batch, C channels, H W picture, D features.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TextIO, final

import jax  # type: ignore[import-not-found, unused-ignore]
import jax.numpy as jnp  # type: ignore[import-not-found, unused-ignore]
import numpy as np
import spu  # type: ignore[import-not-found, unused-ignore]
import spu.libspu as libspu  # type: ignore[import-not-found, unused-ignore]
import spu.utils.frontend as frontend  # type: ignore[import-not-found, unused-ignore]

CLIENT: Final = 0
SERVER: Final = 1
# Cheetah in 64-bit rings, one thread a party; an input of one party alone stays with it (colocated).
CONFIG: Final = {
    "protocol": "CHEETAH",
    "field": "FM64",
    "fxp_fraction_bits": 18,
    "max_concurrency": 1,
    "experimental_enable_colocated_optimization": True,
}


def apply(layers: list[dict[str, Any]], z: Any, parameters: dict[str, Any]) -> Any:
    """The stage in jax: `z` (B, ...) through `layers`, with the parameters by name."""
    for layer in layers:
        z = _LAYERS[layer["kind"]](layer, z, parameters)
    return z


def shapes_of(layers: list[dict[str, Any]]) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by name, in the order of the program's inputs."""
    return {f"{layer['name']}.{key}": tuple(shape) for layer in layers for key, shape in layer["parameters"].items()}


@final
class Party:
    """One of the two: its link, its virtual machine, and the input that it alone may read."""

    def __init__(self, rank: int, own: str, other: str, timeout_seconds: float, transfers: str) -> None:
        description = libspu.link.Desc()
        description.recv_timeout_ms = int(1000 * timeout_seconds)
        for party in (CLIENT, SERVER):
            description.add_party(f"party{party}", own if party == rank else other)
        self.rank = rank
        self.link = libspu.link.create_brpc(description, rank)
        config = libspu.RuntimeConfig()
        if not config.ParseFromJsonString(json.dumps({**CONFIG, "cheetah_2pc_config": {"ot_kind": transfers}})):
            raise ValueError("this build of SPU does not know the configuration; expected spu 0.9.5")
        self.runtime = spu.Runtime(self.link, config)
        self._io = spu.Io(2, config)

    def share(self, name: str, values: np.ndarray | None) -> None:
        """Make shares of the client's `values`; one stays here, the other goes to the server, as it is in memory.

        `values` is None at the server, which only receives.
        """
        if values is None:
            own = self._receive()
        else:
            own, others = self._io.make_shares(values, libspu.Visibility.VIS_SECRET)
            self._send(others)
        self.runtime.set_var(name, own)

    def keep(self, name: str, values: np.ndarray | None, shape: tuple[int, ...]) -> None:
        """Hold the server's `values` as its private input: nothing of them crosses. None, at the client."""
        values = np.zeros(shape, np.float32) if values is None else values
        shares = self._io.make_shares(values, libspu.Visibility.VIS_SECRET, SERVER)
        if "Priv2k" not in shares[CLIENT].meta.decode("latin-1"):
            raise ValueError("this build of SPU does not keep an input private; expected spu 0.9.5")
        self.runtime.set_var(name, shares[self.rank])

    def reveal(self, name: str) -> np.ndarray | None:
        """The values in the clear, at the client; None at the server, which has sent its share."""
        own = self.runtime.get_var(name)
        if self.rank == SERVER:
            self._send(own)
            return None
        return np.asarray(self._io.reconstruct([own, self._receive()]))

    def agree(self, what: bytes) -> None:
        """Raise where the other party does not hold the same bytes, told by their digest."""
        digest = hashlib.sha256(what).hexdigest()
        self.link.send(1 - self.rank, digest)
        if bytes(self.link.recv(1 - self.rank)).decode() != digest:
            raise ValueError("the two parties would run different programs: their stages or their libraries differ")

    def _send(self, share: Any) -> None:
        self.link.send(1 - self.rank, share.meta)
        self.link.send(1 - self.rank, str(len(share.share_chunks)))
        for chunk in share.share_chunks:
            self.link.send(1 - self.rank, chunk)

    def _receive(self) -> Any:
        share = libspu.Share()
        share.meta = self.link.recv(1 - self.rank)
        chunks = int(self.link.recv(1 - self.rank))
        share.share_chunks = [self.link.recv(1 - self.rank) for _ in range(chunks)]
        return share


def compiled(function: Callable[..., Any], shapes: dict[str, tuple[int, ...]]) -> Any:
    """`function` of float32 inputs with these names and shapes, as a program for the virtual machine."""
    inputs = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes.values()]
    secret = [libspu.Visibility.VIS_SECRET] * len(inputs)
    names = list(shapes)
    program, _ = frontend.compile(frontend.Kind.JAX, function, inputs, {}, names, secret, lambda _: ["answers"])
    return program


def main(arguments: list[str], say: TextIO) -> None:
    """Play one party from beginning to end."""
    rank, folder = int(arguments[0]), Path(arguments[1])
    stage = json.loads((folder / "stage.json").read_text())
    with np.load(folder / "input.npz", allow_pickle=False) as file:
        mine = dict(file)
    layers, shapes = stage["layers"], shapes_of(stage["layers"])
    _check_input(rank, mine, {"z": tuple(stage["input_shape"])} if rank == CLIENT else shapes)

    def whole(z: Any, *parameters: Any) -> Any:
        return apply(layers, z, dict(zip(shapes, parameters, strict=True)))

    program = compiled(whole, {"z": tuple(stage["input_shape"]), **shapes})
    party = Party(rank, arguments[2], arguments[3], float(arguments[4]), stage["transfers"])
    party.agree(program.SerializeToString())
    _make_keys(party)
    print("ready", file=say, flush=True)
    if sys.stdin.readline().strip() != "go":
        raise ValueError("whoever started this party is gone")
    party.share("z", mine.get("z"))
    for name, shape in shapes.items():
        party.keep(name, mine.get(name), shape)
    party.runtime.run(program)
    answers = party.reveal("answers")
    if answers is not None:
        np.savez(folder / "answers.npz", answers=answers)
    print("done", file=say, flush=True)
    party.link.stop_link()


def _make_keys(party: Party) -> None:
    """Keys and base transfers are made as a link is first used: here, for two numbers of no worth."""

    def tiny(z: Any, weight: Any) -> Any:
        return jnp.maximum(jnp.maximum(z @ weight, 0) @ weight, 0)

    party.share("tiny z", np.ones((1, 2), np.float32) if party.rank == CLIENT else None)
    party.keep("tiny weight", np.ones((2, 2), np.float32) if party.rank == SERVER else None, (2, 2))
    party.runtime.run(compiled(tiny, {"tiny z": (1, 2), "tiny weight": (2, 2)}))
    party.agree(b"keys")  # so that nobody is ahead when the clock starts


def _check_input(rank: int, mine: dict[str, np.ndarray], expected: dict[str, tuple[int, ...]]) -> None:
    got = {name: values.shape for name, values in mine.items()}
    if got != expected or any(values.dtype != np.float32 for values in mine.values()):
        raise ValueError(f"party {rank}: its input holds {got}; expected float32 {expected}")


def _linear(layer: dict[str, Any], z_BD: Any, parameters: dict[str, Any]) -> Any:
    y_BD = z_BD @ parameters[f"{layer['name']}.weight"].T
    bias = parameters.get(f"{layer['name']}.bias")
    return y_BD if bias is None else y_BD + bias


def _conv2d(layer: dict[str, Any], z_BCHW: Any, parameters: dict[str, Any]) -> Any:
    z_BHWC = jnp.transpose(z_BCHW, (0, 2, 3, 1))  # the layout that SPU computes in
    weight_HWIO = jnp.transpose(parameters[f"{layer['name']}.weight"], (2, 3, 1, 0))
    padding = [(side, side) for side in layer["padding"]]
    y_BHWC = jax.lax.conv_general_dilated(
        z_BHWC, weight_HWIO, layer["stride"], padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    bias = parameters.get(f"{layer['name']}.bias")
    return jnp.transpose(y_BHWC if bias is None else y_BHWC + bias, (0, 3, 1, 2))


def _relu(layer: dict[str, Any], z: Any, parameters: dict[str, Any]) -> Any:  # noqa: ARG001
    return jnp.maximum(z, 0)


def _flatten(layer: dict[str, Any], z: Any, parameters: dict[str, Any]) -> Any:  # noqa: ARG001
    return z.reshape(z.shape[0], -1)


def _max_pool2d(layer: dict[str, Any], z_BCHW: Any, parameters: dict[str, Any]) -> Any:  # noqa: ARG001
    """The greatest of each window, as a tree of comparisons between shifted pictures."""
    return _halved(list(_shifted(layer, z_BCHW)), jnp.maximum)


def _avg_pool2d(layer: dict[str, Any], z_BCHW: Any, parameters: dict[str, Any]) -> Any:  # noqa: ARG001
    pictures = list(_shifted(layer, z_BCHW))
    return _halved(pictures, jnp.add) * (1 / len(pictures))


def _global_avg_pool2d(layer: dict[str, Any], z_BCHW: Any, parameters: dict[str, Any]) -> Any:  # noqa: ARG001
    return z_BCHW.sum(axis=(2, 3), keepdims=True) * (1 / (z_BCHW.shape[2] * z_BCHW.shape[3]))


def _shifted(layer: dict[str, Any], z_BCHW: Any) -> Iterator[Any]:
    """One picture for each place in the window."""
    (high, wide), (down, right) = layer["kernel_size"], layer["stride"]
    rows, columns = (z_BCHW.shape[2] - high) // down + 1, (z_BCHW.shape[3] - wide) // right + 1
    for y in range(high):
        for x in range(wide):
            yield z_BCHW[:, :, y : y + down * (rows - 1) + 1 : down, x : x + right * (columns - 1) + 1 : right]


def _halved(pictures: list[Any], join: Callable[[Any, Any], Any]) -> Any:
    while len(pictures) > 1:
        joined = [join(pictures[at], pictures[at + 1]) for at in range(0, len(pictures) - 1, 2)]
        pictures = joined + pictures[2 * len(joined) :]
    return pictures[0]


_LAYERS: Final[dict[str, Callable[[dict[str, Any], Any, dict[str, Any]], Any]]] = {
    "linear": _linear,
    "conv2d": _conv2d,
    "relu": _relu,
    "flatten": _flatten,
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d,
    "global_avg_pool2d": _global_avg_pool2d,
}


if __name__ == "__main__":
    parent = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is not an answer
    try:
        main(sys.argv[1:], parent)
    except Exception as error:  # whatever it is, the last line of the log says it
        print(f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}", file=sys.stderr)
        sys.exit(1)
