"""One result's directory: what is in it, and the checks it must pass before anyone sees it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from workbench.errors import DamagedResultError, StoreError
from workbench.result import Arrays, Result
from workbench.store.files import (
    copy_durably,
    explained,
    fault,
    sha256_of,
    sync_folder,
    write_durably,
)
from workbench.store.migrations import RESULT_SCHEMA, upgrade_document
from workbench.store.strict_json import read_number, to_json

ARRAYS = "arrays.safetensors"
DOCUMENT = "result.json"
MANIFEST = "manifest.json"
SUFFIXES = (".safetensors", ".json", ".jsonl", ".txt")
"""What a result may consist of: formats that hold data and can run nothing."""

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,120}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TYPES = {
    "key": str,
    "probe": str,
    "version": int,
    "metrics": dict,
    "labels": dict,
    "config": dict,
    "provenance": dict,
}


class NewerResultError(StoreError):
    """A result written by a later version of the workbench: whole, but not for us to read."""


class RemovedResultError(StoreError):
    """A result that was there a moment ago and has been removed, whole, by someone else."""


def is_key(text: str) -> bool:
    """Whether a text has the form of a key: 64 lower-case hex characters."""
    return _DIGEST.fullmatch(text) is not None


def is_safe_file_name(name: str) -> bool:
    """Whether a name is a plain file name of a kind that a result may hold."""
    return _FILE_NAME.fullmatch(name) is not None and name.endswith(SUFFIXES)


@dataclass(frozen=True)
class Record:
    """A result's directory whose small files passed their checks."""

    folder: Path
    key: str
    document: dict[str, Any]
    """The content of ``result.json``, in today's schema."""
    files: dict[str, dict[str, Any]]
    """Size and SHA-256 by file name; the manifest itself is not among them."""

    @property
    def size_bytes(self) -> int:
        """What the listed files hold together."""
        return sum(int(file["size"]) for file in self.files.values())

    def check_contents(self) -> None:
        """Compare every file with its checksum.

        Raises:
            DamagedResultError: Names the first file that differs.
        """
        for name in self.files:
            self.check_file(name)

    def check_file(self, name: str) -> None:
        """Compare one file with its checksum."""
        check_file(self.folder, self.key, name, self.files[name])

    def to_result(self, *, cached: bool, arrays: Arrays) -> Result:
        """The result, its arrays still on disk."""
        document = self.document
        return Result(
            key=self.key,
            probe=document["probe"],
            version=document["version"],
            config=document["config"],
            labels=document["labels"],
            provenance=document["provenance"],
            metrics={name: read_number(value) for name, value in document["metrics"].items()},
            arrays=arrays,
            path=self.folder,
            cached=cached,
        )


def missing_file(folder: Path, key: str, name: str) -> StoreError:
    """What to raise for a file that is not there: damage, or a result that was removed."""
    if not folder.is_dir():
        return RemovedResultError(f"result {key} was removed while it was in use; run it again")
    return DamagedResultError(f"result {key} must hold {name}; the file is missing")


def check_file(folder: Path, key: str, name: str, expected: Mapping[str, Any]) -> None:
    """Compare one file with the manifest's size and checksum.

    Raises:
        DamagedResultError: Says what differs.
    """
    path = folder / name
    try:
        size = path.stat().st_size
        digest = sha256_of(path) if size == expected["size"] else ""
    except FileNotFoundError as error:
        raise missing_file(folder, key, name) from error
    except OSError as error:
        with explained("read", path):
            raise error
    if size != expected["size"]:
        raise DamagedResultError(
            f"{name} of result {key} must have {expected['size']} bytes; it has {size}"
        )
    if digest != expected["sha256"]:
        raise DamagedResultError(f"{name} of result {key} does not match its SHA-256 in {MANIFEST}")


def read_record(folder: Path, key: str) -> Record | None:
    """Read and check the small files of a result's directory; None when there is no directory.

    The sizes of all files and the checksum of ``result.json`` are compared; the arrays' checksum
    only by ``Record.check_contents`` and when an array is read.

    Raises:
        DamagedResultError: Something is missing or differs.
        NewerResultError: A later version of the workbench wrote it.
    """
    if not folder.is_dir():
        return None
    manifest = _read_json(folder, key, MANIFEST)
    _check_schema(key, MANIFEST, manifest.get("schema"))
    files = _listed_files(key, manifest)
    for name, expected in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise missing_file(folder, key, name)
        if size != expected["size"]:
            raise DamagedResultError(
                f"{name} of result {key} must have {expected['size']} bytes; it has {size}"
            )
    check_file(folder, key, DOCUMENT, files[DOCUMENT])
    return Record(folder, key, _checked_document(folder, key), files)


