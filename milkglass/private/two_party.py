"""Split inference where neither side shows anything: the server's stage, computed by client and server on shares.

Cheetah (Huang, Lu, Hong and Ding 2022, eprint 2022/207), two parties, as SPU 0.9.5 implements it: a linear layer by
lattice-based encryption (the server's weights times an encrypted share), ReLU and max-pooling by oblivious transfers
(SoftSpoken, Roy 2022, eprint 2022/192, or the paper's silent ones, Ferret, Yang et al. 2020, eprint 2020/924), on
fixed-point numbers in a ring of 64 bits, 18 of them behind the point. Nobody deals out multiplication triples.

Each party is a process of its own, in an environment of its own (SPU needs a numpy and a jax that milkglass does not;
`two_party_environment.py` makes it), with a folder that only it reads: the client's activations in one, the server's
weights in the other. The client sends one of two random shares of its activations; the weights stay where they are, as
in the paper; the shares of the answer meet at the client. `two_party_run` starts both here, on one machine: a rehearsal
with the true processes, bytes and seconds, which needs both inputs. GUARANTEE says what holds between parties.

Differs from the paper: 64-bit rings where it has 41 bits, and SPU's protocol for truncation.

Shapes: B batch, D width of the cut (or C, H, W), K classes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor, nn

from milkglass.errors import CutError, DataError, LinkError, nearest
from milkglass.private.two_party_environment import find_environment
from milkglass.private.two_processes import party_folders, run_pair

__all__ = ["GUARANTEE", "TwoPartyRun", "describe", "find_environment", "two_party_run", "weights"]

GUARANTEE: Final = (
    "Two-party inference (Cheetah), against a party that follows the protocol and is curious: the server learns "
    "neither activations nor answers, only how many records there are; the client learns the answers and the layers' "
    "kinds and shapes, and of the weights what the answers tell (who asks enough may copy a model). Both rest on the "
    "hardness of lattice problems and of the codes behind oblivious transfers. Not covered: a party that deviates, "
    "which may learn more or make the answers wrong; training, in which activations went in the clear; the link, which "
    "is neither encrypted nor authenticated here and needs TLS between machines."
)

TRANSFERS: Final[Mapping[str, str]] = {"softspoken": "YACL_Softspoken", "ferret": "YACL_Ferret"}
_WORKER: Final = Path(__file__).with_name("two_party_worker.py")
_LARGEST: Final = 2.0**24  # products have 36 bits behind the point, and the ring 64 bits: beyond 2^27 numbers wrap
_NOTHING: Final = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_WHY_NOT: Final[Mapping[type[nn.Module], str]] = {
    nn.GroupNorm: "it divides by a square root of secret numbers",
    nn.LayerNorm: "it divides by a square root of secret numbers",
    nn.modules.batchnorm._BatchNorm: "it couples records in training; fold it into the layer before it",
}


@final
@dataclass(frozen=True)
class TwoPartyRun:
    """What the client learned, and what that cost both.

    answers_BK: the logits, as revealed to the client. Bytes of TCP's payload, all records together: `bytes_up` from
    client to server, `bytes_down` back, after set-up (linking, keys, base transfers: `setup_bytes`, both ways).
    `seconds` from the first share to the answers, `setup_seconds` before (also starting and compiling), both by the
    wall. Against the stage in the clear: `top1_equal` is the share of records with the same greatest logit (0..1,
    higher = closer) and `largest_logit_error` the largest difference of a logit (lower = closer).
    """

    answers_BK: Tensor
    records: int
    bytes_up: int
    bytes_down: int
    setup_bytes: int
    seconds: float
    setup_seconds: float
    top1_equal: float
    largest_logit_error: float


def two_party_run(
    stage: nn.Module,
    z_BD: Tensor,
    *,
    python: Path | None = None,
    transfers: str = "softspoken",
    timeout_seconds: float = 600.0,
) -> TwoPartyRun:
    """Run the server's `stage` (in evaluation mode) on activations `z_BD` (B, ...), as two processes.

    `python` is the interpreter of the environment (default: the one that `two_party_environment` made). `transfers` is
    the way to extend oblivious transfers: "softspoken" answers sooner, "ferret" sends less for many comparisons (it
    makes ten million at a time).

    Raises CutError for a layer that cannot be computed this way, DataError for numbers that are not finite or too large
    for fixed point, MissingExtraError without the environment, and LinkError where a party fails or is late.
    """
    layers = describe(stage)
    plain_BK = _in_the_clear(stage, z_BD)
    interpreter = find_environment() if python is None else _existing(python)
    if transfers not in TRANSFERS:
        raise DataError(f"two-party inference: no way {transfers!r} to transfer; {nearest(transfers, TRANSFERS)}")
    described = {"layers": layers, "input_shape": list(z_BD.shape), "transfers": TRANSFERS[transfers]}
    description = json.dumps(described)
    with party_folders() as folders:
        for folder, arrays in zip(folders, ({"z": _float32(z_BD)}, weights(stage)), strict=True):
            (folder / "stage.json").write_text(description)
            (folder / "input.npz").write_bytes(_npz(arrays))

        def command(rank: int, own: str, other: str) -> list[str]:
            worker = [str(interpreter), "-I", str(_WORKER), str(rank), str(folders[rank])]
            return [*worker, own, other, str(timeout_seconds)]

        pair = run_pair(command, folders, timeout_seconds=timeout_seconds)
        answers_BK = _answers(folders[0] / "answers.npz", plain_BK)
    return TwoPartyRun(
        answers_BK=answers_BK,
        records=len(z_BD),
        bytes_up=pair.bytes_up,
        bytes_down=pair.bytes_down,
        setup_bytes=pair.setup_bytes,
        seconds=pair.seconds,
        setup_seconds=pair.setup_seconds,
        top1_equal=float((answers_BK.argmax(1) == plain_BK.argmax(1)).double().mean()),
        largest_logit_error=float((answers_BK - plain_BK).abs().max()),
    )


def describe(stage: nn.Module) -> list[dict[str, Any]]:
    """The layers of `stage`, in order, as both parties may know them: kind, name, settings, shapes; no weight.

    Raises CutError for the first layer that cannot be computed on shares, with the reason and the way out.
    """
    described = []
    for name, layer in _layers("", stage):
        told = _described(name, layer)
        if told is not None:
            shapes = {key: list(value.shape) for key, value in layer.named_parameters()}
            described.append({**told, "name": name, "parameters": shapes})
    return described


def weights(stage: nn.Module) -> dict[str, np.ndarray[Any, Any]]:
    """What the server alone reads: every parameter of the described layers by its dotted name, float32."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    for name, layer in _layers("", stage):
        found.update({f"{name}.{key}": _float32(value) for key, value in layer.named_parameters()})
    return found


