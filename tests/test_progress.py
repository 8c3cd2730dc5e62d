"""A bar on a terminal, plain lines in a log."""

from __future__ import annotations

import pytest

from milkglass.client import StepResult
from milkglass.progress import AuditProgress, TrainingProgress

LINE = {"epoch": 1, "loss": 0.5, "accuracy": 0.75, "distance_correlation": {"squared_unbiased": 0.25}}


def _train(progress: TrainingProgress) -> None:
    with progress:
        progress.batch(1, 1, 2, StepResult(loss=1.25, penalty=0.0, accuracy=0.5))
        progress.epoch(LINE)
        progress.batch(2, 1, 2, StepResult(loss=0.75, penalty=0.375, accuracy=0.625))


def test_a_log_has_a_line_per_epoch_and_piece(capsys: pytest.CaptureFixture[str]) -> None:
    _train(TrainingProgress(2))
    with AuditProgress() as audit:
        audit.piece(1, 3, "fresh: [ridge]")
        audit.step(5, 10)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "training: epoch 1 of 2: loss 0.500, test accuracy 0.750, distance correlation 0.250",
        "audit: 1 of 3: fresh: [ridge]",
    ]


def test_a_terminal_shows_loss_accuracy_and_distance_correlation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the error stream for a terminal
    monkeypatch.setenv("COLUMNS", "200")
    _train(TrainingProgress(2))
    shown = capsys.readouterr().err
    assert "3/4" in shown
    assert "loss 0.750, accuracy 0.625, penalty 0.375, distance correlation 0.250" in shown


def test_a_terminal_shows_a_bar_for_the_suite_and_one_for_the_attack(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    with AuditProgress() as audit:
        audit.piece(1, 3, "fresh: ridge")
        audit.step(5, 10)
    shown = capsys.readouterr().err
    assert "1/3" in shown
    assert "fresh: ridge" in shown
    assert "5/10" in shown
