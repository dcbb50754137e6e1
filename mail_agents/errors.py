"""Errors that teach: what was given and expected, the nearest valid name, the next command."""

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class MailAgentsError(Exception):
    """Base class of every error raised on purpose by this project."""

    def __str__(self) -> str:
        # KeyError.__str__ would show the repr of the message, with its newlines escaped.
        return str(self.args[0]) if self.args else ""


class InvalidInputError(MailAgentsError, ValueError):
    """A value, shape, dtype or option is not acceptable."""


class UnknownNameError(MailAgentsError, KeyError):
    """A name (agent id, task, dataset key, configuration field) does not exist."""


class FeatureMismatchError(MailAgentsError, ValueError):
    """A dataset, an environment and an agent disagree about observations or actions."""


class CorruptFileError(MailAgentsError, ValueError):
    """A file is truncated, altered, of another kind, or holds values that cannot be used."""


class StorageError(MailAgentsError, OSError):
    """A file could not be written: the disk is full, a quota is reached, or access is denied."""


class MissingDependencyError(MailAgentsError, ImportError):
    """An optional package is needed for what was asked and cannot be imported."""


class MissingStatisticsError(MailAgentsError, RuntimeError):
    """Normalisation statistics are needed and were never fitted or loaded."""


def suggest(name: str, choices: Iterable[str]) -> str:
    """Returns ``" Did you mean 'x'?"`` for the closest choice, or an empty string."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def unknown_name(what: str, name: str, choices: Iterable[str], hint: str = "") -> UnknownNameError:
    """Builds the error for a name that is not among ``choices``.

    Args:
        what: Kind of the name, for example ``"agent id"``.
        name: The name that was given.
        choices: Valid names; at most twelve are listed.
        hint: A closing sentence, usually the next command to run.
    """
    valid = sorted(choices)
    listed = ", ".join(valid[:12]) + (f", ... ({len(valid)} in all)" if len(valid) > 12 else "")
    message = f"Unknown {what} {name!r}.{suggest(name, valid)} Valid: {listed or 'none'}."
    return UnknownNameError(f"{message} {hint}".rstrip())


def nearest_divisor(total: int, wanted: int) -> int:
    """Returns the divisor of ``total`` that is closest to ``wanted``; of two, the smaller."""
    divisors = (number for number in range(1, total + 1) if total % number == 0)
    return min(divisors, key=lambda number: abs(number - wanted))


def require(module: str, extra: str, *, purpose: str = "") -> ModuleType:
    """Imports an optional module or says which extra to install.

    Args:
        module: Module to import, for example ``"metaworld"``.
        extra: Extra of this distribution that provides it, for example ``"sim"``.
        purpose: What needs it, for the message.

    Raises:
        MissingDependencyError: The module cannot be imported; the message has the pip command and
            the original failure.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken binary raises OSError or RuntimeError, not ImportError
        needed = f" (needed for {purpose})" if purpose else ""
        raise MissingDependencyError(
            f"Cannot import {module!r}{needed}: {type(error).__name__}: {error}. "
            f"Install it with: pip install 'mail-agents[{extra}]'. "
            "Run 'mail-agents doctor' to see every optional package."
        ) from error
