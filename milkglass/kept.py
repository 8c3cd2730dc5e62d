"""Results of attacks, kept in a folder by the content of the view and the attack's settings.

An audit that was interrupted goes on at the next attack, and a second one with another budget attacks nothing anew. A
key covers every tensor of the view, what the attacker knows beyond (its fingerprint), the attack's `repr`, and the
source of milkglass: an edited attack is run again. What is kept are rebuilt records: private, as the run folder is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, final

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from milkglass.attacks.base import Method, Reconstruction
from milkglass.runs import tensors_as_bytes, write_beside
from milkglass.transcript import Knowledge, MembershipTrial, Trial, View

AnyView = View | Trial | MembershipTrial


@final
class Kept:
    """A folder of results: `KEY.safetensors` for a reconstruction, `KEY.json` for anything else."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def reconstruction(self, view: View, attack: Method) -> Reconstruction | None:
        """What the attack gave on this view; None if that is not kept, or damaged."""
        if not _may_be_kept(view, repr(attack)):
            return None
        try:
            tensors = safetensors.torch.load_file(self._path(view, repr(attack), "safetensors"))
            note = bytes(tensors["note"].tolist()).decode()
            return Reconstruction(tensors["validation"], tensors["target"], float(tensors["seconds"]), note)
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def keep_reconstruction(self, view: View, attack: Method, made: Reconstruction) -> None:
        """Write it whole, or not at all."""
        if not _may_be_kept(view, repr(attack)):
            return
        tensors = {
            "validation": made.validation,
            "target": made.target,
            "seconds": torch.tensor(made.seconds, dtype=torch.float64),
            "note": torch.tensor(list(made.note.encode()), dtype=torch.uint8),
        }
        write_beside(self._path(view, repr(attack), "safetensors"), tensors_as_bytes(tensors))

    def json(self, view: AnyView, what: str) -> Any:
        """What was found on this view; None if nothing is kept, or something damaged."""
        if not _may_be_kept(view, what):
            return None
        try:
            return json.loads(self._path(view, what, "json").read_text("utf-8"))
        except (OSError, ValueError):
            return None

    def keep_json(self, view: AnyView, what: str, content: Any) -> None:
        """Write it whole, or not at all."""
        if _may_be_kept(view, what):
            write_beside(self._path(view, what, "json"), json.dumps(content).encode())

    def _path(self, view: AnyView, what: str, suffix: str) -> Path:
        key = hashlib.sha256(f"{_code()} {_digest(view)} {what}".encode()).hexdigest()
        return self._folder / f"{key[:32]}.{suffix}"


def _may_be_kept(view: AnyView, what: str) -> bool:
    """Not where nothing tells two results apart: a callable without a fingerprint, an attack without a `repr`."""
    seen = view if isinstance(view, View) else view.view
    knows = seen.knowledge
    release = seen.release if isinstance(seen, View) else None
    callables = (release, knows.client, knows.architecture, knows.server, knows.train, knows.honest_server)
    return " at 0x" not in what and (bool(knows.fingerprint) or not any(callables))


@lru_cache(maxsize=4)  # by identity: views are compared by it
def _digest(view: AnyView) -> str:
    content = hashlib.sha256()
    _add(content.update, view)
    return content.hexdigest()


def _add(update: Callable[[bytes | memoryview], None], value: object) -> None:
    """Tensors with shape and type, every text; of knowledge its fingerprint, of a callable that it is there."""
    if isinstance(value, Knowledge):
        update(f" knows {value.fingerprint} {value.noise_sigma}".encode())
    elif isinstance(value, Tensor):
        update(f" {value.dtype} {tuple(value.shape)} ".encode())
        update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping) or is_dataclass(value):
        for name, inner in (value if isinstance(value, Mapping) else vars(value)).items():
            update(f" {name}:".encode())
            _add(update, inner)
    else:
        update(b" callable" if callable(value) else f" {value}".encode())


@cache
def _code() -> str:
    """The versions, and the source of all that a result may come from."""
    content = hashlib.sha256(f"{metadata.version('milkglass')} {torch.__version__}".encode())
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        content.update(file.read_bytes())
    return content.hexdigest()
