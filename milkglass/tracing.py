"""Parting a traced network at one value: the part of `cuts.py` that works on `torch.fx` graphs.

torch has two tools near this. `torch.distributed.pipelining` parts a network by `torch.export`, which fixes example
shapes and passes on whatever crosses, so a skip connection or the raw input would reach the server unnoticed; and
`torch.fx.passes.split_module`, on which it stands, renames the layers and turns weights that the model owns itself into
inputs. Here a second value that crosses is an error, and layers and weights keep their names.

What tracing would silently change is refused: answers to "am I training?", random numbers and constants made in
`forward`, gradients or autocast switched there, and writes in place whose result is not used. torch.fx reads `x += y`
as `x = x + y`, which differs only for a network that uses the old `x` under another name and counts on its change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor, fx, nn

from milkglass.errors import CutError, first_line, nearest

WAY_OUT: Final = "write it as an nn.Sequential of named layers, or pass your own two stages"
TUPLES: Final = (nn.RNNBase, nn.MultiheadAttention)
"""torch's own layers whose output is not one tensor."""

_RETURNED_BY: Final = "milkglass_returned_by"  # in a node's meta: the layers whose output this value is
_PREFIX: Final = "model."


@final
class _Tracer(fx.Tracer):
    """torch.fx's tracer, that also notes which layer returned which value and refuses what tracing would lose."""

    def __init__(self) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True  # else a write to a buffer would happen now, once, and never again
        self.not_one_tensor: set[str] = set()
        self._surroundings = _surroundings()

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        output = super().call_module(m, forward, args, kwargs)
        path = self.path_of_module(m)
        if not path.startswith(_PREFIX):  # the whole model
            return output
        name = path.removeprefix(_PREFIX)
        if isinstance(output, fx.Proxy) and not isinstance(m, TUPLES):
            output.node.meta.setdefault(_RETURNED_BY, []).append(name)
        else:
            self.not_one_tensor.add(name)
        return output

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _surroundings() != self._surroundings:
            raise CutError("its forward switches gradients or autocast on or off, which tracing would lose")
        return super().create_node(*args, **kwargs)


class _OneInput(nn.Module):
    """Calls the model with the records alone, so that optional arguments keep their defaults and hooks run."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_B: Tensor) -> object:
        return self.model(x_B)


class Traced(NamedTuple):
    """A model's graph; `outputs`: the values that each layer returned, in order of execution."""

    model: nn.Module
    graph: fx.Graph
    outputs: dict[str, list[fx.Node]]
    not_one_tensor: set[str]


def trace(model: nn.Module) -> Traced:
    """The graph of `model` for one batch of records; CutError where tracing would not keep what it does."""
    if isinstance(model, fx.GraphModule):  # a stage, or traced by the user: its own graph is the best account of it
        graph, not_one_tensor = model.graph, set[str]()
    else:
        graph, not_one_tensor = _trace_in_mode(model, training=True)
        if _signature(graph) != _signature(_trace_in_mode(model, training=False)[0]):
            raise CutError(
                f"cannot cut {type(model).__name__}: its forward itself asks whether it is training (or draws "
                f"random numbers), and tracing would freeze the answer; put that into a layer such as "
                f"nn.Dropout, {WAY_OUT}"
            )
    outputs: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        own_name = [str(node.target)] if node.op == "call_module" else []
        for name in node.meta.get(_RETURNED_BY, own_name):
            outputs.setdefault(name, []).append(node)
    return Traced(model, graph, outputs, not_one_tensor)


def _trace_in_mode(model: nn.Module, training: bool) -> tuple[fx.Graph, set[str]]:
    what = f"cannot cut {type(model).__name__} by tracing"
    tracer = _Tracer()
    with in_mode(model, training):
        try:
            graph = tracer.trace(_OneInput(model))
        except Exception as error:  # the model's own code runs on stand-ins here: anything can go wrong
            reason = first_line(error)
            raise CutError(f"{what}: {reason}; {WAY_OUT}") from error
    for node in graph.nodes:
        if node.op == "get_attr" and not str(node.target).startswith(_PREFIX):
            raise CutError(
                f"{what}: its forward makes a constant tensor, which tracing would freeze; register it "
                f"as a buffer, or {WAY_OUT}"
            )
        if node.op in ("get_attr", "call_module"):
            node.target = str(node.target).removeprefix(_PREFIX)
    return graph, tracer.not_one_tensor


def _signature(graph: fx.Graph) -> list[tuple[object, ...]]:
    return [(node.op, node.target, str(node.args), str(node.kwargs)) for node in graph.nodes]