def _read_json(folder: Path, key: str, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise missing_file(folder, key, name) from error
    except OSError as error:
        with explained("read", path):
            raise error
    except (ValueError, RecursionError) as error:
        raise DamagedResultError(f"{name} of result {key} must be JSON: {error}") from error
    if not isinstance(content, dict):
        raise DamagedResultError(f"{name} of result {key} must be a JSON object")
    return content


def _check_schema(key: str, name: str, schema: Any) -> None:
    if not isinstance(schema, int) or schema < 1:
        raise DamagedResultError(f"{name} of result {key} must have a schema; got {schema!r}")
    if schema > RESULT_SCHEMA:
        raise NewerResultError(
            f"result {key} was written by a newer workbench (schema {schema}; this one "
            f"reads up to {RESULT_SCHEMA}); upgrade, or use another store with --store"
        )


def _listed_files(key: str, manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    files = manifest.get("files")
    if not isinstance(files, dict) or not {ARRAYS, DOCUMENT} <= set(files):
        raise DamagedResultError(f"{MANIFEST} of result {key} must list {ARRAYS} and {DOCUMENT}")
    for name, expected in files.items():
        whole = (
            is_safe_file_name(name)
            and isinstance(expected, dict)
            and isinstance(expected.get("size"), int)
            and is_key(str(expected.get("sha256")))
        )
        if not whole:
            raise DamagedResultError(
                f"{MANIFEST} of result {key} must give size and SHA-256 of plain files of "
                f"the kinds {', '.join(SUFFIXES)}; got {name!r}"
            )
    return files


def _checked_document(folder: Path, key: str) -> dict[str, Any]:
    document = _read_json(folder, key, DOCUMENT)
    _check_schema(key, DOCUMENT, document.get("schema"))
    document = upgrade_document(document)
    for name, kind in _TYPES.items():
        if not isinstance(document.get(name), kind):
            raise DamagedResultError(
                f"{name!r} in {DOCUMENT} of result {key} must be a {kind.__name__}"
            )
    if not 0 <= document["version"] < 1 << 63:  # more than the catalogue's column holds
        raise DamagedResultError(
            f"the version in {DOCUMENT} of result {key} must be a count; got {document['version']}"
        )
    if document["key"] != key:
        raise DamagedResultError(f"{DOCUMENT} of result {key} belongs to {document['key']!r}")
    for axis, names in document["labels"].items():
        if not isinstance(names, list):
            raise DamagedResultError(
                f"the labels of {axis!r} in {DOCUMENT} of result {key} must be a list"
            )
    try:
        _ = [read_number(value) for value in document["metrics"].values()]
    except (TypeError, ValueError) as error:
        raise DamagedResultError(f"the metrics of result {key} must be numbers: {error}") from error
    return document


def write_record(
    folder: Path, document: Mapping[str, Any], result: Result, files: Mapping[str, Path]
) -> None:
    """Write a result's files into an empty directory and wait until the disk has them.

    Args:
        folder: Where; it becomes the result's directory when it is renamed.
        document: The content of ``result.json``.
        result: Its arrays are written.
        files: More files to keep beside the arrays (a trained model), by name.
    """
    # A transposed array must not be written in the order in which it lies in memory.
    arrays = {name: np.asarray(array, order="C") for name, array in result.arrays.items()}
    write_durably(folder / ARRAYS, safetensors.numpy.save(arrays), "arrays")
    write_durably(folder / DOCUMENT, to_json(document, indent=1).encode(), "result")
    for name, source in files.items():
        copy_durably(source, folder / name)
    write_manifest(folder, [ARRAYS, DOCUMENT, *files])


def write_manifest(folder: Path, names: list[str]) -> None:
    """Write the sizes and checksums of the named files."""
    listed = {
        name: {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        for name in names
    }
    manifest = {"schema": RESULT_SCHEMA, "files": listed}
    write_durably(folder / MANIFEST, to_json(manifest, indent=1).encode(), "manifest")
    sync_folder(folder)
    fault("after-sync")
