"""Freed memory is kept where the C library can, and nothing happens where it cannot."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from milkglass.memory import keep_freed_memory

PROGRAM = """
import resource, sys
from milkglass.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    for _ in range(50):
        large = [bytes(bytearray(b"x") * (1 << 20)) for _ in range(40)]
        del large
work()
before = faults()
work()
print(faults() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
def test_large_pieces_that_come_and_go_are_not_mapped_anew() -> None:
    faults = {}
    for way in ("leave", "keep"):
        command = [sys.executable, "-c", PROGRAM, way]
        faults[way] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert faults["keep"] * 4 < faults["leave"]


def test_a_c_library_without_the_setting_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    keep_freed_memory()
