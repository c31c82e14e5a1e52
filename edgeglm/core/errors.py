"""Errors a person can act on. The last clause of each message is the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

#: The exit code of a command that was interrupted.
INTERRUPTED = 130


class EdgeglmError(Exception):
    """Base of all errors that the command line reports without a traceback."""

    exit_code = 1


class UserError(EdgeglmError):
    """Bad input: a file, a name, an option. The command line exits with 2."""

    exit_code = 2


class GateError(EdgeglmError):
    """An accuracy gate was not met; nothing was packed. The command line exits with 3."""

    exit_code = 3


def fault_words(error: Exception) -> str:
    """Return what is said of an error that nobody foresaw, where others' work goes on after it.

    >>> fault_words(KeyError("library"))
    "KeyError: 'library'; this is a fault of edgeglm, report it with these words"
    """
    words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"{words}; this is a fault of edgeglm, report it with these words"


def unknown_name(kind: str, name: str, known: Iterable[str], remedy: str = "") -> UserError:
    """Build the error for a name that is not registered, with the nearest known one.

    >>> str(unknown_name("target", "jetson-agz", ["a10", "jetson-agx"]))
    "unknown target 'jetson-agz'; known: a10, jetson-agx; did you mean 'jetson-agx'?"
    """
    names = sorted(known)
    folded = {known_name.casefold(): known_name for known_name in names}
    near = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    last = f"did you mean {folded[near[0]]!r}?" if near else remedy or "use one of those"
    return UserError(f"unknown {kind} {name!r}; known: {', '.join(names) or 'none'}; {last}")
