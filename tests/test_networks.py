"""The reference networks: shapes, names, reproducible weights, and clear refusals."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from milkglass.errors import RecipeError
from milkglass.networks import ResidualBlock, build, cnn, mlp, resnet
from milkglass.randomness import public_source

torch.set_num_threads(1)

PICTURES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 9, 13), (1, 4, 4)]


def generator(seed: int = 0) -> torch.Generator:
    return public_source(seed).generator("weights")


@pytest.mark.parametrize("shape", PICTURES)
@pytest.mark.parametrize("network", [mlp, cnn, resnet])
def test_pictures_give_logits(network: Callable[..., nn.Sequential], shape: tuple[int, ...]) -> None:
    assert network(shape, 7)(torch.rand(3, *shape)).shape == (3, 7)


def test_tables_give_logits() -> None:
    assert mlp((14,), 2)(torch.rand(3, 14)).shape == (3, 2)


def test_layer_names() -> None:
    assert list(mlp((5,), 2, hidden=[4, 3, 2])._modules) == ["flatten", "hidden1", "hidden2", "hidden3", "classifier"]
    assert list(mlp((5,), 2, hidden=())._modules) == ["flatten", "classifier"]
    assert list(cnn((1, 8, 8), 2)._modules) == ["block1", "block2", "hidden", "classifier"]
    assert list(resnet((1, 8, 8), 2)._modules) == ["stem", "block1", "block2", "block3", "pool", "classifier"]


def test_cnn_width_at_the_usual_cut() -> None:
    assert cnn((1, 28, 28), 10)[:2](torch.rand(2, 1, 28, 28)).shape == (2, 32, 7, 7)


@pytest.mark.parametrize("depth", [8, 14, 20])
def test_resnet_depth_counts_weighted_layers(depth: int) -> None:
    """He et al. count the convolutions of stem and blocks and the classifier, not the shortcuts."""
    layers = [
        name
        for name, layer in resnet((3, 32, 32), 10, depth=depth).named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and "shortcut" not in name
    ]
    assert len(layers) == depth


def test_resnet_parameters_by_hand() -> None:
    """Depth 8, width 16: 3 x 3 convolutions, two 1 x 1 shortcuts, scale and shift of each norm, classifier."""
    convolutions = 9 * (3 * 16 + 16 * 16 + 16 * 16 + 16 * 32 + 32 * 32 + 32 * 64 + 64 * 64)
    shortcuts = 16 * 32 + 32 * 64
    norms = 2 * (3 * 16 + 3 * 32 + 3 * 64)
    classifier = 64 * 10 + 10
    model = resnet((3, 32, 32), 10)
    assert sum(p.numel() for p in model.parameters()) == convolutions + shortcuts + norms + classifier


def test_residual_block_is_shortcut_plus_branch() -> None:
    block = ResidualBlock(4, 4, stride=1)
    with torch.no_grad():
        block.norm2.weight.zero_()  # the branch is then zero: only relu(x) is left
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(block(x), x.relu())


@pytest.mark.parametrize("network", [mlp, cnn, resnet])
def test_each_record_stands_alone(network: Callable[..., nn.Sequential]) -> None:
    model, x = network((1, 8, 8), 3).double(), torch.rand(4, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spec", ["mlp", "cnn", "resnet"])
def test_weights_follow_from_the_generator_alone(spec: str) -> None:
    before = torch.get_rng_state()
    first, again, other = (build(spec, (1, 8, 8), 3, {}, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_build_passes_settings_and_leaves_the_mode() -> None:
    model = build("mlp", (4,), 2, {"hidden": [9]}, generator())
    assert model.get_parameter("hidden1.0.weight").shape == (9, 4)
    assert all(layer.training for layer in model.modules())


@pytest.fixture
def own_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_networks.py").write_text(
        textwrap.dedent("""
        import torch
        from torch import nn

        def linear(record_shape, classes, bias=True, *, scale=1):
            return nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(record_shape).numel(), classes, bias=bias))

        def anything(record_shape, classes, **settings):
            return nn.Sequential(nn.Flatten(), nn.Linear(4, settings["out"]))

        def needs(record_shape, classes, width):
            return linear(record_shape, classes)

        def moving(record_shape, classes):
            return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, classes))

        def text(record_shape, classes):
            return "a network"

        def pair(record_shape, classes):
            return nn.LSTM(4, classes)

        def broken(record_shape, classes):
            raise KeyError("oops")

        def wrong_input(record_shape, classes):
            return nn.Linear(99, classes)

        constant = 3
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("own_networks")
def test_own_network_by_name() -> None:
    model = build("own_networks:linear", (2, 2), 3, {"bias": False}, generator())
    assert [name for name, _ in model.named_parameters()] == ["1.weight"]
    assert model(torch.rand(5, 2, 2)).shape == (5, 3)
    assert torch.equal(
        model.get_parameter("1.weight"),
        build("own_networks:linear", (2, 2), 3, {"bias": False}, generator()).get_parameter("1.weight"),
    )


