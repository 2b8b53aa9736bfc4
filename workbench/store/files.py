"""Writing that survives a crash, checksums, and operating-system errors in plain words."""

import contextlib
import ctypes
import errno
import hashlib
import os
import secrets
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from workbench.errors import StoreError

CHUNK_BYTES = 1 << 20
_HERE = -100  # AT_FDCWD: paths count from the current folder
_EXCHANGE = 2  # RENAME_EXCHANGE
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_NOT_A_FOLDER = {errno.ENOTDIR, errno.EEXIST}


def fault(point: str) -> None:
    """Fail here when the environment asks for it; tests use it to crash at every step.

    ``WORKBENCH_FAULT=after-arrays`` kills the process at that point, as a power cut would;
    ``WORKBENCH_FAULT=after-arrays:ENOSPC`` raises that operating-system error instead. Who listens
    to the interpreter's audit events sees every point that is passed.
    """
    sys.audit("workbench.fault", point)
    wanted, _, error = os.environ.get("WORKBENCH_FAULT", "").partition(":")
    if wanted != point:
        return
    if error:
        number = getattr(errno, error)
        raise OSError(number, os.strerror(number))
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def explained(what: str, path: Path) -> Iterator[None]:
    """Turn an operating-system error into a ``StoreError`` that says what to do.

    Args:
        what: The attempt, as an infinitive ("write", "read").
        path: The file or folder that the user knows about.
    """
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot {what} {path}: {_advice(error)}") from error


def _advice(error: OSError) -> str:
    if error.errno in _FULL:
        return "the disk is full; free some space, or choose another folder (nothing was lost)"
    if error.errno in _FORBIDDEN:
        return (
            "it must be a folder you may write to, and permission was denied; "
            "choose another with --store or WORKBENCH_HOME"
        )
    if error.errno in _NOT_A_FOLDER:
        return "it must be a folder, and a file is in the way; choose another path"
    return f"{(error.strerror or str(error)).lower()}; check the path"


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable (Windows has no such call and needs none)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes, step: str) -> None:
    """Write a new file and wait until the disk has it.

    Args:
        path: Must not exist yet.
        data: The whole content.
        step: Names the fault points ``during-<step>`` and ``after-<step>``.
    """
    with path.open("xb") as file:
        half = len(data) // 2
        file.write(data[:half])
        file.flush()
        fault(f"during-{step}")
        file.write(data[half:])
        file.flush()
        os.fsync(file.fileno())
    fault(f"after-{step}")


def copy_durably(source: Path, target: Path) -> None:
    """Copy one file piece by piece and wait until the disk has it."""
    with source.open("rb") as reader, target.open("xb") as writer:
        while piece := reader.read(CHUNK_BYTES):
            writer.write(piece)
            writer.flush()
            fault("during-copy")
        os.fsync(writer.fileno())
    fault("after-copy")


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_durably(temporary, data, "file")
        temporary.replace(path)
        fault("after-file-rename")
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step; False where the system or the filesystem cannot (Linux can).

    Two renames in a row would leave neither in its place when a crash comes between them.
    """
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return swap(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_size_bytes(folder: Path) -> int:
    """The bytes that the files under a folder hold; 0 for a file."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def filesystem_now(folder: Path) -> float:
    """The time by the clock that stamps a folder's files, which may be a file server's, not ours."""
    probe = folder / f".now-{secrets.token_hex(4)}"
    try:
        probe.touch(exist_ok=False)
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
