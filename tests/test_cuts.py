"""Cutting: the same bits on both sides of a cut, nothing lost, and a clear refusal where there is no cut."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from milkglass.cuts import Stages, check_stages, couples_records, cut, cut_costs, flops_per_sample, legal_cuts
from milkglass.errors import CutError
from milkglass.networks import cnn, mlp, resnet

torch.set_num_threads(1)


class Plain(nn.Module):
    """Layers and functions in turn, a skip inside `block`, and a dropout that must follow the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.block = Skip(4)
        self.scale = nn.Parameter(torch.rand(4, 1, 1))
        self.register_buffer("shift", torch.rand(4, 1, 1))
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(64, 8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h: Tensor = F.relu(self.conv(x))
        h = self.block(h) * self.scale + self.shift
        if mask is not None:
            h = h * mask
        h = self.dropout(F.max_pool2d(h, 2))
        h = torch.tanh(self.linear(h.flatten(1)))
        out: Tensor = self.classifier(h)
        return out


class Skip(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(F.relu(self.first(x)))
        return F.relu(h + x)


class Network(nn.Module):
    """Named layers and a function of them: a network per test, without a class per test."""

    def __init__(self, run: Callable[[Network, Tensor], object], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> object:
        return self.run(self, x)

    def call(self, name: str, x: Tensor) -> Tensor:
        return self.get_submodule(name)(x)  # type: ignore[no-any-return]


def linears(count: int) -> dict[str, nn.Module]:
    return {name: nn.Linear(4, 4) for name in "abcdef"[:count]}


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp((1, 8, 8), 3), (1, 8, 8)),
    "mlp on a table": (lambda: mlp((6,), 3, hidden=(5, 4)), (6,)),
    "cnn": (lambda: cnn((1, 8, 8), 3, width=8), (1, 8, 8)),
    "resnet": (lambda: resnet((2, 8, 8), 3, width=4), (2, 8, 8)),
    "traced": (Plain, (1, 8, 8)),
}
LEGAL = {
    "mlp": ["flatten", "hidden1", "hidden2"],
    "mlp on a table": ["flatten", "hidden1", "hidden2"],
    "cnn": ["block1", "block2", "hidden"],
    "resnet": ["stem", "block1", "block2", "block3", "pool"],
    "traced": ["conv", "block", "dropout", "linear"],
}
INNER = {  # layers inside the layers of a Sequential: legal cuts too, by the traced way
    "mlp": ["hidden1.0", "hidden2.1"],
    "mlp on a table": ["hidden1.0"],
    "cnn": ["block1.0", "block1.1", "block2.2", "hidden.0", "hidden.1"],
    "resnet": ["stem.0", "stem.2", "pool.0"],
    "traced": [],
}
CUTS = [(network, at) for network in NETWORKS for at in LEGAL[network] + INNER[network]]


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def whole_pass(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    torch.manual_seed(1)  # the dropout of `Plain`
    logits: Tensor = model(x)
    logits.square().sum().backward()  # type: ignore[no-untyped-call]
    return logits.detach(), gradients(model)


def split_pass(model: nn.Module, stages: Stages, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """As across a wire: the server has a leaf, the client gets nothing but its gradient."""
    model.zero_grad()
    torch.manual_seed(1)
    z_B: Tensor = stages.bottom(x)
    received_B = z_B.detach().requires_grad_()
    logits: Tensor = stages.top(received_B)
    logits.square().sum().backward()  # type: ignore[no-untyped-call]
    if z_B.requires_grad:
        torch.autograd.backward([z_B], [received_B.grad])
    return logits.detach(), gradients(model)


@pytest.mark.parametrize(("network", "at"), CUTS)
def test_same_bits_and_every_parameter_on_one_side(network: str, at: str) -> None:
    make, shape = NETWORKS[network]
    model, x = make(), torch.rand(5, *shape)
    stages = cut(model, at)
    expected, got = whole_pass(model, x), split_pass(model, stages, x)
    assert torch.equal(got[0], expected[0])
    assert len(got[1]) == len(expected[1]) == len(list(model.parameters()))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got[1], expected[1], strict=True))

    bottom, top = (dict(stage.state_dict(keep_vars=True)) for stage in stages)
    assert not bottom.keys() & top.keys()
    whole = model.state_dict(keep_vars=True)
    assert bottom.keys() | top.keys() == whole.keys()
    assert all({**bottom, **top}[name] is tensor for name, tensor in whole.items())


@pytest.mark.parametrize("network", NETWORKS)
def test_legal_cuts_in_order_of_execution(network: str) -> None:
    make, shape = NETWORKS[network]
    model = make()
    assert legal_cuts(model, torch.rand(2, *shape)) == LEGAL[network]
    assert all(layer.training for layer in model.modules())


def test_functions_after_the_layer_run_on_the_server() -> None:
    model, x = Plain(), torch.rand(2, 1, 8, 8)
    assert torch.equal(cut(model, "conv").bottom(x), model.conv(x))  # before F.relu
    skip = F.relu(model.conv(x))
    assert torch.equal(cut(model, "block").bottom(x), model.block(skip))  # with the skip inside, before `* scale`


def test_stages_follow_the_mode() -> None:
    model, x = Plain(), torch.rand(64, 1, 8, 8)
    stages = cut(model, "dropout")
    assert (stages.bottom(x) == 0).float().mean() > 0.4
    model.eval()
    assert (stages.bottom(x) == 0).float().mean() < 0.2
    stages.bottom.train()
    assert (stages.bottom(x) == 0).float().mean() > 0.4


def test_a_stage_can_be_cut_again() -> None:
    """U-shaped: client, server, client; also where the second cut is after a layer that was traced through."""
    for model, first, second in ((Plain(), "conv", "block"), (cnn((1, 8, 8), 3), "block1.2", "hidden")):
        x = torch.rand(2, 1, 8, 8)
        model.eval()
        bottom, rest = cut(model, first)
        middle, top = cut(rest, second)
        assert torch.equal(top(middle(bottom(x))), model(x))


def test_shared_activation_without_weights_is_fine() -> None:
    relu = nn.ReLU()
    model = Network(
        lambda m, x: m.call("c", m.call("relu", m.call("b", m.call("relu", m.call("a", x))))), **linears(3), relu=relu
    )
    x = torch.rand(2, 4)
    bottom, top = cut(model, "b")
    assert torch.equal(top(bottom(x)), model(x))
    with pytest.raises(CutError, match="'relu': it is called 2 times"):
        cut(model, "relu")


def test_hooks_on_the_model_still_run() -> None:
    model = nn.Sequential(OrderedDict(linears(3)))
    model.register_forward_hook(lambda _module, _args, output: output + 1)
    x = torch.rand(2, 4)
    bottom, top = cut(model, "a")
    assert torch.equal(top(bottom(x)), model(x))


def test_unknown_layer_lists_the_known_ones() -> None:
    with pytest.raises(CutError, match=r"'blok1': .* did you mean 'block1'\? known: block1, block2, hidden$"):
        cut(cnn((1, 8, 8), 3), "blok1")
    with pytest.raises(CutError, match=r"'dropot': it is not a layer of Plain; did you mean 'dropout'\? known: conv"):
        cut(Plain(), "dropot")
    with pytest.raises(CutError, match=r"'stem.9': it is not a layer .* did you mean 'stem.\d'\?"):
        cut(resnet((1, 8, 8), 3), "stem.9")
    with pytest.raises(CutError, match="'': it is not a layer"):
        cut(Plain(), "")


def test_last_layer() -> None:
    for model, legal in ((cnn((1, 8, 8), 3), "block1, block2, hidden"), (Plain(), "conv, block, dropout, linear")):
        with pytest.raises(
            CutError, match=f"is the last layer, nothing would be left for the server; legal .*: {legal}$"
        ):
            cut(model, "classifier")
    assert cut(cnn((1, 8, 8), 3), "hidden.2")  # the last inside the last layer but one


def test_plus_equals_is_a_new_value() -> None:
    """`h += 1` is traced as `h = h + 1`: nothing is written into the values that were sent."""

    def run(model: Network, x: Tensor) -> object:
        h = model.call("a", x)
        h += 1
        return model.call("b", h)

    model, x = Network(run, **linears(2)), torch.rand(3, 4)
    stages = cut(model, "a")
    assert all(map(torch.equal, split_pass(model, stages, x)[1], whole_pass(model, x)[1]))


def test_writes_into_buffers_are_refused_and_not_carried_out() -> None:
    model = Network(buffer_write, **linears(2), norm=nn.BatchNorm1d(4))
    mean = model.get_buffer("norm.running_mean")
    mean.fill_(1.0)
    with pytest.raises(CutError, match="'mul_' works in place and its result is not used"):
        cut(model, "a")
    assert torch.equal(mean, torch.ones(4))


def test_skip_across_the_cut_names_what_crosses_and_the_legal_cuts() -> None:
    with pytest.raises(CutError, match=r"after 'block.first': .*'relu'.* crosses .* legal cuts: conv, block, dropout"):
        cut(Plain(), "block.first")
    with pytest.raises(CutError, match="output of layer 'block1' crosses"):
        cut(resnet((1, 8, 8), 3), "block2.norm1")
    with pytest.raises(CutError, match="the input 'x_B' itself crosses"):
        cut(Network(lambda m, x: m.call("b", m.call("a", x) + x), **linears(2)), "a")
    with pytest.raises(CutError, match="the input 'x_B' itself crosses"):  # a size of the input is the input's too
        cut(Network(lambda m, x: m.call("b", m.call("a", x)).reshape(x.shape[0], -1), **linears(2)), "a")


def branches(model: Network, x: Tensor) -> object:
    return model.call("a", x) if x.sum() > 0 else model.call("b", x)


def without_gradient(model: Network, x: Tensor) -> object:
    with torch.no_grad():
        h = model.call("a", x)
    return model.call("b", h)


def unused_write(model: Network, x: Tensor) -> object:
    h = model.call("a", x)
    h.add_(1)
    return model.call("b", h)


def late_write(model: Network, x: Tensor) -> object:
    h = model.call("a", x)
    out = model.call("b", h)
    out.view(-1).add_(1)
    return out


def buffer_write(model: Network, x: Tensor) -> object:
    model.norm.running_mean.mul_(2)  # type: ignore[union-attr, operator]
    return model.call("b", model.call("a", x))


REFUSED: list[tuple[Callable[[Network, Tensor], object], str]] = [
    (branches, "cannot cut Network by tracing: symbolically traced .* control flow; write it as an nn.Sequential"),
    (without_gradient, "switches gradients or autocast on or off"),
    (unused_write, r"after 'a': what follows \(the value 'add_'\) works in place"),
    (late_write, "the value 'add_' works in place and its result is not used"),
    (
        lambda m, x: m.call("b", F.relu(m.call("a", x), inplace=True)),
        "after 'a': what follows .*'relu'.* works in place",
    ),
    (lambda m, x: (m.call("b", m.call("a", x)), x), "it must return one tensor, it returns a tuple"),
    (lambda m, x: m.call("b", F.dropout(m.call("a", x), 0.5, m.training)), "asks whether it is training"),
    (lambda m, x: m.call("b", m.call("a", x) + torch.randn(4)), "makes a constant tensor, which tracing would freeze"),
    (lambda m, x: m.call("b", m.call("a", m.call("a", x))), "'a': it is called 2 times"),
    (lambda m, x: m.call("b", x), "'a': it is never called by Network; known: b"),
]


@pytest.mark.parametrize(("run", "message"), REFUSED)
def test_refused(run: Callable[[Network, Tensor], object], message: str) -> None:
    model = Network(run, **linears(2))
    with pytest.raises(CutError, match=message) as refusal:
        cut(model, "a")
    assert "\n" not in str(refusal.value)
    assert model.training


def test_outputs_that_are_not_one_tensor() -> None:
    model = Network(lambda m, x: m.call("b", m.call("lstm", x)[0]), **linears(2), lstm=nn.LSTM(4, 4))
    for sequence in (model, nn.Sequential(OrderedDict(lstm=nn.LSTM(4, 4), head=nn.Linear(4, 2)))):
        with pytest.raises(CutError, match="'lstm': its output is not one tensor"):
            cut(sequence, "lstm")
    pair = Network(lambda m, x: (m.call("a", x), x), **linears(1))
    outer = Network(lambda m, x: m.call("b", m.call("pair", x)[0]), **linears(2), pair=pair)
    with pytest.raises(CutError, match="'pair': its output is not one tensor"):
        cut(outer, "pair")
    assert legal_cuts(outer, torch.rand(2, 4)) == ["pair.a"]


def test_in_place_activation_behind_the_cut() -> None:
    model = nn.Sequential(OrderedDict(a=nn.Linear(4, 4), relu=nn.ReLU(inplace=True), b=nn.Linear(4, 2)))
    with pytest.raises(CutError, match=r"'a': what follows \(relu\) works in place.* set inplace=False"):
        cut(model, "a")
    assert legal_cuts(model, torch.rand(2, 4)) == ["relu"]
    hidden = nn.Sequential(OrderedDict(flat=nn.Linear(4, 4), view=nn.Flatten(), relu=nn.ReLU(inplace=True)))
    assert "flat" not in legal_cuts(hidden, torch.rand(2, 4))  # through a view, found by running it


def test_legal_cuts_keep_the_records_apart_and_float() -> None:
    fold = Network(lambda m, x: m.call("b", m.call("fold", m.call("a", x))), **linears(2), fold=nn.Flatten(0, 1))
    assert legal_cuts(fold, torch.rand(3, 2, 4)) == ["a"]
    words = nn.Sequential(
        OrderedDict(keep=nn.Identity(), embed=nn.Embedding(9, 4), flat=nn.Flatten(), top=nn.Linear(8, 2))
    )
    assert legal_cuts(words, torch.ones(3, 2, dtype=torch.int64)) == ["embed", "flat"]


def test_legal_cuts_move_no_statistic_and_no_random_number() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    model[1].eval()
    x, state = torch.rand(3, 4), {name: value.clone() for name, value in model.state_dict().items()}
    before = torch.get_rng_state()
    assert legal_cuts(model, x) == ["0", "1", "2"]
    cut_costs(model, x)
    flops_per_sample(model, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [layer.training for layer in model] == [True, False, True, True]


def test_shared_weights_across_the_cut() -> None:
    layer = nn.Linear(4, 4)
    twice = nn.Sequential(OrderedDict(first=layer, middle=nn.ReLU(), again=layer, last=nn.Linear(4, 2)))
    with pytest.raises(
        CutError, match=r"client's 'first.weight' and the server's 'again.weight' are one tensor.*untie"
    ):
        cut(twice, "middle")
    with pytest.raises(CutError, match="'first': the same layer also runs as 'again'"):
        cut(twice, "first")
    assert legal_cuts(twice, torch.rand(2, 4)) == []

    tied = mlp((4,), 4, hidden=(4, 4))
    tied.get_parameter("classifier.weight").data = tied.get_parameter("hidden1.0.weight").data
    with pytest.raises(CutError, match=r"'hidden1.0.weight' and the server's 'classifier.weight'"):
        cut(tied, "hidden1")
    assert cut(tied, "flatten")

    both = Network(lambda m, x: m.call("b", m.call("a", x) + m.c.bias) * m.c.bias, **linears(3))  # type: ignore
    with pytest.raises(CutError, match=r"'c.bias' and the server's 'c.bias' are one tensor"):
        cut(both, "b")


def test_shared_buffers_in_stages_of_ones_own() -> None:
    first, second = nn.BatchNorm1d(4, affine=False), nn.BatchNorm1d(4, affine=False)
    second.running_mean = first.running_mean
    with pytest.raises(CutError, match="'running_mean' and the server's 'running_mean' are one tensor"):
        check_stages(first, second)


def test_cautions() -> None:
    bottom = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    cautions = check_stages(bottom, nn.Linear(4, 2))
    assert [caution.layer for caution in cautions] == ["1", "2"]
    assert "couples the records" in cautions[0].reason
    assert "nn.GroupNorm" in cautions[0].way_out
    assert "private generator" in cautions[1].reason
    assert check_stages(*cut(cnn((1, 8, 8), 3), "block2")) == []
    assert check_stages(nn.Linear(4, 2), bottom) == []  # BatchNorm and dropout at the server are its own affair

    raw = check_stages(*cut(mlp((4,), 3), "flatten"))
    assert [caution.reason for caution in raw] == ["it has no parameters: it only reshapes: the raw record crosses"]
    assert "if it only reshapes" in check_stages(nn.Sequential(nn.AvgPool2d(2)), nn.Linear(4, 2))[0].reason
    assert "learns nothing" in check_stages(nn.Linear(4, 2), nn.Softmax(1))[0].reason


def test_couples_records_finds_traced_batch_norm() -> None:
    norm, own = (
        nn.BatchNorm1d(4),
        Network(lambda m, x: F.batch_norm(m.call("a", x), None, None, training=True), **linears(1)),
    )
    model = Network(lambda m, x: m.call("b", m.call("own", m.call("norm", x))), **linears(2), norm=norm, own=own)
    assert couples_records(cut(model, "norm").bottom) == ["norm"]
    assert couples_records(cut(model, "own").bottom) == ["norm", "batch_norm"]
    assert couples_records(cut(model, "own").top) == []


def test_flops_by_hand() -> None:
    conv = nn.Conv2d(2, 5, 3, padding=1)  # 8 x 8 picture: 64 places, 5 channels, 2 x 9 products each
    linear = nn.Linear(320, 7)
    forward_conv, forward_linear = 2 * 64 * 5 * 18, 2 * 320 * 7
    model = nn.Sequential(OrderedDict(conv=conv, relu=nn.ReLU(), flat=nn.Flatten(), linear=linear, top=nn.Linear(7, 3)))
    costs = {cost.name: cost for cost in cut_costs(model, torch.rand(6, 2, 8, 8))}
    assert list(costs) == ["conv", "relu", "flat", "linear"]
    whole = forward_conv + forward_linear + 2 * 7 * 3
    assert [cost.client_flops for cost in costs.values()] == [forward_conv] * 3 + [forward_conv + forward_linear]
    assert costs["conv"].client_flops_share == pytest.approx(forward_conv / whole)
    assert costs["linear"].client_parameters == (2 * 9 * 5 + 5) + (320 * 7 + 7)
    assert costs["linear"].client_parameters_share == pytest.approx(2342 / (2342 + 24))
    assert costs["relu"].shape == (5, 8, 8)
    assert costs["relu"].bytes_per_record == 4 * 320
    assert costs["linear"].bytes_per_record == 4 * 7


def test_training_flops_by_hand() -> None:
    """Backward: one more product for the weights of each layer, and one for the input of every layer but the first."""
    bottom, x = nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 4)), torch.rand(3, 10)
    first, second = 2 * 10 * 6, 2 * 6 * 4
    assert flops_per_sample(bottom, x) == 2 * first + 3 * second
    assert all(parameter.grad is None for parameter in bottom.parameters())
    bottom[0].requires_grad_(False)
    assert flops_per_sample(bottom, x) == first + 2 * second
    assert flops_per_sample(nn.Flatten(), x) == 0


def test_costs_of_a_network_without_products() -> None:
    model = nn.Sequential(OrderedDict(pool=nn.AvgPool2d(2), flat=nn.Flatten()))
    (cost,) = cut_costs(model, torch.rand(2, 1, 4, 4))
    assert (cost.client_flops_share, cost.client_parameters_share) == (0.0, 0.0)


def test_a_graph_of_the_users_own() -> None:
    model = Plain().eval()
    traced, x = fx.GraphModule(model, fx.Tracer().trace(model, {"mask": None})), torch.rand(2, 1, 8, 8)
    bottom, top = cut(traced, "linear")
    assert torch.equal(top(bottom(x)), model(x))


def test_messages_are_one_clear_line() -> None:
    with pytest.raises(CutError) as refusal:
        cut(Plain(), "block.first")
    assert re.fullmatch(
        r"cannot cut after 'block.first': the value 'relu' crosses to the server's stage as well \(a skip "
        r"connection\?\); "
        r"legal cuts: conv, block, dropout, linear",
        str(refusal.value),
    )
