"""Proves what the processes tell a service manager, on a real datagram socket: that they are ready
when they are, that the node service is alive only while it is, and that no daemon inherits the way
to the manager."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockd.client import Client
from blockd.node import boot, reconcile, server, watchdog
from blockd.node.objects import Metadata, Mount, Volume, VolumeSpec
from blockd.node.reconcile import Workers, WorkQueue
from blockd.node.sqlite_store import SqliteStore
from blockd.node.store import modify_status
from blockd.node.watchdog import Watchdog, api_stuck
from blockd.notify import Notifier
from tests.blockd.node_harness import MIB, WAIT_SECONDS, NodeHarness, until

WATCHDOG_SECONDS = 0.6


class Manager:
    """The socket of a service manager, and what has come there."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.settimeout(WAIT_SECONDS)
        self.heard: list[str] = []

    def until(self, wanted: str, count: int = 1) -> None:
        """Listen until this line has come `count` times more."""
        while count:
            lines = self._socket.recv(4096).decode().splitlines()
            self.heard += lines
            count -= wanted in lines

    def rest(self) -> list[str]:
        """What has come and was not looked at."""
        self._socket.setblocking(False)
        lines: list[str] = []
        try:
            while True:
                lines += self._socket.recv(4096).decode().splitlines()
        except BlockingIOError:
            self._socket.settimeout(WAIT_SECONDS)
            return lines

    def environment(self) -> dict[str, str]:
        """What a service is started with."""
        watchdog_usec = str(int(WATCHDOG_SECONDS * 1e6))
        return {"NOTIFY_SOCKET": self.address, "WATCHDOG_USEC": watchdog_usec}

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    """A service manager at a path."""
    made = Manager(str(tmp_path / "notify"))
    yield made
    made.close()


