"""Where a network can be cut in two, the two stages, and what each cut costs the client.

A cut is legal where *one* tensor carries everything from the client's stage to the server's. For an `nn.Sequential`
that is after any of its layers but the last. Any other module is traced with `torch.fx`, and its graph parted: the
client's stage is what the cut tensor follows from, the server's stage the rest.

There (in `tracing.py`, which says what torch already has for this) a second value that crosses is an error. The stages
hold the model's own parameters, not copies, under their own names, so each party's weights load back into the whole.

Shapes: B batch, ... whatever the layer gives; `x_B` a batch of records, `z_B` activations at the cut.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, NamedTuple, final

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from milkglass.errors import CutError, first_line, nearest
from milkglass.tracing import TUPLES, in_mode, last_layer, legal_names, not_a_tensor, overwritten, split, trace

BYTES_PER_FLOAT: Final = 4
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_DROPOUT = nn.modules.dropout._DropoutNd
_RESHAPING = (nn.Flatten, nn.Unflatten, nn.Identity)


class Stages(NamedTuple):
    """The client's stage and the server's; `top(bottom(x))` has the bits of `model(x)`."""

    bottom: nn.Module
    top: nn.Module


@final
@dataclass(frozen=True)
class Caution:
    """Something about a stage that is allowed, and that its owner should know."""

    layer: str
    reason: str
    way_out: str


@final
@dataclass(frozen=True)
class CutCost:
    """What a cut after layer `name` asks of the client, per record. Shares are of the whole network, 0 to 1.

    FLOPs are of the forward pass and count matrix products and convolutions only (two per multiply-add); so a stage of
    pooling, norms and activations shows none. `shape` is without the batch; bytes are float32, client to server only.
    """

    name: str
    shape: tuple[int, ...]
    client_flops: int
    client_flops_share: float
    client_parameters: int
    client_parameters_share: float
    bytes_per_record: int


def cut(model: nn.Module, at: str) -> Stages:
    """Cut `model` after the layer named `at` (dotted for inner layers): the client's stage ends with that layer.

    Function calls that follow a layer (`F.relu(self.conv(x))`) belong to the server. Both stages hold the model's own
    parameters and run in the model's mode (`train`, `eval`). A stage may be cut again, for three parties' stages.

    Raises CutError where more than one tensor would cross (naming it, and the legal cuts), for an unknown layer, the
    last layer, a layer called twice, shared weights on both sides, and a network that cannot be traced.
    """
    children = _children(model)
    if at in children:
        stages = _cut_sequence(children, at)
    elif children and at.partition(".")[0] not in children:
        raise CutError(f"cannot cut after {at!r}: it is not a layer of the network; {nearest(at, list(children)[:-1])}")
    else:
        stages = Stages(*split(trace(model), at))
    _refuse_shared(*stages)
    return stages


def legal_cuts(model: nn.Module, example_x: Tensor) -> list[str]:
    """The names of the layers after which `model` can be cut, in order of execution.

    `example_x` (B, ...) is a batch of records: a cut is listed if its output is one float tensor with one row per
    record. Of an `nn.Sequential` its own layers are listed (`cut` takes those inside them too); of other modules all,
    and of several with the same output the outermost.
    """
    return [name for name, _, _ in _working_cuts(model, example_x)]


def cut_costs(model: nn.Module, example_x: Tensor) -> list[CutCost]:
    """What each legal cut costs the client; `example_x` (B, ...), of which one record is used."""
    x_1 = example_x[:1]
    whole_flops, whole_parameters = forward_flops(model, x_1), _parameters(model)
    costs = []
    for name, bottom, z_1 in _working_cuts(model, x_1):
        flops, parameters = forward_flops(bottom, x_1), _parameters(bottom)
        shape = tuple(z_1.shape[1:])
        costs.append(
            CutCost(
                name=name,
                shape=shape,
                client_flops=flops,
                client_flops_share=flops / whole_flops if whole_flops else 0.0,
                client_parameters=parameters,
                client_parameters_share=parameters / whole_parameters if whole_parameters else 0.0,
                bytes_per_record=BYTES_PER_FLOAT * math.prod(shape),
            )
        )
    return costs


def flops_per_sample(stage: nn.Module, example_x: Tensor) -> int:
    """FLOPs of training `stage` on one record, forward and backward to its weights (not to the record).

    Counts matrix products and convolutions only. `example_x` is (B, ...), of which one record is used.
    """
    weights = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    with _at_rest(stage), torch.enable_grad(), FlopCounterMode(display=False) as counter:
        z_1: Tensor = stage(example_x[:1])
        if weights and z_1.requires_grad:
            torch.autograd.grad(z_1, weights, torch.ones_like(z_1), allow_unused=True)
    return int(counter.get_total_flops())


def check_stages(bottom: nn.Module, top: nn.Module) -> list[Caution]:
    """Refuse two stages that share weights (CutError), and tell what their owners should know.

    `cut` refuses shared weights itself; call this for stages of your own, and for the cautions.
    """
    _refuse_shared(bottom, top)
    cautions = [
        Caution(
            name,
            "BatchNorm in the client's stage couples the records of a batch: each activation also tells of the others",
            "fine for plain training; micro-batches, certificates and differential privacy refuse it: use nn.GroupNorm",
        )
        for name in couples_records(bottom)
    ]
    cautions += [
        Caution(
            name,
            "dropout in the client's stage draws from the client's own private generator, not from the public seed",
            "nothing to do; two releases of one record differ only in training mode",
        )
        for name, layer in bottom.named_modules()
        if isinstance(layer, _DROPOUT)
    ]
    if next(bottom.parameters(), None) is None:
        leaves = [layer for layer in bottom.modules() if not isinstance(layer, nn.Sequential)]
        raw = (
            "it only reshapes: the raw record crosses"
            if all(isinstance(leaf, _RESHAPING) for leaf in leaves)
            else "nothing is learned there, and if it only reshapes, the raw record crosses"
        )
        cautions.append(Caution("(client's stage)", f"it has no parameters: {raw}", "cut after a later layer"))
    if next(top.parameters(), None) is None:
        cautions.append(Caution("(server's stage)", "it has no parameters: it learns nothing", "cut earlier"))
    return cautions


def couples_records(stage: nn.Module) -> list[str]:
    """The names of the layers that mix the records of a batch (BatchNorm of any kind), in order of definition.

    Empty = each record's activation follows from that record alone, as far as the layers tell.
    """
    layers = [name for name, layer in stage.named_modules() if isinstance(layer, _BATCH_NORM)]
    if isinstance(stage, fx.GraphModule):
        layers += [node.name for node in stage.graph.nodes if node.target in (F.batch_norm, torch.batch_norm)]
    return layers


def _children(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a plain `nn.Sequential`, by name; nothing for any other module, or where a hook is at work."""
    hooks = model._forward_hooks or model._forward_pre_hooks or model._backward_hooks or model._backward_pre_hooks
    if isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward and not hooks:
        return dict(model._modules)  # named_children() would leave out a layer that is there twice
    return {}


