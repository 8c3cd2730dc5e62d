"""A process that is done with large messages keeps their memory for the next ones.

glibc gives large pieces back to the system at once, and takes new ones for the next message: each page of them is then
cleared and mapped anew, which costs more than encrypting it.
"""

from __future__ import annotations

import ctypes
from typing import Final

_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
_KEPT_BYTES: Final = 512 << 20


def keep_freed_memory() -> None:
    """From now on, in this process; nothing where the C library has no such setting."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_MMAP_THRESHOLD, _KEPT_BYTES)
    mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
