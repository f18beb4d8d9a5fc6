"""The bodies of the API: what it takes, refusing unknown fields, and what it says of itself."""

from __future__ import annotations

import msgspec

from blockd.node.objects import REBUILD_WAIT_SECONDS, REPLICAS_DEFAULT
from protocol.errors import RequestError

LABELS_MAX = 64
LABEL_BYTES_MAX = 256


class VolumeBody(msgspec.Struct, forbid_unknown_fields=True):
    """A volume to create."""

    name: str
    size_bytes: int
    replicas: int = REPLICAS_DEFAULT
    block_size: int = 4096
    rebuild_wait_seconds: float = REBUILD_WAIT_SECONDS
    rebuild_bandwidth: int | None = None
    min_in_sync: int = 1
    labels: dict[str, str] = {}


class VolumeChangeBody(msgspec.Struct, forbid_unknown_fields=True):
    """What can be changed of a volume; what is not named stays. A bandwidth of null: no cap."""

    rebuild_wait_seconds: float | msgspec.UnsetType = msgspec.UNSET
    rebuild_bandwidth: int | msgspec.UnsetType | None = msgspec.UNSET
    min_in_sync: int | msgspec.UnsetType = msgspec.UNSET


class CloneBody(msgspec.Struct, forbid_unknown_fields=True):
    """The volume to make from a snapshot; what is not named is as that of the volume cloned.

    `full`: shares nothing with it in the end.
    """

    name: str
    replicas: int | None = None
    size_bytes: int | None = None
    full: bool = False
    labels: dict[str, str] = {}


class ResizeBody(msgspec.Struct, forbid_unknown_fields=True):
    """The new size; not below the one it has."""

    size_bytes: int


class AttachBody(msgspec.Struct, forbid_unknown_fields=True):
    """How to attach."""

    frontend: str = "auto"


class MountBody(msgspec.Struct, forbid_unknown_fields=True):
    """Where to mount; the file system is made only on a blank volume."""

    path: str | None = None
    fs: str = "ext4"


class SnapshotBody(msgspec.Struct, forbid_unknown_fields=True):
    """A snapshot to make; `freeze`: while the mounted file system is frozen."""

    name: str
    labels: dict[str, str] = {}
    freeze: bool = False


class RevertBody(msgspec.Struct, forbid_unknown_fields=True):
    """`force`: if the volume is mounted or has NBD clients, unmount it and end them first."""

    force: bool = False


class RebuildBody(msgspec.Struct, forbid_unknown_fields=True):
    """`replica`: only this one; else all that are OUT."""

    replica: str | None = None


class UpgradeBody(msgspec.Struct, forbid_unknown_fields=True):
    """`program`: the Python of another installation of blockd; else the node service's own."""

    program: str | None = None


class EmptyBody(msgspec.Struct, forbid_unknown_fields=True):
    """Nothing to say."""


class ErrorBody(msgspec.Struct):
    """Every error's answer."""

    code: str
    message: str
    retry: bool


class StatusView(msgspec.Struct):
    """The node service itself."""

    version: str
    node: str
    pid: int
    started: str
    home: str
    socket: str
    listen: str | None
    volume_count: int
    attached_count: int
    front_ends: dict[str, str | None]


class VersionView(msgspec.Struct):
    """The program's version and the API's."""

    version: str
    api: str


def checked_labels(labels: dict[str, str]) -> dict[str, str]:
    if len(labels) > LABELS_MAX:
        raise RequestError(f"{len(labels)} labels are too many, the limit is {LABELS_MAX}")
    for key, value in labels.items():
        if not key or len(key.encode()) > LABEL_BYTES_MAX or len(value.encode()) > LABEL_BYTES_MAX:
            raise RequestError(
                f"label {key[:40]!r}: key and value have at most {LABEL_BYTES_MAX} bytes, "
                "and the key is not empty"
            )
    return labels
