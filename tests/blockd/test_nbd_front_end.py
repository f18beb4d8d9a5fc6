"""Proves the parts of the nbd front end that need no nbd driver: the handshake with a real volume
daemon, the netlink messages, how a device is recognised in sysfs, and what makes auto pass it over.
The driver itself is met in tests/guest/test_nbd.py."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from blockd.frontends import choose, nbd, nbd_client, nbd_netlink, tools
from blockd.frontends.base import Target
from blockd.node.objects import Volume
from blockd.node.reconcile_devices import DeviceReconciler
from protocol.errors import PeerError
from protocol.nbd import constants as c
from tests.blockd.node_harness import MIB, WAIT_SECONDS, NodeHarness, until


@pytest.fixture
def target(node: NodeHarness) -> Target:
    """An attached volume."""
    node.create("data")
    node.attach("data", "socket")
    return served(node)


def served(node: NodeHarness, snapshot: str = "") -> Target:
    """The volume as a front end sees it now."""
    volume = node.service.context.store.get(Volume, "data")
    return node.service.context.served_target(volume, volume.status.epoch, snapshot)


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty /sys/block."""
    monkeypatch.setattr(nbd, "_SYS_BLOCK", tmp_path)
    return tmp_path


def test_the_handshake_gives_a_socket_in_the_transmission_phase(target: Target) -> None:
    made = nbd_client.connect(target.device_socket, target.export)
    with made.socket:
        assert made.size_bytes == 64 * MIB
        assert made.flags & c.FLAG_SEND_FLUSH
        assert not made.flags & c.FLAG_READ_ONLY
        assert made.socket.getblocking(), "the kernel waits as long as a request takes"
        made.socket.settimeout(WAIT_SECONDS)  # not the kernel's
        request = struct.pack(">IHHQQI", c.REQUEST_MAGIC, 0, c.CMD_WRITE, 7, 4096, 4096)
        made.socket.sendall(request + b"x" * 4096)
        assert made.socket.recv(16, socket.MSG_WAITALL) == struct.pack(
            ">IIQ", c.SIMPLE_REPLY_MAGIC, 0, 7
        )


def test_a_snapshot_is_offered_read_only(node: NodeHarness, target: Target) -> None:
    node.operations.snapshot_create("data", "one", {}, WAIT_SECONDS)
    made = nbd_client.connect(target.device_socket, "data@one")
    with made.socket:
        assert made.flags & c.FLAG_READ_ONLY
    assert served(node, "one").identity == f"{target.identity}@one"


def test_the_daemon_counts_the_devices_connections_apart(node: NodeHarness, target: Target) -> None:
    assert target.device_connections == 0
    stranger = nbd_client.connect(target.nbd_socket, "data")
    with stranger.socket:
        assert served(node).device_connections == 0, "a client of the public socket is no device"
        device = nbd_client.connect(target.device_socket, "data")
        with device.socket:
            assert served(node).device_connections == 1
        until(lambda: served(node).device_connections == 0, "the end of a connection is seen")


def test_refusals_are_told(target: Target) -> None:
    with pytest.raises(PeerError, match="refuses export 'other'"):
        nbd_client.connect(target.device_socket, "other")
    with pytest.raises(PeerError, match="cannot be reached"):
        nbd_client.connect(target.device_socket.with_name("none"), "data")


@pytest.fixture
def liar(tmp_path: Path) -> Iterator[tuple[Path, list[bytes]]]:
    """A server that says what the list holds, whatever it is told."""
    path, words = tmp_path / "liar", [b""]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            link, _ = listener.accept()
            with link:
                link.sendall(words[0])
                link.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionError):
                    while link.recv(1 << 16):
                        pass

        thread = threading.Thread(target=serve)
        thread.start()
        yield path, words
        thread.join()


GREETING = struct.pack(">QQH", c.INIT_MAGIC, c.OPTION_MAGIC, c.FLAG_FIXED_NEWSTYLE)


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "no NBD server"),
        (struct.pack(">QQH", c.INIT_MAGIC, c.OPTION_MAGIC, 0), "fixed newstyle"),
        (GREETING + struct.pack(">QIII", 1, c.OPT_GO, c.REP_ACK, 0), "magic 0x1"),
        (GREETING + struct.pack(">QIII", c.OPTION_REPLY_MAGIC, 7, 1, 1 << 30), "1073741824 bytes"),
        (GREETING + struct.pack(">QIII", c.OPTION_REPLY_MAGIC, 7, c.REP_ACK, 0), "how long"),
        (GREETING, "closed the connection|reset"),
    ],
)
def test_nonsense_ends_the_handshake(
    liar: tuple[Path, list[bytes]], said: bytes, complaint: str
) -> None:
    liar[1][0] = said
    with pytest.raises(PeerError, match=complaint):
        nbd_client.connect(liar[0], "data")


def attributes(message: bytes) -> dict[int, bytes]:
    """Netlink attributes by number, from a message with its two headers or a nested attribute."""
    found = {}
    while message:
        length, kind = struct.unpack_from("=HH", message)
        found[kind & 0x3FFF] = message[4:length]
        message = message[(length + 3) & ~3 :]
    return found


def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, dict[int, bytes]]]:
    """What would go to the kernel: command and attributes, encoded and taken apart again."""
    messages: list[tuple[int, dict[int, bytes]]] = []

    def request(command: int, items: list[list[object]]) -> list[object]:
        data = nbd_netlink.encoded(command, items)
        assert data[16:18] == bytes([command, nbd_netlink.VERSION])
        messages.append((command, attributes(data[20:])))
        return []

    monkeypatch.setattr(nbd_netlink, "_request", request)
    return messages


