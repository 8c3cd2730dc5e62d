"""What a client has answered in a federated run, so that a hostile server cannot have an answer twice.

A client's batches, dropout and noise (`dp`: Abadi et al. 2016, arXiv 1607.00133) follow from its key and the number of
the epoch. Asked twice for one epoch, from other weights each time, it would add the same noise to two different sums,
and their difference would have none. So each epoch is answered for one set of weights alone, epochs that the recipe
does not have never, and tests are counted. The paper has an honest server and says nothing of this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final, final

from torch import Tensor, nn

from milkglass.client import StepResult
from milkglass.errors import EgressError, RunError
from milkglass.recipe import Recipe
from milkglass.runs import RunFolder, tensors_as_bytes
from milkglass.training.split import Progress

ANSWERED: Final = "journal/answered.json"
_TESTS: Final = "tests"


@final
class Ledger:
    """Kept in the client's folder, each line before the answer can leave.

    network: into which what the server sends is loaded before a round begins. Raises RunError for a damaged file.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, network: nn.Module, progress: Progress, batches: int) -> None:
        self._recipe, self._folder, self._network = recipe, folder, network
        self._progress, self._batches = progress, batches
        self._answered = dict(folder.read_json(ANSWERED)) if (folder.path / ANSWERED).exists() else {}
        if not isinstance(self._answered.get(_TESTS, 0), int):
            raise RunError(f"{folder.path / ANSWERED}: damaged; expected a number of tests")
        self._begins = True
        self._done = 0
        self.refusal: EgressError | None = None
        """What the server asked for and must not have, once it has."""

    @property
    def rounds(self) -> int:
        """How many rounds this client has trained in, or begun to."""
        return len(self._answered.keys() - {_TESTS})

    def asked(self) -> None:
        """A message came: the next batch, if there is one, is the first of a round."""
        self._begins, self._done = True, 0

    def on_batch(self, epoch: int, result: StepResult) -> None:
        """After each batch. Raises EgressError, so that nothing leaves, for a round that must not be answered."""
        if self._begins:
            self._begins = False
            self._write_round(epoch)
        self._done += 1
        self._progress.batch(epoch, (self._done - 1) % self._batches + 1, self._batches, result)

    def test(self) -> None:
        """Before each test of weights by themselves. Raises EgressError for more of them than there are rounds."""
        tests, most = self._answered.get(_TESTS, 0), self._rounds_of_recipe + 1
        if tests >= most:
            raise self._refused(f"the server asks for test {tests + 1}; a run of this recipe has no more than {most}")
        self._write({_TESTS: tests + 1})

    @property
    def _rounds_of_recipe(self) -> int:
        return self._recipe.training.epochs // self._recipe.federated.local_epochs

    def _write_round(self, epoch: int) -> None:
        local, epochs = self._recipe.federated.local_epochs, self._recipe.training.epochs
        if not 1 <= epoch <= epochs or (epoch - 1) % local:
            raise self._refused(
                f"the server asks for a round from epoch {epoch}; the recipe has {epochs} epochs, {local} in a round"
            )
        found, known = _digest(self._network.state_dict()), self._answered.get(str(epoch))
        if known is None:
            self._write({str(epoch): found})
        elif known != found:
            raise self._refused(
                f"the server asks for the round from epoch {epoch} again, and from other weights; two answers would "
                "tell more than one, so this one does not leave"
            )

    def _refused(self, why: str) -> EgressError:
        self.refusal = EgressError(why)
        return self.refusal

    def _write(self, lines: Mapping[str, Any]) -> None:
        self._answered |= lines
        self._folder.write_json(ANSWERED, self._answered)


def _digest(weights: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(tensors_as_bytes(weights)).hexdigest()
