"""The exceptions that users of tenfold can catch. Each message says what was given, what is needed, what to do."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class TenfoldError(Exception):
    """Base of every error that tenfold raises on purpose."""


class InvalidInput(TenfoldError, ValueError):
    """A value, option, array or file that the method cannot work with."""


class InvalidEvidence(TenfoldError, ValueError):
    """Evidence that cannot be believed: a NaN, too few seeds, an empirical claim without its control."""


class CheckpointError(TenfoldError, RuntimeError):
    """A checkpoint that is damaged or belongs to another run."""


class RunInProgress(TenfoldError, RuntimeError):
    """Another process is writing to the same place."""


class CannotRunHere(TenfoldError):
    """Something this machine lacks. Raised inside a claim it gives the verdict *not run*, with the message as reason."""


class MissingExtra(CannotRunHere, ImportError):
    """A library of an optional extra is not installed; the message names the extra."""


class DataUnavailable(CannotRunHere, LookupError):
    """A data set or model whose declared home does not hold it, or cannot be reached."""


class NeedsHardware(CannotRunHere):
    """A job that needs a GPU, more memory or more processes than there are."""


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise `MissingExtra` with the one command that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise MissingExtra(
            f"This needs `{module}`, which is not installed. Install it with: pip install 'tenfold[{extra}]'"
        ) from error


def unknown_name(what: str, given: str, known: Iterable[str]) -> InvalidInput:
    """The error for a misspelt name: what was given, the closest known names, or all of them when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(names) or 'none'}."
    return InvalidInput(f"Unknown {what} {given!r}. {hint}")
