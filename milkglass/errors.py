"""Everything milkglass raises on purpose.

MilkglassError                 one clear line: what, where, what was expected; exit code 2
├── RecipeError                the recipe, or an override of it
├── DataError                  records, labels, or the file that holds them
├── CutError                   a network that cannot be cut there
├── MessageError               a frame that is truncated, forged, or not what was agreed
├── EgressError                a client was about to send what nobody agreed to
├── HijackError                a client judged its server hostile and stopped
├── StopError                  a signal ended a server, its state kept; exit code 128 + the signal's number
├── LinkError                  another party that cannot be reached, does not answer, or refuses
├── RunError                   a run folder that exists, is half-written, or is another recipe's
├── CertificateError           a party's certificate or key that is missing, expired, or another's
├── AuditError                 a view or an attack that cannot be audited
│   └── MissingKnowledgeError  an attack that must know more than the view holds
└── MissingExtraError          a part of milkglass that is not installed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final

_LONGEST_ERROR: Final = 1000


class MilkglassError(Exception):
    """The root: catch this one to catch everything that milkglass raises on purpose."""


class RecipeError(MilkglassError):
    """A recipe, or an override of it, is wrong."""


class DataError(MilkglassError):
    """A data set is missing, damaged, or not what the recipe says."""


class CutError(MilkglassError):
    """A network cannot be cut where it was asked to be."""


class MessageError(MilkglassError):
    """A frame is truncated, forged, or carries what was not agreed."""


class EgressError(MilkglassError):
    """A client refused to send a message."""


class HijackError(MilkglassError):
    """A client's guard judged its server hostile: it stopped sending and kept its checkpoint."""


class StopError(MilkglassError):
    """A signal ended a server, which has kept its state. number: the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__("stopped; nothing is lost: run it again with --resume, and its clients go on")
        self.number = number


class LinkError(MilkglassError):
    """The other party cannot be reached, does not answer, or refuses this one."""


class RunError(MilkglassError):
    """A run folder cannot be used as asked."""


class CertificateError(MilkglassError):
    """A party's certificate or key is missing, unreadable, expired, or not what it should be."""


class AuditError(MilkglassError):
    """An audit cannot be made from what was given."""


class MissingKnowledgeError(AuditError):
    """An attack must know more than the view holds; an audit goes on without it."""


class MissingExtraError(MilkglassError):
    """An optional part of milkglass is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional part of milkglass: pip install 'milkglass[{extra}]'")


def foreign_line(text: str, most: int = 300) -> str:
    """Another's words as they may be shown on a terminal: one line of so many printable characters at most."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:most])


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says, in one line of printable characters; its type where it says nothing."""
    return foreign_line((str(error).strip() or type(error).__name__).splitlines()[0], _LONGEST_ERROR)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message that lists the `known` names, the nearest one to `name` first in its own words."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"