def test_messages_have_the_kernels_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of include/uapi/linux/nbd-netlink.h, written out once more."""
    messages = sent(monkeypatch)
    with pytest.raises(nbd_netlink.KernelError, match="did not say which"):
        nbd_netlink.connect(
            [5], size_bytes=1 << 40, block_size=512, flags=0x2D, dead_seconds=60, backend="uuid"
        )
    command, found = messages[0]
    numbers = {kind: int.from_bytes(found[kind], "little") for kind in (2, 3, 5, 8)}
    assert command == 1
    assert numbers == {2: 1 << 40, 3: 512, 5: 0x2D, 8: 60}
    assert found[10].rstrip(b"\0") == b"uuid"
    assert 1 not in found, "the kernel chooses the device"
    assert 4 not in found, "a timeout would reset the queue's timer"
    assert attributes(attributes(found[7])[1]) == {1: struct.pack("=I", 5)}


def test_reconnecting_names_nothing_that_would_freeze_the_queue_or_reset_its_timer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    messages = sent(monkeypatch)
    nbd_netlink.reconnect(3, [5, 6], dead_seconds=60, backend="uuid")
    nbd_netlink.resize(3, size_bytes=1 << 30, backend="uuid")
    nbd_netlink.disconnect(3)
    assert [(command, set(found)) for command, found in messages] == [
        (3, {1, 7, 8, 10}),
        (3, {1, 2, 10}),
        (2, {1}),
    ]


def _device(sysfs: Path, index: int, identity: str | None) -> None:
    (sysfs / f"nbd{index}").mkdir()
    if identity is not None:
        (sysfs / f"nbd{index}" / "backend").write_text(f"{identity}\n")


def test_a_device_is_known_by_its_identifier_alone(target: Target, sysfs: Path) -> None:
    front_end = nbd.NbdFrontEnd()
    _device(sysfs, 0, None)
    _device(sysfs, 1, f"{target.identity}@one")
    assert front_end.find(target) is None
    _device(sysfs, 12, target.identity)
    found = front_end.find(replace(target, daemon="any"))
    assert found is not None
    assert found.device == "/dev/nbd12"
    assert not found.stale


def test_a_device_that_was_cut_off_is_not_found_again(
    target: Target, sysfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lives on while it is open, and the kernel would connect it again."""
    monkeypatch.setattr(nbd_netlink, "disconnect", lambda index: None)
    front_end = nbd.NbdFrontEnd()
    _device(sysfs, 0, target.identity)
    front_end.cut_off(target)
    assert front_end.find(target) is None
    _device(sysfs, 1, target.identity)
    found = front_end.find(target)
    assert found is not None
    assert found.device == "/dev/nbd1"
    # Once it is closed and gone, its index may be this volume's again.
    (sysfs / "nbd0" / "backend").unlink()
    nbd._forget_cut_off(target)
    (sysfs / "nbd1" / "backend").unlink()
    (sysfs / "nbd0" / "backend").write_text(target.identity)
    assert front_end.find(target) is not None


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("os.geteuid", 1000, "root"),
        ("blockd.frontends.nbd._may_administer", False, "CAP_SYS_ADMIN"),
        ("blockd.frontends.nbd.kernel_version", (5, 10), "older than 5.14"),
        ("blockd.frontends.nbd.find_spec", None, "pip install pyroute2"),
        ("blockd.frontends.nbd._load_driver", False, "modprobe nbd"),
    ],
)
def test_what_is_missing_is_said(
    monkeypatch: pytest.MonkeyPatch, name: str, value: object, reason: str
) -> None:
    for each, good in (
        ("os.geteuid", 0),
        ("blockd.frontends.nbd._may_administer", True),
        ("blockd.frontends.nbd.kernel_version", (6, 12)),
        ("blockd.frontends.nbd._load_driver", True),
        (name, value),
    ):
        monkeypatch.setattr(each, lambda *_, answer=good: answer)
    assert reason in str(nbd.NbdFrontEnd().unavailable())


def test_auto_prefers_the_kernels_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd.NbdFrontEnd, "unavailable", lambda self: None)
    assert choose("auto").name == "nbd"


def test_the_module_is_loaded_with_the_administrators_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    monkeypatch.setattr(Path, "is_dir", lambda path: False)
    monkeypatch.setattr(tools, "path_of", lambda tool: tool)
    monkeypatch.setattr(tools, "attempt", lambda tool, words: calls.append([tool, *words]))
    assert not nbd._load_driver()
    assert calls == [["modprobe", "--quiet", "nbd"]]


def test_pyroute2_is_not_loaded_before_a_device_is_used() -> None:
    """It costs 28 MiB."""
    code = "import sys, blockd.node.service; sys.exit('pyroute2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("all_die", [False, True])
def test_a_volume_whose_user_lives_is_opened_again_on_the_same_boot(
    node: NodeHarness, monkeypatch: pytest.MonkeyPatch, replicas: int, all_die: bool
) -> None:
    monkeypatch.setattr(DeviceReconciler, "is_alive", lambda self, volume: True)
    monkeypatch.setattr(DeviceReconciler, "cut_off", lambda self, volume: pytest.fail("cut off"))
    node.create("data", replicas=replicas)
    before = node.attach("data", "socket")
    pids = {before.pid} | ({item.pid for item in before.replicas} if all_die else set())
    for pid in pids:
        assert pid
        os.kill(pid, signal.SIGKILL)
    until(lambda: node.view("data").pid not in (None, before.pid), "the next volume daemon")
    words = Path(f"/proc/{node.view('data').pid}/cmdline").read_text().split("\0")
    assert "--consumer-alive" in words
