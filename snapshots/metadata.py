"""replica.json: what a replica knows about itself, replaced as a whole and never edited.

Writing is: temporary file, fsync, rename, fsync of the directory; so a crash leaves the old or the
new text, and a half-written temporary is overwritten by the next write. The text is canonical (keys
sorted, fixed indentation) and carries a BLAKE2b checksum of itself without that line; anything that
does not come out byte for byte the same when encoded again is refused.

`Metadata` and `LayerInfo` are immutable: a change is a new value, made durable and then adopted.
Writes may come from the event loop and from a flush thread; each text carries its number, the
generation, given when it was composed, and an older text never replaces a younger one.

Next to it `replica.pending.json` says what the tree became after replica.json was written, in three
lines: the id of this boot of the kernel, a checksum, the fields. It is written within a millisecond
and renamed into place without any fsync. A process that
was killed left all its writes in the page cache, so its successor goes on with that tree if the
boot is still the same and the text is younger than replica.json. After a power cut it is ignored.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from dataclasses import dataclass, field
from typing import Any

from protocol.checksum import blake2b
from protocol.errors import StorageError
from protocol.units import SNAPSHOTS_MAX
from snapshots.reserve import FULL_DISK, Reserve
from snapshots.syscalls import storage_error, sync_directory, write_all

FORMAT_VERSION = 2
FILE_NAME = "replica.json"
PENDING_NAME = "replica.pending.json"
BOOT_ID_PATH = "/proc/sys/kernel/random/boot_id"
_TEXT_BYTES_MAX = 16 << 20  # 255 layers with labels are far below


@dataclass(frozen=True)
class LayerInfo:
    """One layer of the tree. `slot` is local; `id` is the same on every member."""

    id: int
    slot: int
    parent: int = 0  # layer id, 0 = none
    name: str = ""
    created: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    removed: bool = False
    origin: str = ""  # the replica that made the file if that is another one (cloning.py)
    allocated_bytes: int = 0  # filled by Replica.tree(), not stored


@dataclass(frozen=True)
class Metadata:
    """The content of replica.json."""

    replica_uuid: str
    size_bytes: int
    volume_uuid: str = ""
    volume_name: str = ""
    promised_epoch: int = 0
    fenced_boot: str = ""  # the boot of the kernel in which its owner called it equal
    config_seq: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    layers: tuple[LayerInfo, ...] = ()
    head_id: int = 0  # 0 only between two steps of begin_sync
    clean: bool = True
    complete: bool = True
    hollow: bool = False  # content was dropped to be filled anew, and that has not ended yet
    unshare: bool = False  # layers that other directories have, too, are folded as if they had not


def boot_id() -> str:
    """Which boot of the kernel this is; "" where the kernel does not say."""
    try:
        with open(BOOT_ID_PATH, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def encode(metadata: Metadata, generation: int) -> bytes:
    """The canonical text."""
    fields = _fields(metadata, generation)
    fields["checksum"] = blake2b(_text(fields), digest_size=16).hexdigest()
    return _text(fields)


def _fields(metadata: Metadata, generation: int) -> dict[str, Any]:
    fields = dict(vars(metadata))
    if generation:  # texts of before there were generations have none
        fields["generation"] = generation
    if not metadata.unshare:  # as in texts of before there were clones
        del fields["unshare"]
    fields["format_version"] = FORMAT_VERSION
    fields["layers"] = [_layer_fields(layer) for layer in metadata.layers]
    return fields


def _layer_fields(layer: LayerInfo) -> dict[str, Any]:
    fields = dict(vars(layer))
    del fields["allocated_bytes"]
    if not layer.origin:
        del fields["origin"]
    return fields


def _text(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, indent=1, ensure_ascii=True).encode() + b"\n"


def _line_checksum(text: bytes) -> bytes:
    return blake2b(text, digest_size=16).hexdigest().encode()


def decode(path: str, text: bytes) -> tuple[Metadata, int]:
    """The metadata in `text` and its generation, or StorageError; `path` is for the message."""
    damaged = (
        f"{path} is damaged (checksum or form does not match); restore it from a copy of this "
        "directory, or remove the directory and rebuild the replica from another"
    )
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise StorageError(damaged) from error
    if not isinstance(fields, dict):
        raise StorageError(damaged)
    version = fields.pop("format_version", None)
    checksum = fields.pop("checksum", None)
    expected = blake2b(_text({**fields, "format_version": version}), digest_size=16)
    if checksum != expected.hexdigest():
        raise StorageError(damaged)
    if version != FORMAT_VERSION:
        raise StorageError(
            f"{path} has format version {version}, this program knows {FORMAT_VERSION}; "
            "open it with the version of blockd that wrote it"
        )
    try:
        generation = int(fields.pop("generation", 0))
        layers = tuple(LayerInfo(**layer) for layer in fields.pop("layers"))
        metadata = Metadata(layers=layers, **fields)
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(damaged) from error
    if encode(metadata, generation) != text:
        raise StorageError(damaged)
    check_tree(path, metadata)
    return metadata, generation


def check_tree(path: str, metadata: Metadata) -> None:
    """Refuse a tree that cannot be: double ids or slots, unknown parents, cycles, no head."""
    by_id = {layer.id: layer for layer in metadata.layers}
    slots = {layer.slot for layer in metadata.layers}
    well_formed = (
        len(by_id) == len(slots) == len(metadata.layers) <= SNAPSHOTS_MAX + 1
        and all(0 < slot <= SNAPSHOTS_MAX + 1 for slot in slots)
        and (metadata.head_id in by_id or (metadata.head_id == 0 and not by_id))
        and all(0 < layer.id < 1 << 32 for layer in metadata.layers)
    )
    for layer in metadata.layers:
        steps, current = 0, layer
        while well_formed and current.parent:
            steps += 1
            well_formed = current.parent in by_id and steps <= len(by_id)
            current = by_id.get(current.parent, current)
    if not well_formed:
        raise StorageError(f"{path} holds an impossible layer tree; rebuild this replica")


class MetadataFile:
    """replica.json in one directory, written from two threads in composition order."""

    reserve: Reserve  # set by the owner of the directory before the first write

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self.path = os.path.join(directory, FILE_NAME)
        self._pending_path = os.path.join(directory, PENDING_NAME)
        self._lock = threading.Lock()  # held for one write; see the module text
        self._composed = 0  # the youngest generation
        self._written = 0  # the one in replica.json

    def read(self) -> Metadata:
        """The durable content."""
        try:
            with open(self.path, "rb") as file:
                text = file.read(_TEXT_BYTES_MAX)
        except FileNotFoundError as error:
            raise StorageError(
                f"{self._directory} is not a replica directory: {FILE_NAME} is missing; "
                "check the path, or create the replica first"
            ) from error
        except OSError as error:
            raise storage_error("reading", self.path, error) from error
        metadata, self._written = decode(self.path, text)
        self._composed = max(self._composed, self._written)
        return metadata

    def read_pending(self) -> Metadata | None:
        """After `read`: the tree a killed process went on to without it being durable yet."""
        try:
            with open(self._pending_path, "rb") as file:
                boot, checksum, text = (file.read(_TEXT_BYTES_MAX) + b"\n\n").split(b"\n")[:3]
        except FileNotFoundError:
            return None
        except OSError as error:
            raise storage_error("reading", self._pending_path, error) from error
        if not boot or boot != boot_id().encode():
            return None
        if checksum != _line_checksum(text):
            raise StorageError(f"{self._pending_path} is damaged; rebuild this replica")
        fields = json.loads(text)
        generation = int(fields.pop("generation"))
        if generation <= self._written or fields.pop("format_version") != FORMAT_VERSION:
            return None
        layers = tuple(LayerInfo(**layer) for layer in fields.pop("layers"))
        metadata = Metadata(layers=layers, **fields)
        check_tree(self._pending_path, metadata)
        self._composed = max(self._composed, generation)
        return metadata

    def write_pending(self, metadata: Metadata) -> None:
        """Leave a tree for the process that comes after a kill; quick, nothing is synced."""
        boot = boot_id()
        if not boot:
            return
        self._composed += 1
        text = json.dumps(_fields(metadata, self._composed)).encode()
        text = b"\n".join((boot.encode(), _line_checksum(text), text))
        temporary = self._pending_path + ".tmp"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                write_all(fd, text, 0)
            finally:
                os.close(fd)
            os.rename(temporary, self._pending_path)
        except OSError as error:
            raise storage_error("writing", self._pending_path, error) from error

    def remove_pending(self) -> None:
        """Tidy up; a file that stays is older than replica.json and ignored."""
        for path in (self._pending_path, self._pending_path + ".tmp"):
            with contextlib.suppress(OSError):
                os.unlink(path)

    def compose(self, metadata: Metadata) -> tuple[int, bytes]:
        """The numbered text of `metadata`, to be passed to `write` (event loop only)."""
        self._composed += 1
        return self._composed, encode(metadata, self._composed)

    def write(self, numbered: tuple[int, bytes]) -> None:
        """Make a text durable unless a younger one is already; any thread."""
        number, text = numbered
        with self._lock:
            if number <= self._written:
                return
            try:
                try:
                    self._replace(text)
                except OSError as error:
                    if error.errno not in FULL_DISK:
                        raise
                    self.reserve.release()
                    self._replace(text)
            except OSError as error:
                raise storage_error("writing", self.path, error) from error
            self._written = number
            self.reserve.refill()

    def _replace(self, text: bytes) -> None:
        temporary = self.path + ".tmp"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            write_all(fd, text, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, self.path)
        sync_directory(self._directory)
