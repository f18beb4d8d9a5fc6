"""Proves that clients written by others (libnbd, QEMU, fio) agree with this side of NBD: they list,
negotiate, read, write, trim, map and copy against the model server of the harness on a socket.

The transcripts share their author's reading of the specification; these clients do not.
"""

from __future__ import annotations

import json
import selectors
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.nbd.errors import ProtocolViolation
from tests.protocol.nbd_harness import BLOCK_BYTES, SIZE_BYTES, Server, new_disk

CLIENT_DEADLINE_SECONDS = 30


class Host:
    """Serves one shared disk on a unix socket, in a thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.disk = new_disk()
        self.violations: list[str] = []
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._waker, self._wake = socket.socketpair()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._waker, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def uri(self, export: str = "vol") -> str:
        return f"nbd+unix:///{export}?socket={self.path}"

    def close(self) -> None:
        self._wake.send(b"x")
        self._thread.join(CLIENT_DEADLINE_SECONDS)
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._wake.close()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._waker:
                    return
                if key.fileobj is self._listener:
                    connection, _ = self._listener.accept()
                    connection.settimeout(CLIENT_DEADLINE_SECONDS)
                    server = Server(self.disk)
                    connection.sendall(server.handshake.greeting)
                    self._selector.register(connection, selectors.EVENT_READ, server)
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._serve(key.fileobj, key.data)

    def _serve(self, connection: socket.socket, server: Server) -> None:
        try:
            data = connection.recv(1 << 16)
            if data:
                connection.sendall(server.receive(data))
        except ProtocolViolation as violation:
            self.violations.append(str(violation))
            data = b""
        except OSError:
            data = b""
        if not data or server.state == "closed":
            self._selector.unregister(connection)
            connection.close()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    served = Host(tmp_path / "s")
    yield served
    served.close()
    assert served.violations == []


def run(*command: str) -> str:
    """Standard output of a client, which must succeed."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=CLIENT_DEADLINE_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_nbdinfo_lists_every_export_with_what_it_can_do(host: Host) -> None:
    exports = json.loads(run("nbdinfo", "--json", "--list", host.uri("")))["exports"]
    assert [export["export-name"] for export in exports] == ["vol", "vol@snap", "small", "sector"]
    volume, snapshot, small, sector = exports
    assert volume["export-size"] == SIZE_BYTES
    assert volume["contexts"] == ["base:allocation"]
    assert volume["description"] == "a volume"
    for ability in ("can_trim", "can_zero", "can_fua", "can_flush", "can_multi_conn", "can_df"):
        assert volume[ability] is True, ability
    assert (volume["is_read_only"], snapshot["is_read_only"]) == (False, True)
    assert (snapshot["can_trim"], snapshot["can_zero"]) == (False, False)
    assert small["block_size_maximum"] == 8192
    assert sector["block_size_minimum"] == 512


def test_nbdinfo_maps_data_and_holes(host: Host) -> None:
    extents = json.loads(run("nbdinfo", "--json", "--map", host.uri()))
    assert [(e["offset"], e["length"], e["type"]) for e in extents] == [
        (0, BLOCK_BYTES, 3),
        (BLOCK_BYTES, BLOCK_BYTES, 0),
        (2 * BLOCK_BYTES, SIZE_BYTES - 2 * BLOCK_BYTES, 3),
    ]


def test_nbdcopy_copies_in_and_out(host: Host, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(b"".join(bytes([n]) * BLOCK_BYTES for n in (1, 0, 0, 2)) * 4)
    run("nbdcopy", "--flush", str(source), host.uri())
    assert host.disk == source.read_bytes()
    run("nbdcopy", host.uri("vol@snap"), str(copy))
    assert copy.read_bytes() == source.read_bytes()


def test_qemu_img_maps_converts_and_compares(host: Host, tmp_path: Path) -> None:
    spans = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", host.uri()))
    assert [(s["start"], s["data"]) for s in spans] == [(0, False), (4096, True), (8192, False)]
    copy = tmp_path / "copy"
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", host.uri(), str(copy))
    assert copy.read_bytes() == host.disk
    host.disk[:] = bytes(SIZE_BYTES)
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(copy), host.uri())
    assert host.disk == new_disk()
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(copy), host.uri())