def split(traced: Traced, at: str) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The client's stage, which ends with layer `at`, and the server's; CutError where there is no such cut."""
    node = _cut_node(traced, at)
    bottom_nodes = _ancestors(node)
    top_nodes = _ancestors(traced.graph.output_node()) - bottom_nodes
    crossing = _crossing(traced.graph, node)
    if crossing is not None:
        legal = ", ".join(legal_names(traced)) or "none"
        raise CutError(
            f"cannot cut after {at!r}: {_describe(crossing)} crosses to the server's stage as well "
            f"(a skip connection?); legal cuts: {legal}"
        )
    writer = _writer(traced.model, node)
    if writer is not None:
        raise overwritten(at, _describe(writer))
    kept = bottom_nodes | top_nodes
    for other in traced.graph.nodes:
        if other not in kept and _in_place(traced.model, other):
            raise CutError(
                f"cannot cut {type(traced.model).__name__}: {_describe(other)} works in place and its result "
                f"is not used; assign it (x = x.add(1)), or {WAY_OUT}"
            )
    bottom = _stage(traced, bottom_nodes, "ClientStage", cut_node=node, starts_here=False)
    top = _stage(traced, top_nodes, "ServerStage", cut_node=node, starts_here=True)
    return bottom, top


def _cut_node(traced: Traced, at: str) -> fx.Node:
    """The value that the layer `at` returns."""
    returned = traced.outputs.get(at, [])
    if at in traced.not_one_tensor:
        raise not_a_tensor(at)
    if len(returned) > 1:
        raise CutError(
            f"cannot cut after {at!r}: it is called {len(returned)} times; cut elsewhere, or give each call "
            f"a layer of its own"
        )
    if not returned:
        layers = dict(traced.model.named_modules())
        problem = "is never called by" if at and at in layers else "is not a layer of"
        raise CutError(
            f"cannot cut after {at!r}: it {problem} {type(traced.model).__name__}; {nearest(at, traced.outputs)}"
        )
    result = traced.graph.output_node().args[0]
    if not isinstance(result, fx.Node):
        raise CutError(
            f"cannot cut {type(traced.model).__name__}: it must return one tensor, it returns a "
            f"{type(result).__name__}; {WAY_OUT}"
        )
    if returned[0] is result:
        raise last_layer(at, legal_names(traced))
    return returned[0]


def _crossing(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """A second value, beside `node`, that follows from the records before the cut and is needed after it."""
    before = _ancestors(node)
    after = _ancestors(graph.output_node()) - before
    source: fx.Node
    for source in graph.nodes:
        weight = source.op == "get_attr"  # a weight on both sides is refused by its own name, in cuts.check_stages
        if source in before and source is not node and not weight and any(user in after for user in source.users):
            return source
    return None


def _writer(model: nn.Module, node: fx.Node) -> fx.Node | None:
    """The first use of the cut value that would write into it."""
    return next((user for user in node.users if _in_place(model, user)), None)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, to_visit = set[fx.Node](), [node]
    while to_visit:
        current = to_visit.pop()
        if current not in found:
            found.add(current)
            to_visit += current.all_input_nodes
    return found


def _stage(traced: Traced, nodes: set[fx.Node], name: str, cut_node: fx.Node, starts_here: bool) -> fx.GraphModule:
    """The module that runs `nodes`: up to the cut value, or from it on."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    if starts_here:
        copies[cut_node] = graph.placeholder("z_B")
    for node in traced.graph.nodes:
        weight_of_both = starts_here and node.op == "get_attr" and any(user in nodes for user in node.users)
        if node in nodes or weight_of_both:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    if not starts_here:
        graph.output(copies[cut_node])
    return fx.GraphModule(traced.model, graph, name)


def legal_names(traced: Traced) -> list[str]:
    """The layers after which the graph can be cut, in order of execution; of several with one output the outermost."""
    result = traced.graph.output_node().args[0]
    names: dict[fx.Node, str] = {}
    for name, returned in traced.outputs.items():
        node = returned[0]
        if len(returned) > 1 or node is result or name in traced.not_one_tensor:
            continue
        if _crossing(traced.graph, node) is not None or _writer(traced.model, node) is not None:
            continue
        if node not in names or name.count(".") < names[node].count("."):
            names[node] = name
    return [names[node] for node in traced.graph.nodes if node in names]


def _in_place(model: nn.Module, node: fx.Node) -> bool:
    """Whether this node may write into its input."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    writes = name.endswith("_") and not name.endswith("__")
    return node.op in ("call_method", "call_function") and (writes or bool(node.kwargs.get("inplace")))


def _describe(node: fx.Node) -> str:
    """A value in the words of the person who wrote the network."""
    if node.op == "placeholder":
        return f"the input {node.target!r} itself"
    names = node.meta.get(_RETURNED_BY, [])
    if names or node.op == "call_module":
        return f"the output of layer {(names[-1] if names else str(node.target))!r}"
    stack = list(node.meta.get("nn_module_stack", {}))
    where = stack[-1].removeprefix("model").removeprefix(".") if stack else ""
    return f"the value {node.name!r}" + (f" (in layer {where!r})" if where else "")


def last_layer(at: str, legal: list[str]) -> CutError:
    return CutError(
        f"cannot cut after {at!r}: it is the last layer, nothing would be left for the server; legal cuts: "
        f"{', '.join(legal) or 'none'}"
    )


def not_a_tensor(at: str) -> CutError:
    return CutError(f"cannot cut after {at!r}: its output is not one tensor; wrap it so that it returns one, {WAY_OUT}")


def overwritten(at: str, by: str) -> CutError:
    return CutError(
        f"cannot cut after {at!r}: what follows ({by}) works in place, on the very values sent; set inplace=False "
        f"there, or cut after it"
    )


def _surroundings() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Inside, every layer is in that mode; afterwards each is in its own again."""
    modes = {layer: layer.training for layer in module.modules()}
    module.train(training)
    try:
        yield
    finally:
        for layer, mode in modes.items():
            layer.training = mode
