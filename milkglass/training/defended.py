"""From a recipe's defenses to the objects that do the work, in the order in which they act, with their ends in stages.

The order: clipping, channel, noise, learned noise; then the penalties on exactly what will be sent: NoPeek, adversary,
conditional entropy. Label protection acts on gradients, whatever the others do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from milkglass.defenses.adversary import Adversary
from milkglass.defenses.base import Defense
from milkglass.defenses.channel import Channel, with_end, with_start
from milkglass.defenses.clipping import Clipping
from milkglass.defenses.conditional_entropy import ConditionalEntropy
from milkglass.defenses.labels import Marvell, MaxNorm
from milkglass.defenses.learned_noise import LearnedNoise
from milkglass.defenses.noise import Noise
from milkglass.defenses.nopeek import NoPeek
from milkglass.errors import RecipeError, RunError
from milkglass.recipe import Recipe
from milkglass.runs import RunFolder
from milkglass.tracing import in_mode

_WITHIN = "stage."  # how with_end and with_start name what they are put around
_PREPARED_ON = 2000  # records that a fixed projection is fitted to


def defenses(recipe: Recipe) -> list[Defense]:
    """The client's defenses, in the order in which they act; new objects, which hold no state yet."""
    table = recipe.defense
    chosen: list[Defense] = []
    if table.clipping is not None:
        chosen.append(Clipping(table.clipping.clip))
    if table.channel is not None:
        chosen.append(Channel(**table.channel.model_dump()))
    if table.noise is not None:
        chosen.append(Noise(table.noise.sigma, table.noise.kind))
    if table.learned_noise is not None:
        chosen.append(LearnedNoise(**table.learned_noise.model_dump()))
    sigma = sum(defense.noise_sigma**2 for defense in chosen) ** 0.5
    if table.nopeek is not None:
        chosen.append(NoPeek(table.nopeek.weight, table.nopeek.estimator))
    if table.adversary is not None:
        chosen.append(Adversary(**table.adversary.model_dump()))
    if table.entropy is not None:
        chosen.append(ConditionalEntropy(table.entropy.weight, sigma))
    if table.labels is not None:
        chosen.append(MaxNorm() if table.labels.kind == "max_norm" else Marvell(table.labels.strength))
    return chosen


def label_protection(recipe: Recipe, classes: int) -> list[Defense]:
    """Of the defenses those on gradients. Raises RecipeError where there are more classes than they are for."""
    check_classes(recipe, classes)
    return [defense for defense in defenses(recipe) if isinstance(defense, MaxNorm | Marvell)]


def check_classes(recipe: Recipe, classes: int) -> None:
    """Raise RecipeError for a defense that is for fewer classes than the records have."""
    labels = recipe.defense.labels
    if labels is not None and labels.kind == "marvell" and classes > 2:
        raise RecipeError(
            f"defense.labels.kind is marvell, which is for two classes, and the records have {classes}; "
            "expected max_norm"
        )


def with_ends(
    bottom: nn.Module, top: nn.Module, cut_shape: tuple[int, ...], chosen: Sequence[Defense]
) -> tuple[nn.Module, nn.Module]:
    """The two stages of a cut whose activations have `cut_shape`, with the defenses' ends, drawn as torch draws."""
    for defense in chosen:
        name = type(defense).__name__.lower()
        end, start = defense.client_end(cut_shape), defense.server_end(cut_shape)
        if end is None:
            continue
        bottom = with_end(bottom, end, name)
        if start is not None:
            top = with_start(top, start, name)
            with in_mode(end, training=False), torch.no_grad():
                cut_shape = tuple(end(torch.zeros(1, *cut_shape)).shape[1:])
    return bottom, top


def prepare(chosen: Sequence[Defense], bare: nn.Module, x: torch.Tensor) -> None:
    """Show the defenses what the client's stage, without their ends, makes of some records `x` (N, ...)."""
    if not any(isinstance(defense, Channel) for defense in chosen):
        return
    with in_mode(bare, training=False), torch.no_grad():
        z = bare(x[:_PREPARED_ON])
    for defense in chosen:
        defense.prepare(z)


def start_from(run: str, file: str, bare: nn.Module, whole: nn.Module) -> bool:
    """Fill a stage with what a finished run has of it: with its defenses' ends if they are alike, else without.

    bare: the stage without ends, a part of `whole`. Returns whether the ends were filled as well. Raises RunError where
    the run is missing, or another network's.
    """
    weights = RunFolder.open_finished(Path(run), (file, "summary.json")).read_tensors(file)
    if {name: t.shape for name, t in weights.items()} == {name: t.shape for name, t in whole.state_dict().items()}:
        bare = whole
    filled = bare is whole
    while weights.keys() != bare.state_dict().keys() and any(name.startswith(_WITHIN) for name in weights):
        weights = {name.removeprefix(_WITHIN): t for name, t in weights.items() if name.startswith(_WITHIN)}
    try:
        bare.load_state_dict(weights)
    except RuntimeError:
        raise RunError(
            f"network.start {run}: {file} does not fit the recipe's network and cut; expected a run of the same "
            "network, cut at the same layer"
        ) from None
    return filled
