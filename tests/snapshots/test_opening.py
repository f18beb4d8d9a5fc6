"""A directory that cannot be trusted, or has an owner, is refused with one clear error.

Damaged or foreign files, a second owner, a disk that fails to sync: nothing is repaired by guessing
and nothing already there is lost.
"""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from protocol.errors import ConflictError, NotFoundError, RequestError, StorageError
from snapshots import metadata as metadata_module
from snapshots.metadata import MetadataFile
from snapshots.replica import Replica
from tests.snapshots.model import Model, kill

SIZE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed replica with one snapshot."""
    model = Model(tmp_path / "replica")
    model.write(0, [1])
    model.seal()
    model.write(0, [2])
    model.replica.close()
    return tmp_path / "replica"


def test_every_flipped_byte_of_replica_json_is_refused(path: Path) -> None:
    text = (path / "replica.json").read_bytes()
    for position in range(len(text)):
        for flip in (0x01, 0x20, 0x80):
            damaged = bytearray(text)
            damaged[position] ^= flip
            with pytest.raises(StorageError, match=r"replica\.json"):
                metadata_module.decode("replica.json", bytes(damaged))
    for length in range(len(text)):
        with pytest.raises(StorageError, match="damaged"):
            metadata_module.decode("replica.json", text[:length])


def test_a_newer_format_is_refused_by_version(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata_module, "FORMAT_VERSION", 3)
    metadata = MetadataFile(os.fspath(path))
    text = metadata.path
    monkeypatch.setattr(metadata_module, "FORMAT_VERSION", 2)
    content = metadata.read()
    monkeypatch.setattr(metadata_module, "FORMAT_VERSION", 3)
    Path(text).write_bytes(metadata_module.encode(content, 9))
    monkeypatch.setattr(metadata_module, "FORMAT_VERSION", 2)
    with pytest.raises(StorageError, match="format version 3"):
        Replica.open(path)


def test_an_impossible_tree_is_refused(path: Path) -> None:
    file = MetadataFile(os.fspath(path))
    metadata = file.read()
    first, second = metadata.layers
    for layers in (
        (replace(first, parent=second.id), second),  # a cycle
        (first, replace(second, slot=first.slot)),
        (first, replace(second, parent=99)),
        (first,),  # no head
        (first, replace(second, slot=256)),
    ):
        text = metadata_module.encode(replace(metadata, layers=layers), 9)
        with pytest.raises(StorageError, match="impossible"):
            metadata_module.decode("replica.json", text)


def test_a_half_written_temporary_is_ignored(path: Path) -> None:
    (path / "replica.json.tmp").write_bytes(b'{"checksum')
    replica = Replica.open(path)
    replica.promise(3)
    replica.close()
    assert Replica.open(path).metadata.promised_epoch == 3


def test_a_second_owner_is_told_who_the_first_is(path: Path) -> None:
    replica = Replica.open(path)
    with pytest.raises(ConflictError, match=f"process {os.getpid()}"):
        Replica.open(path)
    replica.close()
    Replica.open(path).close()


def test_a_missing_or_foreign_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="not a replica directory"):
        Replica.open(tmp_path / "nothing")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="not a replica directory"):
        Replica.open(tmp_path)
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(RequestError, match="not empty"):
        Replica.create(tmp_path, size_bytes=SIZE, replica_uuid="r")
    assert os.listdir(tmp_path) == ["file"]


def test_creating_over_a_replica_is_refused(path: Path) -> None:
    with pytest.raises(ConflictError, match="already"):
        Replica.create(path, size_bytes=SIZE, replica_uuid="r")
    Replica.open(path).close()


@pytest.mark.parametrize("name", ["layers/1.layer", "layers/2.layer", "index", "dirty.log"])
def test_a_missing_file_is_named(path: Path, name: str) -> None:
    (path / name).unlink()
    with pytest.raises(StorageError, match=rf"{name}.* is missing"):
        Replica.open(path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("layers/1.layer", -1),
        ("layers/1.layer", 4096),  # no whole region
        ("layers/2.layer", -1),
        ("layers/2.layer", 4096),
        ("index", -1),
        ("dirty.log", -1),
    ],
)
def test_a_file_of_the_wrong_length_is_named(path: Path, name: str, change: int) -> None:
    os.truncate(path / name, (path / name).stat().st_size + change)
    with pytest.raises(StorageError, match=rf"{name} is .* bytes long"):
        Replica.open(path)


def test_a_layer_of_another_replica_is_refused(path: Path, tmp_path: Path) -> None:
    other = Model(tmp_path / "other")
    other.replica.close()
    os.rename(path / "layers/2.layer", path / "layers/1.layer")
    shutil.copy(path / "layers/1.layer", path / "layers/2.layer")
    with pytest.raises(StorageError, match="another replica or layer"):
        Replica.open(path)


def test_a_refused_open_gives_the_lock_back(path: Path) -> None:
    os.rename(path / "index", path / "elsewhere")
    with pytest.raises(StorageError):
        Replica.open(path)
    os.rename(path / "elsewhere", path / "index")
    Replica.open(path).close()


def test_a_failed_sync_is_never_forgotten(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = Replica.open(path)
    replica.mark_dirty([0])

    def failing(fd: int) -> None:
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failing)
        with pytest.raises(StorageError, match="no longer trusted"):
            replica.flush()
    assert replica.failed
    with pytest.raises(StorageError, match="no longer trusted"):
        replica.flush()
    replica.close()
    assert Replica.open(path).recovered_zones != []


def test_identity_and_promises_survive_a_crash(path: Path) -> None:
    replica = Replica.open(path)
    replica.promise(7)
    replica.promise(7)
    with pytest.raises(ConflictError, match="promised"):
        replica.promise(6)
    replica.store_config(4, {"members": ["a", "b"]})
    replica.bind("uuid", "demo")
    kill(replica)
    metadata = Replica.open(path).metadata
    assert (metadata.promised_epoch, metadata.config_seq) == (7, 4)
    assert metadata.config == {"members": ["a", "b"]}
    assert (metadata.volume_uuid, metadata.volume_name) == ("uuid", "demo")


def test_layer_operations_on_the_wrong_layer_are_refused(path: Path) -> None:
    replica = Replica.open(path)
    with pytest.raises(NotFoundError):
        replica.remove(9)
    with pytest.raises(RequestError, match="head"):
        replica.remove(2)
    with pytest.raises(RequestError, match="head"):
        replica.revert(2, 3)
    with pytest.raises(ConflictError, match="exists already"):
        replica.seal(3, "s1", "", {})
    with pytest.raises(RequestError, match="in use"):
        replica.seal(1, "new", "", {})
    replica.remove(1)
    with pytest.raises(NotFoundError, match="deleted already"):
        replica.remove(1)
    with pytest.raises(NotFoundError, match="deleted"):
        replica.read_into(0, 1, memoryview(bytearray(8192)), 1)
    replica.seal(3, "s1", "", {})  # the name of a deleted snapshot is free
