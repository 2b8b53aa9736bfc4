"""Results travel between stores whole; what is not one is refused and changes nothing."""

import io
import json
import os
import pickle
import shutil
import stat
import tarfile
import zipfile

import numpy as np
import pytest

from workbench.errors import StoreError
from workbench.store.record import write_manifest
from workbench.store.results import Store


@pytest.fixture
def filled(store, make_result):
    for number in range(3):
        store.publish(make_result(number))
    return store


@pytest.fixture
def other(tmp_path, reports):
    return Store(tmp_path / "other", report=reports.append)


def assert_untouched(other):
    assert other.list() == []
    assert list((other.path / "temp").glob("*")) == []


@pytest.mark.parametrize("name", ["out.zip", "out"])
def test_an_exported_result_can_be_imported_elsewhere(filled, other, make_result, tmp_path, name):
    key = make_result(1).key
    assert filled.export(key[:8], tmp_path / name) == tmp_path / name
    assert other.import_from(tmp_path / name).added == (key,)
    np.testing.assert_array_equal(other.find(key).arrays["score"], make_result(1).arrays["score"])
    assert other.import_from(tmp_path / name).present == (key,)


def test_a_whole_store_is_imported_from_its_folder_and_from_a_tar(filled, other, tmp_path):
    assert len(other.import_from(filled.path).added) == 3
    with tarfile.open(tmp_path / "store.tar.gz", "w:gz") as archive:
        archive.add(filled.path / "results", "results")
    third = Store(tmp_path / "third")
    assert set(third.import_from(tmp_path / "store.tar.gz").added) == set(filled.shelf.stamps())
    assert third.verify().whole == tuple(sorted(filled.shelf.stamps()))