def test_the_node_service_is_ready_then_alive_then_stopping(
    manager: Manager, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    with subprocess.Popen(
        [sys.executable, "-m", "blockd", "--home", str(home), "serve"],
        env={**os.environ, **manager.environment()},
    ) as service:
        try:
            manager.until("READY=1")
            assert "WATCHDOG=1" not in manager.heard
            with Client.over_unix(home) as client:  # the API answers when it is said to
                body = {"name": "data", "size_bytes": 64 * MIB, "replicas": 2}
                client.volume_create(body)
                view = client.attach("data", "socket")
                pids = [view["pid"], *(replica["pid"] for replica in view["replicas"])]
                for pid in pids:
                    words = Path(f"/proc/{pid}/environ").read_bytes()
                    assert b"NOTIFY_SOCKET" not in words
                    assert b"WATCHDOG" not in words
                manager.until("WATCHDOG=1", 3)
                manager.until("STATUS=1 volumes, 1 attached")
                client.detach("data")
                client.volume_delete("data")
            service.send_signal(signal.SIGTERM)
            manager.until("STOPPING=1")
            assert service.wait(WAIT_SECONDS) == 0
            assert "WATCHDOG=1" not in manager.rest(), "nothing is promised while it ends"
        finally:
            service.kill()


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_daemons_tell_when_they_serve(tmp_path: Path, kind: str) -> None:
    address = str(tmp_path / "notify") if kind == "path" else f"@blockd-test-{os.getpid()}"
    manager = Manager(address)
    environment = {**os.environ, "NOTIFY_SOCKET": address}
    directory = Path(f"/tmp/blockd-notify-{os.getpid()}")
    directory.mkdir()
    replica, volume = f"unix:{directory}/replica", f"unix:{directory}/nbd"
    words = [sys.executable, "-m", "blockd", "daemon"]
    started = []
    try:
        for what in (
            ["replica", str(tmp_path / "r"), "--create", "--size", "64M", "--listen", replica],
            ["volume", "v", "--replica", replica, "--nbd", volume, "--state", f"{tmp_path}/db"],
        ):
            started.append(subprocess.Popen([*words, *what], env=environment))
            manager.until("READY=1")
            listening = (replica if what[0] == "replica" else volume).removeprefix("unix:")
            with socket.socket(socket.AF_UNIX) as link:
                link.connect(listening)
        assert f"STATUS=volume v on {volume}" in manager.heard
    finally:
        for process in reversed(started):
            process.terminate()
            assert process.wait(WAIT_SECONDS) == 0
        manager.close()
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()


def test_only_the_process_that_is_meant_serves_the_watchdog() -> None:
    environment = {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "3000000", "OTHER": "1"}
    notifier = Notifier(environment)
    assert notifier.watchdog_seconds == 3
    assert environment == {"OTHER": "1"}, "children would inherit the rest"
    notifier.tell("READY=1")  # nobody listens there
    for pid, seconds in ((os.getpid(), 1.5), (1, None)):
        found = Notifier({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": str(pid)})
        assert found.watchdog_seconds == seconds


def test_the_watchdog_is_served_only_while_nothing_is_stuck(manager: Manager) -> None:
    reason: list[str | None] = [None]
    looks = [0]

    def stuck() -> str | None:
        looks[0] += 1
        return reason[0]

    dog = Watchdog(Notifier(manager.environment()), stuck, lambda: "fine")
    dog.start()
    manager.until("WATCHDOG=1")
    reason[0] = "a thread has ended"
    manager.until("STATUS=not alive: a thread has ended")
    start = len(manager.heard)
    until(lambda seen=looks[0]: looks[0] > seen + 4, "it has looked again")  # type: ignore[misc]
    assert "WATCHDOG=1" not in manager.rest() + manager.heard[start:]
    reason[0] = None
    manager.until("WATCHDOG=1")
    assert "STATUS=fine" in manager.heard[start:]
    dog.stop()
    assert manager.rest()[-2] == "STOPPING=1"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_pass_that_hangs_and_a_worker_that_ended_are_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queue, hang = WorkQueue(), threading.Event()

    def work(name: str) -> float | None:
        if name == "end":
            raise SystemExit  # not an error a worker survives
        hang.wait(WAIT_SECONDS)
        return None

    workers = Workers(queue, work)
    workers.start()
    assert workers.stuck() is None
    for number in range(reconcile.WORKERS):
        queue.add(f"slow{number}")
    until(lambda: len(queue._in_work) == reconcile.WORKERS, "all are in work")
    queue.add("late")
    assert workers.stuck() is None, "a pass may take long"
    monkeypatch.setattr(reconcile, "PASS_SECONDS_MAX", 0.05)
    until(lambda: "pass over volume slow" in (workers.stuck() or ""), "the pass is noticed")
    queue._in_work.clear()  # as if each had begun anew
    until(lambda: "late has waited" in (workers.stuck() or ""), "no worker is free")
    monkeypatch.setattr(reconcile, "PASS_SECONDS_MAX", 60)
    hang.set()
    queue.add("end")
    until(lambda: "has ended" in (workers.stuck() or ""), "the worker is noticed")
    workers.close()


def test_an_api_that_does_not_answer_is_noticed(
    node: NodeHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = node.root / "blockd.sock"
    assert "does not answer" in (node.service.stuck() or ""), "it is not open yet"
    with node.client():
        assert node.service.stuck() is None
        monkeypatch.setattr(watchdog, "ANSWER_SECONDS", 0.1)
        api.unlink()
        assert "does not answer" in (api_stuck(api) or ""), "nobody listens"
        with server.unix_socket(api):
            assert "does not answer" in (api_stuck(api) or ""), "nobody speaks"


def test_the_start_waits_for_volumes_that_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SqliteStore(tmp_path / "state.db")
    spec = VolumeSpec(size_bytes=1 << 20, attached=True, mount=Mount("/data"))
    store.create(Volume(metadata=Metadata(name="data"), spec=spec))
    store.create(Volume(metadata=Metadata(name="idle"), spec=VolumeSpec(size_bytes=1 << 20)))
    waiter = threading.Thread(target=boot.wait_until_settled, args=(store, threading.Event()))
    waiter.start()
    modify_status(store, Volume, "data", lambda v: setattr(v.status, "state", "attached"))
    waiter.join(3 * boot.POLL_SECONDS)
    assert waiter.is_alive(), "it is not mounted yet"
    modify_status(store, Volume, "data", lambda v: setattr(v.status, "mount", "/data"))
    waiter.join(WAIT_SECONDS)
    assert not waiter.is_alive()
    modify_status(store, Volume, "data", lambda v: setattr(v.status, "mount", None))
    monkeypatch.setattr(boot, "SETTLE_SECONDS", 0.05)
    boot.wait_until_settled(store, threading.Event())  # returns: one volume does not hold up all
