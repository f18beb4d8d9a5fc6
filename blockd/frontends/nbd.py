"""The `nbd` front end: the kernel's own NBD client.

    kernel -> /dev/nbdN -> unix socket (device.sock) -> volume daemon

The node service makes the connection and the handshake and gives the socket to the kernel by
netlink; from then on the kernel and the volume daemon talk without it. The device is known by its
backend identifier in sysfs (the volume's UUID), never by what somebody remembers.

The device outlives the volume daemon. While its connection is dead the kernel lets I/O wait for up
to DEAD_SECONDS, and `attach` gives it a connection to the next volume daemon. Whether it has one
is what the daemon counts on `device_socket`, where nobody else connects: RECONFIGURE drops a
socket without a word while the kernel still takes the old connection for alive, so `attach` is
called again until the daemon has the connection.

Requests that were sent to the dead daemon and not answered are sent again when the block layer's
request timer next looks at them (nbd_xmit_timeout: without TIMEOUT a request whose connection was
replaced is requeued, any other one goes on waiting). The timer is REQUEUE_MS, set in sysfs. That is
right for one connection only; why there is only one: docs/decisions/nbd-device.md.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from importlib.util import find_spec
from pathlib import Path

from blockd.frontends import nbd_client, tools
from blockd.frontends.base import Attachment, Target
from blockd.frontends.busy import refuse_if_used
from protocol.errors import ConflictError, PeerError, StateError
from protocol.nbd import constants as c

DEAD_SECONDS = 3600  # the file system sees no error while the volume has no daemon, so long
REQUEUE_MS = 500  # the block layer adds about a second of its own (blk_round_jiffies)
KERNEL_FIRST = (5, 14)  # the first with backend identifiers
NODE_SECONDS = 10.0  # devtmpfs makes the node within milliseconds
END_SECONDS = 15.0
POLL_SECONDS = 0.02
KERNEL_FLAGS = (
    c.FLAG_HAS_FLAGS
    | c.FLAG_READ_ONLY
    | c.FLAG_SEND_FLUSH
    | c.FLAG_SEND_FUA
    | c.FLAG_ROTATIONAL
    | c.FLAG_SEND_TRIM
    | c.FLAG_SEND_WRITE_ZEROES  # since 6.12; older ones ignore it
    | c.FLAG_CAN_MULTI_CONN
)
_CAP_SYS_ADMIN = 21
_SECTOR_BYTES = 512  # of /sys/block/*/size, whatever the device's own are
_SYS_BLOCK = Path("/sys/block")


class NbdFrontEnd:
    """A device of the kernel's nbd driver."""

    name = "nbd"
    reconnects = True

    def unavailable(self) -> str | None:
        if kernel_version() < KERNEL_FIRST:
            return f"kernel {os.uname().release} is older than 5.14; nbd-client serves there"
        if find_spec("pyroute2") is None:
            return "the Python package pyroute2 is not installed; pip install pyroute2"
        return driver_lacks()

    def find(self, target: Target) -> Attachment | None:
        index = _find(target)
        return None if index is None else Attachment(f"/dev/nbd{index}")

    def attach(self, target: Target) -> Attachment:
        # Loaded as soon as there is a device: when it is needed next, I/O may stand still.
        from blockd.frontends import nbd_netlink  # noqa: F401

        index = _find(target)
        if index is None:
            index = self._connect(target)
        elif not target.device_connections:
            self._reconnect(target, index)
        device = f"/dev/nbd{index}"
        _set_timer(target, index)
        _grow(target, index)
        _wait_for_node(target, device)
        return Attachment(device)

    def detach(self, target: Target) -> None:
        index = _find(target)
        if index is None:
            return
        refuse_if_used(target, f"/dev/nbd{index}")
        from blockd.frontends import nbd_netlink

        nbd_netlink.disconnect(index)
        deadline = time.monotonic() + END_SECONDS
        while _backend(index) == target.identity:
            if time.monotonic() > deadline:
                raise ConflictError(
                    f"{target.what}: the kernel has not let go of /dev/nbd{index} within "
                    f"{END_SECONDS:g} s; close what has it open and detach again"
                )
            time.sleep(POLL_SECONDS)

    def cut_off(self, target: Target) -> None:
        """Take the device down for good although it is used: whoever uses it gets I/O errors.

        While it is open the kernel would still connect it again; the mark keeps `attach` from that.
        """
        index = _find(target)
        if index is not None:
            from blockd.frontends import nbd_netlink

            _cut_off_mark(target).write_text(f"{index}\n")
            nbd_netlink.disconnect(index)

    def _connect(self, target: Target) -> int:
        from blockd.frontends import nbd_netlink

        _forget_cut_off(target)
        if not _load_driver():
            raise StateError(f"{target.what}: {_no_driver_text()}")
        made = nbd_client.connect(target.device_socket, target.export)
        try:
            index = nbd_netlink.connect(
                [made.socket.fileno()],
                size_bytes=made.size_bytes,
                block_size=target.block_size,
                flags=made.flags & KERNEL_FLAGS,
                dead_seconds=DEAD_SECONDS,
                backend=target.identity,
            )
        finally:
            made.socket.close()
        if _backend(index) != target.identity:
            nbd_netlink.disconnect(index)
            raise StateError(
                f"{target.what}: the kernel does not show the identifier of /dev/nbd{index} in "
                f"/sys/block/nbd{index}/backend; is /sys mounted?"
            )
        return index

    def _reconnect(self, target: Target, index: int) -> None:
        from blockd.frontends import nbd_netlink

        made = nbd_client.connect(target.device_socket, target.export)
        try:
            if made.size_bytes < _size_bytes(index):
                raise PeerError(
                    f"{target.what} has {made.size_bytes} bytes, its device /dev/nbd{index} "
                    f"{_size_bytes(index)}; detach it and attach it again"
                )
            nbd_netlink.reconnect(
                index,
                [made.socket.fileno()],
                dead_seconds=DEAD_SECONDS,
                backend=target.identity,
            )
        finally:
            made.socket.close()


