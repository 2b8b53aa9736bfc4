"""Bringing results from one store to another: ``import`` and ``export``.

What is imported was made by somebody else. Nothing in it is believed before it was checked: only
plain files of kinds that can run nothing, in the places where a result has them, with the
checksums that their manifest gives.
"""

import json
import lzma
import re
import secrets
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

import safetensors

from workbench.errors import DamagedResultError, StoreError
from workbench.store.arrays import StoredArrays
from workbench.store.files import CHUNK_BYTES, copy_durably, explained, fault, sync_folder
from workbench.store.outcomes import Imported
from workbench.store.record import (
    DOCUMENT,
    MANIFEST,
    SUFFIXES,
    is_key,
    is_safe_file_name,
    read_record,
)
from workbench.store.results import Store

_FOLDER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_BROKEN = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,  # zipfile's, of patched or oddly compressed members
)


def import_from(store: Store, source: Path) -> Imported:
    """Check everything that ``source`` holds, then publish it; nothing is taken if a part is bad.

    Args:
        store: Where the results go.
        source: A result's folder, a store, or a .zip or .tar (also compressed) of either.

    Raises:
        StoreError: Something in it is not a whole result; names it.
    """
    if not source.exists():
        raise StoreError(
            f"{source} must be a result's folder, a store, a .zip or a .tar; not found"
        )
    with explained("import into", store.path), store.shelf.scratch("import") as scratch:
        if source.is_dir():
            found = _find_results(source)
        else:
            _extract(source, scratch / "archive")
            found = _find_results(scratch / "archive")
        if not found:
            raise StoreError(f"{source} must hold results (folders with a {MANIFEST}); none found")
        staged = [_stage(folder, scratch) for folder in found]
        added = {path.name: store.shelf.move_in(path, path.name) for path in staged}
    return Imported(
        tuple(key for key, new in added.items() if new),
        tuple(key for key, new in added.items() if not new),
    )


def _find_results(source: Path) -> list[Path]:
    # A store's temp/ and damaged/ are not results.
    start = source / "results" if (source / "results").is_dir() else source
    inside = [*start.rglob("*"), *([] if start == source else [start])]
    for path in inside:
        if path.is_symlink():
            raise _refused(str(path))
    return sorted(path.parent for path in inside if path.name == MANIFEST)


def _stage(folder: Path, scratch: Path) -> Path:
    """Copy one result beside the store's own and check the copy."""
    for path in folder.iterdir():
        if path.is_symlink() or not path.is_file() or not is_safe_file_name(path.name):
            raise _refused(str(path))
    staged = scratch / _claimed_key(folder)
    try:
        staged.mkdir()
    except FileExistsError as error:
        raise StoreError(f"a result must be there once; {staged.name} is there twice") from error
    for path in folder.iterdir():
        copy_durably(path, staged / path.name)
    record = read_record(staged, staged.name)
    if record is None:
        raise StoreError(f"{folder} was removed while it was imported; try again")
    extra = {path.name for path in staged.iterdir()} - set(record.files) - {MANIFEST}
    if extra:
        raise StoreError(f"{folder} must hold only what its {MANIFEST} lists; also found {extra}")
    record.check_contents()
    StoredArrays(record).describe()
    for name in record.files:
        _check_format(staged / name)
    sync_folder(staged)
    return staged


def _check_format(path: Path) -> None:
    """Refuse a file whose content is not what its name says, a pickle for example."""
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="numpy") as file:
                file.keys()
        elif path.suffix == ".json":
            json.loads(path.read_bytes())
        else:
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    if path.suffix == ".jsonl" and line.strip():
                        json.loads(line)
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        reason = str(error).split("\n")[0]
        raise StoreError(
            f"{path.name} of an imported result must hold what its name says; {reason}"
        ) from error


def _claimed_key(folder: Path) -> str:
    """The key that a result says it has; whether that is true is checked on the copy."""
    try:
        key = json.loads((folder / DOCUMENT).read_bytes())["key"]
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedResultError(
            f"{folder / DOCUMENT} must be JSON with a key: {error!r}"
        ) from error
    if not isinstance(key, str) or not is_key(key):
        raise DamagedResultError(f"{folder / DOCUMENT} must have a key of 64 hex characters")
    return key


def _refused(name: str) -> StoreError:
    return StoreError(
        f"an import may hold only plain {', '.join(SUFFIXES)} files inside its own folder; "
        f"refused {name!r}"
    )


def _extract(archive: Path, target: Path) -> None:
    """Unpack an archive whose every member is a plain, safe file below ``target``."""
    target.mkdir()
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                _extract_members(_zip_members(opened), target)
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as opened_tar:
                _extract_members(_tar_members(opened_tar), target)
        else:
            raise StoreError(f"{archive} must be a folder, a .zip or a .tar; it is none of these")
    except _BROKEN as error:
        raise StoreError(f"{archive} must be a whole archive: {error}; get it again") from error


def _zip_members(archive: zipfile.ZipFile) -> Iterator[tuple[str, int, IO[bytes]]]:
    for member in archive.infolist():
        kind = stat.S_IFMT(member.external_attr >> 16)
        if member.is_dir():
            continue
        if kind not in (0, stat.S_IFREG) or member.flag_bits & 1:
            raise _refused(member.filename)
        with archive.open(member) as reader:
            yield member.filename, member.file_size, reader


def _tar_members(archive: tarfile.TarFile) -> Iterator[tuple[str, int, IO[bytes]]]:
    for member in archive:
        if member.isdir():
            continue
        reader = archive.extractfile(member) if member.isreg() else None
        if reader is None:
            raise _refused(member.name)
        yield member.name, member.size, reader


def _extract_members(members: Iterator[tuple[str, int, IO[bytes]]], target: Path) -> None:
    free = shutil.disk_usage(target).free
    for name, size, reader in members:
        path = target / _safe_relative(name)
        # What an archive claims to unpack to is known before a byte of it is written.
        free -= size
        if free < 0:
            raise StoreError(f"the archive unpacks to more than the disk has room for, at {name!r}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("xb") as writer:
                shutil.copyfileobj(reader, writer, CHUNK_BYTES)
            fault("during-extract")
        except FileExistsError as error:
            raise _refused(name) from error


def _safe_relative(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    # The root of an absolute name and ".." are parts too, and no folder names.
    plain = all(_FOLDER_NAME.fullmatch(part) for part in path.parts[:-1])
    if not plain or not is_safe_file_name(path.name):
        raise _refused(name)
    return path


def export(store: Store, key: str, target: Path) -> Path:
    """Write one result as a folder (no suffix), a .zip, or any format of ``Result.save``.

    Raises:
        StoreError: There is no such result, it is damaged, or the target cannot be written.
    """
    key = store.resolve(key)
    suffix = target.suffix.lower()
    if suffix not in ("", ".zip"):
        return store.get(key).save(target)
    record = store.shelf.read(key, deep=True)
    if record is None:
        raise store.absent(key)
    names = [MANIFEST, *record.files]
    with explained("write", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if suffix:
            _export_zip(record.folder, names, target)
        else:
            _export_folder(record.folder, names, target)
    return target


def _export_zip(folder: Path, names: list[str], target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with zipfile.ZipFile(temporary, "x", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.write(folder / name, f"{folder.name}/{name}")
                fault("during-export")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _export_folder(folder: Path, names: list[str], target: Path) -> None:
    if target.exists():
        raise StoreError(f"{target} must not exist yet; give another name, or remove it")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
        for name in names:
            copy_durably(folder / name, temporary / name)
            fault("during-export")
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
