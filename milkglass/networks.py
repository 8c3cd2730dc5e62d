"""Small reference networks, and any other network by the name of the function that makes it.

Each reference network is an `nn.Sequential` of named layers, and every layer but the last is a legal place to cut
(see `cuts.py`). They use GroupNorm (Wu and He 2018, arXiv 1803.08494), never BatchNorm: BatchNorm couples the records
of a batch, and micro-batches, certificates and differential privacy all need records that do not know each other.

Shapes: B batch, C channels, H W picture, K classes. Records come as (C, H, W) pictures or (F,) rows of a table.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkglass.errors import RecipeError, nearest
from milkglass.randomness import drawing_from

_SMALLEST_SIDE: Final = 4  # both picture networks halve height and width twice
_DRY_RUN_BATCH: Final = 2


def mlp(record_shape: Sequence[int], classes: int, hidden: Sequence[int] = (128, 64)) -> nn.Sequential:
    """Fully connected: `flatten`, `hidden1`, `hidden2`, ..., `classifier`. For pictures and for tables.

    `hidden` holds the width of each hidden layer (linear, then ReLU). Cut after `flatten`, the raw record crosses: the
    open door on which an attack is checked.
    """
    if not isinstance(hidden, Sequence):
        raise RecipeError(f"network 'mlp': hidden must be a list of layer widths, got {hidden!r}")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    width = math.prod(record_shape)
    for number, next_width in enumerate(hidden, start=1):
        _check_positive("mlp", f"hidden[{number - 1}]", next_width)
        layers[f"hidden{number}"] = nn.Sequential(nn.Linear(width, next_width), nn.ReLU())
        width = next_width
    layers["classifier"] = nn.Linear(width, classes)
    return nn.Sequential(layers)


def cnn(record_shape: Sequence[int], classes: int, width: int = 32, hidden: int = 128) -> nn.Sequential:
    """Small convolutional network: `block1`, `block2`, `hidden`, `classifier`. For pictures from 4 x 4 on.

    A block is convolution 3 x 3, GroupNorm, ReLU and max-pooling by 2, so after `block2` a 28 x 28 picture is
    `width` x 7 x 7. `hidden` is the width of the fully connected layer.
    """
    channels, height, side = _check_picture("cnn", record_shape)
    _check_positive("cnn", "width", width)
    _check_positive("cnn", "hidden", hidden)
    return nn.Sequential(
        OrderedDict(
            block1=nn.Sequential(_conv(channels, width), _norm(width), nn.ReLU(), nn.MaxPool2d(2)),
            block2=nn.Sequential(_conv(width, width), _norm(width), nn.ReLU(), nn.MaxPool2d(2)),
            hidden=nn.Sequential(nn.Flatten(), nn.Linear(width * (height // 4) * (side // 4), hidden), nn.ReLU()),
            classifier=nn.Linear(hidden, classes),
        )
    )


def resnet(record_shape: Sequence[int], classes: int, depth: int = 8, width: int = 16) -> nn.Sequential:
    """CIFAR-style residual network (He et al. 2016, arXiv 1512.03385, section 4.2): `stem`, `block1`, ..., `pool`,
    `classifier`. For pictures from 4 x 4 on.

    `depth` = 6n + 2 layers in 3n residual blocks; the first n have `width` channels, the next n twice and the last n
    four times as many, at half and a quarter of the height and width. Differs from the paper: GroupNorm in place of
    BatchNorm, and a 1 x 1 convolution where a shortcut changes its shape (the paper's option B; it uses A on CIFAR).
    """
    channels, _, _ = _check_picture("resnet", record_shape)
    if not isinstance(depth, int) or depth < 8 or depth % 6 != 2:
        raise RecipeError(f"network 'resnet': depth must be 6n + 2 (8, 14, 20, ...), got {depth!r}")
    _check_positive("resnet", "width", width)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["stem"] = nn.Sequential(_conv(channels, width), _norm(width), nn.ReLU())
    before, blocks_per_stage = width, depth // 6
    for number in range(3 * blocks_per_stage):
        stage = number // blocks_per_stage
        after = width * 2**stage
        halve = stage > 0 and number % blocks_per_stage == 0
        layers[f"block{number + 1}"] = ResidualBlock(before, after, stride=2 if halve else 1)
        before = after
    layers["pool"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    layers["classifier"] = nn.Linear(before, classes)
    return nn.Sequential(layers)


@final
class ResidualBlock(nn.Module):
    """relu(shortcut(x) + f(x)), f two 3 x 3 convolutions with GroupNorm: (B, C, H, W) -> (B, C', H/stride, W/stride).

    Inside it no single tensor carries everything, so there is no legal cut there, only after it.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(before, after, stride)
        self.norm1 = _norm(after)
        self.conv2 = _conv(after, after)
        self.norm2 = _norm(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), _norm(after))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = F.relu(self.norm1(self.conv1(x_BCHW)))
        h_BCHW = self.norm2(self.conv2(h_BCHW))
        return F.relu(self.shortcut(x_BCHW) + h_BCHW)


NETWORKS: Final[Mapping[str, Callable[..., nn.Module]]] = {"mlp": mlp, "cnn": cnn, "resnet": resnet}
"""The reference networks by the name that a recipe gives them."""


def build(
    spec: str,
    record_shape: Sequence[int],
    classes: int,
    settings: Mapping[str, object],
    generator: torch.Generator,
) -> nn.Module:
    """The network that a recipe names, its weights drawn from `generator`, tried out on two records of zeros.

    `spec` is "mlp", "cnn", "resnet" or "package.module:function"; the function is imported (so its module runs) and
    called as `function(record_shape, classes, **settings)`. The network must turn (B, *record_shape) into (B, classes).

    Raises RecipeError for an unknown network, setting or function, and for a network of the wrong output shape.
    """
    factory = _find(spec)
    shape = tuple(record_shape)
    _check_settings(spec, factory, shape, classes, settings)
    with drawing_from(generator):
        try:
            model = factory(shape, classes, **settings)
        except RecipeError:
            raise
        except (Exception, SystemExit) as error:  # anything at all can go wrong in a user's function
            raise RecipeError(f"network {spec!r} cannot be made with {dict(settings)}: {_one_line(error)}") from error
        if not isinstance(model, nn.Module):
            raise RecipeError(f"network {spec!r} must return an nn.Module, it returned {type(model).__name__}")
        _dry_run(spec, model, shape, classes)
    return model


def _find(spec: str) -> Callable[..., object]:
    if spec in NETWORKS:
        return NETWORKS[spec]
    module_name, colon, function_name = spec.partition(":")
    if not (colon and module_name and function_name):
        names = nearest(spec, NETWORKS)
        raise RecipeError(f"network {spec!r} is not known; {names}, or your own as 'package.module:function'")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module runs here, and may do anything
        raise RecipeError(f"network {spec!r}: cannot import {module_name!r}: {_one_line(error)}") from error
    factory: object = getattr(module, function_name, None)
    if not callable(factory):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise RecipeError(
            f"network {spec!r}: {module_name!r} has no function {function_name!r}; {nearest(function_name, known)}"
        )
    return factory


def _check_settings(
    spec: str, factory: Callable[..., object], shape: tuple[int, ...], classes: int, settings: Mapping[str, object]
) -> None:
    try:
        signature = inspect.signature(factory)
    except ValueError:
        raise RecipeError(f"network {spec!r} is not a function that can be called with settings") from None
    parameters = list(signature.parameters.values())
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        known = [parameter.name for parameter in parameters[2:]]
        for name in settings:
            if name not in known:
                hint = nearest(name, known) if known else "it takes none"
                raise RecipeError(f"network {spec!r} has no setting {name!r}; {hint}")
    try:
        signature.bind(shape, classes, **settings)
    except TypeError as error:
        raise RecipeError(
            f"network {spec!r}: {error}; it is called as function(record_shape, classes, **settings)"
        ) from None


def _dry_run(spec: str, model: nn.Module, shape: tuple[int, ...], classes: int) -> None:
    """Two records through `model`, in evaluation mode, so that no running statistic moves."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            logits: object = model(torch.zeros(_DRY_RUN_BATCH, *shape))
    except Exception as error:  # anything at all can go wrong in a user's forward
        raise RecipeError(f"network {spec!r} fails on records of shape {shape}: {_one_line(error)}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    expected = (_DRY_RUN_BATCH, classes)
    got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
        raise RecipeError(
            f"network {spec!r} must return logits of shape {expected} for {_DRY_RUN_BATCH} records of "
            f"shape {shape}, it returned {got}"
        )


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _conv(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    """3 x 3, same size at stride 1. No bias: the norm behind it has its own."""
    return nn.Conv2d(before, after, 3, stride, padding=1, bias=False)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(channels, 8), channels)


def _check_picture(network: str, record_shape: Sequence[int]) -> tuple[int, int, int]:
    shape = tuple(record_shape)
    if len(shape) != 3:
        raise RecipeError(
            f"network {network!r} needs pictures (channels, height, width), the records have shape "
            f"{shape}; for tables use 'mlp'"
        )
    channels, height, width = shape
    if min(height, width) < _SMALLEST_SIDE:
        raise RecipeError(
            f"network {network!r} needs pictures of {_SMALLEST_SIDE} x {_SMALLEST_SIDE} or more, "
            f"the records are {height} x {width}; use 'mlp'"
        )
    return channels, height, width


def _check_positive(network: str, setting: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RecipeError(f"network {network!r}: {setting} must be a whole number of 1 or more, got {value!r}")
