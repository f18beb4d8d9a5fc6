"""Proves that a volume daemon can be replaced under load: no request is lost, repeated or answered
wrongly, and an attempt that comes to nothing leaves everything as it was."""

from __future__ import annotations

import json
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockd.daemons import handover
from tests.blockd.daemon_harness import Cluster, Daemon, cluster, poll
from tests.blockd.foreign import fio, libnbd_process
from tests.blockd.nbd_client import FLUSH, READ, WRITE, NbdClient

BLOCK = 4096
MIB = 1 << 20
BLOCKS = 2000
DEPTH = 16


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        yield Path(path)


def successor(running: Cluster, *more: str) -> Daemon:
    """A volume daemon that will take over from the one that runs."""
    words = [word for word in running.volume.arguments if word != "--take-over"]
    made = Daemon("v", [*words, "--take-over", *more], running.directory)
    made.control = running.volume.control
    return made


def hand_over(running: Cluster) -> None:
    """Replace the volume daemon; the old one has ended afterwards."""
    new, old = successor(running), running.volume
    running.volume = new.start()
    assert old.process is not None
    assert old.process.stdout is not None
    assert old.process.wait(30) == 0, old.log.read_text()
    old.process.stdout.close()
    assert new.must("status")["pid"] == new.pid


class Load(threading.Thread):
    """Pipelined writes and reads of one client, checked against a model."""

    def __init__(self, path: Path, seed: int) -> None:
        super().__init__()
        self.client = NbdClient(path)
        self.random = random.Random(seed)
        self.model = [bytes(BLOCK)] * BLOCKS
        self.count = 0
        self.failure: BaseException | None = None
        self.enough = threading.Event()

    def run(self) -> None:
        try:
            while not self.enough.is_set():
                self._batch()
        except BaseException as error:
            self.failure = error

    def _batch(self) -> None:
        wanted: dict[int, bytes | None] = {}
        for place in self.random.sample(range(BLOCKS), DEPTH):
            kind = self.random.randrange(8)
            if kind == 0:
                wanted[self.client.send(FLUSH)] = None
            elif kind < 4:
                cookie = self.client.send(READ, place * BLOCK, BLOCK)
                wanted[cookie] = self.model[place]
            else:
                data = self.random.randbytes(BLOCK)
                wanted[self.client.send(WRITE, place * BLOCK, data=data)] = None
                self.model[place] = data
        sizes = {cookie: BLOCK for cookie, data in wanted.items() if data is not None}
        for _ in range(DEPTH):
            cookie, error, content = self.client.receive(sizes)
            assert not error
            expected = wanted.pop(cookie)  # KeyError: answered twice, or never asked
            assert expected is None or content == expected
            self.count += 1

    def end(self) -> None:
        self.enough.set()
        self.join(30)
        assert self.failure is None, self.failure


@pytest.mark.parametrize("local", [False, True])
def test_clients_under_load_notice_nothing(directory: Path, local: bool) -> None:
    with cluster(directory, 1 if local else 3, "64M", local) as running:
        load = Load(running.nbd, 1)
        load.start()
        for _ in range(5):
            before = load.count
            hand_over(running)
            poll("answers from the successor", lambda old=before: load.count > old + 100)
            assert load.failure is None, load.failure
        running.volume.must("snapshot-create", name="later")
        load.end()
        load.client.flush()
        counters = running.status()["counters"]
        assert counters["reads"] + counters["writes"] + counters["flushes"] == load.count + 1
        assert running.status()["health"] == "healthy"
        running.volume.kill()
        running.volume = successor(running)
        running.volume.arguments.remove("--take-over")
        running.volume.start()
        assert NbdClient(running.nbd).read(0, BLOCKS * BLOCK) == b"".join(load.model)


