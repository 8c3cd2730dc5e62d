"""Progress of long work: a bar on a terminal, plain lines in a log. Everything goes to the error stream."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Final, Self, final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from milkglass.client import StepResult

_LOG_SECONDS: Final = 10.0


class _Watch:
    """What both have: a bar that is drawn only on a terminal. `_task` is None in a log."""

    def __init__(self, what: str) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(what, total=None, note="") if self._bar.console.is_terminal else None

    def __enter__(self) -> Self:
        if self._task is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._bar.stop()

    def _log(self, line: str) -> None:
        self._bar.console.print(line, soft_wrap=True, highlight=False, markup=False)


@final
class TrainingProgress(_Watch):
    """Loss, accuracy and the current distance correlation of a training, by batch and by epoch."""

    def __init__(self, epochs: int, what: str = "training") -> None:
        super().__init__(what)
        self._epochs = epochs
        self._what = what
        self._dependence = "distance correlation not measured yet"

    def batch(self, epoch: int, step: int, steps: int, result: StepResult) -> None:
        """Move the bar; the penalty is the weighted one of this batch."""
        if self._task is None:
            return
        penalty = f", penalty {result.penalty:.3f}" if result.penalty else ""
        self._bar.update(
            self._task,
            total=self._epochs * steps,
            completed=(epoch - 1) * steps + step,
            note=f"loss {result.loss:.3f}, accuracy {result.accuracy:.3f}{penalty}, {self._dependence}",
        )

    def epoch(self, line: dict[str, Any]) -> None:
        """Note what the test records showed after an epoch."""
        found = line["distance_correlation"]
        self._dependence = "" if found is None else f"distance correlation {found['squared_unbiased']:.3f}"
        if self._task is None:
            told = {"loss": line["loss"], "test accuracy": line["accuracy"]}  # an owner of columns may be told neither
            words = [f"{what} {value:.3f}" for what, value in told.items() if value is not None]
            words += [self._dependence] if self._dependence else []
            self._log(f"{self._what}: epoch {line['epoch']} of {self._epochs}: {', '.join(words)}")


@final
class AuditProgress(_Watch):
    """Which attack of an audit is at work, and how far it has come: a bar for the suite, one for the attack."""

    def __init__(self) -> None:
        super().__init__("audit")
        self._inner = self._bar.add_task("", total=None, note="", visible=False) if self._task is not None else None

    def piece(self, done: int, total: int, what: str) -> None:
        """`done` of `total` pieces of work are done; `what` comes now."""
        if self._task is None or self._inner is None:
            self._log(f"audit: {done} of {total}: {what}")
            return
        self._bar.update(self._task, completed=done, total=total)
        self._bar.reset(self._inner, description=what, visible=done < total, note="")

    def step(self, done: int, total: int) -> None:
        """The attack at work has done so many of its steps."""
        if self._inner is not None:
            self._bar.update(self._inner, completed=done, total=total)


@final
class PredictionProgress(_Watch):
    """How many records are classified; in a log, a line now and then."""

    def __init__(self) -> None:
        super().__init__("predicting")
        self._told = time.monotonic()

    def records(self, done: int, total: int) -> None:
        """`done` of `total` records are classified."""
        if self._task is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif time.monotonic() - self._told >= _LOG_SECONDS:
            self._told = time.monotonic()
            self._log(f"predicting: {done:,} of {total:,} records")
