"""What the store's maintenance verbs report."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verified:
    """What a check of every byte found."""

    whole: tuple[str, ...]
    """Keys of the results that are as they were written."""
    damaged: dict[str, str]
    """The reason by key; these have been set aside."""
    unreadable: dict[str, str]
    """The reason by key: written by a newer workbench, or permission denied; left in place."""


@dataclass(frozen=True)
class Collected:
    """What a clean-up removed, or would remove."""

    removed: tuple[str, ...]
    """Keys of results."""
    leased: tuple[str, ...]
    """Keys that were due but are being worked on; kept."""
    leftovers: tuple[str, ...]
    """Unfinished writes, abandoned claims, dead requests, damaged results: paths in the store."""
    freed_bytes: int


@dataclass(frozen=True)
class Imported:
    """What an import brought."""

    added: tuple[str, ...]
    """Keys that are new here."""
    present: tuple[str, ...]
    """Keys that were here already, whole; ours were kept."""