@pytest.mark.usefixtures("own_networks")
def test_trying_out_moves_no_statistic() -> None:
    model = build("own_networks:moving", (4,), 2, {}, generator())
    norm = model.get_submodule("1")
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.training
    assert norm.num_batches_tracked == torch.tensor(0)


@pytest.mark.usefixtures("own_networks")
@pytest.mark.parametrize(
    ("spec", "settings", "message"),
    [
        ("resnt", {}, r"'resnt' is not known; did you mean 'resnet'\? known: mlp, cnn, resnet, or your own as"),
        ("own_networks:", {}, "'own_networks:' is not known"),
        ("no_such_module:linear", {}, "cannot import 'no_such_module': ModuleNotFoundError"),
        ("own_networks:liner", {}, r"has no function 'liner'; did you mean 'linear'\?"),
        ("own_networks:constant", {}, "has no function 'constant'"),
        ("mlp", {"hiden": [3]}, r"has no setting 'hiden'; did you mean 'hidden'\? known: hidden"),
        ("own_networks:linear", {"scal": 2}, r"did you mean 'scale'\? known: bias, scale"),
        ("own_networks:text", {"width": 2}, "has no setting 'width'; it takes none"),
        ("own_networks:needs", {}, "missing a required argument: 'width'"),
        ("own_networks:anything", {"classes": 2}, "multiple values for argument 'classes'"),
        ("own_networks:anything", {"out": 4}, r"logits of shape \(2, 3\) .* returned shape \(2, 4\)"),
        ("own_networks:text", {}, "must return an nn.Module, it returned str"),
        ("own_networks:pair", {}, "it returned a tuple"),
        ("own_networks:broken", {}, "cannot be made with {}: KeyError: 'oops'"),
        ("own_networks:wrong_input", {}, r"fails on records of shape \(4,\): RuntimeError"),
        ("mlp", {"hidden": 3}, "hidden must be a list of layer widths, got 3"),
        ("mlp", {"hidden": "64"}, r"hidden\[0\] must be a whole number of 1 or more, got '6'"),
        ("mlp", {"hidden": [8, 0]}, r"hidden\[1\] must be a whole number of 1 or more, got 0"),
        ("cnn", {}, r"needs pictures \(channels, height, width\), the records have shape \(4,\); for tables use 'mlp'"),
    ],
)
def test_refusals_for_a_table(spec: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as refusal:
        build(spec, (4,), 3, settings, generator())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("spec", "shape", "settings", "message"),
    [
        ("cnn", (1, 8, 3), {}, "needs pictures of 4 x 4 or more, the records are 8 x 3"),
        ("resnet", (1, 2, 2), {}, "needs pictures of 4 x 4 or more"),
        ("resnet", (1, 8, 8), {"depth": 10}, r"depth must be 6n \+ 2 \(8, 14, 20, ...\), got 10"),
        ("resnet", (1, 8, 8), {"depth": 2}, "depth must be 6n"),
        ("resnet", (1, 8, 8), {"depth": "8"}, "depth must be 6n .* got '8'"),
        ("cnn", (1, 8, 8), {"width": True}, "width must be a whole number of 1 or more, got True"),
    ],
)
def test_refusals_for_pictures(spec: str, shape: tuple[int, ...], settings: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build(spec, shape, 3, settings, generator())


def test_a_small_network_learns() -> None:
    """Left half bright or right half bright: all three tell them apart after a few steps."""
    draw = torch.Generator().manual_seed(0)
    labels_B = torch.randint(0, 2, (64,), generator=draw)
    x_BCHW: Tensor = 0.1 * torch.rand(64, 1, 8, 8, generator=draw)
    x_BCHW[labels_B == 1, :, :, :4] += 0.8
    x_BCHW[labels_B == 0, :, :, 4:] += 0.8
    for spec in ("mlp", "cnn", "resnet"):
        model = build(spec, (1, 8, 8), 2, {}, generator())
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(10):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x_BCHW), labels_B).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        assert (model(x_BCHW).argmax(1) == labels_B).float().mean() == 1.0, spec