def test_an_export_does_not_overwrite_a_folder(filled, make_result, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(StoreError, match="must not exist yet"):
        filled.export(make_result().key, tmp_path / "there")


def test_a_damaged_result_is_not_exported(filled, make_result, tmp_path):
    path = filled.folder(make_result().key) / "arrays.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(StoreError, match="does not match its SHA-256"):
        filled.export(make_result().key, tmp_path / "out.zip")
    assert not (tmp_path / "out.zip").exists()


def zip_with(path, folder, name, content=b"x", mode=None):
    """A zip of a good result and one more member."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"{folder.name}/{file.name}")
        member = zipfile.ZipInfo(name)
        if mode is not None:
            member.create_system, member.external_attr = 3, mode << 16
        archive.writestr(member, content)
    return path


BAD_NAMES = ["../x.json", "/x.json", "a/../../x.json", "a\\..\\x.json", "C:x.json", "x.pkl"]


@pytest.mark.parametrize("name", [*BAD_NAMES, "x.bin", "x.pt", "x.py", "x", ".x.json"])
def test_a_zip_with_a_member_out_of_place_is_refused(filled, other, make_result, tmp_path, name):
    path = zip_with(tmp_path / "x.zip", filled.folder(make_result().key), name)
    with pytest.raises(StoreError, match=r"plain .* files inside its own folder; refused"):
        other.import_from(path)
    assert_untouched(other)
    assert not (tmp_path / "x.json").exists()


def test_a_zip_with_a_symlink_is_refused(filled, other, make_result, tmp_path):
    folder = filled.folder(make_result().key)
    path = zip_with(tmp_path / "x.zip", folder, "x.json", b"/etc/passwd", stat.S_IFLNK | 0o777)
    with pytest.raises(StoreError, match="refused"):
        other.import_from(path)
    assert_untouched(other)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_a_tar_with_a_link_or_a_device_is_refused(filled, other, make_result, tmp_path, kind):
    member = tarfile.TarInfo("x.json")
    member.type, member.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(filled.folder(make_result().key), make_result().key)
        archive.addfile(member)
    with pytest.raises(StoreError, match="refused"):
        other.import_from(tmp_path / "x.tar")
    assert_untouched(other)


@pytest.mark.parametrize("name", ["../x.json", "/x.json", "x.pkl"])
def test_a_tar_with_a_member_out_of_place_is_refused(other, tmp_path, name):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    with pytest.raises(StoreError, match="refused"):
        other.import_from(tmp_path / "x.tar")
    assert_untouched(other)


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_a_tar_with_a_device_file_is_refused(filled, other, tmp_path, kind):
    member = tarfile.TarInfo("a/x.json")
    member.type, member.devmajor, member.devminor = kind, 1, 3
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(member)
    with pytest.raises(StoreError, match="refused"):
        other.import_from(tmp_path / "x.tar")
    assert_untouched(other)


@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_a_zip_with_a_device_is_refused(filled, other, make_result, tmp_path, kind):
    folder = filled.folder(make_result().key)
    path = zip_with(tmp_path / "x.zip", folder, "x.json", b"{}", kind | 0o644)
    with pytest.raises(StoreError, match="refused"):
        other.import_from(path)
    assert_untouched(other)


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", ["model.safetensors", "more.json", "more.jsonl", "more.txt"])
def test_a_pickle_under_an_honest_name_is_refused_and_never_run(
    filled, other, make_result, tmp_path, name
):
    folder = filled.folder(make_result(1).key)
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran"), protocol=4))
    (folder / "manifest.json").unlink()
    write_manifest(folder, ["arrays.safetensors", "result.json", name])
    with pytest.raises(StoreError, match="must hold what its name says") as caught:
        other.import_from(filled.path)
    assert "\n" not in str(caught.value)
    assert_untouched(other)
    assert not (tmp_path / "ran").exists()


def test_a_hard_link_is_copied_and_never_linked(filled, other, make_result, tmp_path):
    folder = filled.folder(make_result(1).key)
    secret = tmp_path / "elsewhere.safetensors"
    os.link(folder / "arrays.safetensors", secret)
    other.import_from(folder)
    copied = other.folder(make_result(1).key) / "arrays.safetensors"
    assert copied.stat().st_nlink == 1
    assert not copied.samefile(secret)


def spoil(folder, how):
    if how == "flipped array":
        path = folder / "arrays.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    elif how == "changed metric":
        path = folder / "result.json"
        path.write_text(path.read_text().replace('"demo"', '"dem0"'))
    elif how == "no manifest entry":
        (folder / "more.json").write_text("{}")
    elif how == "pickle":
        (folder / "weights.bin").write_bytes(b"\x80\x04")
    elif how == "symlink":
        outside = folder.parent / "arrays.safetensors"
        (folder / "arrays.safetensors").rename(outside)
        (folder / "arrays.safetensors").symlink_to(outside)
    elif how == "symlinked result":
        folder.rename(folder.parents[2] / "elsewhere")
        folder.symlink_to(folder.parents[2] / "elsewhere")
    elif how == "symlinked shard":
        shard = folder.parent
        shard.rename(folder.parents[2] / "elsewhere")
        shard.symlink_to(folder.parents[2] / "elsewhere")
    elif how == "fifo":
        (folder / "result.json").unlink()
        os.mkfifo(folder / "result.json")
    elif how == "subfolder":
        (folder / "more.json").mkdir()
    elif how == "wrong key":
        document = json.loads((folder / "result.json").read_text())
        (folder / "result.json").write_text(json.dumps({**document, "key": "../" + "a" * 61}))
    elif how == "no document":
        (folder / "result.json").unlink()


@pytest.mark.parametrize(
    "how",
    [
        "flipped array",
        "changed metric",
        "no manifest entry",
        "pickle",
        "symlink",
        "symlinked result",
        "symlinked shard",
        "fifo",
        "subfolder",
        "wrong key",
        "no document",
    ],
)
def test_if_one_result_is_bad_nothing_is_imported(filled, other, make_result, how):
    spoil(filled.folder(make_result(1).key), how)
    with pytest.raises(StoreError) as caught:
        other.import_from(filled.path)
    assert "\n" not in str(caught.value)
    assert_untouched(other)
    assert filled.shelf.stamps().keys() >= {make_result(0).key, make_result(1).key}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"\x1f\x8b cut short"])
def test_a_file_that_is_no_archive_is_refused(other, tmp_path, content):
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(StoreError, match=r"must be a folder, a \.zip or a \.tar"):
        other.import_from(tmp_path / "x.zip")
    with pytest.raises(StoreError, match="not found"):
        other.import_from(tmp_path / "absent.zip")


def test_an_archive_that_was_cut_short_is_refused(filled, other, tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(filled.path / "results", "results")
    data = (tmp_path / "x.tar.gz").read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(StoreError):
        other.import_from(tmp_path / "x.tar.gz")
    assert_untouched(other)


def test_a_zip_in_a_way_that_nobody_reads_is_refused(filled, other, make_result, tmp_path):
    """Compressed patched data: Python's zipfile has no reader for it."""
    archive = filled.export(make_result().key, tmp_path / "x.zip")
    data = bytearray(archive.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 0x20
    archive.write_bytes(data)
    with pytest.raises(StoreError, match="must be a whole archive: compressed patched data"):
        other.import_from(archive)
    assert_untouched(other)


def test_an_archive_that_claims_more_than_the_disk_holds_is_not_unpacked(
    other, tmp_path, monkeypatch
):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.json", bytes(2000))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StoreError, match="more than the disk has room for"):
        other.import_from(tmp_path / "x.zip")
    assert_untouched(other)


def test_an_empty_folder_holds_nothing_to_import(other, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="none found"):
        other.import_from(tmp_path / "empty")


def test_an_import_killed_before_its_rename_leaves_nothing(filled, other, make_result, tmp_path):
    child = os.fork()
    if child == 0:
        os.environ["WORKBENCH_FAULT"] = "before-rename"
        other.import_from(filled.path)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == 9
    assert other.list() == []
    assert len(other.import_from(filled.path).added) == 3
