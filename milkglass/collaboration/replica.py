"""A volunteer's copy of what all train: weights, optimizer, epoch; the same bits at all who took the same steps.

Everyone applies the same average to the same weights, so there is nothing to average again afterwards, as hivemind's
state averager does every epoch: between machines of one kind the copies are equal to the bit, and between different
ones they part by no more than the rounding of each step, for gradients are the same for all.

`history` is a chain of hashes over the averages that were applied: whoever has the same one has taken the same steps,
whatever the machine. `digest` is the SHA-256 of weights and optimizer: a download from a stranger is checked by it.

Legend: D numbers of all parameters that learn, in their order.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from milkglass.collaboration.centered_clipping import running_mean
from milkglass.errors import MessageError, first_line
from milkglass.parties import Party
from milkglass.runs import tensors_as_bytes

_CENTER: Final = "center"
_HEAD: Final = "head"
_MOST_EPOCHS: Final = 1 << 40
_HEAD_BYTES: Final = 1 << 20
_NAME_BYTES: Final = 512


@final
@dataclass(frozen=True)
class Version:
    """Which state: how many steps, by what history (hash), and the SHA-256 of it."""

    epoch: int
    history: bytes
    digest: bytes


@final
class Replica:
    """Held by the training, read by the event loop too: every method holds its lock.

    party: the network, its optimizer, its learning rate by step. robust: keep a running mean of the
    averages, around which the next contributions are clipped.
    """

    def __init__(self, party: Party, recipe_digest: bytes, *, robust: bool) -> None:
        self._party, self._recipe, self._robust = party, recipe_digest, robust
        self._lock = threading.Lock()
        self._learning = [each for each in party.stage.parameters() if each.requires_grad]
        self.numbers = sum(each.numel() for each in self._learning)
        self.center_D: Tensor | None = None
        self.epoch, self.history = 0, hashlib.sha256(recipe_digest).digest()
        self._digest: bytes | None = None

    @property
    def version(self) -> Version:
        """Of the state now."""
        with self._lock:
            if self._digest is None:
                self._digest = hashlib.sha256(self._bytes()).digest()
            return Version(self.epoch, self.history, self._digest)

    @property
    def most_bytes(self) -> int:
        """No state of this network is longer: weights, buffers, what the optimizer remembers, center, and their names.

        A download that goes on beyond that is a lie.
        """
        forms = self._forms(epoch=1)
        content = sum(shape.numel() * kind.itemsize for shape, kind in forms.values())
        return content + len(forms) * _NAME_BYTES + _HEAD_BYTES

    def gradient(self) -> Tensor:
        """What the last backward passes have added up in the parameters' gradients, as one vector (D,)."""
        return torch.cat(
            [
                (torch.zeros_like(each) if each.grad is None else each.grad).detach().reshape(-1).float()
                for each in self._learning
            ]
        )

    def forget_gradient(self) -> None:
        """Begin to add up anew."""
        for each in self._learning:
            each.grad = None

    def step(self, average_D: Tensor) -> None:
        """One step of the optimizer along an average, (D,) float32."""
        with self._lock:
            at = 0
            for each in self._learning:
                each.grad = average_D[at : at + each.numel()].view_as(each).clone()
                at += each.numel()
            self._party.take_step(self.epoch)
            self.forget_gradient()
            history = hashlib.sha256(self.history + average_D.numpy().tobytes()).digest()
            self.epoch, self.history = self.epoch + 1, history
            self.center_D = running_mean(self.center_D, average_D) if self._robust else None
            self._digest = None

    def save(self) -> tuple[Version, bytes]:
        """The state as safetensors, and its version."""
        with self._lock:
            content = self._bytes()
            self._digest = hashlib.sha256(content).digest()
            return Version(self.epoch, self.history, self._digest), content

    def load(self, content: bytes) -> Version:
        """Take over a state that `save` made, perhaps a stranger's. Raises MessageError, and changes nothing then."""
        tensors, recipe, epoch, history = _read(content)
        if recipe != self._recipe:
            raise MessageError("a state of another recipe")
        with self._lock:
            self._check(tensors, epoch)
            center_D = tensors.pop(_CENTER, None)
            self._party.load_weights(tensors, with_optimizer=True)
            self.center_D = center_D if self._robust else None
            self.epoch, self.history = epoch, history
            self.forget_gradient()
            self._digest = hashlib.sha256(content).digest()
            return Version(epoch, history, self._digest)

    def _bytes(self) -> bytes:
        head = {"epoch": self.epoch, "history": self.history.hex(), "recipe": self._recipe.hex()}
        tensors = self._party.weights(with_optimizer=True)
        tensors[_HEAD] = torch.tensor(list(json.dumps(head, sort_keys=True).encode()), dtype=torch.uint8)
        if self.center_D is not None:
            tensors[_CENTER] = self.center_D
        return tensors_as_bytes(tensors)

    def _forms(self, epoch: int) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and kind of each tensor of a state, by name."""
        forms = {name: (tensor.shape, tensor.dtype) for name, tensor in self._party.weights().items()}
        if epoch > 0:  # the optimizer remembers something
            for slot, scalar in _slots(self._party.optimizer).items():
                for index, each in enumerate(self._learning):
                    forms[f"optimizer.{index}.{slot}"] = (torch.Size([]) if scalar else each.shape, torch.float32)
        if epoch > 0 and self._robust:
            forms[_CENTER] = (torch.Size([self.numbers]), torch.float32)
        return forms

    def _check(self, tensors: Mapping[str, Tensor], epoch: int) -> None:
        forms = self._forms(epoch)
        missing = forms.keys() - tensors.keys()
        if missing:
            raise MessageError(f"a state without {min(missing)}")
        for name, tensor in tensors.items():
            if name not in forms or (tensor.shape, tensor.dtype) != forms[name]:
                form = f"{name} of shape {tuple(tensor.shape)}, {tensor.dtype}"
                raise MessageError(f"a state with {form}, which a replica here has not")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise MessageError(f"a state in which {name} is not finite")


def _slots(optimizer: torch.optim.Optimizer | None) -> dict[str, bool]:
    """What an optimizer remembers of each parameter after a step, by name; True: one number, not one for each."""
    if optimizer is None:
        return {}
    trial = nn.Parameter(torch.zeros(2))
    trial.grad = torch.zeros(2)
    kind: Any = type(optimizer)
    other = kind([trial], **optimizer.defaults)
    other.step()
    return {name: value.dim() == 0 for name, value in other.state[trial].items() if isinstance(value, Tensor)}


def epoch_of(content: bytes) -> int:
    """How many steps a state has made. Raises MessageError."""
    return _read(content)[2]


def _read(content: bytes) -> tuple[dict[str, Tensor], bytes, int, bytes]:
    """Tensors, digest of the recipe, epoch, history."""
    try:
        tensors = load_tensors(content)
        head = json.loads(bytes(tensors.pop(_HEAD).tolist()))
        epoch, history, recipe = int(head["epoch"]), bytes.fromhex(head["history"]), bytes.fromhex(head["recipe"])
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise MessageError(f"a state that cannot be read: {first_line(error)}") from None
    if not 0 <= epoch < _MOST_EPOCHS or len(history) != hashlib.sha256().digest_size:
        raise MessageError(f"a state of epoch {epoch} with a history of {len(history)} bytes")
    return tensors, recipe, epoch, history