def _layers(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer that is no sequence of layers, in order of execution."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        _refuse_hooks(name, module)
        for (
            child_name,
            child,
        ) in module._modules.items():  # named_children() would leave out a layer that is there twice
            if child is not None:
                yield from _layers(f"{name}.{child_name}" if name else child_name, child)
    else:
        yield name or "stage", module


def _described(name: str, layer: nn.Module) -> dict[str, Any] | None:
    """None for a layer that does nothing in evaluation mode."""
    _refuse_hooks(name, layer)
    if type(layer) in _NOTHING:
        return None
    if type(layer) is nn.Linear:
        return {"kind": "linear"}
    if type(layer) is nn.ReLU:
        return {"kind": "relu"}
    if type(layer) is nn.Flatten:
        _refuse(name, layer, layer.start_dim == 1 and layer.end_dim == -1, "it must flatten all but the batch")
        return {"kind": "flatten"}
    if type(layer) is nn.Conv2d:
        simple = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
        _refuse(
            name,
            layer,
            simple and not isinstance(layer.padding, str),
            "one group, no dilation, and padding by zeros in numbers",
        )
        return {"kind": "conv2d", "stride": list(layer.stride), "padding": [int(side) for side in layer.padding]}
    if type(layer) is nn.AdaptiveAvgPool2d:
        _refuse(name, layer, layer.output_size in (1, (1, 1)), "only the mean of the whole picture (size 1) is offered")
        return {"kind": "global_avg_pool2d"}
    if type(layer) in (nn.MaxPool2d, nn.AvgPool2d):
        return _pooling(name, layer)
    reason = next((words for kind, words in _WHY_NOT.items() if isinstance(layer, kind)), "it is not among them")
    raise _refusal(name, layer, reason)


def _pooling(name: str, layer: nn.Module) -> dict[str, Any]:
    plain = (
        _two(layer.padding) == [0, 0]
        and not layer.ceil_mode
        and _two(getattr(layer, "dilation", 1)) == [1, 1]
        and getattr(layer, "divisor_override", None) is None
        and not getattr(layer, "return_indices", False)
    )
    _refuse(name, layer, plain, "only pooling without padding, dilation, ceil_mode, divisor_override and indices")
    kind = "max_pool2d" if isinstance(layer, nn.MaxPool2d) else "avg_pool2d"
    return {"kind": kind, "kernel_size": _two(layer.kernel_size), "stride": _two(layer.stride)}


def _two(value: Any) -> list[int]:
    return [int(side) for side in (value if isinstance(value, tuple | list) else (value, value))]


def _refuse(name: str, layer: nn.Module, fits: bool, reason: str) -> None:
    if not fits:
        raise _refusal(name, layer, reason)


def _refuse_hooks(name: str, layer: nn.Module) -> None:
    if layer._forward_hooks or layer._forward_pre_hooks:
        raise _refusal(name, layer, "a hook is at work there, which shares would pass by")


def _refusal(name: str, layer: nn.Module, reason: str) -> CutError:
    return CutError(
        f"two-party inference cannot compute layer {name!r} ({type(layer).__name__}): {reason}; it knows sequences of "
        f"Linear, Conv2d, ReLU, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d(1), Flatten, Dropout, Identity: cut after "
        f"{name!r}, so that the client runs it, or build the stage of these"
    )


def _in_the_clear(stage: nn.Module, z_BD: Tensor) -> Tensor:
    """The logits of the stage itself. Raises DataError where a number on the way would not fit into fixed point."""
    if not len(z_BD):
        raise DataError("two-party inference: no records; expected a batch of at least one")
    modes = {module: module.training for module in stage.modules()}
    stage.eval()
    try:
        with torch.no_grad():
            value = z_BD.detach().float()
            _refuse_range("the activations", value)
            for name, layer in _layers("", stage):
                for key, parameter in layer.named_parameters():
                    _refuse_range(f"the weights {name}.{key}", parameter)
                value = layer(value)
                _refuse_range(f"what layer {name!r} gives", value)
    except RuntimeError as error:
        words = str(error).splitlines()[0]
        raise DataError(f"two-party inference: activations of shape {tuple(z_BD.shape)} do not fit: {words}") from None
    finally:
        for module, mode in modes.items():
            module.training = mode
    if value.ndim != 2:
        raise CutError(f"two-party inference: the stage gives shape {tuple(value.shape)}; expected logits (B, K)")
    return value


def _refuse_range(what: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()) or bool((values.abs() > _LARGEST).any()):
        raise DataError(
            f"two-party inference: {what} hold numbers that are not finite or beyond {_LARGEST:g}, the range of fixed "
            f"point; scale them down"
        )


def _existing(python: Path) -> Path:
    if not python.is_file():
        raise LinkError(f"two-party inference: no interpreter at {python}; expected the python of an SPU environment")
    return python


def _float32(values: Tensor) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(values.detach().cpu().float().numpy())


def _npz(arrays: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **dict(arrays))  # type: ignore[arg-type]
    return buffer.getvalue()


def _answers(file: Path, plain_BK: Tensor) -> Tensor:
    """What the client's process has written. Raises LinkError where it is not the logits of these records."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            answers_BK = torch.from_numpy(arrays["answers"].astype(np.float32))
    except (OSError, ValueError, KeyError) as error:
        raise LinkError(f"two parties: the client left no answers that can be read: {error}") from None
    if answers_BK.shape != plain_BK.shape:
        got, expected = tuple(answers_BK.shape), tuple(plain_BK.shape)
        raise LinkError(f"two parties: the client's answers have shape {got}; expected {expected}")
    return answers_BK
