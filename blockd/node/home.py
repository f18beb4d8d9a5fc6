"""Where the node service keeps things, and the lock that makes it the only one there.

    HOME/state.db              objects and the authority's records
    HOME/blockd.sock           the API (0600)
    HOME/token                 the bearer token of the API on TCP (0600)
    HOME/serve.lock            held while a node service runs; contains its pid
    HOME/replicas/VOLUME/UUID/ what a replica daemon owns
    HOME/volumes/VOLUME/       key, logs, pid files and, if the paths are short enough, sockets
    HOME/mnt/VOLUME            the default mount point

The path of a unix socket has at most 107 bytes. When HOME is too long for that, the sockets of a
volume are in a directory of a short name, derived from HOME, that only this user may enter.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import stat
from pathlib import Path

from protocol.errors import ConflictError, StorageError

SOCKET_PATH_BYTES_MAX = 107  # sun_path is 108 bytes with its final zero
SOCKET_NAME_BYTES_MAX = len("r-12345678.control")  # the longest name put into a socket directory
KEY_BYTES = 32  # as long as the HMAC-SHA256 it keys
TOKEN_BYTES = 32


class Home:
    """The directory of one node service."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._lock_fd: int | None = None

    def prepare(self) -> None:
        """Make the directories that must exist before anything else."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            for name in ("replicas", "volumes"):
                (self.root / name).mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            raise StorageError(
                f"directory {self.root} cannot be used: {error.strerror}; choose another --home"
            ) from error

    @property
    def state_path(self) -> Path:
        return self.root / "state.db"

    @property
    def api_socket(self) -> Path:
        return self.root / "blockd.sock"

    @property
    def token_path(self) -> Path:
        return self.root / "token"

    def replicas_directory(self, volume: str) -> Path:
        """Where the replicas of a volume are."""
        return self.root / "replicas" / volume

    def volume_directory(self, volume: str) -> Path:
        """Where key, logs and pid files of a volume are."""
        return self.root / "volumes" / volume

    def mount_point(self, volume: str) -> Path:
        """Where a volume is mounted unless told otherwise."""
        return self.root / "mnt" / volume

    def socket_directory(self, volume: str, volume_uid: str) -> Path:
        """Where the sockets of a volume are."""
        inside = self.volume_directory(volume)
        if len(os.fsencode(inside)) + 1 + SOCKET_NAME_BYTES_MAX <= SOCKET_PATH_BYTES_MAX:
            return inside
        return self._runtime_directory() / volume_uid[:8]

    def _runtime_directory(self) -> Path:
        digest = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:12]
        if os.geteuid() == 0 and os.path.isdir("/run"):
            return Path(f"/run/blockd-{digest}")
        base = os.environ.get("XDG_RUNTIME_DIR")
        if base and len(base) <= 40:  # leaves room for the names below it
            return Path(base) / f"blockd-{digest}"
        return Path(f"/tmp/blockd-{os.geteuid()}-{digest}")

    def make_volume_directories(self, volume: str, volume_uid: str) -> None:
        """Make the directories of a volume and its key."""
        private_directory(self.volume_directory(volume))
        sockets = self.socket_directory(volume, volume_uid)
        if sockets != self.volume_directory(volume):
            private_directory(sockets.parent)
            private_directory(sockets)
        key = self.key_path(volume)
        if not key.exists():
            write_private(key, secrets.token_hex(KEY_BYTES) + "\n")

    def key_path(self, volume: str) -> Path:
        """The shared key of a volume's daemons."""
        return self.volume_directory(volume) / "key"

    def token(self, path: Path | None = None) -> str:
        """The API token, made on first use."""
        path = path or self.token_path
        try:
            if not path.exists():
                write_private(path, secrets.token_urlsafe(TOKEN_BYTES) + "\n")
            token = path.read_text().strip()
        except OSError as error:
            raise StorageError(f"token file {path} cannot be used: {error.strerror}") from error
        if len(token) < 16:
            raise StorageError(
                f"token file {path} holds {len(token)} characters, at least 16 are wanted; "
                "remove it to have a new one made"
            )
        return token

    def lock(self) -> None:
        """Become the only node service of this directory, or ConflictError with the other's pid."""
        path = self.root / "serve.lock"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(
                f"{path} cannot be opened: {error.strerror}; run this as the user who owns "
                f"{self.root}, or choose another --home"
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise ConflictError(
                f"a node service runs in {self.root} already (pid {pid}); stop it first, "
                "or choose another --home"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._lock_fd = fd

    def unlock(self) -> None:
        """Let another node service take over."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None


def private_directory(path: Path) -> None:
    """Make `path` for this user only; a directory of someone else is refused."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise StorageError(f"directory {path} cannot be made: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise StorageError(f"{path} belongs to user {found.st_uid}; remove it")
    if found.st_mode & 0o077:
        path.chmod(0o700)


def write_private(path: Path, text: str) -> None:
    """Write a small file only this user can read, whole or not at all."""
    temporary = path.with_name(path.name + ".new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(fd)
    temporary.rename(path)
