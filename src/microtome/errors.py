"""What can go wrong, drawn as a tree.

MicrotomeError                 everything below; the command line prints it in one line and exits with 2
├── UnknownName                a name that is not in the list it was looked up in
├── BadInput                   an argument, option or data file that cannot be used
├── UnsupportedModel           an architecture, feature or storage format that Microtome does not read
├── BadCheckpoint              a file that is missing, truncated, corrupt or points outside its folder
├── BadPlan                    widths that cannot be had
├── NumericalFailure           values that are not finite, or statistics too thin for the solve
└── BadOutput                  an output folder that exists, or a disk that is full
"""

import difflib
from collections.abc import Iterable


class MicrotomeError(Exception):
    """The fact with its values, the place, and the next step: one line."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: in the words of Python, of CUDA, or of torch on a CPU."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


class UnknownName(MicrotomeError, LookupError):
    """A name that is not in the list it was looked up in."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        super().__init__(f"no {kind} named {name!r}.{hint} Known: {', '.join(names)}.")


class BadInput(MicrotomeError, ValueError):
    """An argument, option or data file that cannot be used."""


class UnsupportedModel(MicrotomeError, ValueError):
    """An architecture, feature or storage format that Microtome does not read."""


class BadCheckpoint(MicrotomeError, ValueError):
    """A file that is missing, truncated, corrupt or points outside its folder."""


class BadPlan(MicrotomeError, ValueError):
    """Widths that cannot be had."""


class NumericalFailure(MicrotomeError, ArithmeticError):
    """Values that are not finite, or statistics too thin for the solve."""


class BadOutput(MicrotomeError, OSError):
    """An output folder that exists already, or a disk that is full."""