@pytest.mark.parametrize("local", [False, True])
def test_messages_are_not_cut(directory: Path, local: bool) -> None:
    """The change over comes in the middle of a header, of a payload, of one that is skipped."""
    with cluster(directory, 1 if local else 2, "64M", local) as running:
        client, data = NbdClient(running.nbd), random.Random(2).randbytes(MIB)

        def message(command: int, offset: int, length: int, cookie: int) -> bytes:
            return struct.pack(">IHHQQI", 0x25609513, 0, command, cookie, offset, length)

        whole = message(WRITE, MIB, MIB, 7) + data
        for cut in (1, 20, 28, 5000, MIB):
            client.socket.sendall(whole[:cut])
            hand_over(running)
            client.socket.sendall(whole[cut:])
            assert client.receive({}) == (7, 0, b"")
            assert client.read(MIB, MIB) == data
            client.run(WRITE, MIB, data=bytes(MIB))
        client.socket.sendall(message(WRITE, 0, 40 * MIB, 8) + bytes(9 * MIB))
        hand_over(running)
        client.socket.sendall(bytes(31 * MIB) + message(READ, 0, BLOCK, 9))
        assert client.receive({}) == (8, 22, b"")
        assert client.receive({9: BLOCK}) == (9, 0, bytes(BLOCK))


@pytest.mark.parametrize("local", [False, True])
def test_answers_that_a_client_has_not_taken_are_not_lost(directory: Path, local: bool) -> None:
    with cluster(directory, 1 if local else 2, "256M", local) as running:
        client, data = NbdClient(running.nbd), random.Random(3).randbytes(8 * MIB)
        for part in range(16):
            client.write(part * 8 * MIB, data)
        sizes = {client.send(READ, part * 8 * MIB, 8 * MIB): 8 * MIB for part in range(16)}
        asked = set(sizes)  # 128 MiB: more than is read at a time, so some requests wait
        quick = NbdClient(running.nbd)
        for _ in range(3):
            hand_over(running)
            assert quick.read(0, BLOCK) == data[:BLOCK]
        for _ in range(16):
            cookie, error, content = client.receive(sizes)
            asked.remove(cookie)
            assert not error
            assert content == data
        client.write(0, b"n" * BLOCK)
        assert client.read(0, BLOCK) == b"n" * BLOCK


def test_what_clients_agreed_on_stays(directory: Path) -> None:
    """Structured replies, contexts and the export of a snapshot belong to the connection."""
    with cluster(directory, 2, "64M") as running:
        client = NbdClient(running.nbd)
        client.write(MIB, b"a" * MIB)
        running.volume.must("snapshot-create", name="old")
        client.write(MIB, b"b" * MIB)
        reader = NbdClient(running.nbd, "vol@old")
        script = f"""
import sys
import nbd
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.connect_uri("{running.uri()}")
print("connected", flush=True)
sys.stdin.readline()
found = []
h.block_status(4 << 20, 0, lambda context, offset, entries, error: found.append(entries) and 0)
assert found == [[1 << 20, 3, 1 << 20, 0, 2 << 20, 3]], found
kinds = []
h.pread_structured(2 << 20, 0, lambda buf, offset, kind, error: kinds.append(kind) and 0)
assert h.get_structured_replies_negotiated() and sorted(set(kinds)) == [1, 2], kinds
print("same", flush=True)
"""
        with libnbd_process(script) as other:
            assert other.stdin is not None
            assert other.stdout is not None
            assert other.stdout.readline() == "connected\n"
            hand_over(running)
            other.stdin.write("\n")
            other.stdin.flush()
            assert other.stdout.readline() == "same\n"
        assert reader.read(MIB, MIB) == b"a" * MIB
        with pytest.raises(OSError, match="failed"):
            reader.write(0, b"c" * BLOCK)
        answer = running.volume.ask("snapshot-remove", name="old")
        assert "exported to 1 NBD clients" in answer["message"]


