"""What every benchmark says beside its figures: the date, the machine, the versions."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch


def machine_line() -> str:
    """One line for the head of a result."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return f"{today}, {os.cpu_count()} cores, {model}, Python {platform.python_version()}, torch {torch.__version__}"


def write_result(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a benchmark's rows as JSON, with the setting."""
    path.write_text(json.dumps({"setting": machine_line(), "rows": rows}, indent=2) + "\n")


def command_line() -> str:
    """The command that makes these figures; where the data sets are is nobody's business."""
    words = list(sys.argv[1:])
    if "--data" in words:
        words[words.index("--data") + 1] = "DIR"
    return " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *words])