def _cut_sequence(children: dict[str, nn.Module], at: str) -> Stages:
    names = list(children)
    after = names.index(at) + 1
    if after == len(names):
        raise last_layer(at, names[:-1])
    twice = [name for name in names if name != at and children[name] is children[at]]
    if twice:
        raise CutError(f"cannot cut after {at!r}: the same layer also runs as {twice[0]!r}; cut elsewhere or copy it")
    if isinstance(children[at], TUPLES):
        raise not_a_tensor(at)
    first = children[names[after]]
    while isinstance(first, nn.Sequential) and len(first):
        first = first[0]
    if getattr(first, "inplace", False):
        raise overwritten(at, names[after])
    bottom = nn.Sequential(OrderedDict((name, children[name]) for name in names[:after]))
    top = nn.Sequential(OrderedDict((name, children[name]) for name in names[after:]))
    return Stages(bottom, top)


def _working_cuts(model: nn.Module, example_x: Tensor) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Name, client's stage and its output for `example_x`, for each cut that stands the test of running it."""
    children = _children(model)
    traced = None if children else trace(model)
    for name in list(children)[:-1] if traced is None else legal_names(traced):
        try:
            bottom, top = _cut_sequence(children, name) if traced is None else split(traced, name)
            _refuse_shared(bottom, top)
        except CutError:
            continue
        try:
            with _at_rest(bottom), _at_rest(top), torch.no_grad():
                z_B: object = bottom(example_x)
                if not (isinstance(z_B, Tensor) and z_B.is_floating_point() and z_B.ndim > 1):
                    continue
                version = z_B._version
                top(z_B)
        except Exception as error:  # anything at all can go wrong in a user's network
            words = first_line(error)
            shape = tuple(example_x.shape)
            raise CutError(f"cut after {name!r}, the network fails on records of shape {shape}: {words}") from error
        if len(z_B) == len(example_x) and z_B._version == version:  # one row per record, and nobody writes into it
            yield name, bottom, z_B


def _refuse_shared(bottom: nn.Module, top: nn.Module) -> None:
    names = {_storage(tensor): name for name, tensor in _state(bottom)}
    for name, tensor in _state(top):
        if _storage(tensor) in names:
            raise CutError(
                f"the client's {names[_storage(tensor)]!r} and the server's {name!r} are one tensor: shared "
                f"weights cannot train on two machines; untie them (give each layer its own), or cut "
                f"elsewhere"
            )


def _state(stage: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from stage.named_parameters()
    yield from stage.named_buffers()


def _storage(tensor: Tensor) -> object:
    """Equal for two names of one tensor, also where only the data were tied (`a.data = b.data`)."""
    return tensor.data_ptr() or id(tensor)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def forward_flops(module: nn.Module, x_1: Tensor) -> int:
    """FLOPs of one forward pass of one record, `x_1` (1, ...): matrix products and convolutions only."""
    with _at_rest(module), torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(x_1)
    return int(counter.get_total_flops())


def _at_rest(module: nn.Module) -> AbstractContextManager[None]:
    """Inside, evaluation mode: looking at a network moves none of its statistics and draws no random numbers."""
    return in_mode(module, training=False)
