"""Proves what the kernel makes of an engine's answers: the real driver, and an engine in memory.

The engine of a volume never answers ENOSPC (a full disk pauses writes), so only here is shown that
an errno reaches the program. With SPEED=1 it also measures the front end by itself.
"""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import threading
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from blockd.daemons.ublk_devices import UblkDevices
from blockd.frontends.ublk import UblkFrontEnd
from blockd.kernel import ublk
from blockd.loop import Loop
from protocol import replica as wire
from protocol.errors import BlockdError
from protocol.units import BLOCK_BYTES

REASON = UblkFrontEnd().unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no ublk here: {REASON}")
SIZE = 64 << 20
FULL_AT = 48 << 20  # writes that begin in this MiB answer ENOSPC
BROKEN_AT = 56 << 20  # reads that begin in this MiB answer EIO


class MemoryEngine:
    """Answers at once, from a bytearray."""

    def __init__(self) -> None:
        self.memory = bytearray(SIZE)
        self.record = SimpleNamespace(volume_uuid="memory", size_bytes=SIZE)
        self.calls: list[tuple[Any, ...]] = []
        self.cells = bytearray(128 * wire.CELL_BYTES)

    def next_turn(self) -> None:
        pass

    def write(self, client: Any, cookie: int, offset: int, data: memoryview, fua: bool) -> None:
        if fua:
            self.calls.append(("fua", offset))
        if offset >> 20 == FULL_AT >> 20:
            client.done(cookie, errno.ENOSPC)
            return
        self.memory[offset : offset + len(data)] = data
        client.done(cookie, 0)

    def read(self, client: Any, cookie: int, offset: int, length: int, layer_id: int) -> None:
        if offset >> 20 == BROKEN_AT >> 20:
            client.done(cookie, errno.EIO)
        else:
            data = memoryview(self.memory)[offset : offset + length]
            client.data(cookie, [(length, data)])

    def read_blocks(
        self,
        client: Any,
        cookies: Sequence[int],
        firsts: Sequence[int],
        counts: Sequence[int],
        layer_id: int,
    ) -> None:
        whole = BROKEN_AT >> 20 not in {first >> 8 for first in firsts}
        if whole and sum(counts) == len(counts):
            at = wire.HEADROOM_BYTES
            for first in firsts:
                begin = first * BLOCK_BYTES
                self.cells[at : at + BLOCK_BYTES] = self.memory[begin : begin + BLOCK_BYTES]
                at += wire.CELL_BYTES
            client.blocks(cookies, memoryview(self.cells)[: len(counts) * wire.CELL_BYTES])
            return
        for cookie, first, count in zip(cookies, firsts, counts, strict=True):
            self.read(client, cookie, first * BLOCK_BYTES, count * BLOCK_BYTES, layer_id)

    def zero(
        self, client: Any, cookie: int, offset: int, length: int, keep: bool, fua: bool
    ) -> None:
        self.calls.append(("zero", offset, length, keep))
        self.memory[offset : offset + length] = bytes(length)
        client.done(cookie, 0)

    def flush(self, client: Any, cookie: int) -> None:
        self.calls.append(("flush",))
        client.done(cookie, 0)


class Daemon:
    """As much of a volume daemon as a device needs, its loop in a thread."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.engine = MemoryEngine()
        self.options = SimpleNamespace(block_size=4096)
        self.devices: list[Any] = []
        self.waiting: list[Any] = []
        self.congested = self.stopping = False
        self.ublk = UblkDevices(self)  # type: ignore[arg-type]

    def send_to_members(self) -> bool:
        return True

    def send_to_clients(self) -> bool:
        for device in self.devices:
            if device.answers:
                device.flush()
        return True

    def sending(self, call: Any) -> Any:
        return lambda: (call(), self.send_to_clients())

    def device_stopped(self, device: Any) -> None:
        if device in self.devices:
            self.devices.remove(device)
        device.close()


@pytest.fixture(params=[1, 2])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[str, MemoryEngine]]:
    """A device with one queue, then with two."""
    ready, gone = threading.Event(), threading.Event()
    said: list[Any] = []
    made: list[Daemon] = []

    def attached(device: Any, error: BlockdError | None) -> None:
        said.append(error or device.info)
        ready.set()

    def run() -> None:  # the ring belongs to the thread that makes it
        daemon = Daemon()
        made.append(daemon)
        daemon.loop.post(lambda: daemon.ublk.attach("", request.param, attached))
        daemon.loop.run()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(60)
    assert isinstance(said[0], ublk.Info), said[0]
    assert said[0].queues == min(request.param, os.cpu_count() or 1)
    yield said[0].path, made[0].engine
    loop = made[0].loop
    loop.post(lambda: made[0].ublk.detach("", lambda error: gone.set()))
    assert gone.wait(60)
    loop.stop()
    thread.join()
    assert not os.path.exists(said[0].path)


def test_errors_and_data_pass_as_they_are(served: tuple[str, MemoryEngine]) -> None:
    device, engine = served
    content = os.urandom(3 << 20)
    fd = os.open(device, os.O_RDWR)
    assert os.pwrite(fd, content, 1 << 20) == len(content)
    os.fsync(fd)
    assert ("flush",) in engine.calls
    assert engine.memory[1 << 20 : 4 << 20] == content
    os.close(fd)
    page = mmap.mmap(-1, 4096)  # O_DIRECT: the page cache would tell EIO whatever the device said
    fd = os.open(device, os.O_RDWR | os.O_DIRECT)
    with pytest.raises(OSError, match="No space left") as raised:
        os.pwrite(fd, page, FULL_AT)
    assert raised.value.errno == errno.ENOSPC
    os.close(fd)
    subprocess.run(["blockdev", "--flushbufs", device], check=True)
    fd = os.open(device, os.O_RDONLY)
    assert os.pread(fd, len(content), 1 << 20) == content
    with pytest.raises(OSError, match="Input/output") as raised:
        os.pread(fd, 4096, BROKEN_AT)
    assert raised.value.errno == errno.EIO
    os.close(fd)


def test_discards_and_zeroes_and_fua_are_told_apart(served: tuple[str, MemoryEngine]) -> None:
    device, engine = served
    subprocess.run(["blkdiscard", "-o", "4194304", "-l", "1048576", device], check=True)
    assert ("zero", 4 << 20, 1 << 20, False) in engine.calls
    subprocess.run(["blkdiscard", "-z", "-o", "8388608", "-l", "1048576", device], check=True)
    assert any(call[:2] == ("zero", 8 << 20) for call in engine.calls)
    subprocess.run(
        ["dd", "if=/dev/zero", f"of={device}", "bs=4k", "count=1", "seek=8", "oflag=direct,dsync"],
        check=True,
        capture_output=True,
    )
    assert ("fua", 8 * 4096) in engine.calls


@pytest.mark.skipif("SPEED" not in os.environ, reason="a measurement; SPEED=1 asks for it")
def test_speed(served: tuple[str, MemoryEngine]) -> None:
    device, _ = served
    for what in ("randread", "randwrite"):
        for depth in (1, 16, 64):
            said = subprocess.run(
                [
                    *("fio", "--name=x", f"--filename={device}", f"--rw={what}", "--bs=4k"),
                    *("--direct=1", "--ioengine=io_uring", f"--iodepth={depth}", "--size=40M"),
                    *("--time_based", "--runtime=5"),
                ],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            line = next(line for line in said.splitlines() if "IOPS=" in line)
            print(what, depth, line.strip())
