"""What can go wrong and be mended by the person at the keyboard.

    WorkbenchError
    |-- UnknownNameError      a probe, site, setting, ... that does not exist (offers the nearest)
    |-- ConfigError           a setting with an impossible value
    |-- DataError             prompts or tokens that cannot be used
    |-- ModelError            a model that cannot be loaded or is not what it claims
    |   `-- CapabilityError   a model or backend that cannot do what a probe needs
    |-- EngineError           a hook that did not read or change the real thing
    `-- StoreError            a results store that cannot be read or written
        `-- DamagedResultError

Every message says what must hold, what was found and what to do, in one line. The command
line prints it and exits with 1; a traceback therefore always means a bug of ours.
"""

import difflib
from collections.abc import Iterable

MOST_CHARACTERS = 1500
"""Of a message: a value that somebody gave may be a whole file."""


class WorkbenchError(Exception):
    """Base of all errors that the user can mend."""

    def __init__(self, message: str = "") -> None:
        """Make one line of the message, and shorten one that nobody could read."""
        line = " ".join(part.strip() for part in str(message).splitlines()) or str(message)
        if len(line) > MOST_CHARACTERS:
            line = f"{line[: MOST_CHARACTERS - 300]} ... {line[-290:]}"
        super().__init__(line)


class UnknownNameError(WorkbenchError):
    """A name that is not in the list it was looked up in."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        """Say which names exist and offer the nearest.

        Args:
            kind: What was looked up, in the singular ("probe", "site", "setting").
            name: What was asked for.
            known: The names that exist.
        """
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(names)}"
        super().__init__(f"no {kind} is called {name!r}. {hint}")


class ConfigError(WorkbenchError, ValueError):
    """A setting whose value is out of range or of the wrong type."""


class DataError(WorkbenchError, ValueError):
    """Prompts or tokens that the model or the probe cannot use."""


class ModelError(WorkbenchError):
    """A model that cannot be loaded, or is not what it claims to be."""


class CapabilityError(ModelError):
    """A model or backend that cannot do what is asked; names the backend that could."""


class EngineError(WorkbenchError):
    """A hook that did not run as often as it must, or read something impossible."""


class StoreError(WorkbenchError):
    """A results store that cannot be read or written."""


class DamagedResultError(StoreError):
    """A stored result whose files are missing or do not match their checksums."""