def test_qemu_io_reads_writes_zeroes_and_discards(host: Host) -> None:
    commands = ("write -P 7 0 12288", "write -f -P 8 4096 512", "write -z 8192 4096",
                "discard 0 4096", "flush", "read -P 0 0 4096", "read -P 8 4096 512",
                "read -P 7 4608 3584", "read -P 0 8192 4096")  # fmt: skip
    arguments = [part for command in commands for part in ("-c", command)]
    output = run("qemu-io", "-f", "raw", *arguments, host.uri())
    assert "fail" not in output.lower()


ERRORS = """
import errno
def refused(number, call, *arguments, **options):
    try:
        call(*arguments, **options)
    except nbd.Error as error:
        assert error.errnum == number, error
    else:
        raise AssertionError("not refused")
h.set_strict_mode(0)
h.add_meta_context("base:allocation")
h.connect_uri(URI)
end = h.get_size()
assert h.get_structured_replies_negotiated()
refused(errno.EINVAL, h.pread, 2, end - 1)
refused(errno.ENOSPC, h.pwrite, b"ab", end - 1)
refused(errno.ENOSPC, h.zero, 2, end - 1)
refused(errno.EINVAL, h.trim, 2, end - 1)
refused(errno.EINVAL, h.cache, 2, end - 1)
refused(errno.EINVAL, h.block_status, 2, end - 1, lambda *a: 0)
refused(errno.EINVAL, h.pwrite, b"a", 0, nbd.CMD_FLAG_REQ_ONE)
refused(errno.EOPNOTSUPP, h.zero, 512, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
h.zero(512, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_FUA)
h.pwrite(b"", 0)
h.trim(0, 0)
assert h.pread(4, 4094, nbd.CMD_FLAG_DF) == b"\\0\\0ZZ"
assert h.pread(4, 4094) == b"\\0\\0ZZ"
seen = []
h.block_status(end, 0, lambda name, offset, extents, error: seen.append((name, extents)) or 0)
assert seen == [("base:allocation", [4096, 3, 4096, 0, end - 8192, 3])], seen
h.shutdown()
"""


OLD_STYLE = """
h.set_request_structured_replies(False)
h.set_handshake_flags(0)
h.connect_uri(URI)
assert h.get_protocol() == "newstyle", h.get_protocol()
assert h.pread(4, 4094) == b"\\0\\0ZZ"
h.pwrite(b"abc", 1)
assert h.pread(5, 0) == b"\\0abc\\0"
h.shutdown()
"""


def run_libnbd(host: Host, script: str) -> None:
    """Run a script with `h`, a libnbd handle; its module belongs to the system's Python."""
    python = "/usr/bin/python3"
    if not Path(python).exists() or subprocess.call(
        [python, "-c", "import nbd"], stderr=subprocess.DEVNULL
    ):
        pytest.skip("libnbd for Python is not installed (Debian package python3-libnbd)")
    run(python, "-c", f"import nbd\nh = nbd.NBD()\nURI = {host.uri()!r}\n{script}")


def test_libnbd_sees_the_errors_of_the_specification(host: Host) -> None:
    run_libnbd(host, ERRORS)


def test_libnbd_works_with_export_name_zeroes_and_simple_replies(host: Host) -> None:
    run_libnbd(host, OLD_STYLE)


def test_fio_verifies_what_it_wrote(host: Host) -> None:
    if shutil.which("fio") and "nbd" not in run("fio", "--enghelp"):
        pytest.skip("fio was built without its nbd engine")
    run("fio", "--name=t", "--ioengine=nbd", f"--uri={host.uri()}", "--rw=randwrite", "--bs=512",
        "--verify=crc32c", "--iodepth=16", f"--size={SIZE_BYTES}", "--output-format=json",
        "--verify_state_save=0")  # fmt: skip