# A successor that goes wrong: it asks as a real one does, and then does what the test says.
BAD_SUCCESSOR = """
import os, sys, time
from blockd.daemons import handover, takeover
step, control = sys.argv[1:]
channel = takeover._ask(control)
if step != "before the state":
    state, descriptors, _ = handover.receive(channel)
    assert state["clients"] and len(descriptors) > 2
if step == "refuses":
    channel.sendall(b"no way")
if step == "hangs":
    print("hangs", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("step", ["before the state", "after the state", "refuses", "hangs"])
def test_a_successor_that_fails_changes_nothing(directory: Path, local: bool, step: str) -> None:
    with cluster(directory, 1 if local else 2, "64M", local) as running:
        load = Load(running.nbd, 4)
        load.start()
        poll("load", lambda: load.count > 100)
        words = ["-c", BAD_SUCCESSOR, step, f"unix:{running.volume.control}"]
        done = subprocess.run([sys.executable, *words], capture_output=True, timeout=60)
        assert done.returncode == (-signal.SIGKILL if step == "hangs" else 0), done.stderr
        before = load.count
        poll("it goes on", lambda: load.count > before + 200)
        assert "the successor did not take the volume" in running.volume.log.read_text()
        hand_over(running)
        load.end()
        assert NbdClient(running.nbd).read(0, BLOCKS * BLOCK) == b"".join(load.model)
        assert running.status()["health"] == "healthy"


def test_successors_that_cannot_be(directory: Path) -> None:
    """Each is told why, and the volume daemon that runs goes on."""
    with cluster(directory, 2, "64M") as running:
        client = NbdClient(running.nbd)
        client.write(0, b"a" * BLOCK)
        stranger = successor(running, "--state", str(directory / "other.db"))
        code, line = stranger.refused()
        assert code == 4
        assert "which is not vol in" in line
        answer = running.volume.ask("hand-over", formats=[99], to="", secret="")
        assert "formats [99]" in answer["message"]
        nonsense = {"formats": [handover.FORMAT], "secret": "0" * 32}
        answer = running.volume.ask("hand-over", to="unix:\ud800", **nonsense)
        assert "32 hex digits" in answer["message"]
        answer = running.volume.ask("hand-over", to="f" * 32, **nonsense)
        assert "did not take the volume" in answer["message"]
        assert client.read(0, BLOCK) == b"a" * BLOCK
        nobody = successor(running, "--control", f"unix:{directory}/none")
        code, line = nobody.refused()
        assert code == 1
        assert "is its daemon running?" in line


def test_two_successors_at_once_take_turns(directory: Path) -> None:
    with cluster(directory, 2, "64M") as running:
        load = Load(running.nbd, 6)
        load.start()
        first, second, old = successor(running), successor(running), running.volume
        first.launch()
        second.launch()
        lasting = (first, second)
        poll("the old one ends", lambda: not old.alive())
        poll("one is left", lambda: [each.alive() for each in lasting].count(True) == 1)
        before = load.count
        poll("it serves", lambda: load.count > before + 100)
        for each in (old, *lasting):
            assert each.process is not None
            if each.alive():
                running.volume = each
            elif each.process.stdout is not None:
                each.process.stdout.close()
        load.end()


def test_a_client_that_never_chooses_an_export_is_sent_away(directory: Path) -> None:
    with cluster(directory, 2, "64M") as running, socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(running.nbd))
        assert silent.recv(18)
        client = NbdClient(running.nbd)
        hand_over(running)
        assert silent.recv(1) == b""
        assert client.read(0, BLOCK) == bytes(BLOCK)


def test_a_full_disk_does_not_end_the_successor(directory: Path) -> None:
    """It is the only one left when it writes its pid file and its log."""
    with cluster(directory, 2, "64M") as running:
        client = NbdClient(running.nbd)
        client.write(0, b"a" * BLOCK)
        new, old = successor(running, "--pid-file", "/dev/full"), running.volume
        with open("/dev/full", "w") as full:
            new.process = subprocess.Popen(new.command(), stdout=full, stderr=full)
        running.volume = new
        poll("the old one ends", lambda: not old.alive())
        assert old.process is not None
        assert old.process.stdout is not None
        old.process.stdout.close()
        assert client.read(0, BLOCK) == b"a" * BLOCK
        client.write(0, b"b" * BLOCK)
        assert new.alive()


def test_addresses_are_those_of_the_command_line(directory: Path) -> None:
    """A port without `tcp:` is kept; an address that is not wanted any more is closed."""
    with cluster(directory, 2, "64M") as running:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        running.volume.end()
        running.volume.arguments += ["--nbd", f"127.0.0.1:{port}"]
        running.volume.start()
        hand_over(running)
        running.volume.arguments = [*running.volume.arguments[:-3], "--take-over"]
        with socket.create_connection(("127.0.0.1", port)) as link:
            assert link.recv(18)
        hand_over(running)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        assert NbdClient(running.nbd).read(0, BLOCK) == bytes(BLOCK)


def test_idle_clients_are_read_again_after_a_failure_under_pressure(directory: Path) -> None:
    """The replica hangs with so much queued that no client is read."""
    with cluster(directory, 1, "256M") as running:
        writer, idle = NbdClient(running.nbd), NbdClient(running.nbd)
        replica = running.replicas[0].process
        assert replica is not None
        replica.send_signal(signal.SIGSTOP)
        try:
            data = bytes(MIB)
            sending = threading.Thread(
                target=lambda: [writer.send(WRITE, n * MIB, data=data) for n in range(60)]
            )
            sending.start()
            code, line = successor(running).refused()
        finally:
            replica.send_signal(signal.SIGCONT)
        assert code == 1
        assert "there is still" in line
        for _ in range(60):
            assert writer.receive({})[1] == 0
        sending.join(30)
        assert idle.read(0, BLOCK) == bytes(BLOCK)
        hand_over(running)
        assert idle.read(0, BLOCK) == bytes(BLOCK)


def test_a_replica_that_does_not_answer_prevents_it(directory: Path) -> None:
    with cluster(directory, 1, "64M") as running:
        client = NbdClient(running.nbd)
        client.write(0, b"a" * BLOCK)
        running.replicas[0].process.send_signal(signal.SIGSTOP)
        try:
            cookie = client.send(WRITE, 0, data=b"b" * BLOCK)
            code, line = successor(running).refused()
        finally:
            running.replicas[0].process.send_signal(signal.SIGCONT)
        assert code == 1
        assert "there is still a request of a client that waits for a replica" in line
        assert client.receive({})[:2] == (cookie, 0)
        assert client.read(0, BLOCK) == b"b" * BLOCK
        hand_over(running)
        assert client.read(0, BLOCK) == b"b" * BLOCK


def test_a_rebuild_goes_on_at_the_successor(directory: Path) -> None:
    with cluster(directory, 3, "256M") as running:
        client, data = NbdClient(running.nbd), random.Random(5).randbytes(MIB)
        running.replicas[2].kill()
        for part in range(100):
            client.write(part * MIB, data)
        running.replicas[2].start()
        poll("a rebuild", lambda: running.member(2)["state"] == "SYNCING")
        hand_over(running)
        running.rebuild(2)
        for number in (0, 1):
            running.replicas[number].kill()
        assert all(client.read(part * MIB, MIB) == data for part in range(100))


def test_fio_sees_no_error(directory: Path) -> None:
    with cluster(directory, 3, "64M") as running:
        report = directory / "fio.json"
        words = f"--rw=randrw --bs=4k --iodepth=16 --size=64M --output={report}"
        more = "--time_based --runtime=600 --output-format=json --verify_backlog=64"
        with subprocess.Popen(fio(running.uri(), *words.split(), *more.split())) as client:
            poll("requests", lambda: running.status()["counters"]["writes"] > 100)
            for _ in range(5):
                hand_over(running)
            client.send_signal(signal.SIGINT)
            assert client.wait(30) == 128  # it was interrupted
        text = report.read_text()
        (job,) = json.loads(text[text.index("{") :])["jobs"]
        assert job["error"] == 0
        assert job["write"]["total_ios"] > 100