def driver_lacks() -> str | None:
    """Why the kernel's driver cannot be used here, None if it can."""
    if os.geteuid() != 0:
        return "it needs root; the socket front end does not"
    if not _may_administer():
        return "it needs CAP_SYS_ADMIN, which this container or service does not have"
    return None if _load_driver() else _no_driver_text()


def kernel_version() -> tuple[int, int]:
    """Major and minor number of the running kernel."""
    words = os.uname().release.split("-")[0].split(".")
    return int(words[0]), int(words[1])


def _may_administer() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_SYS_ADMIN & 1)
    return False


def _load_driver() -> bool:
    """Is the driver there? Loads its module, with the options the machine's administrator chose."""
    if Path("/sys/module/nbd").is_dir():
        return True
    if tools.path_of("modprobe") is not None:
        tools.attempt("modprobe", ["--quiet", "nbd"])
    return Path("/sys/module/nbd").is_dir()


def _no_driver_text() -> str:
    return f"kernel {os.uname().release} has no nbd driver, or it cannot be loaded (modprobe nbd)"


def _find(target: Target) -> int | None:
    """The index of this target's device; one that was cut off is not it any more."""
    found = None
    for entry in _SYS_BLOCK.glob("nbd*/backend"):
        index = int(entry.parent.name.removeprefix("nbd"))
        if _backend(index) == target.identity and index != _cut_off_index(target):
            found = index
    return found


def _cut_off_mark(target: Target) -> Path:
    return target.directory / "nbd-cut-off"


def _cut_off_index(target: Target) -> int | None:
    try:
        return int(_cut_off_mark(target).read_text())
    except (OSError, ValueError):
        return None


def _forget_cut_off(target: Target) -> None:
    """Drop the mark once the device is gone: its index may be given to another one."""
    index = _cut_off_index(target)
    if index is not None and _backend(index) != target.identity:
        _cut_off_mark(target).unlink()


def _backend(index: int) -> str | None:
    """The identifier of a device, None if it is not set up."""
    try:
        return (_SYS_BLOCK / f"nbd{index}" / "backend").read_text().rstrip("\n")
    except OSError:
        return None


def _size_bytes(index: int) -> int:
    return int((_SYS_BLOCK / f"nbd{index}" / "size").read_text()) * _SECTOR_BYTES


def _grow(target: Target, index: int) -> None:
    """Give the device the volume's size; not while it has no connection (see nbd_netlink)."""
    if target.read_only or not target.device_connections:
        return  # the connection of a snapshot keeps the size it began with
    if target.size_bytes > _size_bytes(index):
        from blockd.frontends import nbd_netlink

        nbd_netlink.resize(index, size_bytes=target.size_bytes, backend=target.identity)


def _set_timer(target: Target, index: int) -> None:
    """Have unanswered requests looked at often; only those of a dead connection are sent again.

    The kernel lets the queue run empty before it changes the timer. So that is done once, when the
    device is new, and by another process: one that waits here for ever could not be replaced.
    """
    path = _SYS_BLOCK / f"nbd{index}" / "queue" / "io_timeout"
    with contextlib.suppress(OSError):  # a kernel that lacks it looks every 30 s
        if path.read_text().strip() != str(REQUEUE_MS):
            script = 'echo "$0" >"$1"'
            tools.attempt("sh", ["-c", script, str(REQUEUE_MS), str(path)], server=target.server)


def _wait_for_node(target: Target, device: str) -> None:
    deadline = time.monotonic() + NODE_SECONDS
    while True:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISBLK(os.stat(device).st_mode):
                return
        if time.monotonic() > deadline:
            raise StateError(
                f"{target.what}: {device} has not appeared within {NODE_SECONDS:g} s; is /dev "
                "the kernel's devtmpfs?"
            )
        time.sleep(POLL_SECONDS)
